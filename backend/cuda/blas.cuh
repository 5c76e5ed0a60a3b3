/* Dense products by cuBLASLt, as our kernels see it: rows, not columns, and one call. */
#ifndef TP_BACKEND_CUDA_BLAS_CUH
#define TP_BACKEND_CUDA_BLAS_CUH

#include "backend/cuda/cuda.cuh"

/* c [n, m] = alpha * left * right + beta * add + bias. left is [n, k] or, transposed, stored as [k, n]; right is [k, m] or,
 * transposed, stored as [m, k]. All are row-major with distances ld between stored rows. left and right are both f32 (exact
 * products, no tf32), both bf16 or both f16; sums are f32; c is f32, or what they are. */
typedef struct tp_product {
    int64_t n, m, k; /* none of them 0 */
    tp_dtype type;   /* of left and right */
    const void *left, *right;
    int64_t left_ld, right_ld;
    bool left_transposed, right_transposed;
    tp_rows c;
    const void *add; /* dtype of c, may be c; not read if beta is 0 */
    int64_t add_ld;
    float alpha, beta;
    const void *bias; /* [m] in the dtype of c, or NULL */
} tp_product;

/* Every call of the same shape takes the same algorithm: a tuned one, or the one that cuBLASLt's own rules put first. */
tp_status tp_cuda_product(tp_ctx *ctx, const char *name, const tp_product *p);

#endif
