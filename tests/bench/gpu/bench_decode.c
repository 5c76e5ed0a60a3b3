/* Decoding on a GPU: how long a token takes, and where in a step the time goes.
 *
 *   make CUDA=1 build/tests/bench/gpu/bench_decode
 *   build/tests/bench/gpu/bench_decode parts [N]                   shapes of 135m, 1b, 8b; N sequences at once (1)
 *   build/tests/bench/gpu/bench_decode MODEL TOKENS [N [TEMPERATURE [RANK]]]  a model folder, bf16; RANK > 0: with a LoRA
 *                                                                  on all linears
 *
 * "parts": each kind of call alone, as many times in a recording as a model has layers, and all together as a step has them;
 * microseconds of one, and the bytes of its weights per second. Weights are random and those of a model of 8B do not fit the
 * cache, so each layer has its own. With a model: microseconds per token of the second half of TOKENS, that is without prefill
 * and start. Medians of five. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/mem.h"
#include "inference/generate.h"
#include "peft/lora.h"

#define ROUNDS 5

static tp_ctx ctx;
static double copy_rate; /* bytes read and written per second */

static void check(tp_status status)
{
    if (status == TP_OK) return;
    fprintf(stderr, "bench_decode: %s\n", ctx.message);
    exit(1);
}

static void *memory(size_t bytes)
{
    void *p = ctx.device->backend->alloc(&ctx, ctx.device, bytes);
    if (p == NULL) check(ctx.status);
    return p;
}

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

static double median(double x[ROUNDS])
{
    qsort(x, ROUNDS, sizeof x[0], by_value);
    return x[ROUNDS / 2];
}

static void measure_copy(void)
{
    enum { VALUES = 256 << 20 };
    double rounds[ROUNDS];
    tp_scale_args copy = {.n = VALUES / 4096, .dim = 4096, .alpha = 1};
    copy.x = (tp_rows){memory((size_t)VALUES * 2), TP_BF16, 4096};
    copy.y = (tp_rows){memory((size_t)VALUES * 2), TP_BF16, 4096};
    for (int r = -1; r < ROUNDS; r++) {
        check(ctx.device->backend->sync(&ctx));
        double began = now();
        for (int i = 0; i < 10; i++) check(tp_run_scale(&ctx, &copy));
        check(ctx.device->backend->sync(&ctx));
        if (r >= 0) rounds[r] = (now() - began) / 10;
    }
    copy_rate = 4.0 * VALUES / median(rounds);
    printf("copying: %.0f GB/s read and written\n", copy_rate / 1e9);
    ctx.device->backend->free(ctx.device, copy.x.data, (size_t)VALUES * 2);
    ctx.device->backend->free(ctx.device, copy.y.data, (size_t)VALUES * 2);
}

/* ---- the parts of a step ---- */

struct shape {
    const char *name;
    int64_t layers, hidden, heads, kv_heads, head_dim, feed, vocab;
};

enum { QKV = 1, ATTEND = 2, O = 4, GATE_UP = 8, DOWN = 16, LAYER = 31, HEAD = 32, SAMPLE = 64 };

#define CONTEXT 1024

struct step {
    const struct shape *shape;
    int64_t n;
    char *weights; /* one stretch: each call takes the next part */
    size_t bytes, next;
    tp_rows x, normed, q, k, v, mixed, active, up, logits;
    float *norm, *angles, *parts;
    int32_t *state, *counters;
    uint64_t *scratch;
    void *cache;
};

static tp_rows rows(int64_t n, int64_t columns, tp_dtype dtype)
{
    return (tp_rows){memory((size_t)(n * columns) * tp_dtype_bytes(dtype)), dtype, columns};
}

static tp_matrix weight(struct step *s, int64_t out, int64_t in)
{
    size_t bytes = (size_t)(out * in) * 2;
    if (s->next + bytes > s->bytes) s->next = 0;
    tp_matrix w = tp_matrix_dense(TP_BF16, s->weights + s->next, out, in);
    s->next += bytes;
    return w;
}

static void linears(struct step *s, tp_rows x, int64_t k, bool norm, int n, const int64_t m[], const tp_rows y[], bool swiglu,
                    const tp_rows *residual)
{
    tp_linears_args args = {.n = s->n, .k = k, .x = x, .n_parts = n, .swiglu = swiglu, .precision = TP_BF16, .eps = 1e-5f};
    if (norm) args.norm_weight = s->norm, args.normed = s->normed;
    for (int i = 0; i < n; i++) args.parts[i] = (tp_linears_part){.w = weight(s, m[i], k), .y = y[i]};
    if (residual != NULL) args.residual = residual->data, args.residual_ld = residual->ld;
    check(tp_run_linears(&ctx, &args));
}

static void run_parts(struct step *s, int what)
{
    const struct shape *c = s->shape;
    int64_t d = c->hidden, width = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim;
    for (int64_t layer = 0; layer < c->layers && (what & LAYER) != 0; layer++) {
        if (what & QKV) linears(s, s->x, d, true, 3, (int64_t[]){width, kv, kv}, (tp_rows[]){s->q, s->k, s->v}, false, NULL);
        if (what & ATTEND) {
            tp_attend_args attend = {.n = s->n, .heads = c->heads, .kv_heads = c->kv_heads, .head_dim = c->head_dim};
            attend.q = s->q, attend.k = s->k, attend.v = s->v, attend.out = s->mixed;
            attend.cos = s->angles, attend.sin = s->angles, attend.half = c->head_dim / 2;
            attend.cache_k = attend.cache_v = (tp_rows){s->cache, TP_BF16, kv};
            attend.cache_v.data = (char *)s->cache + (size_t)(s->n * CONTEXT * kv) * 2;
            attend.capacity = CONTEXT, attend.used = s->state, attend.scale = 0.1f;
            attend.parts = s->parts, attend.counters = s->counters;
            check(tp_run_attend(&ctx, &attend));
        }
        if (what & O) linears(s, s->mixed, width, false, 1, &d, &s->x, false, &s->x);
        if (what & GATE_UP)
            linears(s, s->x, d, true, 2, (int64_t[]){c->feed, c->feed}, (tp_rows[]){s->active, s->up}, true, NULL);
        if (what & DOWN) linears(s, s->active, c->feed, false, 1, &d, &s->x, false, &s->x);
    }
    if (what & HEAD) linears(s, s->x, d, true, 1, &c->vocab, &s->logits, false, NULL);
    if (what & SAMPLE) {
        tp_sample_args sample = {.n = s->n, .vocab = c->vocab, .logits = s->logits.data, .ld = c->vocab, .top_p = 1};
        sample.repetition_penalty = 1, sample.scratch = s->scratch, sample.history_length = 1;
        int32_t *at = s->state + s->n; /* the cache stays as full as it is */
        sample.ids = at, sample.positions = at + s->n, sample.counts = at + 2 * s->n, sample.history = at + 3 * s->n;
        sample.bad = at + 4 * s->n, sample.position_limit = 1;
        check(tp_run_sample(&ctx, &sample));
    }
}

/* Microseconds of all calls of a kind in a step. */
static double time_parts(struct step *s, int what)
{
    enum { LAUNCHES = 20 };
    const tp_backend *backend = ctx.device->backend;
    double rounds[ROUNDS];
    tp_graph *graph;
    check(backend->capture_begin(&ctx));
    run_parts(s, what);
    check(backend->capture_end(&ctx, &graph));
    for (int r = -1; r < ROUNDS; r++) {
        check(backend->sync(&ctx));
        double began = now();
        for (int i = 0; i < LAUNCHES; i++) check(backend->graph_launch(&ctx, graph));
        check(backend->sync(&ctx));
        if (r >= 0) rounds[r] = (now() - began) / LAUNCHES;
    }
    backend->graph_free(ctx.device, graph);
    return median(rounds) * 1e6;
}

static void bench_shape(const struct shape *c, int64_t n)
{
    int64_t d = c->hidden, width = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim;
    struct step s = {.shape = c, .n = n};
    double qkv = 2.0 * (double)(d * (width + 2 * kv)), o = 2.0 * (double)(d * width), gate_up = 4.0 * (double)(d * c->feed),
           down = gate_up / 2, head = 2.0 * (double)(d * c->vocab), layers = (double)c->layers;
    s.bytes = (size_t)(layers * (qkv + o + gate_up + down) + head);
    s.weights = memory(s.bytes);
    s.x = rows(n, d, TP_BF16), s.normed = rows(n, d, TP_BF16), s.q = rows(n, width, TP_BF16), s.k = rows(n, kv, TP_BF16);
    s.v = rows(n, kv, TP_BF16), s.mixed = rows(n, width, TP_BF16), s.active = rows(n, c->feed, TP_BF16);
    s.up = rows(n, c->feed, TP_BF16), s.logits = rows(n, c->vocab, TP_F32);
    s.norm = memory((size_t)d * 4), s.angles = memory((size_t)(n * c->head_dim) * 4);
    s.parts = memory((size_t)(n * c->heads * TP_ATTEND_PARTS * (c->head_dim + 2)) * 4);
    s.state = memory((size_t)n * 4 * 8), s.counters = memory((size_t)(n * c->heads) * 4);
    s.scratch = memory((size_t)(n * (c->vocab + TP_SAMPLE_EXTRA)) * 8);
    s.cache = memory((size_t)(n * CONTEXT * kv) * 4);
    int32_t used[64];
    for (int64_t i = 0; i < n; i++) used[i] = 300;
    check(ctx.device->backend->copy_in(&ctx, s.state, used, (size_t)n * 4));
    const struct {
        const char *name;
        int what;
        double calls, bytes;
    } kinds[] = {{"q, k, v", QKV, layers, qkv},
                 {"attend", ATTEND, layers, 4.0 * 300 * (double)(n * kv)},
                 {"o", O, layers, o},
                 {"gate, up", GATE_UP, layers, gate_up},
                 {"down", DOWN, layers, down},
                 {"head", HEAD, 1, head},
                 {"sample", SAMPLE, 1, 0},
                 {"attend, o", ATTEND | O, layers, o},
                 {"layer", LAYER, layers, qkv + o + gate_up + down},
                 {"step", LAYER | HEAD | SAMPLE, 1, (double)s.bytes}};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        double us = time_parts(&s, kinds[i].what) / kinds[i].calls;
        printf("%-5s n=%d %-10s %9.2f us  %6.0f GB/s  %.3f of copying\n", c->name, (int)n, kinds[i].name, us,
               kinds[i].bytes / us * 1e-3, kinds[i].bytes / us * 1e6 / copy_rate);
        fflush(stdout);
    }
    void *all[] = {s.weights,    s.x.data,      s.normed.data, s.q.data,      s.k.data, s.v.data,
                   s.mixed.data, s.active.data, s.up.data,     s.logits.data, s.norm,   s.angles,
                   s.parts,      s.state,       s.counters,    s.scratch,     s.cache};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) ctx.device->backend->free(ctx.device, all[i], 0);
}

/* ---- a model ---- */

static bool discard(void *state, size_t index, tp_generated *reply)
{
    (void)index;
    *(size_t *)state += reply->n;
    tp_generated_free(reply);
    return true;
}

static double generate(tp_generator *generator, int64_t tokens, size_t n, double temperature)
{
    int32_t ids[64][16];
    tp_prompt_ids prompts[64];
    size_t made = 0;
    for (size_t i = 0; i < n; i++) {
        for (int k = 0; k < 16; k++) ids[i][k] = (int32_t)(100 + 7 * k + 11 * (int)i);
        prompts[i] = (tp_prompt_ids){ids[i], 16};
    }
    tp_generate_options options = {.sampling = TP_SAMPLING_GREEDY, .max_tokens = tokens};
    options.sampling.temperature = temperature;
    if (temperature > 0) options.sampling.top_k = 50, options.sampling.top_p = 0.9;
    double began = now();
    check(tp_generate_all(&ctx, generator, NULL, prompts, n, &options, discard, &made));
    if (made != n * (size_t)tokens) fprintf(stderr, "bench_decode: %zu tokens instead of %zu\n", made, n * (size_t)tokens);
    return now() - began;
}

static void bench_model(const char *path, int64_t tokens, size_t n, double temperature, int64_t rank)
{
    tp_model *model;
    tp_lora *lora = NULL;
    tp_lora_spec spec = {.rank = rank, .alpha = 2 * (double)rank, .targets.all_linear = true};
    tp_generator *generator;
    tp_model_options options = {.precision = TP_BF16};
    double rounds[ROUNDS], bytes = 0;
    check(tp_model_open(&ctx, path, &options, &model));
    for (size_t i = 0; i < model->n_linears; i++)
        bytes += 2.0 * (double)model->linears[i]->weight.rows * (double)model->linears[i]->weight.cols;
    if (rank > 0) check(tp_lora_attach(&ctx, model, &spec, &lora)); /* zeros take no less time */
    if (model->config.tied) bytes += 2.0 * (double)model->head.weight.rows * (double)model->head.weight.cols;
    check(tp_generator_open_many(&ctx, model, tokens + 16, n, &generator));
    (void)generate(generator, 40, n, temperature);
    for (int r = 0; r < ROUNDS; r++) {
        double half = generate(generator, tokens / 2, n, temperature), whole = generate(generator, tokens, n, temperature);
        rounds[r] = (whole - half) / (double)(tokens - tokens / 2);
    }
    double seconds = median(rounds);
    printf("%s: %zu at once, temperature %.1f, rank %d: %.0f us a step, %.1f tokens/s, %.3f of what memory allows (%.0f..%.0f "
           "us)\n",
           path, n, temperature, (int)rank, seconds * 1e6, (double)n / seconds, bytes / seconds / copy_rate, rounds[0] * 1e6,
           rounds[ROUNDS - 1] * 1e6);
    fflush(stdout);
    tp_generator_close(generator);
    if (lora != NULL) tp_lora_free(lora);
    tp_model_free(model);
}

int main(int argc, char **argv)
{
    static const struct shape shapes[] = {{"135m", 30, 576, 9, 3, 64, 1536, 49152},
                                          {"1b", 16, 2048, 32, 8, 64, 8192, 128256},
                                          {"8b", 32, 4096, 32, 8, 128, 14336, 128256}};
    int64_t n = argc > 2 ? strtoll(argv[2], NULL, 10) : 1;
    if (argc < 2 || n < 1) {
        fprintf(stderr, "usage: bench_decode parts [N] | MODEL TOKENS [N [TEMPERATURE [RANK]]]\n");
        return 2;
    }
    tp_ctx_init(&ctx);
    check(tp_device_open(&ctx, "cuda", 0, &ctx.device));
    measure_copy();
    if (strcmp(argv[1], "parts") == 0) {
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes && n <= 8; i++) bench_shape(&shapes[i], n);
    } else {
        size_t many = argc > 3 ? (size_t)strtoull(argv[3], NULL, 10) : 1;
        bench_model(argv[1], n, many > 64 ? 64 : many, argc > 4 ? strtod(argv[4], NULL) : 0,
                    argc > 5 ? strtoll(argv[5], NULL, 10) : 0);
    }
    tp_device_close(ctx.device);
    return 0;
}
