/* How far the CPU's matrix products are from what the machine can do. Every line is a share of a ceiling that was measured
 * just before and just after it: f32 FMAs (or bf16 dot products) on all threads, or reading memory. Medians of repeats.
 *
 *     bench_matmul [threads]
 *
 * Runs for about half a minute. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "backend/cpu/cpu.h"
#include "backend/cpu/openblas.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define REPEATS 5

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *x, int n)
{
    qsort(x, (size_t)n, sizeof *x, by_value);
    return x[n / 2];
}

/* ---- ceilings ---- */

typedef struct ceiling {
    tp_cpu *cpu;
    float sink[64];
    const unsigned char *memory;
    int64_t part;
} ceiling;

#define FMA_LOOPS 20000

#if defined(__x86_64__)
/* clang-format off */
#define CHAINS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
/* clang-format on */

/* Twelve independent chains of one instruction; named variables, so that each is a register. */
#define PEAK_LOOP(target, name, type, start, step, add, first)                                                                 \
    static target float name(void)                                                                                             \
    {                                                                                                                          \
        CHAINS(start)                                                                                                          \
        for (int l = 0; l < FMA_LOOPS; l++) {                                                                                  \
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
PEAK_LOOP(TP_TARGET_AVX512, fma_avx512, __m512, START_512, STEP_512, ADD_512, _mm512_cvtss_f32)
PEAK_LOOP(TP_TARGET_BF16_DOT, dot_bf16, __m512, START_512, STEP_DOT, ADD_512, _mm512_cvtss_f32)
PEAK_LOOP(TP_TARGET_AVX2, fma_avx2, __m256, START_256, STEP_256, ADD_256, _mm256_cvtss_f32)
#else
static float fma_plain(void)
{
    float s[12] = {0};
    for (int l = 0; l < FMA_LOOPS; l++) {
        for (int i = 0; i < 12; i++) s[i] = s[i] * 0.5f + 0.25f;
    }
    for (int i = 1; i < 12; i++) s[0] += s[i];
    return s[0];
}
#endif

static void fma_item(void *arg, int64_t item, int thread)
{
    ceiling *c = arg;
    (void)item;
#if defined(__x86_64__)
    c->sink[thread & 63] = c->cpu->isa == TP_CPU_AVX512 ? fma_avx512() : fma_avx2();
#else
    c->sink[thread & 63] = fma_plain();
#endif
}

static void dot_item(void *arg, int64_t item, int thread)
{
    ceiling *c = arg;
    (void)item;
#if defined(__x86_64__)
    c->sink[thread & 63] = dot_bf16();
#else
    c->sink[thread & 63] = 0;
#endif
}

/* Best of some rounds of about a millisecond: the peak is what the machine can do, not what it did on average. */
static double peak_flops(tp_cpu *cpu, bool dot)
{
    ceiling c = {.cpu = cpu};
    double best = 1e9;
    int64_t items = 8 * cpu->device.threads;
    for (int i = 0; i < 5; i++) {
        double t = now();
        tp_cpu_for(cpu, items, dot ? dot_item : fma_item, &c);
        t = now() - t;
        if (t < best) best = t;
    }
    double lanes = cpu->isa == TP_CPU_AVX512 ? 16 : cpu->isa == TP_CPU_AVX2 ? 8 : 1;
    return (double)items * FMA_LOOPS * 12 * lanes * (dot ? 4 : 2) / best;
}

static void read_item(void *arg, int64_t item, int thread)
{
    ceiling *c = arg;
    const unsigned char *p = c->memory + item * c->part;
    uint64_t sum = 0;
#if defined(__x86_64__)
    __m128i s[4] = {_mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128()};
    for (int64_t i = 0; i < c->part; i += 64) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            s[j] = _mm_xor_si128(s[j], _mm_loadu_si128((const __m128i *)(const void *)(p + i + 16 * j)));
    }
    s[0] = _mm_xor_si128(_mm_xor_si128(s[0], s[1]), _mm_xor_si128(s[2], s[3]));
    sum = (uint64_t)_mm_cvtsi128_si64(s[0]);
#else
    for (int64_t i = 0; i < c->part; i += 8) {
        uint64_t w;
        memcpy(&w, p + i, 8);
        sum ^= w;
    }
#endif
    c->sink[thread & 63] = (float)sum;
}

static double read_bytes_per_second(tp_cpu *cpu, const void *memory, int64_t bytes)
{
    ceiling c = {.cpu = cpu, .memory = memory, .part = 256 << 10};
    double best = 1e9;
    for (int i = 0; i < 5; i++) {
        double t = now();
        tp_cpu_for(cpu, bytes / c.part, read_item, &c);
        t = now() - t;
        if (t < best) best = t;
    }
    return (double)(bytes / c.part * c.part) / best;
}

/* ---- data ---- */

static uint64_t state = 1;

static float next_value(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (float)((double)(state >> 40) / (1 << 23) - 1.0);
}

static void *filled(tp_ctx *ctx, size_t bytes, tp_format_id format)
{
    unsigned char *p = ctx->device->backend->alloc(ctx, ctx->device, bytes);
    if (p == NULL) {
        fprintf(stderr, "%s\n", ctx->message);
        exit(1);
    }
    if (format == TP_FORMAT_F32) {
        for (size_t i = 0; i + 4 <= bytes; i += 4) {
            float x = next_value();
            memcpy(p + i, &x, 4);
        }
    } else if (format == TP_FORMAT_BF16) {
        for (size_t i = 0; i + 2 <= bytes; i += 2) {
            uint16_t h = tp_f32_to_bf16(next_value());
            memcpy(p + i, &h, 2);
        }
    } else {
        size_t block = (size_t)tp_formats[format].block_bytes;
        for (size_t i = 0; i < bytes; i++) p[i] = i % block < 4 ? (i % 2 != 0 ? 0x20 : 0) : (unsigned char)(next_value() * 100);
    }
    return p;
}

/* ---- products ---- */

static void run(tp_ctx *ctx, const tp_matmul_args *args)
{
    if (tp_run_matmul(ctx, args) != TP_OK) {
        fprintf(stderr, "%s\n", ctx->message);
        exit(1);
    }
}

/* Share of the peak; prints a line. */
static double time_product(tp_ctx *ctx, const tp_openblas *blas, const char *form, int64_t n, int64_t m, int64_t k,
                           tp_format_id format, tp_dtype activations, tp_dtype precision)
{
    tp_cpu *cpu = tp_cpu_of(ctx);
    bool nt = strcmp(form, "nt") == 0, tn = strcmp(form, "tn") == 0, dot = precision == TP_BF16 && cpu->bf16_dot && !tn;
    int64_t rows = nt ? m : k, cols = nt ? k : m;
    size_t a_bytes = (size_t)(n * (tn ? m : k)) * tp_dtype_bytes(activations);
    size_t b_bytes = tn ? (size_t)(n * k) * tp_dtype_bytes(activations) : (size_t)(rows * tp_format_row_bytes(format, cols));
    size_t c_bytes = (size_t)((tn ? m * k : n * m) * 4);
    tp_format_id as = activations == TP_BF16 ? TP_FORMAT_BF16 : TP_FORMAT_F32;
    void *a = filled(ctx, a_bytes, as), *b = filled(ctx, b_bytes, tn ? as : format), *c = filled(ctx, c_bytes, as);
    tp_matmul_args args = {.n = n,
                           .m = m,
                           .k = k,
                           .a = {a, activations, k},
                           .b = {format, b, rows, cols, 0, false, 0, false},
                           .nt = nt,
                           .c = {c, activations, m},
                           .alpha = 1,
                           .precision = precision};
    tp_matmul_tn_args tn_args = {
        .n = n, .m = m, .k = k, .a = {a, activations, m}, .b = {b, activations, k}, .c = c, .alpha = 1};
    double flop = 2.0 * (double)n * (double)m * (double)k, shares[REPEATS], blas_times[REPEATS], times[REPEATS];
    int inner = (int)fmax(1, 1e9 / flop);
    for (int i = -1; i < REPEATS; i++) {
        double before = peak_flops(cpu, dot), t = now();
        for (int j = 0; j < inner; j++) {
            if (tn)
                (void)tp_run_matmul_tn(ctx, &tn_args);
            else
                run(ctx, &args);
        }
        t = (now() - t) / inner;
        double after = peak_flops(cpu, dot), peak = before > after ? before : after;
        if (i >= 0) times[i] = t, shares[i] = flop / t / peak;
        bool comparable = blas != NULL && format == TP_FORMAT_F32 && activations == TP_F32 && !tn;
        if (i >= 0) blas_times[i] = 0;
        if (!comparable) continue;
        t = now();
        for (int j = 0; j < inner; j++) tp_openblas_sgemm(blas, nt, n, m, k, a, k, b, cols, 0.0f, c, m);
        if (i >= 0) blas_times[i] = (now() - t) / inner;
    }
    double share = median(shares, REPEATS), t = median(times, REPEATS), other = median(blas_times, REPEATS);
    printf("%-4s n=%-4lld m=%-6lld k=%-6lld %-5s %-4s %8.1f GFLOP/s  %.3f of %s peak (%.3f .. %.3f)", form, (long long)n,
           (long long)m, (long long)k, tn ? "" : tp_formats[format].name, activations == TP_BF16 ? "bf16" : "f32",
           flop / t * 1e-9, share, dot ? "bf16" : "f32", shares[0], shares[REPEATS - 1]);
    if (other > 0) printf("  %.2f x OpenBLAS", other / t);
    printf("\n");
    fflush(stdout);
    ctx->device->backend->free(ctx->device, a, a_bytes);
    ctx->device->backend->free(ctx->device, b, b_bytes);
    ctx->device->backend->free(ctx->device, c, c_bytes);
    return share;
}

/* Share of the reading speed of memory, for few rows against a matrix larger than the caches. */
static void time_few(tp_ctx *ctx, bool nt, int64_t n, tp_format_id format)
{
    enum { ROWS = 8192, COLS = 8192 };
    tp_cpu *cpu = tp_cpu_of(ctx);
    size_t bytes = (size_t)ROWS * (size_t)tp_format_row_bytes(format, COLS);
    void *b = filled(ctx, bytes, format), *a = filled(ctx, n * 8192 * 4, TP_FORMAT_F32),
         *c = filled(ctx, n * 8192 * 4, TP_FORMAT_F32);
    tp_matmul_args args = {.n = n,
                           .m = 8192,
                           .k = 8192,
                           .a = {a, TP_F32, 8192},
                           .b = {format, b, ROWS, COLS, 0, false, 0, false},
                           .nt = nt,
                           .c = {c, TP_F32, 8192},
                           .alpha = 1,
                           .precision = TP_F32};
    double shares[REPEATS], times[REPEATS];
    for (int i = -1; i < REPEATS; i++) {
        double before = read_bytes_per_second(cpu, b, (int64_t)bytes), t = now();
        run(ctx, &args);
        t = now() - t;
        double after = read_bytes_per_second(cpu, b, (int64_t)bytes);
        if (i >= 0) times[i] = t, shares[i] = (double)bytes / t / (before > after ? before : after);
    }
    double share = median(shares, REPEATS), t = median(times, REPEATS);
    printf("%-4s n=%-4lld 8192 x 8192   %-5s      %8.2f GB/s     %.3f of reading speed (%.3f .. %.3f)\n", nt ? "nt" : "nn",
           (long long)n, tp_formats[format].name, (double)bytes / t * 1e-9, share, shares[0], shares[REPEATS - 1]);
    fflush(stdout);
    ctx->device->backend->free(ctx->device, a, n * 8192 * 4);
    ctx->device->backend->free(ctx->device, b, bytes);
    ctx->device->backend->free(ctx->device, c, n * 8192 * 4);
}

static const int64_t shapes[5][2] = {{576, 576}, {1536, 576}, {576, 1536}, {4096, 4096}, {49152, 576}};

static void time_shapes(tp_ctx *ctx, const tp_openblas *blas, const char *form, int64_t n, tp_format_id format,
                        tp_dtype activations, tp_dtype precision)
{
    double product = 1;
    for (int i = 0; i < 5; i++) {
        bool nt = strcmp(form, "nt") == 0;
        product *=
            time_product(ctx, blas, form, n, shapes[i][nt ? 0 : 1], shapes[i][nt ? 1 : 0], format, activations, precision);
    }
    printf("     geometric mean %.3f\n", pow(product, 0.2));
}

int main(int argc, char **argv)
{
    static tp_ctx ctx;
    tp_ctx_init(&ctx);
    const char *only = argc > 2 ? argv[2] : "";
    if (tp_cpu_backend.open(&ctx, 0, argc > 1 ? atoi(argv[1]) : 0, &ctx.device) != TP_OK) {
        fprintf(stderr, "%s\n", ctx.message);
        return 1;
    }
    tp_cpu *cpu = tp_cpu_of(&ctx);
    tp_openblas *blas = tp_openblas_open(cpu->isa == TP_CPU_AVX512);
    if (blas != NULL) blas->set_num_threads(cpu->device.threads);
    tp_buf about;
    tp_buf_init(&about, 0);
    ctx.device->backend->describe(ctx.device, &about);
    double peak = peak_flops(cpu, false);
    printf("{%s}\n%.1f GFLOP/s f32 peak", tp_buf_cstr(&about), peak * 1e-9);
    if (cpu->bf16_dot) printf(", %.1f bf16", peak_flops(cpu, true) * 1e-9);
    printf("\n");
    tp_buf_free(&about);
    bool all = only[0] == '\0';
    if (all || strcmp(only, "nt") == 0) time_shapes(&ctx, blas, "nt", 512, TP_FORMAT_F32, TP_F32, TP_F32);
    if (all || strcmp(only, "bf16") == 0) time_shapes(&ctx, blas, "nt", 512, TP_FORMAT_BF16, TP_BF16, TP_BF16);
    if (all || strcmp(only, "nn") == 0) time_shapes(&ctx, blas, "nn", 512, TP_FORMAT_F32, TP_F32, TP_F32);
    if (all || strcmp(only, "nnbf16") == 0) time_shapes(&ctx, blas, "nn", 512, TP_FORMAT_BF16, TP_BF16, TP_BF16);
    if (all || strcmp(only, "q4_1") == 0) time_shapes(&ctx, blas, "nt", 512, TP_FORMAT_Q4_1, TP_F32, TP_F32);
    if (all || strcmp(only, "q4_1") == 0) time_shapes(&ctx, blas, "nn", 512, TP_FORMAT_Q4_1, TP_F32, TP_F32);
    if (all || strcmp(only, "thin") == 0) {
        static const int64_t ranks[] = {8, 16, 64};
        for (size_t i = 0; i < sizeof ranks / sizeof *ranks; i++) {
            int64_t r = ranks[i];
            time_product(&ctx, blas, "nt", 512, r, 576, TP_FORMAT_F32, TP_F32, TP_F32);
            time_product(&ctx, blas, "nt", 512, r, 576, TP_FORMAT_F32, TP_BF16, TP_F32);
            time_product(&ctx, blas, "nt", 512, 1536, r, TP_FORMAT_F32, TP_F32, TP_F32);
            time_product(&ctx, blas, "nn", 512, r, 1536, TP_FORMAT_F32, TP_F32, TP_F32);
            time_product(&ctx, blas, "nn", 512, 576, r, TP_FORMAT_F32, TP_F32, TP_F32);
            time_product(&ctx, blas, "tn", 512, r, 576, TP_FORMAT_F32, TP_F32, TP_F32);
            time_product(&ctx, blas, "tn", 512, 1536, r, TP_FORMAT_F32, TP_F32, TP_F32);
        }
        time_product(&ctx, blas, "tn", 512, 1536, 576, TP_FORMAT_F32, TP_F32, TP_F32);
    }
    if (all || strcmp(only, "small") == 0) {
        time_product(&ctx, blas, "nt", 8, 1536, 576, TP_FORMAT_F32, TP_F32, TP_F32);
        time_product(&ctx, blas, "nt", 32, 1536, 576, TP_FORMAT_F32, TP_F32, TP_F32);
        time_product(&ctx, blas, "nt", 128, 1536, 576, TP_FORMAT_F32, TP_F32, TP_F32);
        time_product(&ctx, blas, "nn", 128, 576, 1536, TP_FORMAT_F32, TP_F32, TP_F32);
    }
    if (all || strcmp(only, "few") == 0) {
        static const tp_format_id formats[] = {TP_FORMAT_F32, TP_FORMAT_BF16, TP_FORMAT_Q8_0, TP_FORMAT_Q4_1};
        for (size_t i = 0; i < sizeof formats / sizeof *formats; i++) {
            time_few(&ctx, true, 1, formats[i]);
            time_few(&ctx, true, 4, formats[i]);
            time_few(&ctx, false, 1, formats[i]);
        }
    }
    tp_openblas_close(blas);
    ctx.device->backend->close(ctx.device);
    return 0;
}
