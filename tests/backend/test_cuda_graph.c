/* Recorded attention that is turned to other segments gives the bits that calls with these segments give; what does not fit
 * changes nothing; and what recordings take of the GPU's memory is about what the plan counts. */
#include "tests/backend/on_both.h"

#define ROWS 400
#define MOST 200 /* segments */

struct arrays {
    tp_ctx ctx;
    char *memory;
    size_t bytes, in_bytes;
    tp_attention_args forward;
    tp_attention_backward_args backward;
};

static size_t place(char *memory, size_t at, tp_rows *rows, tp_dtype dtype, int64_t columns)
{
    *rows = (tp_rows){memory + at, dtype, columns};
    return at + ((size_t)(ROWS * columns) * tp_dtype_bytes(dtype) + 255) / 256 * 256;
}

/* q, k, v and dout with values; behind them what is computed. */
static void open_arrays(struct arrays *a, tp_dtype dtype, int64_t heads, int64_t kv_heads, int64_t head_dim)
{
    const tp_backend *backend = opened.cuda->backend;
    int64_t wide = heads * head_dim, narrow = kv_heads * head_dim;
    *a = (struct arrays){.bytes = (size_t)ROWS * (size_t)(8 * wide + 2 * heads) * sizeof(float) + 8192};
    tp_ctx_init(&a->ctx);
    a->ctx.device = opened.cuda;
    a->memory = backend->alloc(&a->ctx, opened.cuda, a->bytes);
    assert_non_null(a->memory);
    tp_attention_args *f = &a->forward;
    *f = (tp_attention_args){.n_q = ROWS, .heads = heads, .kv_heads = kv_heads, .head_dim = head_dim, .causal = true};
    f->scale = 0.125f;
    size_t at = place(a->memory, 0, &f->q, dtype, wide);
    at = place(a->memory, at, &f->k, dtype, narrow);
    at = place(a->memory, at, &f->v, dtype, narrow);
    at = place(a->memory, at, &a->backward.dout, dtype, wide);
    a->in_bytes = at;
    at = place(a->memory, at, &f->out, dtype, wide);
    at = place(a->memory, at, &a->backward.dq, dtype, wide);
    at = place(a->memory, at, &a->backward.dk, dtype, narrow);
    at = place(a->memory, at, &a->backward.dv, dtype, narrow);
    f->lse = (float *)(void *)(a->memory + at);
    a->backward.delta = f->lse + ROWS * heads;
    a->backward.n_k = ROWS;
    char *host = calloc(a->in_bytes, 1);
    assert_non_null(host);
    fill((unsigned char *)host, a->in_bytes / tp_dtype_bytes(dtype), dtype, 1);
    assert_ok(&a->ctx, backend->copy_in(&a->ctx, a->memory, host, a->in_bytes));
    free(host);
}

static void close_arrays(struct arrays *a)
{
    opened.cuda->backend->free(opened.cuda, a->memory, a->bytes);
}

static void call(struct arrays *a, const tp_segment *segments, int64_t n)
{
    a->forward.segments = segments;
    a->forward.n_segments = n;
    a->backward.forward = a->forward;
    assert_ok(&a->ctx, tp_run_attention(&a->ctx, &a->forward));
    assert_ok(&a->ctx, tp_run_attention_backward(&a->ctx, &a->backward));
}

/* What was computed; the arrays then hold other bytes. */
static char *results(struct arrays *a)
{
    const tp_backend *backend = opened.cuda->backend;
    size_t n = a->bytes - a->in_bytes;
    char *host = calloc(n, 1);
    assert_non_null(host);
    assert_ok(&a->ctx, backend->copy_out(&a->ctx, host, a->memory + a->in_bytes, n));
    assert_ok(&a->ctx, backend->zero(&a->ctx, a->memory + a->in_bytes, n));
    return host;
}

static int64_t cut(tp_segment *segments, int64_t rows, int64_t length, int64_t more)
{
    int64_t n = 0;
    for (int64_t start = 0; start < rows; n++, length += more) {
        int64_t own = rows - start < length ? rows - start : length;
        segments[n] = (tp_segment){start, own, start, own};
        start += own;
    }
    return n;
}

static void check_turns(tp_dtype dtype, int64_t heads, int64_t kv_heads, int64_t head_dim)
{
    static const int64_t lengths[][3] = {{390, 100, 7}, {399, 60, 0}, {300, 300, 0}, {390, 100, 7}, {350, 33, 40}};
    const tp_backend *backend = opened.cuda->backend;
    struct arrays a;
    tp_segment segments[MOST];
    tp_graph *graph = NULL;
    int fitted = 0;
    open_arrays(&a, dtype, heads, kv_heads, head_dim);
    int64_t n = cut(segments, 380, 90, 5);
    call(&a, segments, n); /* kernels are loaded */
    free(results(&a));
    assert_ok(&a.ctx, backend->capture_begin(&a.ctx));
    call(&a, segments, n);
    assert_ok(&a.ctx, backend->capture_end(&a.ctx, &graph));
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        bool fits;
        n = cut(segments, lengths[i][0], lengths[i][1], lengths[i][2]);
        assert_ok(&a.ctx, backend->graph_segments(&a.ctx, graph, segments, n, &fits));
        fitted += fits;
        if (!fits) continue;
        assert_ok(&a.ctx, backend->graph_launch(&a.ctx, graph));
        char *turned = results(&a);
        call(&a, segments, n);
        char *called = results(&a);
        assert_memory_equal(turned, called, a.bytes - a.in_bytes);
        n = cut(segments, 390, 2, 0); /* more than one launch takes */
        assert_ok(&a.ctx, backend->graph_segments(&a.ctx, graph, segments, n, &fits));
        assert_false(fits);
        assert_ok(&a.ctx, backend->graph_launch(&a.ctx, graph));
        char *as_it_was = results(&a);
        assert_memory_equal(as_it_was, called, a.bytes - a.in_bytes);
        free(turned);
        free(called);
        free(as_it_was);
    }
    print_message("%d of 5 fitted\n", fitted);
    assert_true(fitted >= 3);
    backend->graph_free(opened.cuda, graph);
    close_arrays(&a);
}

static void test_turns(void **state)
{
    (void)state;
    NEEDS_GPU();
    check_turns(TP_F32, 2, 2, 16);
    check_turns(TP_F32, 9, 3, 64);
    check_turns(TP_BF16, 9, 3, 64);
    check_turns(TP_BF16, 8, 2, 128);
    check_turns(TP_F16, 4, 4, 80);
}

static uint64_t free_bytes(tp_ctx *ctx)
{
    tp_buf json;
    tp_buf_init(&json, 0);
    assert_ok(ctx, ctx->device->backend->sync(ctx));
    ctx->device->backend->describe(ctx->device, &json);
    const char *at = strstr(tp_buf_cstr(&json), "\"free_bytes\": ");
    assert_non_null(at);
    uint64_t bytes = strtoull(at + strlen("\"free_bytes\": "), NULL, 10);
    tp_buf_free(&json);
    return bytes;
}

/* Ten recordings of 2000 calls: memory comes in pieces of 2 MiB, so it is the mean that counts. Other processes may take or
 * give memory meanwhile, which is why only the order of magnitude is asserted. */
static void test_memory(void **state)
{
    enum { GRAPHS = 10, CALLS = 2000 };
    (void)state;
    NEEDS_GPU();
    const tp_backend *backend = opened.cuda->backend;
    tp_graph *graphs[GRAPHS];
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    ctx.device = opened.cuda;
    char *memory = backend->alloc(&ctx, opened.cuda, 1 << 20);
    assert_non_null(memory);
    tp_rows x = {memory, TP_BF16, 128};
    tp_scale_args args = {.n = 64, .dim = 128, .x = x, .y = x, .alpha = 1};
    assert_ok(&ctx, tp_run_scale(&ctx, &args));
    uint64_t before = free_bytes(&ctx), after = 0;
    for (int i = 0; i < GRAPHS; i++) {
        assert_ok(&ctx, backend->capture_begin(&ctx));
        for (int k = 0; k < CALLS; k++) assert_ok(&ctx, tp_run_scale(&ctx, &args));
        assert_ok(&ctx, backend->capture_end(&ctx, &graphs[i]));
        assert_ok(&ctx, backend->graph_launch(&ctx, graphs[i]));
        after = free_bytes(&ctx);
        if (i == 0) print_message("the first: %.0f bytes a call\n", (double)(int64_t)(before - after) / CALLS);
    }
    double each = (double)(int64_t)(before - after) / (GRAPHS * CALLS);
    print_message("a call: %.0f bytes, planned %llu\n", each, (unsigned long long)backend->recorded_call_bytes);
    assert_true(each < 2 * (double)backend->recorded_call_bytes);
    for (int i = 0; i < GRAPHS; i++) backend->graph_free(opened.cuda, graphs[i]);
    backend->free(opened.cuda, memory, 1 << 20);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_turns), cmocka_unit_test(test_memory)};
    return cmocka_run_group_tests(tests, open_both, close_both);
}
