/* A causal language model: configuration, frozen weights, named modules, one forward function per family. */
#ifndef TP_MODELS_MODEL_H
#define TP_MODELS_MODEL_H

#include "models/config.h"
#include "models/module.h"

typedef struct tp_block {
    tp_linear_module q, k, v, o;                    /* Llama kind */
    tp_linear_module qkv;                           /* fused (GPT-2's c_attn); weight.data NULL if not */
    tp_linear_module gate, up, down;                /* GPT-2: up = c_fc, down = mlp.c_proj, no gate */
    tp_tensor norm1, norm1_bias, norm2, norm2_bias; /* [1, D] f32; bias data NULL for RMSNorm */
    tp_tensor q_norm, k_norm;                       /* [1, head_dim]; data NULL: none */
    tp_joint joints[TP_JOINTS];                     /* Llama kind; GPT-2: empty */
} tp_block;

typedef struct tp_model {
    tp_model_config config;
    char *path; /* as given */
    tp_dtype precision;
    tp_matrix embedding;   /* [V, D] */
    tp_matrix position;    /* [max_positions, D] GPT-2; data NULL: none */
    tp_linear_module head; /* weight is the embedding's if tied */
    tp_tensor norm, norm_bias;
    tp_block *blocks;           /* [n_layers] */
    tp_linear_module **linears; /* every linear in the order of the live model, head last (untied only) */
    size_t n_linears;
    float *inv_freq;         /* device [head_dim/2] */
    int64_t inv_freq_length; /* batch length inv_freq was made for (dynamic), 0: none yet */
    float rope_factor;
    int64_t room;          /* columns that a pass of joint products with adapters needs behind its activations; 0: none */
    tp_rope_angles angles; /* of the batch under way; step arena */
    char fingerprint[65];  /* SHA-256 over config and tensor directory (names, dtypes, shapes, sizes, a sample of bytes) */
    uint64_t weight_bytes; /* of all frozen weights as held: mapped or owned */
    struct tp_model_store *store; /* files and buffers behind the matrices (models/loader.c) */
} tp_model;

typedef struct tp_model_options {
    tp_dtype precision; /* TP_F32, TP_BF16 or TP_F16 */
    bool check_weights; /* scan for NaN and infinities: NUMERIC naming the tensor (exit 5) */
    bool join;          /* stack the weights of linears that read the same input: costs a copy where they are mapped */
    int64_t room_rank;  /* joint weights have room for one adapter of so high a rank on each of their linears */
} tp_model_options;

/* Opens a Hugging Face folder (config.json, one or many safetensors) or a .gguf file on ctx->device. F32, BF16, F16 and ggml
 * blocks are used where they lie in the mapped file; for bf16 compute, F32 and F16 are converted while they stream in, and
 * packed blocks are rounded to bf16 when unpacked. On the dry backend only the directory is read.
 * IO_READ, FORMAT, SHAPE (first tensor whose shape disagrees with the configuration), UNSUPPORTED (by name). */
TP_API tp_status tp_model_open(tp_ctx *ctx, const char *path, const tp_model_options *options, tp_model **model) TP_MUST_CHECK;
/* The same network without any file, for plans and tests on the dry backend: shapes only. */
TP_API tp_status tp_model_from_config(tp_ctx *ctx, const tp_model_config *config, const tp_model_options *options,
                                      tp_model **model) TP_MUST_CHECK;
TP_API void tp_model_free(tp_model *model);
/* IO_READ if a mapped file changed or shrank. Once a step. */
TP_API tp_status tp_model_check(tp_ctx *ctx, const tp_model *model) TP_MUST_CHECK;
/* "model.layers.0.self_attn.q_proj" -> module, or NULL. */
TP_API tp_linear_module *tp_model_find(const tp_model *model, const char *path);
/* Family's target_modules when PEFT is given none (NULL-terminated). */
TP_API const char *const *tp_model_default_targets(const tp_model *model);

/* Hidden states after the final norm [N, D]: the input of the head. */
TP_API tp_tensor *tp_model_forward(tp_model *model, const tp_pass *pass);

/* ---- KV cache: keys and values of every layer, in the model's precision ---- */
typedef struct tp_kv_cache {
    int64_t capacity; /* rows */
    int64_t used;     /* rows written by finished passes */
    tp_dtype dtype;
    int64_t row; /* n_kv_heads * head_dim */
    int n_layers;
    char *data; /* device: [layer][k, v][capacity][row] */
    size_t bytes;
    tp_device *device;
} tp_kv_cache;
TP_API tp_status tp_kv_cache_open(tp_ctx *ctx, const tp_model *model, int64_t capacity, tp_kv_cache *cache) TP_MUST_CHECK;
TP_API void tp_kv_cache_close(tp_kv_cache *cache);
/* Rows of layer i, keys (0) or values (1). */
TP_API tp_rows tp_kv_cache_rows(const tp_kv_cache *cache, int layer, int which);

/* ---- for models/ only ---- */
/* A model of shapes alone is stacked as `model` is, of the same configuration. */
void tp_model_join_like(tp_model *shapes, const tp_model *model);
tp_tensor *tp_llama_forward(tp_model *model, const tp_pass *pass);
tp_tensor *tp_gpt2_forward(tp_model *model, const tp_pass *pass);
/* Attention over the batch, or over the cache after appending k and v to it. */
tp_tensor *tp_model_attend(tp_model *model, const tp_pass *pass, int layer, tp_tensor *q, tp_tensor *k, tp_tensor *v);
/* Runs blocks in segments as pass->recompute_every says. */
typedef tp_tensor *(*tp_block_fn)(tp_model *model, const tp_pass *pass, int layer, tp_tensor *x);
tp_tensor *tp_model_run_blocks(tp_model *model, const tp_pass *pass, tp_block_fn block, tp_tensor *x);

#endif
