/* Adapter folders: the verdicts of golden/bad/adapter, and PEFT's own folders read, written and read again. */
#include "tests/support.h"

#include <math.h>
#include <unistd.h>

#include "adapters/adapter.h"
#include "base/mem.h"
#include "base/safetensors.h"
#include "tests/failing_memory.h"
#include "tests/scratch.h"

#define INDEX_BYTES ((size_t)64 << 20)

static tp_model *open_model(tp_ctx *ctx, const char *relative)
{
    char path[1024];
    tp_model *model;
    tp_model_options options = {.precision = TP_F32};
    if (ctx->device == NULL) assert_ok(ctx, tp_device_open(ctx, "cpu", 1, &ctx->device));
    assert_ok(ctx, tp_model_open(ctx, golden_path(path, sizeof path, relative), &options, &model));
    return model;
}

static bool slots_empty(const tp_model *model)
{
    for (size_t i = 0; i < model->n_linears; i++)
        if (model->linears[i]->slot.n_terms != 0) return false;
    return true;
}

/* ---- golden/bad ---- */

static void string_of(const tp_json *object, const char *key, char *out, size_t size)
{
    tp_span s = tp_json_string(tp_json_get(object, key));
    snprintf(out, size, "%.*s", (int)s.len, s.data != NULL ? s.data : "");
}

/* What was accepted is really applied: every B (none is 0 in these files) holds numbers. */
static void assert_applied(const char *name, const tp_adapter *adapter)
{
    const tp_lora *lora = adapter->lora;
    if (lora->n_modules == 0) fail_msg("%s: no module", name);
    for (size_t i = 0; i < lora->n_modules; i++) {
        const tp_param *b = &lora->params.list[lora->modules[i].b];
        double sum = 0;
        for (int64_t k = 0; k < b->count; k++) sum += fabs((double)lora->params.values[b->offset + k]);
        if (!(sum > 0)) fail_msg("%s: %s is all zeros", name, b->name);
    }
}

static void check_case(tp_ctx *ctx, tp_model *model, const tp_json *record)
{
    char name[200], relative[220], path[1024], verdict[20];
    tp_adapter *adapter = NULL;
    int64_t class = 0;
    string_of(record, "path", name, sizeof name);
    string_of(record, "verdict", verdict, sizeof verdict);
    snprintf(relative, sizeof relative, "bad/%s", name);
    tp_status status = tp_adapter_open(ctx, model, golden_path(path, sizeof path, relative), false, &adapter);
    if (status == TP_OK) {
        if (strcmp(verdict, "refuse") == 0) fail_msg("%s: accepted", name);
        assert_applied(name, adapter);
        tp_adapter_close(adapter);
    } else {
        if (strcmp(verdict, "accept") == 0) fail_msg("%s: %s", name, ctx->message);
        if (tp_json_i64(tp_json_get(record, "class"), &class) && tp_status_exit_code(status) != class)
            fail_msg("%s: exit class %d, expected %lld: %s", name, tp_status_exit_code(status), (long long)class, ctx->message);
        if (strstr(ctx->message, "adapter_") == NULL) fail_msg("%s: the message names no file: %s", name, ctx->message);
        assert_int_equal(tp_utf8_valid_prefix(ctx->message, strlen(ctx->message)), strlen(ctx->message));
        tp_ctx_clear(ctx);
    }
    if (!slots_empty(model)) fail_msg("%s: something is left in the model", name);
}

static void test_verdicts(void **state)
{
    char path[1024];
    tp_ctx ctx;
    tp_json_doc *doc;
    size_t n = 0;
    (void)state;
    tp_ctx_init(&ctx);
    tp_model *model = open_model(&ctx, "bad/adapter/base");
    assert_ok(&ctx, tp_json_read(&ctx, golden_path(path, sizeof path, "bad/index.json"), INDEX_BYTES, &doc));
    const tp_json *cases = tp_json_get(tp_json_root(doc), "cases");
    for (size_t i = 0; i < tp_json_count(cases); i++) {
        const tp_json *record = tp_json_at(cases, i);
        tp_span name = tp_json_string(tp_json_get(record, "path"));
        if (name.len < 8 || memcmp(name.data, "adapter/", 8) != 0 || tp_span_is(name, "adapter/base")) continue;
        check_case(&ctx, model, record);
        n++;
    }
    print_message("%zu folders\n", n);
    assert_true(n > 40);
    tp_json_free(doc);
    tp_model_free(model);
    tp_device_close(ctx.device);
}

/* ---- PEFT's folders ---- */

static bool holds(const tp_names *names, const char *name)
{
    for (size_t i = 0; i < names->n; i++)
        if (strcmp(names->list[i], name) == 0) return true;
    return false;
}

static void assert_same_names(const tp_names *a, const tp_names *b)
{
    assert_int_equal(a->is_regex, b->is_regex);
    assert_int_equal(a->n, b->n);
    for (size_t i = 0; i < a->n; i++)
        if (!holds(b, a->list[i])) fail_msg("%s got lost", a->list[i]);
}

static void assert_same_patterns(const tp_pattern *a, size_t n_a, const tp_pattern *b, size_t n_b)
{
    assert_int_equal(n_a, n_b);
    for (size_t i = 0; i < n_a; i++) {
        assert_string_equal(a[i].key, b[i].key);
        assert_true(a[i].value == b[i].value);
    }
}

static void assert_same_spec(const tp_lora_spec *a, const tp_lora_spec *b)
{
    assert_int_equal(a->rank, b->rank);
    assert_true(a->alpha == b->alpha && a->dropout == b->dropout);
    assert_int_equal(a->use_rslora, b->use_rslora);
    assert_int_equal(a->gaussian, b->gaussian);
    assert_int_equal(a->targets.all_linear, b->targets.all_linear);
    assert_same_names(&a->targets.include, &b->targets.include);
    assert_same_names(&a->targets.exclude, &b->targets.exclude);
    assert_int_equal(a->targets.n_layers, b->targets.n_layers);
    for (size_t i = 0; i < a->targets.n_layers; i++) assert_int_equal(a->targets.layers[i], b->targets.layers[i]);
    assert_int_equal(a->targets.n_layers_pattern, b->targets.n_layers_pattern);
    for (size_t i = 0; i < a->targets.n_layers_pattern; i++)
        assert_string_equal(a->targets.layers_pattern[i], b->targets.layers_pattern[i]);
    assert_same_patterns(a->rank_pattern, a->n_rank_pattern, b->rank_pattern, b->n_rank_pattern);
    assert_same_patterns(a->alpha_pattern, a->n_alpha_pattern, b->alpha_pattern, b->n_alpha_pattern);
}

/* The saved tensors, name by name, are those of the folder they came from. */
static void assert_same_tensors(tp_ctx *ctx, const char *ours, const char *theirs)
{
    tp_safetensors *a, *b;
    char path[1100];
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", ours);
    assert_ok(ctx, tp_safetensors_open(ctx, path, &a));
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", theirs);
    assert_ok(ctx, tp_safetensors_open(ctx, path, &b));
    assert_int_equal(tp_safetensors_count(a), tp_safetensors_count(b));
    for (size_t i = 0; i < tp_safetensors_count(b); i++) {
        const tp_entry *e = tp_safetensors_at(b, i), *f = tp_safetensors_find(a, e->name);
        if (f == NULL) fail_msg("%s was not saved", e->name);
        assert_int_equal(f->rank, e->rank);
        size_t n = 1;
        for (int d = 0; d < e->rank; d++) {
            assert_int_equal(f->shape[d], e->shape[d]);
            n *= (size_t)e->shape[d];
        }
        float *x = malloc(n * sizeof *x), *y = malloc(n * sizeof *y);
        assert_ok(ctx, tp_safetensors_read_f32(ctx, a, f, 0, n, x));
        assert_ok(ctx, tp_safetensors_read_f32(ctx, b, e, 0, n, y));
        assert_memory_equal(x, y, n * sizeof *x);
        free(x);
        free(y);
    }
    tp_safetensors_close(a);
    tp_safetensors_close(b);
}

static void round_trip(tp_ctx *ctx, scratch *s, const char *relative, tp_model *model)
{
    static const char *const extra[] = {"chat_template.jinja", "{{ messages }}", NULL};
    char folder[1024], path[1100];
    tp_adapter *first, *again;
    assert_ok(ctx, tp_adapter_open(ctx, model, golden_path(folder, sizeof folder, relative), false, &first));
    assert_ok(ctx, tp_adapter_save(ctx, first->lora, model, NULL, scratch_path(s, "saved"), extra));
    assert_same_tensors(ctx, s->path, folder);
    size_t bytes = (size_t)first->lora->params.elements * sizeof(float);
    float *values = malloc(bytes);
    memcpy(values, first->lora->params.values, bytes);
    tp_lora_spec spec = first->config.spec;
    tp_adapter_config config;
    assert_ok(ctx, tp_adapter_config_read(ctx, s->path, &config));
    if (!spec.targets.all_linear) assert_same_spec(&config.spec, &spec);
    tp_adapter_config_free(&config);
    tp_adapter_close(first);
    assert_true(slots_empty(model));

    assert_ok(ctx, tp_adapter_open(ctx, model, s->path, false, &again));
    assert_int_equal((size_t)again->lora->params.elements * sizeof(float), bytes);
    assert_memory_equal(again->lora->params.values, values, bytes);
    tp_adapter_close(again);
    snprintf(path, sizeof path, "%s/chat_template.jinja", s->path);
    assert_true(tp_path_exists(path));
    free(values);
}

static void test_round_trips(void **state)
{
    char path[1024], name[256], base[256];
    tp_ctx ctx;
    scratch s;
    tp_json_doc *index;
    size_t n = 0;
    (void)state;
    tp_ctx_init(&ctx);
    scratch_begin(&s);
    assert_ok(&ctx, tp_device_open(&ctx, "cpu", 1, &ctx.device));
    assert_ok(&ctx, tp_json_read(&ctx, golden_path(path, sizeof path, "index.json"), INDEX_BYTES, &index));
    const tp_json *cases = tp_json_get(tp_json_root(index), "cases");
    for (size_t i = 0; i < tp_json_count(cases); i++) {
        tp_span key = tp_json_key_at(cases, i);
        snprintf(name, sizeof name, "%.*s", (int)key.len, key.data);
        string_of(tp_json_at(cases, i), "base", base, sizeof base);
        if (!tp_starts_with(name, "adapters/")) continue;
        tp_model *model = NULL;
        tp_adapter *adapter;
        tp_model_options options = {.precision = TP_F32};
        tp_status status = tp_model_open(&ctx, golden_path(path, sizeof path, base), &options, &model);
        if (status == TP_OK) status = tp_adapter_open(&ctx, model, golden_path(path, sizeof path, name), false, &adapter);
        if (status != TP_OK) { /* methods and families that only the full set has; test_golden.c knows which must be ours */
            if (tp_status_exit_code(status) != 3) fail_msg("%s: %s", name, ctx.message);
            tp_ctx_clear(&ctx);
            tp_model_free(model);
            continue;
        }
        tp_adapter_close(adapter);
        round_trip(&ctx, &s, name, model);
        tp_model_free(model);
        n++;
    }
    print_message("%zu adapters\n", n);
    assert_true(n >= 8);
    tp_json_free(index);
    scratch_end(&s);
    tp_device_close(ctx.device);
}

/* ---- saving ---- */

/* A LoRA of every setting that the file can hold, on the tiny llama. */
static void test_every_setting(void **state)
{
    static const char *const include[] = {"q_proj", "v_proj", "up_proj"}, *const exclude[] = {"layers.0.mlp.up_proj"};
    static const int64_t layers[] = {0, 1};
    static const char *const layers_pattern[] = {"layers"};
    static const tp_pattern ranks[] = {{"v_proj", 2}, {"layers.1.mlp.up_proj", 3}}, alphas[] = {{"q_proj", 0.5}};
    tp_lora_spec spec = {.rank = 5,
                         .alpha = 7.25,
                         .dropout = 0.1,
                         .use_rslora = true,
                         .gaussian = true,
                         .rank_pattern = ranks,
                         .n_rank_pattern = 2,
                         .alpha_pattern = alphas,
                         .n_alpha_pattern = 1,
                         .targets = {.include = {false, include, 3},
                                     .exclude = {false, exclude, 1},
                                     .layers = layers,
                                     .n_layers = 2,
                                     .layers_pattern = layers_pattern,
                                     .n_layers_pattern = 1}};
    tp_ctx ctx;
    scratch s;
    tp_lora *lora;
    tp_adapter *again;
    (void)state;
    tp_ctx_init(&ctx);
    scratch_begin(&s);
    tp_model *model = open_model(&ctx, "bad/adapter/base");
    assert_ok(&ctx, tp_lora_attach(&ctx, model, &spec, &lora));
    assert_int_equal(lora->n_modules, 5); /* q and v of both layers, up of layer 1 */
    assert_ok(&ctx, tp_lora_initialise(&ctx, lora));
    assert_ok(&ctx, tp_adapter_save(&ctx, lora, model, NULL, scratch_path(&s, "adapter"), NULL));
    size_t bytes = (size_t)lora->params.elements * sizeof(float);
    float *values = malloc(bytes);
    memcpy(values, lora->params.values, bytes);
    tp_lora_free(lora);
    assert_ok(&ctx, tp_adapter_open(&ctx, model, s.path, false, &again));
    assert_same_spec(&again->config.spec, &spec);
    assert_memory_equal(again->lora->params.values, values, bytes);
    for (size_t i = 0; i < again->lora->n_modules; i++) {
        const tp_lora_module *m = &again->lora->modules[i];
        bool v = tp_ends_with(m->module->path, "v_proj"), up = tp_ends_with(m->module->path, "up_proj"),
             q = tp_ends_with(m->module->path, "q_proj");
        assert_int_equal(m->rank, v ? 2 : up ? 3 : 5);
        assert_true(fabs(m->term.scaling - (q ? 0.5 : 7.25) / sqrt((double)m->rank)) < 1e-6);
    }
    tp_adapter_close(again);
    free(values);
    tp_model_free(model);
    scratch_end(&s);
    tp_device_close(ctx.device);
}

/* Values that are not finite are never written, and what was there stays. */
static void test_not_finite(void **state)
{
    char path[1024];
    tp_ctx ctx;
    scratch s;
    tp_adapter *adapter, *again;
    (void)state;
    tp_ctx_init(&ctx);
    scratch_begin(&s);
    tp_model *model = open_model(&ctx, "bad/adapter/base");
    assert_ok(&ctx, tp_adapter_open(&ctx, model, golden_path(path, sizeof path, "bad/adapter/ok"), false, &adapter));
    float *value = &adapter->lora->params.values[adapter->lora->params.list[1].offset + 1], before = *value;
    *value = NAN;
    assert_status(&ctx, TP_NUMERIC, tp_adapter_save(&ctx, adapter->lora, model, NULL, scratch_path(&s, "adapter"), NULL));
    assert_false(tp_path_exists(s.path));
    *value = before;
    assert_ok(&ctx, tp_adapter_save(&ctx, adapter->lora, model, NULL, s.path, NULL));
    *value = INFINITY;
    assert_status(&ctx, TP_NUMERIC, tp_adapter_save(&ctx, adapter->lora, model, NULL, s.path, NULL));
    *value = before;
    tp_adapter_close(adapter);
    assert_ok(&ctx, tp_adapter_open(&ctx, model, s.path, false, &again)); /* the good one */
    tp_adapter_close(again);
    tp_model_free(model);
    assert_ok(&ctx, tp_folder_remove(&ctx, s.path));
    assert_int_equal(rmdir(s.folder), 0); /* no temporary folder is left */
    tp_device_close(ctx.device);
}

/* A copy of the model with the last byte of its weights changed. */
static tp_model *open_changed(tp_ctx *ctx, scratch *s, const char *relative)
{
    static const char *const names[] = {"config.json", "model.safetensors"};
    tp_model *model;
    tp_model_options options = {.precision = TP_F32};
    assert_ok(ctx, tp_folder_make(ctx, scratch_path(s, "changed")));
    for (int i = 0; i < 2; i++) {
        char from[1200], name[64], *bytes;
        size_t n;
        snprintf(name, sizeof name, "%s/%s", relative, names[i]);
        assert_ok(ctx, tp_file_read(ctx, golden_path(from, sizeof from, name), (size_t)1 << 26, &bytes, &n));
        if (i == 1) bytes[n - 1] ^= 1;
        snprintf(name, sizeof name, "changed/%s", names[i]);
        assert_ok(ctx, tp_file_write(ctx, scratch_path(s, name), bytes, n));
        tp_free(bytes);
    }
    assert_ok(ctx, tp_model_open(ctx, scratch_path(s, "changed"), &options, &model));
    return model;
}

/* tapeft.json names the base; another one of the same shapes needs --force. */
static void test_other_base(void **state)
{
    char path[1024], folder[1024];
    tp_ctx ctx;
    scratch s;
    tp_adapter *adapter;
    (void)state;
    tp_ctx_init(&ctx);
    scratch_begin(&s);
    tp_model *model = open_model(&ctx, "bad/adapter/base"), *other = open_changed(&ctx, &s, "bad/adapter/base");
    assert_ok(&ctx, tp_adapter_open(&ctx, model, golden_path(path, sizeof path, "bad/adapter/ok"), false, &adapter));
    snprintf(folder, sizeof folder, "%s", scratch_path(&s, "adapter"));
    assert_ok(&ctx, tp_adapter_save(&ctx, adapter->lora, model, NULL, folder, NULL));
    tp_adapter_close(adapter);
    assert_ok(&ctx, tp_adapter_open(&ctx, model, folder, false, &adapter));
    tp_adapter_close(adapter);
    assert_int_equal(tp_adapter_open(&ctx, other, folder, false, &adapter), TP_FORMAT);
    assert_non_null(strstr(ctx.message, "--force"));
    tp_ctx_clear(&ctx);
    assert_true(slots_empty(other));
    assert_ok(&ctx, tp_adapter_open(&ctx, other, folder, true, &adapter));
    tp_adapter_close(adapter);
    tp_model_free(model);
    tp_model_free(other);
    scratch_end(&s);
    tp_device_close(ctx.device);
}

/* ---- memory ---- */

/* Into a new folder each time: that an old one could not be cleared away afterwards is no failure. */
static tp_status open_and_save(tp_ctx *ctx, tp_model *model, const char *folder, scratch *s, int *number)
{
    char name[32];
    tp_adapter *adapter;
    snprintf(name, sizeof name, "adapter-%d", ++*number);
    TP_TRY(tp_adapter_open(ctx, model, folder, false, &adapter));
    tp_status status = tp_adapter_save(ctx, adapter->lora, model, NULL, scratch_path(s, name), NULL);
    tp_adapter_close(adapter);
    return status;
}

static void test_failing_memory(void **state)
{
    char path[1024];
    tp_ctx ctx;
    scratch s;
    (void)state;
    tp_ctx_init(&ctx);
    scratch_begin(&s);
    tp_model *model = open_model(&ctx, "bad/adapter/base");
    int number = 0;
    golden_path(path, sizeof path, "bad/adapter/ok_rank_pattern");
    assert_survives_failing_memory(&ctx, open_and_save(&ctx, model, path, &s, &number));
    assert_true(slots_empty(model));
    tp_model_free(model);
    scratch_end(&s);
    tp_device_close(ctx.device);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_verdicts),   cmocka_unit_test(test_round_trips), cmocka_unit_test(test_every_setting),
        cmocka_unit_test(test_not_finite), cmocka_unit_test(test_other_base),  cmocka_unit_test(test_failing_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
