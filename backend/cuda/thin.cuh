/* Products of a wide bf16 side and a thin f32 side: gradients of low-rank factors. */
#ifndef TP_BACKEND_CUDA_THIN_CUH
#define TP_BACKEND_CUDA_THIN_CUH

#include "backend/cuda/cuda.cuh"

/* Whether tp_cuda_thin_tn can: one side bf16, the other f32 with at most 64 columns, both aligned to 16 bytes. */
bool tp_cuda_thin_takes(const tp_matmul_tn_args *args);
tp_status tp_cuda_thin_tn(tp_ctx *ctx, const tp_matmul_tn_args *args);

#endif
