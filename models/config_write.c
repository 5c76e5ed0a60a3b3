/* config.json out, as transformers 5 writes it: keys in alphabetical order, two blanks, reading back to the same values. */
#include <string.h>

#include "base/text.h"
#include "models/config.h"

/* ---- members ---- */

static void key(tp_buf *out, const char *name)
{
    tp_buf_text(out, tp_ends_with(tp_buf_cstr(out), "{\n") ? "  " : ",\n  ");
    tp_json_write_string(out, name, strlen(name));
    tp_buf_text(out, ": ");
}

static void integer(tp_buf *out, const char *name, int64_t value)
{
    key(out, name);
    tp_buf_printf(out, "%lld", (long long)value);
}

static void id(tp_buf *out, const char *name, int64_t value)
{
    key(out, name);
    if (value >= 0)
        tp_buf_printf(out, "%lld", (long long)value);
    else
        tp_buf_text(out, "null");
}

static void boolean(tp_buf *out, const char *name, bool value)
{
    key(out, name);
    tp_buf_text(out, value ? "true" : "false");
}

static void text(tp_buf *out, const char *name, const char *value)
{
    key(out, name);
    tp_json_write_string(out, value, strlen(value));
}

static void number(tp_buf *out, const char *name, double value)
{
    key(out, name);
    tp_json_write_f64(out, value, 17);
}

static const char *dtype_name(tp_dtype dtype)
{
    return dtype == TP_BF16 ? "bfloat16" : dtype == TP_F16 ? "float16" : "float32";
}

static void eos(tp_buf *out, const tp_model_config *c)
{
    if (c->n_eos <= 1) {
        id(out, "eos_token_id", c->n_eos == 1 ? c->eos_ids[0] : -1);
        return;
    }
    key(out, "eos_token_id");
    for (int i = 0; i < c->n_eos; i++) tp_buf_printf(out, "%s%lld", i > 0 ? ", " : "[", (long long)c->eos_ids[i]);
    tp_buf_char(out, ']');
}

/* ---- rotary parameters, one member a line inside the object ---- */

static void rope_key(tp_buf *out, const char *name)
{
    tp_buf_printf(out, ",\n    \"%s\": ", name);
}

static void rope_number(tp_buf *out, const char *name, double value)
{
    rope_key(out, name);
    tp_json_write_f64(out, value, 17);
}

static void rope_list(tp_buf *out, const char *name, const float *values, int64_t n)
{
    rope_key(out, name);
    for (int64_t i = 0; i < n; i++) {
        tp_buf_text(out, i > 0 ? ", " : "[");
        tp_json_write_f64(out, (double)values[i], 17);
    }
    tp_buf_char(out, ']');
}

static void rope(tp_buf *out, const tp_model_config *c)
{
    static const char *const names[] = {
        [TP_ROPE_DEFAULT] = "default", [TP_ROPE_LINEAR] = "linear",    [TP_ROPE_DYNAMIC] = "dynamic",  [TP_ROPE_YARN] = "yarn",
        [TP_ROPE_LLAMA3] = "llama3",   [TP_ROPE_FACTORS] = "longrope", [TP_ROPE_LONGROPE] = "longrope"};
    const tp_rope_config *r = &c->rope;
    int64_t half = c->head_dim / 2;
    key(out, "rope_parameters");
    tp_buf_printf(out, "{\n    \"rope_type\": \"%s\"", names[r->type]);
    rope_number(out, "rope_theta", r->theta);
    if (r->type == TP_ROPE_FACTORS) { /* GGUF's factors are a longrope that never switches and never scales */
        rope_number(out, "factor", 1);
        rope_number(out, "original_max_position_embeddings", (double)c->max_positions);
        rope_list(out, "short_factor", r->factors, half);
        rope_list(out, "long_factor", r->factors, half);
    } else if (r->type != TP_ROPE_DEFAULT) {
        rope_number(out, "factor", r->factor);
    }
    if (r->type == TP_ROPE_YARN || r->type == TP_ROPE_LLAMA3 || r->type == TP_ROPE_LONGROPE)
        rope_number(out, "original_max_position_embeddings", (double)r->original_max_positions);
    if (r->attention_factor != 0) rope_number(out, "attention_factor", r->attention_factor);
    if (r->type == TP_ROPE_LLAMA3) {
        rope_number(out, "low_freq_factor", r->low_freq_factor);
        rope_number(out, "high_freq_factor", r->high_freq_factor);
    }
    if (r->type == TP_ROPE_YARN) {
        rope_number(out, "beta_fast", r->beta_fast);
        rope_number(out, "beta_slow", r->beta_slow);
        if (r->mscale != 0) rope_number(out, "mscale", r->mscale);
        if (r->mscale_all_dim != 0) rope_number(out, "mscale_all_dim", r->mscale_all_dim);
        rope_key(out, "truncate");
        tp_buf_text(out, r->truncate ? "true" : "false");
    }
    if (r->type == TP_ROPE_LONGROPE) {
        rope_list(out, "short_factor", r->factors, half);
        rope_list(out, "long_factor", r->factors + half, half);
    }
    tp_buf_text(out, "\n  }");
}

/* ---- the families ---- */

static void write_gpt2(const tp_model_config *c, tp_buf *out)
{
    text(out, "activation_function", c->activation == TP_ACT_GELU ? "gelu" : "gelu_new");
    integer(out, "n_embd", c->hidden_size);
    integer(out, "n_head", c->n_heads);
    integer(out, "n_inner", c->intermediate_size);
    integer(out, "n_layer", c->n_layers);
    integer(out, "n_positions", c->max_positions);
    number(out, "layer_norm_epsilon", c->norm_eps);
    boolean(out, "scale_attn_by_inverse_layer_idx", c->scale_by_layer);
}

static void write_window(const tp_model_config *c, tp_buf *out)
{
    bool qwen = c->family == TP_FAMILY_QWEN2 || c->family == TP_FAMILY_QWEN3;
    id(out, "sliding_window", c->window > 0 ? c->window : -1);
    if (!qwen) return;
    boolean(out, "use_sliding_window", c->window > 0);
    key(out, "layer_types");
    for (int64_t i = 0; i < c->n_layers; i++)
        tp_buf_printf(out, "%s\"%s_attention\"", i > 0 ? ", " : "[", c->slides != NULL && c->slides[i] ? "sliding" : "full");
    tp_buf_char(out, ']');
}

static void write_llama_kind(const tp_model_config *c, tp_buf *out)
{
    if (c->family == TP_FAMILY_LLAMA || c->family == TP_FAMILY_QWEN3) boolean(out, "attention_bias", c->qkv_bias);
    integer(out, "head_dim", c->head_dim);
    text(out, "hidden_act", "silu");
    integer(out, "hidden_size", c->hidden_size);
    integer(out, "intermediate_size", c->intermediate_size);
    integer(out, "max_position_embeddings", c->max_positions);
    if (c->family == TP_FAMILY_LLAMA) boolean(out, "mlp_bias", c->mlp_bias);
    integer(out, "num_attention_heads", c->n_heads);
    integer(out, "num_hidden_layers", c->n_layers);
    integer(out, "num_key_value_heads", c->n_kv_heads);
    number(out, "rms_norm_eps", c->norm_eps);
    rope(out, c);
    if (c->family != TP_FAMILY_LLAMA) write_window(c, out);
}

void tp_config_write_json(const tp_model_config *c, tp_buf *out)
{
    tp_buf_text(out, "{\n");
    key(out, "architectures");
    tp_buf_char(out, '[');
    tp_json_write_string(out, c->architecture, strlen(c->architecture));
    tp_buf_char(out, ']');
    id(out, "bos_token_id", c->bos_id);
    text(out, "dtype", dtype_name(c->dtype));
    eos(out, c);
    if (c->family == TP_FAMILY_GPT2)
        write_gpt2(c, out);
    else
        write_llama_kind(c, out);
    number(out, "initializer_range", c->initializer_range);
    text(out, "model_type", c->model_type);
    id(out, "pad_token_id", c->pad_id);
    boolean(out, "tie_word_embeddings", c->tied);
    text(out, "transformers_version", "5.0.0");
    integer(out, "vocab_size", c->vocab_size);
    tp_buf_text(out, "\n}\n");
}
