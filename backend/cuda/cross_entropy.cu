/* Cross entropy with its gradient, in place.
 *
 * A cluster of blocks takes a row and holds it in registers: logits are read once, the blocks' greatest values and sums of
 * exponentials are merged in order, and the gradient is written once. Rows that are too long for that, and GPUs without
 * clusters, read the row twice: one pass finds the greatest value and the sum together, rescaling the sum when a greater value
 * turns up; the second writes the gradient, from the row's end backwards where it is as wide as the logits: what was read last
 * still lies in L2. A narrow gradient goes forward, behind what has been read. */
#include "backend/cuda/cluster.cuh"

namespace
{

constexpr int THREADS = 1024;
constexpr int WIDE = 8; /* values of a thread at a time */
constexpr int HELD_THREADS = 512;
constexpr int CHUNK = 4; /* values of a thread that follow each other in a row that is held */
constexpr int CLUSTER_MAX = 8;

/* A greatest value and the sum of exp(x - greatest). */
struct exp_sum {
    float greatest, sum;
};

/* -FLT_MAX stands for a greatest value of -infinity in differences, so that nothing becomes NaN that is not. */
__device__ __forceinline__ float shift_of(float greatest)
{
    return fmaxf(greatest, -3.4e38f);
}

__device__ __forceinline__ exp_sum merge(exp_sum a, exp_sum b)
{
    const float greatest = fmaxf(a.greatest, b.greatest), shift = shift_of(greatest);
    return {greatest, a.sum * __expf(a.greatest - shift) + b.sum * __expf(b.greatest - shift)};
}

__device__ __forceinline__ exp_sum block_merge(exp_sum x, exp_sum *shared)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
    for (int round = 0; round < 2; round++) {
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) {
            const exp_sum y = {__shfl_xor_sync(0xffffffffu, x.greatest, offset), __shfl_xor_sync(0xffffffffu, x.sum, offset)};
            /* the lower lane's first: both lanes compute the same bits */
            x = lane & offset ? merge(y, x) : merge(x, y);
        }
        if (round == 1) break;
        __syncthreads();
        if (lane == 0) shared[warp] = x;
        __syncthreads();
        x = lane < n_warps ? shared[lane] : exp_sum{-INFINITY, 0.0f};
    }
    return x;
}

struct entropy_params {
    int64_t rows, vocab, ld;
    float *logits;
    bool aligned;
    const int32_t *labels;
    float *loss;
    float grad_scale;
    const tp_step_state *state; /* NULL: grad_scale counts */
    bool want_grad;
    int members;   /* blocks of a cluster */
    int64_t width; /* columns of each, a multiple of CHUNK */
};

__device__ __forceinline__ float scale_of(const entropy_params &p)
{
    return p.state != nullptr ? p.state->grad_scale * p.state->loss_scale : p.grad_scale;
}

__device__ __forceinline__ void store_loss(const entropy_params &p, int64_t row, exp_sum all, float correct)
{
    p.loss[row] = (float)((double)all.greatest - (double)correct + log((double)all.sum));
}

/* Values -> gradients; `label` counts from the first. */
template <int N> __device__ __forceinline__ void turn(float (&v)[N], int label, float greatest, float factor, float scale)
{
#pragma unroll
    for (int i = 0; i < N; i++) {
        v[i] = __expf(v[i] - greatest) * factor;
        if (i == label) v[i] -= scale;
    }
}

/* Of `count` columns that begin at x, this thread's into registers; -infinity where there are none. */
template <int HELD> __device__ __forceinline__ void load_part(const float *x, int count, bool aligned, float (&v)[HELD][CHUNK])
{
    x += threadIdx.x * CHUNK, count -= (int)threadIdx.x * CHUNK;
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        const int c = k * HELD_THREADS * CHUNK;
        if (aligned && c + CHUNK <= count) {
            tp_load<CHUNK>(x + c, v[k]);
        } else {
#pragma unroll
            for (int i = 0; i < CHUNK; i++) v[k][i] = c + i < count ? x[c + i] : -INFINITY;
        }
    }
}

template <int HELD> __device__ __forceinline__ exp_sum sum_part(const float (&v)[HELD][CHUNK])
{
    exp_sum own = {-INFINITY, 0.0f};
#pragma unroll
    for (int k = 0; k < HELD; k++)
#pragma unroll
        for (int i = 0; i < CHUNK; i++) own.greatest = fmaxf(own.greatest, v[k][i]);
    const float shift = shift_of(own.greatest);
#pragma unroll
    for (int k = 0; k < HELD; k++)
#pragma unroll
        for (int i = 0; i < CHUNK; i++) own.sum += __expf(v[k][i] - shift);
    return own;
}

/* A cluster takes row after row, a block `width` columns of each. The next row is under way while this one is merged and
 * written, if registers suffice for both. Gradient is the type of the gradients. */
template <int HELD, typename Gradient> __global__ void __launch_bounds__(HELD_THREADS, 1) held_entropy_kernel(entropy_params p)
{
    constexpr bool AHEAD = HELD <= 8;
    __shared__ exp_sum shared[32];
    __shared__ __align__(8) float sums[2][2]; /* of this row and the one before, which others may still read */
    const int member = (int)(blockIdx.x % p.members);
    const int64_t first = member * p.width;
    const int count = (int)(first + p.width < p.vocab ? p.width : p.vocab - first); /* of this block's columns; may be < 0 */
    const int64_t group = blockIdx.x / p.members, groups = gridDim.x / p.members;
    float v[HELD][CHUNK], next[AHEAD ? HELD : 1][CHUNK];
    int parity = 0;
    if constexpr (AHEAD) load_part(p.logits + group * p.ld + first, count, p.aligned, next);
    for (int64_t row = group; row < p.rows; row += groups, parity ^= 1) {
        float *const x = p.logits + row * p.ld, correct = 0;
        const int64_t label = p.labels[row];
        if (member == 0 && threadIdx.x == 0) correct = x[label];
        if constexpr (AHEAD) {
#pragma unroll
            for (int k = 0; k < HELD; k++)
#pragma unroll
                for (int i = 0; i < CHUNK; i++) v[k][i] = next[k][i];
            if (row + groups < p.rows) load_part(x + groups * p.ld + first, count, p.aligned, next);
        } else {
            load_part(x + first, count, p.aligned, v);
        }
        exp_sum all = block_merge(sum_part(v), shared);
        if (p.members > 1) {
            if (threadIdx.x == 0) sums[parity][0] = all.greatest, sums[parity][1] = all.sum;
            tp_cluster::meet(); /* and all of the row has been read */
            all = {-INFINITY, 0.0f};
            for (int i = 0; i < p.members; i++) {
                const float2 part = tp_cluster::read_of(i, sums[parity]);
                all = merge(all, {part.x, part.y});
            }
        } else {
            __syncthreads();
        }
        if (member == 0 && threadIdx.x == 0) store_loss(p, row, all, correct);
        if (!p.want_grad) continue;
        const float scale = scale_of(p), factor = scale / all.sum;
        Gradient *const to = reinterpret_cast<Gradient *>(x) + first + threadIdx.x * CHUNK;
        const int own_label = (int)(label - first) - (int)threadIdx.x * CHUNK, left = count - (int)threadIdx.x * CHUNK;
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            const int c = k * HELD_THREADS * CHUNK;
            turn(v[k], own_label - c, all.greatest, factor, scale);
            tp_store_some<CHUNK>(to + c, left - c, p.aligned, v[k]);
        }
    }
    if (p.members > 1) tp_cluster::meet(); /* the others have read this block's sums */
}

/* A block takes row after row. As few rows as possible are under way at once, so that their second reading finds them in L2. */
template <typename Gradient> __global__ void __launch_bounds__(THREADS) cross_entropy_kernel(entropy_params p)
{
    constexpr bool NARROW = sizeof(Gradient) == 2;
    __shared__ exp_sum shared[32];
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
        float *x = p.logits + row * p.ld, v[WIDE];
        const int64_t label = p.labels[row];
        const float correct = x[label];
        exp_sum own = {-INFINITY, 0.0f};
        for (int64_t c = threadIdx.x * WIDE; c < p.vocab; c += THREADS * WIDE) {
            tp_load_some<WIDE>(x + c, p.vocab - c, p.aligned, v);
            float greatest = own.greatest, sum = 0;
#pragma unroll
            for (int i = 0; i < WIDE; i++) greatest = i < p.vocab - c ? fmaxf(greatest, v[i]) : greatest;
            const float shift = shift_of(greatest);
#pragma unroll
            for (int i = 0; i < WIDE; i++) sum += i < p.vocab - c ? __expf(v[i] - shift) : 0.0f;
            own.sum = own.sum * __expf(own.greatest - shift) + sum;
            own.greatest = greatest;
        }
        const exp_sum all = block_merge(own, shared); /* a barrier: the label's logit is read before it is written */
        if (threadIdx.x == 0) store_loss(p, row, all, correct);
        if (!p.want_grad) continue;
        const float scale = scale_of(p), factor = scale / all.sum;
        const int64_t steps = (p.vocab + THREADS * WIDE - 1) / (THREADS * WIDE);
        for (int64_t step = 0; step < steps; step++) {
            const int64_t c = ((NARROW ? step : steps - 1 - step) * THREADS + threadIdx.x) * WIDE;
            if (c < p.vocab) tp_load_some<WIDE>(x + c, p.vocab - c, p.aligned, v);
            if (NARROW) __syncthreads(); /* what lies where these gradients go has been read by all */
            if (c >= p.vocab) continue;
            turn(v, (int)(label - c), all.greatest, factor, scale);
            tp_store_some<WIDE>(reinterpret_cast<Gradient *>(x) + c, p.vocab - c, p.aligned, v);
        }
    }
}

template <int HELD, typename Gradient> tp_status launch_held(tp_ctx *ctx, entropy_params p)
{
    constexpr int64_t MOST = HELD * HELD_THREADS * CHUNK;
    p.members = (int)tp_cuda_ceil(p.vocab, MOST);
    p.width = tp_cuda_ceil(tp_cuda_ceil(p.vocab, p.members), CHUNK) * CHUNK;
    int at_once = tp_cuda_of(ctx)->multiprocessors;
    if (p.members > 1)
        TP_TRY(tp_cluster::most_at_once(ctx, held_entropy_kernel<HELD, Gradient>, HELD_THREADS, p.members, &at_once));
    return tp_cuda_check(ctx, "cross_entropy",
                         tp_cluster::launch(ctx, held_entropy_kernel<HELD, Gradient>, tp_cuda_min(p.rows, at_once) * p.members,
                                            HELD_THREADS, 0, p.members, p));
}

template <typename Gradient> tp_status launch(tp_ctx *ctx, const entropy_params &p)
{
    constexpr int64_t ROOM = (int64_t)CLUSTER_MAX * HELD_THREADS * CHUNK; /* of a cluster that holds one chunk per thread */
    const bool clusters = tp_cuda_of(ctx)->clusters;
    if (clusters && p.vocab <= 8 * ROOM) return launch_held<8, Gradient>(ctx, p);
    if (clusters && p.vocab <= 16 * ROOM) return launch_held<16, Gradient>(ctx, p);
    TP_CUDA_LAUNCH(ctx, "cross_entropy", cross_entropy_kernel<Gradient>,
                   (unsigned)tp_cuda_min(p.rows, tp_cuda_of(ctx)->multiprocessors), THREADS, 0, p);
    return TP_OK;
}

__global__ void add_loss_kernel(tp_add_loss_args a)
{
    const float loss = __fmul_rn(*a.loss, a.state->grad_scale);
    *a.loss = loss;
    a.state->loss_sum += (double)loss;
}

} // namespace

extern "C" tp_status tp_cuda_cross_entropy(tp_ctx *ctx, const void *args)
{
    const tp_cross_entropy_args *a = static_cast<const tp_cross_entropy_args *>(args);
    if (a->n <= 0 || a->vocab <= 0) return TP_OK;
    entropy_params p = {};
    p.rows = a->n, p.vocab = a->vocab, p.ld = a->ld, p.logits = a->logits;
    p.aligned = tp_pointer_aligned(a->logits) && a->ld % 4 == 0;
    p.labels = a->labels, p.loss = a->loss;
    p.grad_scale = a->grad_scale, p.state = a->state, p.want_grad = a->want_grad;
    if (!a->narrow) return launch<float>(ctx, p);
    return a->narrow_type == TP_F16 ? launch<__half>(ctx, p) : launch<__nv_bfloat16>(ctx, p);
}

extern "C" tp_status tp_cuda_add_loss(tp_ctx *ctx, const void *args)
{
    TP_CUDA_LAUNCH(ctx, "add_loss", add_loss_kernel, 1, 1, 0, *static_cast<const tp_add_loss_args *>(args));
    return TP_OK;
}
