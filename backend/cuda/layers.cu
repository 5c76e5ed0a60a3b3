/* All layers of one token in one kernel: decoding with a model so small that the kernels of a layer cost more to start than
 * to run.
 *
 * A cluster of MEMBERS blocks is a key head with its query heads, and a share of the feed-forward channels. Each warp has its
 * rows of every product of its cluster, of which a layer fits into shared memory: as soon as it has used those of a product, it
 * fetches those of the next layer. What blocks wait for is only each other, five times a layer:
 *
 *     q, k, v of the cluster's heads       -> to all blocks of the cluster
 *     attention over a stretch of the keys -> to all blocks of the cluster
 *     o, of the cluster's heads alone      -> to all blocks; the sum over clusters is added to x, which every block holds
 *     gate, up, SwiGLU                     -> to all blocks of the cluster
 *     down, of the cluster's channels      -> to all blocks
 *
 * (exchange.cuh says how.) Buffers are used anew in every layer: whoever sends the next layer's has seen what all blocks sent
 * at the end of this one, hence after they read the buffer. Sums are in fixed orders, of f32. */
#include "backend/cuda/chain.cuh"
#include "backend/cuda/cluster.cuh"
#include "backend/cuda/decode.cuh"
#include "backend/cuda/exchange.cuh"
#include "backend/cuda/layers.cuh"
#include "base/mem.h"

namespace
{

constexpr int MEMBERS = 16;
constexpr int WARPS = 8, THREADS = WARPS * 32; /* that compute; one more prefetches */
constexpr int ROWS = 8;                        /* of a warp in a product, at most */
constexpr int HELD = 18;                       /* chunks of 32 columns of w that a lane holds before x is there */
constexpr int PREFETCH = 3;                    /* layers ahead that weights come to the cache of the GPU */
constexpr int PAIRS = 2;                       /* of neighbouring channels of x that a thread has */
constexpr int HIDDEN_MAX = PAIRS * THREADS * 2;
constexpr int CLUSTERS_MAX = 8, TOGETHER = 3; /* clusters whose sums a thread waits for at once */
constexpr int GROUP = 4;                      /* query heads at a time */
constexpr int PIECE = 8;                      /* channels of a lane */
constexpr int SHARED_MOST = 226 << 10;

enum product { QKV, O, GATE_UP, DOWN, PRODUCTS };

/* A block's part of a product: `rows` of it, up to `of_warp` of them for a warp, of `chunks` times 32 columns. They lie from
 * `at` on in shared memory, each warp's in the order that its lanes read them. */
struct shape {
    int rows, of_warp, chunks, at;
};

struct layer {
    const unsigned char *w[TP_LAYERS_LINEARS];
    const float *norm1, *norm2;
    __nv_bfloat16 *cache_k, *cache_v;
};

struct params {
    const layer *layers;
    int n_layers, clusters, hidden, group, head_dim, feed; /* feed: of a cluster */
    int64_t cache_ld;
    uint32_t row_bytes[TP_LAYERS_LINEARS];
    int rope_pairs[TP_LAYERS_LINEARS];
    shape shapes[PRODUCTS];
    int table, normed, fresh, heads, stretches, records, mixed, active; /* where things lie in shared memory */
    __nv_bfloat16 *x;
    float eps, scale;
    const float *cosine, *sine;
    const int32_t *used;
    uint64_t *mail; /* [2, clusters, hidden] */
    uint32_t *tags; /* used up so far */
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/* What the cluster sends. */
struct barriers {
    uint64_t fresh, stretches, active;
};

extern __shared__ __align__(128) unsigned char memory[];

template <typename T> __device__ __forceinline__ T *room(int at)
{
    return reinterpret_cast<T *>(memory + at);
}

__device__ __forceinline__ void meet()
{
    asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

/* ---- weights ---- */

/* Where a row of a product lies: in which matrix, so many bytes from its start; none: `has` is false. */
struct source {
    int which;
    uint32_t offset;
    bool has;
};

/* Row r of a block's, of which a warp has of_warp. Of gate and up a warp has four channels, each twice: those that make 8
 * neighbouring bytes of what products read (put_pair). */
__device__ source source_of(const params &p, int product, int r, int cluster, int member)
{
    const shape &s = p.shapes[product];
    const int heads = p.group * p.head_dim;
    source from = {0, 0, r < s.rows};
    int row = r, column = 0;
    if (product == QKV) {
        row += member * s.rows;
        if (row < heads)
            from.which = TP_LAYERS_Q, row += cluster * heads;
        else if (row < heads + p.head_dim)
            from.which = TP_LAYERS_K, row += cluster * p.head_dim - heads;
        else
            from.which = TP_LAYERS_V, row += cluster * p.head_dim - heads - p.head_dim;
    } else if (product == GATE_UP) {
        from.which = r & 4 ? TP_LAYERS_UP : TP_LAYERS_GATE;
        row = cluster * p.feed + member * (s.rows / 2) + r / 16 * 8 + (r >> 3 & 1) * 2 + (r & 1) + (r & 2) * 2;
    } else {
        from.which = product == O ? TP_LAYERS_O : TP_LAYERS_DOWN;
        row += member * s.rows;
        column = cluster * (product == O ? heads : p.feed);
    }
    from.offset = (uint32_t)tp_device_stored_row(p.rope_pairs[from.which], row) * p.row_bytes[from.which] + 2 * column;
    return from;
}

/* The warp that prefetches: a lane has a row. `progress`: the layer that the block is at. */
__device__ void prefetch(const params &p, const volatile int *progress, int cluster, int member)
{
    for (int l = 1; l < p.n_layers; l++) {
        while (*progress + PREFETCH < l) __nanosleep(100);
        const layer &from = room<layer>(p.table)[l];
        for (int product = 0; product < PRODUCTS; product++) {
            const shape &s = p.shapes[product];
            for (int r = threadIdx.x % 32; r < s.rows; r += 32) {
                const source at = source_of(p, product, r, cluster, member);
                const unsigned char *row = from.w[at.which] + at.offset;
                for (int c = 0; c < s.chunks; c += 2) asm volatile("prefetch.global.L2 [%0];" ::"l"(row + c * 64));
            }
        }
    }
}

/* A lane reads 16 bytes of each chunk of row lane / 4 of its warp. */
struct reader {
    source from[PRODUCTS];

    __device__ __forceinline__ void open(const params &p, int cluster, int member)
    {
        const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
#pragma unroll
        for (int i = 0; i < PRODUCTS; i++) {
            const shape &s = p.shapes[i];
            from[i] = source_of(p, i, warp * s.of_warp + g, cluster, member);
            if (g >= s.of_warp) from[i].has = false;
            if (!from[i].has) from[i].which = 0, from[i].offset = 0;
            from[i].offset += threadIdx.x % 4 * 16;
        }
    }
    /* Where this lane's 16 bytes of chunk 0 are, and how far it is to the next chunk. */
    __device__ __forceinline__ unsigned char *place(const shape &s) const
    {
        return memory + s.at + (int)(threadIdx.x / 32) * s.of_warp * s.chunks * 64 + (int)(threadIdx.x % 32) * 16;
    }
    /* Always one group of copies. */
    __device__ __forceinline__ void fetch(const params &p, int product, int l) const
    {
        const shape &s = p.shapes[product];
        if (l < p.n_layers && from[product].has) {
            const unsigned char *w = room<layer>(p.table)[l].w[from[product].which] + from[product].offset;
            unsigned char *to = place(s);
            const int step = s.of_warp * 64;
#pragma unroll 6
            for (int i = 0; i < s.chunks; i++, w += 64, to += step) tp_exchange::fetch(to, w);
        }
        tp_exchange::commit();
    }
};

/* ---- products ---- */

/* c += a b on a tensor core, [16, 16] [16, 8]. A lane's 16 bytes of a row of w are both a's rows g (words 0, 2) and g + 8 (words 1, 3),
 * b's columns 0 and 1 what these meet: the sum over the 32 columns of a chunk is c[g][0] + c[g + 8][1], in lane 4 g. */
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

/* A warp's rows of a product, in registers as far as they fit. */
struct held {
    uint4 w[HELD];
};

__device__ __forceinline__ void hold(const params &p, const reader &r, int product, held &h)
{
    const shape &s = p.shapes[product];
    const unsigned char *at = r.place(s);
    const int step = s.of_warp * 64;
    tp_exchange::wait_for_oldest<PRODUCTS - 1>();
    const bool has = r.from[product].has;
    h = held();
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if (has && i < s.chunks) h.w[i] = *reinterpret_cast<const uint4 *>(at + i * step);
}

/* In lane 4 g: row g of the warp times x. */
__device__ __forceinline__ float multiply_row(const params &p, const reader &r, int product, const void *x, const held &h)
{
    const shape &s = p.shapes[product];
    const unsigned char *from = (const unsigned char *)x + threadIdx.x % 4 * 16 + (threadIdx.x >> 2 & 1) * 8;
    float c[3][4] = {};
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if (i < s.chunks) multiply(c[i % 3], h.w[i], *reinterpret_cast<const uint2 *>(from + i * 64));
    for (int i = HELD; i < s.chunks; i++) {
        uint4 w = make_uint4(0, 0, 0, 0);
        if (r.from[product].has) w = *reinterpret_cast<const uint4 *>(r.place(s) + i * s.of_warp * 64);
        multiply(c[0], w, *reinterpret_cast<const uint2 *>(from + i * 64));
    }
    return ((c[0][0] + c[0][3]) + (c[1][0] + c[1][3])) + (c[2][0] + c[2][3]);
}

/* ---- x, of which every block holds all: a thread has pairs of channels, THREADS pairs apart ---- */

struct channels {
    float2 x[PAIRS];
};

__device__ __forceinline__ void load_norm(const params &p, const float *from, channels &w)
{
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int pair = threadIdx.x + i * THREADS;
        if (pair < p.hidden / 2) w.x[i] = __ldg(reinterpret_cast<const float2 *>(from) + pair);
    }
}

/* norm(x) as bf16, for products. */
__device__ __forceinline__ void put_normed(const params &p, const channels &x, const channels &w, float *reduce)
{
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) sum = fmaf(x.x[i].x, x.x[i].x, fmaf(x.x[i].y, x.x[i].y, sum));
    sum = tp_warp_sum(sum);
    if (threadIdx.x % 32 == 0) reduce[threadIdx.x / 32] = sum;
    meet();
    float sums[WARPS];
    tp_load<WARPS>(reduce, sums);
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; i++) sum += sums[i];
    const float rstd = rsqrtf(__fdividef(sum, (float)p.hidden) + p.eps);
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int pair = threadIdx.x + i * THREADS;
        if (pair >= p.hidden / 2) continue;
        put_pair(room<uint32_t>(p.normed), pair,
                 tp_pack_bf16(tp_round_bf16(x.x[i].x * rstd) * w.x[i].x, tp_round_bf16(x.x[i].y * rstd) * w.x[i].y));
    }
    meet();
}

/* A sum of this cluster to all blocks. */
__device__ __forceinline__ void post_sum(const params &p, const reader &r, int product, int cluster, int member, float sum,
                                         uint32_t tag)
{
    const shape &s = p.shapes[product];
    if (threadIdx.x % 4 != 0 || !r.from[product].has) return;
    const int row = member * s.rows + (int)(threadIdx.x / 32) * s.of_warp + (int)(threadIdx.x % 32 / 4);
    tp_exchange::post(p.mail + ((product == DOWN ? p.clusters : 0) + cluster) * p.hidden + row, sum, tag);
}

/* x += the sums of all clusters. */
__device__ __forceinline__ void add_posted(const params &p, int product, channels &x, uint32_t tag)
{
    const uint64_t *mail = p.mail + (product == DOWN ? p.clusters * p.hidden : 0) + 2 * threadIdx.x;
    float2 sums[PAIRS] = {};
    for (int first = 0; first < p.clusters; first += TOGETHER, mail += TOGETHER * p.hidden) {
        ulonglong2 words[PAIRS][TOGETHER];
        for (bool all = false; !all;) {
            all = true;
#pragma unroll
            for (int i = 0; i < PAIRS * TOGETHER; i++)
                if (first + i % TOGETHER < p.clusters && threadIdx.x + i / TOGETHER * THREADS < p.hidden / 2)
                    words[i / TOGETHER][i % TOGETHER] =
                        tp_exchange::peek(mail + i % TOGETHER * p.hidden + i / TOGETHER * THREADS * 2);
#pragma unroll
            for (int i = 0; i < PAIRS * TOGETHER; i++)
                if (first + i % TOGETHER < p.clusters && threadIdx.x + i / TOGETHER * THREADS < p.hidden / 2)
                    all = all && tp_exchange::has_come(words[i / TOGETHER][i % TOGETHER], tag);
        }
#pragma unroll
        for (int i = 0; i < PAIRS * TOGETHER; i++) {
            if (first + i % TOGETHER >= p.clusters) continue;
            const float2 v = tp_exchange::values_of(words[i / TOGETHER][i % TOGETHER]);
            sums[i / TOGETHER].x += v.x, sums[i / TOGETHER].y += v.y;
        }
    }
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        if (threadIdx.x + i * THREADS >= p.hidden / 2) continue;
        x.x[i].x = tp_round_bf16(sums[i].x + x.x[i].x), x.x[i].y = tp_round_bf16(sums[i].y + x.x[i].y);
    }
}

/* ---- to the cluster ---- */

__device__ __forceinline__ float of_row(float v, int row)
{
    return __shfl_sync(0xffffffffu, v, row * 4);
}

/* q, k and v, as bf16 would hold them: four rows from a lane to a block. */
__device__ __forceinline__ void send_fresh(const params &p, barriers &b, int member, float v)
{
    const shape &s = p.shapes[QKV];
    const int to = threadIdx.x % 16, first = threadIdx.x % 32 / 16 * 4, row = (int)(threadIdx.x / 32) * s.of_warp + first;
    v = tp_round_bf16(v);
    const float four[4] = {of_row(v, first), of_row(v, first + 1), of_row(v, first + 2), of_row(v, first + 3)};
    if (first < s.of_warp && row < s.rows)
        tp_exchange::send(tp_exchange::there(room<float>(p.fresh) + member * s.rows + row, to), four,
                          tp_exchange::there(&b.fresh, to));
}

/* Four channels from a lane to a block. */
__device__ __forceinline__ void send_active(const params &p, barriers &b, int member, float v)
{
    const shape &s = p.shapes[GATE_UP];
    const int to = threadIdx.x % 16, warp = threadIdx.x / 32;
    const float gate = tp_round_bf16(v), up = tp_round_bf16(__shfl_down_sync(0xffffffffu, v, 16));
    const float active = __fdividef(gate, 1.0f + __expf(-gate)) * up;
    const uint32_t low = tp_pack_bf16(of_row(active, 0), of_row(active, 1)),
                   high = tp_pack_bf16(of_row(active, 2), of_row(active, 3));
    if (warp * ROWS < s.rows && threadIdx.x % 32 < 16)
        tp_exchange::send(tp_exchange::there(room<uint2>(p.active) + member * (s.rows / 8) + warp, to), make_uint2(low, high),
                          tp_exchange::there(&b.active, to));
}

/* ---- attention ---- */

/* Softmax over some of the keys, not divided yet: [head_dim] sums, the greatest score, the sum of the weights. */
__device__ __forceinline__ int record(const params &p)
{
    return p.head_dim + 4;
}

/* Channel 32 i + lane of the record of head g that joins n <= 32 of them, `stride` apart: by a warp. */
__device__ __forceinline__ float join(const params &p, const float *from, int n, int stride, int channel, float &most, float &sum)
{
    const int lane = threadIdx.x % 32;
    const float mine = lane < n ? from[lane * stride + p.head_dim] : -INFINITY;
    most = tp_warp_max(mine);
    const float weight = lane < n ? __expf(mine - most) : 0.0f;
    sum = tp_warp_sum(lane < n ? weight * from[lane * stride + p.head_dim + 1] : 0.0f);
    float out = 0.0f;
#pragma unroll 4
    for (int i = 0; i < n; i++) out = fmaf(__shfl_sync(0xffffffffu, weight, i), from[i * stride + channel], out);
    return out;
}

/* Heads of q and the key, rotated; every product is rounded, as in rope.cu. angles: [2, head_dim / 2]. */
__device__ __forceinline__ void rotate(const params &p, const float *angles)
{
    const int half = p.head_dim / 2;
    for (int i = threadIdx.x; i < (p.group + 1) * half; i += THREADS) {
        const int c = i % half, at = i / half * p.head_dim + c;
        const float a = room<float>(p.fresh)[at], e = room<float>(p.fresh)[at + half], cosine = angles[c], sine = angles[half + c];
        const float ac = tp_round_bf16(__fmul_rn(a, cosine)), es = tp_round_bf16(__fmul_rn(e, sine));
        const float ec = tp_round_bf16(__fmul_rn(e, cosine)), as = tp_round_bf16(__fmul_rn(a, sine));
        room<float>(p.heads)[at] = tp_round_bf16(__fsub_rn(ac, es));
        room<float>(p.heads)[at + half] = tp_round_bf16(__fadd_rn(ec, as));
    }
}

struct stretch {
    int begin, end, used; /* keys; used: the token's own */
};

template <int LANES> struct keys {
    static constexpr int OF_WARP = 32 / LANES, STEP = WARPS * OF_WARP; /* keys at once, of the block */
    uint4 k, v;
    __device__ __forceinline__ void fetch(const params &p, const layer &from, const stretch &s, int key, int cluster)
    {
        k = v = make_uint4(0, 0, 0, 0);
        if (key >= s.end || key == s.used) return;
        const int64_t at = key * p.cache_ld + cluster * p.head_dim + threadIdx.x % LANES * PIECE;
        k = *reinterpret_cast<const uint4 *>(from.cache_k + at), v = *reinterpret_cast<const uint4 *>(from.cache_v + at);
    }
};

__device__ __forceinline__ void unpack(uint4 v, float (&x)[PIECE])
{
    tp_unpack_bf16(v.x, x[0], x[1]), tp_unpack_bf16(v.y, x[2], x[3]);
    tp_unpack_bf16(v.z, x[4], x[5]), tp_unpack_bf16(v.w, x[6], x[7]);
}

/* Sums over the keys of a warp of what its lanes have for each channel of theirs: a lane keeps KEEP of its channels. */
template <int LANES> __device__ __forceinline__ void scatter(const float (&x)[PIECE], float (&kept)[LANES / 4])
{
    const bool high = threadIdx.x & 16;
    float half[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float other = __shfl_xor_sync(0xffffffffu, high ? x[i] : x[4 + i], 16);
        half[i] = (high ? x[4 + i] : x[i]) + other;
    }
    if constexpr (LANES == 16) {
#pragma unroll
        for (int i = 0; i < 4; i++) kept[i] = half[i];
    } else {
        const bool odd = threadIdx.x & 8;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float other = __shfl_xor_sync(0xffffffffu, odd ? half[i] : half[2 + i], 8);
            kept[i] = (odd ? half[2 + i] : half[i]) + other;
        }
    }
}

/* Heads head0 .. of the group over the stretch: a record of each warp. `next`: the first keys, fetched already. */
template <int LANES>
__device__ __forceinline__ void attend_heads(const params &p, const layer &from, const stretch &s, int head0, int cluster,
                                             keys<LANES> &next)
{
    constexpr int KEEP = LANES / 4;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c0 = lane % LANES * PIECE;
    const int heads = min(GROUP, p.group - head0);
    const float *q = room<float>(p.heads) + head0 * p.head_dim + c0, *own_k = room<float>(p.heads) + p.group * p.head_dim + c0,
                *own_v = room<float>(p.fresh) + (p.group + 1) * p.head_dim + c0;
    float most[GROUP], sum[GROUP] = {}, out[GROUP][KEEP] = {};
#pragma unroll
    for (int g = 0; g < GROUP; g++) most[g] = -INFINITY;
    for (int base = s.begin + warp * keys<LANES>::OF_WARP; base < s.end; base += keys<LANES>::STEP) {
        const int key = base + lane / LANES;
        float k[PIECE], v[PIECE], scores[GROUP] = {};
        if (key == s.used) {
            tp_load<PIECE>(own_k, k);
            tp_load<PIECE>(own_v, v);
        } else {
            unpack(next.k, k);
            unpack(next.v, v);
        }
        next.fetch(p, from, s, key + keys<LANES>::STEP, cluster);
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            if (g >= heads) continue;
            float x[PIECE];
            tp_load<PIECE>(q + g * p.head_dim, x);
#pragma unroll
            for (int c = 0; c < PIECE; c++) scores[g] = fmaf(x[c], k[c], scores[g]);
        }
#pragma unroll
        for (int offset = LANES / 2; offset > 0; offset /= 2)
#pragma unroll
            for (int g = 0; g < GROUP; g++) scores[g] += __shfl_xor_sync(0xffffffffu, scores[g], offset);
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            if (g >= heads) continue;
            const float score = key < s.end ? scores[g] * p.scale : -INFINITY;
            float now = fmaxf(most[g], score), weighted[PIECE], kept[KEEP];
#pragma unroll
            for (int offset = LANES; offset < 32; offset *= 2) now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, offset));
            const float old = __expf(most[g] - now), weight = __expf(score - now);
            most[g] = now, sum[g] = fmaf(sum[g], old, weight);
#pragma unroll
            for (int c = 0; c < PIECE; c++) weighted[c] = weight * v[c];
            scatter<LANES>(weighted, kept);
#pragma unroll
            for (int c = 0; c < KEEP; c++) out[g][c] = fmaf(out[g][c], old, kept[c]);
        }
    }
    const int channel = c0 + (lane & 16) / 4 + (LANES == 8 ? (lane & 8) / 4 : 0);
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        if (g >= heads) continue;
#pragma unroll
        for (int offset = LANES; offset < 32; offset *= 2) sum[g] += __shfl_xor_sync(0xffffffffu, sum[g], offset);
        float *to = room<float>(p.records) + (warp * p.group + head0 + g) * record(p);
        tp_store<KEEP>(to + channel, out[g]);
        if (lane == 0) to[p.head_dim] = most[g], to[p.head_dim + 1] = sum[g];
    }
}

/* The stretch of this block, to all blocks of the cluster; and the token's key and value to the cache. */
template <int LANES>
__device__ __forceinline__ void attend_stretch(const params &p, const layer &from, barriers &b, const stretch &s, int part,
                                               int cluster, keys<LANES> &next)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int head0 = 0; head0 < p.group; head0 += GROUP) {
        if (head0 > 0) next.fetch(p, from, s, s.begin + threadIdx.x / LANES, cluster);
        attend_heads<LANES>(p, from, s, head0, cluster, next);
    }
    meet();
    const int warps = min(WARPS, (s.end - s.begin + keys<LANES>::OF_WARP - 1) / keys<LANES>::OF_WARP);
    for (int i = warp; i < p.group * p.head_dim / 32; i += WARPS) {
        const int g = i * 32 / p.head_dim, first = i * 32 % p.head_dim;
        const float *to = room<float>(p.stretches) + (part * p.group + g) * record(p);
        float most, sum;
        const float v = join(p, room<float>(p.records) + g * record(p), warps, p.group * record(p), first + lane, most, sum);
        float four[4]; /* of which each lane of four has one */
#pragma unroll
        for (int j = 0; j < 4; j++) four[j] = __shfl_sync(0xffffffffu, v, (lane & ~3) + j);
#pragma unroll
        for (int member = lane % 4; member < MEMBERS; member += 4)
            tp_exchange::send(tp_exchange::there(to + first + (lane & ~3), member), four,
                              tp_exchange::there(&b.stretches, member));
        if (first == 0 && lane < MEMBERS)
            tp_exchange::send(tp_exchange::there(to + p.head_dim, lane),
                              make_uint2(__float_as_uint(most), __float_as_uint(sum)),
                              tp_exchange::there(&b.stretches, lane));
    }
    if (s.end != s.used + 1) return;
    for (int c = threadIdx.x; c < p.head_dim; c += THREADS) {
        const int64_t at = s.used * p.cache_ld + cluster * p.head_dim + c;
        from.cache_k[at] = __float2bfloat16_rn(room<float>(p.heads)[p.group * p.head_dim + c]);
        from.cache_v[at] = __float2bfloat16_rn(room<float>(p.fresh)[(p.group + 1) * p.head_dim + c]);
    }
}

/* The cluster's heads, for the product. */
__device__ __forceinline__ void join_stretches(const params &p, int parts)
{
    const int lane = threadIdx.x % 32;
    for (int i = threadIdx.x / 32; i < p.group * p.head_dim / 32; i += WARPS) {
        const int g = i * 32 / p.head_dim, channel = i * 32 % p.head_dim + lane;
        float most, sum;
        const float out =
            __fdividef(join(p, room<float>(p.stretches) + g * record(p), parts, p.group * record(p), channel, most, sum), sum);
        const uint32_t pair = tp_pack_bf16(out, __shfl_down_sync(0xffffffffu, out, 1));
        if (lane % 2 == 0) put_pair(room<uint32_t>(p.mixed), i * 16 + lane / 2, pair);
    }
    meet();
}

/* ---- all layers ---- */

template <int LANES>
__device__ __forceinline__ void compute(const params &p, barriers &b, const reader &r, int cluster, int member, float *reduce,
                                        float *angles, volatile int *progress)
{
    const int half = p.head_dim / 2, used = *p.used, keys_of_part = ((used + MEMBERS) / MEMBERS + keys<LANES>::STEP - 1) /
                                                                     keys<LANES>::STEP * keys<LANES>::STEP;
    const int parts = used / keys_of_part + 1, begin = member * keys_of_part;
    const stretch mine = {begin, min(used + 1, begin + keys_of_part), used};
    const int fresh_bytes = (p.group + 2) * p.head_dim * 4, stretches_bytes = parts * p.group * (p.head_dim * 4 + 8);
    const uint32_t tags = *p.tags;
    const layer *table = room<layer>(p.table);
    channels x = {}, norm;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int pair = threadIdx.x + i * THREADS;
        if (pair < p.hidden / 2) tp_unpack_bf16(reinterpret_cast<const uint32_t *>(p.x)[pair], x.x[i].x, x.x[i].y);
    }
    load_norm(p, table[0].norm1, norm);
    if ((int)threadIdx.x < half) {
        angles[threadIdx.x] = tp_round_bf16(p.cosine[threadIdx.x]);
        angles[half + threadIdx.x] = tp_round_bf16(p.sine[threadIdx.x]);
    }
    if (threadIdx.x == 0) {
        tp_exchange::expect(&b.fresh, fresh_bytes);
        tp_exchange::expect(&b.stretches, stretches_bytes);
        tp_exchange::expect(&b.active, p.feed * 2);
    }
    held first;
    hold(p, r, QKV, first);
    for (int l = 0; l < p.n_layers; l++) {
        const layer &from = table[l];
        const uint32_t parity = l & 1, tag = tags + (uint32_t)l + 1;
        keys<LANES> next;
        if (member < parts) next.fetch(p, from, mine, begin + threadIdx.x / LANES, cluster);
        if (threadIdx.x == 0) *progress = l;

        put_normed(p, x, norm, reduce);
        load_norm(p, from.norm2, norm);
        send_fresh(p, b, member, multiply_row(p, r, QKV, room<void>(p.normed), first));
        r.fetch(p, QKV, l + 1);
        tp_exchange::wait(&b.fresh, parity);
        rotate(p, angles);
        meet();
        if (threadIdx.x == 0) tp_exchange::expect(&b.fresh, fresh_bytes);
        if (member < parts) attend_stretch<LANES>(p, from, b, mine, member, cluster, next);
        held o;
        hold(p, r, O, o);
        tp_exchange::wait(&b.stretches, parity);
        join_stretches(p, parts);
        if (threadIdx.x == 0) tp_exchange::expect(&b.stretches, stretches_bytes);
        post_sum(p, r, O, cluster, member, multiply_row(p, r, O, room<void>(p.mixed), o), tag);
        r.fetch(p, O, l + 1);
        held gate_up;
        hold(p, r, GATE_UP, gate_up);
        add_posted(p, O, x, tag);

        put_normed(p, x, norm, reduce);
        load_norm(p, table[min(l + 1, p.n_layers - 1)].norm1, norm);
        send_active(p, b, member, multiply_row(p, r, GATE_UP, room<void>(p.normed), gate_up));
        r.fetch(p, GATE_UP, l + 1);
        held down;
        hold(p, r, DOWN, down);
        tp_exchange::wait(&b.active, parity);
        post_sum(p, r, DOWN, cluster, member, multiply_row(p, r, DOWN, room<void>(p.active), down), tag);
        r.fetch(p, DOWN, l + 1);
        if (threadIdx.x == 0) tp_exchange::expect(&b.active, p.feed * 2);
        hold(p, r, QKV, first);
        add_posted(p, DOWN, x, tag);
    }
    if (blockIdx.x != 0) return;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int pair = threadIdx.x + i * THREADS;
        if (pair < p.hidden / 2) reinterpret_cast<uint32_t *>(p.x)[pair] = tp_pack_bf16(x.x[i].x, x.x[i].y);
    }
    if (threadIdx.x == 0) *p.tags = tags + (uint32_t)p.n_layers;
}

#endif

template <int LANES> __global__ void __launch_bounds__(THREADS + 32, 1) layers_kernel(const __grid_constant__ params p)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    __shared__ barriers b;
    __shared__ __align__(16) float reduce[WARPS], angles[LANES * PIECE];
    __shared__ int progress;
    const int cluster = (int)blockIdx.x / MEMBERS, member = (int)blockIdx.x % MEMBERS;
    if (threadIdx.x == 0) {
        tp_exchange::open(&b.fresh, 1);
        tp_exchange::open(&b.stretches, 1);
        tp_exchange::open(&b.active, 1);
        tp_exchange::opened();
        progress = 0;
    }
    const uint64_t *table = reinterpret_cast<const uint64_t *>(p.layers);
    for (int i = threadIdx.x; i < p.n_layers * (int)(sizeof(layer) / 8); i += (int)blockDim.x)
        room<uint64_t>(p.table)[i] = __ldg(table + i);
    __syncthreads();
    tp_chain_begin();
    reader r;
    if (threadIdx.x < THREADS) {
        r.open(p, cluster, member);
        for (int i = 0; i < PRODUCTS; i++) r.fetch(p, i, 0);
    }
    tp_cluster::meet(); /* before anyone sends */
    if (threadIdx.x >= THREADS) {
        prefetch(p, &progress, cluster, member);
    } else {
        tp_chain_wait();
        compute<LANES>(p, b, r, cluster, member, reduce, angles, &progress);
    }
#else
    (void)p;
#endif
}

using kernel = void (*)(params);

} // namespace

struct tp_layers {
    params p;
    kernel run;
    size_t shared, bytes;
    void *memory; /* device: the table, the mail, the tags */
};

namespace
{

/* ---- what fits ---- */

shape shape_of(int64_t rows, int64_t columns, int unit)
{
    shape s = {};
    s.rows = (int)rows, s.chunks = (int)columns / 32;
    s.of_warp = (int)(tp_cuda_ceil(tp_cuda_ceil(rows, WARPS), unit) * unit);
    return s;
}

/* A place of so many bytes in shared memory, behind the ones before. */
int place(int *end, size_t bytes)
{
    const int at = *end;
    *end += (int)((bytes + 127) / 128 * 128);
    return at;
}

/* The bytes of shared memory. */
int lay_out(params *p)
{
    int end = 0;
    const int records = p->group * (p->head_dim + 4) * 4;
    for (shape &s : p->shapes) s.at = place(&end, (size_t)s.of_warp * WARPS * (size_t)s.chunks * 64);
    p->table = place(&end, sizeof(layer) * (size_t)p->n_layers);
    p->normed = place(&end, (size_t)p->hidden * 2);
    p->fresh = place(&end, (size_t)(p->group + 2) * p->head_dim * 4);
    p->heads = place(&end, (size_t)(p->group + 1) * p->head_dim * 4);
    p->stretches = place(&end, (size_t)records * MEMBERS);
    p->records = place(&end, (size_t)records * WARPS);
    p->mixed = place(&end, (size_t)p->group * p->head_dim * 2);
    p->active = place(&end, (size_t)p->feed * 2);
    return end;
}

bool weights_suit(const tp_layers_args *a)
{
    for (int l = 0; l < a->n_layers; l++) {
        const tp_layers_block *b = &a->blocks[l];
        for (int i = 0; i < TP_LAYERS_LINEARS; i++) {
            const tp_matrix *w = &b->w[i], *first = &a->blocks[0].w[i];
            if (w->format != TP_FORMAT_BF16 || w->transposed || !tp_matrix_aligned(w) || w->rope_pairs != first->rope_pairs ||
                tp_matrix_row_bytes(w) != tp_matrix_row_bytes(first) ||
                w->rows * tp_matrix_row_bytes(w) > UINT32_MAX)
                return false;
        }
        const tp_rows *caches[] = {&b->cache_k, &b->cache_v};
        for (const tp_rows *rows : caches)
            if (rows->dtype != TP_BF16 || !tp_rows_aligned(*rows) || rows->ld != a->blocks[0].cache_k.ld) return false;
        if (!tp_pointer_aligned(b->norm1) || !tp_pointer_aligned(b->norm2)) return false;
    }
    return true;
}

bool shapes_suit(const tp_layers_args *a)
{
    const int64_t clusters = a->kv_heads, unit = 8 * MEMBERS;
    return a->n_layers > 0 && clusters >= 1 && clusters <= CLUSTERS_MAX && a->heads % clusters == 0 &&
           a->heads / clusters <= 8 && (a->head_dim == 64 || a->head_dim == 128) && a->hidden <= HIDDEN_MAX &&
           a->hidden % (2 * MEMBERS) == 0 && a->hidden % 32 == 0 && a->feed % (clusters * unit) == 0 && a->x.dtype == TP_BF16 &&
           tp_pointer_aligned(a->x.data) && weights_suit(a);
}

void configure(tp_ctx *ctx, const tp_layers *layers, cudaLaunchConfig_t *config, cudaLaunchAttribute attributes[2])
{
    *config = {};
    attributes[0] = {}, attributes[1] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = MEMBERS, attributes[0].val.clusterDim.y = 1, attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config->gridDim = dim3((unsigned)(layers->p.clusters * MEMBERS)), config->blockDim = dim3(THREADS + 32);
    config->dynamicSmemBytes = layers->shared, config->stream = tp_cuda_of(ctx)->stream;
    config->attrs = attributes, config->numAttrs = 2;
}

/* Whether all clusters can run at once. */
tp_status fits(tp_ctx *ctx, const tp_layers *layers, bool *yes)
{
    cudaLaunchConfig_t config;
    cudaLaunchAttribute attributes[2];
    int clusters = 0;
    configure(ctx, layers, &config, attributes);
    config.numAttrs = 1;
    TP_TRY(tp_cuda_check(ctx, "layers", cudaFuncSetAttribute((const void *)layers->run, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)));
    TP_TRY(tp_cuda_check(ctx, "layers", cudaFuncSetAttribute((const void *)layers->run, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)layers->shared)));
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, (const void *)layers->run, &config);
    if (error != cudaSuccess) (void)cudaGetLastError();
    *yes = error == cudaSuccess && clusters >= layers->p.clusters;
    return TP_OK;
}

params params_of(const tp_layers_args *a)
{
    params p = {};
    p.n_layers = a->n_layers, p.clusters = (int)a->kv_heads, p.hidden = (int)a->hidden, p.head_dim = (int)a->head_dim;
    p.group = (int)(a->heads / a->kv_heads), p.feed = (int)(a->feed / a->kv_heads);
    for (int i = 0; i < TP_LAYERS_LINEARS; i++) {
        p.row_bytes[i] = (uint32_t)tp_matrix_row_bytes(&a->blocks[0].w[i]);
        p.rope_pairs[i] = a->blocks[0].w[i].rope_pairs;
    }
    p.cache_ld = a->blocks[0].cache_k.ld;
    p.shapes[QKV] = shape_of((p.group + 2) * p.head_dim / MEMBERS, p.hidden, 4);
    p.shapes[O] = shape_of(p.hidden / MEMBERS, p.group * p.head_dim, 1);
    p.shapes[GATE_UP] = shape_of(2 * p.feed / MEMBERS, p.hidden, ROWS);
    p.shapes[DOWN] = shape_of(p.hidden / MEMBERS, p.feed, 1);
    p.x = (__nv_bfloat16 *)a->x.data;
    p.eps = a->eps, p.scale = a->scale, p.cosine = a->cos, p.sine = a->sin, p.used = a->used;
    return p;
}

/* The table to the device, behind which there is room for mail and tags. */
tp_status fill(tp_ctx *ctx, const tp_layers_args *a, tp_layers *layers)
{
    const tp_backend *backend = ctx->device->backend;
    const size_t table = sizeof(layer) * (size_t)a->n_layers, mail = (size_t)(2 * a->kv_heads * a->hidden) * 8;
    const size_t before = (table + 255) / 256 * 256;
    layers->bytes = before + mail + 256;
    layer *host = (layer *)tp_alloc(ctx, (size_t)a->n_layers, sizeof *host);
    if (host == NULL) return TP_NOMEM;
    for (int l = 0; l < a->n_layers; l++) {
        const tp_layers_block *b = &a->blocks[l];
        for (int i = 0; i < TP_LAYERS_LINEARS; i++) host[l].w[i] = (const unsigned char *)b->w[i].data;
        host[l].norm1 = b->norm1, host[l].norm2 = b->norm2;
        host[l].cache_k = (__nv_bfloat16 *)b->cache_k.data, host[l].cache_v = (__nv_bfloat16 *)b->cache_v.data;
    }
    layers->memory = backend->alloc(ctx, ctx->device, layers->bytes);
    tp_status status = layers->memory == NULL ? TP_NOMEM : backend->copy_in(ctx, layers->memory, host, table);
    tp_free(host);
    layers->p.layers = (const layer *)layers->memory;
    layers->p.mail = (uint64_t *)((char *)layers->memory + before);
    layers->p.tags = (uint32_t *)((char *)layers->memory + before + mail);
    return status;
}

} // namespace

extern "C" tp_status tp_cuda_layers_open(tp_ctx *ctx, const tp_layers_args *a, tp_layers **result)
{
    *result = NULL;
    if (!tp_cuda_of(ctx)->clusters || !shapes_suit(a)) return TP_OK;
    params p = params_of(a);
    const int shared = lay_out(&p);
    for (const shape &s : p.shapes)
        if (s.of_warp > ROWS) return TP_OK;
    if (shared > SHARED_MOST) return TP_OK;
    tp_layers *layers = (tp_layers *)tp_alloc(ctx, 1, sizeof *layers);
    if (layers == NULL) return TP_NOMEM;
    *layers = {};
    layers->p = p, layers->shared = (size_t)shared;
    layers->run = p.head_dim == 64 ? (kernel)layers_kernel<8> : (kernel)layers_kernel<16>;
    bool yes = false;
    tp_status status = fits(ctx, layers, &yes);
    if (status == TP_OK && yes) status = fill(ctx, a, layers);
    if (status == TP_OK && yes)
        *result = layers;
    else
        tp_cuda_layers_close(ctx->device, layers);
    return status;
}

extern "C" tp_status tp_cuda_layers_run(tp_ctx *ctx, tp_layers *layers)
{
    cudaLaunchConfig_t config;
    cudaLaunchAttribute attributes[2];
    configure(ctx, layers, &config, attributes);
    return tp_cuda_check(ctx, "layers", cudaLaunchKernelEx(&config, layers->run, layers->p));
}

extern "C" void tp_cuda_layers_close(tp_device *device, tp_layers *layers)
{
    if (layers == NULL) return;
    if (layers->memory != NULL) device->backend->free(device, layers->memory, layers->bytes);
    tp_free(layers);
}
