/* How much step arena a forward pass needs: the pass itself, run on the dry backend. */
#ifndef TP_MODELS_MEASURE_H
#define TP_MODELS_MEASURE_H

#include "models/model.h"

typedef struct tp_measure {
    int64_t rows;        /* of the pass */
    int64_t logits_rows; /* rows whose logits are made at once; 0: none */
    int64_t labels;      /* labels of a loss; 0: none */
    int64_t context;     /* capacity of a KV cache that is full at the end of the pass; 0: no cache */
} tp_measure;

/* Bytes for a pass without gradients, with the adapters that sit in the model's slots now. */
TP_API tp_status tp_model_measure(tp_ctx *ctx, const tp_model *model, const tp_measure *what, size_t *bytes) TP_MUST_CHECK;

#endif
