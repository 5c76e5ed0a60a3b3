#!/bin/bash
# What stands in adapter/ beside PEFT's two files: whose adapter it is (tapeft.json), the template it was trained by, and how its base
# generates. Digests are those of Python's hashlib.
. "$(dirname "$0")/tap.inc"
. "$(dirname "$0")/model.inc"
recipe "$scratch/r.yaml" "overwrite: true"
adapter=$scratch/run/adapter

train() { "$TAPEFT" train "$scratch/r.yaml" "$@"; }
member() { python3 -c 'import json, sys; print(json.load(open(sys.argv[1])).get(sys.argv[2]))' "$1" "$2"; }
fingerprints() { for of in base tokenizer data; do member "$adapter/tapeft.json" ${of}_fingerprint; done | tr '\n' ' '; }

# Folded file by file: SHA-256 of "<so far> <SHA-256 of the file> <its name>".
tokenizer_digest() {
    python3 - "$@" <<'PYTHON'
import hashlib, os, sys
so_far = ""
for path in sys.argv[1:]:
    digest = hashlib.sha256(open(path, "rb").read()).hexdigest()
    so_far = hashlib.sha256(f"{so_far} {digest} {os.path.basename(path)}".encode()).hexdigest()
print(so_far)
PYTHON
}

check "a run" train
read -r base tokenizer data <<<"$(fingerprints)"
check "names its base" test ${#base} = 64
check "its data" test ${#data} = 64
check "and its tokenizer, all of its files" test "$tokenizer" = "$(tokenizer_digest "$scratch/small/tokenizer.json" "$scratch/small/tokenizer_config.json")"
check "checkpoints name them, too" cmp "$scratch/run/ckpt-6/tapeft.json" "$adapter/tapeft.json"

check "other rows" train datasets.0.limit=39
read -r base2 tokenizer2 data2 <<<"$(fingerprints)"
check "are other data alone" test "$base2$tokenizer2" = "$base$tokenizer" -a "$data2" != "$data"
sed -i "s/'<|im_end|>' + '.n'/'<|im_end|>'/" "$scratch/small/tokenizer_config.json"
check "another template" train
read -r base2 tokenizer2 data2 <<<"$(fingerprints)"
check "is another tokenizer, and other data" test "$base2" = "$base" -a "$tokenizer2" != "$tokenizer" -a "$data2" != "$data"

# The same number of tokens, so that nothing but its bytes tell that it is another: resuming must notice.
check "a run to be gone on with" train save_steps=3
rm -r "$scratch/run/ckpt-6" "$adapter"
printf '\n' >>"$scratch/small/tokenizer.json"
check_exit "the tokenizer was changed" 6 "$TAPEFT" train "$scratch/r.yaml" --resume save_steps=3
check "taken all the same" "$TAPEFT" train "$scratch/r.yaml" --resume save_steps=3 --accept=data

# The template is the one that the rows were rendered by.
check "the tokenizer's template" bash -c "cmp <(python3 -c 'import json, sys; sys.stdout.write(json.load(open(sys.argv[1]))[\"chat_template\"])' '$scratch/small/tokenizer_config.json') '$adapter/chat_template.jinja'"
check "a run with alpaca's" train chat_template=alpaca
check "leaves that one" grep -q '### Instruction' "$adapter/chat_template.jinja"
cp -r "$adapter" "$scratch/refuses"
printf "{{ raise_exception('by the adapter') }}" >"$scratch/refuses/chat_template.jinja"
check "--chat renders by it" bash -c "'$TAPEFT' generate '$scratch/small' --adapter '$scratch/refuses' --chat --prompt Hi 2>&1 | grep -q 'by the adapter'"
check "and without the adapter by the base's" "$TAPEFT" generate "$scratch/small" --chat --prompt Hi --max-tokens 1
printf '{%% for m in messages %%}{{ m.content }}<|im_end|>{%% endfor %%}' >"$scratch/own.jinja"
check "a run with a file" train chat_template="$scratch/own.jinja"
check "leaves the file" cmp "$scratch/own.jinja" "$adapter/chat_template.jinja"

# How the base generates: its own file as it is; else the ids that the tokenizer knows.
check "the ids that end and begin" test "$(cat "$adapter/generation_config.json")" = "$(printf '{\n  "eos_token_id": 1\n}')"
printf '{"do_sample": true, "temperature": 0.6,\n "top_p": 0.9}' >"$scratch/small/generation_config.json"
check "a base that says more" train
check "is taken at its word" cmp "$scratch/small/generation_config.json" "$adapter/generation_config.json"
printf '{"do_sample": tru' >"$scratch/small/generation_config.json"
check "one that is no JSON" bash -c "'$TAPEFT' train '$scratch/r.yaml' 2>&1 | grep -q 'warning:.*generation_config.json'"
check "is left out" test "$(member "$adapter/generation_config.json" do_sample)" = None
gguf=$golden/gguf/tiny_q4_0.gguf
echo '{"text": "some text"}' >"$scratch/text.jsonl"
check "a GGUF file" train base_model="$gguf" datasets="[{path: $scratch/text.jsonl}]" '~val_set_size' max_seq_length=32
# Its metadata, read by another program's rules: key, u32 type 4 (u32), value.
expected=$(python3 -c '
import struct, sys
raw = open(sys.argv[1], "rb").read()
for name in ("bos", "eos", "padding"):
    key = b"tokenizer.ggml.%s_token_id" % name.encode()
    at = raw.find(key)
    if at >= 0: print(name[:3], struct.unpack_from("<II", raw, at + len(key))[1])' "$gguf")
check "has ids, too" test "$(for of in bos eos pad; do id=$(member "$adapter/generation_config.json" ${of}_token_id); [ "$id" = None ] || echo "$of $id"; done)" = "$expected"
check "and a tokenizer with a name" test "$(member "$adapter/tapeft.json" tokenizer_fingerprint | wc -c)" = 65
finish
