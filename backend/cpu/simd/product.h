/* Products of tiles that lie in cache: c (+)= a b, where b and c are rows of whole vectors and a is read one value at a
 * time, broadcast. A block of MR rows by NV vectors of c stays in registers while k runs: for AVX-512 6 x 4 sums, so that
 * 24 multiply-adds need 4 loads of b and 6 of a, and hide each other's latency. */
#ifndef TP_BACKEND_CPU_SIMD_PRODUCT_H
#define TP_BACKEND_CPU_SIMD_PRODUCT_H

#include "backend/cpu/simd/vec.h"

#if TP_SIMD_BITS == 512
#define NV_MAX 4
#else
#define NV_MAX 2
#endif
#define MR 6

/* a's value (r, i) is a[r * a_row + i * a_step]; one of the two is the constant 1. */
TP_INLINE void product_block(int mr, int nv, int64_t k, const float *a, int64_t a_row, int64_t a_step, const float *b,
                             int64_t ldb, float *c, int64_t ldc, bool add)
{
    vf sum[MR][NV_MAX];
#pragma GCC unroll 6
    for (int r = 0; r < mr; r++) {
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++) sum[r][v] = add ? v_load(c + r * ldc + v * VL) : v_set(0.0f);
    }
    for (int64_t i = 0; i < k; i++) {
        vf row[NV_MAX];
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++) row[v] = v_load(b + i * ldb + v * VL);
#pragma GCC unroll 6
        for (int r = 0; r < mr; r++) {
            vf x = v_set(a[r * a_row + i * a_step]);
#pragma GCC unroll 4
            for (int v = 0; v < nv; v++) sum[r][v] = v_fma(x, row[v], sum[r][v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < mr; r++) {
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++) v_store(c + r * ldc + v * VL, sum[r][v]);
    }
}

#define PRODUCT_CASE(rows)                                                                                                     \
    case rows: product_block(rows, nv, k, a, a_row, a_step, b, ldb, c, ldc, add); break

/* One block of up to MR rows and exactly nv vectors. */
TP_INLINE void product_rows(int mr, int nv, int64_t k, const float *a, int64_t a_row, int64_t a_step, const float *b,
                            int64_t ldb, float *c, int64_t ldc, bool add)
{
    switch (mr) {
        PRODUCT_CASE(1);
        PRODUCT_CASE(2);
        PRODUCT_CASE(3);
        PRODUCT_CASE(4);
        PRODUCT_CASE(5);
        PRODUCT_CASE(6);
    }
}

TP_INLINE void product_any(int mr, int nv, int64_t k, const float *a, int64_t a_row, int64_t a_step, const float *b,
                           int64_t ldb, float *c, int64_t ldc, bool add)
{
    if (nv == 1) product_rows(mr, 1, k, a, a_row, a_step, b, ldb, c, ldc, add);
    if (nv == 2) product_rows(mr, 2, k, a, a_row, a_step, b, ldb, c, ldc, add);
#if NV_MAX >= 4
    if (nv == 3) product_rows(mr, 3, k, a, a_row, a_step, b, ldb, c, ldc, add);
    if (nv == 4) product_rows(mr, 4, k, a, a_row, a_step, b, ldb, c, ldc, add);
#endif
}

/* Vectors that the next block takes out of `left`: no block of one vector where two equal ones are better. */
TP_INLINE int product_vectors(int64_t left)
{
    if (NV_MAX == 4 && left == 5) return 3;
    return left < NV_MAX ? (int)left : NV_MAX;
}

/* c [m, vectors * VL] (+)= a [m, k] b [k, vectors * VL] */
static __attribute__((noinline, unused)) void product(int64_t m, int64_t vectors, int64_t k, const float *a, int64_t lda,
                                                      const float *b, int64_t ldb, float *c, int64_t ldc, bool add)
{
    for (int64_t v = 0; v < vectors;) {
        int nv = product_vectors(vectors - v);
        for (int64_t r = 0; r < m; r += MR) {
            int mr = m - r < MR ? (int)(m - r) : MR;
            product_any(mr, nv, k, a + r * lda, lda, 1, b + v * VL, ldb, c + r * ldc + v * VL, ldc, add);
        }
        v += nv;
    }
}

/* c [m, vectors * VL] (+)= a^T b, where a is [k, m] */
static __attribute__((noinline, unused)) void product_tn(int64_t m, int64_t vectors, int64_t k, const float *a, int64_t lda,
                                                         const float *b, int64_t ldb, float *c, int64_t ldc, bool add)
{
    for (int64_t v = 0; v < vectors;) {
        int nv = product_vectors(vectors - v);
        for (int64_t r = 0; r < m; r += MR) {
            int mr = m - r < MR ? (int)(m - r) : MR;
            product_any(mr, nv, k, a + r, 1, lda, b + v * VL, ldb, c + r * ldc + v * VL, ldc, add);
        }
        v += nv;
    }
}

#endif
