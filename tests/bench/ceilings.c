/* Twelve independent chains of one instruction keep every pipe of the widest unit full; an xor over memory keeps its bus
 * full. Rates are medians of short rounds, so that one preempted round does not count. Those by CPU time are of all rounds
 * together: the system counts other threads' time in ticks as long as a round. */
#include "tests/bench/ceilings.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "backend/cpu/cpu_model.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define ROUNDS 25
#define LOOPS  20000
/* Of a round: some milliseconds. */
#define ITEMS_PER_THREAD 64

static double seconds_of(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

double bench_now(void)
{
    return seconds_of(CLOCK_MONOTONIC);
}

double bench_cpu_now(void)
{
    return seconds_of(CLOCK_PROCESS_CPUTIME_ID);
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

bench_spread bench_spread_of(double *values, int n)
{
    qsort(values, (size_t)n, sizeof *values, by_value);
    double median = n % 2 == 1 ? values[n / 2] : 0.5 * (values[n / 2 - 1] + values[n / 2]);
    return (bench_spread){median, values[0], values[n - 1]};
}

void bench_need(tp_ctx *ctx, tp_status status)
{
    if (status == TP_OK) return;
    fprintf(stderr, "%s\n", ctx->message);
    exit(1);
}

void bench_open(tp_ctx *ctx, int threads)
{
    tp_ctx_init(ctx);
    bench_need(ctx, tp_cpu_backend.open(ctx, 0, threads, &ctx->device));
}

double bench_load(void)
{
    double load;
    return getloadavg(&load, 1) == 1 ? load : -1;
}

/* ---- products ---- */

struct loop {
    float (*run)(void);
    float sink[64];
};

/* clang-format off */
#define CHAINS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
/* clang-format on */

#if defined(__x86_64__)
#define CHAIN_LOOP(target, name, type, start, step, add, first)                                                                \
    static target float name(void)                                                                                             \
    {                                                                                                                          \
        CHAINS(start)                                                                                                          \
        for (int l = 0; l < LOOPS; l++) {                                                                                      \
            CHAINS(step)                                                                                                       \
        }                                                                                                                      \
        type s = s0;                                                                                                           \
        CHAINS(add)                                                                                                            \
        return first(s);                                                                                                       \
    }
#define START_512(i) __m512 s##i = _mm512_set1_ps(1.0f + i);
#define START_256(i) __m256 s##i = _mm256_set1_ps(1.0f + i);
#define STEP_512(i)                                                                                                            \
    s##i = _mm512_fmadd_ps(s##i, _mm512_set1_ps(0.5f), _mm512_set1_ps(0.25f));                                                 \
    __asm__ volatile("" : "+v"(s##i));
#define STEP_DOT(i)                                                                                                            \
    s##i = _mm512_dpbf16_ps(s##i, (__m512bh)_mm512_set1_epi32(0x3f003f00), (__m512bh)_mm512_set1_epi32(0x3f003f00));           \
    __asm__ volatile("" : "+v"(s##i));
#define STEP_256(i)                                                                                                            \
    s##i = _mm256_fmadd_ps(s##i, _mm256_set1_ps(0.5f), _mm256_set1_ps(0.25f));                                                 \
    __asm__ volatile("" : "+x"(s##i));
#define ADD_512(i) s = _mm512_add_ps(s, s##i);
#define ADD_256(i) s = _mm256_add_ps(s, s##i);
CHAIN_LOOP(TP_TARGET_AVX512, fma_avx512, __m512, START_512, STEP_512, ADD_512, _mm512_cvtss_f32)
CHAIN_LOOP(TP_TARGET_BF16_DOT, dot_avx512, __m512, START_512, STEP_DOT, ADD_512, _mm512_cvtss_f32)
CHAIN_LOOP(TP_TARGET_AVX2, fma_avx2, __m256, START_256, STEP_256, ADD_256, _mm256_cvtss_f32)
#endif

static float fma_plain(void)
{
    float s[12] = {0};
    for (int l = 0; l < LOOPS; l++) {
        for (int i = 0; i < 12; i++) s[i] = s[i] * 0.5f + 0.25f;
    }
    for (int i = 1; i < 12; i++) s[0] += s[i];
    return s[0];
}

static void loop_item(void *arg, int64_t item, int thread)
{
    struct loop *loop = arg;
    (void)item;
    loop->sink[thread & 63] = loop->run();
}

static void measure_loop(tp_cpu *cpu, float (*run)(void), double flops_per_item, double *rate, double *rate_per_cpu)
{
    struct loop loop = {.run = run};
    double rates[ROUNDS], cpu_began = bench_cpu_now();
    int64_t items = (int64_t)ITEMS_PER_THREAD * cpu->device.threads;
    double flops = flops_per_item * (double)items;
    for (int i = 0; i < ROUNDS; i++) {
        double began = bench_now();
        tp_cpu_for(cpu, items, loop_item, &loop);
        rates[i] = flops / (bench_now() - began);
    }
    *rate = bench_spread_of(rates, ROUNDS).median;
    *rate_per_cpu = ROUNDS * flops / (bench_cpu_now() - cpu_began);
}

bench_peak bench_peak_flops(tp_ctx *ctx)
{
    tp_cpu *cpu = tp_cpu_of(ctx);
    tp_cpu_model model;
    bench_peak peak = {0};
    bench_need(ctx, tp_cpu_model_detect(ctx, &model));
    float (*fma)(void) = fma_plain;
    double lanes = 1;
#if defined(__x86_64__)
    if (cpu->isa == TP_CPU_AVX512) fma = fma_avx512, lanes = 16;
    if (cpu->isa == TP_CPU_AVX2) fma = fma_avx2, lanes = 8;
#endif
    measure_loop(cpu, fma, 2.0 * 12 * lanes * LOOPS, &peak.f32, &peak.f32_per_cpu);
    peak.bf16 = peak.f32;
    peak.bf16_per_cpu = peak.f32_per_cpu;
#if defined(__x86_64__)
    double dot, dot_per_cpu;
    if (!model.has_bf16_dot || cpu->isa != TP_CPU_AVX512) return peak;
    measure_loop(cpu, dot_avx512, 4.0 * 12 * lanes * LOOPS, &dot, &dot_per_cpu);
    if (dot_per_cpu > peak.bf16_per_cpu) peak.bf16 = dot, peak.bf16_per_cpu = dot_per_cpu;
#endif
    return peak;
}

bench_peak bench_peak_mean(bench_peak a, bench_peak b)
{
    return (bench_peak){0.5 * (a.f32 + b.f32), 0.5 * (a.f32_per_cpu + b.f32_per_cpu), 0.5 * (a.bf16 + b.bf16),
                        0.5 * (a.bf16_per_cpu + b.bf16_per_cpu)};
}

/* ---- memory ---- */

#define READ_ROUNDS 5
#define READ_PART   ((size_t)256 << 10)
/* The next cache lines are asked for this far ahead: without it a core reads a fifth slower. */
#define READ_AHEAD 4096

struct reading {
    const unsigned char *memory;
    uint64_t (*run)(const unsigned char *p);
    uint64_t sink[64];
};

#define READ_LOOP(target, name, type, start, step, last)                                                                       \
    static target uint64_t name(const unsigned char *p)                                                                        \
    {                                                                                                                          \
        type s[8];                                                                                                             \
        for (int j = 0; j < 8; j++) s[j] = start;                                                                              \
        for (size_t i = 0; i < READ_PART; i += sizeof s) {                                                                     \
            for (size_t j = 0; j < sizeof s; j += 64) __builtin_prefetch(p + i + j + READ_AHEAD, 0, 3);                        \
            for (int j = 0; j < 8; j++) s[j] = step(s[j], p + i + (size_t)j * sizeof s[0]);                                    \
        }                                                                                                                      \
        for (int j = 1; j < 8; j++) s[0] ^= s[j];                                                                              \
        return (uint64_t)last(s[0]);                                                                                           \
    }

static inline uint64_t xor_plain(uint64_t sum, const unsigned char *p)
{
    uint64_t word;
    memcpy(&word, p, sizeof word);
    return sum ^ word;
}
READ_LOOP(, read_plain, uint64_t, 0, xor_plain, )

#if defined(__x86_64__)
#define XOR_512(s, p) _mm512_xor_si512(s, _mm512_loadu_si512(p))
#define XOR_256(s, p) _mm256_xor_si256(s, _mm256_loadu_si256((const __m256i *)(const void *)(p)))
#define LAST_512(s)   _mm_cvtsi128_si64(_mm512_castsi512_si128(s))
#define LAST_256(s)   _mm_cvtsi128_si64(_mm256_castsi256_si128(s))
READ_LOOP(TP_TARGET_AVX512, read_avx512, __m512i, _mm512_setzero_si512(), XOR_512, LAST_512)
READ_LOOP(TP_TARGET_AVX2, read_avx2, __m256i, _mm256_setzero_si256(), XOR_256, LAST_256)
#endif

static void read_item(void *arg, int64_t item, int thread)
{
    struct reading *reading = arg;
    reading->sink[thread & 63] ^= reading->run(reading->memory + (size_t)item * READ_PART);
}

bench_read bench_read_speed(tp_ctx *ctx, const void *memory, size_t bytes)
{
    struct reading reading = {.memory = memory, .run = read_plain};
    double rates[READ_ROUNDS], cpu_began = bench_cpu_now();
#if defined(__x86_64__)
    tp_cpu_isa isa = tp_cpu_of(ctx)->isa;
    if (isa != TP_CPU_GENERIC) reading.run = isa == TP_CPU_AVX512 ? read_avx512 : read_avx2;
#endif
    int64_t items = (int64_t)(bytes / READ_PART);
    double total = (double)items * (double)READ_PART;
    for (int i = 0; i < READ_ROUNDS; i++) {
        double began = bench_now();
        tp_cpu_for(tp_cpu_of(ctx), items, read_item, &reading);
        rates[i] = total / (bench_now() - began);
    }
    return (bench_read){bench_spread_of(rates, READ_ROUNDS).median, READ_ROUNDS * total / (bench_cpu_now() - cpu_began)};
}

void bench_print_machine(tp_ctx *ctx)
{
    tp_cpu_model model;
    bench_peak peak = bench_peak_flops(ctx);
    bench_need(ctx, tp_cpu_model_detect(ctx, &model));
    printf("%s, family %d model %d, %d threads, %s, load %.1f; f32 FMA %.0f GFLOP/s", model.name, model.family, model.model,
           ctx->device->threads, tp_cpu_isa_name(tp_cpu_of(ctx)->isa), bench_load(), 1e-9 * peak.f32);
    if (model.has_bf16_dot) printf(", faster of it and bf16 dot %.0f", 1e-9 * peak.bf16);
    printf("\n");
    fflush(stdout);
}
