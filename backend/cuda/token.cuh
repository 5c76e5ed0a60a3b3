/* What a thread of the kernel of layers.cu does: its block's part of the products, and what goes from block to block. */
#ifndef TP_BACKEND_CUDA_TOKEN_CUH
#define TP_BACKEND_CUDA_TOKEN_CUH

#include "backend/cuda/exchange.cuh"
#include "backend/cuda/layers.cuh"

namespace tp_token
{

constexpr int MEMBERS = 16;
constexpr int WARPS = 8, THREADS = WARPS * 32; /* that compute */
constexpr int ALL_WARPS = 12;             /* more would leave them too few registers: the others fetch, prefetch and adapt */
constexpr int ROWS = 8;                   /* of a warp in a product, at most */
constexpr int PREFETCH = 3;               /* layers ahead that weights come to the cache of the GPU */
constexpr int LATER_LAYERS = 8;           /* last layers, beside which comes what is read after them */
constexpr int64_t LATER_BYTES = 28 << 20; /* of it, at most: half of the cache */
constexpr int PIECE = 8;                  /* channels of a lane */
constexpr int TILE = 8;                   /* keys of a warp */
constexpr int SHARED_MOST = 227 << 10;

enum product { QKV, O, GATE_UP, DOWN, PRODUCTS };

/* A block's part of a product: `rows` of it, up to `of_warp` of them for a warp, of `chunks` times 32 columns. They lie from
 * `at` on in shared memory, each warp's in the order that its lanes read them. */
struct shape {
    int rows, of_warp, chunks, at, end;
};

__host__ __device__ constexpr shape shape_of(int rows, int columns, int unit, int at)
{
    const int of_warp = ((rows + WARPS - 1) / WARPS + unit - 1) / unit * unit;
    return {rows, of_warp, columns / 32, at, at + (rows + of_warp - 1) / of_warp * of_warp * columns * 2};
}

template <int HIDDEN, int GROUP, int DIM, int FEED> struct shapes {
    static __host__ __device__ constexpr shape of(int product)
    {
        shape s = shape_of((GROUP + 2) * DIM / MEMBERS, HIDDEN, 4, 0);
        if (product > QKV) s = shape_of(HIDDEN / MEMBERS, GROUP * DIM, 2, s.end);
        if (product > O) s = shape_of(2 * FEED / MEMBERS, HIDDEN, ROWS, s.end);
        if (product > GATE_UP) s = shape_of(HIDDEN / MEMBERS, FEED, 2, s.end);
        return s;
    }
};

/* What follows from the sizes of a model. They are known when this is compiled: a layer's code runs once a layer, and of code
 * for any sizes there would be so much more that fetching it would take longer than running it. */
template <int HIDDEN_, int GROUP_, int DIM_, int FEED_, int CLUSTERS_, int RANK_>
struct sizes : shapes<HIDDEN_, GROUP_, DIM_, FEED_> {
    using shapes<HIDDEN_, GROUP_, DIM_, FEED_>::of;
    static constexpr int HIDDEN = HIDDEN_, CLUSTERS = CLUSTERS_;
    static constexpr int RANK = RANK_;                /* of adapters, at most; 0: there are none */
    static constexpr int ADAPTERS = (RANK + 31) / 32; /* warps for adapters: the last ones */
    static constexpr int PREFETCHERS = ADAPTERS < 2;  /* in front of them; none: the first of them prefetches */
    static constexpr int FETCHERS = ALL_WARPS - WARPS - PREFETCHERS - ADAPTERS;
    static constexpr int GROUP = GROUP_, DIM = DIM_,
                         FEED = FEED_; /* query heads, channels of a head, of feed-forward: of a cluster */
    static constexpr int PAIRS = (HIDDEN / 2 + THREADS - 1) / THREADS; /* of channels of x that a thread has */
    static constexpr int ROUND = 2 * WARPS * TILE;                     /* keys that a block looks at, at once */
    static constexpr int VALUE_BYTES = DIM * 2 + 16;    /* from a value to the next: eight lines lie in different banks */
    static constexpr int SCORES_LD = ROUND + 2 * PIECE; /* from a head's scores to the next: so do those of heads */
    static constexpr int RECORD = DIM + 4, RECORDS = GROUP * RECORD; /* of attention over a stretch: a head, all of a cluster */
    /* Where things lie in shared memory. */
    static constexpr int NORMED = of(DOWN).end;
    static constexpr int FRESH = NORMED + HIDDEN * 2;
    static constexpr int VALUES = FRESH + (GROUP + 2) * DIM * 2;
    static constexpr int SCORES = VALUES + ROUND * VALUE_BYTES;
    static constexpr int STRETCHES = SCORES + GROUP * SCORES_LD * 4;
    static constexpr int SQUARES = STRETCHES + MEMBERS * RECORDS * 4;
    static constexpr int MIXED = SQUARES + THREADS * 4;
    static constexpr int ACTIVE = MIXED + GROUP * DIM * 2;
    static constexpr int SOURCES = ACTIVE + FEED * 2;
    static constexpr int UPS = SOURCES + PRODUCTS * WARPS * ROWS * 8;
    static constexpr int LOW = UPS + (RANK > 0 ? PRODUCTS * WARPS * ROWS * 4 : 0);
    static constexpr int TABLE = LOW + TP_LAYERS_LINEARS * RANK * 4;
    static_assert(HIDDEN % 32 == 0 && FEED % (8 * MEMBERS) == 0 && DIM == 8 * WARPS, "whole chunks");
    static_assert(GROUP <= 8 && GROUP * DIM / MEMBERS % 2 == 0, "heads are rows of a tile");
    static_assert(HIDDEN % (2 * MEMBERS) == 0, "a share for each block");
    static_assert(of(QKV).of_warp <= ROWS && of(O).of_warp <= ROWS && of(GATE_UP).of_warp <= ROWS,
                  "a tile of a product for a warp");

    /* A layer's adapters: bf16, `down` [RANK, in] of all linears, then `up` [out, RANK]. Lines beyond an adapter's rank are 0.
     */
    static __host__ __device__ constexpr int in(int linear)
    {
        return linear == TP_LAYERS_O ? CLUSTERS * GROUP * DIM : linear == TP_LAYERS_DOWN ? CLUSTERS * FEED : HIDDEN;
    }
    static __host__ __device__ constexpr int out(int linear)
    {
        return linear == TP_LAYERS_Q                                ? CLUSTERS * GROUP * DIM
               : linear == TP_LAYERS_K || linear == TP_LAYERS_V     ? CLUSTERS * DIM
               : linear == TP_LAYERS_GATE || linear == TP_LAYERS_UP ? CLUSTERS * FEED
                                                                    : HIDDEN;
    }
    static __host__ __device__ constexpr int down_at(int linear)
    {
        return linear == 0 ? 0 : down_at(linear - 1) + RANK * in(linear - 1);
    }
    static __host__ __device__ constexpr int up_at(int linear)
    {
        return linear == 0 ? down_at(TP_LAYERS_LINEARS) : up_at(linear - 1) + RANK * out(linear - 1);
    }
};

/* The first linear of a product, and how many there are. */
__host__ __device__ constexpr int first_linear(int product)
{
    return product == QKV ? TP_LAYERS_Q : product == O ? TP_LAYERS_O : product == GATE_UP ? TP_LAYERS_GATE : TP_LAYERS_DOWN;
}
__host__ __device__ constexpr int linears_of(int product)
{
    return product == QKV ? 3 : product == GATE_UP ? 2 : 1;
}

struct layer {
    const unsigned char *w[TP_LAYERS_LINEARS];
    const __nv_bfloat16 *adapters;
    float scaling[TP_LAYERS_LINEARS + 1];
    const float *norm1, *norm2;
    __nv_bfloat16 *cache_k, *cache_v;
};

struct params {
    const layer *layers;
    int n_layers, cache_ld;
    uint32_t row_bytes[TP_LAYERS_LINEARS];
    int rope_pairs[TP_LAYERS_LINEARS];
    const unsigned char *embedding; /* rows of `hidden` bf16 values, embedding_bytes apart */
    uint32_t embedding_bytes;
    const int32_t *id, *used;
    __nv_bfloat16 *x;
    float eps, scale, factor;
    const float *inv_freq;
    const unsigned char *later; /* what is read after the layers */
    int64_t later_bytes;
    uint64_t *mail;   /* [2, clusters, hidden / 2] */
    uint32_t *tags;   /* used up so far */
    uint32_t adapted; /* products, a bit each, of which some layer has adapters */
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

extern __shared__ __align__(128) unsigned char memory[];

template <typename T> __device__ __forceinline__ T *room(int at)
{
    return reinterpret_cast<T *>(memory + at);
}

__device__ __forceinline__ void meet()
{
    asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

/* What is not of the model's sizes. */
struct small {
    uint64_t fresh, stretches, active;        /* barriers: of what the cluster sends */
    uint64_t full[PRODUCTS], empty[PRODUCTS]; /* of the weights of a product */
    uint64_t low[PRODUCTS];                   /* of what adapters make of x */
    int progress;                             /* the layer that the block is at */
};

/* ---- tensor cores ---- */

/* c += a b, [16, 16] [16, 8]. A lane's 16 bytes of a row of w are both a's rows g (words 0, 2) and g + 8 (words 1, 3), b's
 * columns 0 and 1 what these meet: the sum over the 32 columns of a chunk is c[g][0] + c[g + 8][1], in lane 4 g. */
__device__ __forceinline__ void multiply(float (&c)[4], uint4 w, uint2 x)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "r"(x.x), "r"(x.y));
}

/* Channels 2 i and 2 i + 1 of what products read: of four pairs, the second and the third change places. */
__device__ __forceinline__ void put_pair(uint32_t *x, int i, uint32_t pair)
{
    x[(i & ~3) | (i & 1) << 1 | (i >> 1 & 1)] = pair;
}

/* A row of a product: of which matrix, and where it lies there, in bytes from its start. */
struct source {
    uint32_t which, offset;
};

struct place {
    int which, row, column;
};

/* What a lane has of its row of `up`. Rows of gate and up are of one product: its x is u of gate, then u of up, and of either
 * row the other half is 0. */
template <class M, int P> struct ups {
    static constexpr int WIDTH = P == GATE_UP ? 2 * M::RANK : M::RANK;
    static constexpr int CHUNKS = (WIDTH + 31) / 32;
    static constexpr int HELD = M::RANK >= 32 ? M::RANK / 32 : 1;
    uint4 w[HELD];
};

/* A warp's rows of a product, a lane's part, before x is there. */
template <int CHUNKS> struct held {
    uint4 w[CHUNKS];
};

/* c += h x, each chain of products one of c's. x: where in shared memory, a lane's part. */
template <int CHAINS, int CHUNKS>
__device__ __forceinline__ void multiply_chunks(float (&c)[CHAINS][4], int x, const held<CHUNKS> &h)
{
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) multiply(c[i % CHAINS], h.w[i], *reinterpret_cast<const uint2 *>(memory + x + i * 64));
}

/* A thread of the kernel for a model M. */
template <class M> struct thread {
    const params &p;
    small &s;
    int cluster, member, warp, lane;

    /* ---- weights ---- */

    /* Row r of the block's part. Of q, k and v a warp has pairs that are rotated together. Of gate and up it has four channels,
     * each twice: those that make 8 neighbouring bytes of what products read (put_pair). */
    template <int P> __device__ __forceinline__ place place_of(int r) const
    {
        constexpr shape S = M::of(P);
        constexpr int heads = M::GROUP * M::DIM;
        if (P == QKV) {
            const int pair = member * (S.rows / 2) + r / 2, half = M::DIM / 2,
                      row = pair / half * M::DIM + pair % half + r % 2 * half;
            if (row < heads) return {TP_LAYERS_Q, row + cluster * heads, 0};
            if (row < heads + M::DIM) return {TP_LAYERS_K, row + cluster * M::DIM - heads, 0};
            return {TP_LAYERS_V, row + cluster * M::DIM - heads - M::DIM, 0};
        }
        if (P == GATE_UP)
            return {r & 4 ? TP_LAYERS_UP : TP_LAYERS_GATE,
                    cluster * M::FEED + member * (S.rows / 2) + r / 16 * 8 + (r >> 3 & 1) * 2 + (r & 1) + (r & 2) * 2, 0};
        return {P == O ? TP_LAYERS_O : TP_LAYERS_DOWN, r + member * S.rows, cluster * (P == O ? heads : M::FEED)};
    }
    __device__ __forceinline__ source source_of(place at) const
    {
        const int pairs = p.rope_pairs[at.which], in = pairs > 0 ? at.row % pairs : 0;
        int row = at.row;
        if (pairs > 0) row += 2 * (in % (pairs / 2)) + in / (pairs / 2) - in; /* tp_matrix_stored_row */
        return {(uint32_t)at.which, (uint32_t)row * p.row_bytes[at.which] + 2 * at.column};
    }

    template <int P> __device__ __forceinline__ source *sources() const { return room<source>(M::SOURCES) + P * WARPS * ROWS; }

    template <int P> __device__ __forceinline__ uint32_t *rows_of_up() const
    {
        return room<uint32_t>(M::UPS) + P * WARPS * ROWS;
    }

    template <int P> __device__ __forceinline__ void find_sources() const
    {
#pragma unroll 1
        for (int r = threadIdx.x; r < M::of(P).rows; r += THREADS) {
            const place at = place_of<P>(r);
            sources<P>()[r] = source_of(at);
            if (M::RANK > 0) rows_of_up<P>()[r] = (uint32_t)(M::up_at(at.which) + at.row * M::RANK);
        }
    }
    /* By a warp that fetches: rows in turn, 16 bytes a lane, to where lanes that compute read them. */
    template <int P> __device__ __forceinline__ void fetch(int l) const
    {
        constexpr shape S = M::of(P);
        if (l > 0) tp_exchange::wait(&s.empty[P], (l - 1) & 1);
        const layer &from = room<layer>(M::TABLE)[min(l, p.n_layers - 1)];
#pragma unroll 2
        for (int r = warp - WARPS; r < S.rows; r += M::FETCHERS) {
            const source at = sources<P>()[r];
            const unsigned char *w = from.w[at.which] + at.offset + lane * 16;
            unsigned char *to = memory + S.at + r / S.of_warp * (S.of_warp * S.chunks * 64) + r % S.of_warp * 64 +
                                lane / 4 * (S.of_warp * 64) + lane % 4 * 16;
#pragma unroll
            for (int i = 0; i < S.chunks * 4; i += 32)
                if (i + lane < S.chunks * 4) tp_exchange::fetch(to + i / 4 * S.of_warp * 64, w + i * 16);
        }
        tp_exchange::arrive_after_fetches(&s.full[P]);
    }
    __device__ __forceinline__ void fetch_all() const
    {
#pragma unroll 1
        for (int l = 0;; l++) {
            fetch<QKV>(l); /* that of the layer behind the last is held, and not used */
            if (l == p.n_layers) return;
            fetch<O>(l), fetch<GATE_UP>(l), fetch<DOWN>(l);
        }
    }
    /* Whether there is a row lane / 4 of this warp. */
    template <int P> __device__ __forceinline__ bool has() const
    {
        constexpr shape S = M::of(P);
        return lane / 4 < S.of_warp && warp * S.of_warp + lane / 4 < S.rows;
    }
    /* Of layer l: 16 bytes of each chunk of that row. */
    template <int P> __device__ __forceinline__ void hold(int l, held<M::of(P).chunks> &h) const
    {
        constexpr shape S = M::of(P);
        const unsigned char *at = memory + S.at + warp * (S.of_warp * S.chunks * 64) + (has<P>() ? lane * 16 : 0);
        tp_exchange::wait(&s.full[P], l & 1);
#pragma unroll
        for (int i = 0; i < S.chunks; i++) h.w[i] = *reinterpret_cast<const uint4 *>(at + i * S.of_warp * 64);
        __syncwarp();
        if (lane == 0) tp_exchange::arrive(&s.empty[P]);
    }
    /* In lane 4 g: row g of the warp times x. */
    template <int P>
    __device__ __forceinline__ float multiply_row(int x, const held<M::of(P).chunks> &h, const ups<M, P> &up,
                                                  uint32_t parity) const
    {
        float c[3][4] = {};
        multiply_chunks(c, x + lane % 4 * 16 + (lane >> 2 & 1) * 8, h);
        float sum = ((c[0][0] + c[0][3]) + (c[1][0] + c[1][3])) + (c[2][0] + c[2][3]);
        if (P == QKV || P == GATE_UP) sum *= rstd(p, lane);
        if (adapted<P>()) sum += multiply_up<P>(up, parity);
        return sum;
    }

    /* ---- adapters: u = scaling * down x comes from the warps of adapter.cuh, and is as more columns of x ---- */

    template <int P> __device__ __forceinline__ bool adapted() const
    {
        return M::RANK > 0 && (p.adapted >> P & 1) != 0;
    }

    template <int P> __device__ __forceinline__ void hold_up(const layer &l, ups<M, P> &up) const
    {
        if (!adapted<P>()) return;
        const int column = lane % 4 * PIECE - (P == GATE_UP && M::RANK < 32 && lane >= 16 ? M::RANK : 0);
        const __nv_bfloat16 *from = l.adapters + rows_of_up<P>()[has<P>() ? warp * M::of(P).of_warp + lane / 4 : 0] + column;
#pragma unroll
        for (int i = 0; i < ups<M, P>::HELD; i++) {
            up.w[i] = make_uint4(0, 0, 0, 0);
            if (M::RANK >= 32 || (column >= 0 && column < M::RANK)) up.w[i] = tp_exchange::read(from + i * 32);
        }
    }
    template <int P> __device__ __forceinline__ float multiply_up(const ups<M, P> &up, uint32_t parity) const
    {
        float c[4] = {};
        const int first =
            P == QKV ? (int)sources<QKV>()[min(warp * M::of(P).of_warp, M::of(P).rows - 1)].which : first_linear(P);
        const int column = lane % 4 * PIECE + (lane >> 2 & 1) * 2;
        const float *u = room<float>(M::LOW) + first * M::RANK + column;
        tp_exchange::wait(&s.low[P], parity);
#pragma unroll
        for (int i = 0; i < ups<M, P>::CHUNKS; i++) {
            uint2 x = make_uint2(0, 0);
            if (ups<M, P>::WIDTH % 32 == 0 || column < ups<M, P>::WIDTH) {
                const float2 a = *reinterpret_cast<const float2 *>(u + i * 32),
                             b = *reinterpret_cast<const float2 *>(u + i * 32 + 4);
                x = make_uint2(tp_pack_bf16(a.x, a.y), tp_pack_bf16(b.x, b.y));
            }
            const bool mine = P != GATE_UP || M::RANK < 32 || (lane >= 16) == (i >= ups<M, P>::HELD);
            multiply(c, mine ? up.w[i % ups<M, P>::HELD] : make_uint4(0, 0, 0, 0), x);
        }
        return c[0] + c[3];
    }
    template <int P> __device__ __forceinline__ void expect_low() const
    {
        if (adapted<P>()) tp_exchange::expect(&s.low[P], linears_of(P) * M::RANK * 4);
    }
    /* To the adapters' warps: what products read is there. */
    template <int P> __device__ __forceinline__ void say_ready() const
    {
        if (adapted<P>()) asm volatile("bar.arrive 2, %0;" ::"n"(THREADS + M::ADAPTERS * 32) : "memory");
    }

    /* The warp that prefetches: a lane has a row. */
    template <int P> __device__ __forceinline__ void prefetch(const layer &l) const
    {
        constexpr shape S = M::of(P);
#pragma unroll 1
        for (int r = lane; r < S.rows; r += 32) {
            const source at = sources<P>()[r];
            const unsigned char *row = l.w[at.which] + at.offset;
            for (int c = 0; c < S.chunks; c += 2) asm volatile("prefetch.global.L2 [%0];" ::"l"(row + c * 64));
            if (adapted<P>()) asm volatile("prefetch.global.L2 [%0];" ::"l"(l.adapters + rows_of_up<P>()[r]));
        }
        if (!adapted<P>()) return;
        constexpr int lines = S.chunks / 2, rows = linears_of(P) * M::RANK / MEMBERS;
        const __nv_bfloat16 *down = l.adapters + M::down_at(first_linear(P)) + place_of<P>(0).column;
#pragma unroll 1
        for (int i = lane; i < rows * lines; i += 32)
            asm volatile(
                "prefetch.global.L2 [%0];" ::"l"(down + (member * rows + i / lines) * M::in(first_linear(P)) + i % lines * 64));
    }
    /* The block's share of what comes beside layer l. */
    __device__ __forceinline__ void prefetch_later(int l) const
    {
        const int i = l - (p.n_layers - LATER_LAYERS);
        if (i < 0) return;
        const int64_t lines = p.later_bytes / 128, blocks = M::CLUSTERS * MEMBERS, each = lines / (blocks * LATER_LAYERS);
        const unsigned char *from = p.later + (i * blocks + blockIdx.x) * each * 128;
        for (int64_t line = lane; line < each; line += 32) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + line * 128));
    }
    __device__ __forceinline__ void prefetch_all() const
    {
        for (int l = 1; l < p.n_layers; l++) {
            while (*(volatile int *)&s.progress + PREFETCH < l) __nanosleep(100);
            const layer &of = room<layer>(M::TABLE)[l];
            prefetch<QKV>(of), prefetch<O>(of), prefetch<GATE_UP>(of), prefetch<DOWN>(of);
            prefetch_later(l);
        }
    }

    /* ---- x, of which every block holds all: a thread has pairs of channels, THREADS pairs apart ---- */

    float2 x[M::PAIRS], norm[M::PAIRS];

    __device__ __forceinline__ bool has_pair(int i) const
    {
        return (i + 1) * THREADS <= M::HIDDEN / 2 || threadIdx.x + i * THREADS < M::HIDDEN / 2;
    }
    __device__ __forceinline__ void load_norm(const float *weights)
    {
#pragma unroll
        for (int i = 0; i < M::PAIRS; i++)
            if (has_pair(i)) norm[i] = __ldg(reinterpret_cast<const float2 *>(weights) + threadIdx.x + i * THREADS);
    }
    __device__ __forceinline__ void load_x()
    {
        const unsigned char *row = p.embedding + (int64_t)*p.id * p.embedding_bytes;
#pragma unroll
        for (int i = 0; i < M::PAIRS; i++) {
            x[i] = make_float2(0, 0);
            if (has_pair(i)) tp_unpack_bf16(reinterpret_cast<const uint32_t *>(row)[threadIdx.x + i * THREADS], x[i].x, x[i].y);
        }
    }
    __device__ __forceinline__ void store_x() const
    {
#pragma unroll
        for (int i = 0; i < M::PAIRS; i++)
            if (has_pair(i)) reinterpret_cast<uint32_t *>(p.x)[threadIdx.x + i * THREADS] = tp_pack_bf16(x[i].x, x[i].y);
    }
    /* x times the norm's weights as bf16, for products, and squares for rstd. */
    __device__ __forceinline__ void put_weighted() const
    {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < M::PAIRS; i++) {
            sum = fmaf(x[i].x, x[i].x, fmaf(x[i].y, x[i].y, sum));
            if (has_pair(i))
                put_pair(room<uint32_t>(M::NORMED), threadIdx.x + i * THREADS,
                         tp_pack_bf16(x[i].x * norm[i].x, x[i].y * norm[i].y));
        }
        room<float>(M::SQUARES)[threadIdx.x] = sum;
        meet();
    }
    /* What is still missing of the norm: a factor of what is made of it. */
    static __device__ __forceinline__ float rstd(const params &p, int lane)
    {
        float a[4], b[4];
        tp_load<4>(room<float>(M::SQUARES) + lane * 4, a);
        tp_load<4>(room<float>(M::SQUARES) + THREADS / 2 + lane * 4, b);
        const float sum = tp_warp_sum(((a[0] + a[1]) + (a[2] + a[3])) + ((b[0] + b[1]) + (b[2] + b[3])));
        return rsqrtf(fmaf(sum, 1.0f / M::HIDDEN, p.eps));
    }

    /* ---- to all blocks ---- */

    /* Sums of two rows of this cluster. */
    template <int P> __device__ __forceinline__ void post_sum(float sum, uint32_t tag) const
    {
        constexpr shape S = M::of(P);
        static_assert(S.of_warp % 2 == 0 && S.rows % 2 == 0, "pairs");
        const float second = __shfl_down_sync(0xffffffffu, sum, 4);
        if (lane % 8 != 0 || !has<P>()) return;
        const int row = member * S.rows + warp * S.of_warp + lane / 4;
        tp_exchange::post(p.mail + ((P == DOWN ? M::CLUSTERS : 0) + cluster) * (M::HIDDEN / 2) + row / 2, sum, second, tag);
    }
    /* x += the sums of all clusters. */
    template <int P> __device__ __forceinline__ void add_posted(uint32_t tag)
    {
        const uint64_t *mail = p.mail + (P == DOWN ? M::CLUSTERS * (M::HIDDEN / 2) : 0) + threadIdx.x;
        uint64_t words[M::PAIRS][M::CLUSTERS];
        for (bool all = false; !all;) {
            all = true;
#pragma unroll
            for (int i = 0; i < M::PAIRS; i++)
#pragma unroll
                for (int c = 0; c < M::CLUSTERS; c++)
                    if (has_pair(i)) words[i][c] = tp_exchange::peek(mail + c * (M::HIDDEN / 2) + i * THREADS);
#pragma unroll
            for (int i = 0; i < M::PAIRS; i++)
#pragma unroll
                for (int c = 0; c < M::CLUSTERS; c++)
                    if (has_pair(i)) all = all && tp_exchange::has_come(words[i][c], tag);
        }
#pragma unroll
        for (int i = 0; i < M::PAIRS; i++) {
            if (!has_pair(i)) continue;
            float2 sum = make_float2(0, 0);
#pragma unroll
            for (int c = 0; c < M::CLUSTERS; c++) {
                const float2 v = tp_exchange::values_of(words[i][c]);
                sum.x += v.x, sum.y += v.y;
            }
            x[i].x = tp_round_bf16(sum.x + x[i].x), x[i].y = tp_round_bf16(sum.y + x[i].y);
        }
    }

    /* ---- to the cluster ---- */

    static __device__ __forceinline__ float of_row(float v, int row)
    {
        return __shfl_sync(0xffffffffu, v, row * 4);
    }

    /* Of the two pairs of channels that a warp has: cosines and sines, of v 1 and 0. */
    float2 cosine, sine;

    __device__ __forceinline__ float2 turned(float2 a, float2 b) const
    {
        const float x = tp_round_bf16(__fmul_rn(a.x, cosine.x)), y = tp_round_bf16(__fmul_rn(a.y, cosine.y));
        return make_float2(x + tp_round_bf16(__fmul_rn(b.x, sine.x)), y + tp_round_bf16(__fmul_rn(b.y, sine.y)));
    }
    __device__ __forceinline__ void find_angles()
    {
        const place at = place_of<QKV>(min(warp * M::of(QKV).of_warp, M::of(QKV).rows - M::of(QKV).of_warp));
        const int c = at.row % M::DIM;
        cosine = make_float2(1, 1), sine = make_float2(0, 0);
        if (at.which == TP_LAYERS_V) return;
        const float a = (float)used * p.inv_freq[c], b = (float)used * p.inv_freq[c + 1];
        cosine = make_float2(tp_round_bf16(cosf(a) * p.factor), tp_round_bf16(cosf(b) * p.factor));
        sine = make_float2(tp_round_bf16(sinf(a) * p.factor), tp_round_bf16(sinf(b) * p.factor));
    }
    /* q, k and v, rotated, as bf16: a lane sends two neighbouring channels to a block; every product is rounded, as in
     * rope.cu. */
    __device__ __forceinline__ void send_fresh(float v) const
    {
        constexpr shape S = M::of(QKV);
        static_assert(S.of_warp == 4 && S.rows % 4 == 0 && M::DIM % 4 == 0, "two pairs for a warp");
        const int to = lane % MEMBERS, pair = (member * S.rows + warp * 4) / 2, half = M::DIM / 2;
        v = tp_round_bf16(v);
        const float2 low = make_float2(of_row(v, 0), of_row(v, 2)), high = make_float2(of_row(v, 1), of_row(v, 3));
        const float2 out = lane < MEMBERS ? turned(low, make_float2(-high.x, -high.y)) : turned(high, low);
        const int channel = pair / half * M::DIM + pair % half + lane / MEMBERS * half;
        if (warp * 4 < S.rows)
            tp_exchange::send(tp_exchange::there(room<__nv_bfloat16>(M::FRESH) + channel, to),
                              __uint_as_float(tp_pack_bf16(out.x, out.y)), tp_exchange::there(&s.fresh, to));
    }
    /* Four channels from a lane to a block. */
    __device__ __forceinline__ void send_active(float v) const
    {
        constexpr shape S = M::of(GATE_UP);
        const float gate = tp_round_bf16(v), up = tp_round_bf16(__shfl_down_sync(0xffffffffu, v, 16));
        const float active = __fdividef(gate, 1.0f + __expf(-gate)) * up;
        const uint2 four =
            make_uint2(tp_pack_bf16(of_row(active, 0), of_row(active, 1)), tp_pack_bf16(of_row(active, 2), of_row(active, 3)));
        if (warp * ROWS < S.rows && lane < MEMBERS)
            tp_exchange::send(tp_exchange::there(room<uint2>(M::ACTIVE) + member * (S.rows / 8) + warp, lane), four,
                              tp_exchange::there(&s.active, lane));
    }

    /* ---- attention ---- */

    /* This block's keys, `used` being the token's own; `parts` blocks have some. */
    int used, parts, begin, end;
    uint4 keys[2][2];         /* of a round: a lane has a key of each half, and of that 8 channels of each 32 */
    int64_t key_at, value_at; /* where in the cache its first key is, and the first of four values that a thread fetches */
    uint32_t there;           /* which of two keys and four values there are, a bit each */

    __device__ __forceinline__ void find_stretch()
    {
        constexpr int unit = M::ROUND / 2;
        used = *p.used;
        const int each = (used / (MEMBERS * unit) + 1) * unit;
        parts = used / each + 1, begin = member * each, end = min(used + 1, begin + each);
        find_round(begin);
    }
    __device__ __forceinline__ bool cached(int key) const
    {
        return key < end && key != used;
    }

    __device__ __forceinline__ void find_round(int first)
    {
        static_assert(M::ROUND == 2 * WARPS * TILE && M::ROUND * M::DIM == 4 * THREADS * PIECE, "two keys, four values");
        const int key = first + warp * TILE + lane / 4, value = first + (int)threadIdx.x / (M::DIM / PIECE);
        key_at = (int64_t)key * p.cache_ld + cluster * M::DIM + lane % 4 * PIECE;
        value_at = (int64_t)value * p.cache_ld + cluster * M::DIM + (int)threadIdx.x % (M::DIM / PIECE) * PIECE;
        there = 0;
        for (int i = 0; i < 2; i++) there |= (uint32_t)cached(key + i * (M::ROUND / 2)) << i;
        for (int i = 0; i < 4; i++) there |= (uint32_t)cached(value + i * (M::ROUND / 4)) << (2 + i);
    }
    /* Keys to registers, values to shared memory. */
    __device__ __forceinline__ void fetch_round(const layer &l)
    {
        const __nv_bfloat16 *k = l.cache_k + key_at, *v = l.cache_v + value_at;
        unsigned char *to = memory + M::VALUES + (int)threadIdx.x / (M::DIM / PIECE) * M::VALUE_BYTES +
                            (int)threadIdx.x % (M::DIM / PIECE) * 16;
        const int64_t step = (int64_t)p.cache_ld * (M::ROUND / 4);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if ((there >> i & 1) == 0) continue;
            keys[i][0] = *reinterpret_cast<const uint4 *>(k + i * 2 * step);
            keys[i][1] = *reinterpret_cast<const uint4 *>(k + i * 2 * step + 32);
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            if ((there >> (2 + i) & 1) != 0) tp_exchange::fetch(to + i * (M::ROUND / 4) * M::VALUE_BYTES, v + i * step);
    }
    /* Products of the heads with a half of the round's keys: in lane 4 g + t those of head g with keys 2 t and 2 t + 1 of the
     * warp's. */
    __device__ __forceinline__ void score(int first, int half)
    {
        const int key = first + (half * WARPS + warp) * TILE;
        const uint4 *fresh = room<uint4>(M::FRESH) + lane % 4; /* of a head, 8 pieces */
        const int head = min(lane / 4, M::GROUP - 1);
        float c[2][4] = {};
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const uint4 q = fresh[head * (M::DIM / PIECE) + j * 4];
            if (key + lane / 4 == used) keys[half][j] = fresh[M::GROUP * (M::DIM / PIECE) + j * 4];
            const uint4 k = keys[half][j];
            multiply(c[0], make_uint4(q.x, 0, q.y, 0), make_uint2(k.x, k.y));
            multiply(c[1], make_uint4(q.z, 0, q.w, 0), make_uint2(k.z, k.w));
        }
        const int mine = key + lane % 4 * 2;
        const float2 scores = make_float2(mine < end ? (c[0][0] + c[1][0]) * p.scale : -INFINITY,
                                          mine + 1 < end ? (c[0][1] + c[1][1]) * p.scale : -INFINITY);
        if (lane / 4 < M::GROUP)
            *reinterpret_cast<float2 *>(room<float>(M::SCORES) + head * M::SCORES_LD + mine - first) = scores;
    }
    static __device__ __forceinline__ float quad_max(float x)
    {
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
        return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
    }
    static __device__ __forceinline__ float quad_sum(float x)
    {
        x += __shfl_xor_sync(0xffffffffu, x, 1);
        return x + __shfl_xor_sync(0xffffffffu, x, 2);
    }
    /* Four 8 x 8 tiles of values, transposed: 32 keys, from `at` on, of the 8 channels that the warp has. */
    __device__ __forceinline__ uint4 load_values(int at) const
    {
        uint4 v;
        const uint32_t from = tp_exchange::address(memory + M::VALUES + (at + lane) * M::VALUE_BYTES + warp * 16);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(from)
                     : "memory");
        return v;
    }
    /* c += weights of 16 keys times their values. A lane has those of keys 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. As bf16 a weight
     * is rounded: what that leaves of it is in the other eight rows. */
    static __device__ __forceinline__ void add_values(float (&c)[4], float2 a, float2 b, uint2 v)
    {
        const uint32_t x = tp_pack_bf16(a.x, a.y), y = tp_pack_bf16(b.x, b.y);
        float2 p, q;
        tp_unpack_bf16(x, p.x, p.y), tp_unpack_bf16(y, q.x, q.y);
        multiply(c, make_uint4(x, tp_pack_bf16(a.x - p.x, a.y - p.y), y, tp_pack_bf16(b.x - q.x, b.y - q.y)), v);
    }
    /* Softmax over this block's keys, not divided yet, to all blocks of the cluster: of each head the greatest score,
     * the sum of the weights, and sums of values. A warp has 8 channels; lane 4 g + t two of them, of head g. */
    __device__ __forceinline__ void attend(const layer &l)
    {
        const float *scores = room<float>(M::SCORES) + min(lane / 4, M::GROUP - 1) * M::SCORES_LD + lane % 4 * 2;
        float most = -INFINITY, sum = 0.0f, out[4] = {};
#pragma unroll 1
        for (int first = begin; first < end; first += M::ROUND) {
            const int halves = end - first > M::ROUND / 2 ? 2 : 1;
            if (first > begin) {
                meet();
                find_round(first);
                fetch_round(l);
            }
            score(first, 0);
            if (halves > 1) score(first, 1);
            if (used - first < M::ROUND && warp == 0 && lane < M::DIM / PIECE && used < end)
                *reinterpret_cast<uint4 *>(memory + M::VALUES + (used - first) * M::VALUE_BYTES + lane * 16) =
                    room<uint4>(M::FRESH)[(M::GROUP + 1) * (M::DIM / PIECE) + lane];
            tp_exchange::fetched();
            meet();
#pragma unroll 1
            for (int half = 0; half < halves; half++, scores += M::ROUND / 2) {
                constexpr int STEPS = M::ROUND / 2 / 16;
                float2 weights[STEPS][2];
                uint4 values[STEPS / 2];
#pragma unroll
                for (int i = 0; i < STEPS / 2; i++) values[i] = load_values(half * (M::ROUND / 2) + i * 32);
                float now = most;
#pragma unroll
                for (int i = 0; i < STEPS; i++) {
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        weights[i][j] = *reinterpret_cast<const float2 *>(scores + i * 16 + j * 8);
                        now = fmaxf(now, fmaxf(weights[i][j].x, weights[i][j].y));
                    }
                }
                now = quad_max(now);
                const float old = __expf(most - now);
                most = now, sum *= old;
#pragma unroll
                for (int i = 0; i < 4; i++) out[i] *= old;
#pragma unroll
                for (int i = 0; i < STEPS; i++) {
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        float2 &w = weights[i][j];
                        w = make_float2(__expf(w.x - now), __expf(w.y - now));
                        sum += w.x + w.y;
                    }
                    const uint4 v = values[i / 2];
                    add_values(out, weights[i][0], weights[i][1], i % 2 == 0 ? make_uint2(v.x, v.y) : make_uint2(v.z, v.w));
                }
            }
            scores -= halves * (M::ROUND / 2);
        }
        send_stretch(most, quad_sum(sum), out);
    }
    __device__ __forceinline__ void send_stretch(float most, float sum, const float (&out)[4]) const
    {
        constexpr int pieces = M::GROUP * 2; /* of 16 bytes, of the warp's channels */
        const uint32_t here = tp_exchange::address(memory), barrier = tp_exchange::address(&s.stretches) - here;
        const int record = M::STRETCHES + member * M::RECORDS * 4, head = min(lane / 4, M::GROUP - 1);
        if (lane / 4 < M::GROUP)
            *room<float2>(record + (head * M::RECORD + warp * PIECE + lane % 4 * 2) * 4) =
                make_float2(out[0] + out[2], out[1] + out[3]);
        __syncwarp();
#pragma unroll
        for (int n = 0; n < MEMBERS * pieces / 32; n++) {
            const int i = n * 32 + lane, piece = i % pieces,
                      at = record + (piece / 2 * M::RECORD + warp * PIECE + piece % 2 * 4) * 4;
            const uint32_t to = tp_exchange::there(memory, (member + i / pieces) % MEMBERS); /* not all to the same one */
            float four[4];
            tp_load<4>(room<float>(at), four);
            tp_exchange::send(to + at, four, to + barrier);
        }
        /* a warp sends what is of heads to two blocks */
        const uint32_t to = tp_exchange::there(memory, warp * 2 + lane % 4 / 2);
        if (lane % 2 == 0 && lane / 4 < M::GROUP)
            tp_exchange::send(to + record + (head * M::RECORD + M::DIM) * 4,
                              make_uint2(__float_as_uint(most), __float_as_uint(sum)), to + barrier);
    }
    /* Floats in the order of whole numbers, and back. */
    static __device__ __forceinline__ int ordered(int bits)
    {
        return bits ^ (bits >> 31 & 0x7fffffff);
    }

    /* All stretches joined, as products read them: a warp has a head, a lane a pair of its channels. */
    __device__ __forceinline__ void join_stretches(uint32_t parity) const
    {
        static_assert(M::GROUP <= WARPS && M::DIM == 64 && MEMBERS <= 32 && MEMBERS == 2 * WARPS, "a warp for a head");
        tp_exchange::wait(&s.stretches, parity);
        if (warp < M::GROUP) {
            const float *record = room<float>(M::STRETCHES) + warp * M::RECORD;
            float2 all = make_float2(-INFINITY, 0), v = make_float2(0, 0);
            if (lane < parts) all = *reinterpret_cast<const float2 *>(record + lane * M::RECORDS + M::DIM);
            const float most = __int_as_float(ordered(__reduce_max_sync(0xffffffffu, ordered(__float_as_int(all.x)))));
            const float weight = __expf(all.x - most), weighted = weight * all.y;
            float sum = 0.0f;
#pragma unroll 2
            for (int j = 0; j < parts; j++) {
                const float2 of_part = *reinterpret_cast<const float2 *>(record + j * M::RECORDS + lane * 2);
                const float w = __shfl_sync(0xffffffffu, weight, j);
                sum += __shfl_sync(0xffffffffu, weighted, j);
                v.x = fmaf(w, of_part.x, v.x), v.y = fmaf(w, of_part.y, v.y);
            }
            put_pair(room<uint32_t>(M::MIXED), threadIdx.x, tp_pack_bf16(__fdividef(v.x, sum), __fdividef(v.y, sum)));
        }
        meet();
    }
    /* The token's key and value. */
    __device__ __forceinline__ void append(const layer &l) const
    {
        if (end != used + 1 || threadIdx.x >= M::DIM) return;
        const int64_t at = (int64_t)used * p.cache_ld + cluster * M::DIM + threadIdx.x;
        const __nv_bfloat16 *fresh = room<__nv_bfloat16>(M::FRESH) + threadIdx.x;
        l.cache_k[at] = fresh[M::GROUP * M::DIM];
        l.cache_v[at] = fresh[(M::GROUP + 1) * M::DIM];
    }
    /* ---- all layers ---- */

    __device__ __forceinline__ void expect_fresh() const
    {
        tp_exchange::expect(&s.fresh, (M::GROUP + 2) * M::DIM * 2);
    }
    __device__ __forceinline__ void expect_stretches() const
    {
        tp_exchange::expect(&s.stretches, parts * M::GROUP * (M::DIM + 2) * 4);
    }
    __device__ __forceinline__ void expect_active() const
    {
        tp_exchange::expect(&s.active, M::FEED * 2);
    }

    __device__ __forceinline__ void open()
    {
        find_sources<QKV>(), find_sources<O>(), find_sources<GATE_UP>(), find_sources<DOWN>();
        for (int i = threadIdx.x; i < M::ROUND * M::VALUE_BYTES / 4;
             i += THREADS) /* those of keys that are not there count as 0 */
            room<uint32_t>(M::VALUES)[i] = 0;
    }
    __device__ __forceinline__ void compute()
    {
        const bool leads = threadIdx.x == 0;
        const uint32_t tags = *p.tags;
        const layer *table = room<layer>(M::TABLE);
        find_stretch();
        for (auto &half : keys) half[0] = half[1] = make_uint4(0, 0, 0, 0);
        load_x();
        load_norm(table[0].norm1);
        find_angles();
        if (leads) expect_fresh(), expect_stretches(), expect_active();
        if (leads) expect_low<QKV>(), expect_low<O>(), expect_low<GATE_UP>(), expect_low<DOWN>();
        held<M::of(QKV).chunks> qkv;
        ups<M, QKV> up_qkv;
        hold<QKV>(0, qkv);
        hold_up<QKV>(table[0], up_qkv);
#pragma unroll 1
        for (int l = 0; l < p.n_layers; l++) {
            const layer &now = table[l];
            const uint32_t parity = l & 1, tag = tags + (uint32_t)l + 1;
            if (end - begin > M::ROUND) find_round(begin);
            fetch_round(now);
            put_weighted();
            say_ready<QKV>();
            send_fresh(multiply_row<QKV>(M::NORMED, qkv, up_qkv, parity));
            load_norm(now.norm2);
            tp_exchange::wait(&s.fresh, parity);
            if (leads) s.progress = l, expect_fresh(), expect_low<QKV>();
            ups<M, O> up_o;
            hold_up<O>(now, up_o);
            if (member < parts) {
                attend(now);
                append(now);
            }
            held<M::of(O).chunks> o;
            hold<O>(l, o);
            join_stretches(parity);
            say_ready<O>();
            if (leads) expect_stretches();
            post_sum<O>(multiply_row<O>(M::MIXED, o, up_o, parity), tag);
            if (leads) expect_low<O>();
            held<M::of(GATE_UP).chunks> gate_up;
            ups<M, GATE_UP> up_gate_up;
            hold_up<GATE_UP>(now, up_gate_up);
            hold<GATE_UP>(l, gate_up);
            add_posted<O>(tag);

            put_weighted();
            say_ready<GATE_UP>();
            const layer &next = table[min(l + 1, p.n_layers - 1)];
            ups<M, DOWN> up_down;
            hold_up<DOWN>(now, up_down);
            send_active(multiply_row<GATE_UP>(M::NORMED, gate_up, up_gate_up, parity));
            load_norm(next.norm1);
            if (leads) expect_low<GATE_UP>();
            held<M::of(DOWN).chunks> down;
            hold<DOWN>(l, down);
            tp_exchange::wait(&s.active, parity);
            if (leads) expect_active();
            post_sum<DOWN>(multiply_row<DOWN>(M::ACTIVE, down, up_down, parity), tag);
            if (leads) expect_low<DOWN>();
            hold_up<QKV>(next, up_qkv);
            hold<QKV>(l + 1, qkv);
            add_posted<DOWN>(tag);
        }
        if (blockIdx.x != 0) return;
        store_x();
        if (leads) *p.tags = tags + (uint32_t)p.n_layers;
    }
};

#endif

} // namespace tp_token

#endif
