/* Inside models/: normal numbers by look-up. 16 bits of the counter-based generator choose one of 65536 quantiles of the normal
 * distribution, already scaled and in the file's dtype, so that one block of the generator gives eight weights. */
#ifndef TP_MODELS_QUANTILES_H
#define TP_MODELS_QUANTILES_H

#include "base/dtype.h"
#include "base/rng.h"

#define TP_QUANTILES_BLOCK 8 /* weights of one generator block */

/* The quantiles at (i + 0.5) / 65536, scaled so that their deviation is exactly `deviation` before rounding to dtype (F32, BF16
 * or F16); the largest is 4.3 deviations. tp_free. */
void *tp_quantiles_new(tp_ctx *ctx, double deviation, tp_dtype dtype) TP_MUST_CHECK;
/* Weights first .. first + n - 1 of a stream, 2 or 4 bytes each: weight i is what bits 16 (i % 8) to 16 (i % 8) + 15 of
 * block i / 8 choose. first is a multiple of TP_QUANTILES_BLOCK. */
void tp_quantiles_fill(const void *quantiles, size_t value_bytes, tp_rng_key key, uint64_t first, int64_t n, void *out);

#endif
