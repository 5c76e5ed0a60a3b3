/* Cross entropy with its gradient, in place.
 *
 * A cluster of blocks takes a row and holds it in registers: logits are read once, every warp sends its greatest value and sum
 * of exponentials to all blocks, which merge them in order, and the gradient, the same exponentials rescaled, is written once.
 * Each block's share of the next row comes through shared memory meanwhile, and another block of the multiprocessor computes
 * while this one waits.
 * Rows that are too long for that, and GPUs without clusters, read the row twice: one pass finds the greatest value and the sum
 * together, rescaling the sum when a greater value turns up; the second writes the gradient, from the row's end backwards where
 * it is as wide as the logits: what was read last still lies in L2. A narrow gradient goes forward, behind what has been read.
 */
#include "backend/cuda/cluster.cuh"
#include "backend/cuda/exchange.cuh"
#include "backend/cuda/hopper.cuh"

namespace
{

constexpr int THREADS = 1024;
constexpr int WIDE = 8;  /* values of a thread at a time */
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

/* A row without a label has a gradient of zeros. */
__device__ __forceinline__ float scale_of(const entropy_params &p, int64_t row)
{
    if (p.labels[row] < 0) return 0.0f;
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

/* ---- rows in registers ---- */

constexpr float LOG2E = 1.44269504f;

/* A thread's chunks of a block's columns are N apart, one for each thread. */
template <int N> __device__ __forceinline__ int held_column(int k)
{
    return (k * N + (int)threadIdx.x) * CHUNK;
}

/* The block's share of a row on its way to shared memory, where hardware copies it. */
struct share {
    uint32_t there, full;
    int bytes;
    __device__ __forceinline__ void open()
    {
#if TP_HOPPER
        tp_hopper::barrier_open(full, 1);
        tp_hopper::see_copies();
#endif
    }
    __device__ __forceinline__ void begin(const float *from) const
    {
#if TP_HOPPER
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full), "r"(bytes) : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(there),
                     "l"(from), "r"(bytes), "r"(full)
                     : "memory");
#else
        (void)from;
#endif
    }
    __device__ __forceinline__ void wait(int parity) const
    {
#if TP_HOPPER
        tp_hopper::barrier_wait(full, parity);
#else
        (void)parity;
#endif
    }
};

__device__ __forceinline__ float exp2_of(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* v becomes exp(v - shift), whose sum is returned; the shift is the thread's greatest value. */
template <int HELD> __device__ __forceinline__ exp_sum exponentials(float (&v)[HELD][CHUNK])
{
    exp_sum own = {-INFINITY, 0.0f};
#pragma unroll
    for (int k = 0; k < HELD; k++)
#pragma unroll
        for (int i = 0; i < CHUNK; i++) own.greatest = fmaxf(own.greatest, v[k][i]);
    const float shift = shift_of(own.greatest);
#pragma unroll
    for (int k = 0; k < HELD; k++) {
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            v[k][i] = exp2_of((v[k][i] - shift) * LOG2E); /* 1 for the greatest, to the last bit */
            own.sum += v[k][i];
        }
    }
    return own;
}

/* The same result in every lane. */
__device__ __forceinline__ exp_sum merge_lanes(exp_sum x)
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        const exp_sum y = {__shfl_xor_sync(0xffffffffu, x.greatest, offset), __shfl_xor_sync(0xffffffffu, x.sum, offset)};
        x = lane & offset ? merge(y, x) : merge(x, y); /* the lower lane's first: both compute the same bits */
    }
    return {__shfl_sync(0xffffffffu, x.greatest, 0), __shfl_sync(0xffffffffu, x.sum, 0)};
}

/* What warps send each other: by the parity of the row, for others may be a row ahead, but not two. */
template <int WARPS> struct mailbox {
    uint2 sums[2][CLUSTER_MAX * WARPS];
    uint64_t came[2];
};

/* The blocks of a cluster meet. A block that is alone is no cluster: it must not use what only clusters can. */
__device__ __forceinline__ void meet(int members)
{
    __syncthreads();
    if (members > 1) tp_cluster::meet();
}

template <int WARPS> __device__ __forceinline__ void open_mailbox(mailbox<WARPS> &box)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    for (int i = 0; i < 2; i++) tp_exchange::open(&box.came[i], 1);
    tp_exchange::opened();
#else
    (void)box;
#endif
}

/* Lane m's copy of the warp's sum goes to block m of the cluster; returns when the sums of all its warps are here. */
template <int WARPS>
__device__ __forceinline__ void exchange(mailbox<WARPS> &box, uint2 own, int member, int members, int64_t step)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const int lane = threadIdx.x % 32, parity = (int)(step & 1);
    if (threadIdx.x == 0) tp_exchange::expect(&box.came[parity], members * WARPS * (int)sizeof(uint2));
    if (lane < members)
        tp_exchange::send(tp_exchange::there(&box.sums[parity][member * WARPS + threadIdx.x / 32], lane), own,
                          tp_exchange::there(&box.came[parity], lane));
    tp_exchange::wait(&box.came[parity], (uint32_t)(step >> 1 & 1));
#else
    (void)box, (void)own, (void)member, (void)members, (void)step;
#endif
}

/* The same result in all blocks. All of the row has been read when it is there. */
template <int WARPS>
__device__ __forceinline__ exp_sum merge_cluster(mailbox<WARPS> &box, exp_sum own, int member, int members, int64_t step)
{
    const int lane = threadIdx.x % 32;
    const uint2 bits = make_uint2(__float_as_uint(own.greatest), __float_as_uint(own.sum));
    const uint2 *const sums = box.sums[step & 1];
    if (members > 1) {
        exchange(box, bits, member, members, step);
    } else {
        if (lane == 0) box.sums[step & 1][threadIdx.x / 32] = bits;
        __syncthreads();
    }
    exp_sum all = {-INFINITY, 0.0f};
    for (int i = lane; i < members * WARPS; i += 32) all = merge(all, {__uint_as_float(sums[i].x), __uint_as_float(sums[i].y)});
    return merge_lanes(all);
}

/* A cluster takes row after row, a block of N threads `width` columns of each. AHEAD: the row's next share is under way while
 * this one is merged and written. Gradient is the type of the gradients. */
template <int N, int HELD, bool AHEAD, typename Gradient>
__global__ void __launch_bounds__(N, N <= 512 ? 2 : 1) held_entropy_kernel(entropy_params p)
{
    extern __shared__ __align__(16) float ahead[];
    __shared__ __align__(16) mailbox<N / 32> box;
    __shared__ __align__(8) uint64_t full;
    const int member = (int)(blockIdx.x % p.members);
    const int64_t first = member * p.width;
    const int count = (int)(first + p.width < p.vocab ? p.width : p.vocab - first); /* of this block's columns; may be < 0 */
    const int64_t group = blockIdx.x / p.members, groups = gridDim.x / p.members;
    share next = {(uint32_t)__cvta_generic_to_shared(ahead), (uint32_t)__cvta_generic_to_shared(&full), count * 4};
    const bool copies = AHEAD && threadIdx.x == 0 && count > 0;
    if (threadIdx.x == 0) {
        if (AHEAD) next.open();
        if (p.members > 1) open_mailbox(box);
        if (copies && group < p.rows) next.begin(p.logits + group * p.ld + first);
    }
    meet(p.members);
    int64_t step = 0;
    for (int64_t row = group; row < p.rows; row += groups, step++) {
        float *const x = p.logits + row * p.ld + first, v[HELD][CHUNK], correct = 0;
        const int label = p.labels[row] < 0 ? -1 : (int)(p.labels[row] - first); /* may lie in another block's share */
        const bool own_label = label >= 0 && label < count && label / CHUNK % N == (int)threadIdx.x;
        const float *const from = AHEAD ? ahead : x;
        if (AHEAD && count > 0) next.wait((int)(step & 1));
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            const int c = held_column<N>(k);
            if (p.aligned && c + CHUNK <= count) {
                tp_load<CHUNK>(from + c, v[k]);
            } else {
#pragma unroll
                for (int i = 0; i < CHUNK; i++) v[k][i] = c + i < count ? from[c + i] : -INFINITY;
            }
        }
        if (own_label) correct = from[label];
        if constexpr (AHEAD) {
            __syncthreads(); /* all of the share has been read */
            if (copies && row + groups < p.rows) next.begin(x + groups * p.ld);
        }
        const exp_sum own = exponentials<HELD>(v);
        const exp_sum all = merge_cluster(box, merge_lanes(own), member, p.members, step);
        if (own_label) store_loss(p, row, all, correct);
        if (member == 0 && threadIdx.x == 0 && p.labels[row] < 0) p.loss[row] = 0.0f;
        if (!p.want_grad) continue;
        const float scale = scale_of(p, row), factor = scale / all.sum;
        const float own_factor = __expf(shift_of(own.greatest) - all.greatest) * factor;
        Gradient *const to = reinterpret_cast<Gradient *>(p.logits + row * p.ld) + first;
#pragma unroll
        for (int k = 0; k < HELD; k++) {
#pragma unroll
            for (int i = 0; i < CHUNK; i++) v[k][i] *= own_factor;
            tp_store_some<CHUNK>(to + held_column<N>(k), count - held_column<N>(k), p.aligned, v[k]);
        }
        if (own_label) to[label] = tp_from_f32<Gradient>(fmaf(__expf(correct - all.greatest), factor, -scale));
    }
    meet(p.members); /* nobody sends to a block that has gone */
}

/* A block takes row after row. As few rows as possible are under way at once, so that their second reading finds them in L2. */
template <typename Gradient> __global__ void __launch_bounds__(THREADS) cross_entropy_kernel(entropy_params p)
{
    constexpr bool NARROW = sizeof(Gradient) == 2;
    __shared__ exp_sum shared[32];
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
        float *x = p.logits + row * p.ld, v[WIDE];
        const int64_t label = p.labels[row];
        const float correct = label < 0 ? 0.0f : x[label];
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
        if (threadIdx.x == 0) {
            if (label < 0)
                p.loss[row] = 0.0f;
            else
                store_loss(p, row, all, correct);
        }
        if (!p.want_grad) continue;
        const float scale = scale_of(p, row), factor = scale / all.sum;
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

template <int N, int HELD, bool AHEAD, typename Gradient> tp_status launch_held(tp_ctx *ctx, entropy_params p)
{
    const auto kernel = held_entropy_kernel<N, HELD, AHEAD, Gradient>;
    p.members = (int)tp_cuda_ceil(p.vocab, (int64_t)N * HELD * CHUNK);
    p.width = tp_cuda_ceil(tp_cuda_ceil(p.vocab, p.members), CHUNK) * CHUNK;
    const int shared = AHEAD ? (int)p.width * 4 : 0;
    int at_once = 0;
    TP_CUDA_ALLOW_SHARED(ctx, "cross_entropy", kernel, shared);
    TP_TRY(tp_cluster::most_at_once(ctx, kernel, N, shared, p.members, &at_once));
    return tp_cuda_check(ctx, "cross_entropy",
                         tp_cluster::launch(ctx, kernel, tp_cuda_min(p.rows, at_once) * p.members, N, shared, p.members, p));
}

/* Two blocks to a multiprocessor as long as they hold a row, else one. */
template <bool AHEAD, typename Gradient> tp_status launch_clusters(tp_ctx *ctx, const entropy_params &p)
{
    if (p.vocab <= CLUSTER_MAX * 512 * 8 * CHUNK) return launch_held<512, 8, AHEAD, Gradient>(ctx, p);
    return launch_held<1024, 8, AHEAD, Gradient>(ctx, p);
}

template <typename Gradient> tp_status launch(tp_ctx *ctx, const entropy_params &p)
{
    const bool ahead = tp_cuda_of(ctx)->tensor_maps != NULL && p.aligned && p.vocab % CHUNK == 0;
    if (tp_cuda_of(ctx)->clusters && p.vocab <= CLUSTER_MAX * 1024 * 8 * CHUNK)
        return ahead ? launch_clusters<true, Gradient>(ctx, p) : launch_clusters<false, Gradient>(ctx, p);
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
