/* Gradient norm, AdamW and SGD against float64 over several steps. */
#include "tests/backend/kernels.h"

typedef struct optimizer_case {
    tp_step_state state;
    int64_t n;
    float *w, *m, *v, *g;
    float *w0, *m0, *v0;
    float momentum, decay;
} optimizer_case;

static void run_norm(tp_ctx *ctx, void *data)
{
    optimizer_case *t = data;
    tp_grad_norm_args a = {t->n, t->g, &t->state};
    assert_ok(ctx, tp_run_grad_norm(ctx, &a));
}

static void check_norm(void *data, const char *isa)
{
    optimizer_case *t = data;
    double sum = 0;
    double scale = (double)t->state.loss_scale;
    for (int64_t i = 0; i < t->n; i++) sum += (double)t->g[i] * (double)t->g[i] / scale / scale;
    double clip = (t->state.max_norm > 0 ? fmin(1, (double)t->state.max_norm / (sqrt(sum) + 1e-6)) : 1) / scale;
    assert_near(t->state.norm, sqrt(sum), 1e-13 * sqrt(sum), "%s: norm of %lld", isa, (long long)t->n);
    assert_near((double)t->state.clip, clip, 0x1p-24 * clip, "%s: clip", isa);
    assert_int_equal(t->state.finite, 1);
}

static void test_grad_norm(void **state)
{
    (void)state;
    static const int64_t counts[] = {0, 1, 5, 4095, 4096, 4097, 20001};
    for (size_t k = 0; k < sizeof counts / sizeof counts[0]; k++) {
        for (int i = 0; i < 6; i++) {
            optimizer_case t = {.n = counts[k],
                                .g = new_floats(counts[k], i % 3 == 2 ? 1e30 : 1e-3),
                                .state = {.max_norm = i % 3 == 1 ? 0.0f : 0.01f, .loss_scale = i < 3 ? 1.0f : 65536.0f}};
            kernel_outputs o = {.n = 0};
            add_output(&o, &t.state, sizeof t.state);
            run_everywhere(&o, run_norm, check_norm, &t);
            free(t.g);
        }
    }
}

static void test_not_finite(void **state)
{
    (void)state;
    for (int i = 0; i < 3; i++) {
        if (!devices[i].there) continue;
        tp_ctx ctx;
        tp_ctx_init(&ctx);
        ctx.device = devices[i].device[1];
        float g[100] = {0}, w[100], m[100] = {0}, v[100] = {0};
        for (int k = 0; k < 100; k++) w[k] = (float)k;
        tp_step_state s = {.learning_rate = 1, .bias1 = 1, .bias2 = 1, .max_norm = 1, .loss_scale = 1};
        tp_grad_norm_args norm = {100, g, &s};
        static const float bad[] = {NAN, INFINITY, -INFINITY};
        for (int b = 0; b < 4; b++) {
            g[97] = b < 3 ? bad[b] : 1.0f;
            s.loss_sum = b < 3 ? 0 : NAN;
            s.finite = 1;
            assert_ok(&ctx, tp_run_grad_norm(&ctx, &norm));
            assert_int_equal(s.finite, 0);
            tp_adamw_args adamw = {100, w, m, v, g, &s, 0.9f, 0.999f, 1e-8f, 0.1f};
            assert_ok(&ctx, tp_run_adamw(&ctx, &adamw));
            tp_sgd_args sgd = {100, w, m, g, &s, 0.9f, 0.1f};
            assert_ok(&ctx, tp_run_sgd(&ctx, &sgd));
            for (int k = 0; k < 100; k++) assert_true(w[k] == (float)k && m[k] == 0 && v[k] == 0);
        }
        g[97] = 1e38f; /* its square is finite in float64 */
        s.loss_sum = 0;
        assert_ok(&ctx, tp_run_grad_norm(&ctx, &norm));
        assert_int_equal(s.finite, 1);
        static const double spreads[] = {0.5, 0.499, 0, (double)INFINITY, (double)NAN};
        static const int used[] = {1, 0, 0, 1, 1};
        for (int k = 0; k < 5; k++) { /* 0.5 above the mean */
            s.loss_sum = 2.5;
            s.loss_mean = 2;
            s.loss_spread = spreads[k];
            assert_ok(&ctx, tp_run_grad_norm(&ctx, &norm));
            assert_int_equal(s.finite, used[k]);
        }
    }
}

static void run_adamw(tp_ctx *ctx, void *data)
{
    optimizer_case *t = data;
    tp_adamw_args a = {t->n, t->w, t->m, t->v, t->g, &t->state, 0.9f, 0.999f, 1e-8f, t->decay};
    assert_ok(ctx, tp_run_adamw(ctx, &a));
}

static void check_adamw(void *data, const char *isa)
{
    optimizer_case *t = data;
    double b1 = (double)0.9f, b2 = (double)0.999f, lr = (double)t->state.learning_rate;
    for (int64_t i = 0; i < t->n; i++) {
        double g = (double)t->state.clip * (double)t->g[i];
        double m = b1 * (double)t->m0[i] + (1 - b1) * g, v = b2 * (double)t->v0[i] + (1 - b2) * g * g;
        double step = lr * (m / (double)t->state.bias1) / (sqrt(v) / sqrt((double)t->state.bias2) + (double)1e-8f);
        double w = (double)t->w0[i] * (1 - lr * (double)t->decay) - step;
        /* m = m + 0.1 (g - m): rounded relative to the larger of the two; v has no cancellation: 4 roundings */
        assert_near((double)t->m[i], m, 0x1p-23 * (fabs((double)t->m0[i]) + fabs(g)), "%s: m[%lld]", isa, (long long)i);
        assert_near((double)t->v[i], v, 5 * 0x1p-24 * v + 0x1p-149, "%s: v[%lld]", isa, (long long)i);
        double size = fabs((double)t->w0[i]) + fabs(step) * (4 + (fabs((double)t->m0[i]) + fabs(g)) / (fabs(m) + 1e-30));
        assert_near((double)t->w[i], w, 4 * 0x1p-24 * size, "%s: w[%lld]", isa, (long long)i);
    }
}

static void run_sgd(tp_ctx *ctx, void *data)
{
    optimizer_case *t = data;
    tp_sgd_args a = {t->n, t->w, t->momentum != 0 ? t->m : NULL, t->g, &t->state, t->momentum, t->decay};
    assert_ok(ctx, tp_run_sgd(ctx, &a));
}

static void check_sgd(void *data, const char *isa)
{
    optimizer_case *t = data;
    for (int64_t i = 0; i < t->n; i++) {
        double g = (double)t->state.clip * (double)t->g[i] + (double)t->decay * (double)t->w0[i];
        double m = t->momentum != 0 ? (double)t->momentum * (double)t->m0[i] + g : g;
        double size = fabs((double)t->g[i]) + fabs((double)t->w0[i]) + fabs((double)t->m0[i]);
        if (t->momentum != 0)
            assert_near((double)t->m[i], m, 4 * 0x1p-24 * size, "%s: m[%lld]", isa, (long long)i);
        else
            assert_true(t->m[i] == t->m0[i]);
        double lr = (double)t->state.learning_rate;
        assert_near((double)t->w[i], (double)t->w0[i] - lr * m, 4 * 0x1p-24 * (size + lr * fabs(m)), "%s: w[%lld]", isa,
                    (long long)i);
    }
}

static void test_updates(void **state)
{
    (void)state;
    static const int64_t counts[] = {0, 1, 7, 1000, 16384, 40001};
    for (size_t k = 0; k < sizeof counts / sizeof counts[0]; k++) {
        for (int step = 1; step <= 3; step++) {
            int64_t n = counts[k];
            optimizer_case t = {
                .n = n, .w = new_floats(n, 1), .m = new_floats(n, 0.1), .v = new_floats(n, 0.01), .g = new_floats(n, 1)};
            t.state = (tp_step_state){.learning_rate = 1e-2f, .clip = step == 1 ? 1.0f : 0.37f, .finite = 1};
            t.state.bias1 = (float)(1 - pow(0.9, step));
            t.state.bias2 = (float)(1 - pow(0.999, step));
            t.decay = step == 2 ? 0.0f : 0.1f;
            t.momentum = step == 3 ? 0.0f : 0.9f;
            for (int64_t i = 0; i < n; i++) {
                t.v[i] = fabsf(t.v[i]);
                if (step == 1) t.m[i] = t.v[i] = 0;
            }
            t.w0 = memcpy(new_floats(n, 1), t.w, (size_t)n * 4);
            t.m0 = memcpy(new_floats(n, 1), t.m, (size_t)n * 4);
            t.v0 = memcpy(new_floats(n, 1), t.v, (size_t)n * 4);
            kernel_outputs o = {.n = 0};
            add_output(&o, t.w, (size_t)n * 4);
            add_output(&o, t.m, (size_t)n * 4);
            add_output(&o, t.v, (size_t)n * 4);
            run_everywhere(&o, run_adamw, check_adamw, &t);
            run_everywhere(&o, run_sgd, check_sgd, &t);
            float *all[] = {t.w, t.m, t.v, t.g, t.w0, t.m0, t.v0};
            for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_grad_norm), cmocka_unit_test(test_not_finite),
                                       cmocka_unit_test(test_updates)};
    return cmocka_run_group_tests(tests, open_devices, close_devices);
}
