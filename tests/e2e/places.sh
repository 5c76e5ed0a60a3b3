#!/bin/bash
# What is wrong with an adapter's targets is said by the recipe's own key, at the place where it stands: in the file, or on the command line.
# And what cannot be written is said before anything is computed.
. "$(dirname "$0")/tap.inc"
. "$(dirname "$0")/model.inc"
r=$scratch/r.yaml
recipe "$r" "lora_target_modules: [q_proj, v_proj]" "rank_pattern:" "  q_proj: 4" "  self_attn.v_proj: 8" "layers_to_transform: [0, 2]" "lora_exclude_modules: [o_proj]"

# refuses TEXT OVERRIDES...: exit 2 and one line that has the text; notes may stand in front of it.
refuses() {
    local text=$1
    shift
    "$TAPEFT" plan "$r" "$@" >"$scratch/out" 2>"$scratch/errors"
    test $? = 2 && test "$(grep -vc '^note: ' "$scratch/errors")" = 1 && tail -n 1 "$scratch/errors" | grep -qF -- "$text"
}
in_file() { # in_file TEXT SED-EXPRESSION: the same for a changed file
    cp "$r" "$scratch/kept.yaml"
    sed -i "$2" "$r"
    refuses "$1"
    local status=$?
    mv "$scratch/kept.yaml" "$r"
    return $status
}
check "the recipe is fine" "$TAPEFT" plan "$r"

check "a target that is not there" in_file "r.yaml:11:22: lora_target_modules: \"k_prj\" matches no linear layer of LlamaForCausalLM; did you mean \"k_proj\"?" 's/\[q_proj, v_proj\]/[q_proj, v_proj, k_prj]/'
check "one on the command line" refuses 'override 1: lora_target_modules: "k_prj" matches no' 'lora_target_modules=[k_prj]'
check "by another tool's name" refuses 'override 1: lora_target_modules: "x" matches no' 'target_modules=[x]' '~rank_pattern'
check "a rank pattern" in_file 'r.yaml:14:20: rank_pattern: "self_attn.v_prj" matches no adapted layer' 's/self_attn.v_proj/self_attn.v_prj/'
check "one on the command line" refuses 'override 1: rank_pattern: "k_proj" matches no adapted layer' rank_pattern.k_proj=8
check "beside one that is fine" refuses 'override 2: rank_pattern: "k_proj"' rank_pattern.q_proj=2 rank_pattern.k_proj=8
check "an alpha pattern" refuses 'override 1: alpha_pattern: "mlp" matches no adapted layer' alpha_pattern.mlp=8
check "a pattern that is no expression" refuses 'override 1: rank_pattern: regular expression' 'rank_pattern={"(q": 3}'
check "targets that are no expression" refuses 'override 2: lora_target_modules: regular expression "(a"' '~layers_to_transform' 'lora_target_modules=(a'
check "exceptions that are no expression" refuses 'override 1: lora_exclude_modules: regular expression "(a"' 'lora_exclude_modules=(a'
check "an exception that is not there" refuses 'override 1: lora_exclude_modules: "up_prj" matches no linear layer of LlamaForCausalLM; did you mean "up_proj"?' 'lora_exclude_modules=[up_prj]'
check "exceptions that leave nothing" refuses 'lora_target_modules: no linear layer' 'lora_exclude_modules=[q_proj, v_proj]' '~rank_pattern'

# Layers.
check "the last layer" "$TAPEFT" plan "$r" 'layers_to_transform=[2]'
check "the one behind it" refuses 'override 1: layers_to_transform: 3: the model has layers 0 to 2' 'layers_to_transform=[3]'
check "in a range" refuses 'override 1: layers_to_transform: 3: the model has layers 0 to 2' 'layers_to_transform="1-7"'
check "beside a regular expression, as PEFT says" refuses 'layers_to_transform: without effect' '~rank_pattern' 'lora_target_modules=.*q_proj'

# Limits, and one beyond.
many() { printf 'q_proj, %.0s' $(seq $(($1 - 1))); printf v_proj; }
check "rank 1024" "$TAPEFT" plan "$r" lora_r=1024
check "rank 1025" refuses 'from 1 to 1024, got 1025' lora_r=1025
check "4095 targets" "$TAPEFT" plan "$r" "lora_target_modules=[$(many 4095)]"
check "4096 targets" "$TAPEFT" plan "$r" "lora_target_modules=[$(many 4096)]"
check "4097 targets" refuses 'override 1: lora_target_modules: more than 4096' "lora_target_modules=[$(many 4097)]"

# Places to write to: a model that takes no time to be wrong about.
writes() { # writes TEXT COMMAND...: exit 4 and one line, before the model (which is not there) is looked for
    local text=$1
    shift
    "$TAPEFT" "$@" >"$scratch/out" 2>"$scratch/errors"
    test $? = 4 && test "$(wc -l <"$scratch/errors")" = 1 && grep -qF -- "$text" "$scratch/errors"
}
input=$golden/models/llama/expect.safetensors
check "logits into a folder that is not there" writes 'there is no folder' logits "$scratch/none" --in "$input" --out "$scratch/no/x"
check "logits over a folder" writes 'is not a regular file' logits "$scratch/none" --in "$input" --out "$scratch"
check "gradients into a folder that is not there" writes 'there is no folder' train "$r" base_model="$scratch/none" --dump-gradients "$scratch/no/x"
check "and no run was begun" test ! -e "$scratch/run"
finish
