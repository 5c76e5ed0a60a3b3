#!/bin/bash
# compute-sanitizer over the tests of the kernels: every test function under every tool, as processes of their own, several at a time.
#
#   tests/bench/gpu/sanitize.sh FOLDER [SECONDS [JOBS [LOG]]]       in the root of the repository
#
# FOLDER holds the programs test_cuda*. What is not done after SECONDS (600) is cut off. JOBS (12) processes run at a time, each on a core of its own. LOG is
# what an earlier call for the same programs printed: what was clean there is not run again, so that short turns on a GPU add up.
#
# TOOLS  the tools, in the order in which they run (racecheck initcheck memcheck synccheck)
# WHOLE  those of them that get a whole program a process, since a start takes ten seconds (synccheck)
# TAPEFT_EVERY=7 runs only every seventh call that a test makes.
#
# Kernels run without the CPU beside them (TAPEFT_GPU_ALONE): whether results are right is what the same tests say without a sanitizer. Races that racecheck
# sees inside of kernels of cuBLASLt and cuDNN (it does) are counted apart; cuDNN is left out, so that our attention runs in its place. Two errors of the API
# are what test_out_of_memory is about: memcheck is not asked for such there.
#
# A line a job: verdict, tool, program, test, seconds, errors; then what was cut off, with the seconds it had. Exit status 1 if anything was found, a test
# failed, or a job said nothing; 3 if nothing was, but something was cut off.
set -u
folder=${1:?usage: sanitize.sh FOLDER [SECONDS [JOBS [LOG]]]}
end=$(($(date +%s) + ${2:-600})) jobs=${3:-12} before=${4:-/dev/null}
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not there"; exit 2; }

# The cores that this process may use, one a line.
cores=$(taskset -cp $$ | sed 's/.*: *//' | tr ',' '\n' | awk -F- '{ for (i = $1; i <= ($2 == "" ? $1 : $2); i++) print i }')
export folder end logs cores TAPEFT_GPU_ALONE=1

run_one() { # tool program test
    local tool=$1 program=$2 test=$3 began left log=$logs/$1-$2-${3/\*/all}.log status=124 errors theirs=0 verdict=FOUND extra=() core
    began=$(date +%s)
    left=$((end - began))
    [ "$tool $test" = "memcheck test_out_of_memory" ] && extra=(--report-api-errors no)
    [ "$tool" = racecheck ] && export TAPEFT_CUDNN=none
    core=$(sed -n "$((SLOT % $(wc -l <<<"$cores") + 1))p" <<<"$cores")
    if [ "$left" -gt 0 ]; then
        TAPEFT_TEST=$test timeout -k 5 "$left" taskset -c "$core" \
            compute-sanitizer --tool "$tool" --print-limit 1000 "${extra[@]}" "$folder/$program" >"$log" 2>&1 </dev/null
        status=$?
    fi
    errors=$(sed -n 's/^=* *[A-Z]* SUMMARY: \([0-9]*\) .*/\1/p' "$log" 2>/dev/null | tail -n 1)
    if [ "$tool" = racecheck ] && [ -n "$errors" ]; then
        theirs=$(grep -cE '^=+ (Error|Warning): Race reported between .* access at (nvjet|cudnn|cublas)' "$log")
        errors=$((errors - theirs))
    fi
    if [ $status = 124 ] || [ $status = 137 ]; then
        verdict=cut
    elif [ $status = 0 ] && [ "$errors" = 0 ]; then
        if grep -q '^\[  PASSED  \] [1-9]' "$log"; then verdict=ok; elif grep -q '^\[  SKIPPED \] [1-9]' "$log"; then verdict=skip; fi
    fi
    printf '%-6s %-10s %-20s %-30s %4d s  %s errors%s\n' "$verdict" "$tool" "$program" "$test" $(($(date +%s) - began)) "${errors:-no}" "$([ "$theirs" = 0 ] || echo ", $theirs in NVIDIA's libraries")"
    [ "$verdict" = FOUND ] && grep -v '^\[ RUN\|^\[=' "$log" | head -n 40 | sed "s/^/  $program $test: /"
    return 0
}
export -f run_one

for tool in ${TOOLS:-racecheck initcheck memcheck synccheck}; do
    for source in tests/backend/test_cuda_attention.c $(ls tests/backend/test_cuda*.c | grep -v attention); do
        program=$(basename "$source" .c)
        [ -x "$folder/$program" ] || continue
        tests=$(grep -o 'cmocka_unit_test([a-z0-9_]*)' "$source" | sed 's/.*(\(.*\))/\1/')
        # (One test of its own is asked less of.)
        [[ " ${WHOLE:-synccheck} " != *" $tool "* ]] || [[ "$tool $tests" == memcheck*test_out_of_memory* ]] || tests='*'
        while read -r test; do
            grep -qF "$(printf 'ok     %-10s %-20s %-30s ' "$tool" "$program" "$test")" "$before" || printf "%s %s '%s'\n" "$tool" "$program" "$test"
        done <<<"$tests"
    done
done >"$logs/jobs"
echo "$(wc -l <"$logs/jobs") jobs, $jobs at a time"
xargs -P "$jobs" --process-slot-var=SLOT -L 1 bash -c 'run_one "$@"' run_one <"$logs/jobs" | tee "$logs/lines" | grep -v '^cut'

awk '{ n[$1]++ } $1 == "cut" { cut = cut "\n  " $2 " " $3 " " $4 ", " $5 " s" }
    END { printf "%d without an error, %d with findings, %d skipped, %d cut off%s\n", n["ok"], n["FOUND"], n["skip"], n["cut"], cut == "" ? "" : ":" cut
          exit n["FOUND"] > 0 ? 1 : n["cut"] > 0 ? 3 : 0 }' "$logs/lines"
