/* Less and less memory: the plan computes more and more again, fits every time, and the run's numbers stay the same bits; sums
 * over slices of the batch are taken in another order. */
#include "tests/support.h"

#include <math.h>

#include "base/file.h"
#include "base/mem.h"
#include "tests/trainers/training.h"
#include "trainers/run.h"

#define STEPS 3

/* A limit of 0 is none. Dropout has to be drawn again alike, slice or not. */
static void write_limited(tp_buf *out, const char *output, uint64_t limit, double dropout, bool offload)
{
    char base[1024], batches[1024];
    golden_path(base, sizeof base, "models/llama");
    golden_path(batches, sizeof batches, "curves/llama-lora/batches.safetensors");
    tp_buf_clear(out);
    tp_buf_printf(out, "base_model: %s\nadapter: lora\nlora_r: 4\nlora_target_modules: all-linear\nprecision: fp32\n", base);
    tp_buf_printf(out, "datasets:\n  - {path: %s, type: tokens}\nmax_steps: %d\nlearning_rate: 0.01\n", batches, STEPS);
    tp_buf_printf(out, "lora_dropout: %g\nactivation_offloading: %s\n", dropout, offload ? "true" : "false");
    if (limit > 0) tp_buf_printf(out, "memory_limit: %llu\n", (unsigned long long)limit);
    tp_buf_printf(out, "output_dir: %s\n", output);
}

static void plan_of(tp_ctx *ctx, scratch *s, const char *text, bool join, tp_plan *plan)
{
    tp_config config;
    tp_problems problems = {0};
    tp_recipe *recipe;
    tp_run *run;
    tp_recipe_options how = {.schema = &tp_recipe_schema};
    tp_train_options options = {.join = join, .dry_run = true};
    assert_ok(ctx, tp_file_write(ctx, scratch_path(s, "recipe.yaml"), text, strlen(text)));
    assert_ok(ctx, tp_recipe_load(ctx, s->path, &how, &config, &problems, &recipe));
    tp_problems_free(&problems);
    assert_ok(ctx, tp_run_open(ctx, recipe, &config, &options, &run));
    *plan = *tp_run_plan(run);
    assert_ok(ctx, tp_run_close(run, TP_OK));
    tp_recipe_free(recipe);
}

static void read_results(tp_ctx *ctx, const char *folder, char *bytes[2], size_t n[2])
{
    static const char *const files[2] = {"metrics.jsonl", "adapter/adapter_model.safetensors"};
    char path[1200];
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, files[i]);
        assert_ok(ctx, tp_file_read(ctx, path, (size_t)1 << 26, &bytes[i], &n[i]));
    }
}

static void check_same(tp_ctx *ctx, const char *folder, char *const wanted[2], const size_t n_wanted[2])
{
    char *bytes[2];
    size_t n[2];
    read_results(ctx, folder, bytes, n);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(n[i], n_wanted[i]);
        assert_memory_equal(bytes[i], wanted[i], n[i]);
        tp_free(bytes[i]);
    }
}

/* Gradients of a few hundred terms, summed in parts: f32 rounding, three steps of it. */
static void check_near(tp_ctx *ctx, const char *folder, const char *wanted)
{
    double losses[STEPS], wanted_losses[STEPS];
    char got[1200], reference[1200];
    assert_int_equal(read_metrics(ctx, folder, "loss", losses, STEPS), STEPS);
    assert_int_equal(read_metrics(ctx, wanted, "loss", wanted_losses, STEPS), STEPS);
    for (int i = 0; i < STEPS; i++) assert_true(fabs(losses[i] - wanted_losses[i]) <= 1e-5);
    snprintf(got, sizeof got, "%s/adapter/adapter_model.safetensors", folder);
    snprintf(reference, sizeof reference, "%s/adapter/adapter_model.safetensors", wanted);
    assert_true(relative_difference(ctx, got, reference) <= 1e-4);
}

static void check_limits(bool join, double dropout, bool offload)
{
    tp_ctx ctx;
    scratch s;
    tp_buf text;
    tp_plan plan = {.peak = 0};
    char output[1024], first[1024], *wanted[2];
    size_t n_wanted[2];
    int steps = 0, remade = 0, gates = 0, recomputed = 0, sliced = 0;
    uint64_t recordings = 0;
    tp_train_options options = {.join = join};
    tp_ctx_init(&ctx);
    tp_buf_init(&text, 0);
    scratch_begin(&s);
    for (uint64_t limit = 0;; limit = plan.peak - plan.recordings - 1, steps++) { /* recordings are given up before */
        snprintf(output, sizeof output, "%s/out-%d", s.folder, steps);
        write_limited(&text, output, limit, dropout, offload);
        plan_of(&ctx, &s, tp_buf_cstr(&text), join, &plan);
        if (limit > 0 && plan.peak > limit) break;
        sliced += plan.shape.recomputed_rows > 0;
        assert_true(plan.shape.remade_layers >= remade && (plan.shape.recomputed_layers >= recomputed || sliced > 0));
        const bool joint = join || plan.shape.own_memory; /* as on every GPU */
        assert_true(plan.shape.remade_gates >= gates && (joint || plan.shape.remade_gates == 0));
        remade = plan.shape.remade_layers;
        gates = plan.shape.remade_gates;
        recomputed = plan.shape.recomputed_layers;
        assert_int_equal(remade + recomputed > 0, limit > 0);
        assert_ok(&ctx, train_recipe(&ctx, &s, tp_buf_cstr(&text), &options));
        if (limit == 0) {
            recordings = plan.recordings;
            snprintf(first, sizeof first, "%s", output);
            read_results(&ctx, output, wanted, n_wanted);
        } else if (sliced > 0) {
            check_near(&ctx, output, first);
        } else if (recordings > 0 && steps == 1) { /* no longer filled up for recordings: sums are cut elsewhere */
            check_near(&ctx, output, first);
            for (int i = 0; i < 2; i++) tp_free(wanted[i]);
            read_results(&ctx, output, wanted, n_wanted);
        } else {
            check_same(&ctx, output, wanted, n_wanted);
        }
    }
    assert_int_equal(train_recipe(&ctx, &s, tp_buf_cstr(&text), &options), TP_NOMEM);
    assert_non_null(strstr(ctx.message, "no batch and no length would fit"));
    assert_true(recomputed > 0 && sliced > 0);
    assert_int_equal(gates > 0, join || plan.shape.own_memory);
    for (int i = 0; i < 2; i++) tp_free(wanted[i]);
    tp_ctx_clear(&ctx);
    tp_buf_free(&text);
    scratch_end(&s);
}

static void test_limits(void **state)
{
    (void)state;
    check_limits(false, 0, false);
}

static void test_limits_with_dropout(void **state)
{
    (void)state;
    check_limits(false, 0.2, false);
}

static void test_limits_with_joint_weights(void **state)
{
    (void)state;
    check_limits(true, 0, false);
}

static void test_limits_with_joint_weights_and_dropout(void **state)
{
    (void)state;
    check_limits(true, 0.2, false);
}

static void test_limits_with_offloading(void **state)
{
    (void)state;
    check_limits(true, 0, true);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_limits), cmocka_unit_test(test_limits_with_dropout),
                                       cmocka_unit_test(test_limits_with_joint_weights),
                                       cmocka_unit_test(test_limits_with_joint_weights_and_dropout),
                                       cmocka_unit_test(test_limits_with_offloading)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
