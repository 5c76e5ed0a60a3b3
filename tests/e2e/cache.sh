#!/bin/bash
# `cache_dir`: a run with it, without it, and from it writes the same bytes; commands that write nothing leave it alone; a kill leaves
# nothing that a later run takes for a cache.
. "$(dirname "$0")/tap.inc"
. "$(dirname "$0")/model.inc"
cache=$scratch/cache
recipe "$scratch/r.yaml"

train() { "$TAPEFT" train "$scratch/r.yaml" overwrite=true "$@" >/dev/null 2>"$scratch/said"; }
said() { grep -qF -- "$1" "$scratch/said"; }
said_not() { ! grep -qF -- "$1" "$scratch/said"; }
same_run() { cmp "$scratch/run/metrics.jsonl" "$scratch/plain/metrics.jsonl" && cmp "$scratch/run/adapter/adapter_model.safetensors" "$scratch/plain/adapter/adapter_model.safetensors" && cmp "$scratch/run/adapter/tapeft.json" "$scratch/plain/adapter/tapeft.json"; }
entries() { find "$cache" -mindepth 1 -maxdepth 1 2>/dev/null | wc -l; }

check "without a cache" train
mv "$scratch/run" "$scratch/plain"

check "plan does not make one" "$TAPEFT" plan "$scratch/r.yaml" cache_dir="$cache"
check "nor a dry run" "$TAPEFT" train "$scratch/r.yaml" cache_dir="$cache" --dry-run
check "nor preview" "$TAPEFT" preview "$scratch/r.yaml" cache_dir="$cache"
check "nor eval" "$TAPEFT" eval "$scratch/r.yaml" cache_dir="$cache"
check "there is none" test ! -e "$cache"

check "the run that makes it" train cache_dir="$cache"
check "says so" said "are kept in $cache/tokens-"
check "writes the same" same_run
check "one for training, one held out" test "$(entries)" = 2
check "the run that finds it" train cache_dir="$cache"
check "says so" said "come from $cache/tokens-"
check "writes the same" same_run
check "dataset_prepared_path is its name elsewhere" train dataset_prepared_path="$cache"
check "and finds it" said "come from"

# The numbers of preview and eval come from rows and cache alike.
"$TAPEFT" preview "$scratch/r.yaml" --json >"$scratch/preview"
"$TAPEFT" preview "$scratch/r.yaml" --json cache_dir="$cache" >"$scratch/preview-cached" 2>"$scratch/said"
check "preview from it" cmp "$scratch/preview" "$scratch/preview-cached"
check "has nothing to say" test ! -s "$scratch/said"
"$TAPEFT" eval "$scratch/r.yaml" --json >"$scratch/eval"
"$TAPEFT" eval "$scratch/r.yaml" --json cache_dir="$cache" >"$scratch/eval-cached"
check "eval from it" cmp "$scratch/eval" "$scratch/eval-cached"

# Where it lies is no part of the recipe's identity: a run goes on with it, or without it.
check "a run that is stopped after step 3" train save_steps=3 cache_dir="$cache"
rm -r "$scratch/run/ckpt-6" "$scratch/run/adapter"
check "goes on without it" "$TAPEFT" train "$scratch/r.yaml" --resume save_steps=3
check "and ends the same" same_run

# Damage and lack of room.
for file in "$cache"/*/tokens.bin; do printf '\377' | dd of="$file" bs=1 seek=2 conv=notrunc status=none; done
check "a damaged one" train cache_dir="$cache"
check "is made again" said "made again"
check "writes the same" same_run
check "and is whole" train cache_dir="$cache"
check "as a run finds" said "come from"
check "one that cannot be made" train cache_dir="$scratch/rows.jsonl"
check "is a warning" said "warning: cache_dir:"
check "writes the same" same_run
# A disk that is full for the cache alone: 1 MiB of its own, most of it taken.
if mkdir "$scratch/small-disk" && mount -t tmpfs -o size=8k none "$scratch/small-disk" 2>/dev/null; then
    check "a full disk" train cache_dir="$scratch/small-disk/c"
    check "is a warning" said "warning: cache_dir:"
    check "writes the same" same_run
    check "and leaves nothing" test "$(find "$scratch/small-disk/c" -mindepth 1 | wc -l)" = 0
    umount "$scratch/small-disk"
fi

# Killed while it is written, again and again: what is left is no cache, and the next run that keeps one sweeps it away.
for i in $(seq 3000); do echo "{\"instruction\": \"Tell me of $i.\", \"output\": \"$i is $((i * 7919)), and $((i * 104729)).\"}"; done >"$scratch/many.jsonl"
killed=$scratch/killed
for delay in 0.01 0.02 0.03 0.04 0.06 0.08 0.1 0.15; do
    "$TAPEFT" train "$scratch/r.yaml" overwrite=true datasets.0.path="$scratch/many.jsonl" cache_dir="$killed" >/dev/null 2>&1 &
    pid=$!
    sleep "$delay"
    kill -9 $pid 2>/dev/null
    wait $pid 2>/dev/null
done
check "after kills" train datasets.0.path="$scratch/many.jsonl" cache_dir="$killed"
check "nothing is damaged" said_not "made again"
check "and nothing is left over" test "$(find "$killed" -mindepth 1 -maxdepth 1 -name '*.tmp-*' | wc -l)" = 0
check "two runs at once" bash -c "
    '$TAPEFT' train '$scratch/r.yaml' output_dir='$scratch/a' cache_dir='$scratch/both' >/dev/null 2>&1 & first=\$!
    '$TAPEFT' train '$scratch/r.yaml' output_dir='$scratch/b' cache_dir='$scratch/both' >/dev/null 2>&1 && wait \$first"
check "write the same" cmp "$scratch/a/metrics.jsonl" "$scratch/b/metrics.jsonl"
check "as without" cmp "$scratch/a/metrics.jsonl" "$scratch/plain/metrics.jsonl"

# Ready tokens are ready.
printf '%s\n' "base_model: $golden/models/llama" "datasets: [{path: $golden/curves/llama-lora/batches.safetensors}]" "max_steps: 1" \
    "output_dir: $scratch/tokens" >"$scratch/tokens.yaml"
check "ready tokens" bash -c "'$TAPEFT' train '$scratch/tokens.yaml' cache_dir='$scratch/none' >/dev/null 2>'$scratch/said'"
check "need none" said "cache_dir: without effect"
check "and get none" test ! -e "$scratch/none"
finish
