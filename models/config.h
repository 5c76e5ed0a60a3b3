/* What shapes a network: read from config.json or GGUF metadata, checked against limits, no silent defaults. */
#ifndef TP_MODELS_CONFIG_H
#define TP_MODELS_CONFIG_H

#include "base/dtype.h"
#include "base/gguf.h"
#include "base/json.h"
#include "base/status.h"

typedef enum tp_family { TP_FAMILY_LLAMA, TP_FAMILY_MISTRAL, TP_FAMILY_QWEN2, TP_FAMILY_QWEN3, TP_FAMILY_GPT2, TP_FAMILY_COUNT } tp_family;

typedef enum tp_rope_type { TP_ROPE_DEFAULT, TP_ROPE_LINEAR, TP_ROPE_DYNAMIC, TP_ROPE_YARN, TP_ROPE_LLAMA3, TP_ROPE_FACTORS } tp_rope_type;

typedef struct tp_rope_config {
    tp_rope_type type;
    double theta;
    double factor;
    int64_t original_max_positions;  /* yarn, llama3 */
    double beta_fast, beta_slow;     /* yarn */
    double attention_factor;         /* yarn; 0: derived */
    double mscale, mscale_all_dim;   /* yarn; 0: absent */
    bool truncate;                   /* yarn; default true */
    double low_freq_factor, high_freq_factor; /* llama3 */
    float *factors;                  /* TP_ROPE_FACTORS: GGUF's rope_freqs [head_dim/2], divide the frequencies; owned */
} tp_rope_config;

typedef enum tp_activation { TP_ACT_SILU, TP_ACT_GELU_TANH, TP_ACT_GELU } tp_activation;

#define TP_LIMIT_LAYERS 4096
#define TP_LIMIT_WIDTH (1 << 20)
#define TP_LIMIT_HEADS (1 << 12)
#define TP_LIMIT_VOCAB (1 << 22)

typedef struct tp_model_config {
    tp_family family;
    char model_type[32];      /* as config.json spells it: "llama", ... */
    char architecture[64];    /* "LlamaForCausalLM" */
    int64_t vocab_size, hidden_size, intermediate_size, n_layers, n_heads, n_kv_heads, head_dim, max_positions;
    double norm_eps;
    double initializer_range;
    tp_rope_config rope;
    tp_activation activation;
    bool tied;                /* output projection is the embedding */
    bool qkv_bias, o_bias, mlp_bias, qk_norm;
    int64_t window;           /* sliding window, 0: none */
    unsigned char *slides;    /* [n_layers] 1 where the window applies; owned */
    int64_t bos_id, eos_ids[8], pad_id; /* -1 where absent */
    int n_eos;
    tp_dtype dtype;           /* stated by the file */
} tp_model_config;

/* config.json (transformers 4 and 5 spellings). UNSUPPORTED names an unknown model_type, activation or rope type; a value
 * out of range names the key and position. Keys that execute code are ignored with a note. */
TP_API tp_status tp_config_from_json(tp_ctx *ctx, const tp_json_doc *doc, tp_model_config *config) TP_MUST_CHECK;
TP_API tp_status tp_config_from_gguf(tp_ctx *ctx, const tp_gguf *file, tp_model_config *config) TP_MUST_CHECK;
/* config.json of transformers 5 that reads back to the same values. */
TP_API void tp_config_write_json(const tp_model_config *config, tp_buf *out);
TP_API void tp_config_free(tp_model_config *config); /* what it owns, not the struct */
/* Weights of linears and head: the N of "4 N FLOPs per token"; and all parameters. */
TP_API int64_t tp_config_linear_weights(const tp_model_config *config);
TP_API int64_t tp_config_parameters(const tp_model_config *config);

/* Frequencies of the `half` = head_dim/2 pairs for a batch whose largest position + 1 is `length` (only dynamic looks at it),
 * and the factor on cos and sin. f32 values as transformers 5 computes them. */
TP_API void tp_rope_frequencies(const tp_model_config *config, int64_t length, float *inv_freq, float *factor);

#endif
