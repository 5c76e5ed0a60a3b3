/* Adapters while decoding under bf16 or fp16. A token reads every weight once, so the bytes of an adapter are time: its
 * factors, f32 wherever they are trained and stored, are held a second time in 16 bits and sit in the model's slots during a
 * pass. */
#ifndef TP_INFERENCE_NARROW_H
#define TP_INFERENCE_NARROW_H

#include "models/model.h"

typedef struct tp_narrow tp_narrow;

/* For the slots of `model`, borrowed. */
tp_status tp_narrow_open(tp_ctx *ctx, tp_model *model, tp_narrow **narrow) TP_MUST_CHECK;
void tp_narrow_close(tp_narrow *narrow); /* accepts NULL */
/* The values of the factors may have changed: they are copied again when next used. Other factors in the slots are noticed. */
void tp_narrow_forget(tp_narrow *narrow);
/* Around a pass: the copies in the slots, and what was there before. */
tp_status tp_narrow_begin(tp_ctx *ctx, tp_narrow *narrow) TP_MUST_CHECK;
void tp_narrow_end(tp_narrow *narrow);

#endif
