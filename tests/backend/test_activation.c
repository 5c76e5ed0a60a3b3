/* SwiGLU and GELU with their gradients against float64; the slopes of the reference are checked by differences. */
#include "tests/backend/kernels.h"

enum { SWIGLU, GELU_TANH, GELU_EXACT };

static double sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

static double reference(int kind, double x)
{
    if (kind == SWIGLU) return x * sigmoid(x);
    if (kind == GELU_EXACT) return 0.5 * x * erfc(-x / sqrt(2));
    return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

static double slope(int kind, double x)
{
    if (kind == SWIGLU) return sigmoid(x) * (1 + x * (1 - sigmoid(x)));
    if (kind == GELU_EXACT) return 0.5 * erfc(-x / sqrt(2)) + x * exp(-0.5 * x * x) / sqrt(2 * M_PI);
    double t = tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x));
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
}

typedef struct activation_case {
    int kind;
    int64_t n, dim;
    bool in_place;
    tp_rows x, up, dy, y, dx, dup;
    tp_rows x0, up0, dy0; /* what x, up and dy were */
} activation_case;

static void run_activation(tp_ctx *ctx, void *data)
{
    activation_case *t = data;
    if (t->kind == SWIGLU) {
        tp_swiglu_args f = {t->n, t->dim, t->x, t->up, t->y};
        assert_ok(ctx, tp_run_swiglu(ctx, &f));
        tp_swiglu_backward_args b = {t->n, t->dim, t->x, t->up, t->dy, t->dx, t->dup};
        if (t->in_place) b.dgate = t->x, b.dup = t->up;
        assert_ok(ctx, tp_run_swiglu_backward(ctx, &b));
    } else {
        tp_gelu_args f = {t->n, t->dim, t->x, t->y, t->kind == GELU_EXACT};
        assert_ok(ctx, tp_run_gelu(ctx, &f));
        tp_gelu_backward_args b = {t->n, t->dim, t->x, t->dy, t->in_place ? t->dy : t->dx, t->kind == GELU_EXACT};
        assert_ok(ctx, tp_run_gelu_backward(ctx, &b));
    }
}

static void check_activation(void *data, const char *isa)
{
    activation_case *t = data;
    tp_rows dx = !t->in_place ? t->dx : t->kind == SWIGLU ? t->x : t->dy, dup = t->in_place ? t->up : t->dup;
    for (int64_t r = 0; r < t->n; r++) {
        for (int64_t c = 0; c < t->dim; c++) {
            double x = at(t->x0, r, c), up = t->kind == SWIGLU ? at(t->up0, r, c) : 1, dy = at(t->dy0, r, c);
            double y = reference(t->kind, x) * up, d = slope(t->kind, x) * up * dy, error = 16 * 0x1p-24;
            /* GELU's step loses relative precision where it nears 0: its absolute error is some roundings of 1 */
            assert_near(at(t->y, r, c), y, rounding(t->y.dtype, y) + error * (fabs(x * up) + 0x1p-20), "%s: kind %d, f(%.9g)",
                        isa, t->kind, x);
            assert_near(at(dx, r, c), d, rounding(dx.dtype, d) + error * ((1 + x * x) * fabs(up * dy) + 0x1p-20),
                        "%s: kind %d, slope at %.9g", isa, t->kind, x);
            if (t->kind != SWIGLU) continue;
            double du = reference(t->kind, x) * dy;
            assert_near(at(dup, r, c), du, rounding(dup.dtype, du) + error * (fabs(x * dy) + 0x1p-20), "%s: dup at %.9g", isa,
                        x);
        }
    }
}

static void try_activation(int kind, int64_t n, int64_t dim, tp_dtype dtype, double size, bool in_place)
{
    activation_case t = {.kind = kind, .n = n, .dim = dim, .in_place = in_place};
    t.x = new_rows(n, dim, 1, dtype, size);
    t.up = new_rows(n, dim, 0, dtype, 2);
    t.dy = new_rows(n, dim, 2, dtype, 1);
    t.y = new_rows(n, dim, 3, dtype, 1);
    t.dx = new_rows(n, dim, 4, dtype, 1);
    t.dup = new_rows(n, dim, 5, dtype, 1);
    t.x0 = copy_rows(t.x, n);
    t.up0 = copy_rows(t.up, n);
    t.dy0 = copy_rows(t.dy, n);
    kernel_outputs o = {.n = 0};
    tp_rows written[] = {t.x, t.up, t.dy, t.y, t.dx, t.dup};
    for (int i = 0; i < 6; i++) add_output(&o, written[i].data, rows_bytes(written[i], n));
    run_everywhere(&o, run_activation, check_activation, &t);
    for (int i = 0; i < 6; i++) free(written[i].data);
    free(t.x0.data), free(t.up0.data), free(t.dy0.data);
}

static void test_reference(void **state)
{
    (void)state;
    for (int kind = 0; kind < 3; kind++) {
        for (double x = -6; x <= 6; x += 0.37) {
            double step = 1e-5, d = (reference(kind, x + step) - reference(kind, x - step)) / (2 * step);
            assert_near(d, slope(kind, x), 1e-9, "kind %d at %g", kind, x);
        }
    }
}

static void test_shapes(void **state)
{
    (void)state;
    static const int64_t shapes[][2] = {{0, 5}, {1, 1}, {3, 7}, {5, 16}, {33, 100}, {70, 1536}};
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
        for (int i = 0; i < 12; i++) try_activation(i % 3, shapes[s][0], shapes[s][1], i & 1 ? TP_BF16 : TP_F32, 4, i >= 6);
    }
}

static void test_sizes(void **state)
{
    (void)state;
    static const double sizes[] = {1e-30, 1e-3, 0.5, 20, 200};
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        for (int kind = 0; kind < 3; kind++) try_activation(kind, 20, 100, TP_F32, sizes[s], false);
    }
}

static void test_limits(void **state)
{
    (void)state;
    for (int i = 0; i < 3; i++) {
        if (!devices[i].there) continue;
        tp_ctx ctx;
        tp_ctx_init(&ctx);
        ctx.device = devices[i].device[0];
        float x[4] = {1e30f, -1e30f, 0.0f, NAN}, one[4] = {1, 1, 1, 1}, y[4];
        tp_swiglu_args s = {1, 4, {x, TP_F32, 4}, {one, TP_F32, 4}, {y, TP_F32, 4}};
        assert_ok(&ctx, tp_run_swiglu(&ctx, &s));
        assert_true(y[0] == 1e30f && y[1] == 0 && y[2] == 0 && isnan(y[3]));
        for (int exact = 0; exact < 2; exact++) {
            tp_gelu_args g = {1, 4, {x, TP_F32, 4}, {y, TP_F32, 4}, exact};
            x[0] = 1e10f, x[1] = -1e10f;
            assert_ok(&ctx, tp_run_gelu(&ctx, &g));
            assert_true(y[0] == 1e10f && y[1] == 0 && y[2] == 0 && isnan(y[3]));
        }
        s.up.dtype = TP_BF16;
        assert_status(&ctx, TP_UNSUPPORTED, tp_run_swiglu(&ctx, &s));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_reference), cmocka_unit_test(test_shapes),
                                       cmocka_unit_test(test_sizes), cmocka_unit_test(test_limits)};
    return cmocka_run_group_tests(tests, open_devices, close_devices);
}
