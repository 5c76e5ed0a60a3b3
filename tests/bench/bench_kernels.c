/* How far the CPU's kernels other than products are from what the machine can do: attention as a share of f32 FMAs, the
 * others as a share of memcpy's bytes per second. Each ceiling is measured right before and after its line; medians.
 *
 *     bench_kernels [threads]
 *
 * Runs for about half a minute. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/bench/ceilings.h"

#define REPEATS 5

static void *need(size_t bytes)
{
    void *p = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    if (p == NULL) {
        fprintf(stderr, "bench_kernels: out of memory: %zu bytes\n", bytes);
        exit(1);
    }
    memset(p, 0, bytes);
    return p;
}

static void check(tp_ctx *ctx, tp_status status)
{
    if (status == TP_OK) return;
    fprintf(stderr, "bench_kernels: %s\n", ctx->message);
    exit(1);
}

/* ------------------------------------------------------------------------------------------------------ ceilings */

typedef struct copying {
    unsigned char *from, *to;
    size_t part;
} copying;

#define COPY_BYTES ((size_t)64 << 20)
#define COPY_PARTS 16

static void copy_item(void *arg, int64_t i, int thread)
{
    const copying *c = arg;
    (void)thread;
    memcpy(c->to + (size_t)i * c->part, c->from + (size_t)i * c->part, c->part);
}

static double copied_per_second(tp_ctx *ctx, copying *c)
{
    double start = bench_now();
    tp_cpu_for(tp_cpu_of(ctx), COPY_PARTS, copy_item, c);
    return 2.0 * (double)COPY_BYTES / (bench_now() - start);
}

/* --------------------------------------------------------------------------------------------------------- lines */

typedef struct bench {
    tp_ctx *ctx;
    copying copying;
} bench;

static double limit_of(bench *b, bool flops)
{
    return flops ? bench_peak_flops(b->ctx).f32 : copied_per_second(b->ctx, &b->copying);
}

/* One line: `work` (FLOPs or bytes) per second of a kernel over the ceiling in the same unit. */
static void line(bench *b, const char *name, bool flops, double work, tp_status (*run)(tp_ctx *, const void *),
                 const void *args)
{
    double rate[REPEATS], ratio[REPEATS];
    check(b->ctx, run(b->ctx, args));
    for (int i = 0; i < REPEATS; i++) {
        double before = limit_of(b, flops), start = bench_now();
        int calls = 0;
        do {
            check(b->ctx, run(b->ctx, args));
            calls++;
        } while (bench_now() - start < 0.02);
        rate[i] = work * calls / (bench_now() - start);
        double after = limit_of(b, flops);
        ratio[i] = rate[i] / (0.5 * (before + after));
    }
    bench_spread share = bench_spread_of(ratio, REPEATS);
    double middle = bench_spread_of(rate, REPEATS).median;
    printf("%-46s %7.1f %s  limit %6.1f  ratio %.2f (%.2f .. %.2f)\n", name, 1e-9 * middle, flops ? "GFLOP/s" : "GB/s   ",
           1e-9 * middle / share.median, share.median, share.low, share.high);
    fflush(stdout);
}

static tp_status run_both(tp_ctx *ctx, const void *args)
{
    const tp_attention_backward_args *b = args;
    TP_TRY(tp_run_attention(ctx, &b->forward));
    return tp_run_attention_backward(ctx, b);
}
#define RUN(name)                                                                                                              \
    static tp_status run_##name(tp_ctx *ctx, const void *args)                                                                 \
    {                                                                                                                          \
        return tp_run_##name(ctx, args);                                                                                       \
    }
RUN(attention)
RUN(attention_backward)
RUN(cross_entropy)
RUN(rmsnorm)
RUN(rmsnorm_backward)
RUN(layernorm)
RUN(rope)
RUN(swiglu)
RUN(swiglu_backward)
RUN(gelu)
RUN(dropout)
RUN(add)
RUN(grad_norm)
RUN(adamw)

static uint32_t noise = 1;

static tp_rows rows_of(int64_t n, int64_t columns, tp_dtype dtype)
{
    size_t bytes = dtype == TP_BF16 ? 2 : 4, count = (size_t)(n * columns);
    unsigned char *data = need(count * bytes);
    for (size_t i = 0; i < count; i++) {
        noise = noise * 1664525u + 1013904223u;
        float x = (float)(int32_t)noise * 0x1p-31f;
        uint16_t h = tp_f32_to_bf16(x);
        if (dtype == TP_BF16)
            memcpy(data + 2 * i, &h, 2);
        else
            memcpy(data + 4 * i, &x, 4);
    }
    return (tp_rows){data, dtype, columns};
}

static float *floats_of(int64_t n)
{
    return rows_of(1, n, TP_F32).data;
}

/* Causal FLOPs only: 4 per visible pair and channel forward, 2.5 times that backward. */
static void bench_attention(bench *b, const char *name, int64_t t, int64_t segments, int64_t heads, int64_t kv_heads,
                            int64_t head_dim, tp_dtype dtype)
{
    tp_segment *s = need((size_t)segments * sizeof *s);
    int64_t each = t / segments;
    for (int64_t i = 0; i < segments; i++) s[i] = (tp_segment){i * each, each, i * each, each};
    tp_attention_backward_args args = {.n_k = t};
    tp_attention_args *a = &args.forward;
    *a = (tp_attention_args){.n_q = t, .heads = heads, .kv_heads = kv_heads, .head_dim = head_dim};
    a->q = rows_of(t, heads * head_dim, dtype);
    a->k = rows_of(t, kv_heads * head_dim, dtype);
    a->v = rows_of(t, kv_heads * head_dim, dtype);
    a->out = rows_of(t, heads * head_dim, dtype);
    a->lse = floats_of(t * heads);
    a->segments = s;
    a->n_segments = segments;
    a->causal = true;
    a->scale = 1.0f / sqrtf((float)head_dim);
    args.dout = rows_of(t, heads * head_dim, dtype);
    args.dq = rows_of(t, heads * head_dim, dtype);
    args.dk = rows_of(t, kv_heads * head_dim, dtype);
    args.dv = rows_of(t, kv_heads * head_dim, dtype);
    args.delta = floats_of(t * heads);
    double flops = 4.0 * (double)segments * 0.5 * (double)each * (double)(each + 1) * (double)(heads * head_dim);
    char title[96];
    snprintf(title, sizeof title, "attention %s", name);
    line(b, title, true, flops, run_attention, a);
    snprintf(title, sizeof title, "attention %s, backward", name);
    line(b, title, true, 2.5 * flops, run_attention_backward, &args);
    snprintf(title, sizeof title, "attention %s, both", name);
    line(b, title, true, 3.5 * flops, run_both, &args);
}

static void bench_decode(bench *b, const char *name, int64_t keys, int64_t heads, int64_t kv_heads, int64_t head_dim,
                         tp_dtype dtype)
{
    tp_segment s = {0, 1, 0, keys};
    tp_attention_args a = {.n_q = 1, .heads = heads, .kv_heads = kv_heads, .head_dim = head_dim};
    a.q = rows_of(1, heads * head_dim, dtype);
    a.k = rows_of(keys, kv_heads * head_dim, dtype);
    a.v = rows_of(keys, kv_heads * head_dim, dtype);
    a.out = rows_of(1, heads * head_dim, dtype);
    a.segments = &s;
    a.n_segments = 1;
    a.causal = true;
    a.scale = 1.0f / sqrtf((float)head_dim);
    line(b, name, false, 2.0 * (double)(keys * kv_heads * head_dim) * (dtype == TP_BF16 ? 2 : 4), run_attention, &a);
}

static void bench_rows(bench *b, tp_dtype dtype)
{
    const int64_t n = 8192, dim = 576, wide = 1536;
    double size = dtype == TP_BF16 ? 2 : 4, elements = (double)(n * dim), many = (double)(n * wide);
    const char *tag = dtype == TP_BF16 ? "bf16" : "f32";
    char name[64];
    tp_rows x = rows_of(n, wide, dtype), y = rows_of(n, wide, dtype), z = rows_of(n, wide, dtype);
    tp_rows u = rows_of(n, wide, dtype), v = rows_of(n, wide, dtype);
    float *weight = floats_of(dim), *rstd = floats_of(n), *mean = floats_of(n), *cosine = floats_of(n * 32),
          *sine = floats_of(n * 32);
    x.ld = y.ld = z.ld = dim;

    tp_rmsnorm_args norm = {n, dim, x, y, weight, rstd, 1e-5f, 1};
    snprintf(name, sizeof name, "rmsnorm 576 %s", tag);
    line(b, name, false, 2 * size * elements, run_rmsnorm, &norm);
    tp_rmsnorm_backward_args back = {n, dim, x, y, z, weight, rstd, NULL, true, 1};
    snprintf(name, sizeof name, "rmsnorm_backward 576 %s, accumulating", tag);
    line(b, name, false, 4 * size * elements, run_rmsnorm_backward, &back);
    tp_layernorm_args layer = {n, dim, x, y, weight, NULL, mean, rstd, 1e-5f};
    snprintf(name, sizeof name, "layernorm 576 %s", tag);
    line(b, name, false, 2 * size * elements, run_layernorm, &layer);
    tp_rope_args rope = {n, 9, 64, 32, x, cosine, sine, false};
    snprintf(name, sizeof name, "rope 9 x 64 %s", tag);
    line(b, name, false, 2 * size * elements + 8.0 * 32 * (double)n, run_rope, &rope);
    tp_add_args sum = {n, dim, x, y, z};
    snprintf(name, sizeof name, "add %s", tag);
    line(b, name, false, 3 * size * elements, run_add, &sum);
    tp_dropout_args drop = {n, dim, x, y, 0.1f, {1, 2, 3}, 0, false, NULL};
    snprintf(name, sizeof name, "dropout %s", tag);
    line(b, name, false, 2 * size * elements, run_dropout, &drop);

    x.ld = y.ld = z.ld = wide;
    tp_swiglu_args swiglu = {n, wide, x, y, z};
    snprintf(name, sizeof name, "swiglu 1536 %s", tag);
    line(b, name, false, 3 * size * many, run_swiglu, &swiglu);
    tp_swiglu_backward_args swiglu_back = {n, wide, x, y, z, u, v};
    snprintf(name, sizeof name, "swiglu_backward 1536 %s", tag);
    line(b, name, false, 5 * size * many, run_swiglu_backward, &swiglu_back);
    tp_gelu_args gelu = {n, wide, x, y, false};
    snprintf(name, sizeof name, "gelu 1536 %s", tag);
    line(b, name, false, 2 * size * many, run_gelu, &gelu);
    void *used[] = {x.data, y.data, z.data, u.data, v.data, weight, rstd, mean, cosine, sine};
    for (size_t i = 0; i < sizeof used / sizeof used[0]; i++) free(used[i]);
}

static void bench_flat(bench *b)
{
    const int64_t n = 256, vocab = 49152, parameters = 8 << 20;
    float *logits = floats_of(n * vocab), *loss = floats_of(n);
    int32_t *labels = need((size_t)n * sizeof *labels);
    tp_cross_entropy_args entropy = {n, vocab, logits, vocab, labels, loss, 1.0f, true, false, TP_BF16, NULL};
    line(b, "cross_entropy 49152, with gradient", false, 8.0 * (double)(n * vocab), run_cross_entropy, &entropy);
    entropy.want_grad = false;
    line(b, "cross_entropy 49152", false, 4.0 * (double)(n * vocab), run_cross_entropy, &entropy);
    float *w = floats_of(parameters), *m = floats_of(parameters), *v = need((size_t)parameters * 4), *g = floats_of(parameters);
    tp_step_state state = {.learning_rate = 1e-4f, .bias1 = 0.1f, .bias2 = 0.001f, .max_norm = 1.0f, .loss_scale = 1.0f};
    tp_grad_norm_args norm = {parameters, g, &state};
    line(b, "grad_norm", false, 4.0 * (double)parameters, run_grad_norm, &norm);
    tp_adamw_args adamw = {parameters, w, m, v, g, &state, 0.9f, 0.999f, 1e-8f, 0.01f};
    line(b, "adamw", false, 28.0 * (double)parameters, run_adamw, &adamw);
}

int main(int argc, char **argv)
{
    static tp_ctx ctx;
    bench_open(&ctx, argc > 1 ? atoi(argv[1]) : 0);
    bench_print_machine(&ctx);
    bench b = {&ctx, {.part = COPY_BYTES / COPY_PARTS}};
    b.copying.from = need(COPY_BYTES);
    b.copying.to = need(COPY_BYTES);
    bench_attention(&b, "T 512, 9/3 x 64, f32", 512, 1, 9, 3, 64, TP_F32);
    bench_attention(&b, "T 512, 9/3 x 64, bf16", 512, 1, 9, 3, 64, TP_BF16);
    bench_attention(&b, "T 2048, 8/8 x 128, f32", 2048, 1, 8, 8, 128, TP_F32);
    bench_attention(&b, "8 of T 128, 9/3 x 64, f32", 1024, 8, 9, 3, 64, TP_F32);
    bench_decode(&b, "attention, one token, 8192 keys 9/3 x 64, f32", 8192, 9, 3, 64, TP_F32);
    bench_decode(&b, "attention, one token, 8192 keys 9/3 x 64, bf16", 8192, 9, 3, 64, TP_BF16);
    bench_rows(&b, TP_F32);
    bench_rows(&b, TP_BF16);
    bench_flat(&b);
    tp_cpu_backend.close(ctx.device);
    return 0;
}
