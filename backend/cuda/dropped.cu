/* Low-rank factors behind dropout: masks are drawn, kept and applied where a wide side passes through registers anyway.
 *
 *   down      u_i = d_i(x) a_i^T           one reading of x for all parts; the draws, a number for each value and part, are what
 *                                          takes the time, so their bits are kept for the other two
 *   gradient  da_i += du_i^T d_i(x)        one reading of x and of the bits
 *   up        dx += sum_i d_i(du_i a_i)    one reading and writing of dx
 *
 * Products are made by tensor cores in bf16, with the values that are kept as they are: sums are multiplied by 1 / (1 - p).
 * A lane holds 16 columns that follow each other, so that its draws are whole blocks of the generator and its bits one number;
 * which columns stand for which places of a tensor core's operands does not matter, as long as both sides agree. */
#include "backend/cuda/attention.cuh" /* tensor cores */
#include "backend/cuda/stream.cuh"
#include "backend/lowrank.h"

using tp_attention::load_matrices_transposed;
using tp_attention::mma;

namespace
{

typedef __nv_bfloat16 bf16;

constexpr int PARTS = TP_PACKED_PARTS;
constexpr int LANE_COLUMNS = 16, WARP_COLUMNS = 4 * LANE_COLUMNS;
constexpr int ROWS = 16; /* of a warp */

struct dropped_part {
    int column, rank;   /* of low; rows of a */
    uint32_t least;     /* a number of the generator is kept from here on */
    float keep_scale;
    uint32_t words[2];  /* the generator's key */
    uint64_t step;
    uint16_t *masks;    /* [n, in / 16] or NULL */
    int64_t sums;       /* gradient: where a block's sums begin; < 0: not wanted */
};

struct dropped_params {
    int64_t n, first_row;
    int in, used;
    const bf16 *x, *a;
    bf16 *dx, *low;
    int64_t x_ld, a_ld, dx_ld, low_ld;
    const tp_step_state *state;
    dropped_part parts[PARTS];
    float *sums; /* gradient: [split][size] */
    int64_t size;
};

/* 16 columns of a row, and whether they are kept. */
struct piece {
    uint32_t pairs[8];
    __device__ __forceinline__ void load(const bf16 *from, bool there)
    {
        const uint4 zero = make_uint4(0, 0, 0, 0);
        const uint4 a = there ? reinterpret_cast<const uint4 *>(from)[0] : zero;
        const uint4 b = there ? reinterpret_cast<const uint4 *>(from)[1] : zero;
        pairs[0] = a.x, pairs[1] = a.y, pairs[2] = a.z, pairs[3] = a.w;
        pairs[4] = b.x, pairs[5] = b.y, pairs[6] = b.z, pairs[7] = b.w;
    }
    __device__ __forceinline__ void store(bf16 *to) const
    {
        reinterpret_cast<uint4 *>(to)[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        reinterpret_cast<uint4 *>(to)[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
    }
};

/* ---- down ---- */

constexpr int DOWN_WARPS = 8;

/* The values that are kept, the others 0; returns the bits. */
__device__ __forceinline__ uint32_t draw(const dropped_params &p, const dropped_part &part, int64_t row, int column,
                                         const piece &x, piece &kept)
{
    const uint64_t block = ((uint64_t)(p.first_row + row) * (uint64_t)p.in + (uint64_t)column) / 4,
                   step = p.state != nullptr ? p.state->draw : part.step;
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < LANE_COLUMNS / 4; j++) {
        const uint64_t own = block + j;
        const uint32_t counter[4] = {(uint32_t)own, (uint32_t)(own >> 32), (uint32_t)step, (uint32_t)(step >> 32)};
        uint32_t numbers[4];
        tp_philox4x32(counter, part.words, numbers);
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const bool low = numbers[2 * k] >= part.least, high = numbers[2 * k + 1] >= part.least;
            kept.pairs[2 * j + k] = x.pairs[2 * j + k] & ((low ? 0xffffu : 0u) | (high ? 0xffff0000u : 0u));
            bits |= (low ? 1u << (4 * j + 2 * k) : 0u) | (high ? 2u << (4 * j + 2 * k) : 0u);
        }
    }
    return bits;
}

/* A block takes ROWS rows, its warps every eighth group of columns; T: groups of 8 columns that a part has at most. */
template <int N, int T> __global__ void __launch_bounds__(DOWN_WARPS * 32) down_kernel(const __grid_constant__ dropped_params p)
{
    __shared__ float sums[DOWN_WARPS][N * T * 4][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    const int64_t row0 = (int64_t)blockIdx.x * ROWS + g;
    float sum[N][T][4] = {};
    for (int c = warp * WARP_COLUMNS; c < p.in; c += DOWN_WARPS * WARP_COLUMNS) {
        const int column = c + q * LANE_COLUMNS;
        piece x[2], kept[2], a[T];
#pragma unroll
        for (int h = 0; h < 2; h++) x[h].load(p.x + (row0 + 8 * h) * p.x_ld + column, row0 + 8 * h < p.n);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const dropped_part &part = p.parts[i];
#pragma unroll
            for (int t = 0; t < T; t++)
                a[t].load(p.a + (int64_t)(part.column + t * 8 + g) * p.a_ld + column, t * 8 + g < part.rank);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int64_t row = row0 + 8 * h;
                const uint32_t bits = draw(p, part, row, column, x[h], kept[h]);
                if (part.masks != nullptr && row < p.n)
                    part.masks[row * (p.in / LANE_COLUMNS) + column / LANE_COLUMNS] = (uint16_t)bits;
            }
#pragma unroll
            for (int j = 0; j < LANE_COLUMNS / 4; j++) {
                const uint32_t rows[4] = {kept[0].pairs[2 * j], kept[1].pairs[2 * j], kept[0].pairs[2 * j + 1],
                                          kept[1].pairs[2 * j + 1]};
#pragma unroll
                for (int t = 0; t < T; t++) mma(sum[i][t], rows, a[t].pairs[2 * j], a[t].pairs[2 * j + 1]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < N * T * 4; i++) sums[warp][i][lane] = sum[i / (T * 4)][i / 4 % T][i % 4];
    __syncthreads();
    for (int at = threadIdx.x; at < N * T * 4 * 32; at += DOWN_WARPS * 32) {
        const int i = at / 32 / (T * 4), t = at / 32 / 4 % T, e = at / 32 % 4, l = at % 32;
        const int64_t row = (int64_t)blockIdx.x * ROWS + l / 4 + e / 2 * 8;
        const int column = t * 8 + l % 4 * 2 + e % 2;
        float total = 0;
#pragma unroll
        for (int w = 0; w < DOWN_WARPS; w++) total += sums[w][at / 32][l];
        if (row < p.n && column < p.parts[i].rank)
            p.low[row * p.low_ld + p.parts[i].column + column] = tp_from_f32<bf16>(total * p.parts[i].keep_scale);
    }
}

/* ---- gradient ---- */

constexpr int TILE_ROWS = 32, TILE_COLUMNS = 128, GRADIENT_THREADS = 256, GRADIENT_BLOCKS = 264;
constexpr int TILE_LD = TILE_COLUMNS + 8;
constexpr int EACH = TILE_ROWS * TILE_COLUMNS / 8 / GRADIENT_THREADS; /* groups of 8 values of a thread */

/* Pairs of bits 2k and 2k + 1 as masks of the two values. */
__device__ __forceinline__ uint32_t pair_mask(uint32_t bits, int k)
{
    return ((bits >> (2 * k)) & 1u) * 0xffffu + ((bits >> (2 * k + 1)) & 1u) * 0xffff0000u;
}

/* A block takes TILE_COLUMNS columns and every gridDim.y'th tile of rows; R: groups of 16 columns that a part has at most. */
template <int N, int R>
__global__ void __launch_bounds__(GRADIENT_THREADS) gradient_kernel(const __grid_constant__ dropped_params p)
{
    constexpr int LOW_LD = N * R * 16 + 8, LOW_EACH = (TILE_ROWS * N * R * 2 + GRADIENT_THREADS - 1) / GRADIENT_THREADS;
    __shared__ __align__(16) bf16 tiles[N][TILE_ROWS * TILE_LD], thin[TILE_ROWS * LOW_LD];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = blockIdx.x * TILE_COLUMNS;
    const uint4 zero = make_uint4(0, 0, 0, 0);
    uint4 x[EACH], u[LOW_EACH];
    uint8_t bits[EACH][N];
    float sum[N][R][2][4] = {};

    const auto fetch = [&](int64_t row0) {
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int at = threadIdx.x + e * GRADIENT_THREADS, column = first + at % (TILE_COLUMNS / 8) * 8;
            const int64_t row = row0 + at / (TILE_COLUMNS / 8);
            const bool there = row < p.n && column < p.in;
            x[e] = there ? *reinterpret_cast<const uint4 *>(p.x + row * p.x_ld + column) : zero;
#pragma unroll
            for (int i = 0; i < N; i++)
                bits[e][i] =
                    there ? reinterpret_cast<const uint8_t *>(p.parts[i].masks)[row * (p.in / 8) + column / 8] : (uint8_t)0;
        }
#pragma unroll
        for (int e = 0; e < LOW_EACH; e++) {
            const int at = threadIdx.x + e * GRADIENT_THREADS, column = at % (N * R * 2) * 8;
            const int64_t row = row0 + at / (N * R * 2);
            const bool there = at < TILE_ROWS * N * R * 2 && row < p.n && column < p.used;
            u[e] = there ? *reinterpret_cast<const uint4 *>(p.low + row * p.low_ld + column) : zero;
        }
    };

    fetch((int64_t)blockIdx.y * TILE_ROWS);
    for (int64_t row0 = (int64_t)blockIdx.y * TILE_ROWS; row0 < p.n; row0 += (int64_t)gridDim.y * TILE_ROWS) {
        __syncthreads(); /* the last tiles have been read */
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int at = threadIdx.x + e * GRADIENT_THREADS;
            const int to = at / (TILE_COLUMNS / 8) * TILE_LD + at % (TILE_COLUMNS / 8) * 8;
#pragma unroll
            for (int i = 0; i < N; i++) {
                const uint32_t b = bits[e][i];
                *reinterpret_cast<uint4 *>(&tiles[i][to]) =
                    make_uint4(x[e].x & pair_mask(b, 0), x[e].y & pair_mask(b, 1), x[e].z & pair_mask(b, 2),
                               x[e].w & pair_mask(b, 3));
            }
        }
#pragma unroll
        for (int e = 0; e < LOW_EACH; e++) {
            const int at = threadIdx.x + e * GRADIENT_THREADS;
            if (at < TILE_ROWS * N * R * 2)
                *reinterpret_cast<uint4 *>(&thin[at / (N * R * 2) * LOW_LD + at % (N * R * 2) * 8]) = u[e];
        }
        __syncthreads();
        fetch(row0 + (int64_t)gridDim.y * TILE_ROWS); /* on its way during the products */
#pragma unroll
        for (int k = 0; k < TILE_ROWS; k += 16) {
#pragma unroll
            for (int i = 0; i < N; i++) {
                uint32_t wide[4], low[4];
                load_matrices_transposed(wide, &tiles[i][(k + lane % 16) * TILE_LD + warp * 16 + lane / 16 * 8]);
#pragma unroll
                for (int r = 0; r < R; r++) {
                    const int column = min(p.parts[i].column + r * 16 + lane / 8 % 2 * 8, LOW_LD - 8);
                    load_matrices_transposed(low, &thin[(k + lane % 8 + lane / 16 * 8) * LOW_LD + column]);
                    mma(sum[i][r][0], low, wide[0], wide[1]);
                    mma(sum[i][r][1], low, wide[2], wide[3]);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        float *const to = p.sums + blockIdx.y * p.size + p.parts[i].sums;
        if (p.parts[i].sums < 0) continue;
#pragma unroll
        for (int r = 0; r < R; r++) {
#pragma unroll
            for (int e = 0; e < 4; e++) { /* e: half of the columns, half of the ranks */
                const int rank = r * 16 + lane / 4 + e % 2 * 8, column = first + warp * 16 + e / 2 * 8 + lane % 4 * 2;
                if (rank < p.parts[i].rank && column < p.in)
                    *reinterpret_cast<float2 *>(to + (int64_t)rank * p.in + column) =
                        make_float2(sum[i][r][e / 2][e % 2 * 2], sum[i][r][e / 2][e % 2 * 2 + 1]);
            }
        }
    }
}

/* ---- up ---- */

constexpr int UP_WARPS = 4, UP_BLOCKS = 792;

/* A block takes WARP_COLUMNS columns, whose part of a stays in registers, and its warps every so many'th group of rows. Column
 * 2t + j of a lane's 16 is column 2q + j of the product's tile t. */
template <int N, int R> __global__ void __launch_bounds__(UP_WARPS * 32) up_kernel(const __grid_constant__ dropped_params p)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    const int first = blockIdx.x * WARP_COLUMNS, column = first + q * LANE_COLUMNS;
    uint32_t a[N][R][8][2];
#pragma unroll
    for (int i = 0; i < N; i++) {
#pragma unroll
        for (int r = 0; r < R; r++) {
            const int rank = r * 16 + q * 4; /* places 2q, 2q + 1, 2q + 8, 2q + 9 of the sum are ranks 4q .. 4q + 3 */
            piece rows[4];
#pragma unroll
            for (int k = 0; k < 4; k++)
                rows[k].load(p.a + (int64_t)(p.parts[i].column + rank + k) * p.a_ld + first + g / 2 * LANE_COLUMNS,
                             rank + k < p.parts[i].rank);
#pragma unroll
            for (int t = 0; t < 8; t++) {
                const uint32_t half = g % 2 == 0 ? 0x5410 : 0x7632;
                a[i][r][t][0] = __byte_perm(rows[0].pairs[t], rows[1].pairs[t], half);
                a[i][r][t][1] = __byte_perm(rows[2].pairs[t], rows[3].pairs[t], half);
            }
        }
    }
    for (int64_t row0 = ((int64_t)blockIdx.y * UP_WARPS + warp) * ROWS + g; row0 - g < p.n;
         row0 += (int64_t)gridDim.y * UP_WARPS * ROWS) {
        piece dx[2];
        float sum[8][4] = {};
#pragma unroll
        for (int h = 0; h < 2; h++) dx[h].load(p.dx + (row0 + 8 * h) * p.dx_ld + column, row0 + 8 * h < p.n);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const dropped_part &part = p.parts[i];
            uint32_t bits[2], low[R][4];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int64_t row = row0 + 8 * h;
                const bool there = row < p.n;
                bits[h] = there ? part.masks[row * (p.in / LANE_COLUMNS) + column / LANE_COLUMNS] : 0;
#pragma unroll
                for (int r = 0; r < R; r++) {
                    uint2 u = make_uint2(0, 0);
                    if (there && r * 16 + q * 4 < part.rank)
                        u = *reinterpret_cast<const uint2 *>(p.low + row * p.low_ld + part.column + r * 16 + q * 4);
                    low[r][h] = u.x, low[r][2 + h] = u.y;
                }
            }
#pragma unroll
            for (int t = 0; t < 8; t++) {
                float own[4] = {};
#pragma unroll
                for (int r = 0; r < R; r++) mma(own, low[r], a[i][r][t][0], a[i][r][t][1]);
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (bits[e / 2] >> (2 * t + e % 2) & 1) sum[t][e] = fmaf(own[e], part.keep_scale, sum[t][e]);
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int t = 0; t < 8; t++) {
                float x, y;
                tp_unpack_bf16(dx[h].pairs[t], x, y);
                dx[h].pairs[t] = tp_pack_bf16(x + sum[t][2 * h], y + sum[t][2 * h + 1]);
            }
            if (row0 + 8 * h < p.n) dx[h].store(p.dx + (row0 + 8 * h) * p.dx_ld + column);
        }
    }
}

/* ---- launching ---- */

/* Returns the number of parts; *greatest: the highest rank. */
int params_of(const tp_dropped_args *a, dropped_params *p, int64_t *greatest)
{
    int n = 0, column = 0;
    *p = dropped_params{};
    p->n = a->n, p->in = (int)a->in, p->first_row = a->first_row, p->state = a->state;
    p->x = static_cast<const bf16 *>(a->x.data), p->x_ld = a->x.ld;
    p->a = static_cast<const bf16 *>(a->a.data), p->a_ld = a->a.ld;
    p->dx = static_cast<bf16 *>(a->dx.data), p->dx_ld = a->dx.ld;
    p->low = static_cast<bf16 *>(a->low.data), p->low_ld = a->low.ld;
    *greatest = 0;
    for (int i = 0; i < PARTS; i++) {
        if (a->rank[i] == 0) continue;
        dropped_part *part = &p->parts[n];
        part->column = column, part->rank = (int)a->rank[i];
        part->least = (uint32_t)ceil((double)a->p[i] * 16777216.0) << 8; /* as tp_cuda_dropout compares the upper 24 bits */
        part->keep_scale = (float)(1.0 / (1.0 - (double)a->p[i]));
        part->words[0] = (uint32_t)a->key[i].seed ^ (uint32_t)(a->key[i].seed >> 32) * 0x9E3779B9u;
        part->words[1] = a->key[i].stream;
        part->step = a->key[i].step;
        if (a->masks != NULL) part->masks = reinterpret_cast<uint16_t *>(a->masks + n * a->n * (a->in / 8));
        part->sums = -1;
        column += part->rank, n++;
        if (a->rank[i] > *greatest) *greatest = a->rank[i];
    }
    p->used = column;
    return n;
}

bool takes(const tp_dropped_args *a)
{
    return a->masks != NULL || a->scratch.data == NULL;
}

/* Calls f<parts, GROUPS of `wide` columns of the highest rank>. */
#define WITH_PARTS(n, groups_of_two, N, G, ...)                  \
    do {                                                         \
        if ((groups_of_two) && (n) == 1) {                       \
            constexpr int N = 1, G = 2;                          \
            __VA_ARGS__                                          \
        } else if ((groups_of_two) && (n) == 2) {                \
            constexpr int N = 2, G = 2;                          \
            __VA_ARGS__                                          \
        } else if (groups_of_two) {                              \
            constexpr int N = 3, G = 2;                          \
            __VA_ARGS__                                          \
        } else if ((n) == 1) {                                   \
            constexpr int N = 1, G = 1;                          \
            __VA_ARGS__                                          \
        } else if ((n) == 2) {                                   \
            constexpr int N = 2, G = 1;                          \
            __VA_ARGS__                                          \
        } else {                                                 \
            constexpr int N = 3, G = 1;                          \
            __VA_ARGS__                                          \
        }                                                        \
    } while (0)

} // namespace

extern "C" tp_status tp_cuda_dropped_down(tp_ctx *ctx, const void *arguments)
{
    const tp_dropped_args *args = static_cast<const tp_dropped_args *>(arguments);
    if (!takes(args)) return tp_dropped_down_apart(ctx, args);
    dropped_params p;
    int64_t rank;
    const int n = params_of(args, &p, &rank);
    if (n == 0) return TP_OK;
    WITH_PARTS(n, rank > 16, N, G, {
        TP_CUDA_LAUNCH(ctx, "dropped_down", (down_kernel<N, 2 * G>), (unsigned)tp_cuda_ceil(p.n, ROWS), DOWN_WARPS * 32, 0, p);
    });
    return TP_OK;
}

extern "C" tp_status tp_cuda_dropped_gradient(tp_ctx *ctx, const void *arguments)
{
    const tp_dropped_args *args = static_cast<const tp_dropped_args *>(arguments);
    if (!takes(args)) return tp_dropped_gradient_apart(ctx, args);
    dropped_params p;
    tp_stream_sums add = {};
    int64_t rank;
    const int n = params_of(args, &p, &rank);
    for (int i = 0, k = 0; i < PARTS; i++) {
        if (args->rank[i] == 0) continue;
        dropped_part *part = &p.parts[k++];
        if (args->da[i] == NULL) continue;
        part->sums = p.size;
        add.parts[add.n_parts++] = {p.size, args->in, part->rank, true, args->da[i], part->keep_scale};
        p.size += args->in * part->rank;
    }
    if (p.size == 0 || p.n <= 0) return TP_OK;
    const int64_t columns = tp_cuda_ceil(args->in, TILE_COLUMNS), tiles = tp_cuda_ceil(p.n, TILE_ROWS);
    const int64_t room = (int64_t)(TP_CUDA_WORKSPACE_BYTES / sizeof(float)) / p.size;
    int64_t splits = tp_cuda_min(tp_cuda_min(tp_cuda_ceil(GRADIENT_BLOCKS, columns), tiles), room);
    if (splits < 1)
        return tp_fail(ctx, TP_UNSUPPORTED, "dropped_gradient: %lld columns are too many for the cuda backend",
                       (long long)args->in);
    p.sums = reinterpret_cast<float *>(tp_cuda_of(ctx)->workspace);
    WITH_PARTS(n, rank > 16, N, G, {
        TP_CUDA_LAUNCH(ctx, "dropped_gradient", (gradient_kernel<N, G>), dim3((unsigned)columns, (unsigned)splits),
                       GRADIENT_THREADS, 0, p);
    });
    add.sums = p.sums, add.size = p.size, add.blocks = (int)splits, add.beta = 1;
    return tp_cuda_stream_add(ctx, "dropped_gradient", add);
}

extern "C" tp_status tp_cuda_dropped_up(tp_ctx *ctx, const void *arguments)
{
    const tp_dropped_args *args = static_cast<const tp_dropped_args *>(arguments);
    if (!takes(args)) return tp_dropped_up_apart(ctx, args);
    dropped_params p;
    int64_t rank;
    const int n = params_of(args, &p, &rank);
    if (n == 0) return TP_OK;
    const int64_t columns = args->in / WARP_COLUMNS, rows = tp_cuda_ceil(p.n, UP_WARPS * ROWS);
    const dim3 grid((unsigned)columns, (unsigned)tp_cuda_min(tp_cuda_ceil(UP_BLOCKS, columns), rows));
    WITH_PARTS(n, rank > 16, N, G, {
        TP_CUDA_LAUNCH(ctx, "dropped_up", (up_kernel<N, G>), grid, UP_WARPS * 32, 0, p);
    });
    return TP_OK;
}
