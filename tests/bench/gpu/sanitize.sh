#!/bin/bash
# compute-sanitizer over the tests of the kernels: every test function under every tool, each as a process of its own, several at a time.
#
#   tests/bench/gpu/sanitize.sh FOLDER [SECONDS [JOBS [LOG]]]       in the root of the repository
#
# FOLDER holds test_cuda, test_cuda_matmul, test_cuda_attention, test_cuda_few, test_cuda_layers, test_cuda_graph and test_cuda_dropped. What is not done after SECONDS (600) is cut off.
# JOBS (12) processes run at a time, each on a core of its own. LOG is what an earlier call for the same binaries printed: what was clean there is not
# run again, so that short turns on a GPU add up. TOOLS is the list of tools (racecheck initcheck memcheck synccheck).
#
# A line a job: verdict, tool, program, test, seconds, errors; what was cut off is listed at the end, with the seconds it had. Exit status 1 if anything
# was found, a test failed, or a job said nothing; 3 if nothing was, but something was cut off.
set -u
folder=${1:?usage: sanitize.sh FOLDER [SECONDS [JOBS [LOG]]]}
end=$(($(date +%s) + ${2:-600})) jobs=${3:-12} before=${4:-/dev/null}
programs="test_cuda_attention test_cuda test_cuda_few test_cuda_layers test_cuda_matmul test_cuda_graph test_cuda_dropped"
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not there"; exit 2; }

# The cores that this process may use, one a line.
cores=$(taskset -cp $$ | sed 's/.*: *//' | tr ',' '\n' | awk -F- '{ for (i = $1; i <= ($2 == "" ? $1 : $2); i++) print i }')
export folder end logs cores

run_one() { # tool program test
    local tool=$1 program=$2 test=$3 began left log=$logs/$1-$2-$3.log status errors verdict extra=() core
    began=$(date +%s)
    left=$((end - began))
    # That test wants more memory than there is: the two errors of the API are what it is about.
    [ "$tool $test" = "memcheck test_out_of_memory" ] && extra=(--report-api-errors no)
    core=$(sed -n "$((SLOT % $(wc -l <<<"$cores") + 1))p" <<<"$cores")
    status=124
    if [ "$left" -gt 0 ]; then
        TAPEFT_TEST=$test timeout -k 5 "$left" taskset -c "$core" \
            compute-sanitizer --tool "$tool" --print-limit 20 "${extra[@]}" "$folder/$program" >"$log" 2>&1 </dev/null
        status=$?
    fi
    errors=$(sed -n 's/^=* *[A-Z]* SUMMARY: \([0-9]*\) .*/\1/p' "$log" 2>/dev/null | tail -n 1)
    verdict=FOUND
    case $status in
    124 | 137) verdict=cut ;;
    0)
        if [ "$errors" != 0 ]; then verdict=FOUND; elif grep -q '^\[  SKIPPED \] 1 test' "$log"; then verdict=skip; elif grep -q '^\[  PASSED  \] 1 test' "$log"; then verdict=ok; fi ;;
    esac
    printf '%-6s %-10s %-20s %-30s %4d s  %s\n' "$verdict" "$tool" "$program" "$test" $(($(date +%s) - began)) "${errors:-no} errors"
}
export -f run_one

for tool in ${TOOLS:-racecheck initcheck memcheck synccheck}; do
    for program in $programs; do
        for test in $(grep -o 'cmocka_unit_test([a-z0-9_]*)' "tests/backend/$program.c" | sed 's/.*(\(.*\))/\1/'); do
            grep -qE "^ok +$tool +$program +$test " "$before" || echo "$tool $program $test"
        done
    done
done >"$logs/jobs"
echo "$(wc -l <"$logs/jobs") jobs, $jobs at a time"
xargs -P "$jobs" --process-slot-var=SLOT -L 1 bash -c 'run_one "$@"' run_one <"$logs/jobs" | tee "$logs/lines" | grep -v '^cut'

while read -r tool program test; do
    echo "== $tool $program $test"
    grep -v '^\[ RUN\|^\[=' "$logs/$tool-$program-$test.log" | head -n 40
done < <(awk '$1 == "FOUND" { print $2, $3, $4 }' "$logs/lines")
awk '{ n[$1]++ } $1 == "cut" { cut = cut "\n  " $2 " " $3 " " $4 ", " $5 " s" }
    END { printf "%d without an error, %d with findings, %d skipped, %d cut off%s\n", n["ok"], n["FOUND"], n["skip"], n["cut"], cut == "" ? "" : ":" cut
          exit n["FOUND"] > 0 ? 1 : n["cut"] > 0 ? 3 : 0 }' "$logs/lines"
