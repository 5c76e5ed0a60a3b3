/* Products with a thin result: c [n, m] = alpha * a op(b), where m is at most 64 and all is bf16: activations on their way into
 * low-rank factors, and gradients on their way back.
 *
 * a is all there is to read, so a block takes some rows of it through shared memory, 128 columns at a time (memory likes long
 * pieces of a row), and b's columns beside them, which lie in L2. Where there are too few rows to fill the GPU, a cluster of
 * up to 8 blocks shares them: each takes every 8th piece, and the parts are added in order, out of each other's shared memory.
 *
 * On the way back the same rows also give the gradient of b, [k, m] = a^T u for a thin u [n, m]: while a tile is in shared
 * memory, each warp multiplies some of its columns by the block's rows of u. The blocks' parts go through the workspace. */
#include "backend/cuda/attention.cuh" /* tensor cores, asynchronous copies */
#include "backend/cuda/cluster.cuh"
#include "backend/cuda/thin.cuh"

using namespace tp_attention;

namespace
{

constexpr int STEP = 128; /* of k */
constexpr int A_LD = STEP + 8;
constexpr int PARTS_MAX = 8;
constexpr int M_MAX = 64, BOTH_M_MAX = 32;
constexpr int BOTH_BLOCKS_MIN = 66; /* fewer blocks would need clusters to fill the GPU, and then two kernels are as quick */

/* How blocks are cut for c alone, and for c and the gradient of b: of that each block writes a whole [k, m], so it takes many
 * rows and no cluster. A warp has 16 M of them. Clusters bring up to `blocks`; a constant, so that bits do not depend on the
 * GPU. */
template <bool BOTH> struct cut {
    static constexpr int rows = BOTH ? 256 : 64, threads = BOTH ? 256 : 128, M = rows / 16 / (threads / 32);
    static constexpr int stages = BOTH ? 2 : 3, blocks = BOTH ? 1 : 396;
};

/* A step's part of b as it lies in memory: [m, STEP] if NT, else [STEP, m]; m is up to TILES * 8. */
template <int TILES, bool NT> constexpr int b_rows = NT ? TILES * 8 : STEP;
template <int TILES, bool NT> constexpr int b_columns = NT ? STEP : TILES * 8;
template <int TILES, bool NT> constexpr int b_ld = b_columns<TILES, NT> + 8;
template <int TILES, bool NT, bool BOTH>
constexpr int stage_values = cut<BOTH>::rows *A_LD + b_rows<TILES, NT> *b_ld<TILES, NT>;
template <int TILES> constexpr int sums_ld = TILES * 8 + 4;
template <int TILES> constexpr int u_ld = TILES * 8 + 8;
template <int TILES, bool NT, bool BOTH>
constexpr int shared_bytes = (cut<BOTH>::stages * stage_values<TILES, NT, BOTH> + (BOTH ? cut<BOTH>::rows * u_ld<TILES> : 0)) *
                             (int)sizeof(bf16);

struct skinny_params {
    int64_t n, k;
    int m, parts;
    const bf16 *a, *b;
    int64_t a_ld, b_ld;
    void *c;
    int64_t c_ld;
    bool c_f32;
    float alpha;
    const bf16 *u; /* [n, m] */
    int64_t u_ld;
    float *db; /* [k, m] of the first rows; the others follow */
};

__device__ __forceinline__ void store_two(const skinny_params &p, int64_t row, int column, float x, float y)
{
    if (row >= p.n || column >= p.m) return;
    const int64_t at = row * p.c_ld + column;
    if (p.c_f32)
        *reinterpret_cast<float2 *>(static_cast<float *>(p.c) + at) = make_float2(p.alpha * x, p.alpha * y);
    else
        *reinterpret_cast<uint32_t *>(static_cast<bf16 *>(p.c) + at) = tp_pack_bf16(p.alpha * x, p.alpha * y);
}

/* u^T as a first factor: its 16 rows from `r` on, and 16 rows of u from `row` on. */
template <int TILES> __device__ __forceinline__ void load_u(uint32_t (&x)[4], const bf16 *u, int row, int r)
{
    const int lane = threadIdx.x % 32;
    load_matrices_transposed(x, u + (row + lane / 16 * 8 + lane % 8) * u_ld<TILES> + r + lane / 8 % 2 * 8);
}

template <int TILES, bool NT, bool BOTH> __global__ void __launch_bounds__(cut<BOTH>::threads) skinny_kernel(skinny_params p)
{
    constexpr int ROWS = cut<BOTH>::rows, THREADS = cut<BOTH>::threads, STAGES = cut<BOTH>::stages, M = cut<BOTH>::M;
    constexpr int STAGE = stage_values<TILES, NT, BOTH>, B_LD = b_ld<TILES, NT>;
    extern __shared__ __align__(16) unsigned char shared[];
    bf16 *const stages = reinterpret_cast<bf16 *>(shared), *const u = stages + STAGES * STAGE;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = (int)blockIdx.x % p.parts;
    const int64_t block = (int)blockIdx.x / p.parts, row0 = block * ROWS, all_steps = (p.k + STEP - 1) / STEP;
    const int steps = (int)((all_steps - part + p.parts - 1) / p.parts);
    const auto column_of = [&](int step) { return ((int64_t)step * p.parts + part) * STEP; };

    const auto copy_step = [&](int step) {
        bf16 *a = stages + step % STAGES * STAGE, *b = a + ROWS * A_LD;
        const int64_t k0 = column_of(step);
#pragma unroll
        for (int i = threadIdx.x; i < ROWS * STEP / 8; i += THREADS) {
            const int r = i / (STEP / 8), c = i % (STEP / 8) * 8;
            const bool there = row0 + r < p.n && k0 + c < p.k;
            copy_async(a + r * A_LD + c, there ? p.a + (row0 + r) * p.a_ld + k0 + c : p.a, there);
        }
        constexpr int CHUNKS = b_columns<TILES, NT> / 8;
#pragma unroll
        for (int i = threadIdx.x; i < b_rows<TILES, NT> * CHUNKS; i += THREADS) {
            const int r = i / CHUNKS, c = i % CHUNKS * 8;
            const bool there = NT ? r < p.m && k0 + c < p.k : k0 + r < p.k && c < p.m;
            const int64_t at = NT ? r * p.b_ld + k0 + c : (k0 + r) * p.b_ld + c;
            copy_async(b + r * B_LD + c, there ? p.b + at : p.b, there);
        }
    };
    if constexpr (BOTH) {
        for (int i = threadIdx.x; i < ROWS * TILES; i += THREADS) {
            const int r = i / TILES, c = i % TILES * 8;
            const bool there = row0 + r < p.n && c < p.m;
            copy_async(u + r * u_ld<TILES> + c, there ? p.u + (row0 + r) * p.u_ld + c : p.u, there);
        }
    }

    constexpr bool HELD = BOTH && TILES == 2; /* u^T stays in registers */
    uint32_t held[HELD ? ROWS / 16 : 1][4];
    float sum[M][TILES][4] = {};
    for (int step = 0; step < STAGES - 1; step++) {
        if (step < steps) copy_step(step);
        copy_commit();
    }
    for (int step = 0; step < steps; step++) {
        copy_wait<STAGES - 2>();
        __syncthreads(); /* this step is here, and nobody reads the one whose room comes next */
        if (step + STAGES - 1 < steps) copy_step(step + STAGES - 1);
        copy_commit();
        const bf16 *a = stages + step % STAGES * STAGE, *b = a + ROWS * A_LD;
        const bf16 *a_corner = a + (warp * 16 * M + lane % 16) * A_LD + lane / 16 * 8;
        const int low = lane % 8 + lane / 16 * 8, high = lane / 8 % 2 * 8; /* of two tiles; of 16 values along k */
        const bf16 *b_corner = NT ? b + low * B_LD + high : b + (high + lane % 8) * B_LD + lane / 16 * 8;
#pragma unroll
        for (int k = 0; k < STEP; k += 16) {
            uint32_t x[M][4];
#pragma unroll
            for (int m = 0; m < M; m++) load_matrices(x[m], a_corner + m * 16 * A_LD + k);
#pragma unroll
            for (int t = 0; t < TILES; t += 2) {
                uint32_t y[4];
                if constexpr (NT)
                    load_matrices(y, b_corner + t * 8 * B_LD + k);
                else
                    load_matrices_transposed(y, b_corner + k * B_LD + t * 8);
#pragma unroll
                for (int m = 0; m < M; m++) {
                    mma(sum[m][t], x[m], y[0], y[1]);
                    mma(sum[m][t + 1], x[m], y[2], y[3]);
                }
            }
        }
        if constexpr (BOTH) {
            if constexpr (HELD) {
                if (step == 0) {
#pragma unroll
                    for (int i = 0; i < ROWS / 16; i++) load_u<TILES>(held[i], u, i * 16, 0);
                }
            }
            constexpr int WIDTH = THREADS / 32 * 8; /* columns that all warps together take at once */
#pragma unroll 1
            for (int c = warp * 8; c < STEP; c += WIDTH) {
                float db[TILES / 2][2][4] = {}; /* rows of db's transpose: two sums each: products wait less for each other */
#pragma unroll
                for (int i = 0; i < ROWS / 32; i++) {
                    uint32_t y[4];
                    load_matrices_transposed(y, a + (i * 32 + lane) * A_LD + c);
#pragma unroll
                    for (int t = 0; t < TILES / 2; t++) {
#pragma unroll
                        for (int h = 0; h < 2; h++) {
                            uint32_t x[4];
                            if constexpr (!HELD) load_u<TILES>(x, u, i * 32 + h * 16, t * 16);
                            mma(db[t][h], HELD ? held[HELD ? i * 2 + h : 0] : x, y[h * 2], y[h * 2 + 1]);
                        }
                    }
                }
                float *const to = p.db + block * p.k * p.m;
#pragma unroll
                for (int t = 0; t < TILES / 2; t++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int64_t column = column_of(step) + c + lane % 4 * 2 + i % 2;
                        const int r = t * 16 + lane / 4 + i / 2 * 8;
                        if (column < p.k && r < p.m) to[column * p.m + r] = db[t][0][i] + db[t][1][i];
                    }
                }
            }
        }
    }

    float *const sums = reinterpret_cast<float *>(shared);
    if (p.parts > 1) {
        copy_wait<0>();
        __syncthreads(); /* nobody reads the tiles any more */
    }
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int t = 0; t < TILES; t++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = (warp * M + m) * 16 + lane / 4 + h * 8, column = t * 8 + lane % 4 * 2;
                if (p.parts == 1)
                    store_two(p, row0 + row, column, sum[m][t][h * 2], sum[m][t][h * 2 + 1]);
                else
                    *reinterpret_cast<float2 *>(sums + row * sums_ld<TILES> + column) =
                        make_float2(sum[m][t][h * 2], sum[m][t][h * 2 + 1]);
            }
        }
    }
    if (p.parts == 1) return;
    tp_cluster::meet();
    const int own = ROWS / p.parts; /* a power of 2 */
    for (int i = threadIdx.x; i < own * TILES * 4; i += THREADS) {
        const int row = part * own + i / (TILES * 4), column = i % (TILES * 4) * 2;
        float2 total = make_float2(0, 0);
        for (int rank = 0; rank < p.parts; rank++) {
            const float2 x = tp_cluster::read_of(rank, sums + row * sums_ld<TILES> + column);
            total.x += x.x, total.y += x.y;
        }
        store_two(p, row0 + row, column, total.x, total.y);
    }
    tp_cluster::meet(); /* the others have read from this block */
}

/* Shared memory to ask for. Blocks that do not all fit at once come in rounds, and three on a multiprocessor share its
 * bandwidth: where two at a time need less than 3/2 of the rounds, two it is. */
int room_of(tp_ctx *ctx, int64_t blocks, int bytes)
{
    constexpr int ROOM_OF_TWO = 100 << 10;
    const int64_t at_once = tp_cuda_of(ctx)->multiprocessors;
    if (blocks <= 3 * at_once || bytes >= ROOM_OF_TWO) return bytes;
    return 2 * tp_cuda_ceil(blocks, 2 * at_once) < 3 * tp_cuda_ceil(blocks, 3 * at_once) ? ROOM_OF_TWO : bytes;
}

template <int TILES, bool NT, bool BOTH> tp_status launch(tp_ctx *ctx, const char *name, skinny_params p)
{
    constexpr int ROWS = cut<BOTH>::rows, bytes = shared_bytes<TILES, NT, BOTH>;
    static_assert(ROWS * sums_ld<TILES> * 4 <= bytes, "the sums take the room of the tiles");
    const int64_t blocks = tp_cuda_ceil(p.n, ROWS), steps = tp_cuda_ceil(p.k, STEP);
    p.parts = 1;
    if (tp_cuda_of(ctx)->clusters)
        while (p.parts < PARTS_MAX && blocks * p.parts * 2 <= cut<BOTH>::blocks && p.parts * 2 <= steps) p.parts *= 2;
    const int room = room_of(ctx, blocks * p.parts, bytes);
    TP_CUDA_ALLOW_SHARED(ctx, name, (skinny_kernel<TILES, NT, BOTH>), room);
    return tp_cuda_check(
        ctx, name,
        tp_cluster::launch(ctx, skinny_kernel<TILES, NT, BOTH>, blocks * p.parts, cut<BOTH>::threads, room, p.parts, p));
}

template <bool NT> tp_status launch_tiles(tp_ctx *ctx, const skinny_params &p)
{
    if (p.m <= 16) return launch<2, NT, false>(ctx, "matmul", p);
    if (p.m <= 32) return launch<4, NT, false>(ctx, "matmul", p);
    return launch<8, NT, false>(ctx, "matmul", p);
}

int64_t stride_of(const tp_matrix *b)
{
    return b->stride > 0 ? b->stride : b->cols;
}

/* Whether c may be written two values at a time. */
bool pairs_aligned(tp_rows c)
{
    return reinterpret_cast<uintptr_t>(c.data) % (c.dtype == TP_BF16 ? 4 : 8) == 0 && c.ld % 2 == 0;
}

} // namespace

bool tp_cuda_skinny_takes(const tp_matmul_args *args)
{
    const tp_matrix *b = &args->b;
    return args->n > 0 && args->n <= (int64_t)INT32_MAX * 8 && args->m <= M_MAX && args->m % 8 == 0 && args->k % 8 == 0 &&
           args->k > 0 && args->a.dtype == TP_BF16 && tp_rows_aligned(args->a) && b->format == TP_FORMAT_BF16 &&
           !b->transposed && b->rope_pairs <= 0 && tp_pointer_aligned(b->data) && stride_of(b) % 8 == 0 &&
           pairs_aligned(args->c) && args->beta == 0 && args->bias == NULL && args->residual == NULL && args->lowrank == NULL;
}

tp_status tp_cuda_skinny(tp_ctx *ctx, const tp_matmul_args *args)
{
    skinny_params p = {};
    p.n = args->n, p.k = args->k, p.m = (int)args->m;
    p.a = static_cast<const bf16 *>(args->a.data), p.a_ld = args->a.ld;
    p.b = static_cast<const bf16 *>(args->b.data), p.b_ld = stride_of(&args->b);
    p.c = args->c.data, p.c_ld = args->c.ld, p.c_f32 = args->c.dtype == TP_F32;
    p.alpha = args->alpha;
    return args->nt ? launch_tiles<true>(ctx, p) : launch_tiles<false>(ctx, p);
}

bool tp_cuda_factor_gradients_takes(const tp_cuda_factor_gradients_args *args)
{
    const int64_t parts = tp_cuda_ceil(args->n, cut<true>::rows);
    return parts >= BOTH_BLOCKS_MIN && args->rank <= BOTH_M_MAX && args->rank % 8 == 0 && args->out > 0 && args->out % 8 == 0 &&
           args->dy.dtype == TP_BF16 && args->b.dtype == TP_BF16 && args->u.dtype == TP_BF16 && tp_rows_aligned(args->dy) &&
           tp_rows_aligned(args->b) && tp_rows_aligned(args->u) && pairs_aligned(args->du) &&
           parts <= (int64_t)(TP_CUDA_WORKSPACE_BYTES / sizeof(float)) / (args->out * args->rank);
}

tp_status tp_cuda_factor_gradients(tp_ctx *ctx, const tp_cuda_factor_gradients_args *args)
{
    static const char name[] = "factor_gradients";
    skinny_params p = {};
    p.n = args->n, p.k = args->out, p.m = (int)args->rank;
    p.a = static_cast<const bf16 *>(args->dy.data), p.a_ld = args->dy.ld;
    p.b = static_cast<const bf16 *>(args->b.data), p.b_ld = args->b.ld;
    p.c = args->du.data, p.c_ld = args->du.ld, p.c_f32 = args->du.dtype == TP_F32;
    p.alpha = args->du_alpha;
    p.u = static_cast<const bf16 *>(args->u.data), p.u_ld = args->u.ld;
    p.db = reinterpret_cast<float *>(tp_cuda_of(ctx)->workspace);
    if (p.m <= 16)
        TP_TRY((launch<2, false, true>(ctx, name, p)));
    else
        TP_TRY((launch<4, false, true>(ctx, name, p)));
    return tp_cuda_add_parts(ctx, name, p.k * p.m, (int)tp_cuda_ceil(p.n, cut<true>::rows), p.db, args->db_alpha, args->db_beta,
                             args->db);
}
