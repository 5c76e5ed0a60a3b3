/* What the kernels of a GPU reach: products in TFLOP/s, attention in TFLOP/s, and what memory bounds as a share of copying.
 *
 *   make CUDA=1 build/tests/bench/gpu/bench_cuda && build/tests/bench/gpu/bench_cuda [gemm|attention|memory|factors|loss]
 *   build/tests/bench/gpu/bench_cuda attention [BATCH LENGTH HEADS KV_HEADS HEAD_DIM WINDOW] [uneven] [any-order] [fp16]
 *   build/tests/bench/gpu/bench_cuda factors N FIRST SECOND THIRD              du and dB of parts with so many columns of dy
 *
 * Each line is the median of nine rounds of calls that take some 10 ms together, after one for warming up. Inputs are random:
 * zeros would run faster. FLOPs of causal attention count half the square. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "backend/backend.h"
#include "base/mem.h"

static tp_ctx ctx;
static void *held[64];
static size_t held_bytes[64];
static int n_held;
static double copy_rate; /* bytes read and written per second */

static void check(tp_status status)
{
    if (status == TP_OK) return;
    fprintf(stderr, "bench_cuda: %s\n", ctx.message);
    exit(1);
}

/* ---- device memory with random values ---- */

static void *memory(size_t bytes)
{
    void *p = ctx.device->backend->alloc(&ctx, ctx.device, bytes);
    if (p == NULL) check(ctx.status);
    held[n_held] = p;
    held_bytes[n_held++] = bytes;
    return p;
}

static void release_all(void)
{
    while (n_held > 0) {
        n_held--;
        ctx.device->backend->free(ctx.device, held[n_held], held_bytes[n_held]);
    }
}

/* The same megabytes over and over: their order of summation does not matter here. */
static void *filled(int64_t n, tp_dtype dtype, float size)
{
    enum { PIECE = 1 << 20 };
    static float values[PIECE];
    static uint16_t narrow[PIECE];
    static uint32_t state = 1;
    size_t each = tp_dtype_bytes(dtype);
    char *p = memory((size_t)n * each);
    for (int i = 0; i < PIECE; i++) {
        state = state * 1664525u + 1013904223u;
        values[i] = size * (float)(int32_t)state / 2147483648.0f;
    }
    tp_convert_from_f32(TP_BF16, values, PIECE, narrow);
    for (int64_t at = 0; at < n; at += PIECE) {
        size_t count = (size_t)(n - at < PIECE ? n - at : PIECE);
        const void *from = dtype == TP_F32 ? (const void *)values : (const void *)narrow;
        check(ctx.device->backend->copy_in(&ctx, p + (size_t)at * each, from, count * each));
    }
    return p;
}

static tp_rows rows_of(int64_t n, int64_t cols, float size)
{
    return (tp_rows){filled(n * cols, TP_BF16, size), TP_BF16, cols};
}

/* ---- timing ---- */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
    double x, y;
    memcpy(&x, a, sizeof x);
    memcpy(&y, b, sizeof y);
    return x < y ? -1 : x > y;
}

static double round_of(int kernel, const void *args, int calls)
{
    double began = now();
    for (int i = 0; i < calls; i++) check(ctx.device->backend->kernels[kernel](&ctx, args));
    check(ctx.device->backend->sync(&ctx));
    return (now() - began) / calls;
}

/* Seconds of a call. */
static double seconds_of(int kernel, const void *args)
{
    double rounds[9], once;
    (void)round_of(kernel, args, 2);
    once = round_of(kernel, args, 3);
    int calls = once < 1e-4 ? 100 : once < 1e-2 ? (int)(1e-2 / once) + 1 : 1;
    for (int i = 0; i < 9; i++) rounds[i] = round_of(kernel, args, calls);
    qsort(rounds, 9, sizeof rounds[0], by_value);
    return rounds[4];
}

static void memory_line(const char *name, double bytes, int kernel, const void *args)
{
    double t = seconds_of(kernel, args);
    printf("%-28s %9.1f us %7.0f GB/s  %.2f of copying\n", name, t * 1e6, bytes / t * 1e-9, bytes / t / copy_rate);
    fflush(stdout);
}

/* ---- what is measured ---- */

static void gemm(int64_t n, int64_t m, int64_t k)
{
    tp_matmul_args args = {.n = n,
                           .m = m,
                           .k = k,
                           .a = rows_of(n, k, 1),
                           .b = tp_matrix_dense(TP_BF16, filled(m * k, TP_BF16, 1), m, k),
                           .nt = true,
                           .c = rows_of(n, m, 1),
                           .alpha = 1,
                           .precision = TP_BF16};
    double t = seconds_of(TP_KERNEL_matmul, &args);
    printf("gemm %lld x %lld x %lld: %.3f ms, %.0f TFLOP/s\n", (long long)n, (long long)m, (long long)k, t * 1e3,
           2e-12 * (double)n * (double)m * (double)k / t);
    fflush(stdout);
    release_all();
}

/* Of attention, besides its shape. uneven: sequences of a sixteenth of the length up to all of it. */
static struct {
    bool uneven, fp16;
} how;

static tp_rows attention_rows(int64_t n, int64_t cols, float size)
{
    tp_rows rows = rows_of(n, cols, size);
    if (how.fp16) rows.dtype = TP_F16; /* the same bits: other numbers below 2 */
    return rows;
}

/* window 0: none. */
static void attention(int64_t batch, int64_t length, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t window)
{
    enum { MOST = 64 };
    static tp_segment segments[MOST];
    int64_t n = 0, wide = heads * head_dim, narrow = kv_heads * head_dim;
    double pairs = 0;
    for (int64_t b = 0; b < batch && b < MOST; b++) {
        int64_t own = how.uneven ? length * (b * 37 % 16 + 1) / 16 : length;
        segments[b] = (tp_segment){n, own, n, own};
        n += own;
        pairs += 0.5 * (double)own * (double)own;
    }
    tp_attention_backward_args args = {.forward = {.n_q = n,
                                                   .heads = heads,
                                                   .kv_heads = kv_heads,
                                                   .head_dim = head_dim,
                                                   .q = attention_rows(n, wide, 2),
                                                   .k = attention_rows(n, narrow, 2),
                                                   .v = attention_rows(n, narrow, 1),
                                                   .out = attention_rows(n, wide, 1),
                                                   .lse = filled(n * heads, TP_F32, 1),
                                                   .segments = segments,
                                                   .n_segments = batch,
                                                   .causal = true,
                                                   .window = window,
                                                   .scale = 1.0f / sqrtf((float)head_dim)},
                                       .n_k = n,
                                       .dout = attention_rows(n, wide, 1),
                                       .dq = attention_rows(n, wide, 1),
                                       .dk = attention_rows(n, narrow, 1),
                                       .dv = attention_rows(n, narrow, 1),
                                       .delta = filled(n * heads, TP_F32, 1)};
    double flops = 4.0 * pairs * (double)wide;
    const tp_attention_size size = {how.uneven ? 0 : batch, length, heads, head_dim};
    uint64_t reserved;
    check(ctx.device->backend->reserve(&ctx, &size, UINT64_MAX, &reserved));
    double forward = seconds_of(TP_KERNEL_attention, &args.forward), backward = seconds_of(TP_KERNEL_attention_backward, &args);
    printf("attention B%lld T%lld%s heads %lld/%lld x %lld%s%s%s: forward %.3f ms, %.0f TFLOP/s; backward %.3f ms, %.0f "
           "TFLOP/s, with "
           "%.0f MiB\n",
           (long long)batch, (long long)length, how.uneven ? " uneven" : "", (long long)heads, (long long)kv_heads,
           (long long)head_dim, window > 0 ? " window" : "", how.fp16 ? " fp16" : "",
           ctx.device->any_order ? " in any order" : "", forward * 1e3, flops / forward * 1e-12, backward * 1e3,
           2.5 * flops / backward * 1e-12, (double)reserved / (1 << 20));
    fflush(stdout);
    release_all();
}

static void measure_copy(void)
{
    int64_t n = 65536, dim = 16384;
    tp_scale_args args = {.n = n, .dim = dim, .x = rows_of(n, dim, 1), .y = rows_of(n, dim, 1), .alpha = 1};
    double bytes = 4.0 * (double)(n * dim), t = seconds_of(TP_KERNEL_scale, &args);
    copy_rate = bytes / t;
    printf("copying: %.0f GB/s read and written\n", copy_rate * 1e-9);
    release_all();
}

static void norms(int64_t dim)
{
    int64_t n = ((int64_t)1 << 27) / dim;
    double values = (double)(n * dim);
    char name[64];
    tp_rmsnorm_args f = {.n = n,
                         .dim = dim,
                         .x = rows_of(n, dim, 1),
                         .y = rows_of(n, dim, 1),
                         .weight = filled(dim, TP_F32, 1),
                         .rstd = filled(n, TP_F32, 1),
                         .eps = 1e-5f};
    tp_rmsnorm_backward_args b = {.n = n,
                                  .dim = dim,
                                  .x = f.x,
                                  .dy = f.y,
                                  .dx = rows_of(n, dim, 1),
                                  .weight = f.weight,
                                  .rstd = f.rstd,
                                  .accumulate = true};
    snprintf(name, sizeof name, "rmsnorm %lld", (long long)dim);
    memory_line(name, 4 * values, TP_KERNEL_rmsnorm, &f);
    snprintf(name, sizeof name, "rmsnorm_backward %lld", (long long)dim);
    memory_line(name, 8 * values, TP_KERNEL_rmsnorm_backward, &b);
    release_all();
}

static void elementwise(void)
{
    int64_t n = 8192, dim = 14336;
    double values = (double)(n * dim);
    tp_swiglu_args f = {.n = n, .dim = dim, .gate = rows_of(n, dim, 1), .up = rows_of(n, dim, 1), .y = rows_of(n, dim, 1)};
    tp_swiglu_backward_args b = {
        .n = n, .dim = dim, .gate = f.gate, .up = f.up, .dy = f.y, .dgate = rows_of(n, dim, 1), .dup = rows_of(n, dim, 1)};
    memory_line("swiglu", 6 * values, TP_KERNEL_swiglu, &f);
    memory_line("swiglu_backward", 10 * values, TP_KERNEL_swiglu_backward, &b);
    release_all();
}

static void rope(int64_t heads, int64_t head_dim)
{
    int64_t n = 32768, dim = heads * head_dim, half = head_dim / 2;
    char name[64];
    tp_rope_args r = {.n = n,
                      .heads = heads,
                      .head_dim = head_dim,
                      .half = half,
                      .x = rows_of(n, dim, 1),
                      .cos = filled(n * half, TP_F32, 1),
                      .sin = filled(n * half, TP_F32, 1)};
    snprintf(name, sizeof name, "rope %lld x %lld", (long long)heads, (long long)head_dim);
    memory_line(name, 4.0 * (double)(n * dim) + 8.0 * (double)(n * half), TP_KERNEL_rope, &r);
    release_all();
}

/* What low-rank factors of rank 16 cost beside a linear whose wide side has `dim` columns. */
static void factors(int64_t n, int64_t dim)
{
    enum { RANK = 16 };
    char name[64];
    double wide = 2.0 * (double)(n * dim);
    tp_rows x = rows_of(n, dim, 1), u = rows_of(n, RANK, 1), du = rows_of(n, RANK, 1), b = rows_of(dim, RANK, 1);
    tp_matmul_args into = {.n = n,
                           .m = RANK,
                           .k = dim,
                           .a = x,
                           .b = tp_matrix_dense(TP_BF16, b.data, RANK, dim),
                           .nt = true,
                           .c = u,
                           .alpha = 1,
                           .precision = TP_BF16};
    tp_matmul_tn_args gradient = {
        .n = n, .m = RANK, .k = dim, .a = u, .b = x, .c = filled(dim * RANK, TP_F32, 1), .alpha = 1, .beta = 1};
    tp_lowrank_backward_args back = {.n = n,
                                     .dy = x,
                                     .b = b,
                                     .u = u,
                                     .du = du,
                                     .rows = {dim},
                                     .rank = {RANK},
                                     .db = {filled(dim * RANK, TP_F32, 1)},
                                     .scaling = {1}};
    snprintf(name, sizeof name, "x A^T %lld x %lld", (long long)n, (long long)dim);
    memory_line(name, wide, TP_KERNEL_matmul, &into);
    snprintf(name, sizeof name, "dA %lld x %lld", (long long)n, (long long)dim);
    memory_line(name, wide, TP_KERNEL_matmul_tn, &gradient);
    snprintf(name, sizeof name, "dy B and dB %lld x %lld", (long long)n, (long long)dim);
    memory_line(name, wide, TP_KERNEL_lowrank_backward, &back);
    release_all();
}

/* What comes back to the factors of a stacked weight, from one reading of dy. */
static void joint_factors(int64_t n, int64_t first, int64_t second, int64_t third)
{
    enum { RANK = 16 };
    char name[64];
    int64_t rows[TP_PACKED_PARTS] = {first, second, third}, out = first + second + third, used = 0;
    tp_lowrank_backward_args args = {.n = n, .dy = rows_of(n, out, 1)};
    for (int i = 0; i < TP_PACKED_PARTS && rows[i] > 0; i++, used += RANK) {
        args.rows[i] = rows[i], args.rank[i] = RANK, args.scaling[i] = 1;
        args.db[i] = filled(rows[i] * RANK, TP_F32, 1);
    }
    args.u = rows_of(n, used, 1), args.du = rows_of(n, used, 1), args.b = rows_of(out, used, 1);
    snprintf(name, sizeof name, "of %lld x %lld+%lld+%lld", (long long)n, (long long)first, (long long)second,
             (long long)third);
    memory_line(name, 2.0 * (double)(n * out), TP_KERNEL_lowrank_backward, &args);
    release_all();
}

/* SwiGLU's gradient with what its neighbours' factors get. */
static void swiglu_factors(int64_t n, int64_t dim)
{
    enum { RANK = 16 };
    char name[64];
    tp_swiglu_factors_args args = {.swiglu = {.n = n, .dim = dim}, .before = {.n = n}};
    tp_swiglu_backward_args *g = &args.swiglu;
    tp_rows joint = rows_of(n, 2 * dim, 1), joint_grad = rows_of(n, 2 * dim + 2 * RANK, 1);
    g->gate = joint, g->dgate = joint_grad, g->up = joint, g->dup = joint_grad, g->dy = rows_of(n, dim, 1);
    g->up.data = (uint16_t *)joint.data + dim, g->dup.data = (uint16_t *)joint_grad.data + dim;
    args.before.dy = joint_grad, args.before.du = joint_grad, args.before.u = rows_of(n, 2 * RANK, 1);
    args.before.du.data = (uint16_t *)joint_grad.data + 2 * dim;
    args.before.b = rows_of(2 * dim, 2 * RANK, 1);
    for (int i = 0; i < 2; i++) {
        args.before.rows[i] = dim, args.before.rank[i] = RANK, args.before.scaling[i] = 1;
        args.before.db[i] = filled(dim * RANK, TP_F32, 1);
    }
    args.behind = (tp_matmul_tn_args){
        .n = n, .m = RANK, .k = dim, .a = rows_of(n, RANK, 1), .c = filled(dim * RANK, TP_F32, 1), .alpha = 1, .beta = 1};
    snprintf(name, sizeof name, "swiglu_factors %lld x %lld", (long long)n, (long long)dim);
    memory_line(name, 10.0 * (double)(n * dim), TP_KERNEL_swiglu_factors, &args);
    release_all();
}

static void all_factors(void)
{
    factors(32768, 576);
    factors(32768, 1536);
    factors(16384, 2048);
    factors(16384, 8192);
    factors(4096, 4096);
    factors(4096, 14336);
    joint_factors(32768, 576, 192, 192);
    joint_factors(16384, 2048, 512, 512);
    joint_factors(4096, 4096, 1024, 1024);
    joint_factors(32768, 1536, 1536, 0);
    joint_factors(16384, 8192, 8192, 0);
    joint_factors(4096, 14336, 14336, 0);
    swiglu_factors(32768, 1536);
    swiglu_factors(16384, 8192);
    swiglu_factors(4096, 14336);
}

static void cross_entropy(int64_t vocab, bool narrow)
{
    enum { MOST = 8192 };
    static int32_t labels[MOST];
    char name[64];
    int64_t n = ((int64_t)1 << 28) / vocab;
    for (int64_t i = 0; i < n; i++) labels[i] = (int32_t)(i * 7919 % vocab);
    int32_t *on_device = memory((size_t)n * sizeof *labels);
    check(ctx.device->backend->copy_in(&ctx, on_device, labels, (size_t)n * sizeof *labels));
    tp_cross_entropy_args args = {.n = n,
                                  .vocab = vocab,
                                  .logits = filled(n * vocab, TP_F32, 1),
                                  .ld = vocab,
                                  .labels = on_device,
                                  .loss = filled(n, TP_F32, 1),
                                  .grad_scale = 1e-3f,
                                  .want_grad = true,
                                  .narrow = narrow};
    snprintf(name, sizeof name, "cross_entropy %lld %s", (long long)vocab, narrow ? "bf16" : "f32");
    memory_line(name, (narrow ? 6.0 : 8.0) * (double)(n * vocab), TP_KERNEL_cross_entropy, &args);
    release_all();
}

static void adamw(void)
{
    int64_t n = 84000000;
    tp_step_state state = {.learning_rate = 1e-4f, .bias1 = 0.1f, .bias2 = 0.1f, .loss_scale = 1, .clip = 1, .finite = 1};
    tp_step_state *on_device = memory(sizeof state);
    check(ctx.device->backend->copy_in(&ctx, on_device, &state, sizeof state));
    tp_adamw_args args = {.n = n,
                          .w = filled(n, TP_F32, 1),
                          .m = filled(n, TP_F32, 1),
                          .v = memory((size_t)n * sizeof(float)),
                          .g = filled(n, TP_F32, 1),
                          .state = on_device,
                          .beta1 = 0.9f,
                          .beta2 = 0.999f,
                          .epsilon = 1e-8f};
    memory_line("adamw", 28.0 * (double)n, TP_KERNEL_adamw, &args);
    release_all();
}

int main(int argc, char **argv)
{
    const char *only = argc > 1 ? argv[1] : "";
    tp_ctx_init(&ctx);
    check(tp_device_open(&ctx, "cuda", 0, &ctx.device));
    if (*only == '\0' || strcmp(only, "gemm") == 0) {
        gemm(8192, 8192, 8192);
        gemm(4096, 14336, 4096);
        gemm(32768, 1536, 576);
    }
    for (int i = 2; i < argc; i++) {
        if (strcmp(argv[i], "uneven") == 0) how.uneven = true;
        if (strcmp(argv[i], "fp16") == 0) how.fp16 = true;
        if (strcmp(argv[i], "any-order") == 0) ctx.device->any_order = true;
    }
    if (argc >= 8) {
        attention(atoll(argv[2]), atoll(argv[3]), atoll(argv[4]), atoll(argv[5]), atoll(argv[6]), atoll(argv[7]));
    } else if (*only == '\0' || strcmp(only, "attention") == 0) {
        attention(2, 2048, 32, 8, 128, 0);
        attention(1, 8192, 32, 8, 128, 0);
        attention(2, 2048, 32, 8, 64, 0);
        attention(1, 8192, 32, 8, 64, 0);
        attention(64, 512, 9, 3, 64, 0);
        attention(8, 512, 32, 8, 128, 0);
        attention(8, 512, 32, 8, 64, 0);
        attention(8, 2048, 32, 8, 64, 0);
    }
    if (*only == '\0' || strcmp(only, "memory") == 0) {
        measure_copy();
        norms(4096);
        norms(2048);
        norms(576);
        elementwise();
        rope(32, 128);
        rope(9, 64);
        all_factors();
        adamw();
    }
    if (*only == '\0' || strcmp(only, "memory") == 0 || strcmp(only, "loss") == 0) {
        if (strcmp(only, "loss") == 0) measure_copy();
        cross_entropy(49152, false);
        cross_entropy(49152, true);
        cross_entropy(128256, true);
    }
    if (strcmp(only, "factors") == 0) {
        measure_copy();
        if (argc == 6)
            joint_factors(atoll(argv[2]), atoll(argv[3]), atoll(argv[4]), atoll(argv[5]));
        else
            all_factors();
    }
    tp_device_close(ctx.device);
    return 0;
}
