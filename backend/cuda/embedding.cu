/* Rows of a frozen table by token id, and the gradient of a trainable one. */
#include "backend/cuda/decode.cuh"

#define THREADS 256

/* out[row] (+)= table[ids[row]]; a thread takes 8 values. */
template <tp_format_id F, typename T>
__global__ void gather_table(const unsigned char *data, int64_t row_bytes, int64_t rope_pairs, bool aligned, bool round_bf16,
                             const int32_t *ids, int64_t n, int64_t dim, T *out, int64_t out_ld, bool out_aligned,
                             bool accumulate)
{
    const int64_t groups = (dim + TP_DECODE - 1) / TP_DECODE, total = n * groups;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < total; i += (int64_t)gridDim.x * THREADS) {
        const int64_t row = i / groups, c = i % groups * TP_DECODE;
        T *to = out + row * out_ld + c;
        float x[TP_DECODE] = {}, old[TP_DECODE];
        if (ids[row] >= 0) tp_decode<F>(data + tp_device_stored_row(rope_pairs, ids[row]) * row_bytes, c, dim - c, aligned, x);
        if (accumulate) tp_load_some<TP_DECODE>(to, dim - c, out_aligned, old);
#pragma unroll
        for (int k = 0; k < TP_DECODE; k++) {
            if (round_bf16) x[k] = tp_round_bf16(x[k]);
            if (accumulate) x[k] += old[k];
        }
        tp_store_some<TP_DECODE>(to, dim - c, out_aligned, x);
    }
}

/* A table stored as [D, V]: the values of a token lie a row apart. */
template <tp_format_id F, typename T>
__global__ void gather_columns(const unsigned char *data, int64_t row_bytes, bool round_bf16, const int32_t *ids, int64_t n,
                               int64_t dim, T *out, int64_t out_ld, bool accumulate)
{
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n * dim; i += (int64_t)gridDim.x * THREADS) {
        const int64_t row = i / dim, c = i % dim;
        float x[TP_DECODE] = {};
        if (ids[row] >= 0) tp_decode<F>(data + c * row_bytes, ids[row], 1, false, x);
        if (round_bf16) x[0] = tp_round_bf16(x[0]);
        if (accumulate) x[0] += tp_to_f32(out[row * out_ld + c]);
        out[row * out_ld + c] = tp_from_f32<T>(x[0]);
    }
}

template <typename T>
static tp_status embed_columns(tp_ctx *ctx, const tp_embedding_args *args, const unsigned char *data, int64_t row_bytes)
{
    const int64_t dim = args->table.cols;
    const unsigned blocks = tp_cuda_blocks(ctx, args->n * dim, THREADS);
    TP_CUDA_DENSE_FORMAT(args->table.format, F, {
        TP_CUDA_LAUNCH(ctx, "embedding", (gather_columns<F, T>), blocks, THREADS, 0, data, row_bytes, args->table.round_bf16,
                       args->ids, args->n, dim, (T *)args->out.data, args->out.ld, args->accumulate);
    });
    return TP_OK;
}

template <typename T>
static tp_status embed_rows(tp_ctx *ctx, const tp_embedding_args *args, const unsigned char *data, int64_t row_bytes)
{
    const tp_matrix *t = &args->table;
    const unsigned blocks = tp_cuda_blocks(ctx, args->n * tp_cuda_ceil(t->cols, TP_DECODE), THREADS);
    TP_CUDA_FORMAT(t->format, F, {
        TP_CUDA_LAUNCH(ctx, "embedding", (gather_table<F, T>), blocks, THREADS, 0, data, row_bytes, (int64_t)t->rope_pairs,
                       tp_matrix_aligned(t), t->round_bf16, args->ids, args->n, t->cols, (T *)args->out.data, args->out.ld,
                       tp_rows_aligned(args->out), args->accumulate);
    });
    return TP_OK;
}

extern "C" tp_status tp_cuda_embedding(tp_ctx *ctx, const void *arguments)
{
    const tp_embedding_args *args = (const tp_embedding_args *)arguments;
    const unsigned char *data = (const unsigned char *)args->table.data;
    TP_TRY(tp_cuda_check_matrix(ctx, "embedding", &args->table));
    TP_TRY(tp_cuda_check_dtype(ctx, "embedding", args->out.dtype));
    if (args->n <= 0 || args->table.cols <= 0) return TP_OK;
    const int64_t row_bytes = tp_matrix_row_bytes(&args->table);
    TP_CUDA_DTYPE(args->out.dtype, T, {
        if (args->table.transposed) return embed_columns<T>(ctx, args, data, row_bytes);
        return embed_rows<T>(ctx, args, data, row_bytes);
    });
}

/* The same id may come up in many rows, and they must be added in row order. Rows are taken a tile at a time: a block owns 32
 * columns, keeps the ids of the tile in shared memory, and its warps divide the ids among themselves (id mod warps), so that no
 * two warps touch the same row of the table; each warp goes through the tile in order. */
#define WARPS     8
#define TILE_ROWS 1024

template <typename T>
__global__ void add_rows(const int32_t *ids, int64_t n, int64_t dim, const T *dout, int64_t dout_ld, float *dtable)
{
    __shared__ int32_t tile[TILE_ROWS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t c = (int64_t)blockIdx.x * 32 + lane;
    for (int64_t row0 = 0; row0 < n; row0 += TILE_ROWS) {
        const int rows = (int)(n - row0 < TILE_ROWS ? n - row0 : TILE_ROWS);
        __syncthreads();
        for (int i = threadIdx.x; i < rows; i += WARPS * 32) tile[i] = ids[row0 + i];
        __syncthreads();
        for (int i = 0; i < rows; i++) {
            const int32_t id = tile[i];
            if (id % WARPS == warp && c < dim) dtable[id * dim + c] += tp_to_f32(dout[(row0 + i) * dout_ld + c]);
        }
    }
}

extern "C" tp_status tp_cuda_embedding_backward(tp_ctx *ctx, const void *arguments)
{
    const tp_embedding_backward_args *args = (const tp_embedding_backward_args *)arguments;
    TP_TRY(tp_cuda_check_dtype(ctx, "embedding_backward", args->dout.dtype));
    if (args->n <= 0 || args->dim <= 0) return TP_OK;
    const unsigned blocks = (unsigned)tp_cuda_ceil(args->dim, 32);
    TP_CUDA_DTYPE(args->dout.dtype, T, {
        TP_CUDA_LAUNCH(ctx, "embedding_backward", add_rows<T>, blocks, WARPS * 32, 0, args->ids, args->n, args->dim,
                       (const T *)args->dout.data, args->dout.ld, args->dtable);
    });
    return TP_OK;
}
