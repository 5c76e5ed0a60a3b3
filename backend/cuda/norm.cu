/* RMSNorm and LayerNorm with their gradients.
 *
 * A row belongs to a warp, or to a block of up to 8 warps: 4 chunks of 8 values per thread. So the row stays in registers
 * between the sum and the result, and each array crosses memory once. A longer row does not fit; then the block walks over
 * it again for each pass, in L1 and L2. Gradients of weight and bias are sums down columns (rows.cuh); they
 * run first, because dx may lie where dy was. */
#include "backend/cuda/rows.cuh"

namespace
{

constexpr int HELD = 4, NARROW_HELD = 3; /* chunks per thread; of rows that a warp holds with fewer */
constexpr int HELD_THREADS = 256, LONG_THREADS = 1024;
constexpr int64_t HELD_COLUMNS = HELD_THREADS * TP_CHUNK * HELD;

/* Rows that may be heads of tokens: then `heads` of them, `columns` apart, lie in each row of the array. */
template <typename T> struct norm_rows {
    tp_typed_rows<T> tokens;
    unsigned heads, columns;
    __device__ T *at(int64_t row, int64_t column) const
    {
        if (heads <= 1) return tokens.at(row, column);
        return tokens.at((unsigned)row / heads, (int64_t)((unsigned)row % heads) * columns + column);
    }
    __device__ void load(int64_t row, int64_t column, int64_t count, float (&x)[TP_CHUNK]) const
    {
        tp_load_some<TP_CHUNK>(at(row, column), count, tokens.aligned, x);
    }
    __device__ void store(int64_t row, int64_t column, int64_t count, const float (&x)[TP_CHUNK]) const
    {
        tp_store_some<TP_CHUNK>(at(row, column), count, tokens.aligned, x);
    }
};

template <typename T> norm_rows<T> norm_rows_of(tp_rows rows, int64_t heads, int64_t columns)
{
    tp_typed_rows<T> tokens = tp_typed<T>(rows);
    if (heads > 1) tokens.aligned = tokens.aligned && columns * (int64_t)sizeof(T) % 16 == 0;
    return {tokens, (unsigned)heads, (unsigned)columns};
}

/* Threads for rows of `columns` values: x along a row, y over rows of a block. */
dim3 norm_block(int64_t columns)
{
    const int64_t warps = tp_cuda_ceil(columns, 32 * TP_CHUNK * HELD);
    if (columns > HELD_COLUMNS) return dim3(LONG_THREADS, 1);
    return warps == 1 ? dim3(32, 4) : dim3((unsigned)warps * 32, 1);
}

/* The row's threads are a warp, or the block. */
__device__ __forceinline__ float row_sum(float x)
{
    __shared__ float shared[32];
    return blockDim.x == 32 ? tp_warp_sum(x) : tp_block_sum(x, shared);
}

/* A row as its threads see it: chunk k of a thread begins at column(k). Short rows have up to N chunks per thread, which may
 * be kept; long ones, N = 0, as many as it takes. */
template <int N> struct row_chunks {
    int64_t columns;
    __device__ int64_t column(int k) const { return ((int64_t)k * blockDim.x + threadIdx.x) * TP_CHUNK; }
    __device__ int count() const
    {
        return (int)((columns + (int64_t)blockDim.x * TP_CHUNK - 1) / ((int64_t)blockDim.x * TP_CHUNK));
    }
    /* body(k, column, values left) for the thread's chunks */
    template <typename Body> __device__ __forceinline__ void each(Body body) const
    {
        if constexpr (N == 0) {
            for (int k = 0; k < count(); k++) {
                if (column(k) < columns) body(0, column(k), columns - column(k));
            }
        } else {
#pragma unroll
            for (int k = 0; k < N; k++) {
                if (column(k) < columns) body(k, column(k), columns - column(k));
            }
        }
    }
};

/* A chunk as it lies in memory: in 16 bits half the registers of its values. */
template <typename T> struct packed {
    static constexpr int WORDS = TP_CHUNK * (int)sizeof(T) / 4;
    uint32_t words[WORDS];
    __device__ __forceinline__ void load(const norm_rows<T> &rows, int64_t row, int64_t column, int64_t count)
    {
        const T *p = rows.at(row, column);
        if (rows.tokens.aligned && count >= TP_CHUNK) {
#pragma unroll
            for (int i = 0; i < WORDS; i += 4) {
                const uint4 v = *reinterpret_cast<const uint4 *>(reinterpret_cast<const uint32_t *>(p) + i);
                words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
            }
            return;
        }
        float x[TP_CHUNK];
#pragma unroll
        for (int i = 0; i < TP_CHUNK; i++) x[i] = i < count ? tp_to_f32(p[i]) : 0.0f;
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            if constexpr (sizeof(T) == 2)
                words[i] = tp_pack<T>(x[2 * i], x[2 * i + 1]);
            else
                words[i] = __float_as_uint(x[i]);
        }
    }
    __device__ __forceinline__ void unpack(float (&x)[TP_CHUNK]) const
    {
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            if constexpr (sizeof(T) == 2)
                tp_unpack<T>(words[i], x[2 * i], x[2 * i + 1]);
            else
                x[i] = __uint_as_float(words[i]);
        }
    }
};

__device__ __forceinline__ int64_t first_row()
{
    return (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
}
__device__ __forceinline__ int64_t next_row(int64_t row)
{
    return row + (int64_t)gridDim.x * blockDim.y;
}

/* Threads that a multiprocessor holds at once, as far as their registers allow. The grid is no larger: blocks walk over rows.
 */
template <typename T, bool LAYER, int N>
constexpr int resident_threads = N == NARROW_HELD && sizeof(T) == 2 ? 1024
                                 : sizeof(T) == 2 && !LAYER         ? 768
                                                                    : 512;

/* y = w (x - mean) rstd + b; RMSNorm has no mean and no b, and rounds x rstd to 16 bits before the weight. A short row's
 * successor is under way while it is summed. */
template <typename T, bool LAYER, int N>
__global__ void __launch_bounds__(N == 0 ? LONG_THREADS : HELD_THREADS,
                                  N == 0 ? 1 : resident_threads<T, LAYER, N> / HELD_THREADS)
    norm_kernel(int64_t rows, int64_t columns, norm_rows<T> x, norm_rows<T> y, tp_typed_rows<const float> weight,
                tp_typed_rows<const float> bias, float *mean_out, float *rstd_out, float eps)
{
    constexpr bool LONG = N == 0;
    const row_chunks<N> chunks = {columns};
    packed<T> held[LONG ? 1 : N], next[LONG ? 1 : N];
    const auto begin = [&](int64_t row) {
        if (!LONG && row < rows) chunks.each([&](int k, int64_t c, int64_t n) { next[k].load(x, row, c, n); });
    };
    begin(first_row());
    for (int64_t row = first_row(); row < rows; row = next_row(row)) {
        float sum = 0, mean = 0;
        if constexpr (!LONG) {
#pragma unroll
            for (int k = 0; k < N; k++) held[k] = next[k];
            begin(next_row(row));
        }
        const auto values = [&](int k, int64_t c, int64_t n, float(&v)[TP_CHUNK]) {
            if (LONG) held[k].load(x, row, c, n);
            held[k].unpack(v);
        };
        if constexpr (LAYER) {
            chunks.each([&](int k, int64_t c, int64_t n) {
                float v[TP_CHUNK];
                values(k, c, n, v);
#pragma unroll
                for (int i = 0; i < TP_CHUNK; i++) sum += v[i];
            });
            mean = row_sum(sum) / (float)columns;
            sum = 0;
        }
        chunks.each([&](int k, int64_t c, int64_t n) {
            float v[TP_CHUNK];
            values(k, c, n, v);
#pragma unroll
            for (int i = 0; i < TP_CHUNK; i++) {
                const float d = i < n ? v[i] - mean : 0.0f;
                sum = fmaf(d, d, sum);
            }
        });
        const float rstd = 1.0f / sqrtf(row_sum(sum) / (float)columns + eps);
        if (threadIdx.x == 0) {
            if (LAYER && mean_out != nullptr) mean_out[row] = mean;
            if (rstd_out != nullptr) rstd_out[row] = rstd;
        }
        chunks.each([&](int k, int64_t c, int64_t n) {
            float v[TP_CHUNK], w[TP_CHUNK], b[TP_CHUNK] = {};
            weight.load(0, c, n, w);
            if (LAYER && bias.data != nullptr) bias.load(0, c, n, b);
            values(k, c, n, v);
#pragma unroll
            for (int i = 0; i < TP_CHUNK; i++) {
                float normal = (v[i] - mean) * rstd;
                if (!LAYER && sizeof(T) == 2) normal = tp_round<T>(normal);
                v[i] = w[i] * normal;
                if (LAYER) v[i] += b[i];
            }
            y.store(row, c, n, v);
        });
    }
}

/* With g = w dy and xh = (x - mean) rstd:  dx (+)= rstd (g - mean(g) - xh mean(g xh)); RMSNorm lacks mean(g). */
template <typename T, bool LAYER, bool LONG>
__global__ void __launch_bounds__(LONG ? LONG_THREADS : HELD_THREADS)
    norm_backward_kernel(int64_t rows, int64_t columns, norm_rows<T> x, norm_rows<T> dy, norm_rows<T> dx,
                         tp_typed_rows<const float> weight, const float *mean_in, const float *rstd_in, bool accumulate)
{
    constexpr int N = LONG ? 1 : HELD;
    const row_chunks<LONG ? 0 : HELD> chunks = {columns};
    for (int64_t row = first_row(); row < rows; row = next_row(row)) {
        const float mean = LAYER ? mean_in[row] : 0.0f, rstd = rstd_in[row];
        /* A short row's x, dy and the dx before are all under way before the first sum waits for them. */
        packed<T> held_x[N], held_dy[N], before[N];
        float sum = 0, product = 0;
        const auto load = [&](int k, int64_t c, int64_t n) {
            held_x[k].load(x, row, c, n);
            held_dy[k].load(dy, row, c, n);
        };
        /* xh and g = w dy, which is 0 beyond the row */
        const auto terms = [&](int k, int64_t c, int64_t n, float(&xh)[TP_CHUNK], float(&g)[TP_CHUNK]) {
            float w[TP_CHUNK];
            held_x[k].unpack(xh);
            held_dy[k].unpack(g);
            weight.load(0, c, n, w);
#pragma unroll
            for (int i = 0; i < TP_CHUNK; i++) {
                xh[i] = (xh[i] - mean) * rstd;
                g[i] *= w[i];
            }
        };
        if (!LONG) {
            chunks.each([&](int k, int64_t c, int64_t n) {
                load(k, c, n);
                if (accumulate) before[k].load(dx, row, c, n);
            });
        }
        chunks.each([&](int k, int64_t c, int64_t n) {
            float xh[TP_CHUNK], g[TP_CHUNK];
            if (LONG) load(k, c, n);
            terms(k, c, n, xh, g);
#pragma unroll
            for (int i = 0; i < TP_CHUNK; i++) {
                sum += g[i];
                product = fmaf(g[i], xh[i], product);
            }
        });
        const float level = LAYER ? row_sum(sum) / (float)columns : 0.0f;
        const float along = row_sum(product) / (float)columns;
        chunks.each([&](int k, int64_t c, int64_t n) {
            float xh[TP_CHUNK], g[TP_CHUNK], old[TP_CHUNK] = {};
            if (LONG) {
                load(k, c, n);
                if (accumulate) before[k].load(dx, row, c, n);
            }
            terms(k, c, n, xh, g);
            if (accumulate) before[k].unpack(old);
#pragma unroll
            for (int i = 0; i < TP_CHUNK; i++) g[i] = fmaf(rstd, g[i] - level - xh[i] * along, old[i]);
            dx.store(row, c, n, g);
        });
    }
}

/* dy xh, whose sum down a column is the gradient of the weight; or dy alone, the bias's. */
template <typename T, bool LAYER, bool BIAS> struct weight_term {
    norm_rows<T> x, dy;
    const float *mean, *rstd;
    __device__ void operator()(int64_t row, int64_t column, int64_t count, float (&out)[TP_CHUNK]) const
    {
        dy.load(row, column, count, out);
        if constexpr (!BIAS) {
            const float m = LAYER ? mean[row] : 0.0f, r = rstd[row];
            float v[TP_CHUNK];
            x.load(row, column, count, v);
#pragma unroll
            for (int i = 0; i < TP_CHUNK; i++) out[i] *= (v[i] - m) * r;
        }
    }
};

tp_typed_rows<const float> vector_of(const float *x)
{
    return {x, 0, tp_pointer_aligned(x)};
}

struct norm_arrays {
    int64_t n, dim;
    tp_rows x, y;
    const float *weight, *bias;
    float *mean, *rstd;
    float eps;
    int64_t heads;
};

template <typename T, bool LAYER, int N> tp_status launch_norm(tp_ctx *ctx, const char *name, const norm_arrays &a)
{
    const dim3 block = norm_block(a.dim);
    const int64_t at_once = N == 0 ? 16 : resident_threads<T, LAYER, N> / (int)(block.x * block.y);
    const int64_t most = (at_once > 0 ? at_once : 1) * tp_cuda_of(ctx)->multiprocessors;
    TP_CUDA_LAUNCH(ctx, name, (norm_kernel<T, LAYER, N>), (unsigned)tp_cuda_min(tp_cuda_ceil(a.n, block.y), most), block, 0,
                   a.n, a.dim, norm_rows_of<T>(a.x, a.heads, a.dim), norm_rows_of<T>(a.y, a.heads, a.dim), vector_of(a.weight),
                   vector_of(a.bias), a.mean, a.rstd, a.eps);
    return TP_OK;
}

template <typename T, bool LAYER> tp_status norm(tp_ctx *ctx, const char *name, const norm_arrays &a)
{
    if (a.n <= 0 || a.dim <= 0) return TP_OK;
    if (a.dim > HELD_COLUMNS) return launch_norm<T, LAYER, 0>(ctx, name, a);
    if (a.dim <= NARROW_HELD * 32 * TP_CHUNK) return launch_norm<T, LAYER, NARROW_HELD>(ctx, name, a);
    return launch_norm<T, LAYER, HELD>(ctx, name, a);
}

template <typename T, bool LAYER>
tp_status norm_backward(tp_ctx *ctx, const char *name, const tp_layernorm_backward_args *a, int64_t heads)
{
    const dim3 block = norm_block(a->dim);
    const norm_rows<T> x = norm_rows_of<T>(a->x, heads, a->dim), dy = norm_rows_of<T>(a->dy, heads, a->dim);
    if (a->n <= 0 || a->dim <= 0) return TP_OK;
    if (a->dweight != nullptr) {
        const weight_term<T, LAYER, false> term = {x, dy, a->mean, a->rstd};
        TP_TRY(tp_sum_columns(ctx, name, a->n, a->dim, term, a->dweight, true));
    }
    if (LAYER && a->dbias != nullptr) {
        const weight_term<T, LAYER, true> term = {x, dy, a->mean, a->rstd};
        TP_TRY(tp_sum_columns(ctx, name, a->n, a->dim, term, a->dbias, true));
    }
    TP_CUDA_BOOL(a->dim > HELD_COLUMNS, LONG, {
        TP_CUDA_LAUNCH(ctx, name, (norm_backward_kernel<T, LAYER, LONG>), tp_cuda_blocks(ctx, a->n, block.y), block, 0, a->n,
                       a->dim, x, dy, norm_rows_of<T>(a->dx, heads, a->dim), vector_of(a->weight), a->mean, a->rstd,
                       a->accumulate);
    });
    return TP_OK;
}

} // namespace

extern "C" tp_status tp_cuda_rmsnorm(tp_ctx *ctx, const void *args)
{
    const tp_rmsnorm_args *a = static_cast<const tp_rmsnorm_args *>(args);
    TP_TRY(tp_check_same_dtype(ctx, "rmsnorm", a->x.dtype, a->y.dtype));
    const norm_arrays same = {a->n, a->dim, a->x, a->y, a->weight, nullptr, nullptr, a->rstd, a->eps, a->heads};
    TP_CUDA_DTYPE(a->x.dtype, T, { TP_TRY((norm<T, false>(ctx, "rmsnorm", same))); });
    return TP_OK;
}

extern "C" tp_status tp_cuda_layernorm(tp_ctx *ctx, const void *args)
{
    const tp_layernorm_args *a = static_cast<const tp_layernorm_args *>(args);
    TP_TRY(tp_check_same_dtype(ctx, "layernorm", a->x.dtype, a->y.dtype));
    const norm_arrays same = {a->n, a->dim, a->x, a->y, a->weight, a->bias, a->mean, a->rstd, a->eps, 1};
    TP_CUDA_DTYPE(a->x.dtype, T, { TP_TRY((norm<T, true>(ctx, "layernorm", same))); });
    return TP_OK;
}

extern "C" tp_status tp_cuda_rmsnorm_backward(tp_ctx *ctx, const void *args)
{
    const tp_rmsnorm_backward_args *a = static_cast<const tp_rmsnorm_backward_args *>(args);
    TP_TRY(tp_check_same_dtype(ctx, "rmsnorm_backward", a->x.dtype, a->dy.dtype));
    TP_TRY(tp_check_same_dtype(ctx, "rmsnorm_backward", a->x.dtype, a->dx.dtype));
    const tp_layernorm_backward_args same = {a->n,    a->dim,  a->x,       a->dy,   a->dx,        a->weight,
                                             nullptr, a->rstd, a->dweight, nullptr, a->accumulate};
    TP_CUDA_DTYPE(a->x.dtype, T, { TP_TRY((norm_backward<T, false>(ctx, "rmsnorm_backward", &same, a->heads))); });
    return TP_OK;
}

extern "C" tp_status tp_cuda_layernorm_backward(tp_ctx *ctx, const void *args)
{
    const tp_layernorm_backward_args *a = static_cast<const tp_layernorm_backward_args *>(args);
    TP_TRY(tp_check_same_dtype(ctx, "layernorm_backward", a->x.dtype, a->dy.dtype));
    TP_TRY(tp_check_same_dtype(ctx, "layernorm_backward", a->x.dtype, a->dx.dtype));
    TP_CUDA_DTYPE(a->x.dtype, T, { TP_TRY((norm_backward<T, true>(ctx, "layernorm_backward", a, 1))); });
    return TP_OK;
}
