/* Adapters in the kernel of layers.cu. Each block makes its share of u = scaling * down x, by warps of their own beside those
 * that multiply the weights, and sends it to all blocks of its cluster; there it is as further columns of x, and `up` as
 * further columns of the weights (token.cuh). Of o and down a cluster has the columns of its own channels: what it makes is its
 * part of u, and `up` times that part goes into the sum over clusters as all else does. */
#ifndef TP_BACKEND_CUDA_ADAPTER_CUH
#define TP_BACKEND_CUDA_ADAPTER_CUH

#include "backend/cuda/token.cuh"

namespace tp_token
{

/* ---- to the order that the kernel reads: sizes::down_at, sizes::up_at ---- */

/* An adapter of a linear, as it lies. */
struct factors {
    const unsigned char *down, *up; /* [rank, in], [out, rank], bf16 or f32 */
    int64_t down_ld, up_ld;
    int rank;
    bool down_bf16, up_bf16;
};

__device__ __forceinline__ __nv_bfloat16 value_of(const unsigned char *data, bool bf16, int64_t i)
{
    return bf16 ? reinterpret_cast<const __nv_bfloat16 *>(data)[i]
                : __float2bfloat16_rn(reinterpret_cast<const float *>(data)[i]);
}

/* [rows, columns] of `from` to [to_rows, to_columns]: what is missing is 0. */
__device__ __forceinline__ void pack(const unsigned char *from, bool bf16, int64_t ld, int rows, int columns, __nv_bfloat16 *to,
                                     int to_rows, int to_columns)
{
    for (int i = threadIdx.x; i < to_rows * to_columns; i += (int)blockDim.x) {
        const int row = i / to_columns, column = i % to_columns;
        to[i] = row < rows && column < columns ? value_of(from, bf16, row * ld + column) : __float2bfloat16_rn(0.0f);
    }
}

/* A block for each linear of each layer. */
template <class M> __global__ void pack_kernel(const factors *all, __nv_bfloat16 *to)
{
    const int linear = (int)blockIdx.x % TP_LAYERS_LINEARS;
    const factors &from = all[blockIdx.x];
    to += (int64_t)(blockIdx.x / TP_LAYERS_LINEARS) * M::up_at(TP_LAYERS_LINEARS);
    pack(from.down, from.down_bf16, from.down_ld, from.rank, M::in(linear), to + M::down_at(linear), M::RANK, M::in(linear));
    pack(from.up, from.up_bf16, from.up_ld, M::out(linear), from.rank, to + M::up_at(linear), M::out(linear), M::RANK);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/* ---- a thread of such a warp ---- */

template <class M> struct adapter {
    const thread<M> &t;
    const params &p;
    small &s;
    int warp, lane; /* warp: of those that do this */

    /* Lines of `down` of a product that a warp has. */
    template <int P> static constexpr int lines = linears_of(P) * M::RANK / (MEMBERS * M::ADAPTERS);

    template <int P> __device__ __forceinline__ int first() const { return (t.member * M::ADAPTERS + warp) * lines<P>; }

    template <int P> __device__ __forceinline__ void hold(const layer &l, held<M::of(P).chunks> &h) const
    {
        static_assert(lines<P> >= 1 && lines<P> <= ROWS, "a tile for a warp");
        constexpr int linear = first_linear(P), columns = P == O ? M::GROUP * M::DIM : P == DOWN ? M::FEED : 0;
        const __nv_bfloat16 *from = l.adapters + M::down_at(linear) +
                                    (first<P>() + min(lane / 4, lines<P> - 1)) * M::in(linear) + t.cluster * columns +
                                    lane % 4 * PIECE;
#pragma unroll
        for (int i = 0; i < M::of(P).chunks; i++) h.w[i] = tp_exchange::read(from + i * 32);
    }
    /* Line i of what the warp has made, in all lanes. */
    static __device__ __forceinline__ float line(float v, int i)
    {
        return __shfl_sync(0xffffffffu, v, i * 4);
    }

    /* To all blocks of the cluster: a lane has a block and, half of the warp each, every second piece of the lines. */
    template <int P> __device__ __forceinline__ void send(float v) const
    {
        constexpr int piece = lines<P> % 4 == 0 ? 4 : lines<P> % 2 == 0 ? 2 : 1;
        const int to = lane % MEMBERS;
        const float *at = room<float>(M::LOW) + first_linear(P) * M::RANK + first<P>();
        const uint32_t barrier = tp_exchange::there(&s.low[P], to);
#pragma unroll
        for (int i0 = 0; i0 < lines<P>; i0 += 2 * piece) {
            const int i = i0 + lane / MEMBERS * piece;
            float values[4];
#pragma unroll
            for (int j = 0; j < piece; j++) values[j] = line(v, i + j);
            if (i >= lines<P>) continue;
            const uint32_t there = tp_exchange::there(at + i, to);
            if constexpr (piece == 4) tp_exchange::send(there, values, barrier);
            if constexpr (piece == 2)
                tp_exchange::send(there, make_uint2(__float_as_uint(values[0]), __float_as_uint(values[1])), barrier);
            if constexpr (piece == 1) tp_exchange::send(there, values[0], barrier);
        }
    }
    template <int P> __device__ __forceinline__ void make(const layer &l, int x, const held<M::of(P).chunks> &h) const
    {
        float c[6][4] = {};
        multiply_chunks(c, x + lane % 4 * 16 + (lane >> 2 & 1) * 8, h);
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 6; i++) sum += c[i][0] + c[i][3];
        if (P == QKV || P == GATE_UP) sum *= thread<M>::rstd(p, lane);
        const int line = first<P>() + min(lane / 4, lines<P> - 1);
        send<P>(tp_round_bf16(sum * l.scaling[first_linear(P) + line / M::RANK]));
    }
    /* Where no warp does just that: part of a layer far ahead comes nearer, a little at a time, for u is waited for. */
    template <int P> __device__ __forceinline__ void prefetch(int l) const
    {
        if (M::PREFETCHERS > 0 || l >= p.n_layers) return;
        const layer &of = room<layer>(M::TABLE)[l];
        if (P == O && warp == 0) t.template prefetch<GATE_UP>(of);
        if (P == O && warp == 1) t.template prefetch<DOWN>(of);
        if (P == GATE_UP && warp == 0) t.template prefetch<QKV>(of), t.template prefetch<O>(of);
        if (P == GATE_UP && warp == 1) t.prefetch_later(l);
    }
    template <int P> __device__ __forceinline__ void step(int l) const
    {
        const layer &now = room<layer>(M::TABLE)[l];
        const bool adapted = t.template adapted<P>();
        held<M::of(P).chunks> h;
        prefetch<P>(l + PREFETCH + 1);
        if (adapted) hold<P>(now, h);
        if (!adapted) return;
        if (P != DOWN)
            asm volatile("bar.sync 2, %0;" ::"n"(THREADS + M::ADAPTERS * 32) : "memory");
        else
            tp_exchange::wait(&s.active, l & 1);
        make<P>(now, P == O ? M::MIXED : P == DOWN ? M::ACTIVE : M::NORMED, h);
    }
    __device__ __forceinline__ void run() const
    {
        for (int l = 1; l <= PREFETCH; l++) prefetch<O>(l), prefetch<GATE_UP>(l);
#pragma unroll 1
        for (int l = 0; l < p.n_layers; l++) step<QKV>(l), step<O>(l), step<GATE_UP>(l), step<DOWN>(l);
    }
};

#endif

} // namespace tp_token

#endif
