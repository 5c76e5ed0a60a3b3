/* How close a training step comes to what the machine can do: tokens per second over (peak / FLOPs of a token), for
 * SmolLM2-135M, LoRA of rank 16 on all linears, one sequence of 512 tokens, every token labelled. Also its memory.
 *
 *     bench_train [--threads N] [--rounds N] [--steps N] [f32 | bf16 | gguf]...
 *
 * A round is one run of the command for each model: the median step after two for warming up, between two measurements of
 * the peak. Lines are medians over rounds. The second ratio counts CPU time in place of the clock on both sides: on a busy
 * machine the first one falls with every other program, the second hardly. Runs for about a minute and a half. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/bench/ceilings.h"
#include "tests/bench/command.h"

#define WARM_UP    2
#define ROUNDS_MAX 64
#define MODELS     3

static const char *const names[MODELS] = {"f32", "bf16", "gguf"};

/* Of one model, per round. */
struct line {
    bench_model model;
    bool wanted;
    double rate[ROUNDS_MAX], share[ROUNDS_MAX], cpu_share[ROUNDS_MAX], peak_bytes, planned_bytes;
};

static void measure(tp_ctx *ctx, struct line *line, int round, int steps)
{
    bench_run run;
    bench_peak before = bench_peak_flops(ctx);
    bench_train(ctx, &line->model, steps + WARM_UP, &run);
    bench_peak peak = bench_peak_mean(before, bench_peak_flops(ctx));
    bool bf16 = line->model.precision == TP_BF16;
    double tokens = BENCH_SEQUENCE, floor = tokens * BENCH_TOKEN_FLOPS;
    line->rate[round] = tokens / bench_spread_of(run.seconds + WARM_UP, steps).median;
    line->share[round] = line->rate[round] / tokens * floor / (bf16 ? peak.bf16 : peak.f32);
    line->cpu_share[round] =
        floor / bench_spread_of(run.cpu_seconds + WARM_UP, steps).median / (bf16 ? peak.bf16_per_cpu : peak.f32_per_cpu);
    line->peak_bytes = fmax(line->peak_bytes, run.peak_bytes);
    line->planned_bytes = run.planned_bytes;
}

static void print_line(struct line *line, int rounds)
{
    bench_spread rate = bench_spread_of(line->rate, rounds), share = bench_spread_of(line->share, rounds);
    bench_spread cpu = bench_spread_of(line->cpu_share, rounds);
    printf("train %-26s %6.0f tokens/s   %.3f of the floor (%.3f .. %.3f)   %.3f by CPU time (%.3f .. %.3f)\n",
           line->model.label, rate.median, share.median, share.low, share.high, cpu.median, cpu.low, cpu.high);
    printf("memory %-25s %6.0f MiB resident at most, mapped file included; the plan said %.0f MiB: %+.1f %%\n",
           line->model.label, line->peak_bytes / 1048576, line->planned_bytes / 1048576,
           100 * (line->peak_bytes / line->planned_bytes - 1));
}

static int number_after(int argc, char **argv, int *i, int most)
{
    int n = *i + 1 < argc ? atoi(argv[*i + 1]) : 0;
    if (n < 1 || n > most) {
        fprintf(stderr, "%s: expected a number from 1 to %d\n", argv[*i], most);
        exit(2);
    }
    ++*i;
    return n;
}

int main(int argc, char **argv)
{
    static struct line lines[MODELS];
    static tp_ctx ctx;
    int threads = 0, rounds = 3, steps = 2;
    bool any = false;
    for (int i = 1; i < argc; i++) {
        int found = -1;
        for (int m = 0; m < MODELS; m++) found = strcmp(argv[i], names[m]) == 0 ? m : found;
        if (strcmp(argv[i], "--threads") == 0)
            threads = number_after(argc, argv, &i, 1024);
        else if (strcmp(argv[i], "--rounds") == 0)
            rounds = number_after(argc, argv, &i, ROUNDS_MAX);
        else if (strcmp(argv[i], "--steps") == 0)
            steps = number_after(argc, argv, &i, BENCH_STEPS_MAX - WARM_UP);
        else if (found >= 0)
            any = lines[found].wanted = true;
        else
            return fprintf(stderr, "%s: unknown; see the head of tests/bench/bench_train.c\n", argv[i]), 2;
    }
    bench_open(&ctx, threads);
    bench_print_machine(&ctx);
    for (int m = 0; m < MODELS; m++) {
        if (any && !lines[m].wanted) continue;
        lines[m].model = bench_model_of(&ctx, names[m]);
        lines[m].wanted = lines[m].model.there;
        if (!lines[m].model.there) printf("%s is not there (scripts/fetch_model gets it): no line\n", lines[m].model.path);
    }
    for (int round = 0; round < rounds; round++) {
        for (int m = 0; m < MODELS; m++)
            if (lines[m].wanted) measure(&ctx, &lines[m], round, steps);
    }
    for (int m = 0; m < MODELS; m++)
        if (lines[m].wanted) print_line(&lines[m], rounds);
    printf("load %.1f at the end\n", bench_load());
    ctx.device->backend->close(ctx.device);
    return 0;
}
