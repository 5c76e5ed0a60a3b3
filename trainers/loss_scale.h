/* Dynamic loss scaling of fp16: gradients are those of the loss times a power of two, so that small ones do not vanish among
 * f16's subnormals. The rules and numbers of PyTorch's GradScaler: a step whose gradients are not finite is not made and halves
 * the scale; 2000 steps in a row with finite ones double it. */
#ifndef TP_TRAINERS_LOSS_SCALE_H
#define TP_TRAINERS_LOSS_SCALE_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

#define TP_LOSS_SCALE_FIRST    65536.0
#define TP_LOSS_SCALE_INTERVAL 2000
/* It falls no lower (GradScaler's would): gradients that overflow even so are a failure of the run. */
#define TP_LOSS_SCALE_LEAST 1.0
/* And grows no higher: it is an f32. */
#define TP_LOSS_SCALE_MOST 0x1p126

typedef struct tp_loss_scale {
    double value;   /* a power of two; 0: losses are not scaled */
    int64_t streak; /* steps with finite gradients since it last changed */
} tp_loss_scale;

/* After a step. finite: whether its gradients were. True if the scale fell. Without a scale nothing happens. */
TP_API bool tp_loss_scale_update(tp_loss_scale *scale, bool finite);
/* Whether a checkpoint may hold it. */
TP_API bool tp_loss_scale_valid(const tp_loss_scale *scale);

#endif
