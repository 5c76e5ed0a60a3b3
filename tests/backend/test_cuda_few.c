/* CUDA kernels for decoding, a few rows at a time, against the CPU. */
#include "tests/backend/on_both.h"

/* ---- linears ---- */

typedef struct shape {
    int64_t n, k, m[TP_LINEARS_PARTS], rank;
    int n_parts;
    tp_format_id formats[TP_LINEARS_PARTS];
    tp_dtype x, y, precision;
    bool norm, swiglu, residual, bias, round_bf16, pad;
    int32_t rope_pairs;
} shape;

static void describe(const shape *s, char out[300])
{
    snprintf(out, 300,
             "n=%lld k=%lld m=%lld,%lld,%lld parts=%d %s x=%s y=%s precision=%s norm=%d swiglu=%d residual=%d bias=%d "
             "rank=%lld round=%d pad=%d rope=%d",
             (long long)s->n, (long long)s->k, (long long)s->m[0], (long long)s->m[1], (long long)s->m[2], s->n_parts,
             tp_formats[s->formats[0]].name, tp_dtype_name(s->x), tp_dtype_name(s->y), tp_dtype_name(s->precision), s->norm,
             s->swiglu, s->residual, s->bias, (long long)s->rank, s->round_bf16, s->pad, s->rope_pairs);
}

/* Values of magnitude up to about 1 in any format. */
static void random_weight(both *b, tp_matrix *w, tp_format_id format, int64_t rows, int64_t cols, bool pad)
{
    const tp_format *f = &tp_formats[format];
    int64_t stride = f->dense && pad ? cols + 8 : 0;
    size_t bytes = (size_t)(rows * tp_format_row_bytes(format, stride > 0 ? stride : cols)), block = (size_t)f->block_bytes;
    *w = (tp_matrix){.format = format, .rows = rows, .cols = cols, .stride = stride};
    unsigned char *data = new_buffer(b, &w->data, bytes, TP_BF16);
    for (size_t i = 0; i < bytes; i++) data[i] = (unsigned char)random_bits();
    for (size_t i = 0; i + block <= bytes; i += block) {
        float x = random_value();
        uint16_t d = format == TP_FORMAT_BF16   ? tp_f32_to_bf16(x)
                     : format == TP_FORMAT_F16  ? tp_f32_to_f16(x)
                     : format == TP_FORMAT_Q8_0 ? tp_f32_to_f16(x / 128)
                                                : tp_f32_to_f16(x / 16);
        uint16_t m = tp_f32_to_f16(random_value() / 2);
        if (format == TP_FORMAT_F32)
            memcpy(data + i, &x, 4);
        else
            memcpy(data + i, &d, 2);
        if (format == TP_FORMAT_Q4_1) memcpy(data + i + 2, &m, 2);
    }
}

/* Sums of k products of values up to 1, in other orders, of values that may be a unit of bf16 apart (a norm's factor that is
 * one bit of f32 off moves some of them over the edge), and that are rounded to bf16 once or twice on their way. SwiGLU
 * multiplies two of them. */
static tolerance tolerance_of(const shape *s)
{
    double k = (double)s->k, size = 2 * sqrt(k) + 4;
    bool bf16 = s->x == TP_BF16 || s->y == TP_BF16 || s->precision == TP_BF16;
    double limit = 0x1p-24 * (4 * sqrt(k) + 16) * (k / 2 + 4);
    if (bf16) limit += 0x1p-7 * size;
    if (s->rank > 0) limit += (bf16 ? 0x1p-7 : 0x1p-19) * size * (sqrt((double)s->rank) + 2);
    if (s->rank > 0) size += size * (sqrt((double)s->rank) + 2);
    if (s->swiglu) limit *= 2 * size;
    return within(0, limit);
}

static void rows_of(both *b, tp_rows *rows, int64_t n, int64_t cols, tp_dtype dtype, bool pad)
{
    *rows = (tp_rows){NULL, dtype, cols + (pad ? 8 : 0)};
    size_t count = (size_t)(n * rows->ld);
    fill(new_buffer(b, &rows->data, count * (dtype == TP_BF16 ? 2 : 4), dtype), count, dtype, 1);
}

static void try_linears(const shape *s)
{
    both b = {0};
    char text[300];
    tp_lowrank_args riders[TP_LINEARS_PARTS] = {{0}};
    tp_linears_args args = {.n = s->n, .k = s->k, .n_parts = s->n_parts, .swiglu = s->swiglu, .precision = s->precision};
    describe(s, text);
    rows_of(&b, &args.x, s->n, s->k, s->x, s->pad);
    if (s->norm) {
        args.eps = 1e-5f;
        floats_in(&b, &args.norm_weight, s->k, 1);
        rows_of(&b, &args.normed, s->n, s->k, s->x, false);
        b.buffers[b.n_buffers - 1].scratch = true;
    }
    for (int i = 0; i < s->n_parts; i++) {
        tp_linears_part *part = &args.parts[i];
        random_weight(&b, &part->w, s->formats[i], s->m[i], s->k, s->pad);
        part->w.round_bf16 = s->round_bf16;
        if (s->rope_pairs > 0 && i < 2) part->w.rope_pairs = s->rope_pairs;
        if (s->bias) floats_in(&b, &part->bias, s->m[i], 1);
        rows_of(&b, &part->y, s->n, s->m[i], s->y, s->pad);
        if (i == 0 || !s->swiglu)
            make_output(&b, tolerance_of(s));
        else
            b.buffers[b.n_buffers - 1].scratch = true;
        if (s->rank == 0 || i == 2) continue;
        tp_lowrank_args *l = &riders[i];
        tp_format_id factors = s->precision == TP_BF16 && i == 0 ? TP_FORMAT_BF16 : TP_FORMAT_F32;
        *l = (tp_lowrank_args){.rank = s->rank, .scaling = i == 0 ? 0.5f : 0.25f};
        random_weight(&b, &l->down, factors, s->rank, s->k, false);
        random_weight(&b, &l->up, factors, s->m[i], s->rank, false);
        rows_of(&b, &l->low, s->n, s->rank, TP_F32, false);
        b.buffers[b.n_buffers - 1].scratch = true;
        part->lowrank = l;
    }
    if (s->residual) {
        tp_rows residual;
        rows_of(&b, &residual, s->n, s->m[0], s->y, false);
        b.fields[b.n_fields - 1].field = &args.residual;
        args.residual_ld = residual.ld;
    }
    run_both(&b, TP_KERNEL_linears, &args, text);
}

/* k is a multiple of 32, as all formats can have it; 20 is one that only separate kernels take. */
static void test_linears(void **state)
{
    (void)state;
    NEEDS_GPU();
    static const int64_t widths[] = {32, 64, 96, 256, 288, 576, 1536, 2048, 2080},
                         heights[] = {1, 2, 3, 5, 16, 31, 64, 192, 577, 1000};
    random_state = 21;
    for (int i = 0; i < 400; i++) {
        shape s = {.n = 1 + below(9), .k = widths[below(9)], .n_parts = 1 + (int)below(3)};
        s.x = random_dtype(), s.y = below(3) == 0 ? TP_F32 : s.x;
        s.precision = below(3) == 0 ? random_dtype() : s.x;
        s.norm = below(2) == 0, s.residual = below(3) == 0, s.bias = below(3) == 0, s.pad = below(3) == 0;
        s.swiglu = s.n_parts == 2 && below(2) == 0;
        if (s.swiglu) s.y = s.x;
        s.round_bf16 = below(4) == 0;
        s.rank = below(3) == 0 ? 1 + below(40) : 0;
        tp_format_id format = (tp_format_id)below(TP_FORMAT_COUNT);
        for (int p = 0; p < 3; p++) {
            s.m[p] = p > 0 && s.swiglu ? s.m[0] : heights[below(10)];
            s.formats[p] = below(5) == 0 ? (tp_format_id)below(TP_FORMAT_COUNT) : format;
        }
        if (below(8) == 0) {
            s.k = 20;
            for (int p = 0; p < 3; p++) s.formats[p] = (tp_format_id)below(3);
        }
        if (s.m[0] % 64 == 0 && s.m[1] % 64 == 0 && below(2) == 0) s.rope_pairs = 64;
        try_linears(&s);
    }
}

/* Long rows: x goes through shared memory in tiles, and a sum of few rows of w is shared by the warps of a block. */
static void test_long_rows(void **state)
{
    (void)state;
    NEEDS_GPU();
    random_state = 22;
    for (int64_t n = 1; n <= 8; n++) {
        tp_dtype x = n % 2 == 0 ? TP_F32 : TP_BF16;
        shape s = {
            .n = n, .k = 14336, .m = {96}, .n_parts = 1, .x = x, .y = x, .precision = x, .residual = true, .norm = n % 3 == 0};
        s.formats[0] = n % 2 == 0 ? TP_FORMAT_Q8_0 : TP_FORMAT_BF16;
        try_linears(&s);
        s.m[0] = 6000, s.k = 2304, s.residual = false;
        try_linears(&s);
        s.m[1] = s.m[0], s.formats[1] = s.formats[0], s.n_parts = 2, s.swiglu = true;
        try_linears(&s);
    }
}

/* Many short rows, as of a head: a warp has some for itself. */
static void test_short_rows(void **state)
{
    (void)state;
    NEEDS_GPU();
    random_state = 27;
    for (int64_t n = 1; n <= 8; n++) {
        shape s = {.n = n, .k = n < 4 ? 576 : 960, .m = {12001, 9000, 62}, .n_parts = 3, .x = TP_BF16, .norm = n % 2 == 1};
        s.y = n % 3 == 0 ? TP_BF16 : TP_F32, s.precision = TP_BF16, s.bias = n == 2, s.rank = n == 5 ? 8 : 0;
        for (int i = 0; i < 3; i++) s.formats[i] = TP_FORMAT_BF16;
        try_linears(&s);
    }
}

/* ---- a row's result does not depend on the others ---- */

static void run_rows(const tp_linears_args *args, int64_t first, int64_t n, size_t y_bytes, unsigned char *to)
{
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    ctx.device = opened.cuda;
    const tp_backend *backend = opened.cuda->backend;
    tp_linears_args some = *args;
    some.n = n;
    some.x.data = (char *)args->x.data + first * args->x.ld * 2;
    some.parts[0].y.data = (char *)args->parts[0].y.data + (size_t)first * y_bytes;
    assert_ok(&ctx, tp_run_linears(&ctx, &some));
    assert_ok(&ctx, backend->copy_out(&ctx, to, some.parts[0].y.data, (size_t)n * y_bytes));
}

static void *random_memory(tp_ctx *ctx, int64_t values)
{
    uint16_t *host = malloc((size_t)values * 2);
    assert_non_null(host);
    fill(host, (size_t)values, TP_BF16, 1);
    void *memory = opened.cuda->backend->alloc(ctx, opened.cuda, (size_t)values * 2);
    assert_non_null(memory);
    assert_ok(ctx, opened.cuda->backend->copy_in(ctx, memory, host, (size_t)values * 2));
    free(host);
    return memory;
}

static void test_rows_alone(void **state)
{
    (void)state;
    NEEDS_GPU();
    static const struct {
        int64_t m, k;
    } sizes[] = {{577, 576}, {20000, 576}, {16, 4096}, {5000, 1024}, {333, 14336}, {4096, 5120}};
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    ctx.device = opened.cuda;
    random_state = 23;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        int64_t m = sizes[i].m, k = sizes[i].k;
        size_t row = (size_t)m * 2;
        unsigned char *together = malloc(8 * row), *alone = malloc(8 * row);
        assert_true(together != NULL && alone != NULL);
        void *x = random_memory(&ctx, 8 * k), *w = random_memory(&ctx, m * k), *y = random_memory(&ctx, 8 * m);
        tp_linears_args args = {.k = k, .x = {x, TP_BF16, k}, .n_parts = 1, .precision = TP_BF16};
        args.parts[0] = (tp_linears_part){.w = tp_matrix_dense(TP_BF16, w, m, k), .y = {y, TP_BF16, m}};
        for (int64_t n = 2; n <= 8; n++) {
            run_rows(&args, 0, n, row, together);
            for (int64_t r = 0; r < n; r++) run_rows(&args, r, 1, row, alone + (size_t)r * row);
            for (int64_t r = 0; r < n; r++)
                if (memcmp(together + (size_t)r * row, alone + (size_t)r * row, row) != 0)
                    fail_msg("%lld x %lld: row %lld of %lld differs from itself alone", (long long)m, (long long)k,
                             (long long)r, (long long)n);
        }
        opened.cuda->backend->free(opened.cuda, x, 0);
        opened.cuda->backend->free(opened.cuda, w, 0);
        opened.cuda->backend->free(opened.cuda, y, 0);
        free(together), free(alone);
    }
}

/* ---- attention against the cache ---- */

typedef struct heads {
    int64_t n, heads, kv_heads, head_dim, capacity, window;
    tp_dtype dtype;
    bool norms, rope, pad;
} heads;

/* Weighted means of values up to 1, with weights from scores that lie apart by roundings of q and k: in bf16 each channel of
 * them by a unit or two, where a norm or an angle is a bit of f32 off. */
static void try_attend(const heads *h)
{
    both b = {0};
    char text[200];
    snprintf(text, sizeof text, "n=%lld heads=%lld/%lld x %lld capacity=%lld window=%lld %s norms=%d rope=%d pad=%d",
             (long long)h->n, (long long)h->heads, (long long)h->kv_heads, (long long)h->head_dim, (long long)h->capacity,
             (long long)h->window, tp_dtype_name(h->dtype), h->norms, h->rope, h->pad);
    int64_t width = h->heads * h->head_dim, kv = h->kv_heads * h->head_dim;
    tp_attend_args args = {.n = h->n,
                           .heads = h->heads,
                           .kv_heads = h->kv_heads,
                           .head_dim = h->head_dim,
                           .capacity = h->capacity,
                           .window = h->window,
                           .eps = 1e-6f,
                           .scale = 1 / sqrtf((float)h->head_dim)};
    tolerance t = within(0, h->dtype == TP_BF16 ? 0.02 : 2e-5);
    rows_of(&b, &args.q, h->n, width, h->dtype, h->pad);
    b.buffers[b.n_buffers - 1].scratch = true;
    rows_of(&b, &args.k, h->n, kv, h->dtype, h->pad);
    b.buffers[b.n_buffers - 1].scratch = true;
    rows_of(&b, &args.v, h->n, kv, h->dtype, h->pad);
    rows_of(&b, &args.out, h->n, width, h->dtype, h->pad);
    make_output(&b, t);
    rows_of(&b, &args.cache_k, h->n * h->capacity, kv, h->dtype, false);
    make_output(&b, within(0, h->dtype == TP_BF16 ? 0.03 : 2e-6));
    rows_of(&b, &args.cache_v, h->n * h->capacity, kv, h->dtype, false);
    make_output(&b, EXACT);
    (void)ints_in(&b, &args.used, h->n, h->capacity);
    if (h->norms) {
        floats_in(&b, &args.q_norm, h->head_dim, 1);
        floats_in(&b, &args.k_norm, h->head_dim, 1);
    }
    if (h->rope) {
        args.half = h->head_dim / 2;
        floats_in(&b, &args.cos, h->n * args.half, 1);
        floats_in(&b, &args.sin, h->n * args.half, 1);
    }
    floats_scratch(&b, &args.parts, h->n * h->heads * TP_ATTEND_PARTS * (h->head_dim + 2));
    memset(new_buffer(&b, &args.counters, (size_t)(h->n * h->heads) * 4, TP_I32), 0, (size_t)(h->n * h->heads) * 4);
    run_both(&b, TP_KERNEL_attend, &args, text);
}

static void test_attend(void **state)
{
    (void)state;
    NEEDS_GPU();
    static const int64_t dims[] = {8, 16, 24, 32, 64, 80, 96, 128, 256}, groups[] = {1, 1, 2, 3, 4, 5, 7, 8},
                         capacities[] = {1, 2, 17, 64, 65, 200, 700, 3000};
    random_state = 24;
    for (int i = 0; i < 200; i++) {
        heads h = {.n = 1 + below(8), .kv_heads = 1 + below(4), .head_dim = dims[below(9)], .capacity = capacities[below(8)]};
        h.heads = h.kv_heads * groups[below(8)];
        if (h.n * h.heads * h.head_dim * h.capacity > 10000000) h.n = 1;
        h.dtype = random_dtype();
        h.window = below(3) == 0 ? 1 + below(300) : 0;
        h.norms = below(3) == 0, h.rope = below(3) > 0, h.pad = below(3) == 0;
        try_attend(&h);
    }
}

/* ---- the next token ---- */

static int32_t *ints_out(both *b, void *field, int64_t n, int64_t limit)
{
    int32_t *ints = ints_in(b, field, n, limit);
    make_output(b, EXACT);
    return ints;
}

/* kind: 0 like a model's, 1 peaked, 2 many ties, 3 all alike, 4 an infinite one, 5 a NaN, 6 all but a few impossible */
static void random_logits(float *x, int64_t n, int kind)
{
    for (int64_t i = 0; i < n; i++) {
        float sum = 0;
        for (int j = 0; j < 4; j++) sum += random_value();
        x[i] = kind == 3 ? 0.5f : kind == 6 && below(50) > 0 ? -INFINITY : (kind == 1 ? 9 : 3) * sum;
        if (kind == 2) x[i] = roundf(x[i]);
    }
    if (kind == 4) x[below(n)] = INFINITY;
    if (kind == 5) x[below(n)] = NAN;
}

static void try_sample(int64_t n, int64_t vocab, int kind)
{
    static const double temperatures[] = {0, 1, 1, 0.7, 2, 0.01}, shares[] = {1, 1, 0.9, 0.5, 0},
                        least[] = {0, 0, 0.05, 0.5, 1};
    both b = {0};
    char text[300];
    tp_sample_args a = {
        .n = n, .vocab = vocab, .ld = vocab + below(3) * 5, .temperature = temperatures[below(6)], .history_length = 5};
    a.top_k = below(3) == 0 ? 1 + below(vocab + 3) : 0;
    a.top_p = shares[below(5)], a.min_p = least[below(5)], a.repetition_penalty = below(2) == 0 ? 1 : 1.2;
    a.seed = random_bits() | (uint64_t)random_bits() << 32;
    a.position_limit = 40;
    snprintf(text, sizeof text, "n=%lld vocab=%lld kind=%d temperature=%g top_k=%lld top_p=%g min_p=%g penalty=%g",
             (long long)n, (long long)vocab, kind, a.temperature, (long long)a.top_k, a.top_p, a.min_p, a.repetition_penalty);
    floats_scratch(&b, &a.logits, n * a.ld);
    for (int64_t i = 0; i < n; i++) random_logits(a.logits + i * a.ld, vocab, kind);
    if (a.repetition_penalty > 1) { /* bytes, compared four at a time */
        unsigned char *seen = new_buffer(&b, &a.seen, (size_t)((n * vocab + 3) / 4 * 4), TP_I32);
        for (int64_t i = 0; i < n * vocab; i++) seen[i] = below(10) == 0;
        make_output(&b, EXACT);
    }
    (void)new_buffer(&b, &a.scratch, (size_t)(n * (vocab + TP_SAMPLE_EXTRA)) * 8, TP_F32);
    b.buffers[b.n_buffers - 1].scratch = true;
    (void)ints_out(&b, &a.ids, n, vocab);
    (void)ints_out(&b, &a.positions, n, 42);
    (void)ints_out(&b, &a.counts, n, 1000);
    (void)ints_out(&b, &a.history, 5 * n, vocab);
    memset(ints_out(&b, &a.bad, n, 1), 0, (size_t)n * 4);
    run_both(&b, TP_KERNEL_sample, &a, text);
}

/* The same token as the CPU's: weights are integers. (An exponential that is one bit of f64 off moves one of them by 2^-32 now
 * and then, and the draw with it, once in a billion.) */
static void test_sample(void **state)
{
    (void)state;
    NEEDS_GPU();
    static const int64_t vocabs[] = {1, 2, 33, 1000, 2049, 32000, 49152, 128256};
    random_state = 25;
    for (int i = 0; i < 300; i++) try_sample(1 + below(4), vocabs[below(7)], (int)below(7));
    for (int kind = 0; kind < 7; kind++) try_sample(8, vocabs[7], kind);
}

/* ---- recorded kernels ---- */

/* A recording does nothing by itself; each launch runs the kernels on what memory holds then. One that fails leaves the stream
 * usable. */
static void test_graph(void **state)
{
    (void)state;
    NEEDS_GPU();
    const tp_backend *backend = opened.cuda->backend;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    ctx.device = opened.cuda;
    float x = 1.5f, y[2] = {0};
    float *memory = backend->alloc(&ctx, opened.cuda, 16);
    assert_non_null(memory);
    assert_ok(&ctx, backend->copy_in(&ctx, memory, &x, 4));
    tp_add_args add = {.n = 1, .dim = 1, .x = {memory, TP_F32, 1}, .y = {memory + 1, TP_F32, 1}, .z = {memory + 1, TP_F32, 1}};
    tp_graph *graph = NULL;
    assert_ok(&ctx, backend->capture_begin(&ctx));
    assert_ok(&ctx, tp_run_add(&ctx, &add));
    assert_ok(&ctx, tp_run_add(&ctx, &add));
    assert_ok(&ctx, backend->capture_end(&ctx, &graph));
    assert_non_null(graph);
    assert_ok(&ctx, backend->copy_out(&ctx, y, memory, 8));
    assert_true(y[1] == 0);
    for (int i = 0; i < 5; i++) assert_ok(&ctx, backend->graph_launch(&ctx, graph));
    assert_ok(&ctx, backend->copy_out(&ctx, y, memory, 8));
    assert_true(y[1] == 15);
    x = 2;
    assert_ok(&ctx, backend->copy_in(&ctx, memory, &x, 4));
    assert_ok(&ctx, backend->graph_launch(&ctx, graph));
    assert_ok(&ctx, backend->copy_out(&ctx, y, memory, 8));
    assert_true(y[1] == 19);
    backend->graph_free(opened.cuda, graph);
    assert_ok(&ctx, backend->capture_begin(&ctx));
    assert_ok(&ctx, tp_run_add(&ctx, &add));
    assert_ok(&ctx, backend->capture_end(&ctx, NULL)); /* dropped */
    assert_ok(&ctx, tp_run_add(&ctx, &add));
    assert_ok(&ctx, backend->copy_out(&ctx, y, memory, 8));
    assert_true(y[1] == 21);
    backend->free(opened.cuda, memory, 16);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_linears),    cmocka_unit_test(test_long_rows), cmocka_unit_test(test_short_rows),
        cmocka_unit_test(test_rows_alone), cmocka_unit_test(test_attend),    cmocka_unit_test(test_sample),
        cmocka_unit_test(test_graph),
    };
    return cmocka_run_group_tests(tests, open_both, close_both);
}
