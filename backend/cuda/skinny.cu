/* Products with a thin result: c [n, m] = alpha * a op(b), where m is at most 64 and all is bf16: activations on their way into
 * low-rank factors, and gradients on their way back.
 *
 * a is all there is to read, so a block takes some rows of it through shared memory, 128 columns at a time (memory likes long
 * pieces of a row), and b's columns beside them, which lie in L2. Where there are too few rows to fill the GPU, a cluster of
 * up to 8 blocks shares them: each takes every 8th piece, and the parts are added in order, out of each other's shared memory.
 */
#include "backend/cuda/attention.cuh" /* tensor cores, asynchronous copies */
#include "backend/cuda/cluster.cuh"
#include "backend/cuda/stream.cuh"
#include "backend/cuda/thin.cuh"

using namespace tp_attention;

namespace
{

constexpr int STEP = 128; /* of k */
constexpr int A_LD = STEP + 8;
constexpr int PARTS_MAX = 8;
constexpr int M_MAX = 64;
constexpr int ROWS = 64, THREADS = 128, STAGES = 3; /* a warp has 16 rows */
constexpr int BLOCKS_WANTED = 396; /* clusters bring up to so many; a constant, so that bits do not depend on the GPU */

/* A step's part of b as it lies in memory: [m, STEP] if NT, else [STEP, m]; m is up to TILES * 8. */
template <int TILES, bool NT> constexpr int b_rows = NT ? TILES * 8 : STEP;
template <int TILES, bool NT> constexpr int b_columns = NT ? STEP : TILES * 8;
template <int TILES, bool NT> constexpr int b_ld = b_columns<TILES, NT> + 8;
template <int TILES, bool NT> constexpr int stage_values = ROWS *A_LD + b_rows<TILES, NT> *b_ld<TILES, NT>;
template <int TILES> constexpr int sums_ld = TILES * 8 + 4;
template <int TILES, bool NT> constexpr int shared_bytes = STAGES *stage_values<TILES, NT> *(int)sizeof(bf16);

struct skinny_params {
    int64_t n, k;
    int m, parts;
    const bf16 *a, *b;
    int64_t a_ld, b_ld;
    void *c;
    int64_t c_ld;
    bool c_f32;
    float alpha;
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

template <int TILES, bool NT> __global__ void __launch_bounds__(THREADS) skinny_kernel(skinny_params p)
{
    constexpr int STAGE = stage_values<TILES, NT>, B_LD = b_ld<TILES, NT>;
    extern __shared__ __align__(16) unsigned char shared[];
    bf16 *const stages = reinterpret_cast<bf16 *>(shared);
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
    float sum[TILES][4] = {};
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
        const bf16 *a_corner = a + (warp * 16 + lane % 16) * A_LD + lane / 16 * 8;
        const int low = lane % 8 + lane / 16 * 8, high = lane / 8 % 2 * 8; /* of two tiles; of 16 values along k */
        const bf16 *b_corner = NT ? b + low * B_LD + high : b + (high + lane % 8) * B_LD + lane / 16 * 8;
#pragma unroll
        for (int k = 0; k < STEP; k += 16) {
            uint32_t x[4];
            load_matrices(x, a_corner + k);
#pragma unroll
            for (int t = 0; t < TILES; t += 2) {
                uint32_t y[4];
                if constexpr (NT)
                    load_matrices(y, b_corner + t * 8 * B_LD + k);
                else
                    load_matrices_transposed(y, b_corner + k * B_LD + t * 8);
                mma(sum[t], x, y[0], y[1]);
                mma(sum[t + 1], x, y[2], y[3]);
            }
        }
    }

    float *const sums = reinterpret_cast<float *>(shared);
    if (p.parts > 1) {
        copy_wait<0>();
        __syncthreads(); /* nobody reads the tiles any more */
    }
#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = warp * 16 + lane / 4 + h * 8, column = t * 8 + lane % 4 * 2;
            if (p.parts == 1)
                store_two(p, row0 + row, column, sum[t][h * 2], sum[t][h * 2 + 1]);
            else
                *reinterpret_cast<float2 *>(sums + row * sums_ld<TILES> + column) =
                    make_float2(sum[t][h * 2], sum[t][h * 2 + 1]);
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

template <int TILES, bool NT> tp_status launch(tp_ctx *ctx, skinny_params p)
{
    static const char name[] = "matmul";
    constexpr int bytes = shared_bytes<TILES, NT>;
    static_assert(ROWS * sums_ld<TILES> * 4 <= bytes, "the sums take the room of the tiles");
    const int64_t blocks = tp_cuda_ceil(p.n, ROWS), steps = tp_cuda_ceil(p.k, STEP);
    p.parts = 1;
    if (tp_cuda_of(ctx)->clusters)
        while (p.parts < PARTS_MAX && blocks * p.parts * 2 <= BLOCKS_WANTED && p.parts * 2 <= steps) p.parts *= 2;
    const int room = room_of(ctx, blocks * p.parts, bytes);
    TP_CUDA_ALLOW_SHARED(ctx, name, (skinny_kernel<TILES, NT>), room);
    return tp_cuda_check(ctx, name,
                         tp_cluster::launch(ctx, skinny_kernel<TILES, NT>, blocks * p.parts, THREADS, room, p.parts, p));
}

template <bool NT> tp_status launch_tiles(tp_ctx *ctx, const skinny_params &p)
{
    if (p.m <= 16) return launch<2, NT>(ctx, p);
    if (p.m <= 32) return launch<4, NT>(ctx, p);
    return launch<8, NT>(ctx, p);
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
    const tp_cuda_stream_down_args stream = {
        args->n, args->k,    (int)args->m, args->a, {(void *)(uintptr_t)args->b.data, TP_BF16, stride_of(&args->b)},
        args->c, args->alpha};
    if (args->nt && tp_cuda_stream_down_takes(ctx, &stream)) return tp_cuda_stream_down(ctx, &stream);
    skinny_params p = {};
    p.n = args->n, p.k = args->k, p.m = (int)args->m;
    p.a = static_cast<const bf16 *>(args->a.data), p.a_ld = args->a.ld;
    p.b = static_cast<const bf16 *>(args->b.data), p.b_ld = stride_of(&args->b);
    p.c = args->c.data, p.c_ld = args->c.ld, p.c_f32 = args->c.dtype == TP_F32;
    p.alpha = args->alpha;
    return args->nt ? launch_tiles<true>(ctx, p) : launch_tiles<false>(ctx, p);
}
