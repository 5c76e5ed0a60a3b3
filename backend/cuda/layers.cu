/* All layers of one token in one kernel: decoding with a model so small that the kernels of a layer cost more to start than
 * to run.
 *
 * A cluster of MEMBERS blocks is a key head with its query heads, and a share of the feed-forward channels. Each block has its
 * rows of every product of its cluster, and a warp that streams them through a ring in shared memory, layers ahead of their
 * use; what the blocks wait for is only each other, five times a layer:
 *
 *     q, k, v of the cluster's heads       -> to all blocks of the cluster
 *     attention over a stretch of the keys -> to all blocks of the cluster
 *     o, of the cluster's heads alone      -> to all blocks; the sum over clusters is added to x, which every block holds
 *     gate, up, SwiGLU                     -> to all blocks of the cluster
 *     down, of the cluster's channels      -> to all blocks
 *
 * (exchange.cuh says how.) Buffers are used anew in every layer: whoever sends the next layer's has seen what all blocks sent
 * at the end of this one, hence after they read the buffer. Sums are in fixed orders, of f32; products are by tensor cores, of
 * which a single row of x uses an eighth: reading is what counts. */
#include "backend/cuda/chain.cuh"
#include "backend/cuda/cluster.cuh"
#include "backend/cuda/decode.cuh"
#include "backend/cuda/exchange.cuh"
#include "backend/cuda/hopper.cuh"
#include "backend/cuda/layers.cuh"
#include "base/mem.h"

namespace
{

constexpr int MEMBERS = 16;
constexpr int WARPS = 16, THREADS = WARPS * 32; /* that compute */
constexpr int STREAMERS = 4;                    /* warps that stream */
constexpr int PREFETCH = 2;                     /* layers that weights come to the cache of the GPU before they are streamed */
constexpr int TILE = 16;                        /* rows of a stage of the ring, at most */
constexpr int COLUMNS = 576;                    /* and columns */
constexpr int PAIRS = 2;                        /* of neighbouring channels of x that a thread holds */
constexpr int HIDDEN_MAX = PAIRS * THREADS * 2;
constexpr int CLUSTERS_MAX = 8, TOGETHER = 3; /* clusters whose sums a thread waits for at once */
constexpr int GROUP = 4; /* query heads at a time */
constexpr int PIECE = 8; /* channels of a lane */
constexpr int SLOTS_MAX = 32;
static_assert(MEMBERS == WARPS, "a warp sends to each member");
constexpr int HELD = 5; /* chunks of 32 columns of w that a warp holds before x is there */
constexpr int SHARED_MOST = 226 << 10;

enum product { QKV, O, GATE_UP, DOWN, PRODUCTS };

/* The rows of a product that a block has: in tiles, each in `blocks` blocks of columns; a tile's block is a stage of the ring,
 * whose columns `splits` warps share. */
struct shape {
    int rows, tiles, tile_rows, columns, blocks, block_columns, pitch, splits;
    int sums;   /* where they lie in shared memory, [blocks * splits, rows] */
    bool early; /* a warp has one unit at most, and all stages fit into the ring: units are held before x is there */
};

struct layer {
    const unsigned char *w[TP_LAYERS_LINEARS];
    const float *norm1, *norm2;
    __nv_bfloat16 *cache_k, *cache_v;
};

struct params {
    const layer *layers;
    int n_layers, clusters, hidden, group, head_dim, feed; /* feed: of a cluster */
    int64_t row_bytes[TP_LAYERS_LINEARS], cache_ld;
    int rope_pairs[TP_LAYERS_LINEARS];
    shape shapes[PRODUCTS];
    int slots, slot_bytes;
    int table, normed, fresh, heads, stretches, records, mine, mixed, active, ring; /* where things lie in shared memory */
    __nv_bfloat16 *x;
    float eps, scale;
    const float *cosine, *sine;
    const int32_t *used;
    uint64_t *mail; /* [2, clusters, hidden] */
    uint32_t *tags; /* used up so far */
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/* Barriers: of the ring, and of what the cluster sends. */
struct barriers {
    uint64_t full[SLOTS_MAX], empty[SLOTS_MAX], fresh, stretches, active;
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

/* Row `row` of this block's, from its first column on. */
__device__ __forceinline__ const unsigned char *row_of(const params &p, const layer &from, int product, int row, int cluster,
                                                       int member)
{
    const int heads = p.group * p.head_dim, mine = p.shapes[product].rows;
    int w, column = 0;
    if (product == QKV) {
        row += member * mine;
        if (row < heads)
            w = TP_LAYERS_Q, row += cluster * heads;
        else if (row < heads + p.head_dim)
            w = TP_LAYERS_K, row += cluster * p.head_dim - heads;
        else
            w = TP_LAYERS_V, row += cluster * p.head_dim - heads - p.head_dim;
    } else if (product == GATE_UP) {
        w = row < mine / 2 ? TP_LAYERS_GATE : TP_LAYERS_UP;
        row = row % (mine / 2) + cluster * p.feed + member * (mine / 2);
    } else {
        w = product == O ? TP_LAYERS_O : TP_LAYERS_DOWN;
        row += member * mine;
        column = cluster * (product == O ? heads : p.feed);
    }
    return from.w[w] + tp_device_stored_row(p.rope_pairs[w], row) * p.row_bytes[w] + 2 * (int64_t)column;
}

/* A layer's rows of this block to the cache of the GPU. */
__device__ __forceinline__ void prefetch(const params &p, const layer &from, int cluster, int member)
{
    for (int product = 0; product < PRODUCTS; product++) {
        const shape &s = p.shapes[product];
        const int lines = (s.columns * 2 + 127) / 128;
        for (int i = threadIdx.x - THREADS; i < s.rows * lines; i += STREAMERS * 32)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(row_of(p, from, product, i / lines, cluster, member) + i % lines * 128));
    }
}

/* The warps that stream: each takes rows of a stage in turn. */
__device__ __forceinline__ void stream(const params &p, barriers &b, int cluster, int member)
{
    const int lane = threadIdx.x % 32, warp = (threadIdx.x - THREADS) / 32;
    const layer *table = room<layer>(p.table);
    int slot = 0;
    uint32_t round = 0;
    for (int l = 1; l < PREFETCH && l < p.n_layers; l++) prefetch(p, table[l], cluster, member);
    for (int l = 0; l < p.n_layers; l++) {
        if (l + PREFETCH < p.n_layers) prefetch(p, table[l + PREFETCH], cluster, member);
        for (int product = 0; product < PRODUCTS; product++) {
            const shape &s = p.shapes[product];
            for (int tile = 0; tile < s.tiles; tile++) {
                const int rows = min(s.tile_rows, s.rows - tile * s.tile_rows);
                for (int block = 0; block < s.blocks; block++) {
                    const int first = block * s.block_columns, bytes = 2 * min(s.block_columns, s.columns - first);
                    if (round > 0) tp_exchange::wait(&b.empty[slot], (round - 1) & 1);
                    for (int row = warp; row < rows; row += STREAMERS) {
                        const unsigned char *w =
                            row_of(p, table[l], product, tile * s.tile_rows + row, cluster, member) + 2 * (int64_t)first;
                        unsigned char *to = memory + p.ring + slot * p.slot_bytes + row * s.pitch;
                        for (int at = lane * 16; at < bytes; at += 512) tp_exchange::fetch(to + at, w + at);
                    }
                    tp_exchange::arrive_after_fetches(&b.full[slot]);
                    if (++slot == p.slots) slot = 0, round++;
                }
            }
        }
    }
}

/* ---- products ---- */

__device__ __forceinline__ void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1)
{
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* What a warp does at a time: columns begin .. end, in chunks of 32, of a stage. */
struct unit {
    int slot, round, tile, part, first, begin, end;
    const unsigned char *w; /* this lane's: rows g and g + 8, 16 bytes of each chunk */
};

/* `stage` counts stages of the whole run. */
__device__ __forceinline__ unit unit_of(const params &p, const shape &s, uint32_t stage, int i)
{
    unit u;
    const int local = i / s.splits, split = i % s.splits, block = local % s.blocks, lane = threadIdx.x % 32;
    const uint32_t number = stage + (uint32_t)local;
    u.round = (int)(number / (uint32_t)p.slots), u.slot = (int)(number % (uint32_t)p.slots);
    u.tile = local / s.blocks, u.part = block * s.splits + split, u.first = block * s.block_columns;
    const int chunks = min(s.block_columns, s.columns - u.first) / 32;
    u.begin = chunks * split / s.splits, u.end = chunks * (split + 1) / s.splits;
    u.w = memory + p.ring + u.slot * p.slot_bytes + lane / 4 * s.pitch + lane % 4 * 16;
    return u;
}

/* Part of a warp's unit, in registers. */
struct held {
    uint4 low[HELD], high[HELD];
};

__device__ __forceinline__ void hold(const shape &s, const unit &u, int begin, held &w)
{
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        if (begin + i >= u.end) continue;
        w.low[i] = *reinterpret_cast<const uint4 *>(u.w + (begin + i) * 64);
        w.high[i] = *reinterpret_cast<const uint4 *>(u.w + (begin + i) * 64 + 8 * s.pitch);
    }
}

/* A warp's first unit of a product, as far as it fits, before x is there. */
__device__ __forceinline__ void hold_first(const params &p, barriers &b, int product, uint32_t stage, held &w)
{
    const shape &s = p.shapes[product];
    const int i = threadIdx.x / 32;
    if (!s.early || i >= s.tiles * s.blocks * s.splits) return;
    const unit u = unit_of(p, s, stage, i);
    tp_exchange::wait(&b.full[u.slot], u.round & 1);
    hold(s, u, u.begin, w);
}

/* This block's rows with x, in parts of the columns, to its sums. */
__device__ __forceinline__ void multiply_rows(const params &p, barriers &b, int product, uint32_t &stage, const __nv_bfloat16 *x, held &w)
{
    const shape &s = p.shapes[product];
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, units = s.tiles * s.blocks * s.splits;
    float *sums = room<float>(s.sums);
    for (int i = threadIdx.x / 32; i < units; i += WARPS) {
        const unit u = unit_of(p, s, stage, i);
        const unsigned char *from = reinterpret_cast<const unsigned char *>(x + u.first) + t * 16;
        float c[4] = {}, d[4] = {};
        if (!s.early) {
            tp_exchange::wait(&b.full[u.slot], u.round & 1);
            hold(s, u, u.begin, w);
        }
        for (int begin = u.begin; begin < u.end; begin += HELD) {
            if (begin > u.begin) hold(s, u, begin, w);
#pragma unroll
            for (int j = 0; j < HELD; j++) {
                if (begin + j >= u.end) continue;
                uint4 v = make_uint4(0, 0, 0, 0);
                if (g == 0) v = *reinterpret_cast<const uint4 *>(from + (begin + j) * 64);
                multiply(c, w.low[j].x, w.high[j].x, w.low[j].y, w.high[j].y, v.x, v.y);
                multiply(d, w.low[j].z, w.high[j].z, w.low[j].w, w.high[j].w, v.z, v.w);
            }
        }
        __syncwarp();
        if (lane == 0) tp_exchange::arrive(&b.empty[u.slot], WARPS / s.splits);
        if (t == 0) {
            const int row = u.tile * s.tile_rows + g;
            if (g < s.tile_rows && row < s.rows) sums[u.part * s.rows + row] = c[0] + d[0];
            if (g + 8 < s.tile_rows && row + 8 < s.rows) sums[u.part * s.rows + row + 8] = c[2] + d[2];
        }
    }
    stage += (uint32_t)(s.tiles * s.blocks);
    meet();
}

__device__ __forceinline__ float sum_of(const shape &s, int row)
{
    float sum = 0.0f;
    for (int part = 0; part < s.blocks * s.splits; part++) sum += room<float>(s.sums)[part * s.rows + row];
    return sum;
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
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; i++) sum += reduce[i];
    const float rstd = 1.0f / sqrtf(sum / (float)p.hidden + p.eps);
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int pair = threadIdx.x + i * THREADS;
        if (pair >= p.hidden / 2) continue;
        room<uint32_t>(p.normed)[pair] =
            tp_pack_bf16(tp_round_bf16(x.x[i].x * rstd) * w.x[i].x, tp_round_bf16(x.x[i].y * rstd) * w.x[i].y);
    }
    meet();
}

/* This block's sums to all blocks. */
__device__ __forceinline__ void post_sums(const params &p, int product, int cluster, int member, uint32_t tag)
{
    const shape &s = p.shapes[product];
    uint64_t *mail = p.mail + ((product == DOWN ? p.clusters : 0) + cluster) * p.hidden + member * s.rows;
    for (int row = threadIdx.x; row < s.rows; row += THREADS) tp_exchange::post(mail + row, sum_of(s, row), tag);
}

/* x += the sums of all clusters. */
__device__ __forceinline__ void add_posted(const params &p, int product, channels &x, uint32_t tag)
{
    const uint64_t *mail = p.mail + (product == DOWN ? p.clusters * p.hidden : 0);
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int pair = threadIdx.x + i * THREADS;
        if (pair >= p.hidden / 2) continue;
        float2 sum = make_float2(0, 0);
        for (int first = 0; first < p.clusters; first += TOGETHER) {
            ulonglong2 words[TOGETHER];
            for (bool all = false; !all;) {
                all = true;
#pragma unroll
                for (int c = 0; c < TOGETHER; c++)
                    if (first + c < p.clusters) words[c] = tp_exchange::peek(mail + (first + c) * p.hidden + 2 * pair);
#pragma unroll
                for (int c = 0; c < TOGETHER; c++)
                    if (first + c < p.clusters) all = all && tp_exchange::has_come(words[c], tag);
            }
#pragma unroll
            for (int c = 0; c < TOGETHER; c++) {
                if (first + c >= p.clusters) continue;
                const float2 v = tp_exchange::values_of(words[c]);
                sum.x += v.x, sum.y += v.y;
            }
        }
        x.x[i].x = tp_round_bf16(sum.x + x.x[i].x), x.x[i].y = tp_round_bf16(sum.y + x.x[i].y);
    }
}

/* ---- to the cluster ---- */

/* q, k and v, as bf16 would hold them. */
__device__ __forceinline__ void send_fresh(const params &p, barriers &b, int member)
{
    const shape &s = p.shapes[QKV];
    const int lane = threadIdx.x % 32, to = threadIdx.x / 32;
    for (int first = 0; first < s.rows; first += 32) {
        const float v = first + lane < s.rows ? tp_round_bf16(sum_of(s, first + lane)) : 0.0f;
        uint4 four;
        four.x = __float_as_uint(__shfl_sync(0xffffffffu, v, lane * 4 % 32));
        four.y = __float_as_uint(__shfl_sync(0xffffffffu, v, lane * 4 % 32 + 1));
        four.z = __float_as_uint(__shfl_sync(0xffffffffu, v, lane * 4 % 32 + 2));
        four.w = __float_as_uint(__shfl_sync(0xffffffffu, v, lane * 4 % 32 + 3));
        const float *at = room<float>(p.fresh) + member * s.rows + first + lane * 4;
        if (lane < 8 && first + lane * 4 < s.rows)
            tp_exchange::send(tp_exchange::there(at, to), four, tp_exchange::there(&b.fresh, to));
    }
}

__device__ __forceinline__ void send_active(const params &p, barriers &b, int member)
{
    const shape &s = p.shapes[GATE_UP];
    const int lane = threadIdx.x % 32, to = threadIdx.x / 32, channels = s.rows / 2;
    for (int first = 0; first < channels; first += 32) {
        float v = 0.0f;
        if (first + lane < channels) {
            const float gate = tp_round_bf16(sum_of(s, first + lane)),
                        up = tp_round_bf16(sum_of(s, channels + first + lane));
            v = __fdividef(gate, 1.0f + __expf(-gate)) * up;
        }
        const uint32_t pair = tp_pack_bf16(v, __shfl_down_sync(0xffffffffu, v, 1));
        uint4 eight;
        eight.x = __shfl_sync(0xffffffffu, pair, lane * 8 % 32), eight.y = __shfl_sync(0xffffffffu, pair, lane * 8 % 32 + 2);
        eight.z = __shfl_sync(0xffffffffu, pair, lane * 8 % 32 + 4), eight.w = __shfl_sync(0xffffffffu, pair, lane * 8 % 32 + 6);
        const __nv_bfloat16 *at = room<__nv_bfloat16>(p.active) + member * channels + first + lane * 8;
        if (lane < 4 && first + lane * 8 < channels)
            tp_exchange::send(tp_exchange::there(at, to), eight, tp_exchange::there(&b.active, to));
    }
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
__device__ __forceinline__ void attend_stretch(const params &p, const layer &from, barriers &b, const stretch &s, int part, int cluster,
                               keys<LANES> &next)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, words = record(p) / 4;
    for (int head0 = 0; head0 < p.group; head0 += GROUP) {
        if (head0 > 0) next.fetch(p, from, s, s.begin + threadIdx.x / LANES, cluster);
        attend_heads<LANES>(p, from, s, head0, cluster, next);
    }
    meet();
    const int warps = min(WARPS, (s.end - s.begin + keys<LANES>::OF_WARP - 1) / keys<LANES>::OF_WARP);
    for (int i = warp; i < p.group * p.head_dim / 32; i += WARPS) {
        const int g = i * 32 / p.head_dim, channel = i * 32 % p.head_dim + lane;
        float most, sum, *to = room<float>(p.mine) + g * record(p);
        to[channel] = join(p, room<float>(p.records) + g * record(p), warps, p.group * record(p), channel, most, sum);
        if (channel == 0) to[p.head_dim] = most, to[p.head_dim + 1] = sum;
    }
    meet();
    const uint32_t there = tp_exchange::there(room<float>(p.stretches) + part * p.group * record(p), warp),
                   barrier = tp_exchange::there(&b.stretches, warp);
    for (int i = lane; i < p.group * words; i += 32)
        tp_exchange::send(there + (uint32_t)i * 16, room<uint4>(p.mine)[i], barrier);
    if (s.end != s.used + 1) return;
    for (int c = threadIdx.x; c < p.head_dim; c += THREADS) {
        const int64_t at = s.used * p.cache_ld + cluster * p.head_dim + c;
        from.cache_k[at] = __float2bfloat16_rn(room<float>(p.heads)[p.group * p.head_dim + c]);
        from.cache_v[at] = __float2bfloat16_rn(room<float>(p.fresh)[(p.group + 1) * p.head_dim + c]);
    }
}

/* The cluster's heads, as bf16. */
__device__ __forceinline__ void join_stretches(const params &p, int parts)
{
    const int lane = threadIdx.x % 32;
    for (int i = threadIdx.x / 32; i < p.group * p.head_dim / 32; i += WARPS) {
        const int g = i * 32 / p.head_dim, channel = i * 32 % p.head_dim + lane;
        float most, sum;
        const float out = join(p, room<float>(p.stretches) + g * record(p), parts, p.group * record(p), channel, most, sum);
        room<__nv_bfloat16>(p.mixed)[i * 32 + lane] = __float2bfloat16_rn(out / sum);
    }
    meet();
}

/* ---- all layers ---- */

template <int LANES> __device__ __forceinline__ void compute(const params &p, barriers &b, int cluster, int member, float *reduce, float *angles)
{
    const int half = p.head_dim / 2, used = *p.used, keys_of_part = ((used + MEMBERS) / MEMBERS + keys<LANES>::STEP - 1) /
                                                                     keys<LANES>::STEP * keys<LANES>::STEP;
    const int parts = used / keys_of_part + 1, begin = member * keys_of_part;
    const stretch mine = {begin, min(used + 1, begin + keys_of_part), used};
    const int first_key = begin + threadIdx.x / LANES;
    const uint32_t tags = *p.tags;
    const layer *table = room<layer>(p.table);
    uint32_t stage = 0;
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
        tp_exchange::expect(&b.fresh, (p.group + 2) * p.head_dim * 4);
        tp_exchange::expect(&b.stretches, parts * p.group * record(p) * 4);
        tp_exchange::expect(&b.active, p.feed * 2);
    }
    held w;
    hold_first(p, b, QKV, stage, w);
    for (int l = 0; l < p.n_layers; l++) {
        const layer &from = table[l];
        const uint32_t parity = l & 1, tag = tags + (uint32_t)l + 1;
        keys<LANES> next;
        if (member < parts) next.fetch(p, from, mine, first_key, cluster);

        put_normed(p, x, norm, reduce);
        load_norm(p, from.norm2, norm);
        multiply_rows(p, b, QKV, stage, room<__nv_bfloat16>(p.normed), w);
        send_fresh(p, b, member);
        tp_exchange::wait(&b.fresh, parity);
        rotate(p, angles);
        meet();
        if (threadIdx.x == 0) tp_exchange::expect(&b.fresh, (p.group + 2) * p.head_dim * 4);
        if (member < parts) attend_stretch<LANES>(p, from, b, mine, member, cluster, next);
        hold_first(p, b, O, stage, w);
        tp_exchange::wait(&b.stretches, parity);
        join_stretches(p, parts);
        if (threadIdx.x == 0) tp_exchange::expect(&b.stretches, parts * p.group * record(p) * 4);
        multiply_rows(p, b, O, stage, room<__nv_bfloat16>(p.mixed), w);
        post_sums(p, O, cluster, member, tag);
        hold_first(p, b, GATE_UP, stage, w);
        add_posted(p, O, x, tag);

        put_normed(p, x, norm, reduce);
        load_norm(p, table[min(l + 1, p.n_layers - 1)].norm1, norm);
        multiply_rows(p, b, GATE_UP, stage, room<__nv_bfloat16>(p.normed), w);
        send_active(p, b, member);
        hold_first(p, b, DOWN, stage, w);
        tp_exchange::wait(&b.active, parity);
        multiply_rows(p, b, DOWN, stage, room<__nv_bfloat16>(p.active), w);
        if (threadIdx.x == 0) tp_exchange::expect(&b.active, p.feed * 2);
        post_sums(p, DOWN, cluster, member, tag);
        if (l + 1 < p.n_layers) hold_first(p, b, QKV, stage, w);
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

template <int LANES> __global__ void __launch_bounds__(THREADS + STREAMERS * 32, 1) layers_kernel(const __grid_constant__ params p)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    __shared__ barriers b;
    __shared__ float reduce[WARPS], angles[LANES * PIECE];
    const int cluster = (int)blockIdx.x / MEMBERS, member = (int)blockIdx.x % MEMBERS;
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.slots; i++) {
            tp_exchange::open(&b.full[i], STREAMERS * 32);
            tp_exchange::open(&b.empty[i], WARPS);
        }
        tp_exchange::open(&b.fresh, 1);
        tp_exchange::open(&b.stretches, 1);
        tp_exchange::open(&b.active, 1);
        tp_exchange::opened();
    }
    const uint64_t *table = reinterpret_cast<const uint64_t *>(p.layers);
    for (int i = threadIdx.x; i < p.n_layers * (int)(sizeof(layer) / 8); i += (int)blockDim.x)
        room<uint64_t>(p.table)[i] = __ldg(table + i);
    __syncthreads();
    tp_cluster::meet(); /* before anyone sends */
    tp_chain_begin();
    if (threadIdx.x >= THREADS) {
#if TP_HOPPER
        tp_hopper::give_registers<64>();
#endif
        stream(p, b, cluster, member);
    } else {
#if TP_HOPPER
        tp_hopper::take_registers<104>();
#endif
        tp_chain_wait();
        compute<LANES>(p, b, cluster, member, reduce, angles);
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

shape shape_of(int64_t rows, int64_t columns)
{
    shape s = {};
    s.rows = (int)rows, s.columns = (int)columns;
    s.tiles = (int)tp_cuda_ceil(rows, TILE), s.tile_rows = (int)tp_cuda_ceil(rows, s.tiles);
    s.blocks = (int)tp_cuda_ceil(columns, COLUMNS);
    s.block_columns = (int)tp_cuda_ceil(columns, s.blocks * 32) * 32;
    s.pitch = s.block_columns * 2;
    if (s.pitch % 128 == 0) s.pitch += 64; /* two rows of 64 bytes in different banks */
    s.splits = 1;
    while (s.splits < WARPS && s.tiles * s.blocks * s.splits * 2 <= WARPS) s.splits *= 2;
    return s;
}

/* A place of so many bytes in shared memory, behind the ones before. */
int place(int *end, size_t bytes)
{
    const int at = *end;
    *end += (int)((bytes + 127) / 128 * 128);
    return at;
}

/* Whether so much shared memory and so many blocks at once can be had. */
bool lay_out(params *p)
{
    int end = 0;
    const int records = p->group * (p->head_dim + 4) * 4;
    for (shape &s : p->shapes) {
        s.sums = place(&end, (size_t)s.rows * s.blocks * s.splits * 4);
        const int slot = TILE * s.pitch;
        p->slot_bytes = slot > p->slot_bytes ? slot : p->slot_bytes;
    }
    p->table = place(&end, sizeof(layer) * (size_t)p->n_layers);
    p->normed = place(&end, (size_t)p->hidden * 2);
    p->fresh = place(&end, (size_t)(p->group + 2) * p->head_dim * 4);
    p->heads = place(&end, (size_t)(p->group + 1) * p->head_dim * 4);
    p->stretches = place(&end, (size_t)records * MEMBERS);
    p->records = place(&end, (size_t)records * WARPS);
    p->mine = place(&end, (size_t)records);
    p->mixed = place(&end, (size_t)p->group * p->head_dim * 2);
    p->active = place(&end, (size_t)p->feed * 2);
    p->ring = end;
    const int64_t slots = (SHARED_MOST - 2048 - end) / p->slot_bytes;
    p->slots = (int)tp_cuda_min(slots, SLOTS_MAX);
    for (shape &s : p->shapes) s.early = s.tiles * s.blocks * s.splits <= WARPS && s.tiles * s.blocks <= p->slots;
    return slots >= 4;
}

bool weights_suit(const tp_layers_args *a)
{
    for (int l = 0; l < a->n_layers; l++) {
        const tp_layers_block *b = &a->blocks[l];
        for (int i = 0; i < TP_LAYERS_LINEARS; i++) {
            const tp_matrix *w = &b->w[i], *first = &a->blocks[0].w[i];
            if (w->format != TP_FORMAT_BF16 || w->transposed || !tp_matrix_aligned(w) || w->rope_pairs != first->rope_pairs ||
                tp_matrix_row_bytes(w) != tp_matrix_row_bytes(first))
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
    config->gridDim = dim3((unsigned)(layers->p.clusters * MEMBERS)), config->blockDim = dim3(THREADS + STREAMERS * 32);
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
        p.row_bytes[i] = tp_matrix_row_bytes(&a->blocks[0].w[i]);
        p.rope_pairs[i] = a->blocks[0].w[i].rope_pairs;
    }
    p.cache_ld = a->blocks[0].cache_k.ld;
    p.shapes[QKV] = shape_of((p.group + 2) * p.head_dim / MEMBERS, p.hidden);
    p.shapes[O] = shape_of(p.hidden / MEMBERS, p.group * p.head_dim);
    p.shapes[GATE_UP] = shape_of(2 * p.feed / MEMBERS, p.hidden);
    p.shapes[DOWN] = shape_of(p.hidden / MEMBERS, p.feed);
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
    if (!lay_out(&p)) return TP_OK;
    tp_layers *layers = (tp_layers *)tp_alloc(ctx, 1, sizeof *layers);
    if (layers == NULL) return TP_NOMEM;
    *layers = {};
    layers->p = p, layers->shared = (size_t)(p.ring + p.slots * p.slot_bytes);
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
