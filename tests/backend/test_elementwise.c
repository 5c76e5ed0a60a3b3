/* add, scale, dropout, column_sum, gather_rows, scatter_rows. All but column_sum are exact: bits are compared. */
#include "tests/backend/kernels.h"

#include "base/rng.h"

static const int64_t shapes[][2] = {{0, 4}, {1, 1}, {3, 7}, {2, 16}, {5, 33}, {70, 100}, {40, 1030}};
#define N_SHAPES (sizeof shapes / sizeof shapes[0])

/* What storing v in x's type gives. */
static double stored(tp_rows x, float v)
{
    return (double)(x.dtype == TP_BF16 ? tp_bf16_to_f32(tp_f32_to_bf16(v)) : v);
}

static void expect(tp_rows x, int64_t r, int64_t c, double want, const char *isa, const char *name)
{
    if (at(x, r, c) != want)
        fail_msg("%s: %s[%lld, %lld]: got %.9g, expected %.9g", isa, name, (long long)r, (long long)c, at(x, r, c), want);
}

/* Elements between the rows must be as they were. */
static void expect_gaps(tp_rows x, tp_rows before, int64_t n, int64_t columns, const char *isa)
{
    for (int64_t r = 0; r < n; r++) {
        for (int64_t c = columns; c < x.ld; c++) expect(x, r, c, at(before, r, c), isa, "gap");
    }
}

typedef struct pair_case {
    tp_add_args add;
    tp_scale_args scale;
    tp_rows before;
} pair_case;

static void run_pair(tp_ctx *ctx, void *data)
{
    pair_case *t = data;
    assert_ok(ctx, tp_run_scale(ctx, &t->scale));
    assert_ok(ctx, tp_run_add(ctx, &t->add));
}

static void check_pair(void *data, const char *isa)
{
    pair_case *t = data;
    for (int64_t r = 0; r < t->add.n; r++) {
        for (int64_t c = 0; c < t->add.dim; c++) {
            float x = (float)at(t->scale.x, r, c);
            expect(t->scale.y, r, c, t->scale.alpha == 0 ? 0 : stored(t->scale.y, t->scale.alpha * x), isa, "scale");
            expect(t->add.z, r, c, stored(t->add.z, (float)at(t->add.x, r, c) + (float)at(t->add.y, r, c)), isa, "add");
        }
    }
    expect_gaps(t->scale.y, t->before, t->scale.n, t->scale.dim, isa);
}

static void test_add_scale(void **state)
{
    (void)state;
    static const float alphas[] = {0.0f, 1.0f, -0.37f};
    for (size_t s = 0; s < N_SHAPES; s++) {
        for (int i = 0; i < 24; i++) {
            int64_t n = shapes[s][0], dim = shapes[s][1];
            tp_dtype a = i & 1 ? TP_BF16 : TP_F32, b = i & 2 ? TP_BF16 : TP_F32, c = i & 4 ? TP_BF16 : TP_F32;
            tp_rows x = new_rows(n, dim, 2, a, 3), y = new_rows(n, dim, 1, b, 3), z = new_rows(n, dim, 3, c, 3),
                    w = new_rows(n, dim, 3, b, 3);
            pair_case t = {.add = {n, dim, x, y, z}, .scale = {n, dim, x, w, alphas[i / 8]}, .before = copy_rows(w, n)};
            kernel_outputs o = {.n = 0};
            add_output(&o, z.data, rows_bytes(z, n));
            add_output(&o, w.data, rows_bytes(w, n));
            run_everywhere(&o, run_pair, check_pair, &t);
            free(x.data), free(y.data), free(z.data), free(w.data), free(t.before.data);
        }
    }
}

static void test_in_place(void **state)
{
    (void)state;
    for (int i = 0; i < 3; i++) {
        if (!devices[i].there) continue;
        tp_ctx ctx;
        tp_ctx_init(&ctx);
        ctx.device = devices[i].device[1];
        float x[100], y[100];
        for (int k = 0; k < 100; k++) x[k] = (float)k, y[k] = 0.5f;
        tp_add_args a = {1, 100, {x, TP_F32, 100}, {y, TP_F32, 100}, {x, TP_F32, 100}};
        assert_ok(&ctx, tp_run_add(&ctx, &a));
        tp_scale_args s = {1, 100, {x, TP_F32, 100}, {x, TP_F32, 100}, 2.0f};
        assert_ok(&ctx, tp_run_scale(&ctx, &s));
        for (int k = 0; k < 100; k++) assert_true(x[k] == 2.0f * ((float)k + 0.5f));
        x[0] = NAN;
        s.alpha = 0;
        assert_ok(&ctx, tp_run_scale(&ctx, &s)); /* x is not read */
        assert_true(x[0] == 0 && x[99] == 0);
        s.x.dtype = TP_F16;
        s.alpha = 1;
        assert_status(&ctx, TP_UNSUPPORTED, tp_run_scale(&ctx, &s));
    }
}

static void run_dropout(tp_ctx *ctx, void *data)
{
    assert_ok(ctx, tp_run_dropout(ctx, data));
}

static tp_rows dropout_before;

static void check_dropout(void *data, const char *isa)
{
    const tp_dropout_args *a = data;
    float factor = (float)(1 / (1 - (double)a->p));
    for (int64_t r = 0; r < a->n; r++) {
        for (int64_t c = 0; c < a->dim; c++) {
            tp_rng_key key = a->key;
            if (a->state != NULL) key.step = a->state->draw;
            float uniform = tp_rng_uniform(key, (uint64_t)((a->first_row + r) * a->dim + c));
            float want = uniform >= a->p ? (float)at(a->x, r, c) * factor : 0.0f;
            if (a->accumulate) want += (float)at(dropout_before, r, c);
            expect(a->y, r, c, stored(a->y, want), isa, "dropout");
        }
    }
    expect_gaps(a->y, dropout_before, a->n, a->dim, isa);
}

static void test_dropout(void **state)
{
    (void)state;
    static const float chances[] = {0.0f, 0.1f, 0.5f, 0.999f, 1.0f};
    static const tp_rng_key keys[] = {{0, 0, 0}, {0x123456789abcdef0u, 0x03000007u, 5}, {~(uint64_t)0, ~0u, ~(uint64_t)0}};
    for (size_t s = 0; s < N_SHAPES; s++) {
        for (int i = 0; i < 30; i++) {
            int64_t n = shapes[s][0], dim = shapes[s][1];
            tp_rows x = new_rows(n, dim, 1, i & 1 ? TP_BF16 : TP_F32, 3), y = new_rows(n, dim, 2, i & 2 ? TP_BF16 : TP_F32, 3);
            tp_step_state now = {.draw = ((uint64_t)9 << 32) + (uint64_t)i};
            tp_dropout_args a = {n,          dim, x, y, chances[i % 5], keys[i % 3], i % 4 == 0 ? 0 : (int64_t)1 << (i + 8),
                                 i % 7 == 0, NULL};
            if (i % 3 == 1) a.state = &now;
            if (a.p == 1.0f) a.accumulate = false;
            dropout_before = copy_rows(y, n);
            kernel_outputs o = {.n = 0};
            add_output(&o, y.data, rows_bytes(y, n));
            run_everywhere(&o, run_dropout, check_dropout, &a);
            free(x.data), free(y.data), free(dropout_before.data);
        }
    }
}

static float *column_before;

static void run_column_sum(tp_ctx *ctx, void *data)
{
    assert_ok(ctx, tp_run_column_sum(ctx, data));
}

static void check_column_sum(void *data, const char *isa)
{
    const tp_column_sum_args *a = data;
    for (int64_t c = 0; c < a->m; c++) {
        double sum = a->beta != 0 ? (double)column_before[c] : 0, size = fabs(sum);
        for (int64_t r = 0; r < a->n; r++) {
            sum += at(a->a, r, c);
            size += fabs(at(a->a, r, c));
        }
        /* sums of 64 rows, then of up to 5 such sums; errors mostly cancel */
        assert_near((double)a->out[c], sum, 8 * 0x1p-24 * size, "%s: column %lld of %lld x %lld", isa, (long long)c,
                    (long long)a->n, (long long)a->m);
    }
}

static void test_column_sum(void **state)
{
    (void)state;
    static const int64_t sizes[][2] = {{0, 5}, {1, 1}, {63, 3}, {64, 16}, {65, 64}, {300, 65}, {130, 257}};
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        for (int i = 0; i < 4; i++) {
            int64_t n = sizes[s][0], m = sizes[s][1];
            tp_column_sum_args a = {n, m, new_rows(n, m, 3, i & 1 ? TP_BF16 : TP_F32, 1), new_floats(m, 1),
                                    i & 2 ? 1.0f : 0.0f};
            column_before = memcpy(new_floats(m, 1), a.out, (size_t)m * 4);
            kernel_outputs o = {.n = 0};
            add_output(&o, a.out, (size_t)m * 4);
            run_everywhere(&o, run_column_sum, check_column_sum, &a);
            free(a.a.data), free(a.out), free(column_before);
        }
    }
}

typedef struct move_case {
    tp_gather_rows_args gather;
    tp_scatter_rows_args scatter;
    tp_rows before;
} move_case;

static void run_moves(tp_ctx *ctx, void *data)
{
    move_case *t = data;
    assert_ok(ctx, tp_run_gather_rows(ctx, &t->gather));
    assert_ok(ctx, tp_run_scatter_rows(ctx, &t->scatter));
}

static void check_moves(void *data, const char *isa)
{
    move_case *t = data;
    int64_t dim = t->gather.dim, i = 0;
    for (int64_t r = 0; r < t->gather.n; r++) {
        int32_t from = t->gather.index[r];
        for (int64_t c = 0; c < dim; c++)
            expect(t->gather.out, r, c, from < 0 ? 0 : stored(t->gather.out, (float)at(t->gather.in, from, c)), isa, "gather");
    }
    for (int64_t r = 0; r < t->scatter.rows; r++) {
        bool here = i < t->scatter.n && t->scatter.index[i] == r;
        for (int64_t c = 0; c < dim; c++) {
            double want = t->scatter.zero_rest ? 0 : at(t->before, r, c);
            if (here) want = stored(t->scatter.out, (float)at(t->scatter.in, i, c));
            expect(t->scatter.out, r, c, want, isa, "scatter");
        }
        i += here;
    }
    expect_gaps(t->scatter.out, t->before, t->scatter.rows, dim, isa);
}

static void test_gather_scatter(void **state)
{
    (void)state;
    static const int32_t indices[][6] = {{0, 1, 2, 3, 4, 5},     {1, 4, 5, 9, 30, 39}, {0, 7, 8, 20, 21, 38},
                                         {3, 4, 39, -1, -1, -1}, {0, 5, 6, 7, -1, -1}, {-1, -1, -1, -1, -1, -1}};
    for (int i = 0; i < 48; i++) {
        for (int64_t n = 0; n <= 6; n += 3) {
            int64_t dim = i % 2 ? 33 : 4000;
            tp_dtype a = i & 2 ? TP_BF16 : TP_F32, b = i & 4 ? TP_BF16 : TP_F32;
            tp_rows table = new_rows(40, dim, 2, a, 1), picked = new_rows(n, dim, 1, b, 1);
            tp_rows in = new_rows(n, dim, 3, a, 1), out = new_rows(40, dim, 5, b, 1);
            const int32_t *index = indices[i / 8];
            move_case t = {{n, dim, index, table, picked}, {n, dim, 40, index, in, out, i & 1}, copy_rows(out, 40)};
            kernel_outputs o = {.n = 0};
            add_output(&o, picked.data, rows_bytes(picked, n));
            add_output(&o, out.data, rows_bytes(out, 40));
            run_everywhere(&o, run_moves, check_moves, &t);
            free(table.data), free(picked.data), free(in.data), free(out.data), free(t.before.data);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_add_scale), cmocka_unit_test(test_in_place),
                                       cmocka_unit_test(test_dropout), cmocka_unit_test(test_column_sum),
                                       cmocka_unit_test(test_gather_scatter)};
    return cmocka_run_group_tests(tests, open_devices, close_devices);
}
