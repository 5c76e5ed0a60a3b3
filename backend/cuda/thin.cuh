/* Products with a thin side, as low-rank factors make them: what memory bounds, with no work besides. */
#ifndef TP_BACKEND_CUDA_THIN_CUH
#define TP_BACKEND_CUDA_THIN_CUH

#include "backend/cuda/cuda.cuh"

/* Gradients of factors (thin.cu). Whether tp_cuda_thin_tn can: one side bf16, the other with at most 64 columns, f32 (a multiple
 * of 4 columns) or bf16 (of 8), both aligned to 16 bytes. */
bool tp_cuda_thin_takes(const tp_matmul_tn_args *args);
tp_status tp_cuda_thin_tn(tp_ctx *ctx, const tp_matmul_tn_args *args);

/* Activations into factors (skinny.cu). Whether tp_cuda_skinny can: c = alpha * a op(b) and no more; a and b dense bf16 with
 * rows aligned to 16 bytes, k a multiple of 8, m one of up to 64, c bf16 or f32 aligned to pairs. */
bool tp_cuda_skinny_takes(const tp_matmul_args *args);
tp_status tp_cuda_skinny(tp_ctx *ctx, const tp_matmul_args *args);

/* out [size] = alpha * the sum of the parts, which lie one behind the other and are added in order, + beta * out. */
tp_status tp_cuda_add_parts(tp_ctx *ctx, const char *name, int64_t size, int parts, const float *part, float alpha, float beta,
                            float *out);

#endif
