/* A product with a low-rank part, as up to three products: for backends and shapes that do not fold it into one. */
#ifndef TP_BACKEND_LOWRANK_H
#define TP_BACKEND_LOWRANK_H

#include "backend/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

#define TP_LOWRANK_PARTS 3

/* du of one part as a product, and db as one, for backends that do not fuse them. */
tp_matmul_args tp_lowrank_du(const tp_lowrank_backward_args *args, int part);
tp_matmul_tn_args tp_lowrank_db(const tp_lowrank_backward_args *args, int part);

/* The same as kernels of their own. */
tp_status tp_swiglu_factors_apart(tp_ctx *ctx, const tp_swiglu_factors_args *args);

/* Whether masks take the place of scratch: 16-bit rows of in values, on devices that say so. */
bool tp_drops_in_products(const tp_device *device, tp_dtype dtype, int64_t in, const int64_t rank[TP_PACKED_PARTS]);
/* dropped_down, dropped_gradient, dropped_up as kernels of their own, with scratch. */
tp_status tp_dropped_down_apart(tp_ctx *ctx, const tp_dropped_args *args);
tp_status tp_dropped_gradient_apart(tp_ctx *ctx, const tp_dropped_args *args);
tp_status tp_dropped_up_apart(tp_ctx *ctx, const tp_dropped_args *args);

/* Fills `parts` with products without low-rank parts, to be run in this order; returns their number. They point into args. */
int tp_lowrank_split(const tp_matmul_args *args, tp_matmul_args parts[TP_LOWRANK_PARTS]);

#ifdef __cplusplus
}
#endif
#endif
