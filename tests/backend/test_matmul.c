/* Matrix products against sums in f64, on every instruction set that this CPU has, over odd sizes, all formats and all
 * arguments. Operands end at unreadable pages, so reading or writing past an end is a crash. */
#include "tests/support.h"

#include <math.h>
#include <sys/mman.h>

#include "backend/cpu/cpu.h"
#include "backend/cpu/matmul.h"

/* ---- memory that ends at an unreadable page ---- */

#define PAGE ((size_t)4096)

typedef struct guarded {
    unsigned char *map;
    size_t map_bytes;
    void *data;
    size_t bytes;
} guarded;

static guarded guarded_new(size_t bytes)
{
    guarded g = {.bytes = bytes};
    size_t pages = (bytes + PAGE - 1) / PAGE;
    g.map_bytes = (pages + 1) * PAGE;
    g.map = mmap(NULL, g.map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(g.map != MAP_FAILED);
    assert_int_equal(mprotect(g.map + pages * PAGE, PAGE, PROT_NONE), 0);
    g.data = g.map + pages * PAGE - bytes;
    return g;
}

static void guarded_free(guarded *g)
{
    munmap(g->map, g->map_bytes);
}

/* ---- random numbers ---- */

static uint64_t state;

static uint32_t next_bits(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 32);
}
static int64_t below(int64_t n)
{
    return (int64_t)(next_bits() % (uint64_t)n);
}
static float next_value(void)
{
    return (float)next_bits() / 2147483648.0f - 1.0f;
}

static const int64_t sizes[] = {1, 2, 3, 7, 8, 13, 14, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 257, 576};
static int64_t next_size(void)
{
    return sizes[below((int64_t)(sizeof sizes / sizeof *sizes))];
}

/* ---- operands ---- */

typedef struct rows {
    guarded memory;
    tp_rows view;
    double *values; /* [n][cols] */
} rows;

static void rows_set(const tp_rows *r, int64_t i, float x)
{
    if (r->dtype == TP_BF16)
        ((uint16_t *)r->data)[i] = tp_f32_to_bf16(x);
    else
        ((float *)r->data)[i] = x;
}
static double rows_get(const tp_rows *r, int64_t i)
{
    return r->dtype == TP_BF16 ? (double)tp_bf16_to_f32(((const uint16_t *)r->data)[i]) : (double)((const float *)r->data)[i];
}

/* The last row ends where its values end, not at ld. */
static rows rows_new(int64_t n, int64_t cols, tp_dtype dtype, int64_t ld)
{
    size_t size = tp_dtype_bytes(dtype), count = n > 0 ? (size_t)((n - 1) * ld + cols) : 0;
    rows r = {.memory = guarded_new(count * size), .view = {NULL, dtype, ld}};
    r.view.data = r.memory.data;
    r.values = calloc((size_t)(n * cols) + 1, sizeof *r.values);
    assert_non_null(r.values);
    for (size_t i = 0; i < count; i++) rows_set(&r.view, (int64_t)i, NAN); /* between rows: must not be used */
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < cols; j++) {
            rows_set(&r.view, i * ld + j, next_value());
            r.values[i * cols + j] = rows_get(&r.view, i * ld + j);
        }
    }
    return r;
}

static void rows_free(rows *r)
{
    guarded_free(&r->memory);
    free(r->values);
}

typedef struct matrix {
    guarded memory;
    tp_matrix view;
    double *values; /* [rows][cols], logical */
} matrix;

static void matrix_fill(unsigned char *data, size_t bytes, tp_format_id format)
{
    for (size_t i = 0; i < bytes; i++) data[i] = (unsigned char)next_bits();
    size_t block = (size_t)tp_formats[format].block_bytes;
    for (size_t i = 0; i + block <= bytes; i += block) { /* finite values of moderate size */
        float x = next_value();
        uint16_t h = tp_f32_to_bf16(x), d = tp_f32_to_f16(x / 16), m = tp_f32_to_f16(next_value());
        if (format == TP_FORMAT_F32)
            memcpy(data + i, &x, 4);
        else if (format == TP_FORMAT_BF16)
            memcpy(data + i, &h, 2);
        else
            memcpy(data + i, &d, 2);
        if (format == TP_FORMAT_Q4_1) memcpy(data + i + 2, &m, 2);
    }
}

static matrix matrix_new(tp_format_id format, int64_t n_rows, int64_t cols, int64_t pad, bool transposed, int32_t rope_pairs,
                         bool round_bf16)
{
    const tp_format *f = &tp_formats[format];
    int64_t stored_rows = transposed ? cols : n_rows, stored_cols = transposed ? n_rows : cols;
    int64_t row_bytes = tp_format_row_bytes(format, stored_cols), stride = 0;
    size_t bytes = (size_t)(stored_rows * row_bytes);
    if (f->dense && pad > 0) {
        stride = stored_cols + pad;
        bytes = (size_t)((stored_rows - 1) * stride + stored_cols) * (size_t)f->block_bytes;
        row_bytes = stride * f->block_bytes;
    }
    matrix m = {.memory = guarded_new(bytes)};
    matrix_fill(m.memory.data, bytes, format);
    m.view = (tp_matrix){format, m.memory.data, n_rows, cols, stride, transposed, rope_pairs, round_bf16};
    m.values = calloc((size_t)(n_rows * cols) + 1, sizeof *m.values);
    assert_non_null(m.values);
    float *row = calloc((size_t)stored_cols + 32, sizeof *row);
    assert_non_null(row);
    for (int64_t r = 0; r < (transposed ? cols : n_rows); r++) {
        int64_t stored = transposed ? r : tp_matrix_stored_row(&m.view, r),
                n = (stored_cols + f->block - 1) / f->block * f->block;
        f->decode((const unsigned char *)m.memory.data + stored * row_bytes, 0, n, row);
        for (int64_t c = 0; c < stored_cols; c++) {
            float x = round_bf16 ? tp_bf16_to_f32(tp_f32_to_bf16(row[c])) : row[c];
            m.values[transposed ? c * cols + r : r * cols + c] = (double)x;
        }
    }
    free(row);
    return m;
}

static void matrix_free(matrix *m)
{
    guarded_free(&m->memory);
    free(m->values);
}

/* ---- one product, checked ---- */

typedef struct shape {
    int64_t n, m, k;
    bool nt;
    tp_format_id format;
    int64_t pad; /* of a's rows, c's rows, and dense stored rows */
    bool transposed, round_bf16;
    int32_t rope_pairs;
    tp_dtype a_dtype, c_dtype, precision;
    float alpha, beta;
    bool bias, residual, residual_is_c;
} shape;

static void describe(const shape *s, char out[300])
{
    snprintf(out, 300,
             "%s n=%lld m=%lld k=%lld %s pad=%lld transposed=%d rope=%d round=%d a=%s c=%s precision=%s alpha=%g beta=%g "
             "bias=%d residual=%d,%d",
             s->nt ? "nt" : "nn", (long long)s->n, (long long)s->m, (long long)s->k, tp_formats[s->format].name,
             (long long)s->pad, s->transposed, s->rope_pairs, s->round_bf16, tp_dtype_name(s->a_dtype),
             tp_dtype_name(s->c_dtype), tp_dtype_name(s->precision), (double)s->alpha, (double)s->beta, s->bias, s->residual,
             s->residual_is_c);
}

static double bf16_if(bool rounded, double x)
{
    return rounded ? (double)tp_bf16_to_f32(tp_f32_to_bf16((float)x)) : x;
}

/* Tolerance: a sum of k products in f32, in any order that adds blocks, is off by about sqrt(k) roundings of 2^-24 of the
 * sum of magnitudes; 4 of them leave room. Each further term adds one rounding. A bf16 result adds half a unit of 2^-8. */
static void check(tp_ctx *ctx, const tp_mm_engine *engine, const shape *s)
{
    rows a = rows_new(s->n, s->k, s->a_dtype, s->k + s->pad), c = rows_new(s->n, s->m, s->c_dtype, s->m + s->pad);
    rows residual = rows_new(s->n, s->m, s->c_dtype, s->m + 2 * s->pad);
    matrix b =
        matrix_new(s->format, s->nt ? s->m : s->k, s->nt ? s->k : s->m, s->pad, s->transposed, s->rope_pairs, s->round_bf16);
    guarded bias = guarded_new((size_t)s->m * 4);
    for (int64_t j = 0; j < s->m; j++) ((float *)bias.data)[j] = next_value();
    if (s->beta == 0 && !s->residual_is_c) {
        for (int64_t i = 0; i < s->n; i++) {
            for (int64_t j = 0; j < s->m; j++) rows_set(&c.view, i * c.view.ld + j, NAN);
        }
    }
    tp_matmul_args args = {.n = s->n,
                           .m = s->m,
                           .k = s->k,
                           .a = a.view,
                           .b = b.view,
                           .nt = s->nt,
                           .c = c.view,
                           .alpha = s->alpha,
                           .beta = s->beta,
                           .bias = s->bias ? bias.data : NULL,
                           .precision = s->precision};
    if (s->residual) args.residual = s->residual_is_c ? c.view.data : residual.view.data;
    args.residual_ld = s->residual_is_c ? c.view.ld : residual.view.ld;
    assert_ok(ctx, tp_mm_run(ctx, engine, &args));

    bool rounds = engine->per_word == 2 && s->n >= TP_MM_FEW;
    for (int64_t i = 0; i < s->n; i++) {
        for (int64_t j = 0; j < s->m; j++) {
            double sum = 0, magnitude = 0, expected, limit;
            for (int64_t l = 0; l < s->k; l++) {
                double x = bf16_if(rounds, a.values[i * s->k + l]);
                double y = bf16_if(rounds, b.values[s->nt ? j * s->k + l : l * s->m + j]);
                sum += x * y;
                magnitude += fabs(x * y);
            }
            double old = s->beta != 0 ? s->beta * c.values[i * s->m + j] : 0, extra = 0;
            if (s->bias) extra += (double)((float *)bias.data)[j];
            if (s->residual) extra += s->residual_is_c ? c.values[i * s->m + j] : residual.values[i * s->m + j];
            expected = s->alpha * sum + old + extra;
            limit = 0x1p-24 * (fabs((double)s->alpha) * magnitude * (4 * sqrt((double)s->k) + 4) + 8 * (fabs(old) + 4));
            if (s->c_dtype == TP_BF16) limit += 0x1.1p-8 * fabs(expected);
            double got = rows_get(&c.view, i * c.view.ld + j);
            if (!(fabs(got - expected) <= limit)) {
                char text[300];
                describe(s, text);
                fail_msg("%s, %s: c[%lld, %lld] is %.9g, expected %.9g within %.3g", engine->name, text, (long long)i,
                         (long long)j, got, expected, limit);
            }
        }
        for (int64_t j = s->m; j < c.view.ld && i + 1 < s->n; j++) assert_true(isnan(rows_get(&c.view, i * c.view.ld + j)));
    }
    rows_free(&a);
    rows_free(&c);
    rows_free(&residual);
    matrix_free(&b);
    guarded_free(&bias);
}

static shape next_shape(void)
{
    static const float factors[] = {0, 1, 1, 0.5f, -2};
    shape s = {.n = next_size(),
               .m = next_size(),
               .k = next_size(),
               .nt = below(2) == 0,
               .format = (tp_format_id)below(TP_FORMAT_COUNT)};
    while (s.n * s.m * s.k > 4000000) s.n = next_size(), s.m = next_size();
    s.pad = below(2) * 5;
    bool dense = tp_formats[s.format].dense;
    s.transposed = dense && below(4) == 0;
    s.round_bf16 = below(4) == 0;
    int64_t n_rows = s.nt ? s.m : s.k;
    if (!s.transposed && n_rows % 4 == 0 && below(3) == 0) s.rope_pairs = n_rows % 8 == 0 ? (int32_t)n_rows / 4 : 4;
    if (s.rope_pairs % 2 != 0) s.rope_pairs = 0;
    s.a_dtype = below(2) == 0 ? TP_F32 : TP_BF16;
    s.c_dtype = below(2) == 0 ? TP_F32 : TP_BF16;
    s.precision = below(2) == 0 ? TP_F32 : TP_BF16;
    s.alpha = factors[below(5)];
    s.beta = factors[below(5)];
    s.bias = below(2) == 0;
    s.residual = below(2) == 0;
    s.residual_is_c = s.residual && below(2) == 0;
    return s;
}

/* ---- devices ---- */

/* "generic" is plain C, "openblas" the same with OpenBLAS where the machine has it. */
static tp_status open_cpu(tp_ctx *ctx, const char *isa, int threads)
{
    bool blas = strcmp(isa, "openblas") == 0;
    tp_ctx_init(ctx);
    setenv("TAPEFT_CPU", blas ? "generic" : isa, 1);
    setenv("TAPEFT_BLAS", blas ? "" : "none", 1);
    tp_status status = tp_cpu_backend.open(ctx, 0, threads, &ctx->device);
    unsetenv("TAPEFT_CPU");
    unsetenv("TAPEFT_BLAS");
    return status;
}

static void close_cpu(tp_ctx *ctx)
{
    tp_cpu_backend.close(ctx->device);
}

/* Runs `body` with every engine that this CPU can run; prints which it cannot. */
static void with_engines(int threads, void (*body)(tp_ctx *ctx, const tp_mm_engine *engine))
{
    static const char *const isas[] = {"generic", "openblas", "avx2", "avx512", "bf16"};
    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++) {
        tp_ctx ctx;
        if (open_cpu(&ctx, isas[i], threads) != TP_OK) {
            print_message("not run: %s\n", ctx.message);
            continue;
        }
        body(&ctx, tp_mm_engine_for(tp_cpu_of(&ctx), TP_BF16));
#if defined(__x86_64__)
        if (strcmp(isas[i], "avx512") == 0) {
            tp_mm_engine plain = tp_mm_bf16_dot; /* its packing, on any AVX-512 machine */
            plain.name = "bf16_dot in plain C";
            plain.tile = tp_mm_bf16_dot_tile_plain;
            body(&ctx, &plain);
        }
#endif
        close_cpu(&ctx);
    }
}

/* ---- tests ---- */

static void sample_products(tp_ctx *ctx, const tp_mm_engine *engine)
{
    state = 7;
    for (int i = 0; i < 700; i++) {
        shape s = next_shape();
        check(ctx, engine, &s);
    }
}

static void test_products(void **unused)
{
    (void)unused;
    with_engines(2, sample_products);
}

/* Every size of every dimension, in both directions, with each format, in the small. */
static void every_size(tp_ctx *ctx, const tp_mm_engine *engine)
{
    state = 8;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        for (int f = 0; f < TP_FORMAT_COUNT; f++) {
            shape s = {.n = 9,
                       .m = 33,
                       .k = 34,
                       .format = (tp_format_id)f,
                       .alpha = 1,
                       .precision = TP_BF16,
                       .a_dtype = TP_BF16,
                       .c_dtype = TP_F32};
            for (int nt = 0; nt < 2; nt++) {
                s.nt = nt != 0;
                shape n = s, m = s, k = s, few = s;
                n.n = m.m = k.k = few.k = sizes[i];
                few.n = 1 + below(TP_MM_FEW - 1);
                check(ctx, engine, &n);
                check(ctx, engine, &m);
                check(ctx, engine, &k);
                check(ctx, engine, &few);
            }
        }
    }
}

static void test_every_size(void **unused)
{
    (void)unused;
    with_engines(1, every_size);
}

/* k so long that the left side does not fit the workspace, n over one pass, m over one group of columns. */
static void large_products(tp_ctx *ctx, const tp_mm_engine *engine)
{
    state = 9;
    if (strcmp(engine->name, "avx512") != 0 && strcmp(engine->name, "avx2") != 0 && strcmp(engine->name, "bf16_dot") != 0)
        return;
    shape s = {.n = 515,
               .m = 40,
               .k = 12000,
               .nt = true,
               .format = TP_FORMAT_BF16,
               .a_dtype = TP_BF16,
               .c_dtype = TP_BF16,
               .precision = TP_BF16,
               .alpha = 0.5f,
               .beta = 1,
               .bias = true};
    check(ctx, engine, &s);
    s = (shape){.n = 1200,
                .m = 70,
                .k = 65,
                .format = TP_FORMAT_Q4_1,
                .c_dtype = TP_F32,
                .a_dtype = TP_F32,
                .precision = TP_F32,
                .alpha = 1};
    check(ctx, engine, &s);
    s = (shape){.n = 520,
                .m = 2500,
                .k = 40,
                .nt = true,
                .format = TP_FORMAT_F32,
                .c_dtype = TP_F32,
                .a_dtype = TP_F32,
                .precision = TP_F32,
                .alpha = 1};
    check(ctx, engine, &s);
    s = (shape){.n = 3,
                .m = 5,
                .k = 1300000,
                .nt = true,
                .format = TP_FORMAT_F32,
                .c_dtype = TP_F32,
                .a_dtype = TP_F32,
                .precision = TP_F32,
                .alpha = 1};
    check(ctx, engine, &s);
}

static void test_large(void **unused)
{
    (void)unused;
    with_engines(2, large_products);
}

static void empty_products(tp_ctx *ctx, const tp_mm_engine *engine)
{
    state = 10;
    shape s = {.n = 9,
               .m = 5,
               .k = 0,
               .nt = true,
               .format = TP_FORMAT_F32,
               .a_dtype = TP_F32,
               .c_dtype = TP_F32,
               .precision = TP_F32,
               .alpha = 1,
               .beta = 2,
               .bias = true};
    check(ctx, engine, &s);
    s.n = 0, s.k = 3;
    check(ctx, engine, &s);
    s.n = 3, s.m = 0;
    check(ctx, engine, &s);
}

static void test_empty(void **unused)
{
    (void)unused;
    with_engines(1, empty_products);
}

/* NaN and infinity pass through: 0 * inf in a row is NaN in that row alone. */
static void not_finite(tp_ctx *ctx, const tp_mm_engine *engine)
{
    state = 11;
    rows a = rows_new(20, 33, TP_F32, 33), c = rows_new(20, 40, TP_F32, 40);
    matrix b = matrix_new(TP_FORMAT_F32, 40, 33, 0, false, 0, false);
    rows_set(&a.view, 3 * 33 + 32, NAN);
    rows_set(&a.view, 5 * 33, INFINITY);
    ((float *)b.memory.data)[39 * 33 + 32] = INFINITY;
    tp_matmul_args args = {
        .n = 20, .m = 40, .k = 33, .a = a.view, .b = b.view, .nt = true, .c = c.view, .alpha = 1, .precision = TP_BF16};
    for (int few = 0; few < 2; few++) {
        if (few) args.n = 6;
        assert_ok(ctx, tp_mm_run(ctx, engine, &args));
        for (int64_t i = 0; i < args.n; i++) {
            for (int64_t j = 0; j < 40; j++) {
                double x = rows_get(&c.view, i * 40 + j);
                if (i == 3)
                    assert_true(isnan(x));
                else if (i == 5 || j == 39)
                    assert_true(!isfinite(x));
                else
                    assert_true(isfinite(x));
            }
        }
    }
    rows_free(&a);
    rows_free(&c);
    matrix_free(&b);
}

static void test_not_finite(void **unused)
{
    (void)unused;
    with_engines(1, not_finite);
}

/* ---- low-rank parts ---- */

static double dot_of(const double *a, int64_t a_step, const double *b, int64_t b_step, int64_t k, bool rounds,
                     double *magnitude)
{
    double sum = 0;
    for (int64_t l = 0; l < k; l++) {
        double product = bf16_if(rounds, a[l * a_step]) * bf16_if(rounds, b[l * b_step]);
        sum += product;
        *magnitude += fabs(product);
    }
    return sum;
}

/* Tolerances as in `check`: `low` is a product of k, c one of k + rank, of which rank are the values in `low`. */
static void check_lowrank(tp_ctx *ctx, const tp_mm_engine *engine, const shape *s, int64_t rank, bool given)
{
    rows a = rows_new(s->n, s->k, s->a_dtype, s->k + s->pad), c = rows_new(s->n, s->m, s->c_dtype, s->m + s->pad);
    rows low = rows_new(s->n, rank, TP_F32, rank + s->pad);
    matrix b =
        matrix_new(s->format, s->nt ? s->m : s->k, s->nt ? s->k : s->m, s->pad, s->transposed, s->rope_pairs, s->round_bf16);
    matrix down = matrix_new(TP_FORMAT_F32, s->nt ? rank : s->k, s->nt ? s->k : rank, 0, false, 0, false);
    matrix up = matrix_new(TP_FORMAT_F32, s->nt ? s->m : rank, s->nt ? rank : s->m, 0, false, 0, false);
    tp_lowrank_args lowrank = {.rank = rank, .scaling = 0.75f, .low = low.view, .up = up.view};
    if (!given) lowrank.down = down.view;
    tp_matmul_args args = {.n = s->n, .m = s->m, .k = s->k, .a = a.view, .b = b.view, .nt = s->nt, .c = c.view};
    args.alpha = s->alpha;
    args.beta = s->beta;
    args.precision = s->precision;
    args.lowrank = &lowrank;
    assert_ok(ctx, tp_mm_run(ctx, engine, &args));

    bool rounds = engine->per_word == 2 && s->n >= TP_MM_FEW;
    char text[300];
    describe(s, text);
    for (int64_t i = 0; i < s->n; i++) {
        for (int64_t r = 0; r < rank; r++) {
            double magnitude = 0, got = rows_get(&low.view, i * low.view.ld + r), expected = low.values[i * rank + r];
            if (!given)
                expected = 0.75 * dot_of(a.values + i * s->k, 1, down.values + (s->nt ? r * s->k : r), s->nt ? 1 : rank, s->k,
                                         rounds, &magnitude);
            if (!(fabs(got - expected) <= 0x1p-24 * (magnitude * (4 * sqrt((double)s->k) + 4) + 4)))
                fail_msg("%s, %s rank=%lld given=%d: low[%lld, %lld] is %.9g, expected %.9g", engine->name, text,
                         (long long)rank, given, (long long)i, (long long)r, got, expected);
            low.values[i * rank + r] = got;
        }
        for (int64_t j = 0; j < s->m; j++) {
            double magnitude = 0, old = s->beta != 0 ? s->beta * c.values[i * s->m + j] : 0;
            double sum =
                dot_of(a.values + i * s->k, 1, b.values + (s->nt ? j * s->k : j), s->nt ? 1 : s->m, s->k, rounds, &magnitude);
            sum += dot_of(low.values + i * rank, 1, up.values + (s->nt ? j * rank : j), s->nt ? 1 : s->m, rank, rounds,
                          &magnitude);
            double got = rows_get(&c.view, i * c.view.ld + j), expected = s->alpha * sum + old;
            double limit =
                0x1p-24 * (fabs((double)s->alpha) * magnitude * (4 * sqrt((double)(s->k + rank)) + 4) + 8 * (fabs(old) + 4));
            if (s->c_dtype == TP_BF16)
                limit += 2 * 0x1.1p-8 * (fabs((double)s->alpha) * magnitude + fabs(old)); /* in parts: rounded twice */
            if (!(fabs(got - expected) <= limit))
                fail_msg("%s, %s rank=%lld given=%d: c[%lld, %lld] is %.9g, expected %.9g within %.3g", engine->name, text,
                         (long long)rank, given, (long long)i, (long long)j, got, expected, limit);
        }
    }
    rows_free(&a);
    rows_free(&c);
    rows_free(&low);
    matrix_free(&b);
    matrix_free(&down);
    matrix_free(&up);
}

static void check_lowranks(tp_ctx *ctx, const tp_mm_engine *engine)
{
    static const int64_t ranks[] = {1, 2, 7, 8, 16, 33, 64, 65}, depths[] = {96, 128, 576, 640, 1248};
    int folded = 0;
    for (int i = 0; i < 120; i++) {
        shape s = next_shape();
        s.bias = s.residual = s.residual_is_c = false;
        if (i % 3 != 0) s.k = depths[below(5)], s.m = 65 + below(200), s.n = 8 + below(60); /* most of these fold */
        if (s.rope_pairs > 0 && (s.nt ? s.m : s.k) % s.rope_pairs != 0) s.rope_pairs = 0;
        int64_t rank = ranks[below(8)];
        tp_mm_lowrank lowrank = {.rank = rank};
        tp_mm_product p = {.n = s.n, .m = s.m, .k = s.k, .lowrank = &lowrank};
        folded += tp_mm_folds(tp_cpu_of(ctx), engine, &p);
        check_lowrank(ctx, engine, &s, rank, below(3) == 0);
    }
    assert_true(folded > 20 || tp_cpu_of(ctx)->openblas != NULL);
    shape large = {.n = 530, .m = 200, .k = 640, .nt = true, .format = TP_FORMAT_BF16, .alpha = 1, .beta = 1};
    large.a_dtype = large.c_dtype = large.precision = TP_F32;
    check_lowrank(ctx, engine, &large, 16, false); /* two passes over the rows */
}

static void test_lowrank(void **data)
{
    (void)data;
    state = 11;
    with_engines(2, check_lowranks);
}

/* ---- c = a^T b ---- */

static void check_tn(tp_ctx *ctx, int64_t n, int64_t m, int64_t k, tp_dtype a_dtype, tp_dtype b_dtype, float alpha, float beta)
{
    rows a = rows_new(n, m, a_dtype, m + 3), b = rows_new(n, k, b_dtype, k + 1), c = rows_new(m, k, TP_F32, k);
    if (beta == 0) {
        for (int64_t i = 0; i < m * k; i++) rows_set(&c.view, i, NAN);
    }
    tp_matmul_tn_args args = {.n = n, .m = m, .k = k, .a = a.view, .b = b.view, .c = c.view.data, .alpha = alpha, .beta = beta};
    assert_ok(ctx, tp_cpu_matmul_tn(ctx, &args));
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < k; j++) {
            double sum = 0, magnitude = 0, old = beta != 0 ? beta * c.values[i * k + j] : 0;
            for (int64_t l = 0; l < n; l++) {
                double x = a.values[l * m + i] * b.values[l * k + j];
                sum += x;
                magnitude += fabs(x);
            }
            double limit = 0x1p-24 * (fabs((double)alpha) * magnitude * (4 * sqrt((double)n) + 4) + 4 * fabs(old));
            double got = rows_get(&c.view, i * k + j), expected = alpha * sum + old;
            if (!(fabs(got - expected) <= limit))
                fail_msg("tn n=%lld m=%lld k=%lld %s %s: c[%lld, %lld] is %.9g, expected %.9g", (long long)n, (long long)m,
                         (long long)k, tp_dtype_name(a_dtype), tp_dtype_name(b_dtype), (long long)i, (long long)j, got,
                         expected);
        }
    }
    rows_free(&a);
    rows_free(&b);
    rows_free(&c);
}

static void sample_tn(tp_ctx *ctx, const tp_mm_engine *engine)
{
    if (strcmp(engine->name, "bf16_dot in plain C") == 0) return; /* matmul_tn is an f32 product */
    state = 12;
    for (int i = 0; i < 200; i++) {
        int64_t n = next_size(), m = next_size(), k = next_size();
        if (n * m * k > 4000000) m = 1 + below(40);
        check_tn(ctx, n, m, k, below(2) == 0 ? TP_F32 : TP_BF16, below(2) == 0 ? TP_F32 : TP_BF16, i % 3 == 0 ? 0.5f : 1.0f,
                 i % 2 == 0 ? 0.0f : 1.0f);
    }
    check_tn(ctx, 0, 5, 7, TP_F32, TP_F32, 1, 0);
    check_tn(ctx, 0, 5, 7, TP_F32, TP_F32, 1, 1);
    check_tn(ctx, 5, 0, 7, TP_F32, TP_F32, 1, 1);
    check_tn(ctx, 9, 600, 530, TP_F32, TP_BF16, 1, 1);
}

static void test_tn(void **unused)
{
    (void)unused;
    with_engines(2, sample_tn);
}

/* ---- bits ---- */

/* Runs a product on a device with `threads` threads; returns c, to be freed. */
static float *bits_of(const char *isa, int threads, int64_t n, int64_t m, int64_t k, bool nt, tp_format_id format, bool tn)
{
    tp_ctx ctx;
    assert_ok(&ctx, open_cpu(&ctx, isa, threads));
    state = 13;
    float *c = calloc((size_t)(tn ? m * k : n * m), sizeof *c);
    assert_non_null(c);
    if (tn) {
        rows a = rows_new(n, m, TP_F32, m), b = rows_new(n, k, TP_BF16, k);
        tp_matmul_tn_args args = {.n = n, .m = m, .k = k, .a = a.view, .b = b.view, .c = c, .alpha = 1};
        assert_ok(&ctx, tp_cpu_matmul_tn(&ctx, &args));
        rows_free(&a);
        rows_free(&b);
    } else {
        matrix b = matrix_new(format, nt ? m : k, nt ? k : m, 0, false, 0, false);
        rows a = rows_new(n, k, TP_F32, k);
        tp_matmul_args args = {
            .n = n, .m = m, .k = k, .a = a.view, .b = b.view, .nt = nt, .c = {c, TP_F32, m}, .alpha = 1, .precision = TP_BF16};
        assert_ok(&ctx, tp_cpu_matmul(&ctx, &args));
        rows_free(&a);
        matrix_free(&b);
    }
    close_cpu(&ctx);
    return c;
}

static const char *const all_isas[] = {"generic", "avx2", "avx512", "bf16", "openblas"};
static const size_t n_own = 4; /* all but OpenBLAS, whose sums may depend on the shape */

static bool runs(const char *isa)
{
    tp_ctx ctx;
    if (open_cpu(&ctx, isa, 1) != TP_OK) {
        print_message("not run: %s\n", ctx.message);
        return false;
    }
    close_cpu(&ctx);
    return true;
}

static void test_threads_do_not_change_bits(void **unused)
{
    (void)unused;
    static const int64_t shapes[][3] = {{1, 300, 576}, {5, 257, 100}, {64, 576, 257}, {300, 16, 576}, {530, 33, 700}};
    for (size_t v = 0; v < sizeof all_isas / sizeof *all_isas; v++) {
        if (!runs(all_isas[v])) continue;
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
            for (int form = 0; form < 3; form++) {
                int64_t n = shapes[i][0], m = shapes[i][1], k = shapes[i][2];
                float *one = bits_of(all_isas[v], 1, n, m, k, form == 0, TP_FORMAT_Q4_1, form == 2);
                for (int threads = 2; threads <= 3; threads++) {
                    float *more = bits_of(all_isas[v], threads, n, m, k, form == 0, TP_FORMAT_Q4_1, form == 2);
                    assert_memory_equal(one, more, (size_t)(form == 2 ? m * k : n * m) * sizeof *one);
                    free(more);
                }
                free(one);
            }
        }
    }
}

/* From 8 rows on a row's result does not depend on how many rows there are, nor does it from 1 to 7. */
static void test_batch_does_not_change_bits(void **unused)
{
    (void)unused;
    for (size_t v = 0; v < n_own; v++) {
        if (!runs(all_isas[v])) continue;
        for (int nt = 0; nt < 2; nt++) {
            float *many = bits_of(all_isas[v], 2, 600, 50, 577, nt != 0, TP_FORMAT_F32, false);
            float *some = bits_of(all_isas[v], 2, 8, 50, 577, nt != 0, TP_FORMAT_F32, false);
            float *seven = bits_of(all_isas[v], 2, 7, 50, 577, nt != 0, TP_FORMAT_F32, false);
            float *one = bits_of(all_isas[v], 2, 1, 50, 577, nt != 0, TP_FORMAT_F32, false);
            assert_memory_equal(many, some, 8 * 50 * sizeof *many);
            assert_memory_equal(seven, one, 50 * sizeof *one);
            free(many);
            free(some);
            free(seven);
            free(one);
        }
    }
}

/* What an engine unpacks is what the format's definition decodes, bit for bit, NaN scales and all-ones blocks included:
 * products with a unit matrix would round, so the panel itself is looked at. */
static void unpack_is_decode(tp_ctx *ctx, const tp_mm_engine *engine)
{
    enum { ROWS = 41, COLS = 96 };
    (void)ctx;
    state = 14;
    float *panel = aligned_alloc(64, (size_t)TP_MM_KC_WORDS * 32 * sizeof *panel);
    assert_non_null(panel);
    for (int f = 0; f < TP_FORMAT_COUNT; f++) {
        for (int form = 0; form < 4; form++) {
            bool along = form % 2 == 0, round = form >= 2 && f != TP_FORMAT_BF16;
            matrix w = matrix_new((tp_format_id)f, ROWS, COLS, 0, false, 0, false);
            unsigned char *bytes = w.memory.data;
            for (size_t i = 0; i < w.memory.bytes; i++) bytes[i] = i % 5 == 0 ? 0xff : (unsigned char)next_bits();
            tp_mm_right b = {.format = (tp_format_id)f,
                             .data = bytes,
                             .row_bytes = tp_format_row_bytes((tp_format_id)f, COLS),
                             .k = along ? COLS : ROWS,
                             .m = along ? ROWS : COLS,
                             .along_k = along,
                             .round_bf16 = round};
            for (int64_t col = 0; col < b.m; col += engine->nr) {
                int cols = (int)tp_mm_min(engine->nr, b.m - col);
                engine->unpack(&b, 0, b.k, col, cols, panel);
                for (int64_t k = 0; k < b.k; k++) {
                    for (int c = 0; c < cols; c++) {
                        float expected, got;
                        int64_t in = along ? k : col + c;
                        tp_mm_decode(&b, tp_mm_stored_row(&b, along ? col + c : k), in, 1, &expected);
                        if (engine->per_word == 1)
                            got = panel[k * engine->nr + c];
                        else
                            got = tp_bf16_to_f32(((uint16_t *)panel)[(k / 2 * engine->nr + c) * 2 + k % 2]);
                        if (engine->per_word == 2) expected = tp_bf16_to_f32(tp_f32_to_bf16(expected));
                        if (isnan(expected) ? !isnan(got) : tp_f32_bits(got) != tp_f32_bits(expected))
                            fail_msg("%s, %s, along=%d round=%d: [%lld, %lld] is %.9g, expected %.9g", engine->name,
                                     tp_formats[f].name, along, round, (long long)k, (long long)(col + c), (double)got,
                                     (double)expected);
                    }
                }
            }
            matrix_free(&w);
        }
    }
    free(panel);
}

static void test_unpack_is_decode(void **unused)
{
    (void)unused;
    with_engines(1, unpack_is_decode);
}

static void test_refusals(void **unused)
{
    (void)unused;
    tp_ctx ctx;
    assert_ok(&ctx, open_cpu(&ctx, "", 1));
    float x[64] = {0};
    tp_matmul_args args = {
        .n = 1, .m = 4, .k = 4, .a = {x, TP_F32, 4}, .nt = true, .c = {x, TP_F32, 4}, .alpha = 1, .precision = TP_F32};
    args.b = (tp_matrix){TP_FORMAT_COUNT, x, 4, 4, 0, false, 0, false};
    assert_status(&ctx, TP_UNSUPPORTED, tp_cpu_matmul(&ctx, &args));
    args.b = (tp_matrix){TP_FORMAT_Q8_0, x, 4, 4, 0, true, 0, false};
    assert_status(&ctx, TP_UNSUPPORTED, tp_cpu_matmul(&ctx, &args));
    args.b = (tp_matrix){TP_FORMAT_F32, x, 4, 5, 0, false, 0, false};
    assert_status(&ctx, TP_INTERNAL, tp_cpu_matmul(&ctx, &args));
    close_cpu(&ctx);
    setenv("TAPEFT_CPU", "pentium", 1);
    assert_status(&ctx, TP_INVALID, tp_cpu_backend.open(&ctx, 0, 1, &ctx.device));
    unsetenv("TAPEFT_CPU");
    assert_status(&ctx, TP_DEVICE, tp_cpu_backend.open(&ctx, 1, 1, &ctx.device));
}

static void test_device(void **unused)
{
    (void)unused;
    tp_ctx ctx;
    assert_ok(&ctx, open_cpu(&ctx, "", 2));
    const tp_backend *b = ctx.device->backend;
    static const size_t amounts[] = {0, 1, 255, 4097, 5 << 20};
    for (size_t i = 0; i < sizeof amounts / sizeof *amounts; i++) {
        unsigned char *p = b->alloc(&ctx, ctx.device, amounts[i]);
        assert_non_null(p);
        assert_int_equal((uintptr_t)p % 256, 0);
        for (size_t j = 0; j < amounts[i]; j++) assert_int_equal(p[j], 0);
        b->free(ctx.device, p, amounts[i]);
    }
    assert_null(b->alloc(&ctx, ctx.device, SIZE_MAX - 8));
    assert_int_equal(ctx.status, TP_NOMEM);
    tp_buf json;
    tp_buf_init(&json, 0);
    b->describe(ctx.device, &json);
    assert_non_null(strstr(tp_buf_cstr(&json), "\"threads\": 2"));
    tp_buf_free(&json);
    close_cpu(&ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_products),
        cmocka_unit_test(test_every_size),
        cmocka_unit_test(test_large),
        cmocka_unit_test(test_empty),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_lowrank),
        cmocka_unit_test(test_tn),
        cmocka_unit_test(test_threads_do_not_change_bits),
        cmocka_unit_test(test_batch_does_not_change_bits),
        cmocka_unit_test(test_unpack_is_decode),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_device),
    };
    return cmocka_run_group_tests_name("backend/matmul", tests, NULL, NULL);
}
