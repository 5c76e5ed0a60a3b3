/* Attention on the GPU against the CPU's, case by case for what its kernels tell apart: rows that allow 16-byte accesses (on
 * Hopper those run on its own instructions), lengths at and around the tiles of 16, 32, 64 and 128, head sizes at and between
 * those that kernels are made for, groups of heads, masks at tile borders, one token against long caches whose keys are cut
 * into parts, and segments that share keys. */
#include "tests/backend/on_both.h"

#define COUNT(array) ((int64_t)(sizeof(array) / sizeof *(array)))

typedef struct shape {
    int64_t heads, kv_heads, head_dim, n_prefix, window;
    tp_segment segments[4];
    int64_t n_segments, n_q, n_k;
    bool causal, alibi, odd; /* odd: nothing is aligned */
    float soft_cap;
    tp_dtype dtype;
} shape;

static void rows_of(both *b, tp_rows *rows, const shape *s, int64_t n, int64_t cols, double size)
{
    size_t bytes = tp_dtype_bytes(s->dtype);
    *rows = (tp_rows){NULL, s->dtype, cols + (s->odd ? 3 : 8)};
    bind_type(b, &rows->dtype);
    size_t count = (size_t)(n * rows->ld);
    fill(new_buffer(b, &rows->data, count * bytes, s->dtype), count, s->dtype, size);
}

static void describe(char text[300], const char *name, const shape *s)
{
    snprintf(
        text, 300,
        "%s heads=%lld/%lld dim=%lld prefix=%lld window=%lld segments=%lld first=%lldx%lld causal=%d alibi=%d cap=%g odd=%d %s",
        name, (long long)s->heads, (long long)s->kv_heads, (long long)s->head_dim, (long long)s->n_prefix, (long long)s->window,
        (long long)s->n_segments, (long long)s->segments[0].q_len, (long long)s->segments[0].k_len, s->causal, s->alibi,
        (double)s->soft_cap, s->odd, tp_dtype_name(s->dtype));
}

/* Results are sums of values of up to 1 with weights that add up to 1; in bf16 the weights are rounded to 2^-9 of themselves,
 * in f16 to 2^-12. Of gradients, `size` is the magnitude; where dozens of heads share a key, sums are larger. */
static tolerance limit_of(const shape *s, double size)
{
    return within(2e-6, size * by_dtype(s->dtype, 0x1p-7, 1e-5));
}

static void inputs(both *b, tp_attention_args *a, const shape *s)
{
    int64_t wide = s->heads * s->head_dim, narrow = s->kv_heads * s->head_dim;
    *a = (tp_attention_args){.n_q = s->n_q,
                             .heads = s->heads,
                             .kv_heads = s->kv_heads,
                             .head_dim = s->head_dim,
                             .segments = s->segments,
                             .n_segments = s->n_segments,
                             .causal = s->causal,
                             .window = s->window,
                             .soft_cap = s->soft_cap,
                             .n_prefix = s->n_prefix,
                             .scale = 1.0f / sqrtf((float)s->head_dim)};
    rows_of(b, &a->q, s, s->n_q, wide, 2);
    rows_of(b, &a->k, s, s->n_k, narrow, 2);
    rows_of(b, &a->v, s, s->n_k, narrow, 1);
    if (s->n_prefix > 0) {
        rows_of(b, &a->prefix_k, s, s->n_prefix, narrow, 2);
        rows_of(b, &a->prefix_v, s, s->n_prefix, narrow, 1);
    }
    if (s->alibi) floats_in(b, &a->alibi_slopes, s->heads, 0.1);
}

static void try_forward(const shape *s)
{
    char text[300];
    both b = {0};
    tp_attention_args a;
    inputs(&b, &a, s);
    rows_of(&b, &a.out, s, s->n_q, s->heads * s->head_dim, 1);
    make_output(&b, limit_of(s, 1));
    floats_out(&b, &a.lse, s->n_q * s->heads, limit_of(s, 1));
    describe(text, "attention", s);
    run_both(&b, TP_KERNEL_attention, &a, text);
}

/* The backward pass gets out and lse that the CPU's forward pass made. */
static void try_both(const shape *s)
{
    char text[300];
    both b = {0};
    int64_t wide = s->heads * s->head_dim, narrow = s->kv_heads * s->head_dim;
    tp_attention_backward_args a = {.n_k = s->n_k};
    try_forward(s);
    inputs(&b, &a.forward, s);
    rows_of(&b, &a.forward.out, s, s->n_q, wide, 1);
    floats_in(&b, &a.forward.lse, s->n_q * s->heads, 1);
    run_before(&b, TP_KERNEL_attention, &a.forward, text);
    rows_of(&b, &a.dout, s, s->n_q, wide, 1);
    rows_of(&b, &a.dq, s, s->n_q, wide, 1);
    make_output(&b, limit_of(s, 2));
    rows_of(&b, &a.dk, s, s->n_k, narrow, 1);
    make_output(&b, limit_of(s, 4));
    rows_of(&b, &a.dv, s, s->n_k, narrow, 1);
    make_output(&b, limit_of(s, 4));
    floats_scratch(&b, &a.delta, s->n_q * s->heads);
    describe(text, "attention_backward", s);
    run_both(&b, TP_KERNEL_attention_backward, &a, text);
}

/* One segment over everything. */
static shape whole(int64_t n_q, int64_t n_k, int64_t heads, int64_t kv_heads, int64_t head_dim)
{
    shape s = {.n_q = n_q,
               .n_k = n_k,
               .heads = heads,
               .kv_heads = kv_heads,
               .head_dim = head_dim,
               .n_segments = 1,
               .causal = true,
               .dtype = TP_BF16};
    s.segments[0] = (tp_segment){0, n_q, 0, n_k};
    return s;
}

static void try_dtypes(shape s)
{
    static const tp_dtype dtypes[] = {TP_BF16, TP_F16, TP_F32};
    for (int64_t i = 0; i < COUNT(dtypes); i++) {
        s.dtype = dtypes[i];
        try_both(&s);
    }
}

static void test_lengths(void **state)
{
    (void)state;
    NEEDS_GPU();
    static const int64_t lengths[] = {1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 191, 193, 256, 257, 400};
    for (int64_t i = 0; i < COUNT(lengths); i++) {
        try_dtypes(whole(lengths[i], lengths[i], 2, 2, 64));
        try_dtypes(whole(lengths[i], lengths[i], 3, 1, 128));
        shape s = whole(lengths[i], lengths[(i * 7 + 3) % COUNT(lengths)], 4, 2, 64);
        s.causal = i % 2 == 0;
        try_dtypes(s);
        s.head_dim = 128;
        try_dtypes(s);
    }
}

static void test_head_dims(void **state)
{
    (void)state;
    NEEDS_GPU();
    static const int64_t dims[] = {1, 8, 16, 20, 32, 40, 64, 72, 80, 88, 96, 112, 128, 136, 160, 192, 200, 256};
    for (int64_t i = 0; i < COUNT(dims); i++) {
        shape s = whole(150, 150, 2, 1, dims[i]);
        try_dtypes(s);
        s.odd = true;
        try_dtypes(s);
    }
}

static void test_groups(void **state)
{
    (void)state;
    NEEDS_GPU();
    static const int64_t groups[][2] = {{8, 8}, {9, 3}, {8, 2}, {7, 1}, {16, 1}, {71, 1}};
    for (int64_t i = 0; i < COUNT(groups); i++) {
        try_dtypes(whole(77, 77, groups[i][0], groups[i][1], 64));
        try_dtypes(whole(40, 90, groups[i][0], groups[i][1], 128));
    }
}

static void test_masks(void **state)
{
    (void)state;
    NEEDS_GPU();
    static const int64_t windows[] = {1, 2, 63, 64, 65, 100, 127, 128, 129, 1000};
    for (int64_t i = 0; i < COUNT(windows); i++) {
        shape s = whole(300, 300, 2, 1, 64);
        s.window = windows[i];
        try_dtypes(s);
        s.causal = false;
        try_dtypes(s);
        s = whole(130, 290, 2, 2, 128);
        s.window = windows[i];
        try_dtypes(s);
    }
    for (int i = 0; i < 8; i++) {
        shape s = whole(140, 170, 4, 2, i & 1 ? 128 : 64);
        s.soft_cap = i & 2 ? 3.0f : 0.0f;
        s.alibi = (i & 2) == 0;
        s.n_prefix = i & 4 ? 70 : 0;
        try_dtypes(s);
        s.window = 40;
        s.alibi = false;
        try_dtypes(s);
    }
}

static void test_segments(void **state)
{
    (void)state;
    NEEDS_GPU();
    for (int i = 0; i < 4; i++) {
        shape s = whole(430, 470, 4, 2, i & 1 ? 128 : 64);
        s.n_prefix = i & 2 ? 129 : 0;
        s.n_segments = 4;
        s.segments[0] = (tp_segment){3, 70, 0, 70};
        s.segments[1] = (tp_segment){73, 1, 75, 1};
        s.segments[2] = (tp_segment){80, 0, 80, 5};
        s.segments[3] = (tp_segment){90, 300, 100, 320};
        try_dtypes(s);
        s.segments[1] = (tp_segment){73, 5, 10, 30}; /* shares keys with the first */
        s.segments[2] = (tp_segment){80, 4, 80, 0};  /* queries without keys */
        try_dtypes(s);
        s.n_segments = 0;
        try_dtypes(s);
    }
}

/* One or a few tokens against caches of different lengths. */
static void test_decode(void **state)
{
    (void)state;
    NEEDS_GPU();
    static const int64_t lengths[] = {1, 63, 64, 65, 300, 1000, 4999};
    static const int64_t dims[] = {64, 80, 128, 256, 20};
    for (int64_t i = 0; i < COUNT(lengths); i++) {
        for (int64_t d = 0; d < COUNT(dims); d++) {
            shape s = whole(3, lengths[i] + 150, 8, 2, dims[d]);
            s.n_segments = 3;
            s.segments[0] = (tp_segment){0, 1, 0, lengths[i]};
            s.segments[1] = (tp_segment){1, 1, lengths[i], 100};
            s.segments[2] = (tp_segment){2, 1, lengths[i] + 100, 7};
            s.window = i % 2 == 0 ? 0 : 90;
            s.dtype = d % 2 == 0 ? TP_F16 : TP_BF16;
            try_forward(&s);
            s.dtype = TP_F32;
            try_forward(&s);
            s = whole(2 + i % 5, lengths[i] + 5, 6, 1, dims[d]); /* a few tokens, keys as many as there were before */
            s.n_prefix = i % 3 == 0 ? 9 : 0;
            s.dtype = d % 2 == 0 ? TP_BF16 : TP_F16;
            try_forward(&s);
            s.dtype = TP_F32;
            try_forward(&s);
        }
    }
}

/* Sequences of one length, which cuDNN may take, and next to them what it may not: another length, a cap, rows at odd
 * addresses. In `extra` rows lie before, between and behind the sequences. */
static shape equal(int64_t batch, int64_t length, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t extra)
{
    shape s = whole(batch * (length + extra) + extra, batch * (length + extra) + 2 * extra, heads, kv_heads, head_dim);
    s.n_segments = batch;
    for (int64_t i = 0; i < batch; i++)
        s.segments[i] = (tp_segment){extra + i * (length + extra), length, 2 * extra + i * (length + extra), length};
    return s;
}

static bool has_cudnn(void)
{
    tp_buf json;
    tp_buf_init(&json, 0);
    opened.cuda->backend->describe(opened.cuda, &json);
    bool none = strstr(tp_buf_cstr(&json), "\"cudnn\": \"none\"") != NULL;
    tp_buf_free(&json);
    if (none) print_message("cuDNN is not there: these are our own kernels alone\n");
    return !none;
}

static void test_equal_lengths(void **state)
{
    (void)state;
    NEEDS_GPU();
    (void)has_cudnn();
    static const int64_t dims[] = {24, 80, 96, 256};
    for (int64_t i = 0; i < COUNT(dims); i++) {
        shape s = equal(2, 256, 4, 2, dims[i], 0);
        try_both(&s);
        s.dtype = TP_F16;
        try_both(&s);
        s.dtype = TP_BF16;
        s.window = 70;
        try_both(&s);
        s = equal(1, 384, 2, 2, dims[i], 0);
        s.causal = false;
        try_both(&s);
    }
    for (int64_t dim = 64; dim <= 128; dim += 64) {
        for (int i = 0; i < 2; i++) {
            shape s = equal(2, 512, 4, 2, dim, i * 8);
            try_both(&s);
            s.dtype = TP_F16;
            try_both(&s);
            s.dtype = TP_BF16;
            s.causal = false;
            try_both(&s);
            s.causal = true;
            s.window = 1;
            try_both(&s);
            s.window = 300;
            try_both(&s);
            s = equal(1, 1024, 3, 1, dim, i * 16);
            try_both(&s);
            s = equal(4, 128, 9, 3, dim, i * 16);
            try_both(&s);
            s = equal(3, 768, 2, 2, dim, i * 3);
            try_both(&s);
            s.window = 100;
            try_both(&s);
            s.window = 768;
            s.segments[2].q_len = s.segments[2].k_len = 700;
            try_both(&s);
            s = equal(1, 512, 2, 1, dim, 0);
            s.odd = true;
            try_both(&s);
            s.odd = false;
            s.soft_cap = 5;
            try_both(&s);
        }
    }
}

/* Sequences of several lengths one behind the other, which cuDNN may take forward, and next to them what it may not: a gap,
 * keys that are not beside their queries. */
static shape packed(int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t extra)
{
    static const int64_t lengths[] = {700, 129, 1, 470};
    shape s = whole(1300 + 2 * extra, 1300 + 3 * extra, heads, kv_heads, head_dim);
    s.n_segments = COUNT(lengths);
    for (int64_t i = 0, at = extra; i < s.n_segments; at += lengths[i++])
        s.segments[i] = (tp_segment){at, lengths[i], extra + at, lengths[i]};
    return s;
}

static void test_packed(void **state)
{
    (void)state;
    NEEDS_GPU();
    (void)has_cudnn();
    static const int64_t dims[] = {64, 80, 128, 256};
    for (int64_t i = 0; i < COUNT(dims); i++) {
        shape s = packed(4, 2, dims[i], i % 2 * 8);
        try_both(&s);
        s.dtype = TP_F16;
        try_both(&s);
        s.causal = false;
        try_both(&s);
        s.dtype = TP_BF16;
        s.window = 100;
        try_forward(&s);
        s = packed(3, 3, dims[i], 0);
        s.causal = false;
        try_forward(&s);
        s.segments[1].q_len = s.segments[1].k_len = 128;
        try_forward(&s);
        s = packed(3, 1, dims[i], 16);
        s.segments[3].k_start++;
        try_forward(&s);
    }
}

/* A gradient that is larger than the workspace, first by our own kernels, then with memory that was reserved for it. */
static void test_reserve(void **state)
{
    (void)state;
    NEEDS_GPU();
    const tp_backend *backend = opened.cuda->backend;
    const tp_attention_size small = {1, 100, 8, 128}, size = {1, 3072, 8, 96};
    shape s = equal(size.sequences, size.length, size.heads, size.heads, size.head_dim, 0);
    uint64_t bytes;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    ctx.device = opened.cuda;
    try_both(&s);
    assert_ok(&ctx, backend->reserve(&ctx, &small, UINT64_MAX, &bytes));
    assert_int_equal(bytes, 0);
    assert_ok(&ctx, backend->reserve(&ctx, &size, 1 << 20, &bytes));
    assert_int_equal(bytes, 0);
    assert_ok(&ctx, backend->reserve(&ctx, &size, UINT64_MAX, &bytes));
    if (has_cudnn()) assert_true(bytes > (uint64_t)(size.heads * size.length * size.length) * 2);
    try_both(&s);
}

/* What a gradient on `device` writes into dq, from the same inputs each time. */
static unsigned char *query_gradient(tp_device *device, const shape *s, size_t *bytes)
{
    unsigned char *results[MAX_BUFFERS], *dq = NULL;
    both b = {0};
    int64_t wide = s->heads * s->head_dim, narrow = s->kv_heads * s->head_dim;
    tp_attention_backward_args a = {.n_k = s->n_k};
    random_state = 1;
    inputs(&b, &a.forward, s);
    rows_of(&b, &a.forward.out, s, s->n_q, wide, 1);
    floats_in(&b, &a.forward.lse, s->n_q * s->heads, 1);
    rows_of(&b, &a.dout, s, s->n_q, wide, 1);
    rows_of(&b, &a.dq, s, s->n_q, wide, 1);
    make_output(&b, EXACT);
    const int at = b.n_buffers - 1;
    rows_of(&b, &a.dk, s, s->n_k, narrow, 1);
    make_output(&b, EXACT);
    rows_of(&b, &a.dv, s, s->n_k, narrow, 1);
    make_output(&b, EXACT);
    floats_scratch(&b, &a.delta, s->n_q * s->heads);
    run_on(&b, device, TP_KERNEL_attention_backward, &a, "attention_backward", results);
    *bytes = b.buffers[at].bytes;
    for (int i = 0; i < b.n_buffers; i++) {
        if (i == at)
            dq = results[i];
        else
            free(results[i]);
        free(b.buffers[i].host);
    }
    return dq;
}

/* Where sums may be added in any order, other kernels run: close to the CPU's, but not the bits of those that keep one. */
static void test_any_order(void **state)
{
    (void)state;
    NEEDS_GPU();
    const bool there = has_cudnn();
    size_t bytes;
    opened.cuda->any_order = true;
    for (int64_t dim = 64; dim <= 128; dim += 64) {
        shape s = equal(1, 4096, 2, 1, dim, 8);
        try_both(&s);
        s.dtype = TP_F16;
        try_both(&s);
        s = equal(2, 4096, 1, 1, dim, 0);
        s.causal = false;
        s.window = dim == 64 ? 0 : 200;
        try_both(&s);
        s = whole(4100, 4100, 1, 1, dim);
        try_both(&s);
    }
    shape s = equal(1, 4096, 2, 1, 64, 0);
    unsigned char *any = query_gradient(opened.cuda, &s, &bytes);
    opened.cuda->any_order = false;
    unsigned char *fixed = query_gradient(opened.cuda, &s, &bytes);
    if (there) assert_memory_not_equal(any, fixed, bytes);
    free(any);
    free(fixed);
}

/* That it is cuDNN which runs where it should: no two kernels round everything alike. Without the log-sum-exp, as in a forward
 * pass that is made again later, the bits are the same. */
static void test_cudnn_runs(void **state)
{
    (void)state;
    NEEDS_GPU();
    if (!has_cudnn()) skip();
    unsigned char *results[3][MAX_BUFFERS];
    tp_device *device = opened.cuda;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    both b = {0};
    tp_attention_args a;
    shape s = equal(2, 1024, 4, 2, 128, 0);
    inputs(&b, &a, &s);
    rows_of(&b, &a.out, &s, s.n_q, s.heads * s.head_dim, 1);
    make_output(&b, EXACT);
    const int out = b.n_buffers - 1;
    run_on(&b, device, TP_KERNEL_attention, &a, "without lse", results[0]);
    floats_out(&b, &a.lse, s.n_q * s.heads, EXACT);
    run_on(&b, device, TP_KERNEL_attention, &a, "with lse", results[1]);
    setenv("TAPEFT_CUDNN", "none", 1);
    assert_ok(&ctx, tp_cuda_backend.open(&ctx, 0, 0, &device));
    run_on(&b, device, TP_KERNEL_attention, &a, "ours", results[2]);
    unsetenv("TAPEFT_CUDNN");
    tp_device_close(device);
    assert_memory_equal(results[0][out], results[1][out], b.buffers[out].bytes);
    assert_memory_not_equal(results[1][out], results[2][out], b.buffers[out].bytes);
    for (int i = 0; i < b.n_buffers; i++) {
        if (i <= out) free(results[0][i]);
        free(results[1][i]), free(results[2][i]), free(b.buffers[i].host);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lengths),       cmocka_unit_test(test_head_dims),  cmocka_unit_test(test_groups),
        cmocka_unit_test(test_masks),         cmocka_unit_test(test_segments),   cmocka_unit_test(test_decode),
        cmocka_unit_test(test_equal_lengths), cmocka_unit_test(test_packed),     cmocka_unit_test(test_reserve),
        cmocka_unit_test(test_any_order),     cmocka_unit_test(test_cudnn_runs),
    };
    return cmocka_run_group_tests(tests, open_both, close_both);
}
