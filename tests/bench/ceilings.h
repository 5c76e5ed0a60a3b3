/* What this machine can do at this moment: the ceilings beside which end-to-end benchmarks put their figures. Machines are
 * shared and clocks drift, so a ceiling is measured again right before and after what it is compared with, and figures are
 * medians of several such ratios. */
#ifndef TP_TESTS_BENCH_CEILINGS_H
#define TP_TESTS_BENCH_CEILINGS_H

#include "backend/cpu/cpu.h"

/* CLOCK_MONOTONIC, and the CPU time of all threads of this process, in seconds. */
double bench_now(void);
double bench_cpu_now(void);

typedef struct bench_spread {
    double median, low, high;
} bench_spread;
/* Sorts the values. */
bench_spread bench_spread_of(double *values, int n);

/* Products of floats on all threads: per second of the clock (what a program can get now) and per second of CPU time (what
 * a thread gets done while it runs, which other programs disturb little). `f32`: FMAs; `bf16`: the faster of that and
 * vdpbf16ps. */
typedef struct bench_peak {
    double f32, f32_per_cpu, bf16, bf16_per_cpu;
} bench_peak;
bench_peak bench_peak_flops(tp_ctx *ctx);
bench_peak bench_peak_mean(bench_peak a, bench_peak b);

/* Bytes that all threads read together from `memory`, which should be much larger than the caches: per second of the clock
 * and of CPU time. */
typedef struct bench_read {
    double rate, rate_per_cpu;
} bench_read;
bench_read bench_read_speed(tp_ctx *ctx, const void *memory, size_t bytes);

/* One line: the machine, its ceilings, its load. */
void bench_print_machine(tp_ctx *ctx);
/* The load average over the last minute; -1: unknown. */
double bench_load(void);

/* Opens the CPU on ctx; ends the program if it cannot. threads 0: all. */
void bench_open(tp_ctx *ctx, int threads);
/* Ends the program with the context's message unless the status is TP_OK. */
void bench_need(tp_ctx *ctx, tp_status status);

#endif
