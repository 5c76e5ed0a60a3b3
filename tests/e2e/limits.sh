#!/bin/bash
# `tapeft --limits` says the numbers that the documentation promises.
. "$(dirname "$0")/tap.inc"

"$TAPEFT" --limits >"$scratch/limits" 2>"$scratch/errors"
check_exit "exit 0" 0 "$TAPEFT" --limits
check "nothing on stderr" test ! -s "$scratch/errors"

says() { grep -qx -- "$1" "$scratch/limits"; }
while read -r line; do check "$line" says "$line"; done <<'LIMITS'
recipe_bytes 1048576
recipe_depth 64
recipe_nodes 10000
recipe_include_depth 8
json_depth 128
safetensors_header_bytes 100000000
safetensors_name_bytes 512
safetensors_rank 8
gguf_string_bytes 67108864
gguf_rank 4
gguf_alignment_min 8
gguf_alignment_max 65536
layers 4096
width 1048576
heads 4096
vocabulary 4194304
jsonl_row_bytes 67108864
csv_columns 4096
adapter_rank 1024
checkpoint_state_bytes 1048576
manifest_bytes 16777216
adapter_patterns 4096
adapter_config_bytes 4194304
adapter_list_entries 65536
tokenizer_json_bytes 536870912
added_token_bytes 1024
template_bytes 1048576
template_steps 10000000
template_output_bytes 16777216
LIMITS
check_exit "every line is a name and a number" 1 grep -vqE '^[a-z0-9_]+ [0-9]+$' "$scratch/limits"
# `doctor` says them, too, and what the system allows: as the shell knows it.
doctor() { "$TAPEFT" doctor --device cpu --json | python3 -c 'import json, sys; d = json.load(sys.stdin); print(eval(sys.argv[1]))' "$1"; }
check "doctor says the same" test "$(doctor '"\n".join(f"{k} {v}" for k, v in d["limits"].items())')" = "$(cat "$scratch/limits")"
check "open files" test "$(ulimit -n 77 && doctor 'd["process"]["open_files"]')" = 77
check "longest file" test "$(ulimit -f 1000 && doctor 'd["process"]["file_bytes"]')" = 1024000
# (The address sanitizer wants more of it than any limit.)
grep -q __asan_init "$TAPEFT" || check "address space" test "$(ulimit -v 50000000 && doctor 'd["process"]["address_space_bytes"]')" = 51200000000
check "in words" bash -c "'$TAPEFT' doctor | grep -qx '  layers: 4096'"
check_exit "a full disk" 4 bash -c "'$TAPEFT' --limits >/dev/full"
finish
