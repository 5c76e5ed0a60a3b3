/* Products with a thin side on Hopper (stream.cu), as low-rank factors make them: the wide side, bf16, is all there is to read. */
#ifndef TP_BACKEND_CUDA_STREAM_CUH
#define TP_BACKEND_CUDA_STREAM_CUH

#include "backend/cuda/cuda.cuh"

/* c [n, m] = alpha * a b^T, all bf16 with a and b aligned to 16 bytes, c to pairs, m a multiple of 8 up to 64. */
typedef struct tp_cuda_stream_down_args {
    int64_t n, k;
    int m;
    tp_rows a, b, c;
    float alpha;
} tp_cuda_stream_down_args;

bool tp_cuda_stream_down_takes(tp_ctx *ctx, const tp_cuda_stream_down_args *args);
tp_status tp_cuda_stream_down(tp_ctx *ctx, const tp_cuda_stream_down_args *args);

/* tp_lowrank_backward_args in bf16 with all rows aligned to 16 bytes, ranks multiples of 8 up to 32. */
bool tp_cuda_stream_up_takes(tp_ctx *ctx, const tp_lowrank_backward_args *args);
tp_status tp_cuda_stream_up(tp_ctx *ctx, const tp_lowrank_backward_args *args);

/* out [rank, columns] or, not transposed, [columns, rank] = alpha * thin^T wide + beta * out; thin [n, rank] and wide
 * [n, columns] bf16 with rows aligned to 16 bytes, rank a multiple of 8 up to 64. */
typedef struct tp_cuda_stream_gradient_args {
    int64_t n, columns;
    int rank;
    tp_rows wide, thin;
    bool transposed;
    float *out;
    float alpha, beta;
} tp_cuda_stream_gradient_args;

bool tp_cuda_stream_gradient_takes(tp_ctx *ctx, const tp_cuda_stream_gradient_args *args);
tp_status tp_cuda_stream_gradient(tp_ctx *ctx, const tp_cuda_stream_gradient_args *args);

/* What blocks of a kernel left in the workspace, to be added in order. Down columns, of up to three parts:
 *   out = alpha * the sum of all blocks' [rank, columns] + beta * out          transposed: out is [rank, columns], else [columns, rank]
 * and along rows, if there are several splits: c [row_size / row_columns, row_columns] = row_alpha * the sum of theirs. */
struct tp_stream_sums {
    int n_parts, blocks;
    const float *sums;
    int64_t size; /* of all parts: from one block's sums to the next */
    struct {
        int64_t first, columns;
        int rank;
        bool transposed;
        float *out, alpha;
    } parts[TP_PACKED_PARTS];
    float beta;
    int64_t column_blocks; /* of the kernel that adds; those behind them add along rows */
    int splits, row_columns;
    int64_t row_size; /* of one split */
    const float *row_sums;
    __nv_bfloat16 *c;
    int64_t c_ld;
    float row_alpha;
};

tp_status tp_cuda_stream_add(tp_ctx *ctx, const char *name, tp_stream_sums sums);

#endif
