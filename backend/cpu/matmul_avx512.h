/* Parts of the AVX-512 engine that its twin with bf16 dot products uses too. */
#ifndef TP_BACKEND_CPU_MATMUL_AVX512_H
#define TP_BACKEND_CPU_MATMUL_AVX512_H

#include "backend/cpu/matmul.h"

void tp_mm_avx512_finish(const tp_mm_out *out, int64_t row, int64_t rows, int64_t col, int64_t cols, const float *sums,
                         int64_t ld);
void tp_mm_avx512_dot(const tp_mm_right *b, int64_t col, int64_t cols, int n, const float *x, int64_t ld, float *sums,
                      int64_t ld_sums);
void tp_mm_avx512_axpy(const tp_mm_right *b, int64_t col, int64_t cols, int n, const float *x, int64_t ld, float *sums,
                       int64_t ld_sums);

#endif
