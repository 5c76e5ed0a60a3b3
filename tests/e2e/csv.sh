#!/bin/bash
# Rows in .csv files: every command that reads rows reads them there, with the results that the same rows in a .jsonl file have.
. "$(dirname "$0")/tap.inc"
. "$(dirname "$0")/model.inc"

# The questions and answers of $scratch/rows.jsonl, less a few, with commas, quotes and line ends, as Python writes and packs them.
python3 - "$scratch" <<'PYTHON' || exit 1
import csv, gzip, json, sys
folder = sys.argv[1]
rows = [json.loads(line) for line in open(f"{folder}/rows.jsonl")][:20]
for i, row in enumerate(rows):
    row["output"] += ['', ', no more', '\nThat is "it".', ' '][i % 4]
open(f"{folder}/rows.jsonl", "w").writelines(json.dumps(row) + "\n" for row in rows)
for name, columns in (("rows", ("instruction", "output")), ("named", ("answer", "question"))):
    with open(f"{folder}/{name}.csv", "w", newline="") as out:
        table = csv.writer(out)
        table.writerow(columns)
        table.writerows([row["output" if c in ("output", "answer") else "instruction"] for c in columns] for row in rows)
gzip.open(f"{folder}/rows.csv.gz", "wb").write(open(f"{folder}/rows.csv", "rb").read())
for name, write in (("texts", lambda r: r["output"]), ("prompts", lambda r: r["instruction"])):
    open(f"{folder}/{name}.jsonl", "w").writelines(json.dumps({name[:-1]: write(r)}) + "\n" for r in rows)
    with open(f"{folder}/{name}.csv", "w", newline="") as out:
        csv.writer(out).writerows([[name[:-1]]] + [[write(r)] for r in rows])
PYTHON
mkdir "$scratch/folder" && cp "$scratch/rows.csv" "$scratch/folder/train.csv"
recipe "$scratch/r.yaml" "cache_dir: $scratch/cache"

# same NAME ARGUMENTS...: the command prints with .csv in its arguments what it prints with .jsonl, but for files and lines.
places='s,[^ ]*rows.[a-z]*\(:[0-9]*:\)*,,'
same() {
    local name=$1
    shift
    check "$name" bash -c "cmp <('$TAPEFT' ${*//.csv/.jsonl} | sed '$places') <('$TAPEFT' $* | sed '$places')"
}
train() { "$TAPEFT" train "$scratch/r.yaml" overwrite=true '~val_set_size' "$@"; }
same_run() { cmp "$scratch/run/metrics.jsonl" "$scratch/expected/metrics.jsonl" && cmp "$scratch/run/adapter/adapter_model.safetensors" "$scratch/expected/adapter/adapter_model.safetensors"; }

check "training on .jsonl" train && mv "$scratch/run" "$scratch/expected"
for path in rows.csv rows.csv rows.csv.gz folder; do
    check "training on $path" train datasets.0.path="$scratch/$path"
    check "writes the same" same_run
done
check "renamed columns" train "datasets=[{path: $scratch/named.csv, columns: {instruction: question, output: answer}}]"
check "write the same" same_run
check "a share held out" train datasets.0.path="$scratch/rows.csv" val_set_size=4
same "preview" preview "$scratch/r.yaml" "~val_set_size" datasets.0.path="$scratch/rows.csv"
same "eval" eval "$scratch/small" --data "$scratch/rows.csv" --json
same "tokenize" tokenize "$scratch/small" --in "$scratch/texts.csv"
same "generate" generate "$scratch/small" --file "$scratch/prompts.csv" --max-tokens 4

# A mistake in the table has its place, whoever reads it.
printf 'instruction,output\r\nWhat?,That.\r\n"And\r\nthen?",No"thing.\r\n' >"$scratch/bad.csv"
refused() { "$TAPEFT" "$@" >/dev/null 2>"$scratch/errors"; test $? = 3 && tail -n 1 "$scratch/errors" | grep -qF "bad.csv:4:10: column 2 (\"output\"): a quote in a field without quotes"; }
check "train says where" refused train "$scratch/r.yaml" '~val_set_size' output_dir="$scratch/none" datasets.0.path="$scratch/bad.csv"
check "preview says where" refused preview "$scratch/r.yaml" '~val_set_size' datasets.0.path="$scratch/bad.csv"
check "eval says where" refused eval "$scratch/small" --data "$scratch/bad.csv"
check "nothing was written" test ! -e "$scratch/none"
check_exit "ids are no text" 2 "$TAPEFT" tokenize "$scratch/small" --in "$scratch/texts.csv" --decode
check_exit "conversations are no text" 3 "$TAPEFT" eval "$scratch/small" --data "$scratch/texts.csv" --columns messages=text
finish
