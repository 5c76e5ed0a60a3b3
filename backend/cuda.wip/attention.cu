/* Attention, forward: softmax(scale q k^T) v without a score matrix (Dao 2023, arXiv:2307.08691).
 *
 * A block takes a tile of rows (query, head) and walks over the keys that they see, 64 at a time (f32: 32), keeping per row
 * the greatest score so far, the sum of exponentials and the weighted sum of v; all three are rescaled when a greater score
 * turns up. In bf16 the two products run on the tensor cores, whose results become their next operand without leaving the
 * registers; while the scores of a tile are computed its values are still arriving, and the next keys during the softmax.
 *
 * Where there are too few tiles to fill a GPU (one token against a long cache), each tile's keys are cut into a number of
 * parts that depends on the shapes alone; a second kernel merges the parts by their log-sum-exp. */
#include "backend/cuda/attention.cuh"

using namespace tp_attention;

namespace {

constexpr int KEYS = 64;
constexpr int BLOCKS_WANTED = 512; /* for the number of parts: a constant, so that bits do not depend on the GPU */
constexpr int PARTS_MAX = 64;
constexpr int MERGE_WARPS = 8;

/* M: 16-row blocks of a warp. */
template <int DIM, int M, int WARPS> __global__ void __launch_bounds__(WARPS * 32) attention_kernel(const __grid_constant__ params p)
{
    constexpr int ROWS = WARPS * M * 16, THREADS = WARPS * 32;
    extern __shared__ __align__(16) unsigned char shared[];
    bf16 *q = reinterpret_cast<bf16 *>(shared), *k = q + ROWS * tile_ld<DIM>, *v = k + KEYS * tile_ld<DIM>;
    const query_tile t = find_query_tile<ROWS>(p);
    const key_walk<KEYS> walk(p, t.some_see);
    const span part = part_of(p, walk.n, t.split);
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * M * 16;

    const auto load_keys = [&](bf16 *to, int step, const rows &own, const rows &prefix) {
        const key_tile tile = find_key_tile(p, t, walk, step);
        load_tile<KEYS, DIM, THREADS>(to, find_key_rows(p, tile.prefix ? prefix : own, t.kv_head, tile.row, tile.n), p.head_dim);
        copy_commit();
    };
    if (part.first < part.end) {
        load_tile<ROWS, DIM, THREADS>(q, query_rows{p, p.q, t.s, t.kv_head, t.first, t.end}, p.head_dim);
        load_keys(k, part.first, p.k, p.prefix_k);
        load_keys(v, part.first, p.v, p.prefix_v);
    }

    float out[M][DIM / 8][4] = {}, greatest[M][2], sum[M][2];
    span seen[M][2];
    int row[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            row[m][h] = t.first + warp_row + m * 16 + lane / 4 + h * 8;
            greatest[m][h] = -INFINITY;
            sum[m][h] = 0.0f;
            seen[m][h] = keys_seen(p, t.s, query_of(p, min(row[m][h], t.end - 1)));
        }
    }

    for (int step = part.first; step < part.end; step++) {
        const key_tile tile = find_key_tile(p, t, walk, step);
        if (step == part.first)
            copy_wait<1>();
        else
            copy_wait<0>();
        __syncthreads(); /* the keys are here, and nobody reads the last values any more */
        if (step > part.first) load_keys(v, step, p.v, p.prefix_v);
        float s[M][KEYS / 8][4];
        multiply_nt<M, KEYS / 8, DIM>(s, q + warp_row * tile_ld<DIM>, k);
        copy_wait<0>();
        __syncthreads(); /* the values are here, and nobody reads these keys any more */
        if (step + 1 < part.end) load_keys(k, step + 1, p.k, p.prefix_k);

#pragma unroll
        for (int m = 0; m < M; m++) {
            float shrink[2];
            softmax_step(p, t, tile, row[m], seen[m], s[m], greatest[m], sum[m], shrink);
#pragma unroll
            for (int n = 0; n < DIM / 8; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) out[m][n][i] *= shrink[i / 2];
            }
        }
        multiply_add<M, KEYS / 8, DIM, DIM>(out, s, v);
    }

    const query_rows to = {p, p.out, t.s, t.kv_head, t.first, t.end};
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) store_result(p, t, to, row[m][h], h, greatest[m][h], sum[m][h], out[m]);
    }
}

