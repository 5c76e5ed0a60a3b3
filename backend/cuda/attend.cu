/* One new token of each of a few sequences: its keys and values go into the cache, its queries look at what is there.
 *
 * A block takes one key head, up to GROUP of its query heads, and one of at most TP_ATTEND_PARTS stretches of the keys, so that
 * even a single sequence keeps many multiprocessors busy. How a sequence is cut follows from its own length alone, which is
 * read from device memory: the same launch serves every length, and a row's result does not depend on the others. Lanes in
 * groups take a key each, 8 channels a lane, with the running maximum and sum of Milakov & Gimelshein 2018
 * (arXiv:1805.02867); lanes, warps and stretches are then joined in a fixed order. The stretches by whichever block ends last:
 * a counter says who that is, the sums do not depend on it. The first keys and values are fetched before the kernel that makes
 * the queries has ended. */
#include "backend/cuda/chain.cuh"

namespace
{

constexpr int WARPS = 8, THREADS = WARPS * 32;
constexpr int GROUP = 4; /* query heads of a block */
constexpr int DIM_MAX = 256;
constexpr int PIECE = 8;   /* channels of a lane */
constexpr int CHUNK = 512; /* keys of a stretch, at least */
constexpr int AHEAD = 4;   /* keys and values that a lane has on their way */

struct rows {
    unsigned char *data;
    int64_t ld;
};

struct params {
    int heads, kv_heads, head_dim, group, blocks_per_kv;
    rows q, k, v, out, cache_k, cache_v;
    const float *q_norm, *k_norm, *cosine, *sine;
    float eps, scale;
    int half, window;
    int64_t capacity;
    const int32_t *used;
    float *parts;
    int32_t *counters;
};

template <typename T> __device__ __forceinline__ float rounded(float x)
{
    return tp_to_f32(tp_from_f32<T>(x));
}

/* 8 channels of a key or value on their way. */
template <typename T> struct piece {
    static constexpr int WORDS = PIECE * sizeof(T) / 16;
    uint4 words[WORDS];
    __device__ __forceinline__ void fetch(const T *from)
    {
#pragma unroll
        for (int i = 0; i < WORDS; i++) words[i] = reinterpret_cast<const uint4 *>(from)[i];
    }
    __device__ __forceinline__ void values(float (&x)[PIECE]) const
    {
        if constexpr (WORDS == 1) {
            tp_unpack<T>(words[0].x, x[0], x[1]);
            tp_unpack<T>(words[0].y, x[2], x[3]);
            tp_unpack<T>(words[0].z, x[4], x[5]);
            tp_unpack<T>(words[0].w, x[6], x[7]);
        } else {
            const uint32_t bits[PIECE] = {words[0].x, words[0].y, words[0].z, words[0].w,
                                          words[1].x, words[1].y, words[1].z, words[1].w};
#pragma unroll
            for (int i = 0; i < PIECE; i++) x[i] = __uint_as_float(bits[i]);
        }
    }
};

/* A head of q or k as attention takes it: normed, rotated, in x [head_dim]. By one warp. */
template <typename T> __device__ void prepare_head(const params &p, const T *from, const float *weight, int row, float *x)
{
    const int lane = threadIdx.x % 32;
    float sum = 0.0f;
    for (int c = lane; c < p.head_dim; c += 32) {
        x[c] = tp_to_f32(from[c]);
        sum = fmaf(x[c], x[c], sum);
    }
    if (weight != nullptr) {
        const float rstd = 1.0f / sqrtf(tp_warp_sum(sum) / (float)p.head_dim + p.eps);
        for (int c = lane; c < p.head_dim; c += 32) x[c] = rounded<T>(rounded<T>(x[c] * rstd) * weight[c]);
    }
    __syncwarp();
    for (int c = lane; c < p.half; c += 32) { /* every product is rounded, as in rope.cu */
        const float cosine = rounded<T>(p.cosine[(int64_t)row * p.half + c]),
                    sine = rounded<T>(p.sine[(int64_t)row * p.half + c]);
        const float a = x[c], b = x[c + p.half];
        const float ac = rounded<T>(__fmul_rn(a, cosine)), bs = rounded<T>(__fmul_rn(b, sine));
        const float bc = rounded<T>(__fmul_rn(b, cosine)), as = rounded<T>(__fmul_rn(a, sine));
        x[c] = rounded<T>(__fsub_rn(ac, bs));
        x[c + p.half] = rounded<T>(__fadd_rn(bc, as));
    }
}

/* Sums over some of the keys, divided by nothing yet: weights are exp(score - most). */
struct running {
    float most, sum, out[PIECE];
};

__device__ __forceinline__ void join(running &a, float most, float sum, const float (&out)[PIECE])
{
    const float m = fmaxf(a.most, most), shift = m == -INFINITY ? 0.0f : m;
    const float mine = __expf(a.most - shift), other = __expf(most - shift);
    a.most = m;
    a.sum = a.sum * mine + sum * other;
#pragma unroll
    for (int i = 0; i < PIECE; i++) a.out[i] = a.out[i] * mine + out[i] * other;
}

/* AHEAD more keys: their scores are -inf where there is none. */
__device__ __forceinline__ void add_keys(running &a, const float (&scores)[AHEAD], const float (&v)[AHEAD][PIECE])
{
    float m = a.most;
#pragma unroll
    for (int i = 0; i < AHEAD; i++) m = fmaxf(m, scores[i]);
    const float shift = m == -INFINITY ? 0.0f : m, mine = __expf(a.most - shift);
    a.most = m;
    a.sum *= mine;
#pragma unroll
    for (int c = 0; c < PIECE; c++) a.out[c] *= mine;
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        const float weight = __expf(scores[i] - shift);
        a.sum += weight;
#pragma unroll
        for (int c = 0; c < PIECE; c++) a.out[c] = fmaf(weight, v[i][c], a.out[c]);
    }
}

template <int LANES> struct shared_room {
    static constexpr int DIM = LANES * PIECE;
    float q[GROUP][DIM], k[DIM];
    float most[WARPS][GROUP], sum[WARPS][GROUP], out[WARPS][GROUP][DIM];
    float weights[GROUP][TP_ATTEND_PARTS], inverse[GROUP];
    int last;
};

/* The stretches of a block's heads joined: by all threads, each output channel in the order of the stretches. */
template <typename T, int LANES>
__device__ void join_parts(const params &p, shared_room<LANES> &room, int row, int head0, int heads, int parts)
{
    const int64_t stride = p.head_dim + 2;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float *from = p.parts + ((int64_t)row * p.heads + head0) * TP_ATTEND_PARTS * stride;
    if (warp < heads) {
        const float *mine = from + (warp * TP_ATTEND_PARTS + lane) * stride + p.head_dim;
        const float most = lane < parts ? __ldcg(mine) : -INFINITY, sum = lane < parts ? __ldcg(mine + 1) : 0.0f;
        const float weight = __expf(most - tp_warp_max(most)), total = tp_warp_sum(weight * sum);
        room.weights[warp][lane] = weight;
        if (lane == 0) room.inverse[warp] = 1.0f / total;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < heads * p.head_dim; i += (int)blockDim.x) {
        const int g = i / p.head_dim, c = i % p.head_dim;
        float out = 0.0f;
#pragma unroll 4
        for (int part = 0; part < parts; part++)
            out = fmaf(room.weights[g][part], __ldcg(from + (g * TP_ATTEND_PARTS + part) * stride + c), out);
        reinterpret_cast<T *>(p.out.data)[row * p.out.ld + (int64_t)head0 * p.head_dim + i] =
            tp_from_f32<T>(out * room.inverse[g]);
    }
}

template <typename T, int LANES> __global__ void __launch_bounds__(THREADS) attend_kernel(const __grid_constant__ params p)
{
    __shared__ shared_room<LANES> room;
    tp_chain_begin();
    const int row = blockIdx.z, kv = (int)blockIdx.x / p.blocks_per_kv, part_of_group = (int)blockIdx.x % p.blocks_per_kv;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, sub = lane / LANES, c0 = lane % LANES * PIECE;
    const int used = p.used[row], first = p.window > 0 ? max(0, used + 1 - p.window) : 0, span = used + 1 - first;
    const int chunk = max(CHUNK, ((span + TP_ATTEND_PARTS - 1) / TP_ATTEND_PARTS + 15) / 16 * 16);
    const int parts = (span + chunk - 1) / chunk;
    if ((int)blockIdx.y >= parts) {
        tp_chain_wait(); /* being done says that what came before is */
        return;
    }
    const int begin = first + (int)blockIdx.y * chunk, end = min(used + 1, begin + chunk);
    const int head0 = kv * p.group + part_of_group * GROUP, heads = min(GROUP, p.group - part_of_group * GROUP);
    const T *k_row = reinterpret_cast<const T *>(p.k.data) + row * p.k.ld + (int64_t)kv * p.head_dim;
    const T *v_row = reinterpret_cast<const T *>(p.v.data) + row * p.v.ld + (int64_t)kv * p.head_dim;
    T *cache_k = reinterpret_cast<T *>(p.cache_k.data) + row * p.capacity * p.cache_k.ld + (int64_t)kv * p.head_dim;
    T *cache_v = reinterpret_cast<T *>(p.cache_v.data) + row * p.capacity * p.cache_v.ld + (int64_t)kv * p.head_dim;

    /* what the cache holds already is no work of the kernels before this one */
    constexpr int KEYS = 32 / LANES, STEP = WARPS * KEYS; /* keys of a warp at once, of a block */
    const bool inside = c0 < p.head_dim;
    piece<T> keys[AHEAD], values[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        const int key = begin + warp * KEYS + i * STEP + sub;
        if (inside && key < end && key != used) {
            keys[i].fetch(cache_k + (int64_t)key * p.cache_k.ld + c0);
            values[i].fetch(cache_v + (int64_t)key * p.cache_v.ld + c0);
        }
    }
    tp_chain_wait();
    if (warp < heads) {
        const T *q_row = reinterpret_cast<const T *>(p.q.data) + row * p.q.ld + (int64_t)(head0 + warp) * p.head_dim;
        prepare_head(p, q_row, p.q_norm, row, room.q[warp]);
    } else if (warp == GROUP && end == used + 1) {
        prepare_head(p, k_row, p.k_norm, row, room.k);
        __syncwarp();
        if (part_of_group == 0) {
            for (int c = lane; c < p.head_dim; c += 32) {
                cache_k[(int64_t)used * p.cache_k.ld + c] = tp_from_f32<T>(room.k[c]);
                cache_v[(int64_t)used * p.cache_v.ld + c] = v_row[c];
            }
        }
    }
    __syncthreads();

    running state[GROUP];
    float q[GROUP][PIECE];
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        state[g].most = -INFINITY, state[g].sum = 0.0f;
#pragma unroll
        for (int i = 0; i < PIECE; i++) {
            state[g].out[i] = 0.0f;
            q[g][i] = g < heads && inside ? room.q[g][c0 + i] : 0.0f;
        }
    }
    for (int base0 = begin + warp * KEYS; base0 < end; base0 += AHEAD * STEP) {
        float scores[GROUP][AHEAD], v[AHEAD][PIECE];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int key = base0 + i * STEP + sub, later = key + AHEAD * STEP;
            float k[PIECE] = {};
#pragma unroll
            for (int c = 0; c < PIECE; c++) v[i][c] = 0.0f;
            if (key < end && inside) {
                if (key == used) {
#pragma unroll
                    for (int c = 0; c < PIECE; c++) k[c] = room.k[c0 + c];
                    tp_load<PIECE>(v_row + c0, v[i]);
                } else {
                    keys[i].values(k);
                    values[i].values(v[i]);
                }
                if (later < end && later != used) {
                    keys[i].fetch(cache_k + (int64_t)later * p.cache_k.ld + c0);
                    values[i].fetch(cache_v + (int64_t)later * p.cache_v.ld + c0);
                }
            }
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                float score = 0.0f;
#pragma unroll
                for (int c = 0; c < PIECE; c++) score = fmaf(q[g][c], k[c], score);
#pragma unroll
                for (int offset = LANES / 2; offset > 0; offset /= 2) score += __shfl_xor_sync(0xffffffffu, score, offset);
                scores[g][i] = key < end ? score * p.scale : -INFINITY;
            }
        }
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            if (g < heads) add_keys(state[g], scores[g], v);
        }
    }
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        if (g >= heads) continue;
#pragma unroll
        for (int offset = LANES; offset < 32; offset *= 2) {
            const float most = __shfl_xor_sync(0xffffffffu, state[g].most, offset);
            const float sum = __shfl_xor_sync(0xffffffffu, state[g].sum, offset);
            float out[PIECE];
#pragma unroll
            for (int i = 0; i < PIECE; i++) out[i] = __shfl_xor_sync(0xffffffffu, state[g].out[i], offset);
            join(state[g], most, sum, out);
        }
        if (sub == 0 && inside) {
#pragma unroll
            for (int i = 0; i < PIECE; i++) room.out[warp][g][c0 + i] = state[g].out[i];
        }
        if (lane == 0) room.most[warp][g] = state[g].most, room.sum[warp][g] = state[g].sum;
    }
    __syncthreads();

    const int64_t stride = p.head_dim + 2;
    for (int i = threadIdx.x; i < heads * p.head_dim; i += THREADS) {
        const int g = i / p.head_dim, c = i % p.head_dim;
        float most = -INFINITY, sum = 0.0f, out = 0.0f;
        for (int w = 0; w < WARPS; w++) most = fmaxf(most, room.most[w][g]);
        for (int w = 0; w < WARPS; w++) {
            const float weight = __expf(room.most[w][g] - most);
            sum = fmaf(weight, room.sum[w][g], sum);
            out = weight == 0.0f ? out : fmaf(weight, room.out[w][g][c], out);
        }
        if (parts == 1) {
            reinterpret_cast<T *>(p.out.data)[row * p.out.ld + (int64_t)head0 * p.head_dim + i] = tp_from_f32<T>(out / sum);
        } else {
            float *to = p.parts + (((int64_t)row * p.heads + head0 + g) * TP_ATTEND_PARTS + blockIdx.y) * stride;
            to[c] = out;
            if (c == 0) to[p.head_dim] = most, to[p.head_dim + 1] = sum;
        }
    }
    if (parts == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        int32_t *counter = &p.counters[row * (int)gridDim.x + (int)blockIdx.x];
        room.last = atomicAdd(counter, 1) == parts - 1;
        if (room.last) *counter = 0;
        __threadfence();
    }
    __syncthreads();
    if (room.last) join_parts<T, LANES>(p, room, row, head0, heads, parts);
}

rows rows_of(tp_rows x)
{
    return {(unsigned char *)x.data, x.ld};
}

bool lies_well(tp_rows x, int64_t head_dim)
{
    return tp_rows_aligned(x) && head_dim * tp_cuda_size(x.dtype) % 16 == 0;
}

tp_status check(tp_ctx *ctx, const tp_attend_args *a)
{
    const tp_rows all[] = {a->q, a->k, a->v, a->out, a->cache_k, a->cache_v};
    TP_TRY(tp_cuda_check_dtype(ctx, "attend", a->q.dtype));
    for (const tp_rows &x : all) {
        if (x.dtype != a->q.dtype)
            return tp_fail(ctx, TP_UNSUPPORTED, "attend: one array is %s, another %s", tp_dtype_name(a->q.dtype),
                           tp_dtype_name(x.dtype));
    }
    if (a->head_dim % PIECE != 0 || a->head_dim > DIM_MAX || !lies_well(a->v, a->head_dim) ||
        !lies_well(a->cache_k, a->head_dim) || !lies_well(a->cache_v, a->head_dim))
        return tp_fail(ctx, TP_UNSUPPORTED, "attend: heads of %lld channels; cuda takes multiples of %d up to %d, aligned",
                       (long long)a->head_dim, PIECE, DIM_MAX);
    return TP_OK;
}

template <typename T> tp_status launch(tp_ctx *ctx, const params &p, dim3 grid)
{
    const int lanes = p.head_dim / PIECE;
    if (lanes <= 1) return tp_chain_launch(ctx, "attend", attend_kernel<T, 1>, grid, THREADS, 0, true, p);
    if (lanes <= 2) return tp_chain_launch(ctx, "attend", attend_kernel<T, 2>, grid, THREADS, 0, true, p);
    if (lanes <= 4) return tp_chain_launch(ctx, "attend", attend_kernel<T, 4>, grid, THREADS, 0, true, p);
    if (lanes <= 8) return tp_chain_launch(ctx, "attend", attend_kernel<T, 8>, grid, THREADS, 0, true, p);
    if (lanes <= 16) return tp_chain_launch(ctx, "attend", attend_kernel<T, 16>, grid, THREADS, 0, true, p);
    return tp_chain_launch(ctx, "attend", attend_kernel<T, 32>, grid, THREADS, 0, true, p);
}

} // namespace

extern "C" tp_status tp_cuda_attend(tp_ctx *ctx, const void *arguments)
{
    const tp_attend_args *a = (const tp_attend_args *)arguments;
    if (a->n <= 0) return TP_OK;
    TP_TRY(check(ctx, a));
    params p = {};
    p.heads = (int)a->heads, p.kv_heads = (int)a->kv_heads, p.head_dim = (int)a->head_dim;
    p.group = p.heads / p.kv_heads, p.blocks_per_kv = (p.group + GROUP - 1) / GROUP;
    p.q = rows_of(a->q), p.k = rows_of(a->k), p.v = rows_of(a->v), p.out = rows_of(a->out);
    p.cache_k = rows_of(a->cache_k), p.cache_v = rows_of(a->cache_v);
    p.q_norm = a->q_norm, p.k_norm = a->k_norm, p.cosine = a->cos, p.sine = a->sin;
    p.eps = a->eps, p.scale = a->scale, p.half = (int)a->half;
    p.window = (int)tp_cuda_min(a->window, INT32_MAX);
    p.capacity = a->capacity, p.used = a->used, p.parts = a->parts, p.counters = a->counters;
    const dim3 grid((unsigned)(p.kv_heads * p.blocks_per_kv), TP_ATTEND_PARTS, (unsigned)a->n);
    TP_CUDA_DTYPE(a->q.dtype, T, { return launch<T>(ctx, p, grid); });
    return TP_OK;
}
