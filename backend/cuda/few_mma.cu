/* Products of at most eight rows with bf16 weights on tensor cores: what few.cu does, for the case that matters most.
 *
 * The weights are the 16 x 16 side of mma.m16n8k16 and the rows of x its 8 columns, so that eight sequences cost what one
 * costs. A block takes 16 rows of w at a time, and its warps share their sums: each warp takes every eighth stretch of columns;
 * where rows are many and short, as those of a small model's head, each warp takes 16 rows for itself.
 * A lane reads 16 bytes of a row, as they lie, for two products: which column of w meets which register is free, as long as x
 * is read the same way. Sums of a row of x are in f32, in the same order for any number of rows: those that are not there are
 * zeros. */
#include "backend/cuda/chain.cuh"
#include "backend/cuda/decode.cuh"
#include "backend/cuda/few.cuh"

using namespace tp_few;

namespace
{

constexpr int WARPS = 8, THREADS = WARPS * 32;
constexpr int ROWS = 16;     /* of w, that a block takes at a time */
constexpr int STRETCH = 128; /* columns that a warp takes at a time */
constexpr int PARTS = STRETCH / 32;
constexpr int STEP = WARPS * STRETCH;
constexpr int X_PIECES = 4;            /* of x that a thread holds while their norm is taken */
constexpr int SHARED_MOST = 100 << 10; /* of x, that two blocks may be on a multiprocessor */

/* c += a b. a: rows g and g + 8 of lane 4 g + t; b: column g; c: rows g, g, g + 8, g + 8 of columns 2 t, 2 t + 1. */
__device__ __forceinline__ void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1)
{
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint4 read_once(const unsigned char *p)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

/* Row `r` of a group: with SwiGLU, 8 rows of the gate and the same 8 of the other. */
__device__ __forceinline__ place row_of(const params &p, int group, int r)
{
    if (p.swiglu) {
        const int row = group * (ROWS / 2) + r % (ROWS / 2);
        return row < p.rows ? place{r / (ROWS / 2), row} : place{-1, 0};
    }
    place at = {0, group * ROWS + r};
    if (at.row >= p.rows) return {-1, 0};
    while (at.row >= p.parts[at.part].m) at.row -= p.parts[at.part++].m;
    return at;
}

/* What a lane reads of a group: two rows, 16 bytes of each 32 columns of a stretch. */
struct reader {
    const unsigned char *rows[2];
    uint4 next[PARTS][2];

    __device__ void enter(const params &p, int group)
    {
        const int g = threadIdx.x % 32 / 4;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const place at = row_of(p, group, g + i * 8);
            const part &from = p.parts[at.part < 0 ? 0 : at.part];
            rows[i] = from.w + tp_device_stored_row(from.rope_pairs, at.part < 0 ? 0 : at.row) * from.row_bytes;
        }
    }
    /* What follows column c, which a warp will read, to the cache of the GPU: of rows that it has alone all, else the two
     * stretches behind that one. Four lanes have a row, a line is 64 columns. */
    __device__ void prefetch(const params &p, int c)
    {
        const int t = threadIdx.x % 4;
        for (int at = c + STRETCH + t * 64; p.alone && at < p.k; at += 4 * 64) {
            asm volatile("prefetch.global.L2 [%0];" ::"l"(rows[0] + 2 * (int64_t)at));
            asm volatile("prefetch.global.L2 [%0];" ::"l"(rows[1] + 2 * (int64_t)at));
        }
        if (p.alone) return;
        for (int at = c + STEP + t * 64; at < p.k && at < c + 3 * STEP; at += STEP) {
            if (t >= STRETCH / 64) break;
            asm volatile("prefetch.global.L2 [%0];" ::"l"(rows[0] + 2 * (int64_t)at));
            asm volatile("prefetch.global.L2 [%0];" ::"l"(rows[1] + 2 * (int64_t)at));
        }
    }
    /* The stretch that begins at column c. */
    __device__ void fetch(const params &p, int c)
    {
        const int at = c + threadIdx.x % 4 * 8;
#pragma unroll
        for (int h = 0; h < PARTS; h++) {
#pragma unroll
            for (int i = 0; i < 2; i++)
                next[h][i] = at + h * 32 < p.k ? read_once(rows[i] + 2 * (int64_t)(at + h * 32)) : make_uint4(0, 0, 0, 0);
        }
    }
};

/* ---- x, as bf16 [8, ld] in shared memory ---- */

/* Rows lie 64 bytes apart modulo 128, so that lanes of two rows read all banks. */
__host__ __device__ __forceinline__ int shared_ld(int tile)
{
    return tile + 32;
}

__device__ __forceinline__ void load_x(const params &p, int row, int c, float (&x)[8])
{
    const int64_t at = row * p.x_ld + c;
    if (p.x.bf16)
        tp_load<8>(reinterpret_cast<const __nv_bfloat16 *>(p.x.data) + at, x);
    else
        tp_load<8>(reinterpret_cast<const float *>(p.x.data) + at, x);
}

__device__ __forceinline__ void apply_norm(const params &p, float rstd, int c, float (&x)[8])
{
    float w[8];
    tp_load<8>(p.norm + c, w);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float normal = x[i] * rstd;
        if (p.x.bf16) normal = tp_round_bf16(normal);
        x[i] = normal * w[i];
    }
}

__device__ __forceinline__ float rstd_of(const params &p, float squares, float *reduce)
{
    return 1.0f / sqrtf(tp_block_sum(squares, reduce) / (float)p.k + p.eps);
}

__device__ __forceinline__ float squares_of(const float (&x)[8])
{
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) sum = fmaf(x[i], x[i], sum);
    return sum;
}

/* A row, columns first .. end. */
__device__ void stage_row(const params &p, int row, int first, int end, float rstd, __nv_bfloat16 *xs)
{
    for (int c = first + (int)threadIdx.x * 8; c < end; c += THREADS * 8) {
        float x[8];
        load_x(p, row, c, x);
        if (p.norm != nullptr) apply_norm(p, rstd, c, x);
        tp_store<8>(xs + row * shared_ld(p.tile) + c - first, x);
    }
}

/* The same for a whole row that fits into the registers of the block: read once, norm and all. */
__device__ void stage_short_row(const params &p, int row, float *reduce, __nv_bfloat16 *xs)
{
    float x[X_PIECES][8] = {}, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < X_PIECES; i++) {
        const int c = ((int)threadIdx.x + i * THREADS) * 8;
        if (c < p.k) load_x(p, row, c, x[i]);
    }
#pragma unroll
    for (int i = 0; i < X_PIECES; i++) sum += squares_of(x[i]);
    const float rstd = rstd_of(p, sum, reduce);
#pragma unroll
    for (int i = 0; i < X_PIECES; i++) {
        const int c = ((int)threadIdx.x + i * THREADS) * 8;
        if (c >= p.k) continue;
        apply_norm(p, rstd, c, x[i]);
        tp_store<8>(xs + row * shared_ld(p.tile) + c, x[i]);
    }
}

__device__ float find_rstd(const params &p, int row, float *reduce)
{
    float sum = 0.0f, x[8];
    for (int c = (int)threadIdx.x * 8; c < p.k; c += THREADS * 8) {
        load_x(p, row, c, x);
        sum += squares_of(x);
    }
    return rstd_of(p, sum, reduce);
}

/* All of x if it fits, and what is needed to stage it in tiles if not. */
__device__ void begin_x(const params &p, float *reduce, float *rstds, __nv_bfloat16 *xs)
{
    const bool whole = p.k <= p.tile;
    for (int row = 0; row < p.n; row++) {
        if (p.norm != nullptr && whole && p.k <= X_PIECES * THREADS * 8) {
            stage_short_row(p, row, reduce, xs);
            continue;
        }
        const float rstd = p.norm != nullptr ? find_rstd(p, row, reduce) : 1.0f;
        if (threadIdx.x == 0) rstds[row] = rstd;
        if (whole) stage_row(p, row, 0, p.k, rstd, xs);
    }
    __syncthreads();
}

/* ---- results ---- */

/* Low-rank part of an element, one lane: factors are short. */
__device__ __forceinline__ float low_part(const params &p, place at, int row)
{
    const part &from = p.parts[at.part];
    float sum = 0.0f;
    if (from.low == nullptr) return sum;
    for (int j = 0; j < from.rank; j++) {
        const float up = from.up[at.row * from.up_ld + j], low = from.low[row * from.low_ld + j];
        sum = p.round_low ? fmaf(tp_round_bf16(up), tp_round_bf16(low), sum) : fmaf(up, low, sum);
    }
    return sum;
}

/* Row r of the group times row `row` of x, of which each of so many warps has a part. */
__device__ __forceinline__ void put_result(const params &p, int group, int r, int row, const float (*sums)[ROWS][8], int warps)
{
    if (r >= (p.swiglu ? ROWS / 2 : ROWS) || row >= p.n) return;
    float v[2] = {};
    for (int i = 0; i < (p.swiglu ? 2 : 1); i++) {
        const place at = row_of(p, group, r + i * (ROWS / 2));
        if (at.part < 0) return;
        float sum = 0.0f;
        for (int w = 0; w < warps; w++) sum += sums[w][r + i * (ROWS / 2)][row];
        v[i] = finish(p, at, row, sum + low_part(p, at, row));
    }
    const place at = row_of(p, group, r);
    store_y(p, at, row, p.swiglu ? glue(p, at, row, v[0], v[1]) : v[0]);
}

__global__ void __launch_bounds__(THREADS, 2) few_mma_kernel(const __grid_constant__ params p)
{
    extern __shared__ __align__(16) __nv_bfloat16 xs[];
    __shared__ float reduce[32], rstds[8], sums[WARPS][ROWS][8];
    tp_chain_begin();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first = p.alone ? 0 : warp * STRETCH, step = p.alone ? STRETCH : STEP;
    const int group0 = p.alone ? blockIdx.x * WARPS + warp : blockIdx.x, groups = p.alone ? gridDim.x * WARPS : gridDim.x;
    reader w;
    w.enter(p, group0);
    w.fetch(p, first);
    w.prefetch(p, first);
    if (p.norm != nullptr) {
        for (int i = (int)threadIdx.x * 32; i < p.k; i += THREADS * 32)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(p.norm + i));
    }
    tp_chain_wait();
    begin_x(p, reduce, rstds, xs);

    const __nv_bfloat16 *x = xs + (g < p.n ? g : 0) * shared_ld(p.tile) + t * 8;
    for (int group = group0; group < p.groups; group += groups) {
        float c[4] = {};
        for (int t0 = 0; t0 < p.k; t0 += p.tile) {
            const int t1 = min(p.k, t0 + p.tile);
            if (p.k > p.tile) {
                __syncthreads();
                for (int row = 0; row < p.n; row++) stage_row(p, row, t0, t1, rstds[row], xs);
                __syncthreads();
            }
            for (int at = t0 + first; at < t1; at += step) {
                uint4 now[PARTS][2];
#pragma unroll
                for (int i = 0; i < 2 * PARTS; i++) now[i / 2][i % 2] = w.next[i / 2][i % 2];
                if (at + step < p.k) {
                    w.fetch(p, at + step);
                } else if (group + groups < p.groups) {
                    w.enter(p, group + groups);
                    w.fetch(p, first);
                }
#pragma unroll
                for (int h = 0; h < PARTS; h++) {
                    uint4 b = make_uint4(0, 0, 0, 0);
                    const int column = at + h * 32 + t * 8;
                    if (g < p.n && column < p.k) b = *reinterpret_cast<const uint4 *>(x + column - t * 8 - t0);
                    multiply(c, now[h][0].x, now[h][1].x, now[h][0].y, now[h][1].y, b.x, b.y);
                    multiply(c, now[h][0].z, now[h][1].z, now[h][0].w, now[h][1].w, b.z, b.w);
                }
            }
        }
        sums[warp][g][2 * t] = c[0], sums[warp][g][2 * t + 1] = c[1];
        sums[warp][g + 8][2 * t] = c[2], sums[warp][g + 8][2 * t + 1] = c[3];
        if (p.alone) {
            __syncwarp();
            for (int i = lane; i < ROWS * p.n; i += 32) put_result(p, group, i % ROWS, i / ROWS, sums + warp, 1);
            __syncwarp();
            continue;
        }
        __syncthreads();
        put_result(p, group, threadIdx.x / 8, threadIdx.x % 8, sums, WARPS);
        __syncthreads();
    }
}

} // namespace

bool tp_few::mma_takes(tp_ctx *ctx, tp_format_id format, const params &p)
{
    return format == TP_FORMAT_BF16 && (p.round_x || p.x.bf16) && tp_cuda_of(ctx)->capability >= 80;
}

tp_status tp_few::launch_mma(tp_ctx *ctx, const char *name, params *p, bool early)
{
    const int64_t multiprocessors = tp_cuda_of(ctx)->multiprocessors;
    const int64_t fit = (SHARED_MOST / 2 / p->n - shared_ld(0)) / STEP * STEP;
    p->tile = (int)tp_cuda_min(tp_cuda_ceil(p->k, STEP) * STEP, fit);
    p->groups = (int)tp_cuda_ceil(p->rows, p->swiglu ? ROWS / 2 : ROWS);
    p->alone = p->k <= STEP && !p->swiglu && p->groups >= multiprocessors * WARPS;
    const size_t shared = (size_t)shared_ld(p->tile) * (size_t)p->n * 2;
    if (p->alone)
        return tp_chain_launch(ctx, name, few_mma_kernel,
                               dim3((unsigned)tp_cuda_min(tp_cuda_ceil(p->groups, WARPS), multiprocessors * 2)), THREADS,
                               shared, early, *p);
    const int64_t rounds = tp_cuda_ceil(p->groups, multiprocessors * 2);
    return tp_chain_launch(ctx, name, few_mma_kernel, dim3((unsigned)tp_cuda_ceil(p->groups, rounds)), THREADS, shared, early,
                           *p);
}
