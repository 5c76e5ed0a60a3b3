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

/* Both gradients that go through an up factor, from one reading of dy [n, out]:
 *   du [n, rank] = du_alpha * dy b          db [out, rank] = db_alpha * dy^T u + db_beta * db
 * dy, b [out, rank] and u [n, rank] are bf16 with rows aligned to 16 bytes, rank is a multiple of 8 and at most 32. */
typedef struct tp_cuda_factor_gradients_args {
    int64_t n, out, rank;
    tp_rows dy, b, u;
    tp_rows du; /* bf16 or f32, aligned to pairs */
    float *db;  /* contiguous */
    float du_alpha, db_alpha, db_beta;
} tp_cuda_factor_gradients_args;

bool tp_cuda_factor_gradients_takes(const tp_cuda_factor_gradients_args *args);
tp_status tp_cuda_factor_gradients(tp_ctx *ctx, const tp_cuda_factor_gradients_args *args);

/* out [size] = alpha * the sum of the parts, which lie one behind the other and are added in order, + beta * out. */
tp_status tp_cuda_add_parts(tp_ctx *ctx, const char *name, int64_t size, int parts, const float *part, float alpha, float beta,
                            float *out);

#endif
