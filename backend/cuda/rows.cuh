/* Loops over rows of activations, and sums down their columns, for the kernels that memory bounds.
 *
 * Rows are cut into chunks of 8 values: one access of 16 bytes in bf16 and f16, two in f32. A loop gives each thread chunks of the
 * grid's size apart, so neighbours read neighbours, and any n and dim fit. What happens to a chunk is an object with
 *
 *   __device__ void operator()(int64_t row, int64_t column, int64_t count) const
 *
 * where count says how many values of the row are left from `column` on; it may be more than 8. */
#ifndef TP_BACKEND_CUDA_ROWS_CUH
#define TP_BACKEND_CUDA_ROWS_CUH

#include "backend/cuda/cuda.cuh"

#define TP_CHUNK 8

/* Where thread 0 is, and how far one step of the whole grid leads: a division per thread, none per chunk. */
struct tp_chunk_walk {
    int64_t rows, columns, chunks;    /* chunks: of one row */
    int64_t step_rows, step_chunks;
};

template <typename Body> __global__ void __launch_bounds__(256) tp_chunk_kernel(tp_chunk_walk walk, Body body)
{
    const int64_t first = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    int64_t row = first / walk.chunks, chunk = first % walk.chunks;
    while (row < walk.rows) {
        body(row, chunk * TP_CHUNK, walk.columns - chunk * TP_CHUNK);
        row += walk.step_rows;
        chunk += walk.step_chunks;
        if (chunk >= walk.chunks) chunk -= walk.chunks, row++;
    }
}

/* body(row, column, count) for all chunks of rows x columns. */
template <typename Body>
static tp_status tp_for_chunks(tp_ctx *ctx, const char *name, int64_t rows, int64_t columns, const Body &body)
{
    if (rows <= 0 || columns <= 0) return TP_OK;
    tp_chunk_walk walk = {rows, columns, tp_cuda_ceil(columns, TP_CHUNK), 0, 0};
    const unsigned blocks = tp_cuda_blocks(ctx, rows * walk.chunks, 256);
    walk.step_rows = (int64_t)blocks * 256 / walk.chunks;
    walk.step_chunks = (int64_t)blocks * 256 % walk.chunks;
    TP_CUDA_LAUNCH(ctx, name, tp_chunk_kernel<Body>, blocks, 256, 0, walk, body);
    return TP_OK;
}

/* Rows of a known type, as kernels take them. */
template <typename T> struct tp_typed_rows {
    T *data;
    int64_t ld;
    bool aligned; /* every row starts where 16-byte accesses may */
    __device__ T *at(int64_t row, int64_t column) const { return data + row * ld + column; }
    __device__ void load(int64_t row, int64_t column, int64_t count, float (&x)[TP_CHUNK]) const
    {
        tp_load_some<TP_CHUNK>(at(row, column), count, aligned, x);
    }
    __device__ void store(int64_t row, int64_t column, int64_t count, const float (&x)[TP_CHUNK]) const
    {
        tp_store_some<TP_CHUNK>(at(row, column), count, aligned, x);
    }
};

template <typename T> static tp_typed_rows<T> tp_typed(tp_rows x)
{
    return {static_cast<T *>(x.data), x.ld, tp_rows_aligned(x)};
}

/* Fails unless both are f32, both bf16 or both f16. */
static inline tp_status tp_check_same_dtype(tp_ctx *ctx, const char *name, tp_dtype a, tp_dtype b)
{
    TP_TRY(tp_cuda_check_dtype(ctx, name, a));
    if (a == b) return TP_OK;
    return tp_fail(ctx, TP_UNSUPPORTED, "%s: one array is %s, another %s", name, tp_dtype_name(a), tp_dtype_name(b));
}

/* ---- sums down columns ----
 *
 * Rows are cut into `parts`, a number that depends on the shape alone. A block sums one part of 256 columns: 8 groups of
 * threads take every eighth row, and their sums are added in order. A second kernel adds the parts, in order as well. The
 * term is an object with
 *
 *   __device__ void operator()(int64_t row, int64_t column, int64_t count, float (&x)[TP_CHUNK]) const */

#define TP_SUM_COLUMNS 256
#define TP_SUM_GROUPS  8

template <typename Term>
__global__ void __launch_bounds__(256) tp_column_parts_kernel(int64_t rows, int64_t columns, int64_t part_rows, Term term,
                                                               float *out, bool add)
{
    __shared__ float sums[TP_SUM_GROUPS][TP_SUM_COLUMNS];
    const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
    const int64_t column = (int64_t)blockIdx.x * TP_SUM_COLUMNS + lane * TP_CHUNK;
    const int64_t first = (int64_t)blockIdx.y * part_rows, end = first + part_rows < rows ? first + part_rows : rows;
    float sum[TP_CHUNK] = {}, x[TP_CHUNK];
    if (column < columns) {
#pragma unroll 4
        for (int64_t row = first + group; row < end; row += TP_SUM_GROUPS) {
            term(row, column, columns - column, x);
#pragma unroll
            for (int i = 0; i < TP_CHUNK; i++) sum[i] += x[i];
        }
    }
#pragma unroll
    for (int i = 0; i < TP_CHUNK; i++) sums[group][lane * TP_CHUNK + i] = sum[i];
    __syncthreads();
    const int64_t own = (int64_t)blockIdx.x * TP_SUM_COLUMNS + threadIdx.x;
    if (own >= columns) return;
    float total = 0;
#pragma unroll
    for (int g = 0; g < TP_SUM_GROUPS; g++) total += sums[g][threadIdx.x];
    float *to = out + (int64_t)blockIdx.y * columns + own;
    *to = add ? *to + total : total;
}

static __global__ void tp_add_parts_kernel(int64_t parts, int64_t columns, const float *part, float *out, bool add)
{
    const int64_t column = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    float total = 0;
    for (int64_t p = 0; p < parts; p++) total += part[p * columns + column];
    out[column] = add ? out[column] + total : total;
}

/* out[columns] = the sums of the terms over all rows, plus out itself if `add`. */
template <typename Term>
static tp_status tp_sum_columns(tp_ctx *ctx, const char *name, int64_t rows, int64_t columns, const Term &term, float *out, bool add)
{
    if (columns <= 0) return TP_OK;
    const int64_t room = (int64_t)(TP_CUDA_WORKSPACE_BYTES / sizeof(float)) / columns;
    int64_t parts = tp_cuda_min(tp_cuda_ceil(rows, 64), tp_cuda_min(256, room));
    if (parts < 1) parts = 1;
    const int64_t part_rows = tp_cuda_ceil(rows, parts);
    const dim3 grid((unsigned)tp_cuda_ceil(columns, TP_SUM_COLUMNS), (unsigned)parts);
    if (parts == 1) {
        TP_CUDA_LAUNCH(ctx, name, tp_column_parts_kernel<Term>, grid, 256, 0, rows, columns, part_rows, term, out, add);
        return TP_OK;
    }
    float *sums = reinterpret_cast<float *>(tp_cuda_of(ctx)->workspace);
    TP_CUDA_LAUNCH(ctx, name, tp_column_parts_kernel<Term>, grid, 256, 0, rows, columns, part_rows, term, sums, false);
    TP_CUDA_LAUNCH(ctx, name, tp_add_parts_kernel, (unsigned)tp_cuda_ceil(columns, 256), 256, 0, parts, columns, sums, out, add);
    return TP_OK;
}

#endif
