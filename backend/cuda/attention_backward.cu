/* Gradient of attention. With S the scores, P = exp(S - lse) and D = rowsum(dO * O), per head:
 *
 *   dV = P^T dO     dP = dO V^T     dS = P * (dP - D)     dQ = scale dS K     dK = scale dS^T Q
 *
 * Two kernels compute P and dS anew from q, k, v, dO and lse. One owns tiles of keys: it walks over the rows (query, head)
 * that see them, in order, and sums dK and dV. The other owns tiles of rows, walks over keys and sums dQ. That costs seven
 * products instead of five, and needs neither atomics, nor waiting for turns, nor f32 copies of dQ: the bits are always the
 * same.
 *
 * In bf16 and f16, P and dS are results of tensor cores that become operands of the next product without leaving the registers:
 * the first kernel computes them transposed, [key][row], the second as they stand. */
#include "backend/cuda/attention.cuh"
#include "backend/cuda/cudnn.cuh"

using namespace tp_attention;

namespace
{

constexpr int KEY_ROWS = 64; /* keys of a tile in the first kernel, rows of a tile in the second: 16 a warp */
constexpr int THREADS = 128;
template <int DIM> constexpr int STEP = DIM <= 128 ? 64 : 32; /* rows, or keys, that a step of the walk takes */

/* Columns of dK and dV that a block sums: more than 128 do not fit in registers, then two blocks share the work. */
template <int DIM> constexpr int SUM_COLUMNS = DIM <= 128 ? DIM : DIM / 2;

/* delta [n_q, heads] = rowsum(dout * out); LANES threads take one. With part_lse, lse goes there in units of exponents of 2. */
template <int LANES> __global__ void __launch_bounds__(256) delta_kernel(const __grid_constant__ params p, int64_t items)
{
    constexpr int GROUPS = 256 / LANES;
    const int lane = threadIdx.x % LANES;
    const int64_t stride = (int64_t)gridDim.x * GROUPS, rounded = (items + 31) / 32 * 32; /* a warp stays together */
    for (int64_t i = (int64_t)blockIdx.x * GROUPS + threadIdx.x / LANES; i < rounded; i += stride) {
        const int64_t item = i < items ? i : items - 1;
        const int64_t row = items <= UINT32_MAX ? (uint32_t)item / (uint32_t)p.heads : item / p.heads;
        const int64_t column = (item - row * p.heads) * p.head_dim;
        const int size = p.out.f32 ? 4 : 2;
        const unsigned char *out = p.out.data + row * p.out.row_bytes + column * size;
        const unsigned char *dout = p.dout.data + row * p.dout.row_bytes + column * size;
        const bool aligned = p.out.aligned && p.dout.aligned;
        float sum = 0;
        for (int c = lane * 8; c < p.head_dim; c += LANES * 8) {
            float x[8], y[8];
            if (p.out.f32) {
                tp_load_some<8>(reinterpret_cast<const float *>(out) + c, p.head_dim - c, aligned, x);
                tp_load_some<8>(reinterpret_cast<const float *>(dout) + c, p.head_dim - c, aligned, y);
            } else if (p.f16) {
                tp_load_some<8>(reinterpret_cast<const __half *>(out) + c, p.head_dim - c, aligned, x);
                tp_load_some<8>(reinterpret_cast<const __half *>(dout) + c, p.head_dim - c, aligned, y);
            } else {
                tp_load_some<8>(reinterpret_cast<const bf16 *>(out) + c, p.head_dim - c, aligned, x);
                tp_load_some<8>(reinterpret_cast<const bf16 *>(dout) + c, p.head_dim - c, aligned, y);
            }
#pragma unroll
            for (int e = 0; e < 8; e++) sum = fmaf(x[e], y[e], sum);
        }
#pragma unroll
        for (int offset = LANES / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        if (lane > 0 || i >= items) continue;
        p.delta[item] = sum;
        if (p.part_lse != nullptr) {
            const float lse = p.lse[item];
            p.part_lse[item] = lse == -INFINITY ? INFINITY : lse * LOG2E; /* rows without keys: every P is 0 */
        }
    }
}

template <typename T, int DIM> __global__ void __launch_bounds__(THREADS) key_gradient_kernel(const __grid_constant__ params p)
{
    constexpr int COLUMNS = SUM_COLUMNS<DIM>, ROWS = STEP<DIM>, LD = tile_ld<DIM>;
    extern __shared__ __align__(16) unsigned char shared[];
    T *k = reinterpret_cast<T *>(shared), *v = k + KEY_ROWS * LD, *q = v + KEY_ROWS * LD, *dout = q + ROWS * LD;
    const owned_keys t = find_owned_keys<KEY_ROWS>(p);
    const int lane = threadIdx.x % 32, warp_key = threadIdx.x / 32 * 16, first_column = blockIdx.y * COLUMNS;

    load_tile<KEY_ROWS, DIM, THREADS>(k, find_key_rows(p, p.k, t.kv_head, t.s.k_start + t.key, t.n), p.head_dim);
    load_tile<KEY_ROWS, DIM, THREADS>(v, find_key_rows(p, p.v, t.kv_head, t.s.k_start + t.key, t.n), p.head_dim);
    float dk[1][COLUMNS / 8][4] = {}, dv[1][COLUMNS / 8][4] = {};
    for (int row = t.first_row; row < t.end_row; row += ROWS) {
        load_tile<ROWS, DIM, THREADS>(q, query_rows{p, p.q, t.s, t.kv_head, row, t.end_row}, p.head_dim);
        load_tile<ROWS, DIM, THREADS>(dout, query_rows{p, p.dout, t.s, t.kv_head, row, t.end_row}, p.head_dim);
        copy_commit();
        /* the terms of a row lie in the 16 bytes by which its tile's row is longer than its values */
        if (threadIdx.x < ROWS)
            *reinterpret_cast<row_terms *>(q + threadIdx.x * LD + DIM) =
                find_terms(p, t.s, t.kv_head, row + threadIdx.x, t.end_row);
        copy_wait<0>();
        __syncthreads();

        float s[1][ROWS / 8][4], ds[1][ROWS / 8][4];
        multiply_nt<1, ROWS / 8, DIM>(s, k + warp_key * LD, q);
        multiply_nt<1, ROWS / 8, DIM>(ds, v + warp_key * LD, dout);
        const bool all = all_seen(p, t, row, ROWS, KEY_ROWS);
#pragma unroll
        for (int n = 0; n < ROWS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int r = n * 8 + lane % 4 * 2 + i;
                const row_terms terms = *reinterpret_cast<const row_terms *>(q + r * LD + DIM);
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
                    finish(p, s[0][n][h * 2 + i], ds[0][n][h * 2 + i], terms, slope, key - diagonal,
                           key >= seen.first && key < seen.end);
                }
            }
        }
        multiply_add<1, ROWS / 8, DIM, COLUMNS>(dv, s, dout + first_column);
        multiply_add<1, ROWS / 8, DIM, COLUMNS>(dk, ds, q + first_column);
        __syncthreads(); /* nobody reads these rows any more */
    }
    copy_wait<0>();

#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int j = warp_key + lane / 4 + h * 8;
        if (j >= t.n) continue;
        unsigned char *dk_row = find_key_rows(p, p.dk, t.kv_head, t.s.k_start + t.key, t.n).at(j);
        unsigned char *dv_row = find_key_rows(p, p.dv, t.kv_head, t.s.k_start + t.key, t.n).at(j);
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
            const int column = first_column + n * 8 + lane % 4 * 2;
            store_sums<T>(p, p.dk, dk_row, column, dk[0][n][h * 2] * p.scale, dk[0][n][h * 2 + 1] * p.scale);
            store_sums<T>(p, p.dv, dv_row, column, dv[0][n][h * 2], dv[0][n][h * 2 + 1]);
        }
    }
}

template <typename T, int DIM>
__global__ void __launch_bounds__(THREADS) query_gradient_kernel(const __grid_constant__ params p)
{
    constexpr int KEYS = STEP<DIM>, LD = tile_ld<DIM>;
    extern __shared__ __align__(16) unsigned char shared[];
    T *q = reinterpret_cast<T *>(shared), *dout = q + KEY_ROWS * LD, *k = dout + KEY_ROWS * LD, *v = k + KEYS * LD;
    const query_tile t = find_query_tile<KEY_ROWS>(p);
    const key_walk<KEYS> walk(p, t.some_see);
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;

    load_tile<KEY_ROWS, DIM, THREADS>(q, query_rows{p, p.q, t.s, t.kv_head, t.first, t.end}, p.head_dim);
    load_tile<KEY_ROWS, DIM, THREADS>(dout, query_rows{p, p.dout, t.s, t.kv_head, t.first, t.end}, p.head_dim);
    row_terms terms[2];
    span seen[2];
    int diagonal[2];
    float slope[2], dq[1][DIM / 8][4] = {};
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int row = t.first + warp_row + lane / 4 + h * 8, at = min(row, t.end - 1), query = query_of(p, at);
        terms[h] = find_terms(p, t.s, t.kv_head, row, t.end);
        seen[h] = keys_seen(p, t.s, query);
        diagonal[h] = query + t.s.k_len - t.s.q_len;
        slope[h] = alibi_slope(p, t.kv_head, at);
    }
    for (int step = 0; step < walk.n; step++) {
        const key_tile tile = find_key_tile(p, t, walk, step);
        load_tile<KEYS, DIM, THREADS>(k, find_key_rows(p, tile.prefix ? p.prefix_k : p.k, t.kv_head, tile.row, tile.n),
                                      p.head_dim);
        load_tile<KEYS, DIM, THREADS>(v, find_key_rows(p, tile.prefix ? p.prefix_v : p.v, t.kv_head, tile.row, tile.n),
                                      p.head_dim);
        copy_commit();
        copy_wait<0>();
        __syncthreads();

        float s[1][KEYS / 8][4], ds[1][KEYS / 8][4];
        multiply_nt<1, KEYS / 8, DIM>(s, q + warp_row * LD, k);
        multiply_nt<1, KEYS / 8, DIM>(ds, dout + warp_row * LD, v);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const span keys = tile_keys_seen(tile, seen[h]);
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int j = n * 8 + lane % 4 * 2 + i;
                    finish(p, s[0][n][h * 2 + i], ds[0][n][h * 2 + i], terms[h], slope[h], tile.position + j - diagonal[h],
                           tile.all_seen || (j >= keys.first && j < keys.end));
                }
            }
        }
        multiply_add<1, KEYS / 8, DIM, DIM>(dq, ds, k);
        __syncthreads(); /* nobody reads these keys any more */
    }
    copy_wait<0>();

    const query_rows to = {p, p.dq, t.s, t.kv_head, t.first, t.end};
#pragma unroll
    for (int h = 0; h < 2; h++) {
        unsigned char *row = to.at(warp_row + lane / 4 + h * 8);
        if (row == nullptr) continue;
#pragma unroll
        for (int n = 0; n < DIM / 8; n++) {
            const int column = n * 8 + lane % 4 * 2;
            store_pair<T>(row, column, p.head_dim - column, p.dq.aligned, dq[0][n][h * 2] * p.scale,
                          dq[0][n][h * 2 + 1] * p.scale);
        }
    }
}

/* ---- f32 ---- */

template <int DIM> struct f32_shared {
    float owned[2][F32_TILE * (DIM + 4)], passing[2][F32_TILE * (DIM + 4)];
    float p[F32_TILE * WEIGHT_LD], ds[F32_TILE * WEIGHT_LD];
};

template <int DIM> __global__ void __launch_bounds__(F32_THREADS) key_gradient_f32_kernel(const __grid_constant__ params p)
{
    extern __shared__ __align__(16) unsigned char shared[];
    f32_shared<DIM> &room = *reinterpret_cast<f32_shared<DIM> *>(shared);
    const owned_keys t = find_owned_keys<F32_TILE>(p);
    const int y = threadIdx.x / 16, x = threadIdx.x % 16;
    const int key_row = t.s.k_start + t.key;

    load_tile_f32<F32_TILE, DIM, F32_THREADS>(room.owned[0], find_key_rows(p, p.k, t.kv_head, key_row, t.n), p.head_dim);
    load_tile_f32<F32_TILE, DIM, F32_THREADS>(room.owned[1], find_key_rows(p, p.v, t.kv_head, key_row, t.n), p.head_dim);
    float dk[4][DIM / 32] = {}, dv[4][DIM / 32] = {};
    for (int row = t.first_row; row < t.end_row; row += F32_TILE) {
        __syncthreads();
        load_tile_f32<F32_TILE, DIM, F32_THREADS>(room.passing[0], query_rows{p, p.q, t.s, t.kv_head, row, t.end_row},
                                                  p.head_dim);
        load_tile_f32<F32_TILE, DIM, F32_THREADS>(room.passing[1], query_rows{p, p.dout, t.s, t.kv_head, row, t.end_row},
                                                  p.head_dim);
        __syncthreads();
        float s[2][2], ds[2][2];
        multiply_nt_f32<DIM>(s, room.owned[0], room.passing[0], p.head_dim);
        multiply_nt_f32<DIM>(ds, room.owned[1], room.passing[1], p.head_dim);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int r = x + j * 16, at = min(row + r, t.end_row - 1), query = query_of(p, at);
            const row_terms terms = find_terms(p, t.s, t.kv_head, row + r, t.end_row);
            const span seen = keys_seen(p, t.s, query);
            const float slope = alibi_slope(p, t.kv_head, at);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int key = t.key + y + i * 16;
                finish(p, s[i][j], ds[i][j], terms, slope, key - (query + t.s.k_len - t.s.q_len),
                       key >= seen.first && key < seen.end);
                room.p[r * WEIGHT_LD + y + i * 16] = s[i][j];
                room.ds[r * WEIGHT_LD + y + i * 16] = ds[i][j];
            }
        }
        __syncthreads();
        multiply_add_f32<DIM>(dv, room.p, room.passing[1]);
        multiply_add_f32<DIM>(dk, room.ds, room.passing[0]);
    }
    const key_rows dk_rows = find_key_rows(p, p.dk, t.kv_head, key_row, t.n),
                   dv_rows = find_key_rows(p, p.dv, t.kv_head, key_row, t.n);
    for (int i = 0; i < 4; i++) {
        const int j = threadIdx.x / 32 * 4 + i;
        if (j >= t.n) continue;
        float *dk_row = reinterpret_cast<float *>(dk_rows.at(j)), *dv_row = reinterpret_cast<float *>(dv_rows.at(j));
#pragma unroll
        for (int c = 0; c < DIM / 32; c++) {
            const int column = threadIdx.x % 32 + c * 32;
            if (column >= p.head_dim) continue;
            dk_row[column] = (p.accumulate ? dk_row[column] : 0.0f) + dk[i][c] * p.scale;
            dv_row[column] = (p.accumulate ? dv_row[column] : 0.0f) + dv[i][c];
        }
    }
}

template <int DIM> __global__ void __launch_bounds__(F32_THREADS) query_gradient_f32_kernel(const __grid_constant__ params p)
{
    extern __shared__ __align__(16) unsigned char shared[];
    f32_shared<DIM> &room = *reinterpret_cast<f32_shared<DIM> *>(shared);
    const query_tile t = find_query_tile<F32_TILE>(p);
    const key_walk<F32_TILE> walk(p, t.some_see);
    const int y = threadIdx.x / 16, x = threadIdx.x % 16;

    load_tile_f32<F32_TILE, DIM, F32_THREADS>(room.owned[0], query_rows{p, p.q, t.s, t.kv_head, t.first, t.end}, p.head_dim);
    load_tile_f32<F32_TILE, DIM, F32_THREADS>(room.owned[1], query_rows{p, p.dout, t.s, t.kv_head, t.first, t.end}, p.head_dim);
    float dq[4][DIM / 32] = {};
    for (int step = 0; step < walk.n; step++) {
        const key_tile tile = find_key_tile(p, t, walk, step);
        __syncthreads();
        load_tile_f32<F32_TILE, DIM, F32_THREADS>(
            room.passing[0], find_key_rows(p, tile.prefix ? p.prefix_k : p.k, t.kv_head, tile.row, tile.n), p.head_dim);
        load_tile_f32<F32_TILE, DIM, F32_THREADS>(
            room.passing[1], find_key_rows(p, tile.prefix ? p.prefix_v : p.v, t.kv_head, tile.row, tile.n), p.head_dim);
        __syncthreads();
        float s[2][2], ds[2][2];
        multiply_nt_f32<DIM>(s, room.owned[0], room.passing[0], p.head_dim);
        multiply_nt_f32<DIM>(ds, room.owned[1], room.passing[1], p.head_dim);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = t.first + y + i * 16, at = min(row, t.end - 1), query = query_of(p, at);
            const row_terms terms = find_terms(p, t.s, t.kv_head, row, t.end);
            const span keys = tile_keys_seen(tile, keys_seen(p, t.s, query));
            const float slope = alibi_slope(p, t.kv_head, at);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int key = x + j * 16;
                finish(p, s[i][j], ds[i][j], terms, slope, tile.position + key - (query + t.s.k_len - t.s.q_len),
                       key >= keys.first && key < keys.end);
                room.ds[key * WEIGHT_LD + y + i * 16] = ds[i][j];
            }
        }
        __syncthreads();
        multiply_add_f32<DIM>(dq, room.ds, room.passing[0]);
    }
    const query_rows to = {p, p.dq, t.s, t.kv_head, t.first, t.end};
    for (int i = 0; i < 4; i++) {
        float *row = reinterpret_cast<float *>(to.at(threadIdx.x / 32 * 4 + i));
        if (row == nullptr) continue;
#pragma unroll
        for (int c = 0; c < DIM / 32; c++) {
            const int column = threadIdx.x % 32 + c * 32;
            if (column < p.head_dim) row[column] = dq[i][c] * p.scale;
        }
    }
}

/* ---- launches ---- */

constexpr const char *NAME = "attention_backward";

template <typename T, int DIM> tp_status launch_keys(tp_ctx *ctx, const params *p)
{
    constexpr size_t bytes = (size_t)(2 * KEY_ROWS + 2 * STEP<DIM>)*tile_ld<DIM> * sizeof(T);
    const dim3 grid((unsigned)(p->n_tiles * p->kv_heads), DIM / SUM_COLUMNS<DIM>);
    TP_CUDA_ALLOW_SHARED(ctx, NAME, (key_gradient_kernel<T, DIM>), bytes);
    TP_CUDA_LAUNCH(ctx, NAME, (key_gradient_kernel<T, DIM>), grid, THREADS, bytes, *p);
    return TP_OK;
}

template <typename T, int DIM> tp_status launch_queries(tp_ctx *ctx, const params *p)
{
    constexpr size_t bytes = (size_t)(2 * KEY_ROWS + 2 * STEP<DIM>)*tile_ld<DIM> * sizeof(T);
    TP_CUDA_ALLOW_SHARED(ctx, NAME, (query_gradient_kernel<T, DIM>), bytes);
    TP_CUDA_LAUNCH(ctx, NAME, (query_gradient_kernel<T, DIM>), (unsigned)(p->n_tiles * p->kv_heads), THREADS, bytes, *p);
    return TP_OK;
}

template <int DIM> tp_status launch_keys_f32(tp_ctx *ctx, const params *p)
{
    TP_CUDA_ALLOW_SHARED(ctx, NAME, key_gradient_f32_kernel<DIM>, sizeof(f32_shared<DIM>));
    TP_CUDA_LAUNCH(ctx, NAME, key_gradient_f32_kernel<DIM>, (unsigned)(p->n_tiles * p->kv_heads), F32_THREADS,
                   sizeof(f32_shared<DIM>), *p);
    return TP_OK;
}

template <int DIM> tp_status launch_queries_f32(tp_ctx *ctx, const params *p)
{
    TP_CUDA_ALLOW_SHARED(ctx, NAME, query_gradient_f32_kernel<DIM>, sizeof(f32_shared<DIM>));
    TP_CUDA_LAUNCH(ctx, NAME, query_gradient_f32_kernel<DIM>, (unsigned)(p->n_tiles * p->kv_heads), F32_THREADS,
                   sizeof(f32_shared<DIM>), *p);
    return TP_OK;
}

/* Segments from s0 on that one launch of the kernel which owns keys may take: it must not meet a key twice. */
int64_t segments_apart(const tp_attention_args *a, int64_t s0)
{
    int64_t n = 0, keys_end = 0;
    for (; s0 + n < a->n_segments && n < SEGMENTS; n++) {
        const tp_segment *s = &a->segments[s0 + n];
        if (n > 0 && s->k_start < keys_end) break;
        keys_end = s->k_start + s->k_len;
    }
    return n;
}

tp_status run_keys(tp_ctx *ctx, params *p, const tp_attention_backward_args *b)
{
    const tp_attention_args *a = &b->forward;
    const bool together = segments_apart(a, 0) == tp_cuda_min(a->n_segments, SEGMENTS);
    bool apart = together;
    for (int64_t s = 1; apart && s < a->n_segments; s++)
        apart = a->segments[s].k_start >= a->segments[s - 1].k_start + a->segments[s - 1].k_len;
    p->accumulate = !apart;
    const bool hopper = hopper_takes(ctx, p);
    if (!apart || has_gaps(a, b->n_k, true)) {
        TP_TRY(clear(ctx, NAME, b->dk, b->n_k, a->kv_heads * a->head_dim));
        TP_TRY(clear(ctx, NAME, b->dv, b->n_k, a->kv_heads * a->head_dim));
    }
    for (int64_t s0 = 0; s0 < a->n_segments; s0 += p->n_segments) {
        fill_segments(p, a, s0, segments_apart(a, s0), hopper ? hopper_key_rows(p) : p->q.f32 ? F32_TILE : KEY_ROWS, true);
        if (hopper) {
            TP_TRY(hopper_key_gradient(ctx, p));
        } else if (p->q.f32) {
            TP_ATTENTION_DIM(p->head_dim, DIM, { TP_TRY(launch_keys_f32<DIM>(ctx, p)); });
        } else {
            TP_ATTENTION_TYPE(p, T, { TP_ATTENTION_DIM(p->head_dim, DIM, { TP_TRY((launch_keys<T, DIM>(ctx, p))); }); });
        }
    }
    return TP_OK;
}

tp_status run_queries(tp_ctx *ctx, params *p, const tp_attention_backward_args *b)
{
    const tp_attention_args *a = &b->forward;
    const bool hopper = hopper_takes(ctx, p);
    if (has_gaps(a, a->n_q, false)) TP_TRY(clear(ctx, NAME, b->dq, a->n_q, a->heads * a->head_dim));
    for (int64_t s0 = 0; s0 < a->n_segments; s0 += p->n_segments) {
        fill_segments(p, a, s0, a->n_segments - s0, hopper ? hopper_query_rows(p) : p->q.f32 ? F32_TILE : KEY_ROWS, false);
        if (hopper) {
            TP_TRY(hopper_query_gradient(ctx, p));
        } else if (p->q.f32) {
            TP_ATTENTION_DIM(p->head_dim, DIM, { TP_TRY(launch_queries_f32<DIM>(ctx, p)); });
        } else {
            TP_ATTENTION_TYPE(p, T, { TP_ATTENTION_DIM(p->head_dim, DIM, { TP_TRY((launch_queries<T, DIM>(ctx, p))); }); });
        }
    }
    return TP_OK;
}

} // namespace

extern "C" tp_status tp_cuda_attention_backward(tp_ctx *ctx, const void *args)
{
    const tp_attention_backward_args *b = static_cast<const tp_attention_backward_args *>(args);
    const tp_attention_args *a = &b->forward;
    const tp_dtype others[] = {b->dout.dtype, b->dq.dtype, b->dk.dtype, b->dv.dtype};
    params p;
    TP_TRY(begin(ctx, NAME, a, &p));
    for (tp_dtype other : others) {
        if (other != a->q.dtype)
            return tp_fail(ctx, TP_UNSUPPORTED, "%s: one array is %s, another %s", NAME, tp_dtype_name(a->q.dtype),
                           tp_dtype_name(other));
    }
    p.dout = rows_of(b->dout, a->head_dim);
    p.dq = rows_of(b->dq, a->head_dim);
    p.dk = rows_of(b->dk, a->head_dim);
    p.dv = rows_of(b->dv, a->head_dim);
    p.delta = b->delta;
    if (a->head_dim <= 0) return TP_OK;
    if (!has_gaps(a, a->n_q, false) && !has_gaps(a, b->n_k, true) && tp_dnn_attention_backward(ctx, b)) return TP_OK;
    const int64_t items = a->n_q * a->heads;
    if (hopper_takes(ctx, &p)) {
        if (items > (int64_t)(TP_CUDA_WORKSPACE_BYTES / sizeof(float)))
            return tp_fail(ctx, TP_UNSUPPORTED, "%s: %lld rows of %lld heads are too many for the cuda backend", NAME,
                           (long long)a->n_q, (long long)a->heads);
        p.part_lse = reinterpret_cast<float *>(tp_cuda_of(ctx)->workspace);
    }
    if (a->head_dim <= 64)
        TP_CUDA_LAUNCH(ctx, NAME, delta_kernel<8>, tp_cuda_blocks(ctx, items, 32), 256, 0, p, items);
    else
        TP_CUDA_LAUNCH(ctx, NAME, delta_kernel<16>, tp_cuda_blocks(ctx, items, 16), 256, 0, p, items);
    TP_TRY(run_keys(ctx, &p, b));
    return run_queries(ctx, &p, b);
}
