/* Products of at most eight rows with weights as they lie: y = x w^T, each weight read once.
 *
 * A warp takes R rows of w at a time; its lanes read 8 neighbouring values each, and the sums of the lanes are added by a fixed
 * tree, so that a row of y does not depend on how many rows there are. x lies in shared memory as f32, in tiles where it is too
 * long. While a warp works on one stage, a few times 16 bytes per lane, the next one is on its way, from the next rows too. In
 * a chain (chain.cuh) the first stage is fetched before the kernel that makes x has ended.
 *
 * Weights of several linears of the same x are rows of one product, with rmsnorm in front and SwiGLU behind where asked for.
 * Low-rank parts: their thin products with x come first, in one launch; the rest rides on the sums. */
#include "backend/cuda/few.cuh"
#include "backend/cuda/chain.cuh"
#include "backend/cuda/decode.cuh"

using namespace tp_few;

namespace
{

constexpr int N_MAX = 8;
constexpr int SPLIT_WARPS = 4; /* that share a row's sum, where there are few rows of w */
constexpr int WARPS_MAX = 8;
constexpr int LANES_VALUES = 32 * TP_DECODE;
constexpr int X_PIECES = 4; /* of x that a thread holds while their norm is taken */
/* Columns of x in shared memory: a multiple of this, which every stage divides, and for all rows together at most that many. */
constexpr int TILE = 3 * SPLIT_WARPS * LANES_VALUES, SHARED_VALUES = 8 * TILE;

/* Pieces of 8 values of each of R rows that a lane has on its way, and as many again while it works on them. */
template <tp_format_id F, int R> constexpr int stage_pieces = (R == 2 ? 3 : 2) - (F == TP_FORMAT_F32 ? 1 : 0);

/* ---- 8 values of a row, as they lie ---- */

__device__ __forceinline__ uint4 read_once(const unsigned char *p)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

template <tp_format_id F> struct piece { /* ggml blocks */
    uint2 codes;
    uint32_t scales; /* the scale, and above it the minimum */
    static constexpr int block_bytes = F == TP_FORMAT_Q8_0 ? 34 : F == TP_FORMAT_Q4_0 ? 18 : 20;
    static constexpr int head = F == TP_FORMAT_Q4_1 ? 4 : 2;
    __device__ void fetch(const unsigned char *row, int c)
    {
        const uint16_t *block = reinterpret_cast<const uint16_t *>(row + c / 32 * block_bytes);
        const uint16_t *at = block + (head + (F == TP_FORMAT_Q8_0 ? c % 32 : c % 16)) / 2;
        scales = __ldg(block) | (F == TP_FORMAT_Q4_1 ? (uint32_t)__ldg(block + 1) << 16 : 0);
        codes = make_uint2(__ldg(at) | (uint32_t)__ldg(at + 1) << 16, __ldg(at + 2) | (uint32_t)__ldg(at + 3) << 16);
    }
    __device__ void values(int c, float (&x)[TP_DECODE]) const
    {
        const float d = __half2float(__ushort_as_half((unsigned short)(scales & 0xffffu)));
        const float m = __half2float(__ushort_as_half((unsigned short)(scales >> 16)));
        const int shift = c % 32 / 16 * 4; /* the upper halves hold values 16 .. 31 */
#pragma unroll
        for (int i = 0; i < TP_DECODE; i++) {
            const uint32_t byte = tp_byte_of(codes, i);
            if constexpr (F == TP_FORMAT_Q8_0)
                x[i] = (float)(int8_t)byte * d;
            else if constexpr (F == TP_FORMAT_Q4_0)
                x[i] = (float)((int)(byte >> shift & 15u) - 8) * d;
            else
                x[i] = fmaf((float)(byte >> shift & 15u), d, m);
        }
    }
};

template <> struct piece<TP_FORMAT_BF16> {
    uint4 v;
    __device__ void fetch(const unsigned char *row, int c) { v = read_once(row + 2 * (int64_t)c); }
    __device__ void values(int, float (&x)[TP_DECODE]) const
    {
        tp_unpack_bf16(v.x, x[0], x[1]);
        tp_unpack_bf16(v.y, x[2], x[3]);
        tp_unpack_bf16(v.z, x[4], x[5]);
        tp_unpack_bf16(v.w, x[6], x[7]);
    }
};

template <> struct piece<TP_FORMAT_F16> {
    uint4 v;
    __device__ void fetch(const unsigned char *row, int c) { v = read_once(row + 2 * (int64_t)c); }
    __device__ void values(int, float (&x)[TP_DECODE]) const
    {
        const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[2 * i] = __half2float(__ushort_as_half((unsigned short)(pairs[i] & 0xffffu)));
            x[2 * i + 1] = __half2float(__ushort_as_half((unsigned short)(pairs[i] >> 16)));
        }
    }
};

template <> struct piece<TP_FORMAT_F32> {
    uint4 a, b;
    __device__ void fetch(const unsigned char *row, int c)
    {
        a = read_once(row + 4 * (int64_t)c);
        b = read_once(row + 4 * (int64_t)c + 16);
    }
    __device__ void values(int, float (&x)[TP_DECODE]) const
    {
        const uint32_t bits[TP_DECODE] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < TP_DECODE; i++) x[i] = __uint_as_float(bits[i]);
    }
};

template <int R> __device__ __forceinline__ place find_row(const params &p, int group, int r)
{
    place at = {0, group * R + r};
    if (p.swiglu) {
        at = {r / (R / 2), group * (R / 2) + r % (R / 2)};
        return at.row < p.rows ? at : place{-1, 0};
    }
    if (at.row >= p.rows) return {-1, 0};
    while (at.row >= p.parts[at.part].m) at.row -= p.parts[at.part++].m;
    return at;
}

/* ---- x ---- */

/* Where column c of a tile lies: the halves of pieces of 8 apart, so that lanes with neighbouring pieces read neighbouring 16
 * bytes. */
__device__ __forceinline__ int shared_index(int c, int tile)
{
    return (c >> 2 & 1) * (tile / 2) + (c >> 3) * 4 + (c & 3);
}

__device__ __forceinline__ void load_x(const params &p, int row, int c, float (&x)[TP_DECODE])
{
    const int64_t at = row * p.x_ld + c;
    if (p.x.bf16)
        tp_load_some<TP_DECODE>(reinterpret_cast<const __nv_bfloat16 *>(p.x.data) + at, TP_DECODE, true, x);
    else
        tp_load_some<TP_DECODE>(reinterpret_cast<const float *>(p.x.data) + at, TP_DECODE, true, x);
}

/* 1 / sqrt(mean of squares + eps) of row n. */
__device__ float find_rstd(const params &p, int row, float *shared)
{
    float sum = 0.0f, x[TP_DECODE];
    for (int c = (int)threadIdx.x * TP_DECODE; c < p.k; c += (int)blockDim.x * TP_DECODE) {
        load_x(p, row, c, x);
#pragma unroll
        for (int i = 0; i < TP_DECODE; i++) sum = fmaf(x[i], x[i], sum);
    }
    return 1.0f / sqrtf(tp_block_sum(sum, shared) / (float)p.k + p.eps);
}

__device__ __forceinline__ void apply_norm(const params &p, float rstd, const float (&w)[TP_DECODE], float (&x)[TP_DECODE])
{
#pragma unroll
    for (int i = 0; i < TP_DECODE; i++) {
        float normal = x[i] * rstd;
        if (p.x.bf16) normal = tp_round_bf16(normal);
        x[i] = normal * w[i];
        if (p.x.bf16) x[i] = tp_round_bf16(x[i]);
    }
}

/* Columns c .. c+7 of the tile that begins at `first`. */
__device__ __forceinline__ void put_x(const params &p, int row, int c, int first, float (&x)[TP_DECODE], float *xs)
{
    if (p.round_x) {
#pragma unroll
        for (int i = 0; i < TP_DECODE; i++) x[i] = tp_round_bf16(x[i]);
    }
    float *to = xs + row * p.tile + shared_index(c - first, p.tile);
    *reinterpret_cast<float4 *>(to) = make_float4(x[0], x[1], x[2], x[3]);
    *reinterpret_cast<float4 *>(to + p.tile / 2) = make_float4(x[4], x[5], x[6], x[7]);
}

/* Columns first .. first+tile of all rows of x to shared memory, as the product takes them. */
__device__ void stage_x(const params &p, int first, const float *rstd, float *xs)
{
    const int end = min(p.k, first + p.tile);
    for (int row = 0; row < p.n; row++) {
        for (int c = first + (int)threadIdx.x * TP_DECODE; c < end; c += (int)blockDim.x * TP_DECODE) {
            float x[TP_DECODE], w[TP_DECODE];
            load_x(p, row, c, x);
            if (p.norm != nullptr) {
                tp_load<TP_DECODE>(p.norm + c, w);
                apply_norm(p, rstd[row], w, x);
            }
            put_x(p, row, c, first, x, xs);
        }
    }
}

/* The same for all of x, in one pass: norm and all. */
__device__ void stage_normed_x(const params &p, float *reduce, float *xs)
{
    for (int row = 0; row < p.n; row++) {
        float x[X_PIECES][TP_DECODE] = {}, w[X_PIECES][TP_DECODE], sum = 0.0f;
#pragma unroll
        for (int i = 0; i < X_PIECES; i++) {
            const int c = ((int)threadIdx.x + i * (int)blockDim.x) * TP_DECODE;
            if (c >= p.k) continue;
            load_x(p, row, c, x[i]);
            tp_load<TP_DECODE>(p.norm + c, w[i]);
        }
#pragma unroll
        for (int i = 0; i < X_PIECES; i++) {
#pragma unroll
            for (int j = 0; j < TP_DECODE; j++) sum = fmaf(x[i][j], x[i][j], sum);
        }
        const float rstd = 1.0f / sqrtf(tp_block_sum(sum, reduce) / (float)p.k + p.eps);
#pragma unroll
        for (int i = 0; i < X_PIECES; i++) {
            const int c = ((int)threadIdx.x + i * (int)blockDim.x) * TP_DECODE;
            if (c >= p.k) continue;
            apply_norm(p, rstd, w[i], x[i]);
            put_x(p, row, c, 0, x[i], xs);
        }
    }
}

/* To the cache of the GPU, by the lines of 128 bytes. */
__device__ __forceinline__ void prefetch(const float *p, int n)
{
    for (int i = (int)threadIdx.x * 32; i < n; i += (int)blockDim.x * 32) asm volatile("prefetch.global.L2 [%0];" ::"l"(p + i));
}

/* ---- results ---- */

/* v: of lane r * N + row, the sum of row r of the group. All lanes come along. */
template <int N, int R> __device__ __forceinline__ void put_results(const params &p, int group, float v)
{
    const int lane = threadIdx.x % 32, r = lane / N, row = lane % N;
    const place at = lane < R * N && row < p.n ? find_row<R>(p, group, r) : place{-1, 0};
    if (at.part >= 0) v = finish(p, at, row, v);
    if (!p.swiglu) {
        if (at.part >= 0) store_y(p, at, row, v);
        return;
    }
    const float up = __shfl_down_sync(0xffffffffu, v, R / 2 * N);
    if (at.part != 0) return;
    store_y(p, at, row, glue(p, at, row, v, up));
}

/* ---- the product ---- */

template <tp_format_id F, int R, int U> struct walker {
    const unsigned char *rows[R];
    piece<F> next[R][U];

    __device__ void enter(const params &p, int group)
    {
#pragma unroll
        for (int r = 0; r < R; r++) {
            const place at = find_row<R>(p, group, r);
            const part &from = p.parts[at.part < 0 ? 0 : at.part];
            rows[r] = from.w + tp_device_stored_row(from.rope_pairs, at.row) * from.row_bytes;
        }
    }
    __device__ void fetch(const params &p, int c, int step)
    {
#pragma unroll
        for (int u = 0; u < U; u++) {
#pragma unroll
            for (int r = 0; r < R; r++) {
                if (c + u * step < p.k) next[r][u].fetch(rows[r], c + u * step);
            }
        }
    }
};

template <tp_format_id F, int N, int R> __global__ void __launch_bounds__(WARPS_MAX * 32, 2) few_kernel(const params p)
{
    constexpr int U = stage_pieces<F, R>;
    extern __shared__ __align__(16) float xs[];
    __shared__ float reduce[32], rstd[N], partial[SPLIT_WARPS][R * N];
    tp_chain_begin();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int teams = p.split > 1 ? 1 : (int)blockDim.x / 32, team = p.split > 1 ? 0 : warp;
    const int first = lane * TP_DECODE + (p.split > 1 ? warp * LANES_VALUES : 0), step = LANES_VALUES * p.split;
    const int stride = (int)gridDim.x * teams, stages = (p.k + U * step - 1) / (U * step);

    walker<F, R, U> w;
    int group = (int)blockIdx.x * teams + team;
    if (group < p.groups) {
        w.enter(p, group);
        w.fetch(p, first, step);
    }
    if (p.norm != nullptr) prefetch(p.norm, p.k);
    tp_chain_wait();
    if (p.norm != nullptr && p.k <= min(p.tile, X_PIECES * TP_DECODE * (int)blockDim.x)) {
        stage_normed_x(p, reduce, xs);
    } else {
        for (int row = 0; p.norm != nullptr && row < p.n; row++) {
            const float r = find_rstd(p, row, reduce);
            if (threadIdx.x == 0) rstd[row] = r;
        }
        __syncthreads();
        if (p.k <= p.tile) stage_x(p, 0, rstd, xs);
    }
    __syncthreads();

    /* every warp of a block goes round as often, for all of them stage x */
    for (int base = (int)blockIdx.x * teams; base < p.groups; base += stride, group += stride) {
        float acc[R][N] = {};
        int stage = 0;
        for (int t0 = 0; t0 < p.k; t0 += p.tile) {
            const int t1 = min(p.k, t0 + p.tile);
            if (p.k > p.tile) {
                __syncthreads();
                stage_x(p, t0, rstd, xs);
                __syncthreads();
            }
            if (group >= p.groups) continue;
            for (; stage * U * step < t1; stage++) {
                const int c0 = first + stage * U * step;
                piece<F> now[R][U];
#pragma unroll
                for (int i = 0; i < R * U; i++) now[i / U][i % U] = w.next[i / U][i % U];
                if (stage + 1 < stages) {
                    w.fetch(p, c0 + U * step, step);
                } else if (group + stride < p.groups) {
                    w.enter(p, group + stride);
                    w.fetch(p, first, step);
                }
#pragma unroll
                for (int u = 0; u < U; u++) {
                    const int c = c0 + u * step;
                    if (c >= t1) continue;
                    float value[R][TP_DECODE];
#pragma unroll
                    for (int r = 0; r < R; r++) {
                        now[r][u].values(c, value[r]);
                        if (p.round_w) {
#pragma unroll
                            for (int i = 0; i < TP_DECODE; i++) value[r][i] = tp_round_bf16(value[r][i]);
                        }
                    }
#pragma unroll
                    for (int row = 0; row < N; row++) {
                        if (row >= p.n) continue;
                        const float *from = xs + row * p.tile + shared_index(c - t0, p.tile);
                        const float4 a = *reinterpret_cast<const float4 *>(from);
                        const float4 b = *reinterpret_cast<const float4 *>(from + p.tile / 2);
                        const float x[TP_DECODE] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
                        for (int r = 0; r < R; r++) {
#pragma unroll
                            for (int i = 0; i < TP_DECODE; i++) acc[r][row] = fmaf(value[r][i], x[i], acc[r][row]);
                        }
                    }
                }
            }
        }
        if (group < p.groups && warp * (p.split > 1) == 0) {
#pragma unroll
            for (int r = 0; r < R; r++) {
                const place at = find_row<R>(p, group, r);
                if (at.part < 0 || p.parts[at.part].low == nullptr) continue;
                const part &from = p.parts[at.part];
                for (int j = lane; j < from.rank; j += 32) {
                    float up = from.up[at.row * from.up_ld + j];
                    if (p.round_low) up = tp_round_bf16(up);
#pragma unroll
                    for (int row = 0; row < N; row++) {
                        if (row >= p.n) continue;
                        float low = from.low[row * from.low_ld + j];
                        if (p.round_low) low = tp_round_bf16(low);
                        acc[r][row] = fmaf(up, low, acc[r][row]);
                    }
                }
            }
        }
        float v = 0.0f;
#pragma unroll
        for (int i = 0; i < R * N; i++) {
            const float sum = tp_warp_sum(acc[i / N][i % N]);
            if (lane == i) v = sum;
        }
        if (p.split > 1) {
            if (lane < R * N) partial[warp][lane] = v;
            __syncthreads();
            if (warp == 0) {
                v = 0.0f;
                if (lane < R * N) {
                    for (int i = 0; i < SPLIT_WARPS; i++) v += partial[i][lane];
                }
                put_results<N, R>(p, group, v);
            }
            __syncthreads();
        } else if (group < p.groups) {
            put_results<N, R>(p, group, v);
        }
    }
}

/* ---- host ---- */

bool exact_in_bf16(const tp_matrix *w)
{
    return w->format == TP_FORMAT_BF16 || w->round_bf16;
}

bool readable(const tp_matrix *w, int64_t k)
{
    return w->format >= 0 && w->format <= TP_FORMAT_Q4_1 && !w->transposed && k % TP_DECODE == 0 && tp_matrix_aligned(w);
}

bool x_readable(tp_rows x, int64_t k)
{
    return (x.dtype == TP_F32 || x.dtype == TP_BF16) && tp_rows_aligned(x) && k > 0 && k % TP_DECODE == 0 && k < INT32_MAX;
}

bool lowrank_readable(const tp_lowrank_args *l)
{
    const tp_format_id f = l->up.format;
    return l->low.dtype == TP_F32 && (f == TP_FORMAT_F32 || f == TP_FORMAT_BF16) && !l->up.transposed &&
           l->up.rope_pairs <= 0 && !l->up.round_bf16 &&
           reinterpret_cast<uintptr_t>(l->up.data) % (f == TP_FORMAT_F32 ? 4 : 2) == 0;
}

values values_of(const void *data, tp_dtype dtype)
{
    return {(const unsigned char *)data, dtype == TP_BF16};
}

part part_of(const tp_matrix *w, const float *bias, tp_rows y, const tp_lowrank_args *l)
{
    part to = {};
    to.w = (const unsigned char *)w->data, to.row_bytes = tp_matrix_row_bytes(w);
    to.rope_pairs = w->rope_pairs, to.m = (int)w->rows;
    to.bias = bias;
    to.y = (unsigned char *)y.data, to.y_ld = y.ld;
    if (l != NULL) {
        to.low = (const float *)l->low.data, to.low_ld = l->low.ld, to.rank = (int)l->rank;
        to.up = values_of(l->up.data, l->up.format == TP_FORMAT_BF16 ? TP_BF16 : TP_F32);
        to.up_ld = tp_matrix_row_bytes(&l->up) / (to.up.bf16 ? 2 : 4);
    }
    return to;
}

template <tp_format_id F, int N> tp_status launch_rows(tp_ctx *ctx, const char *name, params *p, bool early)
{
    const int64_t multiprocessors = tp_cuda_of(ctx)->multiprocessors, weights = (int64_t)p->rows * (p->swiglu ? 2 : 1);
    const bool many = weights >= 32 * multiprocessors && p->split == 1;
    constexpr int R = N == 1 ? 4 : 2; /* of many; with more rows of x, their sums take the registers */
    const int r = many ? R : 2, threads = many ? WARPS_MAX * 32 : SPLIT_WARPS * 32;
    p->groups = (int)tp_cuda_ceil(weights, r);
    p->tile = (int)tp_cuda_min(tp_cuda_ceil(p->k, TILE) * TILE, SHARED_VALUES / N);
    const size_t shared = (size_t)p->tile * N * sizeof(float);
    /* all blocks at once, each with as many groups as the others */
    const int64_t resident = tp_cuda_min(many ? 2 : 4, (int64_t)(tp_cuda_of(ctx)->shared_bytes / (shared + 2048)));
    const int64_t blocks = tp_cuda_ceil(p->groups, p->split > 1 ? 1 : threads / 32);
    const int64_t rounds = tp_cuda_ceil(blocks, multiprocessors * (resident > 0 ? resident : 1));
    const dim3 grid((unsigned)tp_cuda_ceil(blocks, rounds));
    if (many) return tp_chain_launch(ctx, name, few_kernel<F, N, R>, grid, threads, shared, early, *p);
    return tp_chain_launch(ctx, name, few_kernel<F, N, 2>, grid, threads, shared, early, *p);
}

/* Parts of one format. */
tp_status launch(tp_ctx *ctx, const char *name, tp_format_id format, params *p, bool early)
{
    p->rows = 0;
    for (int i = 0; i < (p->swiglu ? 1 : p->n_parts); i++) p->rows += p->parts[i].m;
    p->split = p->rows <= 2048 && p->k >= 1024 && !p->swiglu ? SPLIT_WARPS : 1; /* a sum's order must not depend on n */
    if (p->rows == 0) return TP_OK;
    if (mma_takes(ctx, format, *p)) return launch_mma(ctx, name, p, early);
    TP_CUDA_FORMAT(format, F, {
        if (p->n == 1) return launch_rows<F, 1>(ctx, name, p, early);
        if (p->n <= 4) return launch_rows<F, 4>(ctx, name, p, early);
        return launch_rows<F, 8>(ctx, name, p, early);
    });
    return TP_OK;
}

/* ---- a chain's linears ---- */

bool linears_fit(const tp_linears_args *a)
{
    if (a->n > N_MAX || !x_readable(a->x, a->k)) return false;
    for (int i = 0; i < a->n_parts; i++) {
        const tp_linears_part *part = &a->parts[i];
        const tp_lowrank_args *l = part->lowrank;
        if (!readable(&part->w, a->k) || part->w.rows >= INT32_MAX || part->y.dtype != a->parts[0].y.dtype) return false;
        if (part->y.dtype == TP_F16) return false;
        if (exact_in_bf16(&part->w) != exact_in_bf16(&a->parts[0].w) || part->w.round_bf16 != a->parts[0].w.round_bf16)
            return false;
        if (l != NULL && (!lowrank_readable(l) || (l->down.data != NULL && !readable(&l->down, a->k)))) return false;
        if (a->swiglu && part->w.format != a->parts[0].w.format) return false;
    }
    return a->norm_weight == NULL || tp_pointer_aligned(a->norm_weight);
}

params linears_params(const tp_linears_args *a)
{
    params p = {};
    p.n = (int)a->n, p.k = (int)a->k;
    p.x = values_of(a->x.data, a->x.dtype), p.x_ld = a->x.ld;
    p.norm = a->norm_weight, p.eps = a->eps;
    p.round_x = p.round_low = a->precision == TP_BF16;
    p.alpha = 1;
    return p;
}

/* low_i = scaling_i * norm(x) down_i^T of all parts whose factors are alike. `scaling` is one for a launch. */
tp_status run_downs(tp_ctx *ctx, const tp_linears_args *a)
{
    bool done[TP_LINEARS_PARTS] = {};
    for (int first = 0; first < a->n_parts; first++) {
        const tp_lowrank_args *l = a->parts[first].lowrank;
        if (done[first] || l == NULL || l->down.data == NULL || l->rank == 0) continue;
        params p = linears_params(a);
        p.alpha = l->scaling;
        p.round_w = (a->precision == TP_BF16 && !exact_in_bf16(&l->down)) || l->down.round_bf16;
        for (int i = first; i < a->n_parts; i++) {
            const tp_lowrank_args *other = a->parts[i].lowrank;
            if (other == NULL || other->down.data == NULL || other->scaling != l->scaling ||
                other->down.format != l->down.format || other->down.round_bf16 != l->down.round_bf16)
                continue;
            p.parts[p.n_parts++] = part_of(&other->down, NULL, other->low, NULL);
            done[i] = true;
        }
        TP_TRY(launch(ctx, "linears", l->down.format, &p, true));
    }
    return TP_OK;
}

tp_status run_linears(tp_ctx *ctx, const tp_linears_args *a)
{
    TP_TRY(run_downs(ctx, a));
    for (int first = 0; first < a->n_parts;) {
        const tp_format_id format = a->parts[first].w.format;
        params p = linears_params(a);
        p.round_w = (a->precision == TP_BF16 && !exact_in_bf16(&a->parts[0].w)) || a->parts[0].w.round_bf16;
        p.y_bf16 = a->parts[0].y.dtype == TP_BF16;
        p.swiglu = a->swiglu;
        if (first == 0) p.residual = values_of(a->residual, a->parts[0].y.dtype), p.residual_ld = a->residual_ld;
        for (; first < a->n_parts && a->parts[first].w.format == format; first++) {
            const tp_linears_part *from = &a->parts[first];
            p.parts[p.n_parts++] = part_of(&from->w, from->bias, from->y, from->lowrank);
        }
        TP_TRY(launch(ctx, "linears", format, &p, true));
    }
    return TP_OK;
}

/* One by one, where a weight lies otherwise. */
tp_status run_apart(tp_ctx *ctx, const tp_linears_args *a)
{
    tp_rows x = a->x, y = a->parts[0].y;
    if (a->norm_weight != NULL) {
        tp_rmsnorm_args norm = {};
        norm.n = a->n, norm.dim = a->k, norm.x = x, norm.y = a->normed, norm.weight = a->norm_weight, norm.eps = a->eps;
        TP_TRY(tp_cuda_rmsnorm(ctx, &norm));
        x = a->normed;
    }
    for (int i = 0; i < a->n_parts; i++) {
        const tp_linears_part *part = &a->parts[i];
        tp_matmul_args product = {};
        product.n = a->n, product.m = part->w.rows, product.k = a->k;
        product.a = x, product.b = part->w, product.nt = true, product.c = part->y;
        product.alpha = 1, product.bias = part->bias, product.precision = a->precision, product.lowrank = part->lowrank;
        if (i == 0 && !a->swiglu) product.residual = a->residual, product.residual_ld = a->residual_ld;
        TP_TRY(tp_cuda_matmul(ctx, &product));
    }
    if (!a->swiglu) return TP_OK;
    tp_swiglu_args swiglu = {};
    swiglu.n = a->n, swiglu.dim = a->parts[0].w.rows, swiglu.gate = y, swiglu.up = a->parts[1].y, swiglu.y = y;
    TP_TRY(tp_cuda_swiglu(ctx, &swiglu));
    if (a->residual == NULL) return TP_OK;
    tp_add_args add = {};
    add.n = a->n, add.dim = swiglu.dim, add.x = y, add.z = y;
    add.y = {const_cast<void *>(a->residual), y.dtype, a->residual_ld};
    return tp_cuda_add(ctx, &add);
}

} // namespace

extern "C" tp_status tp_cuda_linears(tp_ctx *ctx, const void *arguments)
{
    const tp_linears_args *a = (const tp_linears_args *)arguments;
    if (a->n <= 0) return TP_OK;
    for (int i = 0; i < a->n_parts; i++) {
        TP_TRY(tp_cuda_check_matrix(ctx, "linears", &a->parts[i].w));
        TP_TRY(tp_cuda_check_dtype(ctx, "linears", a->parts[i].y.dtype));
    }
    return linears_fit(a) ? run_linears(ctx, a) : run_apart(ctx, a);
}

bool tp_cuda_few_takes(const tp_matmul_args *a)
{
    return a->n > 0 && a->n <= N_MAX && a->nt && a->m > 0 && a->m < INT32_MAX && a->alpha != 0 && a->b.rows == a->m &&
           a->b.cols == a->k && x_readable(a->a, a->k) && readable(&a->b, a->k) &&
           (a->c.dtype == TP_F32 || a->c.dtype == TP_BF16) && (a->lowrank == NULL || lowrank_readable(a->lowrank));
}

tp_status tp_cuda_few(tp_ctx *ctx, const tp_matmul_args *a)
{
    const tp_lowrank_args *l = a->lowrank;
    params p = {};
    if (l != NULL && l->down.data != NULL) {
        tp_matmul_args down = {};
        down.n = a->n, down.m = l->rank, down.k = a->k, down.nt = true;
        down.a = a->a, down.b = l->down, down.c = l->low;
        down.alpha = l->scaling, down.precision = a->precision;
        TP_TRY(tp_cuda_matmul(ctx, &down));
    }
    p.parts[0] = part_of(&a->b, a->bias, a->c, l);
    p.n_parts = 1, p.n = (int)a->n, p.k = (int)a->k;
    p.x = values_of(a->a.data, a->a.dtype), p.x_ld = a->a.ld;
    p.round_x = p.round_low = a->precision == TP_BF16;
    p.round_w = (a->precision == TP_BF16 && !exact_in_bf16(&a->b)) || a->b.round_bf16;
    p.y_bf16 = a->c.dtype == TP_BF16;
    p.alpha = a->alpha, p.beta = a->beta;
    p.residual = values_of(a->residual, a->c.dtype), p.residual_ld = a->residual_ld;
    return launch(ctx, "matmul", a->b.format, &p, false);
}
