/* Low-rank factors and activations on Hopper: what reads a wide matrix once and makes little of it.
 *
 *   down      u = x A^T                          sums along the rows of the wide side
 *   gradient  dA = du^T x                        sums down its columns
 *   up        du = dy B and dB = dy^T u          both from one reading, for all parts of a stacked weight
 *
 * A block has one thread that names tiles of 128 x 128 to the hardware that copies (tensor_map.cuh), as many ahead as shared
 * memory holds, and eight warps that multiply them on tensor cores, or eight for each of both. Sums along rows take 16 rows a
 * warp, sums down columns 16 columns. A block takes SUB tiles below each other before it goes on to the next columns, so that
 * it reads the thin side less often. Where there are few rows, several blocks share them, each takes every so many'th tile of
 * columns. Sums that blocks share go to the workspace, and a second kernel, set up while the first still runs, adds them in
 * order. How work is cut depends on the shape alone, and so do the bits. */
#include "backend/cuda/stream.cuh"

#include "backend/cuda/attention.cuh" /* tensor cores */
#include "backend/cuda/chain.cuh"
#include "backend/cuda/cluster.cuh"
#include "backend/cuda/hopper.cuh"
#include "backend/cuda/tensor_map.cuh"

using tp_attention::bf16;
using tp_attention::mma;

namespace
{

constexpr int TILE = 128; /* rows, and columns */
constexpr int WARPS = 8;  /* for sums one way */
constexpr int PIECE = 16; /* columns of the thin side that lie together: 32 bytes a row */
constexpr int BOX = 64;   /* columns of the wide side that lie together: 128 bytes a row */
constexpr int BOX_BYTES = TILE * BOX * 2, WIDE_BYTES = 2 * BOX_BYTES, THIN_BYTES = TILE * PIECE * 2;
constexpr int ROOM = 220 << 10; /* of a block's tiles, in shared memory */
constexpr int STAGES_MAX = 6, ALIGNMENT = 1024;
/* One block on each multiprocessor of a Hopper GPU; a constant, so that bits do not depend on the GPU. */
constexpr int BLOCKS_WANTED = 132;
constexpr int PARTS = TP_PACKED_PARTS, SPLITS_MAX = 16;

struct stream_part {
    int column, columns, steps; /* of the wide side, and in tiles */
    int thin, rank;             /* its columns of c and of the thin side */
    int64_t sums;               /* where its sums down columns begin; < 0: not wanted */
};

struct stream_params {
    CUtensorMap wide, thin, down[PARTS];
    int64_t n;
    int n_parts, steps, splits, stages, sub;
    stream_part parts[PARTS];
    bf16 *c;
    int64_t c_ld;
    float alpha;
    float *row_sums; /* of splits: [split][row][thin columns of all parts] */
    int row_sums_ld;
    float *column_sums; /* of row blocks: [block][part][rank][columns] */
    int64_t column_sums_size;
};

#if TP_HOPPER

using namespace tp_tiles;

constexpr int NOWHERE = 1 << 30; /* a column that no matrix has: zeros come from there, and nothing is read */

/* ---- the kernel ---- */

/* What the block works on. */
struct place {
    int64_t row0, block;
    int split;
};

/* body(part, column of the wide side within the part) for the block's tiles of columns, after(part) behind each part. */
template <typename Body, typename After>
__device__ __forceinline__ void each_step(const stream_params &p, int split, Body body, After after)
{
    int before = 0;
    for (int i = 0; i < p.n_parts; i++) {
        const stream_part &part = p.parts[i];
        for (int s = (split - before % p.splits + p.splits) % p.splits; s < part.steps; s += p.splits) body(i, s * TILE);
        before += part.steps;
        after(i);
    }
}

template <bool DOWN, bool GRADIENT, bool NT, int T>
__device__ void copy_tiles(const stream_params &p, const place &at, uint32_t tiles, uint32_t held, uint32_t held_full, ring r)
{
    constexpr int DOWN_BYTES = DOWN ? T * THIN_BYTES : 0, OWN_THIN_BYTES = !DOWN ? T * THIN_BYTES : 0;
    constexpr int STAGE = WIDE_BYTES + DOWN_BYTES + OWN_THIN_BYTES;
    if (DOWN && GRADIENT) {
        expect(held_full, p.n_parts * p.sub * T * THIN_BYTES);
        for (int i = 0; i < p.n_parts; i++)
            for (int s = 0; s < p.sub; s++)
                for (int t = 0; t < T; t++)
                    bring(held + ((i * p.sub + s) * T + t) * THIN_BYTES, &p.thin, p.parts[i].thin + t * PIECE,
                          at.row0 + s * TILE, held_full);
    }
    each_step(
        p, at.split,
        [&](int i, int column) {
            const int64_t first = p.parts[i].column + column;
            for (int s = 0; s < p.sub; s++, r.next()) {
                const int64_t row = at.row0 + s * TILE;
                const uint32_t full = r.full + r.stage * 8, tile = tiles + r.stage * STAGE, thin = tile + WIDE_BYTES;
                tp_hopper::barrier_wait(r.empty + r.stage * 8, r.round ^ 1);
                expect(full, WIDE_BYTES + OWN_THIN_BYTES + (s == 0 ? DOWN_BYTES : 0));
                bring(tile, &p.wide, first, row, full);
                bring(tile + BOX_BYTES, &p.wide, column + BOX < p.parts[i].columns ? first + BOX : NOWHERE, row, full);
                for (int t = 0; t < T; t++) {
                    if (!DOWN) bring(thin + t * THIN_BYTES, &p.thin, t * PIECE, row, full);
                    if (DOWN && !NT && s == 0) bring(thin + t * THIN_BYTES, &p.down[i], t * PIECE, column, full);
                }
                if (DOWN && NT && s == 0) { /* [16 T, 64] twice */
                    bring(thin, &p.down[0], column, 0, full);
                    bring(thin + T * PIECE * 128, &p.down[0], column + BOX, 0, full);
                }
            }
        },
        [](int) {});
}

/* The thin factor of a tile of columns, [128, 16 T], in registers. */
template <bool NT, int T> __device__ __forceinline__ void hold_down(uint32_t (&b)[TILE / 16][T][4], uint32_t thin)
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < TILE / 16; k++) {
#pragma unroll
        for (int t = 0; t < T; t++) {
            if constexpr (NT)
                matrices(b[k][t], thin + k / 4 * (T * PIECE * 128) + (t * 16 + lane / 16 * 8 + lane % 8) * 128 +
                                      (((k % 4 * 2 + lane / 8 % 2) ^ (lane % 8)) * 16));
            else
                matrices_transposed(b[k][t], thin + t * THIN_BYTES + thin_at(k * 16 + lane % 16, lane / 16));
        }
    }
}

/* The warp's 16 rows of a tile times the held factor. */
template <int T>
__device__ __forceinline__ void add_down(float (&sum)[2 * T][4], const uint32_t (&b)[TILE / 16][T][4], uint32_t tile, int warp)
{
    const int lane = threadIdx.x % 32;
    constexpr int AHEAD = 4; /* on their way before the first product waits */
#pragma unroll
    for (int i = 0; i < TILE / 16; i += AHEAD) {
        uint32_t x[AHEAD][4];
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            matrices(x[k], tile + i / 4 * BOX_BYTES + wide_at(warp * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
#pragma unroll
            for (int t = 0; t < T; t++) {
                mma(sum[2 * t], x[k], b[i + k][t][0], b[i + k][t][1]);
                mma(sum[2 * t + 1], x[k], b[i + k][t][2], b[i + k][t][3]);
            }
        }
    }
}

/* thin^T times the warp's 16 columns of a tile. */
template <int T> __device__ __forceinline__ void add_gradient(float (&sum)[T][2][4], uint32_t thin, uint32_t tile, int warp)
{
    constexpr int AHEAD = 4;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < TILE / 16; i += AHEAD) {
        uint32_t y[AHEAD][4], u[AHEAD][T][4];
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            const int row = (i + k) * 16;
            matrices_transposed(y[k], tile + warp / 4 * BOX_BYTES + wide_at(row + lane % 16, warp % 4 * 2 + lane / 16));
#pragma unroll
            for (int t = 0; t < T; t++)
                matrices_transposed(u[k][t], thin + t * THIN_BYTES + thin_at(row + lane % 8 + lane / 16 * 8, lane / 8 % 2));
        }
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
#pragma unroll
            for (int t = 0; t < T; t++) {
                mma(sum[t][0], u[k][t], y[k][0], y[k][1]);
                mma(sum[t][1], u[k][t], y[k][2], y[k][3]);
            }
        }
    }
}

/* [rank, columns] of the block. */
template <int T>
__device__ __forceinline__ void store_gradient(const stream_params &p, const stream_part &part, int64_t block, int column,
                                               int warp, const float (&sum)[T][2][4])
{
    const int lane = threadIdx.x % 32;
    float *const to = p.column_sums + block * p.column_sums_size + part.sums;
#pragma unroll
    for (int t = 0; t < T; t++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int r = t * 16 + lane / 4 + j * 8, c = column + warp * 16 + h * 8 + lane % 4 * 2;
                if (r < part.rank && c < part.columns)
                    *reinterpret_cast<float2 *>(to + (int64_t)r * part.columns + c) =
                        make_float2(sum[t][h][j * 2], sum[t][h][j * 2 + 1]);
            }
        }
    }
}

template <int T, int SUB>
__device__ __forceinline__ void store_down(const stream_params &p, const stream_part &part, const place &at, int warp,
                                           const float (&sum)[SUB][2 * T][4])
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int s = 0; s < SUB; s++) {
#pragma unroll
        for (int t = 0; t < 2 * T; t++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int64_t row = at.row0 + s * TILE + warp * 16 + lane / 4 + h * 8;
                const int column = t * 8 + lane % 4 * 2;
                const float x = sum[s][t][h * 2], y = sum[s][t][h * 2 + 1];
                if (row >= p.n || column >= part.rank) continue;
                if (p.splits == 1)
                    *reinterpret_cast<uint32_t *>(p.c + row * p.c_ld + part.thin + column) =
                        tp_pack_bf16(p.alpha * x, p.alpha * y);
                else
                    *reinterpret_cast<float2 *>(p.row_sums + ((int64_t)at.split * p.n + row) * p.row_sums_ld + part.thin +
                                                column) = make_float2(x, y);
            }
        }
    }
}

#endif

template <int T> constexpr int stage_bytes = WIDE_BYTES + T *THIN_BYTES;
template <bool DOWN, bool GRADIENT> constexpr int warps = WARPS *(DOWN &&GRADIENT ? 2 : 1);

/* SUB: tiles below each other whose sums along rows a warp holds; without such sums their number is p.sub. */
template <bool DOWN, bool GRADIENT, bool NT, int T, int SUB>
__global__ void __launch_bounds__((warps<DOWN, GRADIENT> + 1) * 32, 1) stream_kernel(const __grid_constant__ stream_params p)
{
#if TP_HOPPER
    extern __shared__ unsigned char shared[];
    __shared__ __align__(8) uint64_t barriers[2 * STAGES_MAX + 1];
    const int warp = threadIdx.x / 32, own = warp % WARPS;
    const uint32_t tiles = ((uint32_t)__cvta_generic_to_shared(shared) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    const uint32_t held = tiles + p.stages * stage_bytes<T>;
    const uint32_t first = (uint32_t)__cvta_generic_to_shared(barriers), held_full = first + 2 * STAGES_MAX * 8;
    ring r = {first, first + STAGES_MAX * 8, p.stages, 0, 0};
    place at;
    at.split = (int)blockIdx.x % p.splits, at.block = blockIdx.x / p.splits, at.row0 = at.block * p.sub * TILE;
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.stages; i++) {
            tp_hopper::barrier_open(r.full + i * 8, 1);
            tp_hopper::barrier_open(r.empty + i * 8, warps<DOWN, GRADIENT>);
        }
        tp_hopper::barrier_open(held_full, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        tp_hopper::see_copies();
    }
    __syncthreads();
    tp_chain_wait();
    if (warp == warps<DOWN, GRADIENT>) {
        if (threadIdx.x % 32 == 0) copy_tiles<DOWN, GRADIENT, NT, T>(p, at, tiles, held, held_full, r);
        return;
    }
    const auto begin = [&]() {
        tp_hopper::barrier_wait(r.full + r.stage * 8, r.round);
        return tiles + r.stage * stage_bytes<T>;
    };
    const auto end = [&]() {
        __syncwarp();
        if (threadIdx.x % 32 == 0) tp_hopper::barrier_arrive(r.empty + r.stage * 8);
        r.next();
    };
    if (GRADIENT && (!DOWN || warp >= WARPS)) {
        if (DOWN) tp_hopper::barrier_wait(held_full, 0);
        each_step(
            p, at.split,
            [&](int i, int column) {
                float sum[T][2][4] = {};
                for (int s = 0; s < p.sub; s++) {
                    const uint32_t tile = begin();
                    add_gradient<T>(sum, DOWN ? held + (i * p.sub + s) * T * THIN_BYTES : tile + WIDE_BYTES, tile, own);
                    end();
                }
                if (p.parts[i].sums >= 0) store_gradient<T>(p, p.parts[i], at.block, column, own, sum);
            },
            [](int) {});
        return;
    }
    if constexpr (DOWN) {
        uint32_t b[TILE / 16][T][4];
        float sum[SUB][2 * T][4] = {};
        each_step(
            p, at.split,
            [&](int, int) {
#pragma unroll
                for (int s = 0; s < SUB; s++) {
                    const uint32_t tile = begin();
                    if (s == 0) hold_down<NT, T>(b, tile + WIDE_BYTES);
                    add_down<T>(sum[s], b, tile, own);
                    end();
                }
            },
            [&](int i) {
                store_down<T, SUB>(p, p.parts[i], at, own, sum);
#pragma unroll
                for (int s = 0; s < SUB; s++)
#pragma unroll
                    for (int t = 0; t < 2 * T; t++)
#pragma unroll
                        for (int j = 0; j < 4; j++) sum[s][t][j] = 0;
            });
    }
#endif
}

/* ---- sums of several blocks ---- */

constexpr int ADD_THREADS = 256, ADD_GROUPS = 8, ADD_LANES = ADD_THREADS / ADD_GROUPS;

__device__ __forceinline__ void add_along_rows(const tp_stream_sums &p)
{
    const int64_t at = ((blockIdx.x - p.column_blocks) * ADD_THREADS + threadIdx.x) * 2;
    if (at >= p.row_size) return;
    float2 sum = make_float2(0, 0);
#pragma unroll 8
    for (int s = 0; s < p.splits; s++) {
        const float2 x = *reinterpret_cast<const float2 *>(p.row_sums + s * p.row_size + at);
        sum.x += x.x, sum.y += x.y;
    }
    *reinterpret_cast<uint32_t *>(p.c + at / p.row_columns * p.c_ld + at % p.row_columns) =
        tp_pack_bf16(p.row_alpha * sum.x, p.row_alpha * sum.y);
}

/* out = alpha * the sum of what the blocks found + beta * out. Groups of threads take every ADD_GROUPS'th block each. */
__global__ void __launch_bounds__(ADD_THREADS) add_kernel(tp_stream_sums p)
{
    __shared__ float2 sums[ADD_GROUPS][ADD_LANES];
    tp_chain_wait();
    if (blockIdx.x >= p.column_blocks) {
        add_along_rows(p);
        return;
    }
    const int lane = threadIdx.x % ADD_LANES, group = threadIdx.x / ADD_LANES;
    const int64_t at = ((int64_t)blockIdx.x * ADD_LANES + lane) * 2;
    float2 sum = make_float2(0, 0);
    if (at < p.size) {
#pragma unroll 4
        for (int b = group; b < p.blocks; b += ADD_GROUPS) {
            const float2 x = *reinterpret_cast<const float2 *>(p.sums + b * p.size + at);
            sum.x += x.x, sum.y += x.y;
        }
    }
    sums[group][lane] = sum;
    __syncthreads();
    if (group > 0 || at >= p.size) return;
    sum = make_float2(0, 0);
#pragma unroll
    for (int g = 0; g < ADD_GROUPS; g++) sum.x += sums[g][lane].x, sum.y += sums[g][lane].y;
    int i = 0;
    while (i < PARTS - 1 && i < p.n_parts - 1 && at >= p.parts[i + 1].first) i++;
    const int64_t inside = at - p.parts[i].first, r = inside / p.parts[i].columns, c = inside % p.parts[i].columns;
    float *const first = p.parts[i].out + (p.parts[i].transposed ? inside : c * p.parts[i].rank + r);
    float *const second = first + (p.parts[i].transposed ? 1 : p.parts[i].rank);
    *first = p.parts[i].alpha * sum.x + (p.beta != 0 ? p.beta * *first : 0.0f);
    *second = p.parts[i].alpha * sum.y + (p.beta != 0 ? p.beta * *second : 0.0f);
}

/* ---- launching ---- */

/* How rows and tiles of columns are cut. */
struct cut {
    int sub, splits;
    int64_t blocks; /* of rows */
};

/* The one that takes least, in tiles: what the fullest block reads, `besides` for each of its tiles of columns, and, where
 * blocks share rows, `sharing` for each of its tiles of rows. */
cut cut_of(int64_t n, int steps, int sub_max, double besides, double sharing)
{
    cut best = {};
    double least = INFINITY;
    for (int sub = 1; sub <= sub_max; sub *= 2) {
        for (int splits = 1; splits <= SPLITS_MAX && splits <= steps; splits++) {
            const int64_t blocks = tp_cuda_ceil(n, TILE * sub);
            const double rounds = (double)tp_cuda_ceil(blocks * splits, BLOCKS_WANTED),
                         own = (double)tp_cuda_ceil(steps, splits);
            const double cost = rounds * own * (sub + besides) + (splits > 1 ? sharing * sub : 0);
            if (cost < least * 0.999) least = cost, best = {sub, splits, blocks};
        }
    }
    return best;
}

template <bool DOWN, bool GRADIENT, bool NT, int T, int SUB>
tp_status launch(tp_ctx *ctx, const char *name, stream_params *p, int64_t blocks)
{
    const int held = DOWN && GRADIENT ? p->n_parts * p->sub * T * THIN_BYTES : 0;
    p->stages = (int)tp_cuda_min((ROOM - held) / stage_bytes<T>, STAGES_MAX);
    const int shared = p->stages * stage_bytes<T> + held + ALIGNMENT;
    TP_CUDA_ALLOW_SHARED(ctx, name, (stream_kernel<DOWN, GRADIENT, NT, T, SUB>), shared);
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)(blocks * p->splits)), config.blockDim = dim3((warps<DOWN, GRADIENT> + 1) * 32);
    config.dynamicSmemBytes = (size_t)shared, config.stream = tp_cuda_of(ctx)->stream;
    config.attrs = &attribute, config.numAttrs = 1;
    return tp_cuda_check(ctx, name, cudaLaunchKernelEx(&config, stream_kernel<DOWN, GRADIENT, NT, T, SUB>, *p));
}

template <bool GRADIENT, bool NT, int T> tp_status launch_sub(tp_ctx *ctx, const char *name, stream_params *p, int64_t blocks)
{
    if (p->sub == 1) return launch<true, GRADIENT, NT, T, 1>(ctx, name, p, blocks);
    if constexpr (GRADIENT && T == 1) {
        if (p->sub == 4) return launch<true, GRADIENT, NT, T, 4>(ctx, name, p, blocks);
    }
    return launch<true, GRADIENT, NT, T, 2>(ctx, name, p, blocks);
}

/* What the blocks of a kernel left. */
tp_status add_blocks(tp_ctx *ctx, const char *name, const stream_params &from, tp_stream_sums p)
{
    p.sums = from.column_sums, p.size = p.n_parts > 0 ? from.column_sums_size : 0;
    if (from.c != NULL && from.splits > 1) {
        p.splits = from.splits, p.row_columns = from.row_sums_ld, p.row_size = from.n * from.row_sums_ld;
        p.row_sums = from.row_sums, p.c = from.c, p.c_ld = from.c_ld, p.row_alpha = from.alpha;
    }
    return tp_cuda_stream_add(ctx, name, p);
}

bool pairs_aligned(tp_rows c)
{
    return reinterpret_cast<uintptr_t>(c.data) % 4 == 0 && c.ld % 2 == 0;
}

bool fits(tp_ctx *ctx, int64_t n, int64_t columns, tp_rows wide)
{
    const tp_cuda *cuda = tp_cuda_of(ctx);
    return cuda->tensor_maps && n > 0 && n <= INT32_MAX / 2 && columns > 0 && columns % 8 == 0 && columns <= INT32_MAX / 2 &&
           wide.dtype == TP_BF16 && tp_rows_aligned(wide);
}

} // namespace

tp_status tp_cuda_stream_add(tp_ctx *ctx, const char *name, tp_stream_sums sums)
{
    sums.column_blocks = tp_cuda_ceil(sums.size, 2 * ADD_LANES);
    const int64_t blocks = sums.column_blocks + tp_cuda_ceil(sums.row_size, 2 * ADD_THREADS);
    return blocks == 0 ? TP_OK : tp_cuda_check(ctx, name, tp_cluster::launch_early(ctx, add_kernel, blocks, ADD_THREADS, sums));
}

/* ---- tensor maps ---- */

tp_status tp_cuda_tensor_map(tp_ctx *ctx, const char *name, CUtensorMap *map, tp_rows data, int64_t rows, int64_t columns,
                             int tile_rows, int tile_columns)
{
    const cuuint64_t size[2] = {(cuuint64_t)columns, (cuuint64_t)rows}, stride[1] = {(cuuint64_t)data.ld * 2};
    const cuuint32_t box[2] = {(cuuint32_t)tile_columns, (cuuint32_t)tile_rows}, each[2] = {1, 1};
    const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(tp_cuda_of(ctx)->tensor_maps);
    const CUresult result =
        encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, data.data, size, stride, box, each, CU_TENSOR_MAP_INTERLEAVE_NONE,
               tile_columns * 2 == 32 ? CU_TENSOR_MAP_SWIZZLE_32B : CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? TP_OK : tp_fail(ctx, TP_DEVICE, "%s: a tensor map was refused: %d", name, (int)result);
}

/* ---- u = x A^T ---- */

bool tp_cuda_stream_down_takes(tp_ctx *ctx, const tp_cuda_stream_down_args *args)
{
    return fits(ctx, args->n, args->k, args->a) && args->m > 0 && args->m <= 64 && args->m % 8 == 0 &&
           args->b.dtype == TP_BF16 && tp_rows_aligned(args->b) && args->c.dtype == TP_BF16 && pairs_aligned(args->c) &&
           (int64_t)SPLITS_MAX * args->n * args->m <= (int64_t)(TP_CUDA_WORKSPACE_BYTES / sizeof(float));
}

tp_status tp_cuda_stream_down(tp_ctx *ctx, const tp_cuda_stream_down_args *args)
{
    static const char name[] = "matmul";
    stream_params p = {};
    const int steps = (int)tp_cuda_ceil(args->k, TILE), pieces = (int)tp_cuda_ceil(args->m, PIECE);
    const cut cut = cut_of(args->n, steps, pieces > 3 ? 1 : 2, 0.06 * pieces, 1.5); /* registers */
    p.n = args->n, p.n_parts = 1, p.steps = steps, p.splits = cut.splits, p.sub = cut.sub;
    p.parts[0] = {0, (int)args->k, steps, 0, args->m, -1};
    p.c = static_cast<bf16 *>(args->c.data), p.c_ld = args->c.ld, p.alpha = args->alpha;
    p.row_sums = reinterpret_cast<float *>(tp_cuda_of(ctx)->workspace), p.row_sums_ld = args->m;
    TP_TRY(tp_cuda_tensor_map(ctx, name, &p.wide, args->a, args->n, args->k, TILE, BOX));
    TP_TRY(tp_cuda_tensor_map(ctx, name, &p.down[0], args->b, args->m, args->k, pieces * PIECE, BOX));
    switch (pieces) {
    case 1: TP_TRY((launch_sub<false, true, 1>(ctx, name, &p, cut.blocks))); break;
    case 2: TP_TRY((launch_sub<false, true, 2>(ctx, name, &p, cut.blocks))); break;
    case 3: TP_TRY((launch_sub<false, true, 3>(ctx, name, &p, cut.blocks))); break;
    default: TP_TRY((launch<true, false, true, 4, 1>(ctx, name, &p, cut.blocks)));
    }
    return add_blocks(ctx, name, p, {});
}

/* ---- du = dy B, dB = dy^T u ---- */

bool tp_cuda_stream_up_takes(tp_ctx *ctx, const tp_lowrank_backward_args *args)
{
    int64_t out = 0, used = 0;
    bool fine = true;
    for (int i = 0; i < PARTS; i++) {
        out += args->rows[i], used += args->rank[i];
        fine = fine && args->rank[i] <= 32 && args->rank[i] % 8 == 0 && args->rows[i] % 8 == 0 &&
               (args->rank[i] == 0 || args->rows[i] > 0);
    }
    return fine && used > 0 && fits(ctx, args->n, out, args->dy) && args->b.dtype == TP_BF16 && args->u.dtype == TP_BF16 &&
           args->du.dtype == TP_BF16 && tp_rows_aligned(args->b) && tp_rows_aligned(args->u) && pairs_aligned(args->du) &&
           (out + SPLITS_MAX * 4 * TILE) * used * 4 <= (int64_t)TP_CUDA_WORKSPACE_BYTES;
}

/* Rows from `row` on, as many as the workspace has room for; returns how many. */
static tp_status up_slice(tp_ctx *ctx, const tp_lowrank_backward_args *args, int64_t row, int64_t *rows)
{
    static const char name[] = "lowrank_backward";
    stream_params p = {};
    tp_stream_sums add = {};
    int64_t size = 0, used = 0, out = 0;
    int pieces = 1;
    for (int i = 0; i < PARTS; i++) {
        if (args->rank[i] > 0) {
            stream_part *part = &p.parts[p.n_parts];
            *part = {(int)out, (int)args->rows[i], (int)tp_cuda_ceil(args->rows[i], TILE), (int)used, (int)args->rank[i], -1};
            if (args->db[i] != NULL) {
                part->sums = size;
                add.parts[add.n_parts++] = {size, args->rows[i], (int)args->rank[i], false, args->db[i], args->scaling[i]};
                size += args->rows[i] * args->rank[i];
            }
            p.steps += part->steps, p.n_parts++;
            if (args->rank[i] > PIECE) pieces = 2;
        }
        out += args->rows[i], used += args->rank[i];
    }
    cut cut = cut_of(args->n, p.steps, pieces > 1 ? 1 : 4, 0.25, 0.02 * (double)used); /* registers */
    float *const workspace = reinterpret_cast<float *>(tp_cuda_of(ctx)->workspace);
    const int64_t each = size + (int64_t)cut.splits * used * cut.sub * TILE; /* floats of a block of rows */
    cut.blocks =
        tp_cuda_min(tp_cuda_ceil(args->n - row, TILE * cut.sub), (int64_t)(TP_CUDA_WORKSPACE_BYTES / sizeof(float)) / each);
    *rows = tp_cuda_min(args->n - row, cut.blocks * cut.sub * TILE);
    const auto from = [&](tp_rows x) {
        x.data = static_cast<bf16 *>(x.data) + row * x.ld;
        return x;
    };
    p.n = *rows, p.splits = cut.splits, p.sub = cut.sub;
    p.c = static_cast<bf16 *>(from(args->du).data), p.c_ld = args->du.ld, p.alpha = 1;
    p.column_sums = workspace, p.column_sums_size = size;
    p.row_sums = workspace + cut.blocks * size, p.row_sums_ld = (int)used;
    TP_TRY(tp_cuda_tensor_map(ctx, name, &p.wide, from(args->dy), *rows, out, TILE, BOX));
    TP_TRY(tp_cuda_tensor_map(ctx, name, &p.thin, from(args->u), *rows, used, TILE, PIECE));
    for (int i = 0; i < p.n_parts; i++) {
        tp_rows b = args->b;
        b.data = static_cast<bf16 *>(b.data) + p.parts[i].column * b.ld + p.parts[i].thin;
        TP_TRY(tp_cuda_tensor_map(ctx, name, &p.down[i], b, p.parts[i].columns, p.parts[i].rank, TILE, PIECE));
    }
    TP_TRY(pieces == 1 ? (launch_sub<true, false, 1>(ctx, name, &p, cut.blocks))
                       : (launch_sub<true, false, 2>(ctx, name, &p, cut.blocks)));
    add.blocks = (int)cut.blocks, add.beta = 1;
    return add_blocks(ctx, name, p, add);
}

tp_status tp_cuda_stream_up(tp_ctx *ctx, const tp_lowrank_backward_args *args)
{
    for (int64_t row = 0, rows; row < args->n; row += rows) TP_TRY(up_slice(ctx, args, row, &rows));
    return TP_OK;
}

/* ---- dA = du^T x ---- */

bool tp_cuda_stream_gradient_takes(tp_ctx *ctx, const tp_cuda_stream_gradient_args *args)
{
    return fits(ctx, args->n, args->columns, args->wide) && args->rank > 0 && args->rank <= 64 && args->rank % 8 == 0 &&
           args->thin.dtype == TP_BF16 && tp_rows_aligned(args->thin) &&
           args->columns * args->rank * 4 <= (int64_t)TP_CUDA_WORKSPACE_BYTES;
}

tp_status tp_cuda_stream_gradient(tp_ctx *ctx, const tp_cuda_stream_gradient_args *args)
{
    static const char name[] = "matmul_tn";
    stream_params p = {};
    const int64_t size = args->columns * args->rank, tiles = tp_cuda_ceil(args->n, TILE);
    const int steps = (int)tp_cuda_ceil(args->columns, TILE), pieces = (int)tp_cuda_ceil(args->rank, PIECE);
    /* every block one tile of columns; blocks of rows as the multiprocessors have room for */
    int64_t blocks = tp_cuda_min(BLOCKS_WANTED / steps, (int64_t)(TP_CUDA_WORKSPACE_BYTES / sizeof(float)) / size);
    if (steps > BLOCKS_WANTED / 4) /* rounds that are full */
        for (int64_t b = 1, best = INT64_MAX; b <= 8; b++) {
            const int64_t cost = tp_cuda_ceil(b * steps, BLOCKS_WANTED) * (tp_cuda_ceil(tiles, b) + 2);
            if (b * size * 4 <= (int64_t)TP_CUDA_WORKSPACE_BYTES && cost < best) best = cost, blocks = b;
        }
    if (blocks > tiles) blocks = tiles;
    if (blocks < 1) blocks = 1;
    p.n = args->n, p.n_parts = 1, p.steps = steps, p.splits = steps, p.sub = (int)tp_cuda_ceil(tiles, blocks);
    blocks = tp_cuda_ceil(tiles, p.sub);
    p.parts[0] = {0, (int)args->columns, steps, 0, args->rank, 0};
    p.column_sums = reinterpret_cast<float *>(tp_cuda_of(ctx)->workspace), p.column_sums_size = size;
    TP_TRY(tp_cuda_tensor_map(ctx, name, &p.wide, args->wide, args->n, args->columns, TILE, BOX));
    TP_TRY(tp_cuda_tensor_map(ctx, name, &p.thin, args->thin, args->n, args->rank, TILE, PIECE));
    switch (pieces) {
    case 1: TP_TRY((launch<false, true, false, 1, 1>(ctx, name, &p, blocks))); break;
    case 2: TP_TRY((launch<false, true, false, 2, 1>(ctx, name, &p, blocks))); break;
    case 3: TP_TRY((launch<false, true, false, 3, 1>(ctx, name, &p, blocks))); break;
    default: TP_TRY((launch<false, true, false, 4, 1>(ctx, name, &p, blocks))); break;
    }
    tp_stream_sums add = {};
    add.n_parts = 1, add.blocks = (int)blocks, add.beta = args->beta;
    add.parts[0] = {0, args->columns, args->rank, args->transposed, args->out, args->alpha};
    return add_blocks(ctx, name, p, add);
}
