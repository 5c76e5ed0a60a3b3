/* Inside models/: loops over weights that have to run at the speed of memory. */
#ifndef TP_MODELS_SCAN_H
#define TP_MODELS_SCAN_H

#include "backend/matrix.h"

/* Index of the first value (dense formats) or block (packed ones: a scale) that is NaN or infinite; -1: all are finite.
 * bytes: a whole number of blocks; data at any alignment. */
int64_t tp_scan_finite(tp_format_id format, const void *data, size_t bytes);

/* n values to bf16, rounded to nearest even, NaN kept. from: F32 or F16. */
void tp_narrow_to_bf16(tp_format_id from, const void *data, size_t n, uint16_t *out);
/* The same to f16; what is beyond its range becomes infinite. from: F32 or BF16. */
void tp_narrow_to_f16(tp_format_id from, const void *data, size_t n, uint16_t *out);

#endif
