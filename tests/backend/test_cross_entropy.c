/* Cross entropy and its gradient in place against float64. */
#include "tests/backend/kernels.h"

typedef struct entropy_case {
    tp_cross_entropy_args a;
    float *before;
} entropy_case;

static void run_entropy(tp_ctx *ctx, void *data)
{
    entropy_case *t = data;
    assert_ok(ctx, tp_run_cross_entropy(ctx, &t->a));
}

static void check_entropy(void *data, const char *isa)
{
    entropy_case *t = data;
    const tp_cross_entropy_args *a = &t->a;
    for (int64_t r = 0; r < a->n; r++) {
        const float *x = t->before + r * a->ld, *got = a->logits + r * a->ld;
        const uint16_t *narrow = (const uint16_t *)(const void *)got;
        if (a->labels[r] < 0) {
            assert_true(a->loss[r] == 0);
            for (int64_t c = 0; c < a->vocab; c++)
                assert_true(!a->want_grad ? got[c] == x[c] : a->narrow ? narrow[c] == 0 : got[c] == 0);
            continue;
        }
        double greatest = -INFINITY, sum = 0;
        for (int64_t c = 0; c < a->vocab; c++) greatest = fmax(greatest, (double)x[c]);
        for (int64_t c = 0; c < a->vocab; c++) sum += exp((double)x[c] - greatest);
        double loss = greatest + log(sum) - (double)x[a->labels[r]];
        /* the sum of exponentials carries some ten roundings, and the loss is rounded once */
        assert_near((double)a->loss[r], loss, 16 * 0x1p-24 + rounding(TP_F32, loss), "%s: loss[%lld], vocab %lld", isa,
                    (long long)r, (long long)a->vocab);
        for (int64_t c = 0; c < a->vocab; c++) {
            double p = exp((double)x[c] - greatest) / sum,
                   scale = (double)(a->state != NULL ? a->state->grad_scale * a->state->loss_scale : a->grad_scale);
            if (!a->want_grad) {
                assert_true(got[c] == x[c]);
                continue;
            }
            /* narrow: bf16 over the first half of the row */
            double value = a->narrow ? (double)tp_bf16_to_f32(narrow[c]) : (double)got[c];
            /* the difference to the greatest is rounded, which exp turns into a relative error of its size */
            double apart = isinf(x[c]) ? 0 : greatest - (double)x[c], want = (p - (c == a->labels[r])) * scale;
            double limit = fabs(scale) * ((24 + apart) * 0x1p-24 * p + (c == a->labels[r] ? 0x1p-24 : 0) + 0x1p-125);
            if (a->narrow) limit += rounding(TP_BF16, want) + 0x1p-126;
            assert_near(value, want, limit, "%s: logits[%lld, %lld]", isa, (long long)r, (long long)c);
        }
        for (int64_t c = a->vocab; c < a->ld; c++) assert_true(got[c] == x[c]);
    }
}

static void try_entropy(int64_t n, int64_t vocab, double size, bool want_grad, float grad_scale, bool narrow)
{
    int64_t ld = vocab + 3;
    entropy_case t = {
        .a = {n, vocab, new_floats(n * ld, size), ld, NULL, new_floats(n, 1), grad_scale, want_grad, narrow, TP_BF16, NULL}};
    tp_step_state now = {.grad_scale = grad_scale / 4, .loss_scale = 4};
    if (vocab % 2 == 0) t.a.grad_scale = 100, t.a.state = &now; /* the state's counts */
    int32_t *labels = malloc((size_t)n * 4 + 4);
    assert_non_null(labels);
    for (int64_t i = 0; i < n; i++) labels[i] = (int32_t)((i * 7919 + vocab - 1) % vocab);
    t.a.labels = labels;
    if (n > 1 && vocab > 2) t.a.logits[ld + 1] = -INFINITY; /* a token that is ruled out */
    t.before = memcpy(new_floats(n * ld, 1), t.a.logits, (size_t)(n * ld) * 4);
    if (n > 1 && vocab > 2 && labels[1] == 1) labels[1] = 0;
    for (int64_t i = 2; i < n; i += 3) labels[i] = -1;
    kernel_outputs o = {.n = 0};
    add_output(&o, t.a.logits, (size_t)(n * ld) * 4);
    add_output(&o, t.a.loss, (size_t)n * 4);
    run_everywhere(&o, run_entropy, check_entropy, &t);
    free(t.a.logits), free(t.a.loss), free(t.before), free(labels);
}

static void test_shapes(void **state)
{
    (void)state;
    static const int64_t vocabs[] = {1, 2, 5, 16, 63, 64, 65, 1000, 49152};
    for (size_t v = 0; v < sizeof vocabs / sizeof vocabs[0]; v++) {
        for (int64_t n = 0; n < 8; n += 3) {
            try_entropy(n, vocabs[v], 5, true, 0.125f, false);
            try_entropy(n, vocabs[v], 5, true, 0.125f, true);
            try_entropy(n, vocabs[v], 5, false, 1.0f, true);
        }
    }
}

static void test_sizes(void **state)
{
    (void)state;
    static const double sizes[] = {1e-40, 1e-3, 80, 1e4, 1e30};
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        try_entropy(4, 777, sizes[s], true, 3.0f, false);
        try_entropy(4, 777, sizes[s], true, 3.0f, true);
    }
}

/* Not-a-number must reach loss and gradient. */
static void test_not_finite(void **state)
{
    (void)state;
    for (int i = 0; i < 3; i++) {
        if (!devices[i].there) continue;
        for (int place = 0; place < 130; place += 43) {
            tp_ctx ctx;
            tp_ctx_init(&ctx);
            ctx.device = devices[i].device[0];
            float x[130], loss;
            int32_t label = 1;
            for (int c = 0; c < 130; c++) x[c] = (float)c;
            x[place] = NAN;
            tp_cross_entropy_args a = {1, 130, x, 130, &label, &loss, 1.0f, true, false, TP_BF16, NULL};
            assert_ok(&ctx, tp_run_cross_entropy(&ctx, &a));
            assert_true(isnan(loss) && isnan(x[0]) && isnan(x[129]));
        }
    }
}

static void test_add_loss(void **state)
{
    (void)state;
    for (int i = 0; i < 3; i++) {
        if (!devices[i].there) continue;
        tp_ctx ctx;
        tp_ctx_init(&ctx);
        ctx.device = devices[i].device[0];
        float loss = 3.7f;
        tp_step_state now = {.grad_scale = 0.3f, .loss_sum = 1e-9};
        tp_add_loss_args a = {&loss, &now};
        assert_ok(&ctx, tp_run_add_loss(&ctx, &a));
        assert_true(loss == 3.7f * 0.3f && now.loss_sum == 1e-9 + (double)loss);
        now.grad_scale = NAN;
        assert_ok(&ctx, tp_run_add_loss(&ctx, &a));
        assert_true(isnan(loss) && isnan(now.loss_sum));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_shapes), cmocka_unit_test(test_sizes),
                                       cmocka_unit_test(test_not_finite), cmocka_unit_test(test_add_loss)};
    return cmocka_run_group_tests(tests, open_devices, close_devices);
}
