/* The CUDA device itself, its matrix products and its embedding tables, against the CPU. */
#include "tests/backend/on_both.h"

/* ---- the device ---- */

static void test_copies(void **state)
{
    (void)state;
    NEEDS_GPU();
    /* around the staging buffers: parts of 8 MiB */
    static const size_t sizes[] = {0, 1, 4095, 8 << 20, (8 << 20) + 1, (40 << 20) + 3};
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    ctx.device = opened.cuda;
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        size_t n = sizes[k];
        unsigned char *host = malloc(n + 1), *back = malloc(n + 1);
        unsigned char *memory = opened.cuda->backend->alloc(&ctx, opened.cuda, n);
        assert_true(host != NULL && back != NULL && memory != NULL && (uintptr_t)memory % 256 == 0);
        memset(back, 1, n + 1);
        assert_ok(&ctx, opened.cuda->backend->copy_out(&ctx, back, memory, n));
        for (size_t i = 0; i < n; i++) assert_int_equal(back[i], 0);
        for (size_t i = 0; i < n; i++) host[i] = (unsigned char)(i * 31 + i / 7919);
        assert_ok(&ctx, opened.cuda->backend->copy_in(&ctx, memory, host, n));
        memset(host, 0, n); /* the caller may do that at once */
        assert_ok(&ctx, opened.cuda->backend->copy_out(&ctx, back, memory, n));
        for (size_t i = 0; i < n; i++) {
            unsigned char want = (unsigned char)(i * 31 + i / 7919);
            if (back[i] != want) fail_msg("%zu bytes: byte %zu is %d, expected %d", n, i, back[i], want);
        }
        assert_ok(&ctx, opened.cuda->backend->zero(&ctx, memory, n));
        assert_ok(&ctx, opened.cuda->backend->copy_out(&ctx, back, memory, n));
        for (size_t i = 0; i < n; i++) assert_int_equal(back[i], 0);
        opened.cuda->backend->free(opened.cuda, memory, n);
        free(host), free(back);
    }
    assert_ok(&ctx, opened.cuda->backend->sync(&ctx));
}

static void test_out_of_memory(void **state)
{
    (void)state;
    NEEDS_GPU();
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    ctx.device = opened.cuda;
    assert_null(opened.cuda->backend->alloc(&ctx, opened.cuda, (size_t)1 << 50));
    assert_int_equal(ctx.status, TP_NOMEM);
    assert_non_null(strstr(ctx.message, "free"));
    tp_ctx_clear(&ctx);
    void *memory = opened.cuda->backend->alloc(&ctx, opened.cuda, 1000); /* the device goes on */
    assert_non_null(memory);
    opened.cuda->backend->free(opened.cuda, memory, 1000);
}

static void test_describe(void **state)
{
    (void)state;
    NEEDS_GPU();
    tp_buf text = {0};
    opened.cuda->backend->describe(opened.cuda, &text);
    tp_buf_text(&text, "");
    print_message("%s\n", text.data);
    assert_non_null(strstr(text.data, "\"compute_capability\""));
    assert_true(opened.cuda->memory_bytes > 0 && opened.cuda->workspace_bytes > 0);
    tp_buf_free(&text);
}

/* One past the last: a clear message, on machines with and without a GPU. */
static void test_no_such_device(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    tp_device *device;
    assert_status(&ctx, TP_DEVICE, tp_device_open(&ctx, "cuda:1023", 0, &device));
    assert_null(device);
}

/* ---- products ---- */

static const int64_t sizes[] = {1, 2, 3, 7, 8, 13, 16, 17, 31, 32, 33, 64, 65, 100, 257, 576, 1000};
static int64_t random_size(void)
{
    return sizes[below((int64_t)(sizeof sizes / sizeof *sizes))];
}

typedef struct shape {
    int64_t n, m, k;
    bool nt;
    tp_format_id format;
    bool transposed, round_bf16;
    int32_t rope_pairs;
    tp_dtype a_dtype, c_dtype, precision;
    float alpha, beta;
    bool bias, residual, residual_is_c, pad;
} shape;

static void describe(const shape *s, char out[300])
{
    snprintf(out, 300,
             "%s n=%lld m=%lld k=%lld %s pad=%d transposed=%d rope=%d round=%d a=%s c=%s precision=%s alpha=%g beta=%g bias=%d "
             "residual=%d,%d",
             s->nt ? "nt" : "nn", (long long)s->n, (long long)s->m, (long long)s->k, tp_formats[s->format].name, s->pad,
             s->transposed, s->rope_pairs, s->round_bf16, tp_dtype_name(s->a_dtype), tp_dtype_name(s->c_dtype),
             tp_dtype_name(s->precision), (double)s->alpha, (double)s->beta, s->bias, s->residual, s->residual_is_c);
}

/* Finite values of moderate size in any format; their largest magnitude is returned. */
static double random_matrix(both *b, tp_matrix *w, tp_format_id format, int64_t rows, int64_t cols, bool transposed, bool pad)
{
    static const double largest[TP_FORMAT_COUNT] = {1, 1, 1, 8, 0.5, 2};
    const tp_format *f = &tp_formats[format];
    int64_t lines = transposed ? cols : rows, in = transposed ? rows : cols, stride = f->dense && pad ? in + 3 : 0;
    size_t bytes = (size_t)(lines * tp_format_row_bytes(format, stride > 0 ? stride : in)), block = (size_t)f->block_bytes;
    *w = (tp_matrix){.format = format, .rows = rows, .cols = cols, .stride = stride, .transposed = transposed};
    unsigned char *data = new_buffer(b, &w->data, bytes, TP_BF16);
    for (size_t i = 0; i + 4 <= bytes; i += 4) {
        uint32_t bits = random_bits();
        memcpy(data + i, &bits, 4);
    }
    for (size_t i = 0; i + block <= bytes; i += block) {
        float x = random_value();
        uint16_t d = format == TP_FORMAT_BF16 ? tp_f32_to_bf16(x) : tp_f32_to_f16(f->dense ? x : x / 16),
                 m = tp_f32_to_f16(random_value());
        if (format == TP_FORMAT_F32)
            memcpy(data + i, &x, 4);
        else
            memcpy(data + i, &d, 2);
        if (format == TP_FORMAT_Q4_1) memcpy(data + i + 2, &m, 2);
    }
    if (below(4) == 0) b->buffers[b->n_buffers - 1].shift = f->dense ? (size_t)f->block_bytes : 2;
    return largest[format];
}

/* Roundings: sums of k products in f32 in different orders lie about sqrt(k) units of 2^-24 of the sum of magnitudes apart.
 * Where the precision lets sides be rounded to bf16 that hold more, each product is off by up to 2^-8, at random, and so is an
 * added bias; in f16, whose products the CPU makes in f32, by up to 2^-11. */
static tolerance tolerance_of(const shape *s, double b_size)
{
    double k = (double)s->k, alpha = fabs((double)s->alpha) * b_size;
    double limit = 0x1p-24 * (4 * sqrt(k) + 8) * (alpha * k / 2 + fabs((double)s->beta) + 3);
    bool exact_b = s->precision == TP_F16 ? s->format == TP_FORMAT_F16 : s->format == TP_FORMAT_BF16 || s->round_bf16;
    double unit = by_dtype(s->precision, 0x1p-8, 0), c_unit = by_dtype(s->c_dtype, 0x1p-8, 0);
    if (!(s->a_dtype == s->precision && exact_b)) limit += unit * alpha * (2 + 2 * sqrt(k));
    if (s->bias) limit += c_unit;
    /* what is added to may have been rounded to bf16 before (backend/cuda/blas.cuh): half a unit of sums that reach 2 sqrt(k)
     */
    if (s->bias || s->residual || s->beta != 0) limit += c_unit * (2 * alpha * sqrt(k) + fabs((double)s->beta) + 1);
    return within(0, limit);
}

static void try_product(const shape *s)
{
    both b = {0};
    tp_rows residual;
    char text[300];
    describe(s, text);
    tp_matmul_args args = {
        .n = s->n, .m = s->m, .k = s->k, .nt = s->nt, .alpha = s->alpha, .beta = s->beta, .precision = s->precision};
    bind_type(&b, &args.precision);
    rows_in(&b, &args.a, s->n, s->k, s->a_dtype, 1);
    double b_size = random_matrix(&b, &args.b, s->format, s->nt ? s->m : s->k, s->nt ? s->k : s->m, s->transposed, s->pad);
    args.b.rope_pairs = s->rope_pairs, args.b.round_bf16 = s->round_bf16;
    rows_out(&b, &args.c, s->n, s->m, s->c_dtype, tolerance_of(s, b_size));
    if (s->beta == 0 && !s->residual_is_c) {
        for (int64_t i = 0; i < s->n; i++) { /* must not be read */
            for (int64_t j = 0; j < s->m; j++) {
                if (s->c_dtype != TP_F32)
                    ((uint16_t *)args.c.data)[i * args.c.ld + j] = 0x7fff;
                else
                    ((float *)args.c.data)[i * args.c.ld + j] = NAN;
            }
        }
    }
    if (s->bias) floats_in(&b, &args.bias, s->m, 1);
    if (s->residual && s->residual_is_c) {
        same_buffer(&b, &args.residual, &args.c.data);
        args.residual_ld = args.c.ld;
    } else if (s->residual) {
        rows_in(&b, &residual, s->n, s->m, s->c_dtype, 1);
        b.fields[b.n_fields - 1].field = &args.residual;
        args.residual_ld = residual.ld;
    }
    run_both(&b, TP_KERNEL_matmul, &args, text);
}

static shape random_shape(void)
{
    static const float factors[] = {0, 1, 1, 0.5f, -2};
    shape s = {.n = random_size(), .m = random_size(), .k = below(40) == 0 ? 0 : random_size(), .nt = below(2) == 0};
    s.format = (tp_format_id)below(TP_FORMAT_COUNT);
    while (s.n * s.m * s.k > 20000000) s.n = random_size(), s.m = random_size();
    s.transposed = tp_formats[s.format].dense && below(4) == 0;
    s.round_bf16 = below(4) == 0;
    s.pad = below(2) == 0;
    int64_t rows = s.nt ? s.m : s.k;
    if (!s.transposed && rows > 0 && rows % 8 == 0 && below(2) == 0) s.rope_pairs = (int32_t)rows / 4;
    s.a_dtype = random_dtype(), s.c_dtype = random_dtype(), s.precision = random_dtype();
    s.alpha = factors[below(5)], s.beta = factors[below(5)];
    s.bias = below(2) == 0;
    s.residual = below(2) == 0;
    s.residual_is_c = s.residual && below(2) == 0;
    return s;
}

static void test_products(void **state)
{
    (void)state;
    NEEDS_GPU();
    random_state = 7;
    for (int i = 0; i < 800; i++) {
        shape s = random_shape();
        try_product(&s);
    }
}

/* What models ask for: the shapes of a small Llama, both directions, and its thin adapters. */
static void test_model_shapes(void **state)
{
    (void)state;
    NEEDS_GPU();
    random_state = 8;
    for (int i = 0; i < 16; i++) {
        tp_dtype x = i & 1 ? (i & 2 ? TP_F16 : TP_BF16) : TP_F32;
        shape s = {.n = 512,
                   .m = 1536,
                   .k = 576,
                   .nt = (i & 2) != 0,
                   .format = i & 4         ? TP_FORMAT_Q8_0
                             : x == TP_F16 ? TP_FORMAT_F16
                                           : TP_FORMAT_BF16,
                   .a_dtype = x,
                   .c_dtype = x,
                   .precision = x,
                   .alpha = 1,
                   .beta = i & 8 ? 1 : 0};
        try_product(&s);
        s.format = TP_FORMAT_F32, s.m = 16, s.a_dtype = x, s.c_dtype = TP_F32, s.bias = true;
        try_product(&s);
        s.m = 576, s.k = 16, s.a_dtype = TP_F32, s.c_dtype = x;
        try_product(&s);
    }
}

/* By algorithms that the program carries, on GPUs that it has some for: the head of SmolLM2-135M and its gradient, whose logits
 * left gaps, of fewer rows than were measured. */
static void test_carried_products(void **state)
{
    (void)state;
    NEEDS_GPU();
    enum { ROWS = 250, DIM = 576, VOCAB = 49152 };
    for (int backward = 0; backward <= 1; backward++) {
        both b = {0};
        shape s = {.n = ROWS, .m = VOCAB, .k = DIM, .nt = true, .format = TP_FORMAT_BF16, .alpha = 1};
        s.a_dtype = s.precision = TP_BF16, s.c_dtype = TP_F32;
        if (backward) s.m = DIM, s.k = VOCAB, s.nt = false, s.c_dtype = TP_BF16;
        const int64_t a_ld = backward ? 2 * VOCAB : DIM;
        const size_t c_bytes = tp_dtype_bytes(s.c_dtype) * (size_t)(s.n * s.m);
        tp_matmul_args args = {.n = s.n, .m = s.m, .k = s.k, .nt = s.nt, .alpha = 1, .precision = TP_BF16};
        args.a = (tp_rows){NULL, TP_BF16, a_ld}, args.c = (tp_rows){NULL, s.c_dtype, s.m};
        fill(new_buffer(&b, &args.a.data, (size_t)(s.n * a_ld) * 2, TP_BF16), (size_t)(s.n * a_ld), TP_BF16, 1);
        double b_size = random_matrix(&b, &args.b, TP_FORMAT_BF16, VOCAB, DIM, false, false);
        b.buffers[b.n_buffers - 1].shift = 0;
        fill(new_buffer(&b, &args.c.data, c_bytes, s.c_dtype), (size_t)(s.n * s.m), s.c_dtype, 1);
        make_output(&b, tolerance_of(&s, b_size));
        run_both(&b, TP_KERNEL_matmul, &args, backward ? "carried, backward" : "carried");
    }
}

/* A low-rank part, made by the call or given to it. Its own values are sums of k products of magnitude up to 1, and c gets
 * `rank` products of them with values of up to 1; in bf16 every factor is rounded. */
static void try_lowrank(const shape *s, int64_t rank, bool given)
{
    both b = {0};
    tp_rows residual;
    char text[300], all[400];
    describe(s, text);
    snprintf(all, sizeof all, "%s rank=%lld given=%d", text, (long long)rank, given);
    tp_lowrank_args rider = {.rank = rank, .scaling = 0.5f};
    tp_matmul_args args = {.n = s->n,
                           .m = s->m,
                           .k = s->k,
                           .nt = s->nt,
                           .alpha = s->alpha,
                           .beta = s->beta,
                           .precision = s->precision,
                           .lowrank = &rider};
    /* of `low`: its size, and how far two orders of summation and roundings of the factors may lie apart */
    double large = sqrt((double)s->k) + 1, unit = by_dtype(s->precision, 0x1p-8, 0x1p-20);
    double off = 0x1p-24 * (4 * large + 8) * ((double)s->k / 4 + 1) + by_dtype(s->precision, 0x1p-8, 0) * (1 + large);
    bind_type(&b, &args.precision);
    rows_in(&b, &args.a, s->n, s->k, s->a_dtype, 1);
    (void)random_matrix(&b, &args.b, s->format, s->nt ? s->m : s->k, s->nt ? s->k : s->m, false, s->pad);
    (void)random_matrix(&b, &rider.up, TP_FORMAT_F32, s->nt ? s->m : rank, s->nt ? rank : s->m, false, false);
    if (given) {
        rows_in(&b, &rider.low, s->n, rank, TP_F32, 1);
    } else {
        (void)random_matrix(&b, &rider.down, TP_FORMAT_F32, s->nt ? rank : s->k, s->nt ? s->k : rank, false, false);
        rows_out(&b, &rider.low, s->n, rank, TP_F32, within(0, off));
    }
    tolerance t = tolerance_of(s, 1);
    t.absolute += unit * (sqrt((double)rank) + 2) * large * 2;
    t.absolute += by_dtype(s->c_dtype, 0x1p-8, 0) * (2 * large + 1); /* the sum is rounded once on its way */
    rows_out(&b, &args.c, s->n, s->m, s->c_dtype, t);
    if (s->bias) floats_in(&b, &args.bias, s->m, 1);
    if (s->residual) {
        rows_in(&b, &residual, s->n, s->m, s->c_dtype, 1);
        b.fields[b.n_fields - 1].field = &args.residual;
        args.residual_ld = residual.ld;
    }
    run_both(&b, TP_KERNEL_matmul, &args, all);
}

static void test_lowrank(void **state)
{
    (void)state;
    NEEDS_GPU();
    random_state = 12;
    static const int64_t ranks[] = {1, 4, 8, 16, 33, 64};
    for (int i = 0; i < 200; i++) {
        shape s = random_shape();
        tp_dtype x = i & 1 ? (i & 2 ? TP_F16 : TP_BF16) : TP_F32;
        if (s.k == 0) s.k = 1;
        s.format = tp_format_of(x);
        s.a_dtype = s.c_dtype = s.precision = x;
        s.transposed = s.round_bf16 = s.residual_is_c = false, s.rope_pairs = 0;
        s.alpha = 1, s.beta = s.residual || i % 3 == 0 ? 0 : 1;
        try_lowrank(&s, ranks[below(6)], below(3) == 0);
    }
}

/* Larger than the workspace: weights, left sides, and sums that are cut into slices. */
static void test_slices(void **state)
{
    (void)state;
    NEEDS_GPU();
    random_state = 9;
    static const shape shapes[] = {
        {.n = 3,
         .m = 4100,
         .k = 8200,
         .nt = true,
         .format = TP_FORMAT_Q4_0,
         .a_dtype = TP_BF16,
         .c_dtype = TP_BF16,
         .precision = TP_BF16,
         .alpha = 1},
        {.n = 3,
         .m = 8200,
         .k = 4100,
         .format = TP_FORMAT_Q4_1,
         .a_dtype = TP_F32,
         .c_dtype = TP_F32,
         .precision = TP_F32,
         .alpha = 1,
         .bias = true},
        {.n = 1100,
         .m = 5,
         .k = 65000,
         .nt = true,
         .format = TP_FORMAT_BF16,
         .a_dtype = TP_F32,
         .c_dtype = TP_F32,
         .precision = TP_BF16,
         .alpha = 1},
        {.n = 40001,
         .m = 1000,
         .k = 3,
         .format = TP_FORMAT_F32,
         .a_dtype = TP_F32,
         .c_dtype = TP_BF16,
         .precision = TP_F32,
         .alpha = 2,
         .beta = 1},
        {.n = 33000,
         .m = 1100,
         .k = 1000,
         .nt = true,
         .format = TP_FORMAT_F16,
         .a_dtype = TP_BF16,
         .c_dtype = TP_F32,
         .precision = TP_F32,
         .alpha = 1},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) try_product(&shapes[i]);
}

static void try_product_tn(int64_t n, int64_t m, int64_t k, tp_dtype a, tp_dtype c, float alpha, float beta)
{
    both b = {0};
    char text[120];
    snprintf(text, sizeof text, "tn n=%lld m=%lld k=%lld a=%s b=%s alpha=%g beta=%g", (long long)n, (long long)m, (long long)k,
             tp_dtype_name(a), tp_dtype_name(c), (double)alpha, (double)beta);
    tp_matmul_tn_args args = {.n = n, .m = m, .k = k, .alpha = alpha, .beta = beta};
    rows_in(&b, &args.a, n, m, a, 1);
    rows_in(&b, &args.b, n, k, c, 1);
    /* as above; a side that is split into two bf16 pieces is off by 2^-17 */
    double limit = 0x1p-24 * (4 * sqrt((double)n) + 8) * (fabs((double)alpha) * (double)n / 2 + 3);
    if (a != c) limit += 0x1p-17 * fabs((double)alpha) * (2 + 2 * sqrt((double)n));
    floats_out(&b, &args.c, m * k, within(0, limit));
    if (beta == 0) {
        for (int64_t i = 0; i < m * k; i++) args.c[i] = NAN;
    }
    run_both(&b, TP_KERNEL_matmul_tn, &args, text);
}

static void test_products_tn(void **state)
{
    (void)state;
    NEEDS_GPU();
    random_state = 10;
    static const float factors[] = {0, 1, 0.5f};
    for (int i = 0; i < 200; i++) {
        int64_t n = below(30) == 0 ? 0 : random_size(), m = random_size(), k = random_size();
        try_product_tn(n, m, k, random_dtype(), random_dtype(), i % 3 == 0 ? 2 : 1, factors[below(3)]);
    }
    for (int i = 0; i < 4; i++) {
        for (int f16 = 0; f16 < 2; f16++) {
            tp_dtype x = f16 ? TP_F16 : TP_BF16;
            try_product_tn(4096, 16, 576, i & 1 ? x : TP_F32, i & 2 ? x : TP_F32, 1, 1);
            try_product_tn(4096, 1536, 16, i & 1 ? x : TP_F32, i & 2 ? x : TP_F32, 2, 1);
        }
    }
    try_product_tn(40000, 1000, 7, TP_F32, TP_BF16, 1, 0.5f); /* the split side in slices */
    try_product_tn(40000, 1000, 7, TP_F32, TP_F16, 1, 0.5f);
    for (int i = 0; i < 4; i++) { /* long sums of no round length for a few results: none may miss its last terms */
        tp_dtype x = i & 1 ? TP_F16 : TP_BF16;
        shape s = {.n = 64,
                   .m = 8,
                   .k = 17474,
                   .nt = (i & 2) != 0,
                   .format = tp_format_of(x),
                   .a_dtype = x,
                   .c_dtype = TP_F32,
                   .precision = x,
                   .alpha = 1,
                   .beta = 1};
        try_product(&s);
        try_product_tn(17474, i & 2 ? 12 : 64, i & 2 ? 64 : 8, x, x, 0.75f, 1);
    }
    /* low-rank factors have kernels of their own: ranks and widths around their tiles, rows around their steps */
    static const int64_t ranks[] = {4, 8, 12, 16, 20, 32, 36, 64, 68}, wide[] = {8, 72, 128, 136, 256, 576},
                         rows[] = {1, 15, 63, 64, 65, 200, 1000};
    for (int i = 0; i < 120; i++) {
        int64_t n = rows[below(7)], rank = ranks[below(9)], width = wide[below(6)];
        bool first = below(2) == 0;
        try_product_tn(n, first ? rank : width, first ? width : rank, first ? TP_F32 : TP_BF16, first ? TP_BF16 : TP_F32,
                       i % 3 == 0 ? 0.5f : 1, factors[below(3)]);
    }
}

static void test_unsupported(void **state)
{
    (void)state;
    NEEDS_GPU();
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    ctx.device = opened.cuda;
    tp_matmul_args args = {
        .n = 1, .m = 1, .k = 1, .a = {NULL, TP_F32, 1}, .c = {NULL, TP_F32, 1}, .b = tp_matrix_dense(TP_F32, NULL, 1, 1)};
    args.b.format = TP_FORMAT_COUNT;
    assert_status(&ctx, TP_UNSUPPORTED, tp_run_matmul(&ctx, &args));
    args.b = tp_matrix_dense(TP_F32, NULL, 1, 1);
    args.a.dtype = TP_F64;
    assert_status(&ctx, TP_UNSUPPORTED, tp_run_matmul(&ctx, &args));
    args.a.dtype = TP_F32;
    args.b = (tp_matrix){.format = TP_FORMAT_Q4_0, .rows = 1, .cols = 1, .transposed = true};
    assert_status(&ctx, TP_UNSUPPORTED, tp_run_matmul(&ctx, &args));
}

/* ---- embedding ---- */

static void test_embedding(void **state)
{
    (void)state;
    NEEDS_GPU();
    random_state = 11;
    static const int64_t dims[] = {1, 8, 33, 64, 576, 4100};
    for (int i = 0; i < 300; i++) {
        both b = {0};
        tp_format_id format = (tp_format_id)below(TP_FORMAT_COUNT);
        int64_t dim = dims[below(6)], n = below(20) == 0 ? 0 : 1 + below(40);
        bool transposed = tp_formats[format].dense && below(3) == 0;
        tp_embedding_args args = {.n = n, .accumulate = below(2) == 0};
        random_matrix(&b, &args.table, format, 48, dim, transposed, below(2) == 0);
        args.table.rope_pairs = !transposed && below(3) == 0 ? 16 : 0;
        args.table.round_bf16 = below(2) == 0;
        int32_t *ids = ints_in(&b, &args.ids, n, 48);
        if (n > 2) ids[2] = -1;
        rows_out(&b, &args.out, n, dim, random_dtype(), EXACT);
        char text[120];
        snprintf(text, sizeof text, "embedding %s n=%lld dim=%lld transposed=%d rope=%d", tp_formats[format].name, (long long)n,
                 (long long)dim, transposed, args.table.rope_pairs);
        run_both(&b, TP_KERNEL_embedding, &args, text);
    }
}

/* Added in row order: the same bits as on the CPU. */
static void test_embedding_backward(void **state)
{
    (void)state;
    NEEDS_GPU();
    random_state = 12;
    static const int64_t dims[] = {1, 31, 32, 33, 576};
    static const int64_t counts[] = {0, 1, 7, 100, 1024, 2500};
    for (int i = 0; i < 30; i++) {
        both b = {0};
        int64_t dim = dims[i % 5], n = counts[i % 6], vocabulary = i % 2 == 0 ? 3 : 1000;
        tp_embedding_backward_args args = {.n = n, .dim = dim};
        ints_in(&b, &args.ids, n, vocabulary);
        rows_in(&b, &args.dout, n, dim, random_dtype(), 1);
        floats_out(&b, &args.dtable, vocabulary * dim, EXACT);
        char text[120];
        snprintf(text, sizeof text, "embedding_backward n=%lld dim=%lld", (long long)n, (long long)dim);
        run_both(&b, TP_KERNEL_embedding_backward, &args, text);
    }
}

/* ---- low-rank factors ---- */

static void test_pack_lowrank(void **state)
{
    (void)state;
    NEEDS_GPU();
    char text[160];
    for (int k = 0; k < 60; k++) {
        both b = {0};
        tp_pack_lowrank_args args = {.in = 1 + below(k < 30 ? 90 : 900)};
        bool even = below(2) == 0; /* sizes that may be read in groups */
        if (even) args.in = (args.in + 7) / 8 * 8;
        for (int i = 0, n = 1 + (int)below(TP_PACKED_PARTS); i < n; i++) {
            args.rows[i] = 1 + below(200);
            args.rank[i] = below(4) == 0 ? 0 : even ? 8 * (1 + below(2)) : 1 + below(9);
            args.scaling[i] = random_value();
            args.out += args.rows[i];
            args.used += args.rank[i];
            if (args.rank[i] == 0) continue;
            floats_in(&b, &args.a[i], args.rank[i] * args.in, 1);
            floats_in(&b, &args.b[i], args.rows[i] * args.rank[i], 1);
        }
        rows_out(&b, &args.w, args.out + args.used, args.in + args.used, random_dtype(), EXACT);
        snprintf(text, sizeof text, "pack_lowrank out=%lld in=%lld used=%lld %s", (long long)args.out, (long long)args.in,
                 (long long)args.used, tp_dtype_name(args.w.dtype));
        run_both(&b, TP_KERNEL_pack_lowrank, &args, text);
    }
}

/* Up to three parts. Sums of up to 3,000 products of numbers up to 1; du is rounded to its dtype. */
static void test_lowrank_backward(void **state)
{
    (void)state;
    NEEDS_GPU();
    char text[160];
    for (int k = 0; k < 90; k++) {
        both b = {0};
        tp_lowrank_backward_args args = {.n = 1 + below(700)};
        tp_dtype dtype = random_dtype();
        bool even = below(2) == 0;
        int64_t out = 0, used = 0, n_parts = 1 + below(TP_PACKED_PARTS);
        for (int i = 0; i < n_parts; i++) {
            args.rows[i] = 1 + below(n_parts == 1 ? 3000 : 800);
            args.rank[i] = i > 0 && below(4) == 0 ? 0 : even ? 8 * (1 + below(4)) : 1 + below(40);
            if (even) args.rows[i] = (args.rows[i] + 7) / 8 * 8;
            args.scaling[i] = 0.75f + (float)i;
            out += args.rows[i], used += args.rank[i];
            if (args.rank[i] > 0 && below(5) > 0) floats_out(&b, &args.db[i], args.rows[i] * args.rank[i], within(1e-5, 1e-3));
        }
        rows_in(&b, &args.dy, args.n, out, dtype, 1);
        rows_in(&b, &args.b, out, used, dtype, 1);
        rows_in(&b, &args.u, args.n, used, dtype, 1);
        rows_out(&b, &args.du, args.n, used, dtype, within(1e-5, 3e-4));
        snprintf(text, sizeof text, "lowrank_backward n=%lld out=%lld used=%lld parts=%lld %s", (long long)args.n,
                 (long long)out, (long long)used, (long long)n_parts, tp_dtype_name(dtype));
        run_both(&b, TP_KERNEL_lowrank_backward, &args, text);
    }
}

int main(void)
{
    f16_too = true;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_copies),
        cmocka_unit_test(test_out_of_memory),
        cmocka_unit_test(test_describe),
        cmocka_unit_test(test_no_such_device),
        cmocka_unit_test(test_products),
        cmocka_unit_test(test_model_shapes),
        cmocka_unit_test(test_carried_products),
        cmocka_unit_test(test_lowrank),
        cmocka_unit_test(test_pack_lowrank),
        cmocka_unit_test(test_lowrank_backward),
        cmocka_unit_test(test_slices),
        cmocka_unit_test(test_products_tn),
        cmocka_unit_test(test_unsupported),
        cmocka_unit_test(test_embedding),
        cmocka_unit_test(test_embedding_backward),
    };
    return cmocka_run_group_tests(tests, open_both, close_both);
}
