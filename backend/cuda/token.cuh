/* What a thread of the kernel of layers.cu does: its block's part of the products, and what goes from block to block. */
#ifndef TP_BACKEND_CUDA_TOKEN_CUH
#define TP_BACKEND_CUDA_TOKEN_CUH

#include "backend/cuda/exchange.cuh"
#include "backend/cuda/layers.cuh"

namespace tp_token
{

constexpr int MEMBERS = 16;
constexpr int WARPS = 8, THREADS = WARPS * 32; /* that compute */
constexpr int FETCHERS = 3;                    /* warps that fetch weights; one more prefetches */
constexpr int ALL_THREADS = THREADS + (FETCHERS + 1) * 32;
constexpr int ROWS = 8;                   /* of a warp in a product, at most */
constexpr int PREFETCH = 3;               /* layers ahead that weights come to the cache of the GPU */
constexpr int LATER_LAYERS = 8;           /* last layers, beside which comes what is read after them */
constexpr int64_t LATER_BYTES = 28 << 20; /* of it, at most: half of the cache */
constexpr int PIECE = 8;                  /* channels of a lane */
constexpr int OWNED = 16;                 /* channels of attention that a block joins */
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
    return {rows, of_warp, columns / 32, at, at + of_warp * WARPS * columns * 2};
}

template <int HIDDEN, int GROUP, int DIM, int FEED> struct shapes {
    static __host__ __device__ constexpr shape of(int product)
    {
        shape s = shape_of((GROUP + 2) * DIM / MEMBERS, HIDDEN, 4, 0);
        if (product > QKV) s = shape_of(HIDDEN / MEMBERS, GROUP * DIM, 1, s.end);
        if (product > O) s = shape_of(2 * FEED / MEMBERS, HIDDEN, ROWS, s.end);
        if (product > GATE_UP) s = shape_of(HIDDEN / MEMBERS, FEED, 1, s.end);
        return s;
    }
};

/* What follows from the sizes of a model. They are known when this is compiled: a layer's code runs once a layer, and of code
 * for any sizes there would be so much more that fetching it would take longer than running it. */
template <int HIDDEN_, int GROUP_, int DIM_, int FEED_, int CLUSTERS_> struct sizes : shapes<HIDDEN_, GROUP_, DIM_, FEED_> {
    using shapes<HIDDEN_, GROUP_, DIM_, FEED_>::of;
    static constexpr int HIDDEN = HIDDEN_, CLUSTERS = CLUSTERS_;
    static constexpr int GROUP = GROUP_, DIM = DIM_,
                         FEED = FEED_; /* query heads, channels of a head, of feed-forward: of a cluster */
    static constexpr int PAIRS = (HIDDEN / 2 + THREADS - 1) / THREADS;                /* of channels of x that a thread has */
    static constexpr int LANES = DIM / PIECE, KEYS = 32 / LANES, STEP = WARPS * KEYS; /* keys of a warp at once, of a block */
    static constexpr int RECORD = DIM + 4, RECORDS_OF = GROUP * RECORD;
    static constexpr int OWNERS = GROUP * DIM / OWNED; /* blocks that join stretches */
    /* Where things lie in shared memory. */
    static constexpr int NORMED = of(DOWN).end;
    static constexpr int FRESH = NORMED + HIDDEN * 2;
    static constexpr int HEADS = FRESH + (GROUP + 2) * DIM * 4;
    static constexpr int STRETCHES = HEADS + (GROUP + 1) * DIM * 4;
    static constexpr int RECORDS = STRETCHES + MEMBERS * (OWNED + 4) * 4;
    static constexpr int MIXED = RECORDS + WARPS * RECORDS_OF * 4;
    static constexpr int ACTIVE = MIXED + GROUP * DIM * 2;
    static constexpr int SOURCES = ACTIVE + FEED * 2;
    static constexpr int TABLE = SOURCES + PRODUCTS * WARPS * ROWS * 8;
    static_assert(HIDDEN % 32 == 0 && FEED % (8 * MEMBERS) == 0 && DIM % 64 == 0, "whole chunks");
    static_assert(HIDDEN % (2 * MEMBERS) == 0 && OWNERS <= MEMBERS, "a share for each block");
    static_assert(of(QKV).of_warp <= ROWS && of(O).of_warp <= ROWS && of(GATE_UP).of_warp <= ROWS,
                  "a tile of a product for a warp");
};

struct layer {
    const unsigned char *w[TP_LAYERS_LINEARS];
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
    uint64_t *mail; /* [2, clusters, hidden] */
    uint32_t *tags; /* used up so far */
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
    uint64_t fresh, stretches, mixed, active; /* barriers: of what the cluster sends */
    uint64_t full[PRODUCTS], empty[PRODUCTS]; /* of the weights of a product */
    alignas(16) float reduce[WARPS];
    float angles[256];
    int progress; /* the layer that the block is at */
};

/* ---- tensor cores ---- */

/* c += a b, [16, 16] [16, 8]. A lane's 16 bytes of a row of w are both a's rows g (words 0, 2) and g + 8 (words 1, 3), b's
 * columns 0 and 1 what these meet: the sum over the 32 columns of a chunk is c[g][0] + c[g + 8][1], in lane 4 g. */
__device__ __forceinline__ void multiply(float (&c)[4], uint4 w, uint2 x)
{
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "r"(x.x), "r"(x.y));
}

/* Channels 2 i and 2 i + 1 of what products read: of four pairs, the second and the third change places. */
__device__ __forceinline__ void put_pair(uint32_t *x, int i, uint32_t pair)
{
    x[(i & ~3) | (i & 1) << 1 | (i >> 1 & 1)] = pair;
}

__device__ __forceinline__ void unpack(uint4 v, float (&x)[PIECE])
{
    tp_unpack_bf16(v.x, x[0], x[1]), tp_unpack_bf16(v.y, x[2], x[3]);
    tp_unpack_bf16(v.z, x[4], x[5]), tp_unpack_bf16(v.w, x[6], x[7]);
}

/* Where a row of a product lies: in which matrix, so many bytes from its start. */
struct source {
    uint32_t which, offset;
};

/* A warp's rows of a product, a lane's part, before x is there. */
template <int CHUNKS> struct held {
    uint4 w[CHUNKS];
};

/* A thread of the kernel for a model M. */
template <class M> struct thread {
    const params &p;
    small &s;
    int cluster, member, warp, lane;

    /* ---- weights ---- */

    /* Row r of the block's part. Of gate and up a warp has four channels, each twice: those that make 8 neighbouring bytes of
     * what products read (put_pair). */
    template <int P> __device__ __forceinline__ source source_of(int r) const
    {
        constexpr shape S = M::of(P);
        constexpr int heads = M::GROUP * M::DIM;
        source from = {0, 0};
        int row = r, column = 0;
        if (P == QKV) {
            row += member * S.rows;
            if (row < heads)
                from.which = TP_LAYERS_Q, row += cluster * heads;
            else if (row < heads + M::DIM)
                from.which = TP_LAYERS_K, row += cluster * M::DIM - heads;
            else
                from.which = TP_LAYERS_V, row += cluster * M::DIM - heads - M::DIM;
        } else if (P == GATE_UP) {
            from.which = r & 4 ? TP_LAYERS_UP : TP_LAYERS_GATE;
            row = cluster * M::FEED + member * (S.rows / 2) + r / 16 * 8 + (r >> 3 & 1) * 2 + (r & 1) + (r & 2) * 2;
        } else {
            from.which = P == O ? TP_LAYERS_O : TP_LAYERS_DOWN;
            row += member * S.rows;
            column = cluster * (P == O ? heads : M::FEED);
        }
        const int pairs = p.rope_pairs[from.which], in = pairs > 0 ? row % pairs : 0;
        if (pairs > 0) row += 2 * (in % (pairs / 2)) + in / (pairs / 2) - in; /* tp_matrix_stored_row */
        from.offset = (uint32_t)row * p.row_bytes[from.which] + 2 * column;
        return from;
    }

    template <int P> __device__ __forceinline__ source *sources() const { return room<source>(M::SOURCES) + P * WARPS * ROWS; }

    template <int P> __device__ __forceinline__ void find_sources() const
    {
#pragma unroll 1
        for (int r = threadIdx.x; r < M::of(P).rows; r += THREADS) sources<P>()[r] = source_of<P>(r);
    }
    /* By a warp that fetches: rows in turn, 16 bytes a lane, to where lanes that compute read them. */
    template <int P> __device__ __forceinline__ void fetch(int l) const
    {
        constexpr shape S = M::of(P);
        if (l > 0) tp_exchange::wait(&s.empty[P], (l - 1) & 1);
        const layer &from = room<layer>(M::TABLE)[min(l, p.n_layers - 1)];
#pragma unroll 2
        for (int r = warp - WARPS; r < S.rows; r += FETCHERS) {
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
        for (int l = 0; l < p.n_layers; l++) fetch<QKV>(l), fetch<O>(l), fetch<GATE_UP>(l), fetch<DOWN>(l);
        fetch<QKV>(p.n_layers); /* which is held, and not used */
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
    template <int P> __device__ __forceinline__ float multiply_row(int x, const held<M::of(P).chunks> &h) const
    {
        constexpr shape S = M::of(P);
        const unsigned char *at = memory + x + lane % 4 * 16 + (lane >> 2 & 1) * 8;
        float c[3][4] = {};
#pragma unroll
        for (int i = 0; i < S.chunks; i++) multiply(c[i % 3], h.w[i], *reinterpret_cast<const uint2 *>(at + i * 64));
        return ((c[0][0] + c[0][3]) + (c[1][0] + c[1][3])) + (c[2][0] + c[2][3]);
    }

    /* The warp that prefetches: a lane has a row. */
    template <int P> __device__ __forceinline__ void prefetch(const layer &l) const
    {
        constexpr shape S = M::of(P);
        for (int r = lane; r < S.rows; r += 32) {
            const source at = sources<P>()[r];
            const unsigned char *row = l.w[at.which] + at.offset;
            for (int c = 0; c < S.chunks; c += 2) asm volatile("prefetch.global.L2 [%0];" ::"l"(row + c * 64));
        }
    }
    /* The block's share of piece i. */
    __device__ __forceinline__ void prefetch_later(int i) const
    {
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
            if (l >= p.n_layers - LATER_LAYERS) prefetch_later(l - (p.n_layers - LATER_LAYERS));
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
    /* norm(x) as bf16, for products. */
    __device__ __forceinline__ void put_normed() const
    {
        float sum = 0.0f, sums[WARPS];
#pragma unroll
        for (int i = 0; i < M::PAIRS; i++) sum = fmaf(x[i].x, x[i].x, fmaf(x[i].y, x[i].y, sum));
        sum = tp_warp_sum(sum);
        if (lane == 0) s.reduce[warp] = sum;
        meet();
        tp_load<WARPS>(s.reduce, sums);
        sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
        const float rstd = rsqrtf(fmaf(sum, 1.0f / M::HIDDEN, p.eps));
#pragma unroll
        for (int i = 0; i < M::PAIRS; i++)
            if (has_pair(i))
                put_pair(room<uint32_t>(M::NORMED), threadIdx.x + i * THREADS,
                         tp_pack_bf16(tp_round_bf16(x[i].x * rstd) * norm[i].x, tp_round_bf16(x[i].y * rstd) * norm[i].y));
        meet();
    }

    /* ---- to all blocks ---- */

    /* The sum of a row of this cluster. */
    template <int P> __device__ __forceinline__ void post_sum(float sum, uint32_t tag) const
    {
        constexpr shape S = M::of(P);
        if (lane % 4 != 0 || !has<P>()) return;
        const int row = member * S.rows + warp * S.of_warp + lane / 4;
        tp_exchange::post(p.mail + ((P == DOWN ? M::CLUSTERS : 0) + cluster) * M::HIDDEN + row, sum, tag);
    }
    /* x += the sums of all clusters. */
    template <int P> __device__ __forceinline__ void add_posted(uint32_t tag)
    {
        const uint64_t *mail = p.mail + (P == DOWN ? M::CLUSTERS * M::HIDDEN : 0) + 2 * threadIdx.x;
        ulonglong2 words[M::PAIRS][M::CLUSTERS];
        for (bool all = false; !all;) {
            all = true;
#pragma unroll
            for (int i = 0; i < M::PAIRS; i++)
#pragma unroll
                for (int c = 0; c < M::CLUSTERS; c++)
                    if (has_pair(i)) words[i][c] = tp_exchange::peek(mail + c * M::HIDDEN + i * THREADS * 2);
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

    /* q, k and v, as bf16 would hold them: four rows from a lane to a block. */
    __device__ __forceinline__ void send_fresh(float v) const
    {
        constexpr shape S = M::of(QKV);
        const int to = lane % 16, first = lane / 16 * 4, row = warp * S.of_warp + first;
        v = tp_round_bf16(v);
        const float four[4] = {of_row(v, first), of_row(v, first + 1), of_row(v, first + 2), of_row(v, first + 3)};
        if (first < S.of_warp && row < S.rows)
            tp_exchange::send(tp_exchange::there(room<float>(M::FRESH) + member * S.rows + row, to), four,
                              tp_exchange::there(&s.fresh, to));
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
    uint4 next_k, next_v; /* of the key that this lane looks at next */

    __device__ __forceinline__ void find_stretch()
    {
        used = *p.used;
        const int keys = (used / (MEMBERS * M::STEP) + 1) * M::STEP;
        parts = used / keys + 1, begin = member * keys, end = min(used + 1, begin + keys);
    }
    __device__ __forceinline__ void fetch_key(const layer &l, int key)
    {
        if (key >= end || key == used) return;
        const int64_t at = (int64_t)key * p.cache_ld + cluster * M::DIM + lane % M::LANES * PIECE;
        next_k = *reinterpret_cast<const uint4 *>(l.cache_k + at), next_v = *reinterpret_cast<const uint4 *>(l.cache_v + at);
    }
    __device__ __forceinline__ void fetch_first_key(const layer &l)
    {
        next_k = next_v = make_uint4(0, 0, 0, 0);
        fetch_key(l, begin + warp * M::KEYS + lane / M::LANES);
    }
    /* Heads of q and the key, rotated; every product is rounded, as in rope.cu. */
    __device__ __forceinline__ void rotate() const
    {
        constexpr int half = M::DIM / 2, all = (M::GROUP + 1) * half;
        const float *fresh = room<float>(M::FRESH);
        float *heads = room<float>(M::HEADS);
#pragma unroll
        for (int i0 = 0; i0 < all; i0 += THREADS) {
            const int i = i0 + threadIdx.x;
            if (i >= all) continue;
            const int c = i % half, at = i / half * M::DIM + c;
            const float a = fresh[at], b = fresh[at + half], cosine = s.angles[c], sine = s.angles[half + c];
            const float ac = tp_round_bf16(__fmul_rn(a, cosine)), bs = tp_round_bf16(__fmul_rn(b, sine));
            const float bc = tp_round_bf16(__fmul_rn(b, cosine)), as = tp_round_bf16(__fmul_rn(a, sine));
            heads[at] = tp_round_bf16(__fsub_rn(ac, bs));
            heads[at + half] = tp_round_bf16(__fadd_rn(bc, as));
        }
    }
    static constexpr int KEEP = M::LANES / 4;
    /* Sums over the keys of a warp of what its lanes have for each channel of theirs: a lane keeps KEEP of its channels. */
    __device__ __forceinline__ void add_up(const float (&v)[PIECE], float (&kept)[KEEP]) const
    {
        const bool high = lane & 16, odd = lane & 8;
        float half[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            half[i] = (high ? v[4 + i] : v[i]) + __shfl_xor_sync(0xffffffffu, high ? v[i] : v[4 + i], 16);
#pragma unroll
        for (int i = 0; i < KEEP; i++) {
            kept[i] = half[i];
            if (KEEP == 2)
                kept[i] = (odd ? half[2 + i] : half[i]) + __shfl_xor_sync(0xffffffffu, odd ? half[i] : half[2 + i], 8);
        }
    }
    /* A record is softmax over some of the keys, not divided yet: [DIM] sums, the greatest score, the sum of the weights.
     * This is that of a warp for each head. */
    __device__ __forceinline__ void attend(const layer &l)
    {
        const int c0 = lane % M::LANES * PIECE;
        const float *q = room<float>(M::HEADS) + c0;
        float most[M::GROUP], sum[M::GROUP] = {}, out[M::GROUP][KEEP] = {};
#pragma unroll
        for (int g = 0; g < M::GROUP; g++) most[g] = -INFINITY;
#pragma unroll 1
        for (int first = begin + warp * M::KEYS; first < end; first += M::STEP) {
            const int key = first + lane / M::LANES;
            float k[PIECE], v[PIECE], scores[M::GROUP] = {};
            if (key == used) {
                tp_load<PIECE>(q + M::GROUP * M::DIM, k);
                tp_load<PIECE>(room<float>(M::FRESH) + (M::GROUP + 1) * M::DIM + c0, v);
            } else {
                unpack(next_k, k);
                unpack(next_v, v);
            }
            fetch_key(l, key + M::STEP);
#pragma unroll
            for (int g = 0; g < M::GROUP; g++) {
                float of_head[PIECE];
                tp_load<PIECE>(q + g * M::DIM, of_head);
#pragma unroll
                for (int c = 0; c < PIECE; c++) scores[g] = fmaf(of_head[c], k[c], scores[g]);
            }
#pragma unroll
            for (int offset = M::LANES / 2; offset > 0; offset /= 2)
#pragma unroll
                for (int g = 0; g < M::GROUP; g++) scores[g] += __shfl_xor_sync(0xffffffffu, scores[g], offset);
#pragma unroll
            for (int g = 0; g < M::GROUP; g++) {
                const float score = key < end ? scores[g] * p.scale : -INFINITY;
                float now = fmaxf(most[g], score), weighted[PIECE], kept[KEEP];
#pragma unroll
                for (int offset = M::LANES; offset < 32; offset *= 2)
                    now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, offset));
                const float old = __expf(most[g] - now), weight = __expf(score - now);
                most[g] = now, sum[g] = fmaf(sum[g], old, weight);
#pragma unroll
                for (int c = 0; c < PIECE; c++) weighted[c] = weight * v[c];
                add_up(weighted, kept);
#pragma unroll
                for (int c = 0; c < KEEP; c++) out[g][c] = fmaf(out[g][c], old, kept[c]);
            }
        }
        const int channel = c0 + lane / 16 * 4 + (KEEP == 2 ? lane / 8 % 2 * 2 : 0);
#pragma unroll
        for (int g = 0; g < M::GROUP; g++) {
#pragma unroll
            for (int offset = M::LANES; offset < 32; offset *= 2) sum[g] += __shfl_xor_sync(0xffffffffu, sum[g], offset);
            float *to = room<float>(M::RECORDS) + warp * M::RECORDS_OF + g * M::RECORD;
            if (KEEP == 2)
                *reinterpret_cast<float2 *>(to + channel) = make_float2(out[g][0], out[g][1]);
            else
                tp_store<KEEP>(to + channel, out[g]);
            if (lane == 0) *reinterpret_cast<float2 *>(to + M::DIM) = make_float2(most[g], sum[g]);
        }
    }
    /* The greatest of 16 scores, one a lane, twice; the weight of this lane's; and the sum of sums. */
    static __device__ __forceinline__ float2 weigh(float2 &record)
    {
        float most = record.x;
#pragma unroll
        for (int offset = 8; offset > 0; offset /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
        const float weight = __expf(record.x - most);
        float sum = weight * record.y;
#pragma unroll
        for (int offset = 8; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        record.x = weight;
        return make_float2(most, sum);
    }
    /* The warps' records joined, to the blocks that own the channels: 32 of them by a warp. */
    __device__ __forceinline__ void send_stretch() const
    {
#pragma unroll 1
        for (int i = warp; i < M::GROUP * M::DIM / 32; i += WARPS) {
            const float *records = room<float>(M::RECORDS) + i * 32 / M::DIM * M::RECORD;
            float2 mine = make_float2(-INFINITY, 0);
            if (lane % 16 < WARPS) mine = *reinterpret_cast<const float2 *>(records + lane % 16 * M::RECORDS_OF + M::DIM);
            const float2 all = weigh(mine);
            float v = 0.0f, four[4]; /* of which each lane of four has one */
#pragma unroll
            for (int j = 0; j < WARPS; j++)
                v = fmaf(__shfl_sync(0xffffffffu, mine.x, j), records[j * M::RECORDS_OF + i * 32 % M::DIM + lane], v);
#pragma unroll
            for (int j = 0; j < 4; j++) four[j] = __shfl_sync(0xffffffffu, v, (lane & ~3) + j);
            const int owner = i * 32 / OWNED + lane / OWNED;
            const float *to = room<float>(M::STRETCHES) + member * (OWNED + 4);
            if (lane % 4 == 0)
                tp_exchange::send(tp_exchange::there(to + lane % OWNED, owner), four, tp_exchange::there(&s.stretches, owner));
            if (lane % OWNED == 1)
                tp_exchange::send(tp_exchange::there(to + OWNED, owner),
                                  make_uint2(__float_as_uint(all.x), __float_as_uint(all.y)),
                                  tp_exchange::there(&s.stretches, owner));
        }
    }
    /* The stretches of the channels that this block owns joined, to all blocks of the cluster: by a warp, half of it each
     * second stretch. */
    __device__ __forceinline__ void send_mixed(uint32_t parity) const
    {
        static_assert(OWNED == 16 && MEMBERS == 16, "a lane for a channel and for a block");
        const float *records = room<float>(M::STRETCHES);
        tp_exchange::wait(&s.stretches, parity);
        if (lane == 0) expect_stretches();
        float2 mine = make_float2(-INFINITY, 0);
        if (lane % 16 < parts) mine = *reinterpret_cast<const float2 *>(records + lane % 16 * (OWNED + 4) + OWNED);
        const float2 all = weigh(mine);
        float v = 0.0f;
#pragma unroll
        for (int j = 0; j < MEMBERS; j += 2) {
            const float weight = __shfl_sync(0xffffffffu, mine.x, j + lane / 16);
            if (j + lane / 16 < parts) v = fmaf(weight, records[(j + lane / 16) * (OWNED + 4) + lane % 16], v);
        }
        v = __fdividef(v + __shfl_xor_sync(0xffffffffu, v, 16), all.y);
        const uint32_t pair = tp_pack_bf16(v, __shfl_down_sync(0xffffffffu, v, 1));
        const int first = lane / 16 * 8; /* as put_pair has them */
        const float eight[4] = {__uint_as_float(__shfl_sync(0xffffffffu, pair, first)),
                                __uint_as_float(__shfl_sync(0xffffffffu, pair, first + 4)),
                                __uint_as_float(__shfl_sync(0xffffffffu, pair, first + 2)),
                                __uint_as_float(__shfl_sync(0xffffffffu, pair, first + 6))};
        tp_exchange::send(tp_exchange::there(room<uint4>(M::MIXED) + member * 2 + lane / 16, lane % 16), eight,
                          tp_exchange::there(&s.mixed, lane % 16));
    }
    /* The token's key and value. */
    __device__ __forceinline__ void append(const layer &l) const
    {
        if (end != used + 1 || threadIdx.x >= M::DIM) return;
        const int64_t at = (int64_t)used * p.cache_ld + cluster * M::DIM + threadIdx.x;
        l.cache_k[at] = __float2bfloat16_rn(room<float>(M::HEADS)[M::GROUP * M::DIM + threadIdx.x]);
        l.cache_v[at] = __float2bfloat16_rn(room<float>(M::FRESH)[(M::GROUP + 1) * M::DIM + threadIdx.x]);
    }
    /* ---- all layers ---- */

    __device__ __forceinline__ void expect_fresh() const
    {
        tp_exchange::expect(&s.fresh, (M::GROUP + 2) * M::DIM * 4);
    }
    __device__ __forceinline__ void expect_stretches() const
    {
        tp_exchange::expect(&s.stretches, parts * (OWNED * 4 + 8));
    }
    __device__ __forceinline__ void expect_mixed() const
    {
        tp_exchange::expect(&s.mixed, M::GROUP * M::DIM * 2);
    }
    __device__ __forceinline__ void expect_active() const
    {
        tp_exchange::expect(&s.active, M::FEED * 2);
    }

    __device__ __forceinline__ void open()
    {
        find_sources<QKV>(), find_sources<O>(), find_sources<GATE_UP>(), find_sources<DOWN>();
    }
    __device__ __forceinline__ void compute()
    {
        const bool leads = threadIdx.x == 0;
        const uint32_t tags = *p.tags;
        const layer *table = room<layer>(M::TABLE);
        find_stretch();
        load_x();
        load_norm(table[0].norm1);
        if (threadIdx.x < M::DIM / 2) {
            const float angle = (float)used * p.inv_freq[threadIdx.x];
            s.angles[threadIdx.x] = tp_round_bf16(cosf(angle) * p.factor);
            s.angles[M::DIM / 2 + threadIdx.x] = tp_round_bf16(sinf(angle) * p.factor);
        }
        if (leads) expect_fresh(), expect_stretches(), expect_mixed(), expect_active();
        held<M::of(QKV).chunks> qkv;
        hold<QKV>(0, qkv);
#pragma unroll 1
        for (int l = 0; l < p.n_layers; l++) {
            const layer &now = table[l];
            const uint32_t parity = l & 1, tag = tags + (uint32_t)l + 1;
            fetch_first_key(now);
            put_normed();
            load_norm(now.norm2);
            send_fresh(multiply_row<QKV>(M::NORMED, qkv));
            tp_exchange::wait(&s.fresh, parity);
            rotate();
            meet();
            if (leads) s.progress = l, expect_fresh();
            if (member < parts) {
                attend(now);
                meet();
                send_stretch();
                append(now);
            }
            held<M::of(O).chunks> o;
            hold<O>(l, o);
            if (warp == WARPS - 1 && member < M::OWNERS) send_mixed(parity);
            tp_exchange::wait(&s.mixed, parity);
            if (leads) expect_mixed();
            post_sum<O>(multiply_row<O>(M::MIXED, o), tag);
            held<M::of(GATE_UP).chunks> gate_up;
            hold<GATE_UP>(l, gate_up);
            add_posted<O>(tag);

            put_normed();
            load_norm(table[min(l + 1, p.n_layers - 1)].norm1);
            send_active(multiply_row<GATE_UP>(M::NORMED, gate_up));
            held<M::of(DOWN).chunks> down;
            hold<DOWN>(l, down);
            tp_exchange::wait(&s.active, parity);
            if (leads) expect_active();
            post_sum<DOWN>(multiply_row<DOWN>(M::ACTIVE, down), tag);
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
