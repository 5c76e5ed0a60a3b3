/* Values that are not finite: a base or an adapter that holds one is refused by name, and where that check is off, no step made
 * from such values touches what is trained. Both ways of multiplying in fp32 are tried, ours and that of the system's BLAS
 * (which falls back to ours where there is none). */
#include "tests/support.h"

#include <math.h>

#include "base/mem.h"
#include "base/safetensors.h"
#include "tests/cli/process.h"
#include "tests/scratch.h"

#define TENSOR "model.layers.1.self_attn.k_proj.weight"
#define FACTOR "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"

struct bench {
    scratch s;
    tp_ctx ctx;
    char model[1024], start[1024], recipe[1024], log[1024], out[1024];
};

static void copy_file(struct bench *b, const char *golden, const char *to)
{
    char from[1024], *bytes;
    size_t n;
    golden_path(from, sizeof from, golden);
    assert_ok(&b->ctx, tp_file_read(&b->ctx, from, (size_t)64 << 20, &bytes, &n));
    assert_ok(&b->ctx, tp_file_write(&b->ctx, scratch_path(&b->s, to), bytes, n));
    tp_free(bytes);
}

/* A copy of a golden safetensors file with `value` as element i of a tensor. */
static void copy_poisoned(struct bench *b, const char *golden, const char *to, const char *name, size_t i, float value)
{
    char *bytes;
    size_t n;
    tp_safetensors *file;
    copy_file(b, golden, to);
    assert_ok(&b->ctx, tp_safetensors_open(&b->ctx, scratch_path(&b->s, to), &file));
    const tp_entry *e = tp_safetensors_find(file, name);
    assert_non_null(e);
    assert_int_equal(e->dtype, TP_F32);
    assert_true(i < e->bytes / sizeof value);
    assert_ok(&b->ctx, tp_file_read(&b->ctx, scratch_path(&b->s, to), (size_t)64 << 20, &bytes, &n));
    memcpy(bytes + e->offset + i * sizeof value, &value, sizeof value);
    tp_safetensors_close(file);
    assert_ok(&b->ctx, tp_file_write(&b->ctx, scratch_path(&b->s, to), bytes, n));
    tp_free(bytes);
}

/* The golden llama with `value` as element i of a tensor. */
static void poison(struct bench *b, const char *name, size_t i, float value)
{
    copy_file(b, "models/llama/config.json", "model/config.json");
    copy_poisoned(b, "models/llama/model.safetensors", "model/model.safetensors", name, i, value);
}

/* A golden adapter as the start: its values are what an untouched adapter has to keep. */
static void bench_begin(struct bench *b)
{
    char data[1024];
    tp_buf text;
    tp_buf_init(&text, 0);
    tp_ctx_init(&b->ctx);
    scratch_begin(&b->s);
    snprintf(b->log, sizeof b->log, "%s", scratch_path(&b->s, "log"));
    snprintf(b->out, sizeof b->out, "%s", scratch_path(&b->s, "out"));
    snprintf(b->recipe, sizeof b->recipe, "%s", scratch_path(&b->s, "recipe.yaml"));
    snprintf(b->model, sizeof b->model, "%s", scratch_path(&b->s, "model"));
    golden_path(b->start, sizeof b->start, "adapters/llama-lora");
    golden_path(data, sizeof data, "curves/llama-lora/batches.safetensors");
    assert_int_equal(tp_folder_make(NULL, b->model), TP_OK);
    tp_buf_printf(&text, "base_model: %s\nadapter: lora\nadapter_path: %s\nprecision: fp32\n", b->model, b->start);
    tp_buf_printf(&text, "datasets:\n  - {path: %s, type: tokens}\nshuffle: false\n", data);
    tp_buf_printf(&text, "max_steps: 12\nlearning_rate: 0.01\nsave_steps: 1\noutput_dir: %s\n", b->out);
    assert_ok(&b->ctx, tp_file_write(&b->ctx, b->recipe, text.data, text.len));
    tp_buf_free(&text);
}

static void bench_end(struct bench *b)
{
    scratch_end(&b->s);
}

static int count(struct bench *b, const char *file, const char *what)
{
    char *text;
    size_t length;
    int n = 0;
    assert_ok(&b->ctx, tp_file_read(&b->ctx, scratch_path(&b->s, file), (size_t)1 << 24, &text, &length));
    for (const char *p = text; (p = strstr(p, what)) != NULL; p++) n++;
    tp_free(text);
    return n;
}

/* Tensors of two files are the same bytes. */
static void check_same_values(struct bench *b, const char *a_path, const char *b_path)
{
    tp_safetensors *first, *second;
    assert_ok(&b->ctx, tp_safetensors_open(&b->ctx, a_path, &first));
    assert_ok(&b->ctx, tp_safetensors_open(&b->ctx, b_path, &second));
    assert_int_equal(tp_safetensors_count(first), tp_safetensors_count(second));
    for (size_t i = 0; i < tp_safetensors_count(first); i++) {
        const tp_entry *e = tp_safetensors_at(first, i), *f = tp_safetensors_find(second, e->name);
        assert_non_null(f);
        assert_int_equal(e->bytes, f->bytes);
        char *x = malloc(e->bytes), *y = malloc(e->bytes);
        assert_ok(&b->ctx, tp_safetensors_read(&b->ctx, first, e, x));
        assert_ok(&b->ctx, tp_safetensors_read(&b->ctx, second, f, y));
        if (memcmp(x, y, e->bytes) != 0) fail_msg("%s was changed", e->name);
        free(x);
        free(y);
    }
    tp_safetensors_close(first);
    tp_safetensors_close(second);
}

static const float values[] = {NAN, INFINITY, -INFINITY};

static void refused_at_load(void **state)
{
    struct bench b;
    char ids[1024], out[1100];
    (void)state;
    bench_begin(&b);
    golden_path(ids, sizeof ids, "adapters/llama-lora/expect.safetensors");
    for (int i = 0; i < 3; i++) {
        poison(&b, TENSOR, 5, values[i]);
        check_exit(b.log, run_tapeft(b.log, "train", b.recipe, "--quiet"), 5);
        check_log_has(b.log, TENSOR);
        assert_false(tp_path_exists(scratch_path(&b.s, "out/adapter")));
        snprintf(out, sizeof out, "%s", scratch_path(&b.s, "logits.safetensors"));
        check_exit(b.log, run_tapeft(b.log, "logits", b.model, "--in", ids, "--out", out), 5);
        assert_false(tp_path_exists(out));
        if (tp_path_exists(b.out)) assert_int_equal(tp_folder_remove(NULL, b.out), TP_OK);
        (void)remove(b.log);
    }
    bench_end(&b);
}

/* As the start of a training and in use. */
static void adapter_refused_at_load(void **state)
{
    struct bench b;
    char ids[1024], model[1024], start[1024], choice[1100], out[1100];
    (void)state;
    bench_begin(&b);
    golden_path(ids, sizeof ids, "adapters/llama-lora/expect.safetensors");
    golden_path(model, sizeof model, "models/llama");
    snprintf(start, sizeof start, "%s", scratch_path(&b.s, "start"));
    snprintf(choice, sizeof choice, "adapter_path=%s", start);
    snprintf(out, sizeof out, "%s", scratch_path(&b.s, "logits.safetensors"));
    assert_int_equal(tp_folder_make(NULL, start), TP_OK);
    copy_file(&b, "models/llama/config.json", "model/config.json");
    copy_file(&b, "models/llama/model.safetensors", "model/model.safetensors");
    copy_file(&b, "adapters/llama-lora/adapter_config.json", "start/adapter_config.json");
    for (int i = 0; i < 3; i++) {
        copy_poisoned(&b, "adapters/llama-lora/adapter_model.safetensors", "start/adapter_model.safetensors", FACTOR, 3,
                      values[i]);
        check_exit(b.log, run_tapeft(b.log, "train", b.recipe, choice, "--quiet"), 3);
        check_log_has(b.log, FACTOR);
        assert_false(tp_path_exists(scratch_path(&b.s, "out/adapter")));
        (void)remove(b.log);
        check_exit(b.log, run_tapeft(b.log, "logits", model, "--adapter", start, "--in", ids, "--out", out), 3);
        check_log_has(b.log, FACTOR);
        assert_false(tp_path_exists(out));
        if (tp_path_exists(b.out)) assert_int_equal(tp_folder_remove(NULL, b.out), TP_OK);
        (void)remove(b.log);
    }
    bench_end(&b);
}

/* Every step is skipped, and after max_skipped_steps of them the run ends; each checkpoint holds the adapter that it began
 * with. */
static void no_update_from_non_finite_steps(void **state)
{
    static const struct {
        const char *precision, *blas;
    } ways[] = {{"precision=fp32", "none"}, {"precision=fp32", "system"}, {"precision=bf16", "none"}};
    struct bench b;
    char path[1200];
    (void)state;
    bench_begin(&b);
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", b.start);
    for (int i = 0; i < 3; i++) {
        setenv("TAPEFT_BLAS", ways[i].blas, 1);
        poison(&b, TENSOR, 5, values[i]);
        check_exit(b.log,
                   run_tapeft(b.log, "train", b.recipe, ways[i].precision, "check_base_weights=false", "max_skipped_steps=4",
                              "--quiet"),
                   5);
        check_log_has(b.log, "the step is skipped");
        check_log_has(b.log, "4 steps in a row");
        assert_false(tp_path_exists(scratch_path(&b.s, "out/adapter")));
        check_same_values(&b, scratch_path(&b.s, "out/ckpt-3/adapter_model.safetensors"), path);
        assert_int_equal(count(&b, "out/metrics.jsonl", "\"loss\": null"), 3);
        assert_int_equal(tp_folder_remove(NULL, b.out), TP_OK);
        (void)remove(b.log);
    }
    unsetenv("TAPEFT_BLAS");
    bench_end(&b);
}

/* A token that the first of four batches has and the next three do not have. */
static size_t rare_token(struct bench *b)
{
    char data[1024];
    tp_safetensors *batches;
    golden_path(data, sizeof data, "curves/llama-lora/batches.safetensors");
    assert_ok(&b->ctx, tp_safetensors_open(&b->ctx, data, &batches));
    const tp_entry *e = tp_safetensors_find(batches, "input_ids"); /* [steps, B, T] */
    assert_non_null(e);
    size_t per_step = (size_t)(e->shape[1] * e->shape[2]), n = 4 * per_step, token = 1;
    int64_t *ids = malloc(n * sizeof *ids);
    bool used[4][512] = {{false}};
    assert_ok(&b->ctx, tp_safetensors_read_i64(&b->ctx, batches, e, 0, n, ids));
    for (size_t i = 0; i < n; i++) used[i / per_step][ids[i] & 511] = true;
    free(ids);
    tp_safetensors_close(batches);
    while (token < 512 && (!used[0][token] || used[1][token] || used[2][token] || used[3][token])) token++;
    assert_true(token < 512);
    return token;
}

/* An embedding row that some batches use: those steps are skipped, the others train, and what comes out is finite. */
static void single_steps_are_skipped(void **state)
{
    struct bench b;
    (void)state;
    bench_begin(&b);
    poison(&b, "model.embed_tokens.weight", rare_token(&b) * 64, NAN);
    for (int i = 0; i < 2; i++) {
        setenv("TAPEFT_BLAS", i == 0 ? "none" : "system", 1);
        check_exit(b.log, run_tapeft(b.log, "train", b.recipe, "check_base_weights=false", "max_skipped_steps=10", "--quiet"),
                   0);
        int skipped = count(&b, "out/metrics.jsonl", "\"loss\": null"), steps = count(&b, "out/metrics.jsonl", "\"step\"");
        print_message("%d of %d steps skipped\n", skipped, steps);
        assert_int_equal(steps, 12);
        assert_true(skipped >= 1 && skipped <= 9);
        assert_true(tp_path_exists(scratch_path(&b.s, "out/adapter/adapter_model.safetensors"))); /* written only if finite */
        assert_int_equal(tp_folder_remove(NULL, b.out), TP_OK);
    }
    unsetenv("TAPEFT_BLAS");
    bench_end(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(refused_at_load),
        cmocka_unit_test(adapter_refused_at_load),
        cmocka_unit_test(no_update_from_non_finite_steps),
        cmocka_unit_test(single_steps_are_skipped),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
