/* RMSNorm and LayerNorm with their gradients against the formulas in float64, whose gradients are checked by differences. */
#include "tests/backend/kernels.h"

typedef struct norm_case {
    int64_t n, dim;
    bool layer, accumulate, in_place;
    tp_rows x, y, dy, dx, dx_before;
    float *weight, *bias, *mean, *rstd, *dweight, *dbias, *dweight_before, *dbias_before;
} norm_case;

static const float epsilon = 1e-5f;

/* y of one row in float64, and the statistics. */
static void reference_row(const double *x, const float *weight, const float *bias, int64_t dim, bool layer, double *y,
                          double *mean, double *rstd)
{
    double sum = 0, squares = 0;
    for (int64_t c = 0; c < dim; c++) sum += x[c];
    *mean = layer ? sum / (double)dim : 0;
    for (int64_t c = 0; c < dim; c++) squares += (x[c] - *mean) * (x[c] - *mean);
    *rstd = 1 / sqrt(squares / (double)dim + (double)epsilon);
    for (int64_t c = 0; c < dim; c++) {
        y[c] = (double)weight[c] * (x[c] - *mean) * *rstd + (layer && bias != NULL ? (double)bias[c] : 0);
    }
}

/* dx of one row: rstd (g - mean(g) - xh mean(g xh)), without mean(g) for RMSNorm. */
static void reference_gradient(const double *x, const double *dy, const float *weight, int64_t dim, bool layer, double mean,
                               double rstd, double *dx)
{
    double level = 0, along = 0;
    for (int64_t c = 0; c < dim; c++) {
        level += dy[c] * (double)weight[c];
        along += dy[c] * (double)weight[c] * (x[c] - mean) * rstd;
    }
    for (int64_t c = 0; c < dim; c++) {
        double g = dy[c] * (double)weight[c], normal = (x[c] - mean) * rstd;
        dx[c] = rstd * (g - (layer ? level / (double)dim : 0) - normal * along / (double)dim);
    }
}

static void test_reference(void **state)
{
    (void)state;
    for (int layer = 0; layer < 2; layer++) {
        double x[5], dy[5], y[5], dx[5], mean, rstd, unused;
        float weight[5];
        for (int c = 0; c < 5; c++) {
            x[c] = random_uniform();
            dy[c] = random_uniform();
            weight[c] = (float)random_uniform();
        }
        reference_row(x, weight, NULL, 5, layer, y, &mean, &rstd);
        reference_gradient(x, dy, weight, 5, layer, mean, rstd, dx);
        for (int c = 0; c < 5; c++) {
            double loss[2] = {0, 0}, old = x[c], step = 1e-5;
            for (int side = 0; side < 2; side++) {
                x[c] = old + (side == 0 ? -step : step);
                reference_row(x, weight, NULL, 5, layer, y, &mean, &unused);
                for (int k = 0; k < 5; k++) loss[side] += y[k] * dy[k];
            }
            x[c] = old;
            assert_near((loss[1] - loss[0]) / (2 * step), dx[c], 1e-8, "layer %d, channel %d", layer, c);
        }
    }
}

static void run_norm(tp_ctx *ctx, void *data)
{
    norm_case *t = data;
    tp_rows dy = t->in_place ? t->dx : t->dy;
    if (t->layer) {
        tp_layernorm_args f = {t->n, t->dim, t->x, t->y, t->weight, t->bias, t->mean, t->rstd, epsilon};
        assert_ok(ctx, tp_run_layernorm(ctx, &f));
        tp_layernorm_backward_args b = {t->n,    t->dim,  t->x,       dy,       t->dx,        t->weight,
                                        t->mean, t->rstd, t->dweight, t->dbias, t->accumulate};
        assert_ok(ctx, tp_run_layernorm_backward(ctx, &b));
    } else {
        tp_rmsnorm_args f = {t->n, t->dim, t->x, t->y, t->weight, t->rstd, epsilon, 1};
        assert_ok(ctx, tp_run_rmsnorm(ctx, &f));
        tp_rmsnorm_backward_args b = {t->n, t->dim, t->x, dy, t->dx, t->weight, t->rstd, t->dweight, t->accumulate, 1};
        assert_ok(ctx, tp_run_rmsnorm_backward(ctx, &b));
    }
}

static void check_norm(void *data, const char *isa)
{
    norm_case *t = data;
    int64_t dim = t->dim;
    tp_rows dy_rows = t->in_place ? t->dx_before : t->dy;
    double *x = malloc((size_t)dim * 8), *y = malloc((size_t)dim * 8), *dy = malloc((size_t)dim * 8),
           *dx = malloc((size_t)dim * 8);
    double *dweight = calloc((size_t)dim, 8), *dbias = calloc((size_t)dim, 8), *size = calloc((size_t)dim, 8);
    assert_true(x && y && dy && dx && dweight && dbias && size);
    for (int64_t r = 0; r < t->n; r++) {
        double mean, rstd, largest = 0;
        for (int64_t c = 0; c < dim; c++) {
            x[c] = at(t->x, r, c);
            dy[c] = at(dy_rows, r, c);
            largest = fmax(largest, fabs(dy[c] * (double)t->weight[c]));
        }
        reference_row(x, t->weight, t->bias, dim, t->layer, y, &mean, &rstd);
        reference_gradient(x, dy, t->weight, dim, t->layer, mean, rstd, dx);
        /* sums of dim terms of one size in VL parts: within 8 roundings for dim up to a thousand */
        assert_near((double)t->rstd[r], rstd, 8 * rounding(TP_F32, rstd), "%s: rstd[%lld]", isa, (long long)r);
        if (t->layer) assert_near((double)t->mean[r], mean, 8 * 0x1p-24, "%s: mean[%lld]", isa, (long long)r);
        for (int64_t c = 0; c < dim; c++) {
            double normal = (x[c] - mean) * rstd;
            /* bf16 rounds x * rstd and the product for RMSNorm, only the result for LayerNorm */
            double limit = 2 * rounding(t->y.dtype, y[c]) + 16 * 0x1p-24 * (1 + fabs(rstd) + fabs(y[c]));
            assert_near(at(t->y, r, c), y[c], limit, "%s: y[%lld, %lld]", isa, (long long)r, (long long)c);
            double want = dx[c] + (t->accumulate ? at(t->dx_before, r, c) : 0);
            limit = rounding(t->dx.dtype, want) + 16 * 0x1p-24 * rstd * largest * (2 + fabs(normal)) + 0x1p-23;
            assert_near(at(t->dx, r, c), want, limit, "%s: dx[%lld, %lld]", isa, (long long)r, (long long)c);
            dweight[c] += dy[c] * normal;
            dbias[c] += dy[c];
            size[c] += fabs(dy[c]) * (1 + fabs(normal));
        }
    }
    for (int64_t c = 0; c < dim; c++) {
        double limit = 8 * 0x1p-24 * (size[c] + 1);
        if (t->dweight)
            assert_near((double)t->dweight[c], (double)t->dweight_before[c] + dweight[c], limit, "%s: dweight[%lld]", isa,
                        (long long)c);
        if (t->dbias)
            assert_near((double)t->dbias[c], (double)t->dbias_before[c] + dbias[c], limit, "%s: dbias[%lld]", isa,
                        (long long)c);
    }
    void *all[] = {x, y, dy, dx, dweight, dbias, size};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
}

static void try_norm(int64_t n, int64_t dim, tp_dtype dtype, bool layer, int variant)
{
    norm_case t = {.n = n, .dim = dim, .layer = layer};
    t.x = new_rows(n, dim, 3, dtype, 2);
    t.y = new_rows(n, dim, 1, dtype, 1);
    t.dy = new_rows(n, dim, 0, dtype, 1);
    t.dx = new_rows(n, dim, 2, dtype, 1);
    t.dx_before = copy_rows(t.dx, n);
    t.weight = new_floats(dim, 2);
    t.bias = variant == 1 ? NULL : new_floats(dim, 1);
    t.mean = new_floats(n, 1);
    t.rstd = new_floats(n, 1);
    t.accumulate = variant == 1;
    t.in_place = variant == 2;
    t.dweight_before = new_floats(dim, 1);
    t.dbias_before = new_floats(dim, 1);
    if (variant != 0) t.dweight = memcpy(new_floats(dim, 1), t.dweight_before, (size_t)dim * 4);
    if (variant != 0 && layer) t.dbias = memcpy(new_floats(dim, 1), t.dbias_before, (size_t)dim * 4);
    kernel_outputs o = {.n = 0};
    add_output(&o, t.y.data, rows_bytes(t.y, n));
    add_output(&o, t.dx.data, rows_bytes(t.dx, n));
    add_output(&o, t.rstd, (size_t)n * 4);
    if (layer) add_output(&o, t.mean, (size_t)n * 4);
    if (t.dweight) add_output(&o, t.dweight, (size_t)dim * 4);
    if (t.dbias) add_output(&o, t.dbias, (size_t)dim * 4);
    run_everywhere(&o, run_norm, check_norm, &t);
    void *all[] = {t.x.data, t.y.data, t.dy.data, t.dx.data, t.dx_before.data, t.weight,      t.bias,
                   t.mean,   t.rstd,   t.dweight, t.dbias,   t.dweight_before, t.dbias_before};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
}

static void test_shapes(void **state)
{
    (void)state;
    static const int64_t dims[] = {1, 3, 8, 16, 33, 64, 100, 576, 1000}, counts[] = {0, 1, 3, 70, 200};
    for (size_t d = 0; d < sizeof dims / sizeof dims[0]; d++) {
        for (size_t n = 0; n < sizeof counts / sizeof counts[0]; n++) {
            for (int i = 0; i < 12; i++) try_norm(counts[n], dims[d], i & 1 ? TP_BF16 : TP_F32, i & 2, i / 4);
        }
    }
}

/* bf16 RMSNorm rounds x * rstd, then the product with the weight, as Llama does: bit for bit. */
static void test_bf16_order(void **state)
{
    (void)state;
    for (int i = 0; i < 3; i++) {
        if (!devices[i].there) continue;
        tp_ctx ctx;
        tp_ctx_init(&ctx);
        ctx.device = devices[i].device[0];
        tp_rows x = new_rows(40, 100, 0, TP_BF16, 3), y = new_rows(40, 100, 0, TP_BF16, 3);
        float *weight = new_floats(100, 2), *rstd = new_floats(40, 1);
        tp_rmsnorm_args a = {40, 100, x, y, weight, rstd, epsilon, 1};
        assert_ok(&ctx, tp_run_rmsnorm(&ctx, &a));
        for (int64_t e = 0; e < 40 * 100; e++) {
            float normal = tp_bf16_to_f32(tp_f32_to_bf16(tp_bf16_to_f32(((uint16_t *)x.data)[e]) * rstd[e / 100]));
            assert_int_equal(((uint16_t *)y.data)[e], tp_f32_to_bf16(weight[e % 100] * normal));
        }
        a.rstd = NULL; /* not wanted */
        assert_ok(&ctx, tp_run_rmsnorm(&ctx, &a));
        a.y.dtype = TP_F32;
        assert_status(&ctx, TP_UNSUPPORTED, tp_run_rmsnorm(&ctx, &a));
        free(x.data), free(y.data), free(weight), free(rstd);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_reference), cmocka_unit_test(test_shapes),
                                       cmocka_unit_test(test_bf16_order)};
    return cmocka_run_group_tests(tests, open_devices, close_devices);
}
