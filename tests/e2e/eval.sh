#!/bin/bash
# `tapeft eval`: loss and accuracy that torch and PEFT computed for the same files, recipes and models as arguments, exit codes.
. "$(dirname "$0")/tap.inc"
golden=${TAPEFT_GOLDEN:-tests/golden}
model=$golden/models/llama
data=$golden/curves/llama-lora/batches.safetensors
adapter=$golden/adapters/llama-lora

# near NAME VALUE TOLERANCE: the member of the JSON that the last evaluation printed.
near() {
    python3 -c 'import json, sys; got = json.load(open(sys.argv[1]))[sys.argv[2]]; sys.exit(not abs(got - float(sys.argv[3])) <= float(sys.argv[4]))' \
        "$scratch/json" "$1" "$2" "$3"
}
evaluate() { "$TAPEFT" eval "$@" --json --device cpu --precision fp32 >"$scratch/json"; }

# transformers 5.23.0, PEFT 0.21.2, torch 2.15.0, f32: sums of log-probabilities and arg max over the labels of all micro-batches.
check "a model" evaluate "$model" --data "$data" --metric loss,accuracy,exact
check "its loss" near loss 6.107831702826842 1e-5
check "its perplexity" near perplexity 449.36330 0.005
check "its accuracy" near accuracy 0.00035714285714285714 1e-12
check "rows that are right in full" near exact 0 0
check "labels" near labels 2800 0
check "rows" near rows 200 0
check "with an adapter" evaluate "$model" --data "$data" --adapter "$adapter" --metric accuracy,loss
check "its loss" near loss 6.058255544740638 1e-5
check "its accuracy" near accuracy 0.0025 1e-12

recipe=$scratch/eval.yaml
printf '%s\n' "base_model: $model" "adapter_path: $adapter" "datasets: [{path: $data, type: tokens}]" "test_datasets: [{path: $data, type: tokens}]" >"$recipe"
check "a recipe, with its adapter" evaluate "$recipe"
check "its loss" near loss 6.058255544740638 1e-5
check "an override" evaluate "$recipe" test_datasets.0.limit=1
check "takes effect" near rows 4 0
check "--limit" evaluate "$recipe" --limit 2
check "takes effect" near rows 8 0
check_exit "a recipe without held-out data" 2 evaluate "$recipe" '~test_datasets'
check "and with --data" evaluate "$recipe" '~test_datasets' --data "$data"

check_exit "no data" 2 evaluate "$model"
check_exit "an unknown metric" 2 evaluate "$model" --data "$data" --metric loss,bleu
check_exit "an unknown type" 2 evaluate "$model" --data "$data" --type nothing
check_exit "columns that are none" 2 evaluate "$model" --data "$data" --columns text
check_exit "a model that is not there" 3 evaluate "$scratch/none" --data "$data"
check_exit "data that is not there" 3 evaluate "$model" --data "$scratch/none.jsonl"
check_exit "an adapter that is not there" 3 evaluate "$model" --data "$data" --adapter "$scratch/none"
check_exit "more tokens than the model takes" 2 evaluate "$model" --data "$data" --max-length 1000000
check_exit "gsm8k without a tokenizer" 3 evaluate "$model" --data "$data" --metric gsm8k
check_exit "a full disk" 4 bash -c "'$TAPEFT' eval '$model' --data '$data' --limit 1 >/dev/full"
finish
