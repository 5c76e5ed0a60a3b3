#!/bin/bash
# The rules that `make lint` enforces do find what they are there for: each script runs over a small tree with one sin per file.
. "$(dirname "$0")/tap.inc"
tree=$scratch/tree
mkdir -p "$tree/scripts" "$tree/base" "$tree/models" "$tree/cli" "$tree/tests"
cp scripts/check_layers scripts/check_names scripts/check_banned "$tree/scripts/"

put() { cat >"$tree/$1"; }
finds() { ! "$tree/scripts/$1" >"$scratch/found" 2>&1 && grep -qF -- "$2" "$scratch/found"; }
finds_not() { "$tree/scripts/$1" >"$scratch/found" 2>&1; ! grep -qF -- "$2" "$scratch/found"; }

put base/upward.c <<<'#include "models/model.h"'
put base/relative.c <<<'#include "upward.h"'
put models/downward.c <<<'#include "base/mem.h"'
put models/sideways.c <<<'#include "data/dataset.h"'
check "an include of a higher layer" finds check_layers "base/upward.c:1"
check "an include not written from the root" finds check_layers "base/relative.c:1"
check "an include of a neighbour" finds check_layers "models/sideways.c:1"
check "a lower layer is fine" finds_not check_layers downward

put base/heap.c <<<'void *tp_x(void) { return malloc(3); }'
put base/said.c <<<'/* never malloc(3) */ const char *tp_y = "printf(1)"; void tp_z(struct s *s) { s->free(s); }'
put cli/exits.c <<<'int main(void) { printf("x"); exit(2); }'
put base/exits.c <<<'void tp_w(void) { exit(2); }'
check "malloc outside base/mem.c" finds check_banned "base/heap.c:1: malloc"
check "exit in the library" finds check_banned "base/exits.c:1: exit"
check "printing and exiting are fine in the command" finds_not check_banned "cli/exits.c"
check "comments, strings and members are not calls" finds_not check_banned "base/said.c"

put base/guard.h <<<'#define LIMIT 3'
put base/later.c <<<"/* TO""DO */"
seq 901 | put base/long.c
check "a header without its guard" finds check_names "base/guard.h:1: the header guard"
check "a macro without prefix" finds check_names "macro LIMIT"
check "unfinished work" finds check_names "base/later.c:1: unfinished"
check "a file that is too long" finds check_names "base/long.c:900"
finish
