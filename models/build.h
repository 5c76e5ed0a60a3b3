/* Inside models/: the tensors a network is made of, and the empty network itself.
 *
 * A part is one tensor: its name in Hugging Face files and in GGUF, its shape, and the place in tp_model that it fills.
 * Opening files, shape-only models and random initialisation all walk the same list. */
#ifndef TP_MODELS_BUILD_H
#define TP_MODELS_BUILD_H

#include "models/store.h"

#define TP_PART_NAME 80

typedef enum tp_part_role { TP_PART_WEIGHT, TP_PART_BIAS, TP_PART_NORM } tp_part_role;

typedef struct tp_part {
    char name[TP_PART_NAME]; /* of the live model: "model.layers.0.self_attn.q_proj.weight" */
    char gguf[TP_PART_NAME]; /* "blk.0.attn_q.weight" */
    tp_part_role role;       /* weights are matrices, the others vectors held in f32 */
    bool conv1d;             /* Hugging Face files store it as [in, out] */
    bool rotary;             /* q or k: GGUF's arch llama stores its rows in another order */
    int64_t rows, cols;      /* logical [out, in]; vectors: rows = 1 */
    int layer;               /* -1: outside the blocks */
    size_t at;               /* where in tp_block or tp_model: a tp_matrix or a tp_tensor */
} tp_part;

/* All tensors of the configuration, in the order of the live model; released with tp_free. */
tp_status tp_parts_list(tp_ctx *ctx, const tp_model_config *config, tp_part **parts, size_t *n) TP_MUST_CHECK;

/* The network with modules, paths and shapes but no values. Takes *config and store in every case, failure included. */
tp_status tp_model_new(tp_ctx *ctx, tp_model_config *config, tp_model_store *store, const char *path, tp_dtype precision,
                       tp_model **model) TP_MUST_CHECK;
tp_matrix *tp_part_matrix(tp_model *model, const tp_part *part);
tp_tensor *tp_part_vector(tp_model *model, const tp_part *part);

#endif
