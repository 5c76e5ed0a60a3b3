/* Seconds from the start of the process to the beginning of step 1: SmolLM2-135M, ready tokens, files in the page cache.
 *
 *     bench_start [--threads N]
 *
 * The command stamps the time itself when its `train` begins; starting the process before that is bounded by what
 * `tapeft --version` takes, start to end. Medians of three runs of each model. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/bench/ceilings.h"
#include "tests/bench/command.h"

#define REPEATS 3
#define LIMIT   0.5 /* seconds: what is asked for */

int main(int argc, char **argv)
{
    static const char *const names[] = {"f32", "bf16"};
    static tp_ctx ctx;
    double values[REPEATS];
    bench_open(&ctx, argc > 2 && strcmp(argv[1], "--threads") == 0 ? atoi(argv[2]) : 0);
    bench_print_machine(&ctx);
    for (int i = 0; i < REPEATS; i++) values[i] = bench_process_seconds(&ctx);
    bench_spread process = bench_spread_of(values, REPEATS);
    printf("start %-26s %.3f s (%.3f .. %.3f)\n", "and end of a process", process.median, process.low, process.high);
    for (size_t m = 0; m < sizeof names / sizeof *names; m++) {
        bench_model model = bench_model_of(&ctx, names[m]);
        bench_run run;
        bench_train(&ctx, &model, 1, &run); /* brings the files into the page cache */
        for (int i = 0; i < REPEATS; i++) {
            bench_train(&ctx, &model, 1, &run);
            values[i] = run.start_seconds;
        }
        bench_spread start = bench_spread_of(values, REPEATS);
        printf("start %-26s %.3f s to the first step, limit %.1f (%.3f .. %.3f)\n", model.label, start.median, LIMIT, start.low,
               start.high);
        fflush(stdout);
    }
    printf("load %.1f at the end\n", bench_load());
    ctx.device->backend->close(ctx.device);
    return 0;
}
