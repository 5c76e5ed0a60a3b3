/* The whole network against transformers: logits, hidden states and losses of every golden model, in f32 on the cpu. */
#include "tests/support.h"

#include <math.h>

#include "backend/backend.h"
#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"
#include "base/safetensors.h"
#include "models/model.h"

/* The reference's own f32 error is below 6e-6 (golden/index.json); a different order of summation costs about as much again.
 * 1e-4 of the larger of 1 and the value leaves a factor of ten. */
#define TOLERANCE 1e-4

#define ARENA ((size_t)256 << 20)

/* ---- reading expectations ---- */

struct table {
    int64_t rows, columns; /* of ids and mask */
    int64_t *ids, *mask;   /* mask NULL: all ones */
};

static int64_t *read_ids(tp_ctx *ctx, const tp_safetensors *file, const char *name, int64_t shape[2])
{
    const tp_entry *e = tp_safetensors_find(file, name);
    if (e == NULL) return NULL;
    assert_int_equal(e->rank, 2);
    size_t n = (size_t)(e->shape[0] * e->shape[1]);
    int64_t *values = malloc(n * sizeof *values);
    assert_ok(ctx, tp_safetensors_read_i64(ctx, file, e, 0, n, values));
    if (shape != NULL) memcpy(shape, e->shape, 2 * sizeof *shape);
    return values;
}

static struct table read_table(tp_ctx *ctx, const tp_safetensors *file, const char *ids, const char *mask)
{
    int64_t shape[2];
    struct table t = {.ids = read_ids(ctx, file, ids, shape)};
    assert_non_null(t.ids);
    t.rows = shape[0];
    t.columns = shape[1];
    if (mask != NULL) t.mask = read_ids(ctx, file, mask, NULL);
    return t;
}

static void free_table(struct table *t)
{
    free(t->ids);
    free(t->mask);
}

/* ---- comparing ---- */

struct check {
    tp_ctx *ctx;
    const tp_safetensors *expect;
    const struct table *table;
    const char *where, *prefix; /* folder for messages; "" or "left." */
    int compared;
};

/* Rows that hold a token. */
static void compare_rows(struct check *c, const char *name, const float *got, int64_t columns)
{
    const tp_entry *e = tp_safetensors_find(c->expect, name);
    if (e == NULL) fail_msg("%s: no %s", c->where, name);
    int64_t n = c->table->rows * c->table->columns;
    assert_int_equal(e->bytes, (uint64_t)(n * columns) * sizeof(float));
    float *wanted = malloc((size_t)(n * columns) * sizeof *wanted);
    assert_ok(c->ctx, tp_safetensors_read_f32(c->ctx, c->expect, e, 0, (size_t)(n * columns), wanted));
    for (int64_t i = 0; i < n * columns; i++) {
        if (c->table->mask != NULL && c->table->mask[i / columns] == 0) continue;
        double limit = TOLERANCE * fmax(1, fabs((double)wanted[i]));
        if (!(fabs((double)got[i] - (double)wanted[i]) <= limit))
            fail_msg("%s: %s[%lld, %lld]: %g, expected %g", c->where, name, (long long)(i / columns), (long long)(i % columns),
                     (double)got[i], (double)wanted[i]);
    }
    free(wanted);
    c->compared++;
}

static float *copy_out(tp_ctx *ctx, const tp_tensor *t)
{
    size_t n = (size_t)(t->rows * t->cols);
    float *values = malloc(n * sizeof *values);
    assert_int_equal(t->dtype, TP_F32);
    assert_int_equal(t->ld, t->cols);
    assert_ok(ctx, ctx->device->backend->copy_out(ctx, values, t->data, n * sizeof *values));
    return values;
}

/* hidden.0 goes into the first block, hidden.i comes out of block i, hidden.final goes into the head. */
static void observe(void *state, int index, tp_tensor *hidden)
{
    struct check *c = state;
    char name[32];
    if (index < 0)
        snprintf(name, sizeof name, "hidden.final");
    else
        snprintf(name, sizeof name, "hidden.%d", index);
    float *values = copy_out(c->ctx, hidden);
    compare_rows(c, name, values, hidden->cols);
    free(values);
}

/* ---- running ---- */

static float *run(tp_ctx *ctx, tp_model *model, const struct table *t, struct check *observer)
{
    tp_tape *tape;
    tp_owned_batch owned;
    assert_ok(ctx, tp_tape_new(ctx, ARENA, TP_F32, &tape));
    assert_ok(ctx, tp_batch_from_rows(ctx, t->ids, t->mask, t->rows, t->columns, model->config.vocab_size, &owned));
    tp_pass pass = {.tape = tape, .batch = &owned.batch};
    if (observer != NULL) {
        pass.observe = observe;
        pass.observe_state = observer;
    }
    tp_tape_no_grad_begin(tape);
    tp_tensor *logits = tp_logits(tape, tp_model_forward(model, &pass), &model->head.weight, NULL, owned.batch.n);
    tp_tape_no_grad_end(tape);
    assert_ok(ctx, tp_tape_status(tape));
    float *values = copy_out(ctx, logits);
    tp_owned_batch_free(&owned);
    tp_tape_free(tape);
    return values;
}

/* Mean cross-entropy of the next tokens, in f64 from our logits. */
static double loss_of(const float *logits, const int64_t *labels, const struct table *t, int64_t vocab)
{
    double sum = 0, count = 0;
    for (int64_t i = 0; i + 1 < t->rows * t->columns; i++) {
        int64_t label = (i + 1) % t->columns == 0 ? -100 : labels[i + 1];
        if (label == -100) continue;
        double largest = -INFINITY, total = 0;
        const float *row = logits + i * vocab;
        for (int64_t v = 0; v < vocab; v++) largest = fmax(largest, (double)row[v]);
        for (int64_t v = 0; v < vocab; v++) total += exp((double)row[v] - largest);
        sum += largest + log(total) - (double)row[label];
        count++;
    }
    return sum / count;
}

static void check_loss(struct check *c, const float *logits, int64_t vocab)
{
    float wanted;
    int64_t *labels = read_ids(c->ctx, c->expect, "labels", NULL);
    assert_non_null(labels);
    assert_ok(c->ctx, tp_safetensors_read_f32(c->ctx, c->expect, tp_safetensors_find(c->expect, "loss"), 0, 1, &wanted));
    double got = loss_of(logits, labels, c->table, vocab);
    if (!(fabs(got - (double)wanted) <= TOLERANCE)) fail_msg("%s: loss %g, expected %g", c->where, got, (double)wanted);
    free(labels);
}

static void check_side(tp_ctx *ctx, tp_model *model, const tp_safetensors *expect, const char *where, bool left)
{
    struct table t = left ? read_table(ctx, expect, "left.input_ids", "left.attention_mask")
                          : read_table(ctx, expect, "input_ids", "attention_mask");
    struct check c = {.ctx = ctx, .expect = expect, .table = &t, .where = where};
    float *logits = run(ctx, model, &t, left ? NULL : &c);
    compare_rows(&c, left ? "left.logits" : "logits", logits, model->config.vocab_size);
    if (!left) check_loss(&c, logits, model->config.vocab_size);
    assert_int_equal(c.compared, left ? 1 : model->config.n_layers + 3);
    free(logits);
    free_table(&t);
}

static tp_model *open_model(tp_ctx *ctx, const char *path)
{
    tp_model *model;
    tp_model_options options = {.precision = TP_F32, .check_weights = true};
    assert_ok(ctx, tp_model_open(ctx, path, &options, &model));
    return model;
}

static void check_model(tp_ctx *ctx, const char *folder)
{
    char path[1200];
    tp_safetensors *expect;
    snprintf(path, sizeof path, "%s/expect.safetensors", folder);
    assert_ok(ctx, tp_safetensors_open(ctx, path, &expect));
    tp_model *model = open_model(ctx, folder);
    check_side(ctx, model, expect, folder, false);
    check_side(ctx, model, expect, folder, true);
    tp_model_free(model);
    tp_safetensors_close(expect);
}

static bool is_available(tp_ctx *ctx, const char *folder)
{
    char path[1200];
    tp_model_config config;
    snprintf(path, sizeof path, "%s/config.json", folder);
    tp_status status = tp_config_read(ctx, path, &config);
    if (status == TP_OK)
        tp_config_free(&config);
    else if (status != TP_UNSUPPORTED || strstr(ctx->message, "available: ") == NULL)
        fail_msg("%s: %s", path, ctx->message);
    tp_ctx_clear(ctx);
    return status == TP_OK;
}

/* Every model of the index: the families we have are computed, the others are refused by name. */
static void every_model_computes_what_transformers_does(void **state)
{
    char path[1024], relative[256];
    tp_json_doc *index;
    tp_ctx ctx;
    int checked = 0;
    (void)state;
    tp_ctx_init(&ctx);
    assert_ok(&ctx, tp_device_open(&ctx, "cpu", 2, &ctx.device));
    assert_ok(&ctx, tp_json_read(&ctx, golden_path(path, sizeof path, "index.json"), 16 << 20, &index));
    const tp_json *cases = tp_json_get(tp_json_root(index), "cases");
    for (size_t i = 0; i < tp_json_count(cases); i++) {
        tp_span key = tp_json_key_at(cases, i);
        if (key.len < 7 || memcmp(key.data, "models/", 7) != 0) continue;
        snprintf(relative, sizeof relative, "%.*s", (int)key.len, key.data);
        golden_path(path, sizeof path, relative);
        if (!is_available(&ctx, path)) continue;
        check_model(&ctx, path);
        checked++;
    }
    print_message("%d models\n", checked);
    assert_true(checked >= 11);
    tp_json_free(index);
    tp_device_close(ctx.device);
}

/* ggml's files with the logits of their dequantized weights, "1e-3 of the largest logit is generous" (golden/gguf). Files
 * with types we do not have are refused. */
static void every_gguf_computes_what_its_weights_say(void **state)
{
    char path[1024], relative[256];
    tp_safetensors *expect;
    tp_ctx ctx;
    int checked = 0;
    (void)state;
    tp_ctx_init(&ctx);
    assert_ok(&ctx, tp_device_open(&ctx, "cpu", 2, &ctx.device));
    assert_ok(&ctx, tp_safetensors_open(&ctx, golden_path(path, sizeof path, "gguf/logits.safetensors"), &expect));
    struct table t = read_table(&ctx, expect, "ids", NULL);
    for (size_t i = 0; i < tp_safetensors_count(expect); i++) {
        const char *name = tp_safetensors_at(expect, i)->name;
        if (!tp_ends_with(name, ".gguf")) continue;
        snprintf(relative, sizeof relative, "gguf/%s", name);
        golden_path(path, sizeof path, relative);
        if (strcmp(name, "mixed.gguf") == 0) { /* one tensor of every type there is */
            tp_model *model;
            tp_model_options options = {.precision = TP_F32, .check_weights = true};
            assert_status(&ctx, TP_UNSUPPORTED, tp_model_open(&ctx, path, &options, &model));
            continue;
        }
        tp_model *model = open_model(&ctx, path);
        struct check c = {.ctx = &ctx, .expect = expect, .table = &t, .where = path};
        float *logits = run(&ctx, model, &t, NULL);
        compare_rows(&c, name, logits, model->config.vocab_size);
        free(logits);
        tp_model_free(model);
        checked++;
    }
    assert_true(checked >= 1);
    free_table(&t);
    tp_safetensors_close(expect);
    tp_device_close(ctx.device);
}

/* ---- batches ---- */

static void batches_from_rows(void **state)
{
    static const int64_t ids[8] = {0, 5, 6, 7, 8, 9, 0, 0}, mask[8] = {0, 1, 1, 1, 1, 1, 0, 0},
                         hole[8] = {1, 0, 1, 1, 1, 1, 1, 1}, two[8] = {2, 1, 1, 1, 1, 1, 1, 1};
    int32_t host[16];
    tp_owned_batch owned;
    tp_ctx ctx;
    (void)state;
    tp_ctx_init(&ctx);
    assert_ok(&ctx, tp_device_open(&ctx, "cpu", 1, &ctx.device));
    assert_ok(&ctx, tp_batch_from_rows(&ctx, ids, mask, 2, 4, 10, &owned));
    assert_int_equal(owned.batch.n, 8);
    assert_int_equal(owned.batch.n_tokens, 5);
    assert_int_equal(owned.batch.n_segments, 2);
    assert_int_equal(owned.batch.max_position, 4);
    const tp_segment wanted[2] = {{1, 3, 1, 3}, {4, 2, 4, 2}};
    assert_memory_equal(owned.batch.segments, wanted, sizeof wanted);
    assert_ok(&ctx, ctx.device->backend->copy_out(&ctx, host, owned.memory, sizeof host));
    const int32_t rows[16] = {0, 5, 6, 7, 8, 9, 0, 0, 0, 0, 1, 2, 0, 1, 0, 0};
    assert_memory_equal(host, rows, sizeof rows);
    tp_owned_batch_free(&owned);
    assert_status(&ctx, TP_INVALID, tp_batch_from_rows(&ctx, ids, mask, 2, 4, 9, &owned));
    assert_status(&ctx, TP_INVALID, tp_batch_from_rows(&ctx, ids, hole, 2, 4, 10, &owned));
    assert_status(&ctx, TP_INVALID, tp_batch_from_rows(&ctx, ids, two, 2, 4, 10, &owned));
    assert_ok(&ctx, tp_batch_from_rows(&ctx, ids, NULL, 0, 4, 10, &owned));
    assert_int_equal(owned.batch.n_segments, 0);
    tp_owned_batch_free(&owned);
    tp_device_close(ctx.device);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_model_computes_what_transformers_does),
        cmocka_unit_test(every_gguf_computes_what_its_weights_say),
        cmocka_unit_test(batches_from_rows),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
