/* The gradient of SwiGLU between two linears with low-rank factors, and of those factors, on Hopper: from one reading of gate,
 * up and dy
 *
 *   dgate = dy up silu'(gate)     dup = dy silu(gate)     y = silu(gate) up
 *   du = [dgate Bg | dup Bu]      dBg = dgate^T ug        dBu = dup^T uu        dA = thin^T y
 *
 * As in stream.cu, a thread has the hardware bring tiles, here 128 x 64 of each. All warps turn them, in place, into dgate, dup
 * and y; the first two are copied out from there, and then half of the warps multiply for the sums along rows, half for those
 * down columns. y exists nowhere else. */
#include "backend/cuda/attention.cuh" /* tensor cores */
#include "backend/cuda/chain.cuh"
#include "backend/cuda/stream.cuh"
#include "backend/cuda/tensor_map.cuh"
#include "backend/lowrank.h"

using tp_attention::bf16;
using tp_attention::mma;

namespace
{

constexpr int ROWS = 128, COLUMNS = 64; /* of a tile */
constexpr int RANK = 16;                /* of each factor, at most */
constexpr int HALF = 8, WARPS = 2 * HALF;
constexpr int THREADS = (WARPS + 1) * 32;
constexpr int SUB = 2; /* tiles below each other */
constexpr int STAGES = 3;
constexpr int WIDE_BYTES = ROWS * COLUMNS * 2, FACTOR_BYTES = COLUMNS * RANK * 2, THIN_BYTES = ROWS * RANK * 2;
constexpr int FACTORS = 3 * WIDE_BYTES, STAGE_BYTES = FACTORS + 2 * FACTOR_BYTES;
constexpr int ALIGNMENT = 1024, SHARED_BYTES = STAGES * STAGE_BYTES + 3 * SUB * THIN_BYTES + ALIGNMENT;
constexpr int BLOCKS_WANTED = 132, SPLITS_MAX = 16; /* as in stream.cu */

struct swiglu_params {
    CUtensorMap gate, up, dy, dgate, dup, b[2], u[2], thin;
    int64_t n, dim;
    int steps, splits;
    int rank[3]; /* of gate's factor, of up's, of the one behind */
    bf16 *du;
    int64_t du_ld;
    float *row_sums;    /* of splits: [split][row][ranks of gate and up] */
    float *column_sums; /* of row blocks: [block][the three][rank][dim] */
    int64_t first[3], size;
};

#if TP_HOPPER

using namespace tp_tiles;

constexpr int GATE = 0, UP = WIDE_BYTES, Y = 2 * WIDE_BYTES; /* in a stage; dgate, dup and y afterwards */

__device__ __forceinline__ void take_out(const CUtensorMap *map, uint32_t from, int64_t column, int64_t row)
{
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from),
                 "r"((int)column), "r"((int)row)
                 : "memory");
}

__device__ __forceinline__ uint4 read_chunk(uint32_t at)
{
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at) : "memory");
    return x;
}
__device__ __forceinline__ void write_chunk(uint32_t at, uint4 x)
{
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

/* As in activation.cu, two values at a time. */
__device__ __forceinline__ void turn_pair(uint32_t &gate, uint32_t &up, uint32_t &dy)
{
    float g[2], u[2], d[2];
    tp_unpack_bf16(gate, g[0], g[1]);
    tp_unpack_bf16(up, u[0], u[1]);
    tp_unpack_bf16(dy, d[0], d[1]);
    float y[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float s = __fdividef(1.0f, 1.0f + __expf(-g[i])), slope = s * fmaf(g[i], 1.0f - s, 1.0f);
        y[i] = g[i] * s * u[i];
        u[i] = d[i] * u[i] * slope;
        g[i] = d[i] * g[i] * s;
    }
    gate = tp_pack_bf16(u[0], u[1]);
    up = tp_pack_bf16(g[0], g[1]);
    dy = tp_pack_bf16(y[0], y[1]);
}

/* Gate, up and dy of a tile become dgate, dup and y. */
__device__ __forceinline__ void turn_tile(uint32_t stage)
{
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * COLUMNS / 8; i += WARPS * 32) { /* the order of chunks does not matter */
        const uint32_t at = stage + i * 16;
        uint4 g = read_chunk(at + GATE), u = read_chunk(at + UP), d = read_chunk(at + Y);
        turn_pair(g.x, u.x, d.x);
        turn_pair(g.y, u.y, d.y);
        turn_pair(g.z, u.z, d.z);
        turn_pair(g.w, u.w, d.w);
        write_chunk(at + GATE, g);
        write_chunk(at + UP, u);
        write_chunk(at + Y, d);
    }
}

/* sum += thin^T times 16 columns of a tile, from 16-byte chunk `chunk` on. */
__device__ __forceinline__ void add_down_columns(float (&sum)[2][4], uint32_t thin, uint32_t tile, int chunk)
{
    constexpr int AHEAD = 4;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < ROWS / 16; i += AHEAD) {
        uint32_t x[AHEAD][4], u[AHEAD][4];
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            matrices_transposed(x[k], tile + wide_at((i + k) * 16 + lane % 16, chunk + lane / 16));
            matrices_transposed(u[k], thin + thin_at((i + k) * 16 + lane % 8 + lane / 16 * 8, lane / 8 % 2));
        }
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            mma(sum[0], u[k], x[k][0], x[k][1]);
            mma(sum[1], u[k], x[k][2], x[k][3]);
        }
    }
}

/* The same for 8 columns; the two sums are halves. */
__device__ __forceinline__ void add_down_half(float (&sum)[2][4], uint32_t thin, uint32_t tile, int chunk)
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < ROWS / 32; i++) {
        uint32_t x[4], u[2][4];
        matrices_transposed(x, tile + wide_at(i * 32 + lane, chunk));
#pragma unroll
        for (int h = 0; h < 2; h++)
            matrices_transposed(u[h], thin + thin_at(i * 32 + h * 16 + lane % 8 + lane / 16 * 8, lane / 8 % 2));
        mma(sum[0], u[0], x[0], x[1]);
        mma(sum[1], u[1], x[2], x[3]);
    }
}

/* Two columns of [rank, dim], where they are columns. */
__device__ __forceinline__ void store_pair(const swiglu_params &p, int part, int64_t block, int r, int64_t column, float x,
                                           float y)
{
    if (r < p.rank[part] && column < p.dim)
        *reinterpret_cast<float2 *>(p.column_sums + block * p.size + p.first[part] + r * p.dim + column) = make_float2(x, y);
}

/* The warp's sums along rows, from `row` on: [tile][gate or up][eight columns of the factor]. */
template <int N>
__device__ __forceinline__ void store_along(const swiglu_params &p, int64_t first, int split, const float (&sum)[N][2][2][4])
{
    const int lane = threadIdx.x % 32, used = p.rank[0] + p.rank[1];
#pragma unroll
    for (int s = 0; s < N; s++) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int part = i / 4, t = i / 2 % 2, h = i % 2, c = t * 8 + lane % 4 * 2, at = c + (part > 0 ? p.rank[0] : 0);
            const int64_t row = first + s * ROWS + lane / 4 + h * 8;
            const float x = sum[s][part][t][h * 2], y = sum[s][part][t][h * 2 + 1];
            if (row >= p.n || c >= p.rank[part]) continue;
            if (p.splits == 1)
                *reinterpret_cast<uint32_t *>(p.du + row * p.du_ld + at) = tp_pack_bf16(x, y);
            else
                *reinterpret_cast<float2 *>(p.row_sums + (split * p.n + row) * used + at) = make_float2(x, y);
        }
    }
}

#endif

__global__ void __launch_bounds__(THREADS, 1) swiglu_factors_kernel(const __grid_constant__ swiglu_params p)
{
#if TP_HOPPER
    extern __shared__ unsigned char shared[];
    __shared__ __align__(8) uint64_t barriers[2 * STAGES + 1];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, split = (int)blockIdx.x % p.splits;
    const int64_t block = blockIdx.x / p.splits, row0 = block * SUB * ROWS;
    const uint32_t tiles = ((uint32_t)__cvta_generic_to_shared(shared) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    const uint32_t held = tiles + STAGES * STAGE_BYTES; /* ug, uu and the thin side behind, [SUB][128, 16] each */
    const uint32_t full = (uint32_t)__cvta_generic_to_shared(barriers), empty = full + STAGES * 8,
                   held_full = empty + STAGES * 8;
    ring r = {full, empty, STAGES, 0, 0};
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            tp_hopper::barrier_open(full + i * 8, 1);
            tp_hopper::barrier_open(empty + i * 8, WARPS);
        }
        tp_hopper::barrier_open(held_full, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        tp_hopper::see_copies();
    }
    __syncthreads();
    tp_chain_wait();
    if (warp == WARPS) {
        if (lane != 0) return;
        expect(held_full, 3 * SUB * THIN_BYTES);
        for (int s = 0; s < SUB; s++) {
            bring(held + s * THIN_BYTES, &p.u[0], 0, row0 + s * ROWS, held_full);
            bring(held + (SUB + s) * THIN_BYTES, &p.u[1], 0, row0 + s * ROWS, held_full);
            bring(held + (2 * SUB + s) * THIN_BYTES, &p.thin, 0, row0 + s * ROWS, held_full);
        }
        for (int step = split; step < p.steps; step += p.splits) {
            for (int s = 0; s < SUB; s++, r.next()) {
                const uint32_t stage = tiles + r.stage * STAGE_BYTES, barrier = full + r.stage * 8;
                const int64_t column = (int64_t)step * COLUMNS, row = row0 + s * ROWS;
                tp_hopper::barrier_wait(empty + r.stage * 8, r.round ^ 1);
                expect(barrier, 3 * WIDE_BYTES + (s == 0 ? 2 * FACTOR_BYTES : 0));
                bring(stage + GATE, &p.gate, column, row, barrier);
                bring(stage + UP, &p.up, column, row, barrier);
                bring(stage + Y, &p.dy, column, row, barrier);
                if (s > 0) continue;
                bring(stage + FACTORS, &p.b[0], 0, column, barrier);
                bring(stage + FACTORS + FACTOR_BYTES, &p.b[1], 0, column, barrier);
            }
        }
        return;
    }
    const auto begin = [&](int64_t column, int s) { /* the next tile, turned */
                                                    const uint32_t stage = tiles + r.stage * STAGE_BYTES;
                                                    tp_hopper::barrier_wait(full + r.stage * 8, r.round);
                                                    turn_tile(stage);
                                                    tp_hopper::see_copies();
                                                    asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");
                                                    if (threadIdx.x == 0) {
                                                        take_out(&p.dgate, stage + GATE, column, row0 + s * ROWS);
                                                        take_out(&p.dup, stage + UP, column, row0 + s * ROWS);
                                                        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
                                                    }
                                                    return stage;
    };
    const auto end = [&]() {
        if (threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        __syncwarp();
        if (lane == 0) tp_hopper::barrier_arrive(empty + r.stage * 8);
        r.next();
    };
    if (warp < HALF) { /* 16 rows of dgate and dup */
        uint32_t b[2][COLUMNS / 16][4];
        float sum[SUB][2][2][4] = {};
        for (int step = split; step < p.steps; step += p.splits) {
#pragma unroll
            for (int s = 0; s < SUB; s++) {
                const uint32_t stage = begin((int64_t)step * COLUMNS, s);
#pragma unroll
                for (int part = 0; part < 2; part++) {
                    uint32_t x[COLUMNS / 16][4];
#pragma unroll
                    for (int k = 0; k < COLUMNS / 16; k++) {
                        matrices(x[k], stage + part * WIDE_BYTES + wide_at(warp * 16 + lane % 16, k * 2 + lane / 16));
                        if (s == 0)
                            matrices_transposed(b[part][k],
                                                stage + FACTORS + part * FACTOR_BYTES + thin_at(k * 16 + lane % 16, lane / 16));
                    }
#pragma unroll
                    for (int k = 0; k < COLUMNS / 16; k++) {
                        mma(sum[s][part][0], x[k], b[part][k][0], b[part][k][1]);
                        mma(sum[s][part][1], x[k], b[part][k][2], b[part][k][3]);
                    }
                }
                end();
            }
        }
        store_along<SUB>(p, row0 + warp * 16, split, sum);
        return;
    }
    const int own = warp - HALF, part = own / 4; /* 16 columns of dgate or dup, 8 of y */
    tp_hopper::barrier_wait(held_full, 0);
    for (int step = split; step < p.steps; step += p.splits) {
        const int64_t column = (int64_t)step * COLUMNS;
        float wide[2][4] = {}, half[2][4] = {};
        for (int s = 0; s < SUB; s++) {
            const uint32_t stage = begin(column, s);
            add_down_columns(wide, held + (part * SUB + s) * THIN_BYTES, stage + part * WIDE_BYTES, own % 4 * 2);
            add_down_half(half, held + (2 * SUB + s) * THIN_BYTES, stage + Y, own);
            end();
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int rank = lane / 4 + j * 8;
#pragma unroll
            for (int h = 0; h < 2; h++)
                store_pair(p, part, block, rank, column + own % 4 * 16 + h * 8 + lane % 4 * 2, wide[h][j * 2],
                           wide[h][j * 2 + 1]);
            store_pair(p, 2, block, rank, column + own * 8 + lane % 4 * 2, half[0][j * 2] + half[1][j * 2],
                       half[0][j * 2 + 1] + half[1][j * 2 + 1]);
        }
    }
#endif
}

/* ---- on the host ---- */

bool aligned(tp_rows x)
{
    return x.dtype == TP_BF16 && tp_rows_aligned(x);
}

bool fused(tp_ctx *ctx, const tp_swiglu_factors_args *args)
{
    const tp_swiglu_backward_args *g = &args->swiglu;
    const tp_lowrank_backward_args *l = &args->before;
    const tp_matmul_tn_args *a = &args->behind;
    bool fine = tp_cuda_of(ctx)->tensor_maps != NULL && g->n > 0 && g->n < INT32_MAX / 2 && g->dim > 0 && g->dim % 8 == 0 &&
                a->c != NULL && a->m <= RANK && a->m % 8 == 0 && l->rows[0] == g->dim && l->rows[1] == g->dim &&
                l->rank[2] == 0 && aligned(g->gate) && aligned(g->up) && aligned(g->dy) && aligned(g->dgate) &&
                aligned(g->dup) && aligned(l->b) && aligned(l->u) && aligned(l->du) && aligned(a->a);
    for (int i = 0; i < 2; i++) fine = fine && l->rank[i] > 0 && l->rank[i] <= RANK && l->rank[i] % 8 == 0 && l->db[i] != NULL;
    return fine && (3 * g->dim + SPLITS_MAX * 2 * SUB * ROWS) * RANK * 4 <= (int64_t)TP_CUDA_WORKSPACE_BYTES;
}

tp_rows from(tp_rows x, int64_t row, int64_t column)
{
    x.data = static_cast<bf16 *>(x.data) + row * x.ld + column;
    return x;
}

/* Blocks that share rows, so that rounds of blocks are full. */
int splits_of(int64_t blocks, int steps)
{
    int best = 1;
    for (int s = 2; s <= SPLITS_MAX && s <= steps; s++) {
        const auto cost = [&](int splits) {
            return tp_cuda_ceil(blocks * splits, BLOCKS_WANTED) * tp_cuda_ceil(steps, splits);
        };
        if (cost(s) < cost(best)) best = s;
    }
    return best;
}

/* Rows from `row` on, as many as the workspace has room for; returns how many. */
tp_status run_slice(tp_ctx *ctx, const tp_swiglu_factors_args *args, int64_t row, int64_t *rows)
{
    static const char name[] = "swiglu_factors";
    const tp_swiglu_backward_args *g = &args->swiglu;
    const tp_lowrank_backward_args *l = &args->before;
    const tp_matmul_tn_args *a = &args->behind;
    swiglu_params p = {};
    tp_stream_sums sums = {};
    int64_t blocks = tp_cuda_ceil(g->n - row, SUB * ROWS);
    p.dim = g->dim, p.steps = (int)tp_cuda_ceil(g->dim, COLUMNS), p.splits = splits_of(blocks, p.steps);
    p.rank[0] = (int)l->rank[0], p.rank[1] = (int)l->rank[1], p.rank[2] = (int)a->m;
    for (int i = 0; i < 3; i++) {
        p.first[i] = p.size;
        const bool last = i == 2;
        sums.parts[i] = {p.first[i], g->dim, p.rank[i], last, last ? a->c : l->db[i], last ? a->alpha : l->scaling[i]};
        p.size += p.rank[i] * g->dim;
    }
    const int used = p.rank[0] + p.rank[1];
    blocks = tp_cuda_min(blocks, (int64_t)(TP_CUDA_WORKSPACE_BYTES / 4) / (p.size + (int64_t)p.splits * used * SUB * ROWS));
    *rows = tp_cuda_min(g->n - row, blocks * SUB * ROWS);
    p.n = *rows;
    p.du = static_cast<bf16 *>(from(l->du, row, 0).data), p.du_ld = l->du.ld;
    p.column_sums = reinterpret_cast<float *>(tp_cuda_of(ctx)->workspace), p.row_sums = p.column_sums + blocks * p.size;
    const struct {
        CUtensorMap *map;
        tp_rows rows;
    } wide[] = {{&p.gate, g->gate}, {&p.up, g->up}, {&p.dy, g->dy}, {&p.dgate, g->dgate}, {&p.dup, g->dup}};
    for (const auto &w : wide) TP_TRY(tp_cuda_tensor_map(ctx, name, w.map, from(w.rows, row, 0), p.n, g->dim, ROWS, COLUMNS));
    for (int i = 0; i < 2; i++) {
        const int64_t column = i > 0 ? p.rank[0] : 0;
        TP_TRY(tp_cuda_tensor_map(ctx, name, &p.b[i], from(l->b, i * g->dim, column), g->dim, p.rank[i], COLUMNS, RANK));
        TP_TRY(tp_cuda_tensor_map(ctx, name, &p.u[i], from(l->u, row, column), p.n, p.rank[i], ROWS, RANK));
    }
    TP_TRY(tp_cuda_tensor_map(ctx, name, &p.thin, from(a->a, row, 0), p.n, p.rank[2], ROWS, RANK));
    TP_CUDA_ALLOW_SHARED(ctx, name, swiglu_factors_kernel, SHARED_BYTES);
    TP_TRY(
        tp_chain_launch(ctx, name, swiglu_factors_kernel, dim3((unsigned)(blocks * p.splits)), THREADS, SHARED_BYTES, true, p));
    sums.n_parts = 3, sums.blocks = (int)blocks, sums.sums = p.column_sums, sums.size = p.size, sums.beta = 1;
    if (p.splits > 1) {
        sums.splits = p.splits, sums.row_columns = used, sums.row_size = p.n * used, sums.row_sums = p.row_sums;
        sums.c = p.du, sums.c_ld = p.du_ld, sums.row_alpha = 1;
    }
    return tp_cuda_stream_add(ctx, name, sums);
}

} // namespace

extern "C" tp_status tp_cuda_swiglu_factors(tp_ctx *ctx, const void *arguments)
{
    const tp_swiglu_factors_args *args = static_cast<const tp_swiglu_factors_args *>(arguments);
    if (!fused(ctx, args) || args->behind.beta != 1) return tp_swiglu_factors_apart(ctx, args);
    for (int64_t row = 0, rows; row < args->swiglu.n; row += rows) TP_TRY(run_slice(ctx, args, row, &rows));
    return TP_OK;
}
