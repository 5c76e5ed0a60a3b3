/* A matrix as kernels see it: bytes in some storage format, with a logical shape [rows, cols] = [out, in] of y = x W^T.
 *
 * Weights stay as they lie in the file: row-major, in whatever format. Products unpack the panel they need into cache, so
 * the same bytes serve x W^T (rows are gathered and transposed), dy W (rows are copied) and the one-token product (rows
 * are read once). Nothing is packed ahead, so loading is a mapping and nothing is held twice. */
#ifndef TP_BACKEND_MATRIX_H
#define TP_BACKEND_MATRIX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/dtype.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum tp_format_id {
    TP_FORMAT_F32,
    TP_FORMAT_BF16,
    TP_FORMAT_F16, /* dense */
    TP_FORMAT_Q8_0,
    TP_FORMAT_Q4_0,
    TP_FORMAT_Q4_1, /* ggml blocks of 32 along a row */
    TP_FORMAT_COUNT
} tp_format_id;

typedef struct tp_matrix {
    tp_format_id format;
    const void *data;   /* borrowed; device memory on a GPU. May be unaligned for mapped files */
    int64_t rows, cols; /* logical */
    int64_t stride;     /* elements from one stored row to the next (dense), or 0: stored rows are contiguous */
    bool transposed;    /* stored as [cols, rows] (GPT-2's Conv1D); dense formats only */
    int32_t rope_pairs; /* > 0: rows are stored in GGUF's rotary order with this head size: logical row
                         * h*hd + p*hd/2 + i lies at stored row h*hd + 2*i + p */
    bool round_bf16;    /* values are rounded to bf16 when unpacked: bf16 compute on a base stored wider */
} tp_matrix;

/* Stored row of a logical row. */
static inline int64_t tp_matrix_stored_row(const tp_matrix *w, int64_t row)
{
    if (w->rope_pairs <= 0) return row;
    int64_t hd = w->rope_pairs, head = row / hd, in = row % hd;
    return head * hd + 2 * (in % (hd / 2)) + in / (hd / 2);
}

typedef struct tp_format {
    const char *name; /* "f32", "q4_1", as recipes and inspect spell it */
    int64_t block;    /* values per block along a row; 1 for dense formats */
    int64_t block_bytes;
    bool dense;
    tp_dtype dtype; /* of dense formats */
    /* Decodes values first .. first+n of one stored row. first and n are multiples of `block`.
     * Defined for every bit pattern. The scalar definition of the format; CPU kernels may have a vector twin. */
    void (*decode)(const void *row, int64_t first, int64_t n, float *out);
} tp_format;

/* Table of all formats (quant/formats.c). */
extern const tp_format tp_formats[TP_FORMAT_COUNT];

/* Bytes of one stored row with n values. */
static inline int64_t tp_format_row_bytes(tp_format_id id, int64_t n)
{
    return (n + tp_formats[id].block - 1) / tp_formats[id].block * tp_formats[id].block_bytes;
}

/* The dense format of f32, bf16 or f16. */
static inline tp_format_id tp_format_of(tp_dtype dtype)
{
    return dtype == TP_BF16 ? TP_FORMAT_BF16 : dtype == TP_F16 ? TP_FORMAT_F16 : TP_FORMAT_F32;
}

/* A dense array [rows, cols] of one of these as a matrix: activations and adapter factors as right-hand sides. */
static inline tp_matrix tp_matrix_dense(tp_dtype dtype, const void *data, int64_t rows, int64_t cols)
{
    tp_matrix m = {tp_format_of(dtype), data, rows, cols, 0, false, 0, false};
    return m;
}

#ifdef __cplusplus
}
#endif
#endif
