#include "tests/support.h"

#include <math.h>

#include "base/mem.h"
#include "base/safetensors.h"
#include "recipes/keys.h"
#include "tests/trainers/training.h"
#include "trainers/run.h"

void write_recipe(tp_buf *out, const reference_run *run, const char *output)
{
    tp_buf_printf(out, "base_model: %s\nadapter: lora\nadapter_path: %s\nprecision: %s\n", run->base, run->adapter,
                  run->precision);
    tp_buf_printf(out, "datasets:\n  - {path: %s, type: tokens}\nshuffle: false\n", run->batches);
    tp_buf_printf(out, "gradient_accumulation_steps: %lld\nmax_steps: %lld\n", (long long)run->accumulation,
                  (long long)run->steps);
    tp_buf_printf(out, "learning_rate: %.9g\nlr_scheduler: %s\nwarmup_steps: %lld\n", run->learning_rate, run->schedule,
                  (long long)run->warmup_steps);
    tp_buf_printf(out, "optimizer: %s\nweight_decay: %.9g\nmax_grad_norm: %.9g\n", run->optimizer, run->weight_decay,
                  run->max_grad_norm);
    if (strcmp(run->optimizer, "sgd") == 0) tp_buf_printf(out, "momentum: %.9g\n", run->momentum);
    tp_buf_printf(out, "output_dir: %s\n", output);
}

static tp_status train(tp_ctx *ctx, const tp_recipe *recipe, const tp_config *config, const tp_train_options *options,
                       int64_t steps)
{
    tp_run *run;
    TP_TRY(tp_run_open(ctx, recipe, config, options, &run));
    if (steps < run->steps) run->steps = steps;
    return tp_run_close(run, tp_run_train(run));
}

tp_status train_recipe(tp_ctx *ctx, scratch *s, const char *text, const tp_train_options *options)
{
    return train_recipe_steps(ctx, s, text, options, INT64_MAX);
}

tp_status train_recipe_steps(tp_ctx *ctx, scratch *s, const char *text, const tp_train_options *options, int64_t steps)
{
    tp_config config;
    tp_problems problems = {0};
    tp_recipe *recipe;
    tp_recipe_options how = {.schema = &tp_recipe_schema};
    TP_TRY(tp_file_write(ctx, scratch_path(s, "recipe.yaml"), text, strlen(text)));
    tp_status status = tp_recipe_load(ctx, s->path, &how, &config, &problems, &recipe);
    for (size_t i = 0; i < problems.n; i++) print_message("%s\n", problems.items[i].text);
    tp_problems_free(&problems);
    TP_TRY(status);
    status = train(ctx, recipe, &config, options, steps);
    tp_recipe_free(recipe);
    return status;
}

size_t read_metrics(tp_ctx *ctx, const char *folder, const char *key, double *out, size_t most)
{
    char path[1200], *text;
    size_t length, n = 0;
    snprintf(path, sizeof path, "%s/metrics.jsonl", folder);
    assert_ok(ctx, tp_file_read(ctx, path, (size_t)1 << 26, &text, &length));
    for (char *line = text, *end; n < most && (end = strchr(line, '\n')) != NULL; line = end + 1) {
        tp_json_doc *row;
        tp_json_options options = {.name = path};
        assert_ok(ctx, tp_json_parse(ctx, line, (size_t)(end - line), &options, &row));
        const tp_json *value = tp_json_get(tp_json_root(row), key);
        if (value != NULL && !tp_json_f64(value, &out[n++])) out[n - 1] = NAN; /* null: not finite */
        tp_json_free(row);
    }
    tp_free(text);
    return n;
}

double relative_difference(tp_ctx *ctx, const char *got, const char *reference)
{
    tp_safetensors *ours, *theirs;
    double difference = 0, norm = 0;
    assert_ok(ctx, tp_safetensors_open(ctx, got, &ours));
    assert_ok(ctx, tp_safetensors_open(ctx, reference, &theirs));
    for (size_t i = 0; i < tp_safetensors_count(theirs); i++) {
        const tp_entry *wanted = tp_safetensors_at(theirs, i), *found = tp_safetensors_find(ours, wanted->name);
        if (found == NULL) fail_msg("%s: no %s", got, wanted->name);
        if (found->bytes != wanted->bytes || wanted->dtype != TP_F32) fail_msg("%s: %s: another size", got, wanted->name);
        size_t n = wanted->bytes / sizeof(float);
        float *a = malloc(wanted->bytes), *b = malloc(wanted->bytes);
        assert_ok(ctx, tp_safetensors_read_f32(ctx, ours, found, 0, n, a));
        assert_ok(ctx, tp_safetensors_read_f32(ctx, theirs, wanted, 0, n, b));
        for (size_t j = 0; j < n; j++) {
            double d = (double)a[j] - (double)b[j];
            difference += d * d;
            norm += (double)b[j] * (double)b[j];
        }
        free(a);
        free(b);
    }
    assert_int_equal(tp_safetensors_count(ours), tp_safetensors_count(theirs));
    tp_safetensors_close(ours);
    tp_safetensors_close(theirs);
    assert_true(norm > 0);
    return sqrt(difference / norm);
}
