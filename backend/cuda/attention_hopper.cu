/* Attention and its gradient on Hopper's tensor core instructions (hopper.cuh), for bf16 and heads of up to 128 channels; the
 * same algorithms as in attention.cu and attention_backward.cu, three times as fast.
 *
 * A block's warpgroups own 64 rows each of one tile; tiles of the other side pass by, copied while their predecessors are
 * worked on. One barrier a step: behind it the copies of this step are complete, and everybody is done with the step whose
 * room the next copies take. The weighted sums of a step are issued behind the scores of the next one, and run while those
 * become weights: tensor cores and exponentials work at the same time. */
#include "backend/cuda/attention.cuh"
#include "backend/cuda/hopper.cuh"

using namespace tp_attention;
using namespace tp_hopper;

namespace
{

constexpr int THREADS = 256;
constexpr int KEYS = 128; /* of a step forward */
constexpr int STEP = 64;  /* rows or keys of a step backward */
constexpr int STAGES = 3; /* backward: this step's tiles, the next ones, and the last ones, which sums may still read */

template <int DIM> constexpr int forward_bytes = (HOPPER_ROWS + 4 * KEYS) * DIM * 2;
template <int DIM>
constexpr int backward_bytes = (2 * HOPPER_ROWS + 2 * STAGES * STEP) * DIM * 2 + STAGES *STEP *(int)sizeof(row_terms);

#if TP_HOPPER

__device__ __forceinline__ void copy_chunk(uint32_t to, const void *from, bool there)
{
    const int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_float(uint32_t to, const float *from, bool there)
{
    const int bytes = there ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

/* Begins to copy a tile. A thread keeps to one chunk of rows that are a multiple of 8 apart, so its swizzle stays the same. */
template <int ROWS, int DIM, typename Source>
__device__ __forceinline__ void copy_tile(uint32_t to, const Source &source, int head_dim)
{
    constexpr int CHUNKS = DIM / 8, APART = THREADS / CHUNKS;
    const int chunk = threadIdx.x % CHUNKS, first = threadIdx.x / CHUNKS;
    const uint32_t place = to + chunk_offset<ROWS>(first, chunk);
    const bool in_head = chunk * 8 < head_dim;
#pragma unroll
    for (int i = 0; i < ROWS / APART; i++) {
        const unsigned char *row = source.at(first + i * APART);
        const bool there = in_head && row != nullptr;
        copy_chunk(place + i * APART * 128, there ? row + chunk * 16 : source.x.data, there);
    }
}

#endif

template <int DIM> __global__ void __launch_bounds__(THREADS, 1) hopper_forward_kernel(const __grid_constant__ params p)
{
#if TP_HOPPER
    extern __shared__ __align__(1024) unsigned char shared[];
    constexpr uint32_t TILE = KEYS * DIM * 2;
    const uint32_t q = (uint32_t)__cvta_generic_to_shared(shared), k = q + HOPPER_ROWS * DIM * 2, v = k + 2 * TILE;
    const query_tile t = find_query_tile<HOPPER_ROWS>(p);
    const key_walk<KEYS> walk(p, t.some_see);
    const span part = part_of(p, walk.n, t.split);
    const int lane = threadIdx.x % 32, group_row = threadIdx.x / 128 * 64, warp_row = threadIdx.x / 32 * 16;

    const auto copy_keys = [&](uint32_t to, int step, const rows &own, const rows &prefix) {
        const key_tile tile = find_key_tile(p, t, walk, step);
        copy_tile<KEYS, DIM>(to + (step - part.first) % 2 * TILE,
                             find_key_rows(p, tile.prefix ? prefix : own, t.kv_head, tile.row, tile.n), p.head_dim);
    };

    float out[DIM / 8][4] = {}, s[KEYS / 8][4], greatest[2] = {-INFINITY, -INFINITY}, sum[2] = {}, shrink[2];
    uint32_t weights[KEYS / 16][4];
    span seen[2];
    int row[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        row[h] = t.first + warp_row + lane / 4 + h * 8;
        seen[h] = keys_seen(p, t.s, query_of(p, min(row[h], t.end - 1)));
    }
    if (part.first < part.end) {
        copy_tile<HOPPER_ROWS, DIM>(q, query_rows{p, p.q, t.s, t.kv_head, t.first, t.end}, p.head_dim);
        copy_keys(k, part.first, p.k, p.prefix_k);
        copy_commit();
        if (part.first + 1 < part.end) copy_keys(k, part.first + 1, p.k, p.prefix_k);
        copy_keys(v, part.first, p.v, p.prefix_v);
        copy_commit();
        copy_wait<1>();
        publish();
        __syncthreads();
        arrive();
        tile_multiply_nt<KEYS, DIM, HOPPER_ROWS>(s, q, group_row, k);
        commit();
        wait<0>();
        hold(s);
        softmax_step(p, t, find_key_tile(p, t, walk, part.first), row, seen, s, greatest, sum, shrink);
        pack(weights, s);
    }
    /* At the start of a step: weights of the step before are there, its values and this step's keys on their way. */
    for (int step = part.first + 1; step < part.end; step++) {
        copy_wait<0>();
        publish();
        __syncthreads();
        if (step + 1 < part.end) copy_keys(k, step + 1, p.k, p.prefix_k);
        copy_keys(v, step, p.v, p.prefix_v);
        copy_commit();
        hold(out);
        arrive();
        tile_multiply_nt<KEYS, DIM, HOPPER_ROWS>(s, q, group_row, k + (step - part.first) % 2 * TILE);
        commit();
        tile_multiply_add<KEYS, DIM>(out, weights, v + (step - 1 - part.first) % 2 * TILE);
        commit();
        wait<1>();
        hold(s);
        softmax_step(p, t, find_key_tile(p, t, walk, step), row, seen, s, greatest, sum, shrink);
        wait<0>();
        hold(out);
#pragma unroll
        for (int n = 0; n < DIM / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) out[n][i] *= shrink[i / 2];
        }
        pack(weights, s);
    }
    if (part.first < part.end) {
        copy_wait<0>();
        publish();
        __syncthreads();
        hold(out);
        arrive();
        tile_multiply_add<KEYS, DIM>(out, weights, v + (part.end - 1 - part.first) % 2 * TILE);
        commit();
        wait<0>();
        hold(out);
    }
    const query_rows to = {p, p.out, t.s, t.kv_head, t.first, t.end};
#pragma unroll
    for (int h = 0; h < 2; h++) store_result(p, t, to, row[h], h, greatest[h], sum[h], out);
#endif
}

/* The sums of a block that owns keys: dv += P^T dout, dk += dS^T q; of one that owns rows: dq += dS k. */
template <int DIM> __global__ void __launch_bounds__(THREADS, 1) hopper_key_gradient_kernel(const __grid_constant__ params p)
{
#if TP_HOPPER
    extern __shared__ __align__(1024) unsigned char shared[];
    constexpr uint32_t OWNED = HOPPER_ROWS * DIM * 2, TILE = STEP * DIM * 2;
    const uint32_t k = (uint32_t)__cvta_generic_to_shared(shared), v = k + OWNED, q = v + OWNED, dout = q + STAGES * TILE;
    row_terms *terms = reinterpret_cast<row_terms *>(shared + 2 * OWNED + 2 * STAGES * TILE);
    const uint32_t terms_place = dout + STAGES * TILE;
    const owned_keys t = find_owned_keys<HOPPER_ROWS>(p);
    const int lane = threadIdx.x % 32, group_key = threadIdx.x / 128 * 64, warp_key = threadIdx.x / 32 * 16;
    const int steps = (t.end_row - t.first_row + STEP - 1) / STEP;

    const auto copy_rows = [&](int step) {
        const int row = t.first_row + step * STEP, stage = step % STAGES;
        copy_tile<STEP, DIM>(q + stage * TILE, query_rows{p, p.q, t.s, t.kv_head, row, t.end_row}, p.head_dim);
        copy_tile<STEP, DIM>(dout + stage * TILE, query_rows{p, p.dout, t.s, t.kv_head, row, t.end_row}, p.head_dim);
        if (threadIdx.x < STEP) { /* zeros behind the last row: its dout is zeros as well, so it adds nothing */
            const bool there = row + (int)threadIdx.x < t.end_row;
            const int64_t index = there ? row_index(p, t.s, t.kv_head, row + threadIdx.x) : 0;
            const uint32_t place = terms_place + (stage * STEP + threadIdx.x) * (uint32_t)sizeof(row_terms);
            copy_float(place, p.lse + index, there);
            copy_float(place + 4, p.delta + index, there);
        }
        copy_commit();
    };

    if (steps > 0) {
        copy_tile<HOPPER_ROWS, DIM>(k, find_key_rows(p, p.k, t.kv_head, t.s.k_start + t.key, t.n), p.head_dim);
        copy_tile<HOPPER_ROWS, DIM>(v, find_key_rows(p, p.v, t.kv_head, t.s.k_start + t.key, t.n), p.head_dim);
        copy_rows(0);
    }
    float dk[DIM / 8][4] = {}, dv[DIM / 8][4] = {}, s[STEP / 8][4], ds[STEP / 8][4];
    uint32_t s_weights[STEP / 16][4], ds_weights[STEP / 16][4];
    const auto issue_scores = [&](int step) {
        const uint32_t stage = step % STAGES * TILE;
        arrive();
        tile_multiply_nt<STEP, DIM, HOPPER_ROWS>(s, k, group_key, q + stage);
        tile_multiply_nt<STEP, DIM, HOPPER_ROWS>(ds, v, group_key, dout + stage);
        commit();
    };
    const auto issue_sums = [&](int step) {
        const uint32_t stage = step % STAGES * TILE;
        hold(dk);
        hold(dv);
        arrive();
        tile_multiply_add<STEP, DIM>(dv, s_weights, dout + stage);
        tile_multiply_add<STEP, DIM>(dk, ds_weights, q + stage);
        commit();
    };
    /* scores and dP become P and dS */
    const auto finish_scores = [&](int step) {
        const int row = t.first_row + step * STEP;
        const bool all = all_seen(p, t, row, STEP, HOPPER_ROWS);
        hold(s);
        hold(ds);
#pragma unroll
        for (int n = 0; n < STEP / 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int r = n * 8 + lane % 4 * 2 + i;
                row_terms x = terms[step % STAGES * STEP + r];
                x.lse = x.lse == -INFINITY ? INFINITY : x.lse * LOG2E;
                span seen = {0, 1 << 30};
                int diagonal = 0;
                float slope = 0;
                if (!all || p.shaped) {
                    const int at = min(row + r, t.end_row - 1), query = query_of(p, at);
                    seen = keys_seen(p, t.s, query);
                    diagonal = query + t.s.k_len - t.s.q_len;
                    if (p.shaped) slope = alibi_slope(p, t.kv_head, at);
                }
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int key = t.key + warp_key + lane / 4 + h * 8;
                    finish(p, s[n][h * 2 + i], ds[n][h * 2 + i], x, slope, key - diagonal, key >= seen.first && key < seen.end);
                }
            }
        }
    };
    if (steps > 0) {
        copy_wait<0>();
        publish();
        __syncthreads();
        if (steps > 1) copy_rows(1);
        issue_scores(0);
        wait<0>();
        finish_scores(0);
        pack(s_weights, s);
        pack(ds_weights, ds);
    }
    for (int step = 1; step < steps; step++) {
        copy_wait<0>();
        publish();
        __syncthreads();
        if (step + 1 < steps) copy_rows(step + 1);
        issue_scores(step);
        issue_sums(step - 1);
        wait<1>();
        finish_scores(step);
        wait<0>();
        hold(dk);
        hold(dv);
        pack(s_weights, s);
        pack(ds_weights, ds);
    }
    if (steps > 0) issue_sums(steps - 1);
    wait<0>();
    hold(dk);
    hold(dv);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int j = warp_key + lane / 4 + h * 8;
        if (j >= t.n) continue;
        unsigned char *dk_row = find_key_rows(p, p.dk, t.kv_head, t.s.k_start + t.key, t.n).at(j);
        unsigned char *dv_row = find_key_rows(p, p.dv, t.kv_head, t.s.k_start + t.key, t.n).at(j);
#pragma unroll
        for (int n = 0; n < DIM / 8; n++) {
            const int column = n * 8 + lane % 4 * 2;
            store_sums(p, p.dk, dk_row, column, dk[n][h * 2] * p.scale, dk[n][h * 2 + 1] * p.scale);
            store_sums(p, p.dv, dv_row, column, dv[n][h * 2], dv[n][h * 2 + 1]);
        }
    }
#endif
}

template <int DIM> __global__ void __launch_bounds__(THREADS, 1) hopper_query_gradient_kernel(const __grid_constant__ params p)
{
#if TP_HOPPER
    extern __shared__ __align__(1024) unsigned char shared[];
    constexpr uint32_t OWNED = HOPPER_ROWS * DIM * 2, TILE = STEP * DIM * 2;
    const uint32_t q = (uint32_t)__cvta_generic_to_shared(shared), dout = q + OWNED, k = dout + OWNED, v = k + STAGES * TILE;
    const query_tile t = find_query_tile<HOPPER_ROWS>(p);
    const key_walk<STEP> walk(p, t.some_see);
    const int lane = threadIdx.x % 32, group_row = threadIdx.x / 128 * 64, warp_row = threadIdx.x / 32 * 16;

    const auto copy_keys = [&](int step) {
        const key_tile tile = find_key_tile(p, t, walk, step);
        const uint32_t stage = step % STAGES * TILE;
        copy_tile<STEP, DIM>(k + stage, find_key_rows(p, tile.prefix ? p.prefix_k : p.k, t.kv_head, tile.row, tile.n),
                             p.head_dim);
        copy_tile<STEP, DIM>(v + stage, find_key_rows(p, tile.prefix ? p.prefix_v : p.v, t.kv_head, tile.row, tile.n),
                             p.head_dim);
        copy_commit();
    };

    if (walk.n > 0) {
        copy_tile<HOPPER_ROWS, DIM>(q, query_rows{p, p.q, t.s, t.kv_head, t.first, t.end}, p.head_dim);
        copy_tile<HOPPER_ROWS, DIM>(dout, query_rows{p, p.dout, t.s, t.kv_head, t.first, t.end}, p.head_dim);
        copy_keys(0);
    }
    row_terms terms[2];
    span seen[2];
    int diagonal[2];
    float slope[2], dq[DIM / 8][4] = {}, s[STEP / 8][4], ds[STEP / 8][4];
    uint32_t weights[STEP / 16][4];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int row = t.first + warp_row + lane / 4 + h * 8, at = min(row, t.end - 1), query = query_of(p, at);
        terms[h] = find_terms(p, t.s, t.kv_head, row, t.end);
        seen[h] = keys_seen(p, t.s, query);
        diagonal[h] = query + t.s.k_len - t.s.q_len;
        slope[h] = alibi_slope(p, t.kv_head, at);
    }
    const auto issue_scores = [&](int step) {
        const uint32_t stage = step % STAGES * TILE;
        arrive();
        tile_multiply_nt<STEP, DIM, HOPPER_ROWS>(s, q, group_row, k + stage);
        tile_multiply_nt<STEP, DIM, HOPPER_ROWS>(ds, dout, group_row, v + stage);
        commit();
    };
    const auto issue_sums = [&](int step) {
        hold(dq);
        arrive();
        tile_multiply_add<STEP, DIM>(dq, weights, k + step % STAGES * TILE);
        commit();
    };
    const auto finish_scores = [&](int step) {
        const key_tile tile = find_key_tile(p, t, walk, step);
        hold(s);
        hold(ds);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const span keys = tile_keys_seen(tile, seen[h]);
#pragma unroll
            for (int n = 0; n < STEP / 8; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int j = n * 8 + lane % 4 * 2 + i;
                    finish(p, s[n][h * 2 + i], ds[n][h * 2 + i], terms[h], slope[h], tile.position + j - diagonal[h],
                           tile.all_seen || (j >= keys.first && j < keys.end));
                }
            }
        }
    };
    if (walk.n > 0) {
        copy_wait<0>();
        publish();
        __syncthreads();
        if (walk.n > 1) copy_keys(1);
        issue_scores(0);
        wait<0>();
        finish_scores(0);
        pack(weights, ds);
    }
    for (int step = 1; step < walk.n; step++) {
        copy_wait<0>();
        publish();
        __syncthreads();
        if (step + 1 < walk.n) copy_keys(step + 1);
        issue_scores(step);
        issue_sums(step - 1);
        wait<1>();
        finish_scores(step);
        wait<0>();
        hold(dq);
        pack(weights, ds);
    }
    if (walk.n > 0) issue_sums(walk.n - 1);
    wait<0>();
    hold(dq);
    const query_rows to = {p, p.dq, t.s, t.kv_head, t.first, t.end};
#pragma unroll
    for (int h = 0; h < 2; h++) {
        unsigned char *row = to.at(warp_row + lane / 4 + h * 8);
        if (row == nullptr) continue;
#pragma unroll
        for (int n = 0; n < DIM / 8; n++) {
            const int column = n * 8 + lane % 4 * 2;
            store_pair(row, column, p.head_dim - column, p.dq.aligned, dq[n][h * 2] * p.scale, dq[n][h * 2 + 1] * p.scale);
        }
    }
#endif
}

template <typename Kernel> tp_status launch(tp_ctx *ctx, const char *name, Kernel kernel, const params *p, int bytes)
{
    TP_CUDA_ALLOW_SHARED(ctx, name, kernel, bytes);
    TP_CUDA_LAUNCH(ctx, name, kernel, (unsigned)(p->n_tiles * p->kv_heads * p->splits), THREADS, bytes, *p);
    return TP_OK;
}

} // namespace

bool tp_attention::hopper_takes(tp_ctx *ctx, const params *p)
{
    const rows *all[] = {&p->q, &p->k, &p->v, &p->prefix_k, &p->prefix_v, &p->dout};
    for (const rows *x : all) {
        if (x->data != nullptr && (x->f32 || !x->aligned)) return false;
    }
    if (tp_cuda_of(ctx)->capability != 90 || p->head_dim > 128) return false;
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, hopper_forward_kernel<64>) == cudaSuccess && attributes.ptxVersion >= 90;
}

tp_status tp_attention::hopper_forward(tp_ctx *ctx, const params *p)
{
    if (p->head_dim <= 64) return launch(ctx, "attention", hopper_forward_kernel<64>, p, forward_bytes<64>);
    return launch(ctx, "attention", hopper_forward_kernel<128>, p, forward_bytes<128>);
}

tp_status tp_attention::hopper_key_gradient(tp_ctx *ctx, const params *p)
{
    if (p->head_dim <= 64) return launch(ctx, "attention_backward", hopper_key_gradient_kernel<64>, p, backward_bytes<64>);
    return launch(ctx, "attention_backward", hopper_key_gradient_kernel<128>, p, backward_bytes<128>);
}

tp_status tp_attention::hopper_query_gradient(tp_ctx *ctx, const params *p)
{
    if (p->head_dim <= 64) return launch(ctx, "attention_backward", hopper_query_gradient_kernel<64>, p, backward_bytes<64>);
    return launch(ctx, "attention_backward", hopper_query_gradient_kernel<128>, p, backward_bytes<128>);
}
