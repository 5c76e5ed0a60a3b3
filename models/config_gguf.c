/* The same configuration from GGUF metadata. Keys begin with the architecture's name; what the keys leave open (tied
 * embeddings, biases, the size of the vocabulary) is read off the tensors. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/mem.h"
#include "models/config.h"

#define KEY_BYTES 96

struct reader {
    tp_ctx *ctx;
    const tp_gguf *file;
    const char *arch;
    tp_model_config *config;
};

static const char *key_of(const struct reader *r, const char *name, char out[KEY_BYTES])
{
    snprintf(out, KEY_BYTES, "%s.%s", r->arch, name);
    return out;
}

static tp_status need_i64(const struct reader *r, const char *name, bool required, int64_t max, int64_t *out)
{
    char key[KEY_BYTES];
    return tp_gguf_need_i64(r->ctx, r->file, key_of(r, name, key), required, 1, max, out);
}

static tp_status need_f64(const struct reader *r, const char *name, double min, double max, double *out)
{
    char key[KEY_BYTES];
    TP_TRY(tp_gguf_need_f64(r->ctx, r->file, key_of(r, name, key), false, out));
    if (*out >= min && *out <= max) return TP_OK;
    return tp_fail(r->ctx, TP_FORMAT, "%s: %s: %g, expected a number from %g to %g", tp_gguf_path(r->file), key, *out, min,
                   max);
}

static bool has_tensor(const struct reader *r, const char *name)
{
    return tp_gguf_tensor_find(r->file, name) != NULL;
}

/* ---- what kind of file ---- */

static tp_status read_family(struct reader *r)
{
    char known[128];
    tp_span type = tp_span_of("model"), arch;
    TP_TRY(tp_gguf_need_string(r->ctx, r->file, "general.type", false, &type));
    if (!tp_span_is(type, "model"))
        return tp_fail(r->ctx, TP_UNSUPPORTED, "%s: general.type is \"%.*s\", expected a model", tp_gguf_path(r->file),
                       (int)type.len, type.data);
    TP_TRY(tp_gguf_need_string(r->ctx, r->file, "general.architecture", true, &arch));
    for (int f = 0; f < TP_FAMILY_COUNT; f++) {
        if (tp_families[f].gguf == NULL || !tp_span_is(arch, tp_families[f].gguf)) continue;
        r->arch = tp_families[f].gguf;
        r->config->family = (tp_family)f;
        return TP_OK;
    }
    return tp_fail(r->ctx, TP_UNSUPPORTED, "%s: general.architecture: \"%.*s\" is not supported; available: %s",
                   tp_gguf_path(r->file), (int)arch.len, arch.data, tp_family_list(known, sizeof known));
}

static tp_status refuse_more_than_one(const struct reader *r, const char *key, const char *what)
{
    int64_t n = 0;
    TP_TRY(tp_gguf_need_i64(r->ctx, r->file, key, false, 0, INT32_MAX, &n));
    return n <= 1 ? TP_OK
                  : tp_fail(r->ctx, TP_UNSUPPORTED, "%s: %s is %lld: %s", tp_gguf_path(r->file), key, (long long)n, what);
}

/* ---- sizes ---- */

static tp_status read_vocabulary(const struct reader *r)
{
    tp_model_config *c = r->config;
    const tp_gguf_tensor *table = tp_gguf_tensor_find(r->file, "token_embd.weight");
    if (table == NULL || table->rank != 2)
        return tp_fail(r->ctx, TP_FORMAT, "%s: token_embd.weight is missing", tp_gguf_path(r->file));
    c->vocab_size = table->shape[0];
    TP_TRY(need_i64(r, "vocab_size", false, TP_LIMIT_VOCAB, &c->vocab_size));
    if (c->vocab_size <= TP_LIMIT_VOCAB) return TP_OK;
    return tp_fail(r->ctx, TP_FORMAT, "%s: a vocabulary of %lld, the limit is %d", tp_gguf_path(r->file),
                   (long long)c->vocab_size, TP_LIMIT_VOCAB);
}

static tp_status read_sizes(const struct reader *r)
{
    tp_model_config *c = r->config;
    TP_TRY(read_vocabulary(r));
    TP_TRY(need_i64(r, "embedding_length", true, TP_LIMIT_WIDTH, &c->hidden_size));
    TP_TRY(need_i64(r, "feed_forward_length", true, TP_LIMIT_WIDTH, &c->intermediate_size));
    TP_TRY(need_i64(r, "block_count", true, TP_LIMIT_LAYERS, &c->n_layers));
    TP_TRY(need_i64(r, "context_length", true, TP_LIMIT_POSITIONS, &c->max_positions));
    TP_TRY(need_i64(r, "attention.head_count", true, TP_LIMIT_HEADS, &c->n_heads));
    c->n_kv_heads = c->n_heads;
    TP_TRY(need_i64(r, "attention.head_count_kv", false, TP_LIMIT_HEADS, &c->n_kv_heads));
    TP_TRY(need_i64(r, "attention.key_length", false, TP_LIMIT_WIDTH, &c->head_dim));
    TP_TRY(tp_config_check(r->ctx, tp_gguf_path(r->file), c));
    int64_t value_length = c->head_dim, rotated = c->head_dim;
    TP_TRY(need_i64(r, "attention.value_length", false, TP_LIMIT_WIDTH, &value_length));
    TP_TRY(need_i64(r, "rope.dimension_count", false, TP_LIMIT_WIDTH, &rotated));
    if (value_length == c->head_dim && (rotated == c->head_dim || c->family == TP_FAMILY_GPT2)) return TP_OK;
    return tp_fail(r->ctx, TP_UNSUPPORTED,
                   "%s: heads of %lld values with values of %lld and %lld rotated channels are not supported",
                   tp_gguf_path(r->file), (long long)c->head_dim, (long long)value_length, (long long)rotated);
}

/* ---- rotary scaling ---- */

static tp_status read_factors(const struct reader *r)
{
    tp_model_config *c = r->config;
    const tp_gguf_tensor *t = tp_gguf_tensor_find(r->file, "rope_freqs.weight");
    int64_t half = c->head_dim / 2;
    if (t == NULL) return TP_OK;
    if (t->type != TP_GGML_F32 || t->rank != 1 || t->shape[0] != half)
        return tp_fail(r->ctx, TP_SHAPE, "%s: rope_freqs.weight: expected F32 [%lld]", tp_gguf_path(r->file), (long long)half);
    if (c->rope.type != TP_ROPE_DEFAULT)
        return tp_fail(r->ctx, TP_UNSUPPORTED, "%s: rope_freqs.weight beside another rope scaling", tp_gguf_path(r->file));
    c->rope.factors = tp_alloc(r->ctx, (size_t)half, sizeof(float));
    if (c->rope.factors == NULL) return TP_NOMEM;
    TP_TRY(tp_gguf_read(r->ctx, r->file, t, c->rope.factors));
    for (int64_t i = 0; i < half; i++)
        if (!(c->rope.factors[i] >= 1e-6f && c->rope.factors[i] <= 1e9f))
            return tp_fail(r->ctx, TP_FORMAT, "%s: rope_freqs.weight: value %lld is %g", tp_gguf_path(r->file), (long long)i,
                           (double)c->rope.factors[i]);
    c->rope.type = TP_ROPE_FACTORS;
    return TP_OK;
}

/* ggml multiplies its own attention factor, 1 + 0.1 ln(factor), by the file's. */
static tp_status read_yarn(const struct reader *r)
{
    tp_rope_config *rope = &r->config->rope;
    double scale = 1;
    rope->type = TP_ROPE_YARN;
    rope->truncate = true;
    rope->beta_fast = 32;
    rope->beta_slow = 1;
    rope->original_max_positions = r->config->max_positions;
    TP_TRY(need_i64(r, "rope.scaling.original_context_length", false, TP_LIMIT_POSITIONS, &rope->original_max_positions));
    TP_TRY(need_f64(r, "rope.scaling.yarn_beta_fast", 1e-6, 1e6, &rope->beta_fast));
    TP_TRY(need_f64(r, "rope.scaling.yarn_beta_slow", 1e-6, 1e6, &rope->beta_slow));
    TP_TRY(need_f64(r, "rope.scaling.attn_factor", 1e-6, 1e6, &scale));
    if (!(rope->theta > 1))
        return tp_fail(r->ctx, TP_UNSUPPORTED, "%s: yarn needs a rope.freq_base above 1, got %g", tp_gguf_path(r->file),
                       rope->theta);
    rope->attention_factor = scale * (rope->factor > 1 ? 1 + 0.1 * log(rope->factor) : 1);
    return TP_OK;
}

static tp_status read_rope(const struct reader *r)
{
    char key[KEY_BYTES];
    tp_rope_config *rope = &r->config->rope;
    tp_span type = tp_span_of("none");
    double factor = 0, old = 0;
    rope->theta = 10000;
    TP_TRY(need_f64(r, "rope.freq_base", 1e-3, 1e15, &rope->theta));
    TP_TRY(need_f64(r, "rope.scaling.factor", 0, 1e6, &factor));
    TP_TRY(need_f64(r, "rope.scale_linear", 0, 1e6, &old));
    bool stated = tp_gguf_find(r->file, key_of(r, "rope.scaling.type", key)) != NULL;
    TP_TRY(tp_gguf_need_string(r->ctx, r->file, key, false, &type));
    if (!stated && (factor > 0 || old > 0)) type = tp_span_of("linear");
    if (factor == 0) factor = old;
    rope->factor = factor;
    if (!tp_span_is(type, "none") && !(factor >= 1e-3))
        return tp_fail(r->ctx, TP_FORMAT, "%s: %s is \"%.*s\", but rope.scaling.factor is missing", tp_gguf_path(r->file), key,
                       (int)type.len, type.data);
    if (tp_span_is(type, "linear"))
        rope->type = TP_ROPE_LINEAR;
    else if (tp_span_is(type, "yarn"))
        TP_TRY(read_yarn(r));
    else if (!tp_span_is(type, "none"))
        return tp_fail(r->ctx, TP_UNSUPPORTED, "%s: %s: \"%.*s\" is not supported; available: none, linear, yarn",
                       tp_gguf_path(r->file), key, (int)type.len, type.data);
    return read_factors(r);
}

/* ---- the rest ---- */

/* Sliding windows are written for Mistral, whose network is otherwise that of "llama". */
static tp_status read_window(const struct reader *r)
{
    tp_model_config *c = r->config;
    char key[KEY_BYTES];
    TP_TRY(tp_gguf_need_i64(r->ctx, r->file, key_of(r, "attention.sliding_window", key), false, 0, TP_LIMIT_POSITIONS,
                            &c->window));
    if (c->window == 0) return TP_OK;
    if (c->family != TP_FAMILY_LLAMA)
        return tp_fail(r->ctx, TP_UNSUPPORTED, "%s: %s: a sliding window is not supported for this architecture",
                       tp_gguf_path(r->file), key);
    c->family = TP_FAMILY_MISTRAL;
    c->slides = tp_alloc(r->ctx, (size_t)c->n_layers, 1);
    if (c->slides == NULL) return TP_NOMEM;
    memset(c->slides, 1, (size_t)c->n_layers);
    return TP_OK;
}

static void read_biases(const struct reader *r)
{
    tp_model_config *c = r->config;
    bool gpt2 = c->family == TP_FAMILY_GPT2;
    c->tied = !has_tensor(r, "output.weight");
    c->qk_norm = c->family == TP_FAMILY_QWEN3;
    c->qkv_bias = gpt2 || has_tensor(r, "blk.0.attn_q.bias");
    c->o_bias = gpt2 || has_tensor(r, "blk.0.attn_output.bias");
    c->mlp_bias = gpt2 || has_tensor(r, "blk.0.ffn_down.bias");
    c->activation = gpt2 ? TP_ACT_GELU_TANH : TP_ACT_SILU;
}

static tp_status read_id(const struct reader *r, const char *key, int64_t *id)
{
    *id = -1;
    return tp_gguf_need_i64(r->ctx, r->file, key, false, 0, r->config->vocab_size - 1, id);
}

static tp_status read_ids(const struct reader *r)
{
    tp_model_config *c = r->config;
    int64_t eos, eot;
    TP_TRY(read_id(r, "tokenizer.ggml.bos_token_id", &c->bos_id));
    TP_TRY(read_id(r, "tokenizer.ggml.padding_token_id", &c->pad_id));
    TP_TRY(read_id(r, "tokenizer.ggml.eos_token_id", &eos));
    TP_TRY(read_id(r, "tokenizer.ggml.eot_token_id", &eot));
    if (eos >= 0) c->eos_ids[c->n_eos++] = eos;
    if (eot >= 0 && eot != eos) c->eos_ids[c->n_eos++] = eot;
    return TP_OK;
}

/* Packed files have no dtype that transformers could name; bf16 is what their models were trained in. */
static tp_dtype stated_dtype(const struct reader *r)
{
    const tp_gguf_tensor *t =
        tp_gguf_tensor_find(r->file, r->config->family == TP_FAMILY_GPT2 ? "blk.0.attn_qkv.weight" : "blk.0.attn_q.weight");
    return t != NULL && t->type == TP_GGML_F32 ? TP_F32 : t != NULL && t->type == TP_GGML_F16 ? TP_F16 : TP_BF16;
}

static tp_status read_all(struct reader *r)
{
    tp_model_config *c = r->config;
    char key[KEY_BYTES];
    TP_TRY(read_family(r));
    TP_TRY(refuse_more_than_one(r, "split.count", "merge the parts into one file first"));
    TP_TRY(refuse_more_than_one(r, key_of(r, "expert_count", key), "mixtures of experts are not supported"));
    TP_TRY(read_sizes(r));
    c->norm_eps = 1e-5;
    TP_TRY(need_f64(r, c->family == TP_FAMILY_GPT2 ? "attention.layer_norm_epsilon" : "attention.layer_norm_rms_epsilon", 0, 1,
                    &c->norm_eps));
    c->initializer_range = 0.02;
    read_biases(r);
    TP_TRY(read_ids(r));
    if (c->family != TP_FAMILY_GPT2) {
        TP_TRY(read_rope(r));
        TP_TRY(read_window(r));
    }
    snprintf(c->model_type, sizeof c->model_type, "%s", tp_families[c->family].model_type);
    snprintf(c->architecture, sizeof c->architecture, "%s", tp_families[c->family].architecture);
    c->dtype = stated_dtype(r);
    return TP_OK;
}

tp_status tp_config_from_gguf(tp_ctx *ctx, const tp_gguf *file, tp_model_config *config)
{
    *config = (tp_model_config){0};
    struct reader reader = {.ctx = ctx, .file = file, .config = config};
    tp_status status = read_all(&reader);
    if (status != TP_OK) tp_config_free(config);
    return status;
}
