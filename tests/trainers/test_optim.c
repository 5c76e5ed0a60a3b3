/* Optimizers: torch's AdamW and SGD with and without clipping, step by step; state on disk; steps that must change nothing. */
#include "tests/support.h"

#include <math.h>

#include "backend/backend.h"
#include "base/safetensors.h"
#include "tests/peers.h"
#include "tests/scratch.h"
#include "trainers/optim.h"

/* f32 on both sides, in another order of a few roundings a step: 1e-6 relative to values of about 1 over eight steps. */
#define TOLERANCE 2e-6

/* As in scripts/make_peer_tables.py. */
static float pseudo(int64_t i, int64_t number, double scale)
{
    return (float)((double)((i * 7919 + number * 104729) % 2001 - 1000) / 1000 * scale);
}

struct fixture {
    tp_ctx ctx;
    tp_params params;
    tp_optim *optim;
};

static void open_params(struct fixture *f, const tp_json *shapes)
{
    tp_ctx_init(&f->ctx);
    f->params = (tp_params){0};
    f->optim = NULL;
    assert_ok(&f->ctx, tp_device_open(&f->ctx, "cpu", 1, &f->ctx.device));
    for (size_t p = 0; p < tp_json_count(shapes); p++) {
        char name[24];
        size_t index;
        snprintf(name, sizeof name, "p%zu", p);
        assert_ok(&f->ctx, tp_params_declare(&f->ctx, &f->params, name, (int64_t)peer_item(tp_json_at(shapes, p), 0),
                                             (int64_t)peer_item(tp_json_at(shapes, p), 1), &index));
        assert_int_equal(index, p);
    }
    assert_ok(&f->ctx, tp_params_allocate(&f->ctx, &f->params));
    assert_ok(&f->ctx, tp_params_train(&f->ctx, &f->params));
    for (size_t p = 0; p < f->params.n; p++)
        for (int64_t i = 0; i < f->params.list[p].count; i++)
            f->params.values[f->params.list[p].offset + i] = pseudo(i, (int64_t)p, 1);
}

static tp_optim_options options_of(const tp_json *c)
{
    return (tp_optim_options){.beta1 = peer_number(c, "beta1"),
                              .beta2 = peer_number(c, "beta2"),
                              .epsilon = peer_number(c, "epsilon"),
                              .momentum = peer_number(c, "momentum"),
                              .weight_decay = peer_number(c, "weight_decay"),
                              .max_grad_norm = peer_number(c, "max_grad_norm")};
}

static void open_case(struct fixture *f, const tp_json *c)
{
    tp_optim_options options = options_of(c);
    open_params(f, tp_json_get(c, "shapes"));
    assert_ok(&f->ctx, tp_optim_open(&f->ctx, peer_is(c, "name", "adamw") ? "adamw" : "sgd", &options, &f->params, &f->optim));
}

static void close_case(struct fixture *f)
{
    tp_optim_close(f->optim);
    tp_params_free(&f->params);
    tp_device_close(f->ctx.device);
}

static void set_grads(struct fixture *f, int64_t step)
{
    for (size_t p = 0; p < f->params.n; p++)
        for (int64_t i = 0; i < f->params.list[p].count; i++)
            f->params.grads[f->params.list[p].offset + i] = pseudo(i, 100 * (step + 1) + (int64_t)p, 0.3);
}

static tp_status take_step(tp_ctx *ctx, tp_optim *optim, double rate, double loss, tp_optim_result *result)
{
    TP_TRY(tp_optim_begin(ctx, optim, rate, 0, (double)INFINITY));
    optim->step_state->loss_sum = loss;
    TP_TRY(tp_optim_update(ctx, optim));
    return tp_optim_end(ctx, optim, result);
}

static void compare(const struct fixture *f, const float *flat, const tp_json *expected, const char *what)
{
    for (size_t p = 0; p < f->params.n; p++)
        for (int64_t i = 0; i < f->params.list[p].count; i++) {
            double got = flat[f->params.list[p].offset + i], wanted = peer_item(tp_json_at(expected, p), (size_t)i);
            if (!(fabs(got - wanted) <= TOLERANCE * fmax(0.1, fabs(wanted))))
                fail_msg("%s: parameter %zu, value %lld: %.9g, torch has %.9g", what, p, (long long)i, got, wanted);
        }
}

static void test_torch(void **state)
{
    tp_ctx ctx;
    (void)state;
    tp_ctx_init(&ctx);
    tp_json_doc *doc = peer_table(&ctx, "optim");
    const tp_json *cases = tp_json_get(tp_json_root(doc), "cases");
    assert_true(tp_json_count(cases) >= 5);
    for (size_t k = 0; k < tp_json_count(cases); k++) {
        const tp_json *c = tp_json_at(cases, k), *rates = tp_json_get(c, "learning_rates"), *norms = tp_json_get(c, "norms"),
                      *values = tp_json_get(c, "values");
        struct fixture f;
        open_case(&f, c);
        for (size_t step = 0; step < tp_json_count(rates); step++) {
            tp_optim_result result;
            set_grads(&f, (int64_t)step);
            assert_ok(&f.ctx, take_step(&f.ctx, f.optim, peer_item(rates, step), 1.5, &result));
            assert_true(result.finite && result.loss_sum == 1.5);
            assert_true(fabs(result.grad_norm - peer_item(norms, step)) <= 1e-6 * peer_item(norms, step));
            if (step == 0) compare(&f, f.params.values, tp_json_at(values, 0), "first step");
        }
        compare(&f, f.params.values, tp_json_at(values, 1), "last step");
        const tp_json *states = tp_json_get(c, "states");
        size_t compared = 0;
        for (int i = 0; i < TP_OPTIM_STATES; i++) {
            const tp_json *expected = f.optim->kind->states[i] != NULL ? tp_json_get(states, f.optim->kind->states[i]) : NULL;
            if (expected == NULL) continue;
            compare(&f, f.optim->state[i], expected, f.optim->kind->states[i]);
            compared++;
        }
        assert_int_equal(compared, tp_json_count(states));
        assert_int_equal(f.optim->steps, tp_json_count(rates));
        close_case(&f);
    }
    tp_json_free(doc);
}

/* ---- steps that must change nothing ---- */

static const tp_json *case_named(tp_json_doc *doc, size_t k)
{
    return tp_json_at(tp_json_get(tp_json_root(doc), "cases"), k);
}

static void test_not_finite(void **state)
{
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    tp_ctx ctx;
    (void)state;
    tp_ctx_init(&ctx);
    tp_json_doc *doc = peer_table(&ctx, "optim");
    for (size_t k = 0; k < 5; k++) {
        struct fixture f;
        tp_optim_result result;
        open_case(&f, case_named(doc, k));
        set_grads(&f, 0);
        assert_ok(&f.ctx, take_step(&f.ctx, f.optim, 1e-2, 1, &result));
        size_t bytes = (size_t)f.params.elements * sizeof(float);
        float *before[1 + TP_OPTIM_STATES] = {f.params.values, f.optim->state[0], f.optim->state[1]},
                          *copy[1 + TP_OPTIM_STATES];
        for (int i = 0; i <= TP_OPTIM_STATES; i++) {
            copy[i] = before[i] != NULL ? malloc(bytes) : NULL;
            if (copy[i] != NULL) memcpy(copy[i], before[i], bytes);
        }
        for (size_t i = 0; i < 3 + 1; i++) {
            set_grads(&f, 1);
            if (i < 3) f.params.grads[f.params.list[2].offset + 299] = bad[i];
            assert_ok(&f.ctx, take_step(&f.ctx, f.optim, 1e-2, i < 3 ? 1 : NAN, &result));
            assert_false(result.finite);
            assert_int_equal(f.optim->steps, 1);
            for (int s = 0; s <= TP_OPTIM_STATES; s++)
                if (copy[s] != NULL) assert_memory_equal(copy[s], before[s], bytes);
        }
        for (int i = 0; i <= TP_OPTIM_STATES; i++) free(copy[i]);
        close_case(&f);
    }
    tp_json_free(doc);
}

/* Squares of large gradients overflow f32; their norm does not. */
static void test_large_gradients(void **state)
{
    tp_ctx ctx;
    struct fixture f;
    tp_optim_result result;
    (void)state;
    tp_ctx_init(&ctx);
    tp_json_doc *doc = peer_table(&ctx, "optim");
    open_case(&f, case_named(doc, 3)); /* sgd, momentum, clipped to 0.5 */
    memset(f.params.grads, 0, (size_t)f.params.elements * sizeof(float));
    f.params.grads[0] = 3e25f;
    f.params.grads[1] = -4e25f;
    float first = f.params.values[0];
    assert_ok(&f.ctx, take_step(&f.ctx, f.optim, 1, 1, &result));
    assert_true(result.finite && fabs(result.grad_norm / 5e25 - 1) < 1e-6);
    assert_true(fabsf(f.params.values[0] - (first - 0.3f)) < 1e-6f);
    close_case(&f);
    tp_json_free(doc);
}

/* ---- on disk ---- */

static void test_save_and_load(void **state)
{
    tp_ctx ctx;
    scratch s;
    (void)state;
    tp_ctx_init(&ctx);
    scratch_begin(&s);
    tp_json_doc *doc = peer_table(&ctx, "optim");
    for (size_t k = 0; k < 5; k++) {
        struct fixture a, b;
        tp_optim_result result;
        open_case(&a, case_named(doc, k));
        open_case(&b, case_named(doc, k));
        for (int step = 0; step < 3; step++) {
            set_grads(&a, step);
            assert_ok(&a.ctx, take_step(&a.ctx, a.optim, 1e-2, 1, &result));
        }
        size_t bytes = (size_t)a.params.elements * sizeof(float);
        assert_ok(&a.ctx, tp_optim_save(&a.ctx, a.optim, scratch_path(&s, "optimizer.safetensors")));
        assert_ok(&b.ctx, tp_optim_load(&b.ctx, b.optim, s.path));
        memcpy(b.params.values, a.params.values, bytes);
        b.optim->steps = a.optim->steps;
        for (struct fixture *f = &a; f != NULL; f = f == &a ? &b : NULL) { /* one that went on, one that was resumed */
            set_grads(f, 3);
            assert_ok(&f->ctx, take_step(&f->ctx, f->optim, 1e-2, 1, &result));
        }
        assert_memory_equal(a.params.values, b.params.values, bytes);
        for (int i = 0; i < TP_OPTIM_STATES; i++)
            if (a.optim->state[i] != NULL) assert_memory_equal(a.optim->state[i], b.optim->state[i], bytes);
        close_case(&a);
        close_case(&b);
    }
    tp_json_free(doc);
    scratch_end(&s);
}

/* State of another optimizer, of other shapes, or in part. */
static void test_wrong_state(void **state)
{
    static const char *const adamw[] = {"optimizer", "adamw", NULL};
    static const float zeros[600] = {0};
    tp_ctx ctx;
    struct fixture f, sgd;
    scratch s;
    (void)state;
    tp_ctx_init(&ctx);
    scratch_begin(&s);
    tp_json_doc *doc = peer_table(&ctx, "optim");
    open_case(&f, case_named(doc, 0));
    open_case(&sgd, case_named(doc, 3));
    assert_ok(&sgd.ctx, tp_optim_save(&sgd.ctx, sgd.optim, scratch_path(&s, "sgd")));
    assert_status(&f.ctx, TP_CHECKPOINT, tp_optim_load(&f.ctx, f.optim, s.path));

    tp_named_array arrays[] = {
        {.name = "p0.exp_avg", .dtype = TP_F32, .rank = 2, .shape = {3, 5}, .data = zeros},
        {.name = "p0.exp_avg_sq", .dtype = TP_F32, .rank = 2, .shape = {3, 5}, .data = zeros},
        {.name = "p1.exp_avg", .dtype = TP_F32, .rank = 2, .shape = {7, 2}, .data = zeros},
        {.name = "p1.exp_avg_sq", .dtype = TP_F32, .rank = 2, .shape = {7, 2}, .data = zeros},
        {.name = "p2.exp_avg", .dtype = TP_F32, .rank = 2, .shape = {1, 300}, .data = zeros},
        {.name = "p2.exp_avg_sq", .dtype = TP_F32, .rank = 2, .shape = {1, 300}, .data = zeros},
    };
    assert_ok(&ctx, tp_safetensors_save(&ctx, scratch_path(&s, "good"), arrays, 6, adamw));
    assert_ok(&f.ctx, tp_optim_load(&f.ctx, f.optim, s.path));
    assert_ok(&ctx, tp_safetensors_save(&ctx, scratch_path(&s, "missing"), arrays, 5, adamw));
    assert_status(&f.ctx, TP_CHECKPOINT, tp_optim_load(&f.ctx, f.optim, s.path));
    arrays[2].shape[0] = 2;
    arrays[2].shape[1] = 7;
    assert_ok(&ctx, tp_safetensors_save(&ctx, scratch_path(&s, "turned"), arrays, 6, adamw));
    assert_status(&f.ctx, TP_CHECKPOINT, tp_optim_load(&f.ctx, f.optim, s.path));
    assert_ok(&ctx, tp_safetensors_save(&ctx, scratch_path(&s, "unnamed"), arrays, 6, NULL));
    assert_status(&f.ctx, TP_CHECKPOINT, tp_optim_load(&f.ctx, f.optim, s.path));
    close_case(&f);
    close_case(&sgd);
    tp_json_free(doc);
    scratch_end(&s);
}

static void test_unknown_optimizer(void **state)
{
    tp_ctx ctx;
    struct fixture f;
    tp_optim_options options = {0};
    (void)state;
    tp_ctx_init(&ctx);
    tp_json_doc *doc = peer_table(&ctx, "optim");
    open_params(&f, tp_json_get(case_named(doc, 0), "shapes"));
    assert_int_equal(tp_optim_open(&f.ctx, "lion", &options, &f.params, &f.optim), TP_INVALID);
    assert_non_null(strstr(f.ctx.message, "adamw, sgd"));
    close_case(&f);
    tp_json_free(doc);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_torch),         cmocka_unit_test(test_not_finite),  cmocka_unit_test(test_large_gradients),
        cmocka_unit_test(test_save_and_load), cmocka_unit_test(test_wrong_state), cmocka_unit_test(test_unknown_optimizer),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
