/* What a joint linear and the SwiGLU beside it arrange in the sweep, so that factors of both sides get their gradients where
 * gate, up and y are in registers already (tp_swiglu_factors_args). */
#ifndef TP_AUTOGRAD_OPS_FACTORS_H
#define TP_AUTOGRAD_OPS_FACTORS_H

#include "autograd/op.h"

/* y was made by tp_joint_linear of two parts of so many rows, and the gradient of y has its memory: describes what passes
 * through their factors, which y's own backward then leaves out. False: not so, and nothing happens. */
bool tp_joint_before(tp_tensor *y, int64_t rows, tp_lowrank_backward_args *args);

/* y was made by tp_swiglu, on a device that makes it again: its backward will run this product, with y as b, and y need not be
 * recalled. False: not so. */
bool tp_swiglu_behind(tp_tensor *y, const tp_matmul_tn_args *args);

#endif
