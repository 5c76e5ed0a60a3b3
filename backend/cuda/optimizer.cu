/* Gradient norm, AdamW and SGD over flat buffers of parameters. Each update reads and writes every array once. What changes
 * from step to step is read from the state in device memory, so that a captured step can be replayed.
 *
 * Products are rounded before they are added, as in the CPU kernels: the updates give the same bits. */
#include "backend/cuda/cuda.cuh"

namespace
{

constexpr int NORM_BLOCK = 4096;
constexpr int WIDE = 4;

/* sums[b] = the sum of squares of `per` blocks of 4096 values, block by block. */
__global__ void __launch_bounds__(256)
    square_sums_kernel(int64_t n, int64_t blocks, int64_t per, const float *g, bool aligned, double *sums)
{
    __shared__ double shared[32];
    const int64_t first = (int64_t)blockIdx.x * per, end = first + per < blocks ? first + per : blocks;
    double total = 0;
    for (int64_t block = first; block < end; block++) {
        double sum = 0;
#pragma unroll
        for (int i = 0; i < NORM_BLOCK; i += 256 * WIDE) {
            const int64_t at = block * NORM_BLOCK + i + (int64_t)threadIdx.x * WIDE;
            float v[WIDE];
            tp_load_some<WIDE>(g + at, n - at, aligned, v);
#pragma unroll
            for (int k = 0; k < WIDE; k++) sum += (double)v[k] * (double)v[k];
        }
        total += tp_block_sum(sum, shared);
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

/* Adds the sums: each thread a run of them in order, then the threads by a fixed tree. */
__global__ void __launch_bounds__(1024) norm_kernel(int64_t n, const double *sums, tp_step_state *state)
{
    __shared__ double shared[32];
    const int64_t run = (n + 1023) / 1024, first = threadIdx.x * run, end = first + run < n ? first + run : n;
    double total = 0;
    for (int64_t i = first; i < end; i++) total += sums[i];
    total = tp_block_sum(total, shared);
    if (threadIdx.x != 0) return;
    const double norm = sqrt(total) / (double)state->loss_scale;
    const double clip = state->max_norm > 0 ? (double)state->max_norm / (norm + 1e-6) : 1.0;
    state->norm = norm;
    const bool spike = state->loss_sum - state->loss_mean > state->loss_spread;
    state->finite = isfinite(norm) && isfinite(state->loss_sum) && !spike;
    state->clip = (clip < 1.0 ? (float)clip : 1.0f) / state->loss_scale;
}

struct adamw_factors {
    float decay, clip, toward, keep, fresh, root, epsilon, step;
};

/* In the order of PyTorch's loop over single tensors: decay, lerp of m, v, then w += (-step m) / denominator. */
__global__ void __launch_bounds__(256) adamw_kernel(tp_adamw_args a, bool aligned)
{
    __shared__ adamw_factors shared;
    if (!a.state->finite) return;
    if (threadIdx.x == 0) {
        const double lr = a.state->learning_rate;
        shared.decay = (float)(1.0 - lr * (double)a.weight_decay);
        shared.clip = a.state->clip;
        shared.toward = (float)(1.0 - (double)a.beta1);
        shared.keep = a.beta2;
        shared.fresh = (float)(1.0 - (double)a.beta2);
        shared.root = (float)sqrt((double)a.state->bias2);
        shared.epsilon = a.epsilon;
        shared.step = (float)(-lr / (double)a.state->bias1);
    }
    __syncthreads();
    const adamw_factors f = shared;
    const int64_t stride = (int64_t)gridDim.x * blockDim.x * WIDE;
    for (int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * WIDE; at < a.n; at += stride) {
        float w[WIDE], m[WIDE], v[WIDE], g[WIDE];
        tp_load_some<WIDE>(a.w + at, a.n - at, aligned, w);
        tp_load_some<WIDE>(a.m + at, a.n - at, aligned, m);
        tp_load_some<WIDE>(a.v + at, a.n - at, aligned, v);
        tp_load_some<WIDE>(a.g + at, a.n - at, aligned, g);
#pragma unroll
        for (int i = 0; i < WIDE; i++) {
            const float x = __fmul_rn(g[i], f.clip);
            m[i] = __fadd_rn(m[i], __fmul_rn(f.toward, __fsub_rn(x, m[i])));
            v[i] = __fadd_rn(__fmul_rn(v[i], f.keep), __fmul_rn(__fmul_rn(f.fresh, x), x));
            const float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(v[i]), f.root), f.epsilon);
            w[i] = __fadd_rn(__fmul_rn(w[i], f.decay), __fdiv_rn(__fmul_rn(f.step, m[i]), denominator));
        }
        tp_store_some<WIDE>(a.m + at, a.n - at, aligned, m);
        tp_store_some<WIDE>(a.v + at, a.n - at, aligned, v);
        tp_store_some<WIDE>(a.w + at, a.n - at, aligned, w);
    }
}

__global__ void __launch_bounds__(256) sgd_kernel(tp_sgd_args a, bool aligned)
{
    if (!a.state->finite) return;
    const float clip = a.state->clip, step = -a.state->learning_rate;
    const int64_t stride = (int64_t)gridDim.x * blockDim.x * WIDE;
    for (int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * WIDE; at < a.n; at += stride) {
        float w[WIDE], m[WIDE] = {}, g[WIDE];
        tp_load_some<WIDE>(a.w + at, a.n - at, aligned, w);
        tp_load_some<WIDE>(a.g + at, a.n - at, aligned, g);
        if (a.momentum != 0.0f) tp_load_some<WIDE>(a.m + at, a.n - at, aligned, m);
#pragma unroll
        for (int i = 0; i < WIDE; i++) {
            float x = __fadd_rn(__fmul_rn(g[i], clip), __fmul_rn(a.weight_decay, w[i]));
            if (a.momentum != 0.0f) x = __fadd_rn(__fmul_rn(m[i], a.momentum), x);
            m[i] = x;
            w[i] = __fadd_rn(w[i], __fmul_rn(step, x));
        }
        if (a.momentum != 0.0f) tp_store_some<WIDE>(a.m + at, a.n - at, aligned, m);
        tp_store_some<WIDE>(a.w + at, a.n - at, aligned, w);
    }
}

} // namespace

extern "C" tp_status tp_cuda_grad_norm(tp_ctx *ctx, const void *args)
{
    const tp_grad_norm_args *a = static_cast<const tp_grad_norm_args *>(args);
    double *sums = reinterpret_cast<double *>(tp_cuda_of(ctx)->workspace);
    const int64_t blocks = tp_cuda_ceil(a->n, NORM_BLOCK), room = (int64_t)1 << 20; /* sums */
    const int64_t per = blocks > room ? tp_cuda_ceil(blocks, room) : 1, n_sums = tp_cuda_ceil(blocks, per);
    TP_CUDA_LAUNCH(ctx, "grad_norm", square_sums_kernel, (unsigned)n_sums, 256, 0, a->n, blocks, per, a->g,
                   tp_pointer_aligned(a->g), sums);
    TP_CUDA_LAUNCH(ctx, "grad_norm", norm_kernel, 1, 1024, 0, n_sums, sums, a->state);
    return TP_OK;
}

extern "C" tp_status tp_cuda_adamw(tp_ctx *ctx, const void *args)
{
    const tp_adamw_args *a = static_cast<const tp_adamw_args *>(args);
    const bool aligned =
        tp_pointer_aligned(a->w) && tp_pointer_aligned(a->m) && tp_pointer_aligned(a->v) && tp_pointer_aligned(a->g);
    TP_CUDA_LAUNCH(ctx, "adamw", adamw_kernel, tp_cuda_blocks(ctx, a->n, 256 * WIDE), 256, 0, *a, aligned);
    return TP_OK;
}

extern "C" tp_status tp_cuda_sgd(tp_ctx *ctx, const void *args)
{
    const tp_sgd_args *a = static_cast<const tp_sgd_args *>(args);
    const bool aligned =
        tp_pointer_aligned(a->w) && tp_pointer_aligned(a->g) && (a->momentum == 0.0f || tp_pointer_aligned(a->m));
    TP_CUDA_LAUNCH(ctx, "sgd", sgd_kernel, tp_cuda_blocks(ctx, a->n, 256 * WIDE), 256, 0, *a, aligned);
    return TP_OK;
}
