/* Sums, copies and conversions of rows: add, scale, dropout, gather_rows, scatter_rows, column_sum. Memory bounds all of
 * them: each array is read or written once. */
#include "backend/cuda/rows.cuh"

namespace
{

template <typename X, typename Y, typename Z> struct add_chunk {
    tp_typed_rows<X> x;
    tp_typed_rows<Y> y;
    tp_typed_rows<Z> z;
    __device__ void operator()(int64_t row, int64_t column, int64_t count) const
    {
        float a[TP_CHUNK], b[TP_CHUNK];
        x.load(row, column, count, a);
        y.load(row, column, count, b);
#pragma unroll
        for (int i = 0; i < TP_CHUNK; i++) a[i] += b[i];
        z.store(row, column, count, a);
    }
};

template <typename X, typename Y> struct scale_chunk {
    tp_typed_rows<X> x;
    tp_typed_rows<Y> y;
    float alpha;
    __device__ void operator()(int64_t row, int64_t column, int64_t count) const
    {
        float a[TP_CHUNK];
        x.load(row, column, count, a);
#pragma unroll
        for (int i = 0; i < TP_CHUNK; i++) a[i] *= alpha;
        y.store(row, column, count, a);
    }
};

/* Eight numbers of the generator from `index` on, which may begin within a block of four. */
__device__ __forceinline__ void draw(tp_rng_key key, uint64_t index, uint32_t (&numbers)[12])
{
    const uint32_t words[2] = {(uint32_t)key.seed ^ (uint32_t)(key.seed >> 32) * 0x9E3779B9u, key.stream};
    const int skip = (int)(index % 4);
#pragma unroll
    for (int b = 0; b < 3; b++) {
        if (b == 2 && skip == 0) break;
        const uint64_t block = index / 4 + (uint64_t)b;
        const uint32_t counter[4] = {(uint32_t)block, (uint32_t)(block >> 32), (uint32_t)key.step, (uint32_t)(key.step >> 32)};
        uint32_t out[4];
        tp_philox4x32(counter, words, out);
#pragma unroll
        for (int i = 0; i < 4; i++) numbers[b * 4 + i] = out[i];
    }
    /* shifted by constants, so that the numbers stay in registers */
    if (skip & 1) {
#pragma unroll
        for (int i = 0; i < 11; i++) numbers[i] = numbers[i + 1];
    }
    if (skip & 2) {
#pragma unroll
        for (int i = 0; i < 10; i++) numbers[i] = numbers[i + 2];
    }
}

/* Products are rounded before they are added, as on the CPU: no fused multiply-add. */
template <typename X, typename Y> struct dropout_chunk {
    tp_typed_rows<X> x;
    tp_typed_rows<Y> y;
    tp_rng_key key;
    uint64_t first_row, dim;
    uint32_t threshold; /* a number is kept if its upper 24 bits are at least this */
    float keep_scale;
    bool accumulate;
    const tp_step_state *state;
    __device__ void operator()(int64_t row, int64_t column, int64_t count) const
    {
        uint32_t numbers[12] = {};
        float a[TP_CHUNK], before[TP_CHUNK];
        tp_rng_key now = key;
        if (state != nullptr) now.step = state->draw;
        draw(now, (first_row + (uint64_t)row) * dim + (uint64_t)column, numbers);
        x.load(row, column, count, a);
#pragma unroll
        for (int i = 0; i < TP_CHUNK; i++) a[i] = (numbers[i] >> 8) >= threshold ? __fmul_rn(a[i], keep_scale) : 0.0f;
        if (accumulate) {
            y.load(row, column, count, before);
#pragma unroll
            for (int i = 0; i < TP_CHUNK; i++) a[i] = __fadd_rn(a[i], before[i]);
        }
        y.store(row, column, count, a);
    }
};

template <typename X, typename Y, bool SCATTER> struct move_chunk {
    tp_typed_rows<X> in;
    tp_typed_rows<Y> out;
    const int32_t *index;
    __device__ void operator()(int64_t row, int64_t column, int64_t count) const
    {
        float a[TP_CHUNK] = {};
        const int64_t other = index[row];
        if (other >= 0)
            in.load(SCATTER ? row : other, column, count, a);
        else if (SCATTER)
            return;
        out.store(SCATTER ? other : row, column, count, a);
    }
};

template <typename T> struct column_term {
    tp_typed_rows<T> a;
    __device__ void operator()(int64_t row, int64_t column, int64_t count, float (&x)[TP_CHUNK]) const
    {
        a.load(row, column, count, x);
    }
};

tp_status clear_rows(tp_ctx *ctx, const char *name, tp_rows x, int64_t rows, int64_t columns)
{
    const size_t size = (size_t)tp_cuda_size(x.dtype);
    if (rows <= 0 || columns <= 0) return TP_OK;
    return tp_cuda_check(
        ctx, name,
        cudaMemset2DAsync(x.data, (size_t)x.ld * size, 0, (size_t)columns * size, (size_t)rows, tp_cuda_of(ctx)->stream));
}

} // namespace

extern "C" tp_status tp_cuda_add(tp_ctx *ctx, const void *args)
{
    const tp_add_args *a = static_cast<const tp_add_args *>(args);
    TP_TRY(tp_cuda_check_dtypes(ctx, "add", a->x.dtype, a->y.dtype));
    TP_TRY(tp_cuda_check_dtypes(ctx, "add", a->x.dtype, a->z.dtype));
    TP_TRY(tp_cuda_check_dtypes(ctx, "add", a->y.dtype, a->z.dtype));
    TP_CUDA_DTYPE(a->x.dtype, X, {
        TP_CUDA_DTYPE_BESIDE(X, a->y.dtype, Y, {
            typedef tp_beside<X, Y>::type W;
            TP_CUDA_DTYPE_BESIDE(W, a->z.dtype, Z, {
                const add_chunk<X, Y, Z> body = {tp_typed<X>(a->x), tp_typed<Y>(a->y), tp_typed<Z>(a->z)};
                return tp_for_chunks(ctx, "add", a->n, a->dim, body);
            });
        });
    });
}

extern "C" tp_status tp_cuda_scale(tp_ctx *ctx, const void *args)
{
    const tp_scale_args *a = static_cast<const tp_scale_args *>(args);
    TP_TRY(tp_cuda_check_dtype(ctx, "scale", a->y.dtype));
    if (a->alpha == 0.0f) return clear_rows(ctx, "scale", a->y, a->n, a->dim);
    TP_TRY(tp_cuda_check_dtypes(ctx, "scale", a->x.dtype, a->y.dtype));
    TP_CUDA_DTYPE(a->x.dtype, X, {
        TP_CUDA_DTYPE_BESIDE(X, a->y.dtype, Y, {
            const scale_chunk<X, Y> body = {tp_typed<X>(a->x), tp_typed<Y>(a->y), a->alpha};
            return tp_for_chunks(ctx, "scale", a->n, a->dim, body);
        });
    });
}

extern "C" tp_status tp_cuda_dropout(tp_ctx *ctx, const void *args)
{
    const tp_dropout_args *a = static_cast<const tp_dropout_args *>(args);
    TP_TRY(tp_cuda_check_dtypes(ctx, "dropout", a->x.dtype, a->y.dtype));
    /* uniform >= p, where uniform = u24 * 2^-24, is u24 >= ceil(p * 2^24), all exact in double */
    const uint32_t threshold = (uint32_t)ceil((double)a->p * 16777216.0);
    const float keep_scale = (float)(1.0 / (1.0 - (double)a->p));
    TP_CUDA_DTYPE(a->x.dtype, X, {
        TP_CUDA_DTYPE_BESIDE(X, a->y.dtype, Y, {
            const dropout_chunk<X, Y> body = {tp_typed<X>(a->x), tp_typed<Y>(a->y), a->key,     (uint64_t)a->first_row,
                                              (uint64_t)a->dim,  threshold,         keep_scale, a->accumulate,
                                              a->state};
            return tp_for_chunks(ctx, "dropout", a->n, a->dim, body);
        });
    });
}

extern "C" tp_status tp_cuda_gather_rows(tp_ctx *ctx, const void *args)
{
    const tp_gather_rows_args *a = static_cast<const tp_gather_rows_args *>(args);
    TP_TRY(tp_cuda_check_dtypes(ctx, "gather_rows", a->in.dtype, a->out.dtype));
    TP_CUDA_DTYPE(a->in.dtype, X, {
        TP_CUDA_DTYPE_BESIDE(X, a->out.dtype, Y, {
            const move_chunk<X, Y, false> body = {tp_typed<X>(a->in), tp_typed<Y>(a->out), a->index};
            return tp_for_chunks(ctx, "gather_rows", a->n, a->dim, body);
        });
    });
}

extern "C" tp_status tp_cuda_scatter_rows(tp_ctx *ctx, const void *args)
{
    const tp_scatter_rows_args *a = static_cast<const tp_scatter_rows_args *>(args);
    TP_TRY(tp_cuda_check_dtypes(ctx, "scatter_rows", a->in.dtype, a->out.dtype));
    if (a->zero_rest) TP_TRY(clear_rows(ctx, "scatter_rows", a->out, a->rows, a->dim));
    TP_CUDA_DTYPE(a->in.dtype, X, {
        TP_CUDA_DTYPE_BESIDE(X, a->out.dtype, Y, {
            const move_chunk<X, Y, true> body = {tp_typed<X>(a->in), tp_typed<Y>(a->out), a->index};
            return tp_for_chunks(ctx, "scatter_rows", a->n, a->dim, body);
        });
    });
}

extern "C" tp_status tp_cuda_column_sum(tp_ctx *ctx, const void *args)
{
    const tp_column_sum_args *a = static_cast<const tp_column_sum_args *>(args);
    TP_TRY(tp_cuda_check_dtype(ctx, "column_sum", a->a.dtype));
    TP_CUDA_DTYPE(a->a.dtype, T, {
        const column_term<T> term = {tp_typed<T>(a->a)};
        return tp_sum_columns(ctx, "column_sum", a->n, a->m, term, a->out, a->beta != 0.0f);
    });
}
