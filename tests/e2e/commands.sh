#!/bin/bash
# Commands as people mistype them and stop them: one line that says what to do, the exit code of the class, no results out of thin air.
. "$(dirname "$0")/tap.inc"
golden=${TAPEFT_GOLDEN:-tests/golden}
model=$golden/models/llama
data=$golden/curves/llama-lora/batches.safetensors

# fails STATUS TEXT ARGUMENTS...: exit status, and a single line on stderr that has the text.
fails() {
    local expected=$1 text=$2
    shift 2
    "$TAPEFT" "$@" >"$scratch/out" 2>"$scratch/errors"
    test $? = "$expected" && test "$(wc -l <"$scratch/errors")" = 1 && grep -qF -- "$text" "$scratch/errors"
}
check "a command with a typo" fails 2 'did you mean "train"' trian
check "a flag with a typo" fails 2 'did you mean "--max-tokens"' generate "$model" --max-token 5
check "an argument too few" fails 2 'RECIPE is missing' train
check "a recipe that is not there, said once" fails 3 'none.yaml' train "$scratch/none.yaml"
check "a file of the model's folder" fails 2 'expected the model' generate "$model/config.json" --prompt x
check "data that is not there" fails 3 'does not exist' eval "$model" --data "$scratch/none.jsonl"
check "rows that are not there" fails 3 'No such file' tokenize "$golden/tokenizers/gpt2" --in "$scratch/none"
check "a command of other versions" fails 2 'the command "merge" is not available in this version' merge "$model" x
check "a flag of other versions" fails 2 '--load-in-4bit: not available in this version' logits "$model" --load-in-4bit
check "a key as a flag" fails 2 'write lora_r=VALUE' train "$scratch/none.yaml" --lora_r 8
check "an override in the recipe's place" fails 2 '"device=cpu" stands where RECIPE belongs' plan device=cpu "$scratch/none.yaml"
check "a recipe for a model" fails 2 'got a recipe' generate recipes/configs/lora-gsm8k.yaml --prompt x
check "the version, wherever it is asked for" bash -c "'$TAPEFT' train --version | cmp - <('$TAPEFT' --version)"
check "-h is help" "$TAPEFT" train -h

# The device without arithmetic is for plans: what it computes are no results.
check "generate on no device" fails 2 '--device' generate "$model" --ids 1,2 --json --device dry
check "eval on no device" fails 2 '--device' eval "$model" --data "$data" --device dry
check "logits on no device" fails 2 '--device' logits "$model" --in "$model/expect.safetensors" --out "$scratch/out.safetensors" --device dry
check "doctor of no device" fails 2 '--device' doctor --device dry

# A model in several files has the tensors of all of them.
count_tensors() { "$TAPEFT" inspect "$1" --json | python3 -c 'import json, sys; print(len(json.load(sys.stdin)["tensors"]))'; }
named=$(python3 -c 'import json, sys; print(len(json.load(open(sys.argv[1]))["weight_map"]))' "$golden/models/llama-sharded/model.safetensors.index.json")
check "inspect counts the tensors of all shards" test "$(count_tensors "$golden/models/llama-sharded")" = "$named"

# {"__metadata__": {"a": ESC [31m}, ...}: on a terminal it would be obeyed.
header='{"__metadata__":{"a":"\u001b[31m"},"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
printf '%b\0\0\0\0\0\0\0%s\0' "\\x$(printf %x ${#header})" "$header" >"$scratch/escape.safetensors"
check "inspect reads it" "$TAPEFT" inspect "$scratch/escape.safetensors"
check_exit "and shows no control character" 1 bash -c "'$TAPEFT' inspect '$scratch/escape.safetensors' | grep -q \$'\\x1b'"

printf '{"ids": 5}\n' >"$scratch/ids.jsonl"
check "ids that are no list" fails 3 'expected an array' tokenize "$golden/tokenizers/gpt2" --in "$scratch/ids.jsonl" --decode

# Rows from a pipe.
printf '{"text": "some text"}\n\n{"text": "more"}' >"$scratch/text.jsonl"
"$TAPEFT" tokenize "$golden/tokenizers/gpt2" --in "$scratch/text.jsonl" >"$scratch/of_file"
check "standard input as a file" bash -c "'$TAPEFT' tokenize '$golden/tokenizers/gpt2' --in - <'$scratch/text.jsonl' | cmp - '$scratch/of_file'"
check "with its lines" bash -c "printf '{\"text\": \"a\"}\n{\"text\"' | '$TAPEFT' tokenize '$golden/tokenizers/gpt2' --in - 2>&1 | grep -q 'standard input:2:'"

# What preview shows is what train would take.
printf '%s\n' "base_model: $model" "datasets: [{path: $data, type: tokens}]" "max_steps: 1" "output_dir: $scratch/run" >"$scratch/r.yaml"
check "preview refuses a length that train refuses" fails 2 'max_seq_length' preview "$scratch/r.yaml" max_seq_length=100000
check "plan too" fails 2 'max_seq_length' plan "$scratch/r.yaml" max_seq_length=100000
check "--quiet is quiet about the plan" bash -c "'$TAPEFT' train '$scratch/r.yaml' --quiet device=cpu 2>&1 | cmp -s - /dev/null"
check "without it, modules and scaling are told" bash -c "'$TAPEFT' train '$scratch/r.yaml' overwrite=true 2>&1 | grep -Eq '^q_proj +2 +64 x 64 +16 +2 +4096'"
check "plan knows how long a step takes here" bash -c "'$TAPEFT' plan '$scratch/r.yaml' output_dir='$scratch/new' --json | python3 -c 'import json, sys; p = json.load(sys.stdin); sys.exit(not 1e6 < p[\"flops_per_step\"] / p[\"seconds_per_step\"] < 1e16)'"
check "and says so" bash -c "'$TAPEFT' plan '$scratch/r.yaml' output_dir='$scratch/new' | grep -Eq 'TFLOP a step of up to [0-9]+ tokens, about [0-9.e-]+ s'"
check "on the CPU sums keep their order" bash -c "'$TAPEFT' plan '$scratch/r.yaml' output_dir='$scratch/new' device=cpu deterministic=false --json | grep -q '\"deterministic\": true'"
check "plan has nothing to say on stderr" bash -c "'$TAPEFT' plan '$scratch/r.yaml' output_dir='$scratch/new' 2>&1 >/dev/null | cmp -s - /dev/null"

# Waiting for a prompt, the command is as easy to interrupt as any.
interrupt() {
    python3 - "$TAPEFT" "$@" <<'PYTHON'
import signal, subprocess, sys, time
p = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                     preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
time.sleep(1)
p.send_signal(signal.SIGINT)
try:
    sys.exit(p.wait(20) != -signal.SIGINT)
except subprocess.TimeoutExpired:
    p.kill()
    sys.exit(1)
PYTHON
}
cp -r "$model" "$scratch/model" && chmod -R u+w "$scratch/model" && cp "$golden/tokenizers/gpt2/tokenizer.json" "$scratch/model/"
printf '{"prompt": "a", "completion": "b"}\n' >"$scratch/rows.jsonl"
check "a renamed column that no row has" fails 2 'did you mean completion' \
    eval "$scratch/model" --data "$scratch/rows.jsonl" --columns completions=reply
check "SIGINT while waiting for standard input" interrupt generate "$scratch/model" --file -

# A prompt per row: the same replies as one by one, in the order of the rows.
printf '{"ids": [5, 6, 7]}\n{"ids": [1]}\n{"ids": [9, 8, 7, 6]}\n' >"$scratch/prompts.jsonl"
for ids in 5,6,7 1 9,8,7,6; do "$TAPEFT" generate "$model" --ids "$ids" --json --max-tokens 6; done >"$scratch/alone"
"$TAPEFT" generate "$model" --file "$scratch/prompts.jsonl" --max-tokens 6 >"$scratch/together"
check "prompts of a file" cmp "$scratch/alone" "$scratch/together"
printf '{"ids": [5]}\n{"id": [1]}\n' >"$scratch/prompts.jsonl"
check "a row without a prompt" fails 3 'prompts.jsonl:2:1: expected a row with' generate "$model" --file "$scratch/prompts.jsonl"
finish
