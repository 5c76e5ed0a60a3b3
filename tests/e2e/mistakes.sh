#!/bin/bash
# Recipes and flags that would quietly not do what they say: each is an error that names them. And looking is always possible: at rows that
# training refuses, at what a key means, at what changed since a checkpoint.
. "$(dirname "$0")/tap.inc"
. "$(dirname "$0")/model.inc"
r=$scratch/r.yaml
recipe "$r" "overwrite: true"

# refuses STATUS TEXT COMMAND...: exit status, and a last line on stderr that has the text.
refuses() {
    local expected=$1 text=$2
    shift 2
    "$TAPEFT" "$@" >"$scratch/out" 2>"$scratch/errors"
    test $? = "$expected" && tail -n 1 "$scratch/errors" | grep -qF -- "$text"
}

# Keys without effect.
check "k of every_k, without every_k" refuses 2 'gradient_checkpointing_k: has no effect here; it is for gradient_checkpointing every_k' train "$r" gradient_checkpointing_k=2
check "with it" "$TAPEFT" train "$r" gradient_checkpointing=every_k gradient_checkpointing_k=2
check "patience without a threshold" refuses 2 'loss_watchdog_patience: has no effect here' train "$r" loss_watchdog_patience=2
check "with it" "$TAPEFT" train "$r" loss_watchdog_patience=2 loss_watchdog_threshold=100
check "sample_steps without prompts" refuses 2 'sample_steps: has no effect here; it is for recipes with sample_prompts' train "$r" sample_steps=2
check "evaluations of nothing" refuses 2 'eval_steps: needs held-out data' train "$r" eval_steps=2 '~val_set_size'
check "a split of a file" refuses 2 'override 1: datasets.0.split: without effect' train "$r" datasets.0.split=test
mkdir "$scratch/folder" && cp "$scratch/rows.jsonl" "$scratch/folder/test.jsonl"
check "a split of a folder" "$TAPEFT" train "$r" datasets.0.split=test datasets.0.path="$scratch/folder"
check "what a run leaves is a recipe that says the same" bash -c "'$TAPEFT' train '$scratch/run/recipe.yaml' output_dir='$scratch/again' overwrite=true && cmp '$scratch/run/metrics.jsonl' '$scratch/again/metrics.jsonl'"

# Flags without effect.
check "--accept without resuming" refuses 2 '--accept: without effect, since nothing is resumed' train "$r" --accept=recipe
check "--fresh-optimizer without resuming" refuses 2 '--fresh-optimizer: without effect' train "$r" --fresh-optimizer
check "nothing to train" refuses 2 'adapter: none leaves nothing to train' train "$r" adapter=none '~lora_r'
check "nor to plan" refuses 2 'adapter: none leaves nothing to train' plan "$r" adapter=none '~lora_r'
check "but to evaluate" "$TAPEFT" eval "$r" adapter=none '~lora_r'

check "tokenize without --decode" refuses 2 '--skip-special: without effect' tokenize "$scratch/small" --in "$scratch/rows.jsonl" --skip-special
check "decoding adds nothing" refuses 2 '--no-special: without effect' tokenize "$scratch/small" --in "$scratch/rows.jsonl" --decode --no-special
check "nor ends a conversation" refuses 2 '--generation-prompt: without effect' tokenize "$scratch/small" --in "$scratch/rows.jsonl" --decode --generation-prompt
check "a chat of ids" refuses 2 '--chat: without effect' generate "$scratch/small" --chat --ids 1,2

# An adapter to start from has its settings: what the recipe says beside it agrees or is refused.
recipe "$scratch/first.yaml" "lora_target_modules: [q_proj, v_proj]" "rank_pattern: {q_proj: 4}" "layers_to_transform: [0, 1]" "lora_exclude_modules: [layers.1.self_attn.q_proj]"
check "an adapter" "$TAPEFT" train "$scratch/first.yaml" output_dir="$scratch/first"
from=("$r" adapter_path="$scratch/first/adapter")
check "to start from" "$TAPEFT" train "${from[@]}"
check "keys that agree" "$TAPEFT" train "${from[@]}" 'lora_target_modules=[v_proj, q_proj]' 'rank_pattern={q_proj: 4}' 'layers_to_transform=[1, 0]' 'lora_exclude_modules=[layers.1.self_attn.q_proj]'
for other in lora_r=3 lora_alpha=7 'lora_target_modules=[q_proj]' 'rank_pattern={q_proj: 5}' 'rank_pattern={}' 'alpha_pattern={q_proj: 4}' 'layers_to_transform=[0]' 'lora_exclude_modules=[v_proj]' init_lora_weights=gaussian; do
    check "$other does not" refuses 2 "override 2: ${other%%=*}: the" train "${from[@]}" "$other"
done

# What changed since a checkpoint, by key.
check "a run" "$TAPEFT" train "$r" save_steps=3
rm -r "$scratch/run/ckpt-6" "$scratch/run/adapter"
check "with two keys changed" refuses 6 'recipe changed (lora_dropout, learning_rate); --accept=recipe' train "$r" --resume save_steps=3 learning_rate=1e-3 lora_dropout=0.1
check "with sums in any order" refuses 6 'recipe changed (deterministic); --accept=recipe' train "$r" --resume save_steps=3 deterministic=false
check "the same by the checkpoint's path" refuses 6 'recipe changed (learning_rate)' train "$r" --resume="$scratch/run/ckpt-3" learning_rate=1e-3
check "where and how often it writes is free" "$TAPEFT" train "$r" --resume save_steps=2 logging_steps=2 threads=1

# Rows that training refuses can be looked at.
check "too many rows too long, in training" refuses 3 'see max_seq_length and excess_length_strategy' train "$r" max_seq_length=16
"$TAPEFT" preview "$r" max_seq_length=16 --rows 2 >"$scratch/rows" 2>"$scratch/errors"
check_exit "in preview" 0 "$TAPEFT" preview "$r" max_seq_length=16 --rows 2
check "it warns" grep -q 'warning: .*rows would be dropped' "$scratch/errors"
check "and shows them" test "$(grep -c '(dropped)' "$scratch/rows")" = 2
printf '{%% for m in messages %%}{{ m.content }}|{%% endfor %%}' >"$scratch/endless.jinja"
check "a template without an end, in training" refuses 3 'no row trains an end token' train "$r" chat_template="$scratch/endless.jinja"
check "in preview" bash -c "'$TAPEFT' preview '$r' chat_template='$scratch/endless.jinja' --rows 1 2>&1 | grep -qF 'What is 1 and 1?|[It is 2.]|'"
check "rows of nothing" refuses 2 '--rows: expected an integer' preview "$scratch/none.yaml" --rows 0

# Two files, of which one holds no held-out row: this ended in a crash once.
echo '{"text": "another"}' >"$scratch/other.jsonl"
check "a file without a row of its own" "$TAPEFT" train "$r" "datasets=[{path: $scratch/rows.jsonl}, {path: $scratch/other.jsonl}]" val_set_size=1

# What does not fit is shown before it is refused; nothing is written for it.
check "a plan that does not fit" refuses 4 'the run needs' plan "$r" memory_limit=1MiB
check "is told" grep -q '^memory ' "$scratch/out"
check "as JSON, too" bash -c "'$TAPEFT' plan '$r' memory_limit=1MiB --json 2>/dev/null | python3 -c 'import json, sys; sys.exit(json.load(sys.stdin)[\"peak_bytes\"] < 2**20)'"
check "a dry run likewise" refuses 4 'the run needs' train "$r" memory_limit=1MiB --dry-run
check "is told" grep -q '^memory ' "$scratch/out"
check "a run does not begin" refuses 4 'the run needs' train "$r" memory_limit=1MiB output_dir="$scratch/unfit"
check "nor leave a folder" test ! -e "$scratch/unfit"

# Folders taken for one another.
check "a run for its adapter" refuses 3 "its adapter is in $scratch/run/adapter" generate "$scratch/small" --adapter "$scratch/run" --prompt x
check "likewise to start from" refuses 3 "its adapter is in $scratch/run/adapter" train "$r" adapter_path="$scratch/run" output_dir="$scratch/new"
check "an adapter for its base" refuses 2 'this is an adapter; name the folder of its base' generate "$scratch/run/adapter" --prompt x

# Help.
check "a key" bash -c "'$TAPEFT' help lora_r | grep -qx '  expected   an integer from 1 to 1024'"
check "by another tool's name" bash -c "'$TAPEFT' help cutoff_len | grep -qx max_seq_length"
check "all of them, as in docs/recipes.md" bash -c "diff <('$TAPEFT' help recipe) docs/recipes.md"
check "one with a typo" refuses 2 'did you mean "lora_alpha"?' help lora_alpah
check "something else" refuses 2 'unknown command "zzz"' help zzz
check "a command" bash -c "'$TAPEFT' help train | grep -q 'tapeft help recipe'"
finish
