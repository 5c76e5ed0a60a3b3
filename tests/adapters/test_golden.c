/* PEFT's adapter folders on their bases: logits with the adapter and, once it is closed, without, in f32 on the cpu. */
#include "tests/support.h"

#include <math.h>

#include "adapters/adapter.h"
#include "autograd/upload.h"
#include "base/json.h"
#include "base/safetensors.h"

/* As in tests/models/test_forward.c: the reference's own f32 error is below 5e-6, a different order of summation costs as much.
 */
#define TOLERANCE 1e-4

#define ARENA ((size_t)256 << 20)

/* What the folders of the index hold for the families and the method that there are. */
static const char *const required[] = {
    "adapters/llama-lora",
    "adapters/llama-lora-all-linear",
    "adapters/llama-lora-regex-target",
    "adapters/llama-rslora",
    "adapters/mistral-lora",
    "adapters/qwen2-lora",
    "adapters/qwen3-lora",
    "adapters/gpt2-lora",
};
#define N_REQUIRED (sizeof required / sizeof *required)

/* One batch of expect.safetensors: right-padded rows of ids. */
struct input {
    int64_t rows, columns, *ids, *mask;
};

static int64_t *read_ids(tp_ctx *ctx, const tp_safetensors *file, const char *name, struct input *in)
{
    const tp_entry *e = tp_safetensors_find(file, name);
    if (e == NULL) fail_msg("%s: no %s", tp_safetensors_path(file), name);
    assert_int_equal(e->rank, 2);
    in->rows = e->shape[0];
    in->columns = e->shape[1];
    size_t n = (size_t)(in->rows * in->columns);
    int64_t *values = malloc(n * sizeof *values);
    assert_ok(ctx, tp_safetensors_read_i64(ctx, file, e, 0, n, values));
    return values;
}

static float *run(tp_ctx *ctx, tp_model *model, const struct input *in)
{
    tp_tape *tape;
    tp_owned_batch owned;
    assert_ok(ctx, tp_tape_new(ctx, ARENA, TP_F32, &tape));
    assert_ok(ctx, tp_batch_from_rows(ctx, in->ids, in->mask, in->rows, in->columns, model->config.vocab_size, &owned));
    tp_pass pass = {.tape = tape, .batch = &owned.batch};
    tp_tape_no_grad_begin(tape);
    tp_tensor *logits = tp_logits(tape, tp_model_forward(model, &pass), &model->head.weight, NULL, owned.batch.n);
    tp_tape_no_grad_end(tape);
    assert_ok(ctx, tp_tape_status(tape));
    size_t n = (size_t)(logits->rows * logits->cols);
    float *values = malloc(n * sizeof *values);
    assert_ok(ctx, ctx->device->backend->copy_out(ctx, values, logits->data, n * sizeof *values));
    tp_owned_batch_free(&owned);
    tp_tape_free(tape);
    return values;
}

/* Largest difference at rows that hold a token, relative where the logit is above 1. */
static double compare(tp_ctx *ctx, tp_model *model, const struct input *in, const tp_safetensors *expect, const char *name)
{
    const tp_entry *e = tp_safetensors_find(expect, name);
    if (e == NULL) fail_msg("%s: no %s", tp_safetensors_path(expect), name);
    int64_t columns = model->config.vocab_size, n = in->rows * in->columns * columns;
    double worst = 0;
    assert_int_equal(e->bytes, (uint64_t)n * sizeof(float));
    float *got = run(ctx, model, in), *wanted = malloc((size_t)n * sizeof *wanted);
    assert_ok(ctx, tp_safetensors_read_f32(ctx, expect, e, 0, (size_t)n, wanted));
    for (int64_t i = 0; i < n; i++) {
        if (in->mask[i / columns] == 0) continue;
        double d = fabs((double)got[i] - (double)wanted[i]) / fmax(1, fabs((double)wanted[i]));
        if (!(d <= worst)) worst = d; /* also a NaN */
    }
    free(got);
    free(wanted);
    if (!(worst <= TOLERANCE)) fail_msg("%s: %s: off by %.3g", tp_safetensors_path(expect), name, worst);
    return worst;
}

/* False if the base or the method is one that we do not have: then it is refused as bad input, never half applied. */
static bool check_adapter(tp_ctx *ctx, const char *name, const char *base)
{
    char folder[1024], path[1200];
    tp_model *model;
    tp_adapter *adapter;
    tp_safetensors *expect;
    tp_model_options options = {.precision = TP_F32, .check_weights = true};
    tp_status status = tp_model_open(ctx, golden_path(path, sizeof path, base), &options, &model);
    if (status == TP_OK) {
        status = tp_adapter_open(ctx, model, golden_path(folder, sizeof folder, name), false, &adapter);
        if (status != TP_OK) tp_model_free(model);
    }
    if (status != TP_OK) {
        if (tp_status_exit_code(status) != 3) fail_msg("%s on %s: %s: %s", name, base, tp_status_name(status), ctx->message);
        print_message("%-36s refused: %.120s\n", name, ctx->message);
        tp_ctx_clear(ctx);
        return false;
    }
    struct input in;
    snprintf(path, sizeof path, "%s/expect.safetensors", folder);
    assert_ok(ctx, tp_safetensors_open(ctx, path, &expect));
    in.ids = read_ids(ctx, expect, "input_ids", &in);
    in.mask = read_ids(ctx, expect, "attention_mask", &in);
    double with = compare(ctx, model, &in, expect, "logits");
    tp_adapter_close(adapter);
    double without = compare(ctx, model, &in, expect, "logits_base");
    print_message("%-36s logits %.1e, without the adapter %.1e\n", name, with, without);
    free(in.ids);
    free(in.mask);
    tp_safetensors_close(expect);
    tp_model_free(model);
    return true;
}

static void every_adapter_gives_the_logits_of_peft(void **state)
{
    char path[1024], name[256], base[256];
    bool checked[N_REQUIRED] = {false};
    tp_json_doc *index;
    tp_ctx ctx;
    (void)state;
    tp_ctx_init(&ctx);
    assert_ok(&ctx, tp_device_open(&ctx, "cpu", 2, &ctx.device));
    assert_ok(&ctx, tp_json_read(&ctx, golden_path(path, sizeof path, "index.json"), (size_t)16 << 20, &index));
    const tp_json *cases = tp_json_get(tp_json_root(index), "cases");
    for (size_t i = 0; i < tp_json_count(cases); i++) {
        tp_span key = tp_json_key_at(cases, i), on = tp_json_string(tp_json_get(tp_json_at(cases, i), "base"));
        if (key.len < 9 || memcmp(key.data, "adapters/", 9) != 0) continue;
        snprintf(name, sizeof name, "%.*s", (int)key.len, key.data);
        snprintf(base, sizeof base, "%.*s", (int)on.len, on.data);
        bool ours = check_adapter(&ctx, name, base);
        for (size_t r = 0; r < N_REQUIRED; r++) checked[r] = checked[r] || (ours && strcmp(required[r], name) == 0);
    }
    for (size_t r = 0; r < N_REQUIRED; r++)
        if (!checked[r]) fail_msg("%s was not compared", required[r]);
    tp_json_free(index);
    tp_device_close(ctx.device);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(every_adapter_gives_the_logits_of_peft)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
