/* adapter_config.json. Every key of PEFT's LoraConfig is either used, harmless, or refused when it is set. */
#include "adapters/config.h"

#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/log.h"
#include "base/mem.h"

#define ALPHA_MIN 1e-30 /* so that the scaling, alpha by rank, is a number in fp32 */
#define ALPHA_MAX 1e30

/* Options of PEFT that change what the tensors mean; fine only while null, false, empty or at the stated value. */
static const char *const variants[] = {"use_dora",
                                       "lora_bias",
                                       "modules_to_save",
                                       "trainable_token_indices",
                                       "target_parameters",
                                       "layer_replication",
                                       "alora_invocation_tokens",
                                       "use_qalora",
                                       "velora_config",
                                       "monteclora_config",
                                       "use_bdlora",
                                       "arrow_config",
                                       "kasa_config",
                                       "megatron_config",
                                       "eva_config",
                                       "corda_config",
                                       "lora_ga_config",
                                       NULL};
/* Read below, or without any effect on the numbers. */
static const char *const known[] = {"peft_type",
                                    "r",
                                    "lora_alpha",
                                    "lora_dropout",
                                    "target_modules",
                                    "exclude_modules",
                                    "layers_to_transform",
                                    "layers_pattern",
                                    "rank_pattern",
                                    "alpha_pattern",
                                    "bias",
                                    "use_rslora",
                                    "init_lora_weights",
                                    "fan_in_fan_out",
                                    "task_type",
                                    "base_model_name_or_path",
                                    "revision",
                                    "inference_mode",
                                    "auto_mapping",
                                    "peft_version",
                                    "megatron_core",
                                    "loftq_config",
                                    "qalora_group_size",
                                    "ensure_weight_tying",
                                    "runtime_config",
                                    NULL};

static bool listed(const char *const *list, tp_span name)
{
    for (; *list != NULL; list++)
        if (tp_span_is(name, *list)) return true;
    return false;
}

static bool is_off(const tp_json *value)
{
    switch (tp_json_type_of(value)) {
    case TP_JSON_NULL: return true;
    case TP_JSON_BOOL: return !tp_json_bool(value, true);
    case TP_JSON_ARRAY:
    case TP_JSON_OBJECT: return tp_json_count(value) == 0;
    default: return false;
    }
}

static tp_status wrong(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *value, const char *key, const char *expected)
{
    char where[512];
    return tp_fail(ctx, TP_FORMAT, "%s: %s: expected %s", tp_json_where(doc, value, where, sizeof where), key, expected);
}

static tp_status keep_string(tp_ctx *ctx, tp_adapter_config *config, tp_span text, const char **kept)
{
    TP_TRY(tp_grow(ctx, &config->strings, &config->strings_capacity, config->n_strings + 1, sizeof *config->strings));
    char *copy = tp_strndup(ctx, text.data, text.len);
    if (copy == NULL) return TP_NOMEM;
    config->strings[config->n_strings++] = copy;
    *kept = copy;
    return TP_OK;
}

/* A string (regular expression) or a list of strings. */
static tp_status read_names(tp_ctx *ctx, tp_adapter_config *config, const tp_json_doc *doc, const char *key,
                            bool string_is_regex, tp_names *names)
{
    const tp_json *value = tp_json_get(tp_json_root(doc), key);
    tp_json_type type = tp_json_type_of(value);
    size_t n = type == TP_JSON_ARRAY ? tp_json_count(value) : 1;
    if (type == TP_JSON_NULL) return TP_OK;
    if ((type != TP_JSON_ARRAY && type != TP_JSON_STRING) || n > TP_ADAPTER_LIST_MAX)
        return wrong(ctx, doc, value, key, "a list of names, or a string");
    if (n == 0) return TP_OK; /* as if it were absent */
    const char **list = tp_alloc(ctx, n, sizeof *list);
    if (list == NULL) return TP_NOMEM;
    tp_status status = TP_OK;
    for (size_t i = 0; i < n && status == TP_OK; i++) {
        const tp_json *item = type == TP_JSON_ARRAY ? tp_json_at(value, i) : value;
        if (tp_json_type_of(item) != TP_JSON_STRING)
            status = wrong(ctx, doc, item, key, "a list of names");
        else
            status = keep_string(ctx, config, tp_json_string(item), &list[i]);
    }
    *names = (tp_names){type == TP_JSON_STRING && string_is_regex, list, n};
    return status;
}

static tp_status read_layers(tp_ctx *ctx, tp_adapter_config *config, const tp_json_doc *doc)
{
    const tp_json *value = tp_json_get(tp_json_root(doc), "layers_to_transform");
    tp_json_type type = tp_json_type_of(value);
    size_t n = type == TP_JSON_ARRAY ? tp_json_count(value) : 1;
    if (type == TP_JSON_NULL) return TP_OK;
    if (n > TP_ADAPTER_LIST_MAX) return wrong(ctx, doc, value, "layers_to_transform", "fewer layers");
    config->layers = tp_alloc(ctx, n, sizeof *config->layers);
    if (config->layers == NULL) return TP_NOMEM;
    for (size_t i = 0; i < n; i++)
        if (!tp_json_i64(type == TP_JSON_ARRAY ? tp_json_at(value, i) : value, &config->layers[i]))
            return wrong(ctx, doc, value, "layers_to_transform", "layer numbers");
    config->spec.targets.layers = config->layers;
    config->spec.targets.n_layers = n;
    return TP_OK;
}

static tp_status read_pattern(tp_ctx *ctx, tp_adapter_config *config, const tp_json_doc *doc, const char *key,
                              tp_pattern **patterns, size_t *count)
{
    const tp_json *value = tp_json_get(tp_json_root(doc), key);
    size_t n = tp_json_count(value);
    if (tp_json_type_of(value) == TP_JSON_NULL) return TP_OK;
    if (tp_json_type_of(value) != TP_JSON_OBJECT || n > TP_LIMIT_PATTERNS)
        return wrong(ctx, doc, value, key, "an object of at most 4096 times pattern: number");
    *patterns = tp_alloc(ctx, n, sizeof **patterns);
    if (*patterns == NULL) return TP_NOMEM;
    for (size_t i = 0; i < n; i++) {
        TP_TRY(keep_string(ctx, config, tp_json_key_at(value, i), &(*patterns)[i].key));
        double *number = &(*patterns)[i].value;
        if (!tp_json_f64(tp_json_at(value, i), number) || !(*number >= ALPHA_MIN && *number <= ALPHA_MAX))
            return wrong(ctx, doc, tp_json_at(value, i), key, "a number from 1e-30 to 1e30");
    }
    *count = n;
    return TP_OK;
}

static tp_status refuse_variants(tp_ctx *ctx, const tp_json_doc *doc)
{
    const tp_json *root = tp_json_root(doc);
    char where[512];
    for (size_t i = 0; i < tp_json_count(root); i++) {
        tp_span key = tp_json_key_at(root, i);
        const tp_json *value = tp_json_at(root, i);
        if (listed(variants, key) && !is_off(value))
            return tp_fail(ctx, TP_UNSUPPORTED, "%s: %.*s is set, which this version cannot run",
                           tp_json_where(doc, value, where, sizeof where), (int)key.len, key.data);
        if (!listed(variants, key) && !listed(known, key))
            tp_note(ctx, "%s: unknown key \"%.*s\" is ignored", tp_json_where(doc, value, where, sizeof where), (int)key.len,
                    key.data);
    }
    const tp_json *bias = tp_json_get(root, "bias"), *init = tp_json_get(root, "init_lora_weights");
    if (tp_json_type_of(bias) != TP_JSON_NULL && !tp_span_is(tp_json_string(bias), "none"))
        return tp_fail(ctx, TP_UNSUPPORTED, "%s: bias: only \"none\" can be run",
                       tp_json_where(doc, bias, where, sizeof where));
    tp_span name = tp_json_string(init);
    if (tp_json_type_of(init) == TP_JSON_STRING && !tp_span_is(name, "gaussian") && !tp_span_is(name, "eva") &&
        !tp_span_is(name, "orthogonal"))
        return tp_fail(ctx, TP_UNSUPPORTED,
                       "%s: init_lora_weights \"%.*s\" changes the base weights; convert the adapter to a plain LoRA first",
                       tp_json_where(doc, init, where, sizeof where), (int)name.len, name.data);
    return TP_OK;
}

static tp_status read_method(tp_ctx *ctx, const tp_json_doc *doc)
{
    const tp_json *root = tp_json_root(doc), *type = tp_json_get(root, "peft_type");
    char where[512];
    if (tp_json_type_of(root) != TP_JSON_OBJECT) return wrong(ctx, doc, root, "adapter_config.json", "an object");
    if (tp_json_type_of(type) != TP_JSON_STRING)
        return wrong(ctx, doc, type != NULL ? type : root, "peft_type", "a method's name such as \"LORA\"");
    tp_span name = tp_json_string(type);
    if (!tp_span_is(name, "LORA"))
        return tp_fail(ctx, TP_UNSUPPORTED, "%s: peft_type %.*s: this version runs LORA",
                       tp_json_where(doc, type, where, sizeof where), (int)name.len, name.data);
    return refuse_variants(ctx, doc);
}

static tp_status read_config(tp_ctx *ctx, const tp_json_doc *doc, tp_adapter_config *config)
{
    tp_lora_spec *spec = &config->spec;
    const tp_json *root = tp_json_root(doc);
    tp_span base = {"", 0};
    *spec = (tp_lora_spec){.rank = 8, .alpha = 8, .allow_unmatched = true};
    TP_TRY(read_method(ctx, doc));
    TP_TRY(tp_json_need_i64(ctx, doc, root, "r", false, 1, 65536, &spec->rank));
    TP_TRY(tp_json_need_f64(ctx, doc, root, "lora_alpha", false, ALPHA_MIN, ALPHA_MAX, &spec->alpha));
    TP_TRY(tp_json_need_f64(ctx, doc, root, "lora_dropout", false, 0, 1, &spec->dropout));
    TP_TRY(tp_json_need_bool(ctx, doc, root, "use_rslora", false, &spec->use_rslora));
    TP_TRY(tp_json_need_string(ctx, doc, root, "base_model_name_or_path", false, &base));
    config->base_model = tp_strndup(ctx, base.data, base.len);
    if (config->base_model == NULL) return TP_NOMEM;
    spec->gaussian = tp_span_is(tp_json_string(tp_json_get(root, "init_lora_weights")), "gaussian");
    tp_names layers_pattern = {0};
    TP_TRY(read_names(ctx, config, doc, "target_modules", true, &spec->targets.include));
    TP_TRY(read_names(ctx, config, doc, "exclude_modules", true, &spec->targets.exclude));
    TP_TRY(read_names(ctx, config, doc, "layers_pattern", false, &layers_pattern));
    spec->targets.layers_pattern = layers_pattern.list;
    spec->targets.n_layers_pattern = layers_pattern.n;
    TP_TRY(read_layers(ctx, config, doc));
    TP_TRY(read_pattern(ctx, config, doc, "rank_pattern", &config->rank_pattern, &spec->n_rank_pattern));
    TP_TRY(read_pattern(ctx, config, doc, "alpha_pattern", &config->alpha_pattern, &spec->n_alpha_pattern));
    spec->rank_pattern = config->rank_pattern;
    spec->alpha_pattern = config->alpha_pattern;
    tp_names *include = &spec->targets.include;
    if (include->is_regex && strcasecmp(include->list[0], "all-linear") == 0) spec->targets.all_linear = true;
    return TP_OK;
}

/* A run's folder in place of what it holds is a likely slip. */
static tp_status check_place(tp_ctx *ctx, const char *folder, const char *path)
{
    if (tp_path_exists(path)) return TP_OK;
    char *inside = tp_path_join(ctx, folder, "adapter/adapter_config.json");
    if (inside == NULL) return TP_NOMEM;
    bool run = tp_path_exists(inside);
    tp_free(inside);
    if (!run) return TP_OK; /* reading says what is missing */
    return tp_fail(ctx, TP_IO_READ, "%s: no such file; %s is the folder of a run: its adapter is in %s/adapter", path, folder,
                   folder);
}

tp_status tp_adapter_config_read(tp_ctx *ctx, const char *folder, tp_adapter_config *config)
{
    *config = (tp_adapter_config){0};
    char *path = tp_path_join(ctx, folder, "adapter_config.json");
    tp_json_doc *doc = NULL;
    tp_status status = path != NULL ? check_place(ctx, folder, path) : TP_NOMEM;
    if (status == TP_OK) status = tp_json_read(ctx, path, TP_ADAPTER_CONFIG_BYTES, &doc);
    if (status == TP_OK) status = read_config(ctx, doc, config);
    tp_json_free(doc);
    tp_free(path);
    if (status != TP_OK) tp_adapter_config_free(config);
    return status;
}

static void free_list(const char *const *list)
{
    void *memory;
    memcpy(&memory, &list, sizeof memory);
    tp_free(memory);
}

void tp_adapter_config_free(tp_adapter_config *config)
{
    for (size_t i = 0; i < config->n_strings; i++) {
        void *memory;
        memcpy(&memory, &config->strings[i], sizeof memory);
        tp_free(memory);
    }
    tp_free(config->strings);
    tp_free(config->layers);
    tp_free(config->rank_pattern);
    tp_free(config->alpha_pattern);
    tp_free(config->base_model);
    if (config->spec.targets.include.list != config->default_targets) free_list(config->spec.targets.include.list);
    free_list(config->spec.targets.exclude.list);
    free_list(config->spec.targets.layers_pattern);
    *config = (tp_adapter_config){0};
}

/* ---- writing ---- */

static void write_strings(tp_buf *out, const char *const *list, size_t n)
{
    tp_buf_text(out, n > 0 ? "[" : "[]");
    for (size_t i = 0; i < n; i++) {
        tp_buf_text(out, i > 0 ? ",\n    " : "\n    ");
        tp_json_write_string(out, list[i], strlen(list[i]));
    }
    if (n > 0) tp_buf_text(out, "\n  ]");
}

static void write_names(tp_buf *out, const tp_names *names)
{
    if (names->n == 0)
        tp_buf_text(out, "null");
    else if (names->is_regex)
        tp_json_write_string(out, names->list[0], strlen(names->list[0]));
    else
        write_strings(out, names->list, names->n);
}

static void write_pattern(tp_buf *out, const tp_pattern *patterns, size_t n)
{
    tp_buf_text(out, n > 0 ? "{" : "{}");
    for (size_t i = 0; i < n; i++) {
        tp_buf_text(out, i > 0 ? ",\n    " : "\n    ");
        tp_json_write_string(out, patterns[i].key, strlen(patterns[i].key));
        tp_buf_text(out, ": ");
        tp_json_write_f64(out, patterns[i].value, 17);
    }
    if (n > 0) tp_buf_text(out, "\n  }");
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* What "all-linear" or the family's default stood for: the adapted modules by last name if that names exactly them (it does in
 * every family here, since heads are the only linears left out), sorted. */
static tp_status write_expanded(tp_ctx *ctx, const tp_lora *lora, tp_buf *out)
{
    const char **names = tp_alloc(ctx, lora->n_modules, sizeof *names);
    size_t n = 0;
    if (names == NULL) return TP_NOMEM;
    for (size_t i = 0; i < lora->n_modules; i++) {
        const char *last = tp_module_name(lora->modules[i].module);
        bool seen = false;
        for (size_t j = 0; j < n; j++) seen = seen || strcmp(names[j], last) == 0;
        if (!seen) names[n++] = last;
    }
    qsort(names, n, sizeof *names, by_name);
    write_strings(out, names, n);
    tp_free(names);
    return TP_OK;
}

tp_status tp_adapter_config_write(tp_ctx *ctx, const tp_lora *lora, const char *base_model, tp_buf *out)
{
    const tp_lora_spec *s = &lora->spec;
    bool conv1d = false;
    for (size_t i = 0; i < lora->n_modules; i++) conv1d = conv1d || lora->modules[i].module->conv1d;
    tp_buf_text(out, "{\n  \"alpha_pattern\": ");
    write_pattern(out, s->alpha_pattern, s->n_alpha_pattern);
    tp_buf_text(out, ",\n  \"auto_mapping\": null,\n  \"base_model_name_or_path\": ");
    tp_json_write_string(out, base_model, strlen(base_model));
    tp_buf_text(out, ",\n  \"bias\": \"none\",\n  \"exclude_modules\": ");
    write_names(out, &s->targets.exclude);
    tp_buf_printf(
        out, ",\n  \"fan_in_fan_out\": %s,\n  \"inference_mode\": true,\n  \"init_lora_weights\": %s,\n  \"layers_pattern\": ",
        conv1d ? "true" : "false", s->gaussian ? "\"gaussian\"" : "true");
    if (s->targets.n_layers_pattern > 0)
        write_strings(out, s->targets.layers_pattern, s->targets.n_layers_pattern);
    else
        tp_buf_text(out, "null");
    tp_buf_text(out, ",\n  \"layers_to_transform\": ");
    if (s->targets.n_layers == 0) tp_buf_text(out, "null");
    for (size_t i = 0; i < s->targets.n_layers; i++)
        tp_buf_printf(out, "%s%lld%s", i == 0 ? "[" : ", ", (long long)s->targets.layers[i],
                      i + 1 == s->targets.n_layers ? "]" : "");
    tp_buf_text(out, ",\n  \"lora_alpha\": ");
    tp_json_write_f64(out, s->alpha, 17);
    tp_buf_text(out, ",\n  \"lora_bias\": false,\n  \"lora_dropout\": ");
    tp_json_write_f64(out, s->dropout, 17);
    tp_buf_printf(out, ",\n  \"modules_to_save\": null,\n  \"peft_type\": \"LORA\",\n  \"r\": %lld,\n  \"rank_pattern\": ",
                  (long long)s->rank);
    write_pattern(out, s->rank_pattern, s->n_rank_pattern);
    tp_buf_text(out, ",\n  \"revision\": null,\n  \"target_modules\": ");
    if (s->targets.all_linear)
        TP_TRY(write_expanded(ctx, lora, out));
    else
        write_names(out, &s->targets.include);
    tp_buf_printf(out, ",\n  \"task_type\": \"CAUSAL_LM\",\n  \"use_dora\": false,\n  \"use_rslora\": %s\n}\n",
                  s->use_rslora ? "true" : "false");
    return tp_buf_status(ctx, out, "adapter_config.json");
}
