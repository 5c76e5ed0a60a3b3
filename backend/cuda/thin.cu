/* Gradients of low-rank factors: c = alpha * a^T b + beta * c where one side is wide and bf16, the other thin, bf16 or f32.
 *
 * The wide side is all there is to read: memory bounds the product. A thin side in f32 becomes the sum of two bf16 values,
 * which keeps 16 of its 24 bits; cuBLASLt would read the wide side twice for that. Here both meet each tile of the wide side
 * once. A block takes 128 columns of it and a part of the rows; parts depend on the shape alone, and a second kernel, set up
 * while the first still runs, adds them in order. (Clusters that add parts out of each other's shared memory were slower.) */
#include "backend/cuda/thin.cuh"

#include "backend/cuda/attention.cuh" /* tensor cores, asynchronous copies */
#include "backend/cuda/chain.cuh"
#include "backend/cuda/cluster.cuh"
#include "backend/cuda/stream.cuh"

using namespace tp_attention;

namespace
{

constexpr int THREADS = 128;
constexpr int COLUMNS = 128; /* of a block; a warp takes 32 */
constexpr int ROWS = 64;     /* of a step */
constexpr int STAGES = 4;
constexpr int WIDE_LD = COLUMNS + 8;
/* Two on each multiprocessor of a Hopper GPU; a constant, so that bits do not depend on the GPU. */
constexpr int BLOCKS_WANTED = 264;
constexpr int THIN_MAX = 64;

/* TILES of 8 thin columns; 16 more bytes in a row let lanes of a fragment meet different banks. */
template <int TILES, typename Thin> constexpr int thin_ld = TILES * 8 + 16 / (int)sizeof(Thin);
template <int TILES, typename Thin> constexpr int stage_bytes = ROWS *(WIDE_LD * 2 + thin_ld<TILES, Thin> * (int)sizeof(Thin));

struct thin_params {
    int64_t n, columns, steps; /* steps of all parts together */
    const bf16 *wide;
    int64_t wide_ld;
    const void *thin;
    int64_t thin_ld;
    int rank;
    bool transposed; /* out is [rank, columns], else [columns, rank] */
    int parts;
    float *out;        /* of part 0; the others follow */
    float alpha, beta; /* of the only part; where there are several, 1 and 0 */
};

__device__ __forceinline__ void store_two(const thin_params &p, float *out, int64_t column, int r, float2 x)
{
    if (column >= p.columns || r >= p.rank) return;
    float *first = out + (p.transposed ? r * p.columns + column : column * p.rank + r);
    float *second = first + (p.transposed ? p.columns : 1);
    *first = p.alpha * x.x + (p.beta != 0 ? p.beta * *first : 0.0f);
    *second = p.alpha * x.y + (p.beta != 0 ? p.beta * *second : 0.0f);
}

template <int TILES, typename Thin> __global__ void __launch_bounds__(THREADS) thin_kernel(thin_params p)
{
    constexpr bool SPLIT = sizeof(Thin) == 4;
    constexpr int THIN_LD = thin_ld<TILES, Thin>, THIN_CHUNK = 16 / (int)sizeof(Thin);
    extern __shared__ __align__(16) unsigned char shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int part = (int)blockIdx.x % p.parts;
    const int64_t column0 = (int64_t)((int)blockIdx.x / p.parts) * COLUMNS;
    const int64_t first_step = p.steps * part / p.parts;
    const int steps = (int)(p.steps * (part + 1) / p.parts - first_step);
    const int64_t first = first_step * ROWS, end = first + steps * ROWS < p.n ? first + steps * ROWS : p.n;

    const auto copy_step = [&](int step) {
        bf16 *wide = reinterpret_cast<bf16 *>(shared + step % STAGES * stage_bytes<TILES, Thin>);
        Thin *thin = reinterpret_cast<Thin *>(wide + ROWS * WIDE_LD);
        const Thin *from = static_cast<const Thin *>(p.thin);
        const int64_t row0 = first + (int64_t)step * ROWS;
#pragma unroll
        for (int i = threadIdx.x; i < ROWS * COLUMNS / 8; i += THREADS) {
            const int r = i / (COLUMNS / 8), c = i % (COLUMNS / 8) * 8;
            const bool there = row0 + r < end && column0 + c < p.columns;
            copy_async(wide + r * WIDE_LD + c, there ? p.wide + (row0 + r) * p.wide_ld + column0 + c : p.wide, there);
        }
        constexpr int CHUNKS = TILES * 8 / THIN_CHUNK;
#pragma unroll
        for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
            const int r = i / CHUNKS, c = i % CHUNKS * THIN_CHUNK;
            const bool there = row0 + r < end && c < p.rank;
            copy_async(thin + r * THIN_LD + c, there ? from + (row0 + r) * p.thin_ld + c : from, there);
        }
    };

    float sum[2][TILES][4] = {};
    for (int step = 0; step < STAGES - 1; step++) {
        if (step < steps) copy_step(step);
        copy_commit();
    }
    for (int step = 0; step < steps; step++) {
        copy_wait<STAGES - 2>();
        __syncthreads(); /* this step is here, and nobody reads the one whose room comes next */
        if (step + STAGES - 1 < steps) copy_step(step + STAGES - 1);
        copy_commit();
        const bf16 *wide = reinterpret_cast<const bf16 *>(shared + step % STAGES * stage_bytes<TILES, Thin>);
        const Thin *thin = reinterpret_cast<const Thin *>(wide + ROWS * WIDE_LD);
        const bf16 *corner = wide + (lane / 16 * 8 + lane % 8) * WIDE_LD + warp * 32 + lane / 8 % 2 * 8;
#pragma unroll
        for (int k = 0; k < ROWS; k += 16) {
            uint32_t a[2][4];
            load_matrices_transposed(a[0], corner + k * WIDE_LD);
            load_matrices_transposed(a[1], corner + k * WIDE_LD + 16);
            if constexpr (SPLIT) {
                const float *at = thin + (k + lane % 4 * 2) * THIN_LD + lane / 4;
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    uint32_t upper[2], lower[2];
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const float x = at[h * 8 * THIN_LD + t * 8], y = at[(h * 8 + 1) * THIN_LD + t * 8];
                        upper[h] = tp_pack_bf16(x, y);
                        lower[h] = tp_pack_bf16(x - tp_round_bf16(x), y - tp_round_bf16(y));
                    }
#pragma unroll
                    for (int m = 0; m < 2; m++) {
                        mma(sum[m][t], a[m], upper[0], upper[1]);
                        mma(sum[m][t], a[m], lower[0], lower[1]);
                    }
                }
            } else {
                const bf16 *at = thin + (k + lane % 16) * THIN_LD + lane / 16 * 8;
#pragma unroll
                for (int t = 0; t < TILES; t += 2) {
                    uint32_t b[4];
                    load_matrices_transposed(b, at + t * 8);
#pragma unroll
                    for (int m = 0; m < 2; m++) {
                        mma(sum[m][t], a[m], b[0], b[1]);
                        mma(sum[m][t + 1], a[m], b[2], b[3]);
                    }
                }
            }
        }
    }

    float *const out = p.out + (int64_t)part * p.columns * p.rank;
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int t = 0; t < TILES; t++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int column = warp * 32 + m * 16 + lane / 4 + h * 8, r = t * 8 + lane % 4 * 2;
                store_two(p, out, column0 + column, r, make_float2(sum[m][t][h * 2], sum[m][t][h * 2 + 1]));
            }
        }
    }
}

/* out = alpha * the sum of the parts + beta * out. GROUPS groups of threads take every GROUPS-th part each. */
template <int GROUPS>
__global__ void __launch_bounds__(256)
    add_parts_kernel(int64_t n, int parts, const float *part, float alpha, float beta, float *out)
{
    constexpr int LANES = 256 / GROUPS;
    __shared__ float sums[GROUPS][LANES];
    const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
    const int64_t i = (int64_t)blockIdx.x * LANES + lane;
    float sum = 0;
    tp_chain_wait();
    if (i < n) {
#pragma unroll 4
        for (int p = group; p < parts; p += GROUPS) sum += part[p * n + i];
    }
    if constexpr (GROUPS > 1) {
        sums[group][lane] = sum;
        __syncthreads();
        if (group > 0) return;
        sum = 0;
#pragma unroll
        for (int g = 0; g < GROUPS; g++) sum += sums[g][lane];
    }
    if (i < n) out[i] = alpha * sum + (beta != 0 ? beta * out[i] : 0.0f);
}

template <int TILES, typename Thin> tp_status launch(tp_ctx *ctx, thin_params p, const tp_matmul_tn_args *args)
{
    constexpr int bytes = STAGES * stage_bytes<TILES, Thin>;
    const int64_t size = p.columns * p.rank, blocks = tp_cuda_ceil(p.columns, COLUMNS);
    const int64_t room = (int64_t)(TP_CUDA_WORKSPACE_BYTES / sizeof(float)) / size;
    int64_t parts = tp_cuda_min(BLOCKS_WANTED / blocks, tp_cuda_min(p.steps, room));
    if (parts < 1) parts = 1;
    float *const workspace = reinterpret_cast<float *>(tp_cuda_of(ctx)->workspace);
    p.parts = (int)parts;
    if (parts == 1)
        p.out = args->c, p.alpha = args->alpha, p.beta = args->beta;
    else
        p.out = workspace, p.alpha = 1, p.beta = 0;
    TP_CUDA_ALLOW_SHARED(ctx, "matmul_tn", (thin_kernel<TILES, Thin>), bytes);
    TP_CUDA_LAUNCH(ctx, "matmul_tn", (thin_kernel<TILES, Thin>), (unsigned)(blocks * parts), THREADS, bytes, p);
    if (parts == 1) return TP_OK;
    return tp_cuda_add_parts(ctx, "matmul_tn", size, (int)parts, workspace, args->alpha, args->beta, args->c);
}

template <typename Thin> tp_status launch_tiles(tp_ctx *ctx, const thin_params &p, const tp_matmul_tn_args *args)
{
    if (p.rank <= 16) return launch<2, Thin>(ctx, p, args);
    if (p.rank <= 32) return launch<4, Thin>(ctx, p, args);
    return launch<8, Thin>(ctx, p, args);
}

/* The side in f32, or else the thinner one. */
bool thin_is_a(const tp_matmul_tn_args *args)
{
    return args->a.dtype == args->b.dtype ? args->m < args->k : args->a.dtype == TP_F32;
}

} // namespace

tp_status tp_cuda_add_parts(tp_ctx *ctx, const char *name, int64_t size, int parts, const float *part, float alpha, float beta,
                            float *out)
{
    const auto launch = [&](auto kernel, int64_t blocks) {
        return tp_cluster::launch_early(ctx, kernel, blocks, 256, size, parts, part, alpha, beta, out);
    };
    return tp_cuda_check(ctx, name,
                         parts > 8 ? launch(add_parts_kernel<8>, tp_cuda_ceil(size, 32))
                                   : launch(add_parts_kernel<1>, tp_cuda_ceil(size, 256)));
}

bool tp_cuda_thin_takes(const tp_matmul_tn_args *args)
{
    const bool thin_a = thin_is_a(args);
    const tp_rows wide = thin_a ? args->b : args->a, thin = thin_a ? args->a : args->b;
    const int64_t rank = thin_a ? args->m : args->k, columns = thin_a ? args->k : args->m;
    return wide.dtype == TP_BF16 && rank <= THIN_MAX && rank % (thin.dtype == TP_BF16 ? 8 : 4) == 0 && columns % 8 == 0 &&
           tp_rows_aligned(wide) && tp_rows_aligned(thin);
}

tp_status tp_cuda_thin_tn(tp_ctx *ctx, const tp_matmul_tn_args *args)
{
    const bool thin_a = thin_is_a(args);
    const tp_rows wide = thin_a ? args->b : args->a, thin = thin_a ? args->a : args->b;
    if (thin.dtype == TP_BF16) {
        const tp_cuda_stream_gradient_args stream = {
            args->n,   thin_a ? args->k : args->m, (int)(thin_a ? args->m : args->k), wide, thin, thin_a, args->c, args->alpha,
            args->beta};
        if (tp_cuda_stream_gradient_takes(ctx, &stream)) return tp_cuda_stream_gradient(ctx, &stream);
    }
    thin_params p = {};
    p.n = args->n, p.columns = thin_a ? args->k : args->m, p.rank = (int)(thin_a ? args->m : args->k);
    p.wide = static_cast<const bf16 *>(wide.data), p.wide_ld = wide.ld;
    p.thin = thin.data, p.thin_ld = thin.ld;
    p.transposed = thin_a;
    p.steps = tp_cuda_ceil(p.n, ROWS);
    return thin.dtype == TP_BF16 ? launch_tiles<bf16>(ctx, p, args) : launch_tiles<float>(ctx, p, args);
}
