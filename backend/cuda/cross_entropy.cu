/* Cross entropy with its gradient, in place. A block takes a row: one pass finds the greatest value and the sum of
 * exponentials together, rescaling the sum when a greater value turns up; the second, only if the gradient is wanted, writes
 * it, from the row's end backwards: what was read last still lies in L2. So as few rows as possible are under way at once. */
#include "backend/cuda/cuda.cuh"

namespace
{

constexpr int THREADS = 1024;
constexpr int WIDE = 8; /* values of a thread at a time */

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
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
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
        x = lane < THREADS / 32 ? shared[lane] : exp_sum{-INFINITY, 0.0f};
    }
    return x;
}

__global__ void __launch_bounds__(THREADS)
    cross_entropy_kernel(int64_t rows, int64_t vocab, float *logits, int64_t ld, bool aligned, const int32_t *labels,
                         float *loss, float grad_scale, bool want_grad)
{
    __shared__ exp_sum shared[32];
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        float *x = logits + row * ld, v[WIDE];
        const int64_t label = labels[row];
        const float correct = x[label];
        exp_sum own = {-INFINITY, 0.0f};
        for (int64_t c = threadIdx.x * WIDE; c < vocab; c += THREADS * WIDE) {
            tp_load_some<WIDE>(x + c, vocab - c, aligned, v);
            float greatest = own.greatest, sum = 0;
#pragma unroll
            for (int i = 0; i < WIDE; i++) greatest = i < vocab - c ? fmaxf(greatest, v[i]) : greatest;
            const float shift = shift_of(greatest);
#pragma unroll
            for (int i = 0; i < WIDE; i++) sum += i < vocab - c ? __expf(v[i] - shift) : 0.0f;
            own.sum = own.sum * __expf(own.greatest - shift) + sum;
            own.greatest = greatest;
        }
        const exp_sum all = block_merge(own, shared); /* a barrier: the label's logit is read before it is written */
        if (threadIdx.x == 0) loss[row] = (float)((double)all.greatest - (double)correct + log((double)all.sum));
        if (!want_grad) continue;
        const float factor = grad_scale / all.sum;
        const int64_t last = (vocab - 1) / (THREADS * WIDE) * (THREADS * WIDE) + threadIdx.x * WIDE;
        for (int64_t c = last < vocab ? last : last - THREADS * WIDE; c >= 0; c -= THREADS * WIDE) {
            tp_load_some<WIDE>(x + c, vocab - c, aligned, v);
#pragma unroll
            for (int i = 0; i < WIDE; i++) {
                v[i] = __expf(v[i] - all.greatest) * factor;
                if (c + i == label) v[i] -= grad_scale;
            }
            tp_store_some<WIDE>(x + c, vocab - c, aligned, v);
        }
    }
}

} // namespace

extern "C" tp_status tp_cuda_cross_entropy(tp_ctx *ctx, const void *args)
{
    const tp_cross_entropy_args *a = static_cast<const tp_cross_entropy_args *>(args);
    const bool aligned = tp_pointer_aligned(a->logits) && a->ld % 4 == 0;
    if (a->n <= 0 || a->vocab <= 0) return TP_OK;
    TP_CUDA_LAUNCH(ctx, "cross_entropy", cross_entropy_kernel, (unsigned)tp_cuda_min(a->n, tp_cuda_of(ctx)->multiprocessors),
                   THREADS, 0, a->n, a->vocab, a->logits, a->ld, aligned, a->labels, a->loss, a->grad_scale, a->want_grad);
    return TP_OK;
}
