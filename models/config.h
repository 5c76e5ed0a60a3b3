/* What shapes a network: read from config.json or GGUF metadata, checked against limits, no silent defaults. */
#ifndef TP_MODELS_CONFIG_H
#define TP_MODELS_CONFIG_H

#include "base/dtype.h"
#include "base/gguf.h"
#include "base/json.h"
#include "base/status.h"

typedef enum tp_family {
    TP_FAMILY_LLAMA,
    TP_FAMILY_MISTRAL,
    TP_FAMILY_QWEN2,
    TP_FAMILY_QWEN3,
    TP_FAMILY_GPT2,
    TP_FAMILY_COUNT
} tp_family;

typedef enum tp_rope_type {
    TP_ROPE_DEFAULT,
    TP_ROPE_LINEAR,
    TP_ROPE_DYNAMIC,
    TP_ROPE_YARN,
    TP_ROPE_LLAMA3,
    TP_ROPE_FACTORS,
    TP_ROPE_LONGROPE
} tp_rope_type;

typedef struct tp_rope_config {
    tp_rope_type type;
    double theta;
    double factor;
    int64_t original_max_positions;           /* yarn, llama3, longrope */
    double beta_fast, beta_slow;              /* yarn */
    double attention_factor;                  /* yarn, longrope; 0: derived */
    double mscale, mscale_all_dim;            /* yarn; 0: absent */
    bool truncate;                            /* yarn; default true */
    double low_freq_factor, high_freq_factor; /* llama3 */
    /* What divides the frequencies, [head_dim/2]: GGUF's rope_freqs (TP_ROPE_FACTORS), or longrope's short_factor and,
     * behind it, long_factor. Owned. */
    float *factors;
} tp_rope_config;

typedef enum tp_activation { TP_ACT_SILU, TP_ACT_GELU_TANH, TP_ACT_GELU } tp_activation;

#define TP_LIMIT_LAYERS    4096
#define TP_LIMIT_WIDTH     (1 << 20)
#define TP_LIMIT_HEADS     (1 << 12)
#define TP_LIMIT_VOCAB     (1 << 22)
#define TP_LIMIT_POSITIONS INT32_MAX
#define TP_CONFIG_BYTES    (4u << 20) /* longest config.json that is read */

typedef struct tp_model_config {
    tp_family family;
    char model_type[32];   /* as config.json spells it: "llama", ... */
    char architecture[64]; /* "LlamaForCausalLM" */
    int64_t vocab_size, hidden_size, intermediate_size, n_layers, n_heads, n_kv_heads, head_dim, max_positions;
    double norm_eps;
    double initializer_range;
    tp_rope_config rope;
    tp_activation activation;
    bool tied; /* output projection is the embedding */
    bool qkv_bias, o_bias, mlp_bias, qk_norm;
    bool scale_by_layer;                /* attention scores of layer i are also divided by i + 1 (GPT-2's option) */
    int64_t window;                     /* sliding window, 0: none */
    unsigned char *slides;              /* [n_layers] 1 where the window applies; owned */
    int64_t bos_id, eos_ids[8], pad_id; /* -1 where absent */
    int n_eos;
    tp_dtype dtype; /* stated by the file */
} tp_model_config;

/* Reads `path` (at most TP_CONFIG_BYTES) and calls tp_config_from_json. */
TP_API tp_status tp_config_read(tp_ctx *ctx, const char *path, tp_model_config *config) TP_MUST_CHECK;
/* config.json (transformers 4 and 5 spellings). UNSUPPORTED names an unknown model_type, activation or rope type; a value
 * out of range names the key and position. Keys that execute code are ignored with a note. */
TP_API tp_status tp_config_from_json(tp_ctx *ctx, const tp_json_doc *doc, tp_model_config *config) TP_MUST_CHECK;
TP_API tp_status tp_config_from_gguf(tp_ctx *ctx, const tp_gguf *file, tp_model_config *config) TP_MUST_CHECK;
/* config.json of transformers 5 that reads back to the same values. */
TP_API void tp_config_write_json(const tp_model_config *config, tp_buf *out);
/* *copy owns its arrays; nothing to free after a failure. */
TP_API tp_status tp_config_copy(tp_ctx *ctx, const tp_model_config *config, tp_model_config *copy) TP_MUST_CHECK;
TP_API void tp_config_free(tp_model_config *config); /* what it owns, not the struct */
/* Weights of linears and head: the N of "4 N FLOPs per token"; and all parameters. */
TP_API int64_t tp_config_linear_weights(const tp_model_config *config);
TP_API int64_t tp_config_parameters(const tp_model_config *config);

/* Frequencies of the `half` = head_dim/2 pairs for a batch whose largest position + 1 is `length` (only dynamic and longrope
 * look at it), and the factor on cos and sin. f32 values as transformers 5 computes them. */
TP_API void tp_rope_frequencies(const tp_model_config *config, int64_t length, float *inv_freq, float *factor);
/* True if the frequencies depend on `length`. */
static inline bool tp_rope_depends_on_length(const tp_rope_config *rope)
{
    return rope->type == TP_ROPE_DYNAMIC || rope->type == TP_ROPE_LONGROPE;
}

/* ---- for models/ only ---- */
typedef struct tp_family_info {
    const char *model_type, *architecture; /* as config.json spells them */
    const char *gguf;                      /* general.architecture */
} tp_family_info;
extern const tp_family_info tp_families[TP_FAMILY_COUNT];
/* Names of what can be opened, for messages: "gpt2, llama, ...". Returns `out`. */
const char *tp_family_list(char *out, size_t size);
/* What both formats have to obey once every size is read: heads divide, heads rotate in pairs, products within limits. */
tp_status tp_config_check(tp_ctx *ctx, const char *name, tp_model_config *config) TP_MUST_CHECK;

#endif
