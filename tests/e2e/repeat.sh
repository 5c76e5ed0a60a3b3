#!/bin/bash
# The run that made an adapter, again (train --like), and in what two adapters, checkpoints or models differ (inspect --diff).
. "$(dirname "$0")/tap.inc"
. "$(dirname "$0")/model.inc"
recipe "$scratch/r.yaml" "lora_dropout: 0.1" "save_steps: 3" "overwrite: true"
adapter=$scratch/run/adapter
weights=adapter/adapter_model.safetensors

# refuses STATUS TEXT ARGUMENTS...: exit status, and a last line on stderr that has the text.
refuses() {
    local expected=$1 text=$2
    shift 2
    "$TAPEFT" "$@" >"$scratch/out" 2>"$scratch/errors"
    test $? = "$expected" && tail -n 1 "$scratch/errors" | grep -qF -- "$text"
}
like() { "$TAPEFT" train --quiet --like "$@"; }

check "a run" "$TAPEFT" train "$scratch/r.yaml"
check "again, by its adapter" like "$adapter" output_dir="$scratch/two"
check "gives the same bytes" cmp "$scratch/run/$weights" "$scratch/two/$weights"
check "step by step" cmp "$scratch/run/metrics.jsonl" "$scratch/two/metrics.jsonl"
mv "$scratch/two/adapter" "$scratch/moved"
check "an adapter that was moved" like "$scratch/moved" output_dir="$scratch/three"
check "says how it was made, too" cmp "$scratch/run/$weights" "$scratch/three/$weights"
check "a checkpoint" like "$scratch/run/ckpt-3" output_dir="$scratch/four"
check "stands in its run" cmp "$scratch/run/$weights" "$scratch/four/$weights"
check "with another rank" like "$adapter" output_dir="$scratch/five" lora_r=4
check "it is another adapter" bash -c "grep -q '\"r\": 4' '$scratch/five/adapter/adapter_config.json'"

check "without a folder" refuses 2 'name a folder for the new run' train --like "$adapter" lora_r=4
check "into the folder of the adapter" refuses 2 'holds the adapter' train --like "$adapter" output_dir="$scratch/run"
check "which is as it was" cmp "$scratch/run/$weights" "$scratch/three/$weights"
check "a recipe beside it" refuses 2 'is one too many' train "$scratch/r.yaml" --like "$adapter" output_dir="$scratch/six"
check "no adapter" refuses 3 'there is no folder' train --like "$scratch/none" output_dir="$scratch/six"
check "one of another tool" refuses 3 'no recipe.yaml' train --like "$golden/adapters/llama-lora" output_dir="$scratch/six"

# Other files than those it was made from.
cp "$scratch/rows.jsonl" "$scratch/rows"
echo '{"instruction": "And?", "output": "No."}' >>"$scratch/rows.jsonl"
check "other rows" refuses 6 'data changed; --accept=data' train --like "$adapter" output_dir="$scratch/six"
check "leave no folder" test ! -e "$scratch/six"
check "taken all the same" like "$adapter" output_dir="$scratch/six" --accept=data
cp "$scratch/rows" "$scratch/rows.jsonl"

# What differs, by another program's arithmetic.
compare() { "$TAPEFT" inspect "$1" --diff "$2" --json; }
member() { python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"; }
check "nothing" test "$(compare "$adapter" "$scratch/moved" | member identical)" = True
check "as text" bash -c "'$TAPEFT' inspect '$adapter' --diff '$scratch/moved' | grep -qx 'identical: 42 tensors'"
check "the steps of checkpoints" bash -c "'$TAPEFT' inspect '$scratch/run/ckpt-3' --diff '$scratch/run/ckpt-6' | grep -qx 'state step: 3 | 6'"
check "ranks" bash -c "'$TAPEFT' inspect '$adapter' --diff '$scratch/five/adapter' | grep -qx 'config r: 2 | 4'"
check "and shapes" bash -c "'$TAPEFT' inspect '$adapter' --diff '$scratch/five/adapter' | grep -q 'k_proj.lora_A.weight: F32 .2, 32. | F32 .4, 32.'"
check "values" python3 - "$scratch/run/ckpt-3" "$scratch/run/ckpt-6" <<PYTHON
import json, math, struct, subprocess, sys
def tensors(folder):
    raw = open(folder + "/adapter_model.safetensors", "rb").read()
    n = struct.unpack("<Q", raw[:8])[0]
    for name, t in json.loads(raw[8:8 + n]).items():
        if name == "__metadata__": continue
        begin, end = t["data_offsets"]
        yield name, struct.unpack("<%df" % ((end - begin) // 4), raw[8 + n + begin:8 + n + end])
a, b = dict(tensors(sys.argv[1])), dict(tensors(sys.argv[2]))
said = json.loads(subprocess.check_output(["$TAPEFT", "inspect", sys.argv[1], "--diff", sys.argv[2], "--json"]))
for t in said["tensors"]:
    x, y = a.pop(t["name"]), b[t["name"]]
    assert t["largest"] == max(abs(p - q) for p, q in zip(x, y)), t
    relative = math.sqrt(sum((p - q) ** 2 for p, q in zip(x, y)) / sum(q * q for q in y))
    assert abs(t["relative"] - relative) <= 1e-12 * relative, t
assert not a and said["same_tensors"] == 0 and not said["identical"]
PYTHON
check "files" test "$(compare "$adapter/adapter_model.safetensors" "$scratch/moved/adapter_model.safetensors" | member identical)" = True
check "GGUF files" test "$(compare "$golden/gguf/tiny_q4_0.gguf" "$golden/gguf/tiny_q4_0.gguf" | member identical)" = True
"$TAPEFT" init "$scratch/small.json" --out "$scratch/narrow" --dtype bf16
check "a rounding" bash -c "'$TAPEFT' inspect '$scratch/narrow' --diff '$scratch/small' --json | python3 -c 'import json, sys; d = json.load(sys.stdin); sys.exit(not 0 < d[\"relative\"] < 2**-8)'"
check "a model and an adapter" bash -c "'$TAPEFT' inspect '$scratch/small' --diff '$adapter' | grep -qx 'file kind: \"model\" | \"adapter\"'"
check "something that is not there" refuses 3 'No such file' inspect "$adapter" --diff "$scratch/none"

# What makes a recipe fit, of itself and with what it is told to change.
fit() { "$TAPEFT" plan "$scratch/r.yaml" output_dir="$scratch/new" micro_batch_size=8 "$@"; }
least=$(fit --json | member least_bytes)
check "a recipe as it is" test "$(fit --fit 1GiB --json | member switches)" = '[]'
check "with recomputation" test "$(fit gradient_checkpointing=none --fit "$least" | tail -n 1 | sed 's/.* with //')" = gradient_checkpointing=auto
switches=$(fit --fit $((least - 1)) | tail -n 1 | sed 's/.* with //')
check "with smaller batches" test "$switches" = "micro_batch_size=4 gradient_accumulation_steps=2"
# shellcheck disable=SC2086
check "which then do fit" fit $switches memory_limit=$((least - 1))
check "nothing does" refuses 4 'no batch and no length would fit' plan "$scratch/r.yaml" output_dir="$scratch/new" --fit 1MiB
check "no size" refuses 2 '--fit: expected a size' plan "$scratch/r.yaml" --fit much
finish
