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

#include "backend/cpu/openblas.h"
#include "tests/bench/ceilings.h"

#define REPEATS 5

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

static double peak_of(tp_ctx *ctx, bool dot)
{
    bench_peak peak = bench_peak_flops(ctx);
    return dot ? peak.bf16 : peak.f32;
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
        double before = peak_of(ctx, dot), t = bench_now();
        for (int j = 0; j < inner; j++) {
            if (tn)
                bench_need(ctx, tp_run_matmul_tn(ctx, &tn_args));
            else
                bench_need(ctx, tp_run_matmul(ctx, &args));
        }
        t = (bench_now() - t) / inner;
        double after = peak_of(ctx, dot), peak = before > after ? before : after;
        if (i >= 0) times[i] = t, shares[i] = flop / t / peak;
        bool comparable = blas != NULL && format == TP_FORMAT_F32 && activations == TP_F32 && !tn;
        if (i >= 0) blas_times[i] = 0;
        if (!comparable) continue;
        t = bench_now();
        for (int j = 0; j < inner; j++) tp_openblas_sgemm(blas, nt, n, m, k, a, k, b, cols, 0.0f, c, m);
        if (i >= 0) blas_times[i] = (bench_now() - t) / inner;
    }
    bench_spread spread = bench_spread_of(shares, REPEATS);
    double share = spread.median, t = bench_spread_of(times, REPEATS).median,
           other = bench_spread_of(blas_times, REPEATS).median;
    printf("%-4s n=%-4lld m=%-6lld k=%-6lld %-5s %-4s %8.1f GFLOP/s  %.3f of %s peak (%.3f .. %.3f)", form, (long long)n,
           (long long)m, (long long)k, tn ? "" : tp_formats[format].name, activations == TP_BF16 ? "bf16" : "f32",
           flop / t * 1e-9, share, dot ? "bf16" : "f32", spread.low, spread.high);
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
        double before = bench_read_speed(ctx, b, bytes).rate, t = bench_now();
        bench_need(ctx, tp_run_matmul(ctx, &args));
        t = bench_now() - t;
        double after = bench_read_speed(ctx, b, bytes).rate;
        if (i >= 0) times[i] = t, shares[i] = (double)bytes / t / (before > after ? before : after);
    }
    bench_spread share = bench_spread_of(shares, REPEATS);
    double t = bench_spread_of(times, REPEATS).median;
    printf("%-4s n=%-4lld 8192 x 8192   %-5s      %8.2f GB/s     %.3f of reading speed (%.3f .. %.3f)\n", nt ? "nt" : "nn",
           (long long)n, tp_formats[format].name, (double)bytes / t * 1e-9, share.median, share.low, share.high);
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
    const char *only = argc > 2 ? argv[2] : "";
    bench_open(&ctx, argc > 1 ? atoi(argv[1]) : 0);
    tp_cpu *cpu = tp_cpu_of(&ctx);
    tp_openblas *blas = tp_openblas_open(cpu->isa == TP_CPU_AVX512);
    if (blas != NULL) blas->set_num_threads(cpu->device.threads);
    bench_print_machine(&ctx);
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
