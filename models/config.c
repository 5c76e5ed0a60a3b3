/* config.json in: what it says about the network, in the spellings of transformers 4 and 5.
 *
 * A key that changes what the network computes and that we cannot follow is refused by name. A key that is absent has
 * transformers' default; sizes have none. */
#include "models/config.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/log.h"
#include "base/mem.h"
#include "models/config_rope.h"

const tp_family_info tp_families[TP_FAMILY_COUNT] = {
    [TP_FAMILY_LLAMA] = {"llama", "LlamaForCausalLM", "llama"}, [TP_FAMILY_MISTRAL] = {"mistral", "MistralForCausalLM", NULL},
    [TP_FAMILY_QWEN2] = {"qwen2", "Qwen2ForCausalLM", "qwen2"}, [TP_FAMILY_QWEN3] = {"qwen3", "Qwen3ForCausalLM", "qwen3"},
    [TP_FAMILY_GPT2] = {"gpt2", "GPT2LMHeadModel", "gpt2"},
};

const char *tp_family_list(char *out, size_t size)
{
    size_t used = 0;
    out[0] = '\0';
    for (int f = 0; f < TP_FAMILY_COUNT && used < size; f++)
        used += (size_t)snprintf(out + used, size - used, "%s%s", f > 0 ? ", " : "", tp_families[f].model_type);
    return out;
}

/* Names of the keys that mean the same in every family. */
struct spelling {
    const char *hidden, *intermediate, *layers, *heads, *positions, *epsilon, *activation;
    int64_t default_positions;
    double default_epsilon;
    const char *default_activation;
    bool default_tied;
};

static const struct spelling llama_kind = {"hidden_size",
                                           "intermediate_size",
                                           "num_hidden_layers",
                                           "num_attention_heads",
                                           "max_position_embeddings",
                                           "rms_norm_eps",
                                           "hidden_act",
                                           2048,
                                           1e-6,
                                           "silu",
                                           false};
static const struct spelling gpt2_kind = {
    "n_embd", "n_inner", "n_layer",  "n_head", "n_positions", "layer_norm_epsilon", "activation_function",
    1024,     1e-5,      "gelu_new", true};

static const struct spelling *spelling_of(tp_family family)
{
    return family == TP_FAMILY_GPT2 ? &gpt2_kind : &llama_kind;
}

/* ---- what kind of model ---- */

static tp_status read_family(const tp_config_reader *r)
{
    tp_span type, architecture;
    char known[128];
    TP_TRY(tp_json_need_string(r->ctx, r->doc, r->root, "model_type", true, &type));
    tp_model_config *c = r->config;
    int f = 0;
    while (f < TP_FAMILY_COUNT && !tp_span_is(type, tp_families[f].model_type)) f++;
    if (f == TP_FAMILY_COUNT)
        return tp_config_refuse(r, tp_json_get(r->root, "model_type"), TP_UNSUPPORTED,
                                "model_type: \"%.*s\" is not supported; available: %s", (int)type.len, type.data,
                                tp_family_list(known, sizeof known));
    c->family = (tp_family)f;
    snprintf(c->model_type, sizeof c->model_type, "%s", tp_families[f].model_type);
    snprintf(c->architecture, sizeof c->architecture, "%s", tp_families[f].architecture);
    const tp_json *list = tp_json_get(r->root, "architectures");
    if (tp_json_type_of(list) != TP_JSON_ARRAY || tp_json_count(list) == 0) return TP_OK;
    architecture = tp_json_string(tp_json_at(list, 0));
    if (architecture.len > 0 && architecture.len < sizeof c->architecture)
        snprintf(c->architecture, sizeof c->architecture, "%.*s", (int)architecture.len, architecture.data);
    return TP_OK;
}

/* Weights packed by other tools have other tensors; code that a folder brings along is never run. */
static tp_status read_provenance(const tp_config_reader *r)
{
    static const char *const packed[] = {"quantization_config", "compression_config", "quantization"};
    for (size_t i = 0; i < sizeof packed / sizeof *packed; i++) {
        const tp_json *value = tp_json_get(r->root, packed[i]);
        if (tp_json_type_of(value) == TP_JSON_NULL) continue;
        tp_span method = tp_json_string(tp_json_get(value, "quant_method"));
        return tp_config_refuse(r, value, TP_UNSUPPORTED,
                                "%s: weights packed by \"%.*s\" are not read; use the original model or a GGUF file", packed[i],
                                (int)(method.len > 0 ? method.len : 15), method.len > 0 ? method.data : "an unnamed tool");
    }
    if (tp_json_get(r->root, "auto_map") != NULL || tp_json_get(r->root, "trust_remote_code") != NULL)
        tp_note(r->ctx, "config.json names code to run (auto_map or trust_remote_code): ignored, the built-in %s is used",
                r->config->model_type);
    return TP_OK;
}

static tp_status read_dtype(const tp_config_reader *r)
{
    static const struct {
        const char *name;
        tp_dtype dtype;
    } names[] = {{"float32", TP_F32}, {"bfloat16", TP_BF16}, {"float16", TP_F16}};
    const char *key = tp_json_type_of(tp_json_get(r->root, "dtype")) != TP_JSON_NULL ? "dtype" : "torch_dtype";
    tp_span name = {NULL, 0};
    r->config->dtype = TP_F32;
    TP_TRY(tp_json_need_string(r->ctx, r->doc, r->root, key, false, &name));
    if (name.data == NULL) return TP_OK;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (!tp_span_is(name, names[i].name)) continue;
        r->config->dtype = names[i].dtype;
        return TP_OK;
    }
    return tp_config_refuse(r, tp_json_get(r->root, key), TP_UNSUPPORTED,
                            "%s: expected float32, bfloat16 or float16, got \"%.*s\"", key, (int)name.len, name.data);
}

/* ---- sizes ---- */

static tp_status read_sizes(const tp_config_reader *r)
{
    tp_model_config *c = r->config;
    const struct spelling *key = spelling_of(c->family);
    tp_ctx *ctx = r->ctx;
    bool gpt2 = c->family == TP_FAMILY_GPT2;
    TP_TRY(tp_json_need_i64(ctx, r->doc, r->root, "vocab_size", true, 1, TP_LIMIT_VOCAB, &c->vocab_size));
    TP_TRY(tp_json_need_i64(ctx, r->doc, r->root, key->hidden, true, 1, TP_LIMIT_WIDTH, &c->hidden_size));
    TP_TRY(tp_json_need_i64(ctx, r->doc, r->root, key->layers, true, 1, TP_LIMIT_LAYERS, &c->n_layers));
    TP_TRY(tp_json_need_i64(ctx, r->doc, r->root, key->heads, true, 1, TP_LIMIT_HEADS, &c->n_heads));
    c->intermediate_size = 4 * c->hidden_size; /* GPT-2's meaning of an absent n_inner */
    TP_TRY(tp_json_need_i64(ctx, r->doc, r->root, key->intermediate, !gpt2, 1, TP_LIMIT_WIDTH, &c->intermediate_size));
    c->max_positions = key->default_positions;
    TP_TRY(tp_json_need_i64(ctx, r->doc, r->root, key->positions, false, 1, TP_LIMIT_POSITIONS, &c->max_positions));
    c->n_kv_heads = c->n_heads;
    c->head_dim = 0;
    if (gpt2) return TP_OK;
    TP_TRY(tp_json_need_i64(ctx, r->doc, r->root, "num_key_value_heads", false, 1, TP_LIMIT_HEADS, &c->n_kv_heads));
    return tp_json_need_i64(ctx, r->doc, r->root, "head_dim", false, 1, TP_LIMIT_WIDTH, &c->head_dim);
}

tp_status tp_config_check(tp_ctx *ctx, const char *name, tp_model_config *c)
{
    if (c->head_dim == 0) {
        if (c->hidden_size % c->n_heads != 0)
            return tp_fail(ctx, TP_FORMAT,
                           "%s: a hidden size of %lld is not divisible by %lld heads, and no head size is given", name,
                           (long long)c->hidden_size, (long long)c->n_heads);
        c->head_dim = c->hidden_size / c->n_heads;
    }
    if (c->n_kv_heads > c->n_heads || c->n_heads % c->n_kv_heads != 0)
        return tp_fail(ctx, TP_FORMAT, "%s: %lld key-value heads do not divide %lld heads", name, (long long)c->n_kv_heads,
                       (long long)c->n_heads);
    if (c->n_heads * c->head_dim > TP_LIMIT_WIDTH || c->intermediate_size > TP_LIMIT_WIDTH)
        return tp_fail(ctx, TP_FORMAT,
                       "%s: %lld heads of %lld values or a feed-forward width of %lld are more than the limit of %d", name,
                       (long long)c->n_heads, (long long)c->head_dim, (long long)c->intermediate_size, TP_LIMIT_WIDTH);
    if (c->family != TP_FAMILY_GPT2 && c->head_dim % 2 != 0)
        return tp_fail(ctx, TP_FORMAT, "%s: head_dim: rotary positions need an even head size, got %lld", name,
                       (long long)c->head_dim);
    return TP_OK;
}

/* ---- activation, biases, attention ---- */

static tp_status read_activation(const tp_config_reader *r)
{
    static const struct {
        const char *name;
        tp_activation activation;
    } names[] = {{"silu", TP_ACT_SILU},
                 {"swish", TP_ACT_SILU},
                 {"gelu_new", TP_ACT_GELU_TANH},
                 {"gelu_pytorch_tanh", TP_ACT_GELU_TANH},
                 {"gelu", TP_ACT_GELU}};
    bool gpt2 = r->config->family == TP_FAMILY_GPT2;
    const struct spelling *key = spelling_of(r->config->family);
    tp_span name = tp_span_of(key->default_activation);
    TP_TRY(tp_json_need_string(r->ctx, r->doc, r->root, key->activation, false, &name));
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (!tp_span_is(name, names[i].name) || (names[i].activation == TP_ACT_SILU) == gpt2) continue;
        r->config->activation = names[i].activation;
        return TP_OK;
    }
    return tp_config_refuse(r, tp_json_get(r->root, key->activation), TP_UNSUPPORTED,
                            "%s: \"%.*s\" is not supported here; available: %s", key->activation, (int)name.len, name.data,
                            gpt2 ? "gelu_new, gelu_pytorch_tanh, gelu" : "silu");
}

static tp_status read_biases(const tp_config_reader *r)
{
    tp_model_config *c = r->config;
    bool attention = false, mlp = false;
    c->qk_norm = c->family == TP_FAMILY_QWEN3;
    c->qkv_bias = c->family == TP_FAMILY_QWEN2 || c->family == TP_FAMILY_GPT2;
    c->o_bias = c->mlp_bias = c->family == TP_FAMILY_GPT2;
    if (c->family != TP_FAMILY_LLAMA && c->family != TP_FAMILY_QWEN3) return TP_OK;
    TP_TRY(tp_json_need_bool(r->ctx, r->doc, r->root, "attention_bias", false, &attention));
    if (c->family == TP_FAMILY_LLAMA) TP_TRY(tp_json_need_bool(r->ctx, r->doc, r->root, "mlp_bias", false, &mlp));
    c->qkv_bias = c->o_bias = attention;
    c->mlp_bias = mlp;
    return TP_OK;
}

static tp_status refuse_flag(const tp_config_reader *r, const char *key, bool allowed)
{
    bool value = allowed;
    TP_TRY(tp_json_need_bool(r->ctx, r->doc, r->root, key, false, &value));
    if (value == allowed) return TP_OK;
    return tp_config_refuse(r, tp_json_get(r->root, key), TP_UNSUPPORTED, "%s: only %s is supported", key,
                            allowed ? "true" : "false");
}

static tp_status read_gpt2_attention(const tp_config_reader *r)
{
    TP_TRY(refuse_flag(r, "scale_attn_weights", true));
    TP_TRY(refuse_flag(r, "add_cross_attention", false));
    return tp_json_need_bool(r->ctx, r->doc, r->root, "scale_attn_by_inverse_layer_idx", false, &r->config->scale_by_layer);
}

/* Which layers slide: Mistral all, Qwen those named in layer_types, or from max_window_layers on where there is no list. */
static tp_status read_slides(const tp_config_reader *r, int64_t from)
{
    tp_model_config *c = r->config;
    const tp_json *types = c->family == TP_FAMILY_MISTRAL ? NULL : tp_json_get(r->root, "layer_types");
    if (tp_json_type_of(types) != TP_JSON_NULL &&
        (tp_json_type_of(types) != TP_JSON_ARRAY || tp_json_count(types) != (size_t)c->n_layers))
        return tp_config_refuse(r, types, TP_FORMAT, "layer_types: expected a list of %lld names", (long long)c->n_layers);
    bool listed = tp_json_type_of(types) == TP_JSON_ARRAY, any = false;
    c->slides = tp_alloc(r->ctx, (size_t)c->n_layers, 1);
    if (c->slides == NULL) return TP_NOMEM;
    for (int64_t i = 0; i < c->n_layers; i++) {
        c->slides[i] = i >= from;
        if (listed) {
            const tp_json *type = tp_json_at(types, (size_t)i);
            c->slides[i] = tp_span_is(tp_json_string(type), "sliding_attention");
            if (!c->slides[i] && !tp_span_is(tp_json_string(type), "full_attention"))
                return tp_config_refuse(r, type, TP_UNSUPPORTED,
                                        "layer_types: \"%.*s\" is not supported; available: full_attention, sliding_attention",
                                        (int)tp_json_string(type).len, tp_json_string(type).data);
            if (c->slides[i] && c->window == 0)
                return tp_config_refuse(r, type, TP_FORMAT, "layer_types: layer %lld slides, but no sliding_window is in use",
                                        (long long)i);
        }
        any |= c->slides[i] != 0;
    }
    if (any && c->window > 0) return TP_OK;
    tp_free(c->slides);
    c->slides = NULL;
    c->window = 0;
    return TP_OK;
}

static tp_status read_window(const tp_config_reader *r)
{
    tp_model_config *c = r->config;
    bool mistral = c->family == TP_FAMILY_MISTRAL, used = mistral;
    if (c->family == TP_FAMILY_GPT2 || c->family == TP_FAMILY_LLAMA) return TP_OK;
    int64_t window = tp_json_get(r->root, "sliding_window") == NULL ? 4096 : 0, from = mistral ? 0 : 28;
    TP_TRY(tp_json_need_i64(r->ctx, r->doc, r->root, "sliding_window", false, 1, TP_LIMIT_POSITIONS, &window));
    if (!mistral) {
        TP_TRY(tp_json_need_bool(r->ctx, r->doc, r->root, "use_sliding_window", false, &used));
        TP_TRY(tp_json_need_i64(r->ctx, r->doc, r->root, "max_window_layers", false, 0, INT32_MAX, &from));
    }
    c->window = used ? window : 0;
    return read_slides(r, from);
}

/* ---- tokens ---- */

/* -1 is how some files say "none". */
static tp_status read_id(const tp_config_reader *r, const char *key, int64_t *id)
{
    *id = -1;
    return tp_json_need_i64(r->ctx, r->doc, r->root, key, false, -1, INT32_MAX, id);
}

static tp_status read_ids(const tp_config_reader *r)
{
    tp_model_config *c = r->config;
    const int max = (int)(sizeof c->eos_ids / sizeof *c->eos_ids);
    TP_TRY(read_id(r, "bos_token_id", &c->bos_id));
    TP_TRY(read_id(r, "pad_token_id", &c->pad_id));
    const tp_json *eos = tp_json_get(r->root, "eos_token_id");
    if (tp_json_type_of(eos) != TP_JSON_ARRAY) {
        TP_TRY(read_id(r, "eos_token_id", &c->eos_ids[0]));
        c->n_eos = c->eos_ids[0] >= 0;
        return TP_OK;
    }
    if (tp_json_count(eos) > (size_t)max)
        return tp_config_refuse(r, eos, TP_FORMAT, "eos_token_id: expected at most %d tokens, got %zu", max,
                                tp_json_count(eos));
    for (c->n_eos = 0; c->n_eos < (int)tp_json_count(eos); c->n_eos++) {
        const tp_json *id = tp_json_at(eos, (size_t)c->n_eos);
        if (!tp_json_i64(id, &c->eos_ids[c->n_eos]) || c->eos_ids[c->n_eos] < 0 || c->eos_ids[c->n_eos] > INT32_MAX)
            return tp_config_refuse(r, id, TP_FORMAT, "eos_token_id: expected token numbers");
    }
    return TP_OK;
}

/* ---- the whole ---- */

static tp_status read_all(const tp_config_reader *r)
{
    tp_model_config *c = r->config;
    const char *name = r->name;
    if (tp_json_type_of(r->root) != TP_JSON_OBJECT)
        return tp_config_refuse(r, r->root, TP_FORMAT, "expected an object, got %s",
                                tp_json_type_name(tp_json_type_of(r->root)));
    TP_TRY(read_family(r));
    TP_TRY(read_provenance(r));
    TP_TRY(read_dtype(r));
    TP_TRY(read_sizes(r));
    TP_TRY(tp_config_check(r->ctx, name, c));
    const struct spelling *key = spelling_of(c->family);
    c->norm_eps = key->default_epsilon;
    TP_TRY(tp_json_need_f64(r->ctx, r->doc, r->root, key->epsilon, false, 0, 1, &c->norm_eps));
    c->initializer_range = 0.02;
    TP_TRY(tp_json_need_f64(r->ctx, r->doc, r->root, "initializer_range", false, 0, 1e3, &c->initializer_range));
    c->tied = key->default_tied;
    TP_TRY(tp_json_need_bool(r->ctx, r->doc, r->root, "tie_word_embeddings", false, &c->tied));
    TP_TRY(read_activation(r));
    TP_TRY(read_biases(r));
    TP_TRY(read_ids(r));
    if (c->family == TP_FAMILY_GPT2) return read_gpt2_attention(r);
    TP_TRY(read_window(r));
    return tp_config_read_rope(r);
}

tp_status tp_config_refuse(const tp_config_reader *r, const tp_json *value, tp_status status, const char *format, ...)
{
    char where[256], text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return tp_fail(r->ctx, status, "%s: %s", value != NULL ? tp_json_where(r->doc, value, where, sizeof where) : r->name, text);
}

tp_status tp_config_from_json(tp_ctx *ctx, const tp_json_doc *doc, tp_model_config *config)
{
    char where[256];
    *config = (tp_model_config){0};
    tp_config_reader reader = {.ctx = ctx, .doc = doc, .root = tp_json_root(doc), .config = config};
    tp_json_where(doc, reader.root, where, sizeof where);
    where[strcspn(where, ":")] = '\0';
    reader.name = where;
    tp_status status = read_all(&reader);
    if (status != TP_OK) tp_config_free(config);
    return status;
}

tp_status tp_config_read(tp_ctx *ctx, const char *path, tp_model_config *config)
{
    tp_json_doc *doc = NULL;
    TP_TRY(tp_json_read(ctx, path, TP_CONFIG_BYTES, &doc));
    tp_status status = tp_config_from_json(ctx, doc, config);
    tp_json_free(doc);
    return status;
}

void tp_config_free(tp_model_config *config)
{
    tp_free(config->slides);
    tp_free(config->rope.factors);
    *config = (tp_model_config){0};
}

static int64_t n_factors(const tp_model_config *config)
{
    return config->head_dim / 2 * (config->rope.type == TP_ROPE_LONGROPE ? 2 : 1);
}

tp_status tp_config_copy(tp_ctx *ctx, const tp_model_config *config, tp_model_config *copy)
{
    *copy = *config;
    copy->slides = NULL;
    copy->rope.factors = NULL;
    if (config->slides != NULL) {
        copy->slides = tp_alloc(ctx, (size_t)config->n_layers, 1);
        if (copy->slides == NULL) return TP_NOMEM;
        memcpy(copy->slides, config->slides, (size_t)config->n_layers);
    }
    if (config->rope.factors != NULL) {
        copy->rope.factors = tp_alloc(ctx, (size_t)n_factors(config), sizeof(float));
        if (copy->rope.factors == NULL) {
            tp_config_free(copy);
            return TP_NOMEM;
        }
        memcpy(copy->rope.factors, config->rope.factors, (size_t)n_factors(config) * sizeof(float));
    }
    return TP_OK;
}

/* ---- counts ---- */

int64_t tp_config_linear_weights(const tp_model_config *c)
{
    int64_t width = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    int64_t attention = c->hidden_size * (2 * width + 2 * kv);
    int64_t mlp = (c->family == TP_FAMILY_GPT2 ? 2 : 3) * c->hidden_size * c->intermediate_size;
    return c->n_layers * (attention + mlp) + c->vocab_size * c->hidden_size;
}

int64_t tp_config_parameters(const tp_model_config *c)
{
    bool gpt2 = c->family == TP_FAMILY_GPT2;
    int64_t width = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim, norm = c->hidden_size * (gpt2 ? 2 : 1);
    int64_t block = 2 * norm + (c->qk_norm ? 2 * c->head_dim : 0);
    if (c->qkv_bias) block += width + 2 * kv;
    if (c->o_bias) block += c->hidden_size;
    if (c->mlp_bias) block += c->hidden_size + c->intermediate_size * (gpt2 ? 1 : 2);
    return tp_config_linear_weights(c) + (c->tied ? 0 : c->vocab_size * c->hidden_size) +
           (gpt2 ? c->max_positions * c->hidden_size : 0) + c->n_layers * block + norm;
}
