/* Gradients of low-rank factors: c = alpha * a^T b + beta * c where one side is wide and bf16, the other thin and f32.
 *
 * The wide side is all there is to read: memory bounds the product, and cuBLASLt would read it twice, because the thin side
 * becomes the sum of two bf16 values, which keeps 16 of its 24 bits. Here both meet each tile of the wide side once. A block
 * takes 128 columns of it and a part of the rows; parts depend on the shape alone, and a second kernel adds them in order. */
#include "backend/cuda/thin.cuh"

#include "backend/cuda/attention.cuh" /* tensor cores, asynchronous copies */

using namespace tp_attention;

namespace
{

constexpr int THREADS = 128;
constexpr int COLUMNS = 128; /* of a block; a warp takes 32 */
constexpr int ROWS = 64;     /* of a step */
constexpr int STAGES = 3;
constexpr int WIDE_LD = COLUMNS + 8;
constexpr int BLOCKS_WANTED = 396; /* what a Hopper GPU holds at once; a constant, so that bits do not depend on the GPU */
constexpr int THIN_MAX = 64;

/* TILES of 8 thin columns; 4 more floats in a row let lanes of a fragment meet different banks. */
template <int TILES> constexpr int thin_ld = TILES * 8 + 4;
template <int TILES> constexpr int stage_bytes = ROWS *(WIDE_LD * 2 + thin_ld<TILES> * 4);

struct thin_params {
    int64_t n, columns, steps; /* steps of all parts together */
    const bf16 *wide;
    int64_t wide_ld;
    const float *thin;
    int64_t thin_ld;
    int rank;
    bool transposed; /* out is [rank, columns], else [columns, rank] */
    float *out;      /* of part 0; the others follow */
};

template <int TILES> __global__ void __launch_bounds__(THREADS) thin_kernel(thin_params p)
{
    extern __shared__ __align__(16) unsigned char shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t column0 = (int64_t)blockIdx.x * COLUMNS;
    const int64_t first_step = p.steps * blockIdx.y / gridDim.y;
    const int steps = (int)(p.steps * (blockIdx.y + 1) / gridDim.y - first_step);
    const int64_t first = first_step * ROWS, end = first + steps * ROWS < p.n ? first + steps * ROWS : p.n;

    const auto copy_step = [&](int step) {
        bf16 *wide = reinterpret_cast<bf16 *>(shared + step % STAGES * stage_bytes<TILES>);
        float *thin = reinterpret_cast<float *>(wide + ROWS * WIDE_LD);
        const int64_t row0 = first + (int64_t)step * ROWS;
#pragma unroll
        for (int i = threadIdx.x; i < ROWS * COLUMNS / 8; i += THREADS) {
            const int r = i / (COLUMNS / 8), c = i % (COLUMNS / 8) * 8;
            const bool there = row0 + r < end && column0 + c < p.columns;
            copy_async(wide + r * WIDE_LD + c, there ? p.wide + (row0 + r) * p.wide_ld + column0 + c : p.wide, there);
        }
#pragma unroll
        for (int i = threadIdx.x; i < ROWS * TILES * 2; i += THREADS) {
            const int r = i / (TILES * 2), c = i % (TILES * 2) * 4;
            const bool there = row0 + r < end && c < p.rank;
            copy_async(thin + r * thin_ld<TILES> + c, there ? p.thin + (row0 + r) * p.thin_ld + c : p.thin, there);
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
        const bf16 *wide = reinterpret_cast<const bf16 *>(shared + step % STAGES * stage_bytes<TILES>);
        const float *thin = reinterpret_cast<const float *>(wide + ROWS * WIDE_LD) + lane % 4 * 2 * thin_ld<TILES> + lane / 4;
        const bf16 *corner = wide + (lane / 16 * 8 + lane % 8) * WIDE_LD + warp * 32 + lane / 8 % 2 * 8;
#pragma unroll
        for (int k = 0; k < ROWS; k += 16) {
            uint32_t a[2][4];
            load_matrices_transposed(a[0], corner + k * WIDE_LD);
            load_matrices_transposed(a[1], corner + k * WIDE_LD + 16);
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                uint32_t upper[2], lower[2];
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const float x = thin[(k + h * 8) * thin_ld<TILES> + t * 8];
                    const float y = thin[(k + h * 8 + 1) * thin_ld<TILES> + t * 8];
                    upper[h] = tp_pack_bf16(x, y);
                    lower[h] = tp_pack_bf16(x - tp_round_bf16(x), y - tp_round_bf16(y));
                }
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    mma(sum[m][t], a[m], upper[0], upper[1]);
                    mma(sum[m][t], a[m], lower[0], lower[1]);
                }
            }
        }
    }

    float *out = p.out + (int64_t)blockIdx.y * p.columns * p.rank;
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int t = 0; t < TILES; t++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int64_t column = column0 + warp * 32 + m * 16 + lane / 4 + i / 2 * 8;
                const int r = t * 8 + lane % 4 * 2 + i % 2;
                if (column < p.columns && r < p.rank)
                    out[p.transposed ? (int64_t)r * p.columns + column : column * p.rank + r] = sum[m][t][i];
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

template <int TILES> tp_status launch(tp_ctx *ctx, const thin_params &p, int parts)
{
    constexpr int bytes = STAGES * stage_bytes<TILES>;
    TP_CUDA_ALLOW_SHARED(ctx, "matmul_tn", thin_kernel<TILES>, bytes);
    TP_CUDA_LAUNCH(ctx, "matmul_tn", thin_kernel<TILES>, dim3((unsigned)tp_cuda_ceil(p.columns, COLUMNS), (unsigned)parts),
                   THREADS, bytes, p);
    return TP_OK;
}

} // namespace

bool tp_cuda_thin_takes(const tp_matmul_tn_args *args)
{
    const bool thin_a = args->a.dtype == TP_F32;
    const tp_rows wide = thin_a ? args->b : args->a, thin = thin_a ? args->a : args->b;
    const int64_t rank = thin_a ? args->m : args->k, columns = thin_a ? args->k : args->m;
    return wide.dtype == TP_BF16 && thin.dtype == TP_F32 && rank <= THIN_MAX && rank % 4 == 0 && columns % 8 == 0 &&
           tp_rows_aligned(wide) && tp_rows_aligned(thin);
}

tp_status tp_cuda_thin_tn(tp_ctx *ctx, const tp_matmul_tn_args *args)
{
    const bool thin_a = args->a.dtype == TP_F32;
    const tp_rows wide = thin_a ? args->b : args->a, thin = thin_a ? args->a : args->b;
    thin_params p = {};
    p.n = args->n, p.columns = thin_a ? args->k : args->m, p.rank = (int)(thin_a ? args->m : args->k);
    p.wide = static_cast<const bf16 *>(wide.data), p.wide_ld = wide.ld;
    p.thin = static_cast<const float *>(thin.data), p.thin_ld = thin.ld;
    p.transposed = thin_a;
    p.out = reinterpret_cast<float *>(tp_cuda_of(ctx)->workspace);
    const int64_t size = p.columns * p.rank, steps = tp_cuda_ceil(p.n, ROWS);
    int64_t parts = BLOCKS_WANTED / tp_cuda_ceil(p.columns, COLUMNS);
    parts = tp_cuda_min(parts, tp_cuda_min(steps, (int64_t)(TP_CUDA_WORKSPACE_BYTES / sizeof(float)) / size));
    if (parts < 1) parts = 1;
    p.steps = steps;
    if (p.rank <= 16)
        TP_TRY(launch<2>(ctx, p, (int)parts));
    else if (p.rank <= 32)
        TP_TRY(launch<4>(ctx, p, (int)parts));
    else
        TP_TRY(launch<8>(ctx, p, (int)parts));
    if (parts > 8)
        TP_CUDA_LAUNCH(ctx, "matmul_tn", add_parts_kernel<8>, (unsigned)tp_cuda_ceil(size, 32), 256, 0, size, (int)parts, p.out,
                       args->alpha, args->beta, args->c);
    else
        TP_CUDA_LAUNCH(ctx, "matmul_tn", add_parts_kernel<1>, (unsigned)tp_cuda_ceil(size, 256), 256, 0, size, (int)parts,
                       p.out, args->alpha, args->beta, args->c);
    return TP_OK;
}
