/* Reading and writing PEFT's adapter folder.
 *
 * Order of checks when reading: configuration, targets against the base, tensor names both ways, shapes, values; so the first
 * message is about the most basic thing that is wrong. */
#include "adapters/adapter.h"

#include <math.h>
#include <string.h>

#include "base/json.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/safetensors.h"
#include "base/version.h"

#define TENSORS_NAME          "adapter_model.safetensors"
#define TAPEFT_JSON_MAX_BYTES ((size_t)1 << 20)

/* PEFT names, with the older spelling "lora_A.default.weight" accepted. */
static const tp_entry *find_tensor(const tp_safetensors *file, const char *name)
{
    const tp_entry *entry = tp_safetensors_find(file, name);
    size_t n = strlen(name), suffix = strlen(".weight");
    char old[TP_SAFETENSORS_NAME_MAX + 16];
    if (entry != NULL || n < suffix || n + strlen(".default") + 1 > sizeof old) return entry;
    snprintf(old, sizeof old, "%.*s.default.weight", (int)(n - suffix), name);
    return tp_safetensors_find(file, old);
}

static tp_status check_shape(tp_ctx *ctx, const tp_safetensors *file, const tp_entry *e, const tp_tensor *t)
{
    if (!tp_dtype_is_float(e->dtype))
        return tp_fail(ctx, TP_FORMAT, "%s: %s: dtype %s, expected a floating-point type", tp_safetensors_path(file), e->name,
                       tp_dtype_name(e->dtype));
    if (e->rank == 2 && e->shape[0] == t->rows && e->shape[1] == t->cols) return TP_OK;
    tp_buf shape;
    tp_buf_init(&shape, 0);
    for (int i = 0; i < e->rank; i++) tp_buf_printf(&shape, "%s%lld", i > 0 ? ", " : "", (long long)e->shape[i]);
    tp_fail(ctx, TP_SHAPE, "%s: %s: shape [%s], the base model and the rank need [%lld, %lld]", tp_safetensors_path(file),
            e->name, tp_buf_cstr(&shape), (long long)t->rows, (long long)t->cols);
    tp_buf_free(&shape);
    return TP_SHAPE;
}

static tp_status load_param(tp_ctx *ctx, const tp_safetensors *file, const tp_entry *e, tp_param *param)
{
    float *values = tp_alloc(ctx, (size_t)param->count, sizeof *values);
    if (values == NULL) return TP_NOMEM;
    tp_status status = tp_safetensors_read_f32(ctx, file, e, 0, (size_t)param->count, values);
    for (int64_t i = 0; status == TP_OK && i < param->count; i++)
        if (!isfinite(values[i]))
            status =
                tp_fail(ctx, TP_FORMAT, "%s: %s: value %lld is not finite", tp_safetensors_path(file), e->name, (long long)i);
    if (status == TP_OK)
        status = ctx->device->backend->copy_in(ctx, param->tensor.data, values, (size_t)param->count * sizeof *values);
    tp_free(values);
    return status;
}

/* The first tensor that no parameter has found. */
static tp_status check_extra(tp_ctx *ctx, const tp_safetensors *file, const tp_params *params)
{
    size_t n = tp_safetensors_count(file), i = 0;
    bool *found = tp_alloc(ctx, n, sizeof *found);
    if (found == NULL) return TP_NOMEM;
    for (size_t p = 0; p < params->n; p++) found[find_tensor(file, params->list[p].name) - tp_safetensors_at(file, 0)] = true;
    while (i < n && found[i]) i++;
    tp_free(found);
    if (i == n) return TP_OK;
    return tp_fail(ctx, TP_FORMAT, "%s: unexpected tensor %s: no adapted layer of the base has it", tp_safetensors_path(file),
                   tp_safetensors_at(file, i)->name);
}

/* Every parameter has its tensor, and every tensor is a parameter. */
static tp_status check_names(tp_ctx *ctx, const tp_safetensors *file, const tp_params *params)
{
    tp_buf missing;
    size_t n_missing = 0;
    tp_buf_init(&missing, 2048);
    for (size_t i = 0; i < params->n; i++) {
        if (find_tensor(file, params->list[i].name) != NULL) continue;
        if (n_missing++ < 4) tp_buf_printf(&missing, "%s%s", n_missing > 1 ? ", " : "", params->list[i].name);
    }
    if (n_missing > 0)
        tp_fail(ctx, TP_FORMAT, "%s: %zu of %zu tensors are missing: %s%s", tp_safetensors_path(file), n_missing, params->n,
                tp_buf_cstr(&missing), n_missing > 4 ? ", ..." : "");
    tp_buf_free(&missing);
    return n_missing > 0 ? TP_FORMAT : check_extra(ctx, file, params);
}

static tp_status check_tensors(tp_ctx *ctx, const tp_safetensors *file, const tp_params *params)
{
    TP_TRY(check_names(ctx, file, params));
    for (size_t i = 0; i < params->n; i++)
        TP_TRY(check_shape(ctx, file, find_tensor(file, params->list[i].name), &params->list[i].tensor));
    return TP_OK;
}

static tp_status load_tensors(tp_ctx *ctx, const tp_safetensors *file, const tp_params *params)
{
    for (size_t i = 0; i < params->n; i++)
        TP_TRY(load_param(ctx, file, find_tensor(file, params->list[i].name), &params->list[i]));
    return TP_OK;
}

tp_status tp_adapter_load_values(tp_ctx *ctx, const char *path, tp_params *params)
{
    tp_safetensors *file;
    TP_TRY(tp_safetensors_open(ctx, path, &file));
    tp_status status = check_tensors(ctx, file, params);
    if (status == TP_OK) status = load_tensors(ctx, file, params);
    tp_safetensors_close(file);
    return status;
}

static void take(const tp_json_doc *doc, const char *key, char *out, size_t size)
{
    tp_span text = tp_json_string(tp_json_get(tp_json_root(doc), key));
    snprintf(out, size, "%.*s", (int)(text.len < size ? text.len : size - 1), text.len > 0 ? text.data : "");
}

tp_status tp_adapter_read_made(tp_ctx *ctx, const char *folder, tp_adapter_made *made)
{
    char *path = tp_path_join(ctx, folder, "tapeft.json");
    tp_json_doc *doc = NULL;
    *made = (tp_adapter_made){.base = ""};
    if (path == NULL) return TP_NOMEM;
    tp_status status = tp_path_exists(path) ? tp_json_read(ctx, path, TAPEFT_JSON_MAX_BYTES, &doc) : TP_OK;
    if (doc != NULL) {
        take(doc, "base_fingerprint", made->base, sizeof made->base);
        take(doc, "tokenizer_fingerprint", made->tokenizer, sizeof made->tokenizer);
        take(doc, "data_fingerprint", made->data, sizeof made->data);
        take(doc, "version", made->version, sizeof made->version);
        take(doc, "device", made->device, sizeof made->device);
    }
    tp_json_free(doc);
    tp_free(path);
    return status;
}

/* tapeft.json, where there is one, names the base it was trained on. */
static tp_status check_base(tp_ctx *ctx, const char *folder, const tp_model *model, bool force)
{
    tp_adapter_made made;
    TP_TRY(tp_adapter_read_made(ctx, folder, &made));
    if (made.base[0] == '\0' || model->fingerprint[0] == '\0' || strcmp(made.base, model->fingerprint) == 0) return TP_OK;
    if (!force)
        return tp_fail(ctx, TP_FORMAT,
                       "%s/tapeft.json: the adapter was trained on another base model (fingerprint %.12s..., this one is "
                       "%.12s...); --force applies it all the same",
                       folder, made.base, model->fingerprint);
    tp_note(ctx,
            "%s/tapeft.json: the adapter was trained on another base model; applied because of --force, results may be "
            "meaningless",
            folder);
    return TP_OK;
}

static tp_status tensors_path(tp_ctx *ctx, const char *folder, char **path)
{
    *path = tp_path_join(ctx, folder, TENSORS_NAME);
    if (*path == NULL) return TP_NOMEM;
    if (tp_path_exists(*path)) return TP_OK;
    char *pickle = tp_path_join(ctx, folder, "adapter_model.bin");
    tp_status status =
        pickle == NULL ? TP_NOMEM
        : tp_path_exists(pickle)
            ? tp_fail(
                  ctx, TP_UNSUPPORTED,
                  "%s is a pickle, which can run code; save it again from PEFT with save_pretrained(safe_serialization=True)",
                  pickle)
            : tp_fail(ctx, TP_IO_READ, "%s: no such file", *path);
    tp_free(pickle);
    tp_free(*path);
    *path = NULL;
    return status;
}

/* Memory for the values only once the file is known to hold them. */
static tp_status load_declared(tp_ctx *ctx, const char *path, tp_lora *lora)
{
    tp_safetensors *file;
    TP_TRY(tp_safetensors_open(ctx, path, &file));
    tp_status status = check_tensors(ctx, file, &lora->params);
    if (status == TP_OK) status = tp_lora_allocate(ctx, lora);
    if (status == TP_OK) status = load_tensors(ctx, file, &lora->params);
    tp_safetensors_close(file);
    return status;
}

static tp_status open_on(tp_ctx *ctx, tp_model *model, const char *folder, bool force, tp_adapter *adapter)
{
    char *path;
    TP_TRY(tp_adapter_config_read(ctx, folder, &adapter->config));
    TP_TRY(check_base(ctx, folder, model, force));
    tp_targets *targets = &adapter->config.spec.targets;
    if (targets->include.n == 0 && !targets->all_linear) {
        const char *const *defaults = tp_model_default_targets(model);
        targets->include.n = 0;
        while (defaults[targets->include.n] != NULL) targets->include.n++;
        adapter->config.default_targets = defaults;
        targets->include.list = defaults;
    }
    TP_TRY(tensors_path(ctx, folder, &path));
    tp_status status = tp_lora_declare(ctx, model, &adapter->config.spec, &adapter->lora);
    if (status == TP_INVALID) { /* what a recipe would be to blame for is the file's fault here */
        ctx->status = status = TP_FORMAT;
        tp_fail_in(ctx, "%s/adapter_config.json", folder);
    }
    if (status == TP_OK) status = load_declared(ctx, path, adapter->lora);
    tp_free(path);
    return status;
}

tp_status tp_adapter_open(tp_ctx *ctx, tp_model *model, const char *folder, bool force, tp_adapter **result)
{
    tp_adapter *adapter = tp_alloc(ctx, 1, sizeof *adapter);
    if (adapter == NULL) return TP_NOMEM;
    tp_status status = open_on(ctx, model, folder, force, adapter);
    if (status != TP_OK) {
        tp_adapter_close(adapter);
        return status;
    }
    *result = adapter;
    return TP_OK;
}

void tp_adapter_close(tp_adapter *adapter)
{
    if (adapter == NULL) return;
    tp_lora_free(adapter->lora);
    tp_adapter_config_free(&adapter->config);
    tp_free(adapter);
}

/* ---- writing ---- */

/* Host copy of a flat buffer, checked to be finite. */
static tp_status fetch(tp_ctx *ctx, const tp_params *params, const float *flat, bool check, float **host)
{
    size_t bytes = (size_t)params->elements * sizeof **host;
    *host = tp_alloc(ctx, (size_t)params->elements, sizeof **host);
    if (*host == NULL) return TP_NOMEM;
    tp_status status = ctx->device->backend->copy_out(ctx, *host, flat, bytes);
    for (size_t p = 0; p < params->n && status == TP_OK && check; p++)
        for (int64_t i = 0; i < params->list[p].count && status == TP_OK; i++)
            if (!isfinite((*host)[params->list[p].offset + i]))
                status = tp_fail(ctx, TP_NUMERIC, "%s: value %lld is not finite; the adapter is not written",
                                 params->list[p].name, (long long)i);
    if (status != TP_OK) {
        tp_free(*host);
        *host = NULL;
    }
    return status;
}

static tp_status save_flat(tp_ctx *ctx, const tp_params *params, const float *flat, bool check, const char *path)
{
    float *host;
    TP_TRY(fetch(ctx, params, flat, check, &host));
    tp_named_array *arrays = tp_alloc(ctx, params->n, sizeof *arrays);
    tp_status status = arrays != NULL ? TP_OK : TP_NOMEM;
    for (size_t i = 0; i < params->n && status == TP_OK; i++) {
        const tp_param *p = &params->list[i];
        arrays[i] = (tp_named_array){
            .name = p->name, .dtype = TP_F32, .rank = 2, .shape = {p->tensor.rows, p->tensor.cols}, .data = host + p->offset};
    }
    if (status == TP_OK) status = tp_safetensors_save(ctx, path, arrays, params->n, NULL);
    tp_free(arrays);
    tp_free(host);
    return status;
}

tp_status tp_params_save(tp_ctx *ctx, const tp_params *params, const float *flat, const char *path)
{
    return save_flat(ctx, params, flat, false, path);
}

static tp_status write_tensors(tp_ctx *ctx, const tp_lora *lora, tp_publish *publish)
{
    char *path = tp_path_join(ctx, tp_publish_staging(publish), TENSORS_NAME);
    if (path == NULL) return TP_NOMEM;
    tp_status status = save_flat(ctx, &lora->params, lora->params.values, true, path);
    if (status == TP_OK) status = tp_publish_adopt(ctx, publish, TENSORS_NAME);
    tp_free(path);
    return status;
}

static void put(tp_buf *text, const char *key, const char *value)
{
    if (value != NULL && value[0] != '\0') tp_buf_printf(text, ",\n  \"%s\": \"%s\"", key, value);
}

static tp_status write_texts(tp_ctx *ctx, const tp_lora *lora, const tp_model *model, const tp_adapter_origin *origin,
                             tp_publish *publish, tp_buf *text)
{
    TP_TRY(tp_adapter_config_write(ctx, lora, model->path, text));
    TP_TRY(tp_publish_add(ctx, publish, "adapter_config.json", text->data, text->len));
    tp_buf_clear(text);
    tp_buf_printf(text, "{\n  \"base_fingerprint\": \"%s\"", model->fingerprint);
    put(text, "tokenizer_fingerprint", origin != NULL ? origin->tokenizer : NULL);
    put(text, "data_fingerprint", origin != NULL ? origin->data : NULL);
    put(text, "device", origin != NULL ? origin->device : NULL);
    tp_buf_printf(text, ",\n  \"trained_parameters\": %lld,\n  \"version\": \"%s\"\n}\n", (long long)lora->params.trained,
                  TP_VERSION);
    TP_TRY(tp_buf_status(ctx, text, "tapeft.json"));
    return tp_publish_add(ctx, publish, "tapeft.json", text->data, text->len);
}

tp_status tp_adapter_write(tp_ctx *ctx, const tp_lora *lora, const tp_model *model, const tp_adapter_origin *origin,
                           tp_publish *publish)
{
    tp_buf text;
    TP_TRY(write_tensors(ctx, lora, publish));
    tp_buf_init(&text, 0);
    tp_status status = write_texts(ctx, lora, model, origin, publish, &text);
    tp_buf_free(&text);
    return status;
}

tp_status tp_adapter_save(tp_ctx *ctx, const tp_lora *lora, const tp_model *model, const tp_adapter_origin *origin,
                          const char *folder, const char *const *extra)
{
    tp_publish *publish;
    TP_TRY(tp_publish_begin(ctx, folder, &publish));
    tp_status status = tp_adapter_write(ctx, lora, model, origin, publish);
    for (; status == TP_OK && extra != NULL && extra[0] != NULL; extra += 2)
        status = tp_publish_add(ctx, publish, extra[0], extra[1], strlen(extra[1]));
    if (status != TP_OK) {
        tp_publish_discard(publish);
        return status;
    }
    return tp_publish_commit(ctx, publish, NULL, true);
}
