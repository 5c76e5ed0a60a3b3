/* Whole training runs against PEFT and torch: the gradients of step 1, fifty losses, the adapter at the end, in f32 on the cpu.
 */
#include "tests/support.h"

#include <math.h>

#include "base/mem.h"
#include "tests/trainers/training.h"

/* The reference itself moves by up to 2e-6 when its weights are off by one rounding error (golden/index.json); 1e-4 leaves room
 * for another order of summation over fifty steps and still tells a wrong epsilon or a wrong bias correction. */
#define GRADIENT_TOLERANCE 1e-4
#define LOSS_TOLERANCE     1e-4
#define FINAL_TOLERANCE    1e-3

#define MOST_STEPS 64

static const char *text_of(const tp_json *object, const char *key, char *out, size_t size)
{
    tp_span s = tp_json_string(tp_json_get(object, key));
    if (s.len == 0 || s.len >= size) fail_msg("recipe.json: no %s", key);
    snprintf(out, size, "%.*s", (int)s.len, s.data);
    return out;
}

static double number_of(const tp_json *object, const char *key)
{
    double value = 0;
    const tp_json *found = tp_json_get(object, key);
    if (found != NULL && tp_json_type_of(found) != TP_JSON_NULL) assert_true(tp_json_f64(found, &value));
    return value;
}

/* The reference starts from a file of tensors and a configuration inside recipe.json; we start from an adapter folder. */
static void make_start(tp_ctx *ctx, scratch *s, const char *golden, const tp_json *config)
{
    char path[1200], *bytes;
    size_t n;
    tp_buf text;
    tp_buf_init(&text, 0);
    tp_json_write(&text, config, 2);
    assert_ok(ctx, tp_folder_make(ctx, scratch_path(s, "start")));
    assert_ok(ctx, tp_file_write(ctx, scratch_path(s, "start/adapter_config.json"), text.data, text.len));
    tp_buf_free(&text);
    snprintf(path, sizeof path, "%s/init.safetensors", golden);
    assert_ok(ctx, tp_file_read(ctx, path, (size_t)1 << 26, &bytes, &n));
    assert_ok(ctx, tp_file_write(ctx, scratch_path(s, "start/adapter_model.safetensors"), bytes, n));
    tp_free(bytes);
}

static void read_reference(const tp_json *recipe, const char *golden, scratch *s, reference_run *run)
{
    char base[256];
    const tp_json *optimizer = tp_json_get(recipe, "optimizer"), *schedule = tp_json_get(recipe, "schedule");
    *run = (reference_run){.precision = "fp32",
                           .steps = (int64_t)number_of(recipe, "steps"),
                           .accumulation = (int64_t)number_of(recipe, "gradient_accumulation"),
                           .warmup_steps = (int64_t)number_of(schedule, "warmup_steps"),
                           .learning_rate = number_of(optimizer, "lr"),
                           .weight_decay = number_of(optimizer, "weight_decay"),
                           .momentum = number_of(optimizer, "momentum"),
                           .max_grad_norm = number_of(recipe, "max_grad_norm")};
    text_of(optimizer, "name", run->optimizer, sizeof run->optimizer);
    text_of(schedule, "name", run->schedule, sizeof run->schedule);
    golden_path(run->base, sizeof run->base, text_of(recipe, "base", base, sizeof base));
    snprintf(run->batches, sizeof run->batches, "%s/batches.safetensors", golden);
    snprintf(run->adapter, sizeof run->adapter, "%s", scratch_path(s, "start"));
    assert_true(run->steps > 0 && run->steps <= MOST_STEPS);
}

/* Largest difference between the rows of metrics.jsonl and a list of curve.json, relative if `relative`. */
static double curve_difference(tp_ctx *ctx, const char *folder, const char *key, const tp_json *wanted, int64_t steps,
                               bool relative)
{
    double got[MOST_STEPS], worst = 0;
    assert_int_equal(tp_json_count(wanted), steps);
    assert_int_equal(read_metrics(ctx, folder, key, got, MOST_STEPS), steps);
    for (int64_t i = 0; i < steps; i++) {
        double value, d;
        assert_true(tp_json_f64(tp_json_at(wanted, (size_t)i), &value));
        d = fabs(got[i] - value) / (relative && value != 0 ? fabs(value) : 1);
        if (!(d <= worst)) worst = d; /* also a NaN */
    }
    return worst;
}

static void check_below(const char *name, const char *what, double value, double limit)
{
    if (!(value <= limit)) fail_msg("%s: %s is off by %.3g, allowed are %g", name, what, value, limit);
}

/* join: with stacked weights, in which the adapters ride on the products, as on a GPU. */
static void check_curve(tp_ctx *ctx, const char *name, bool join)
{
    char golden[1024], relative[256], path[1200], output[1024], gradients[1024];
    tp_json_doc *recipe, *curve;
    reference_run run;
    scratch s;
    tp_buf text;
    tp_buf_init(&text, 0);
    scratch_begin(&s);
    snprintf(relative, sizeof relative, "curves/%s", name);
    golden_path(golden, sizeof golden, relative);
    snprintf(path, sizeof path, "%s/recipe.json", golden);
    assert_ok(ctx, tp_json_read(ctx, path, (size_t)1 << 20, &recipe));
    snprintf(path, sizeof path, "%s/curve.json", golden);
    assert_ok(ctx, tp_json_read(ctx, path, (size_t)1 << 20, &curve));

    make_start(ctx, &s, golden, tp_json_get(tp_json_root(recipe), "peft_config"));
    read_reference(tp_json_root(recipe), golden, &s, &run);
    snprintf(output, sizeof output, "%s", scratch_path(&s, "out"));
    snprintf(gradients, sizeof gradients, "%s", scratch_path(&s, "gradients.safetensors"));
    write_recipe(&text, &run, output);
    tp_train_options options = {.dump_gradients = gradients, .join = join};
    assert_ok(ctx, train_recipe(ctx, &s, tp_buf_cstr(&text), &options));

    snprintf(path, sizeof path, "%s/grads.safetensors", golden);
    double gradient = relative_difference(ctx, gradients, path);
    const tp_json *rows = tp_json_root(curve);
    double loss = curve_difference(ctx, output, "loss", tp_json_get(rows, "loss"), run.steps, false);
    double norm = curve_difference(ctx, output, "grad_norm", tp_json_get(rows, "grad_norm"), run.steps, true);
    double rate = curve_difference(ctx, output, "learning_rate", tp_json_get(rows, "lr"), run.steps, true);
    snprintf(path, sizeof path, "%s/final.safetensors", golden);
    double final = relative_difference(ctx, scratch_path(&s, "out/adapter/adapter_model.safetensors"), path);
    print_message("%-28s%s gradients %.1e, losses %.1e over %lld steps, gradient norms %.1e, adapter %.1e\n", name,
                  join ? ", joint" : "", gradient, loss, (long long)run.steps, norm, final);
    check_below(name, "the gradient of step 1", gradient, GRADIENT_TOLERANCE);
    check_below(name, "a loss", loss, LOSS_TOLERANCE);
    check_below(name, "a gradient norm", norm, FINAL_TOLERANCE);
    check_below(name, "a learning rate", rate, 1e-8); /* f64 on both sides, nine digits in metrics.jsonl */
    check_below(name, "the final adapter", final, FINAL_TOLERANCE);

    tp_buf_free(&text);
    tp_json_free(recipe);
    tp_json_free(curve);
    scratch_end(&s);
}

#define CURVE(test, name)                                                                                                      \
    static void test(void **state)                                                                                             \
    {                                                                                                                          \
        tp_ctx ctx;                                                                                                            \
        (void)state;                                                                                                           \
        tp_ctx_init(&ctx);                                                                                                     \
        check_curve(&ctx, name, false);                                                                                        \
        check_curve(&ctx, name, true);                                                                                         \
    }
CURVE(llama_lora, "llama-lora")
CURVE(llama_rslora, "llama-rslora")
CURVE(llama_lora_all_linear_accumulated, "llama-lora-all-linear-accum")
CURVE(llama_lora_sgd, "llama-lora-sgd")
CURVE(gpt2_lora, "gpt2-lora")
CURVE(qwen3_lora, "qwen3-lora")

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(llama_lora),     cmocka_unit_test(llama_rslora), cmocka_unit_test(llama_lora_all_linear_accumulated),
        cmocka_unit_test(llama_lora_sgd), cmocka_unit_test(gpt2_lora),    cmocka_unit_test(qwen3_lora),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
