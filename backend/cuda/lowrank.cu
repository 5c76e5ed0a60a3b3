/* Low-rank factors into the margin of a stacked weight, and what comes back to them. */
#include "backend/cuda/stream.cuh"
#include "backend/lowrank.h"

namespace
{

constexpr int THREADS = 256;
constexpr int WIDE = 4; /* columns of a thread */

/* aligned: groups of WIDE columns belong to one part and may be read and written at once. */
template <typename T> __global__ void __launch_bounds__(THREADS) pack_kernel(tp_pack_lowrank_args p, bool aligned)
{
    const int64_t b_groups = (p.used + WIDE - 1) / WIDE, a_groups = (p.in + WIDE - 1) / WIDE;
    int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    float x[WIDE] = {};
    int i = 0;
    if (at < p.out * b_groups) { /* behind a row of the weight */
        const int64_t row = at / b_groups, c = at % b_groups * WIDE;
        int64_t in_part = row, column = 0;
        while (i < TP_PACKED_PARTS - 1 && in_part >= p.rows[i]) in_part -= p.rows[i], column += p.rank[i++];
        const float *from = p.b[i] + in_part * p.rank[i];
        if (aligned && c >= column && c < column + p.rank[i]) tp_load<WIDE>(from + c - column, x);
#pragma unroll
        for (int k = 0; k < WIDE; k++) {
            if (!aligned && c + k >= column && c + k < column + p.rank[i]) x[k] = from[c + k - column];
            x[k] *= p.scaling[i];
        }
        tp_store_some<WIDE>(static_cast<T *>(p.w.data) + row * p.w.ld + p.in + c, p.used - c, aligned, x);
        return;
    }
    at -= p.out * b_groups;
    if (at >= p.used * a_groups) return;
    const int64_t row = at / a_groups, c = at % a_groups * WIDE;
    int64_t in_part = row;
    while (i < TP_PACKED_PARTS - 1 && in_part >= p.rank[i]) in_part -= p.rank[i++];
    tp_load_some<WIDE>(p.a[i] + in_part * p.in + c, p.in - c, aligned, x);
    tp_store_some<WIDE>(static_cast<T *>(p.w.data) + (p.out + row) * p.w.ld + c, p.in - c, aligned, x);
}

bool aligned(const tp_pack_lowrank_args *p)
{
    bool yes = tp_rows_aligned(p->w) && p->in % WIDE == 0;
    for (int i = 0; i < TP_PACKED_PARTS; i++)
        yes = yes && p->rank[i] % WIDE == 0 && tp_pointer_aligned(p->a[i]) && tp_pointer_aligned(p->b[i]);
    return yes;
}

} // namespace

extern "C" tp_status tp_cuda_pack_lowrank(tp_ctx *ctx, const void *arguments)
{
    const tp_pack_lowrank_args *args = static_cast<const tp_pack_lowrank_args *>(arguments);
    TP_TRY(tp_cuda_check_dtype(ctx, "pack_lowrank", args->w.dtype));
    const int64_t groups = args->out * tp_cuda_ceil(args->used, WIDE) + args->used * tp_cuda_ceil(args->in, WIDE);
    TP_CUDA_DTYPE(args->w.dtype, T, {
        TP_CUDA_LAUNCH(ctx, "pack_lowrank", pack_kernel<T>, (unsigned)tp_cuda_ceil(groups, THREADS), THREADS, 0, *args,
                       aligned(args));
    });
    return TP_OK;
}

extern "C" tp_status tp_cuda_lowrank_backward(tp_ctx *ctx, const void *arguments)
{
    const tp_lowrank_backward_args *args = static_cast<const tp_lowrank_backward_args *>(arguments);
    if (tp_cuda_stream_up_takes(ctx, args)) return tp_cuda_stream_up(ctx, args);
    for (int i = 0; i < TP_PACKED_PARTS; i++) {
        if (args->rank[i] <= 0) continue;
        const tp_matmul_args du = tp_lowrank_du(args, i);
        TP_TRY(tp_cuda_matmul(ctx, &du));
        if (args->db[i] == NULL) continue;
        const tp_matmul_tn_args db = tp_lowrank_db(args, i);
        TP_TRY(tp_cuda_matmul_tn(ctx, &db));
    }
    return TP_OK;
}
