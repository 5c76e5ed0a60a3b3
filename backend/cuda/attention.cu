/* Attention, forward: softmax(scale q k^T) v without a score matrix (Dao 2023, arXiv:2307.08691).
 *
 * A block takes a tile of rows (query, head) and walks over the keys that they see, 64 at a time (f32: 32), keeping per row
 * the greatest score so far, the sum of exponentials and the weighted sum of v; all three are rescaled when a greater score
 * turns up. In bf16 and f16 the two products run on the tensor cores, whose results become their next operand without leaving
 * the registers; while the scores of a tile are computed its values are still arriving, and the next keys during the softmax.
 *
 * Where there are too few tiles to fill a GPU (one token against a long cache), each tile's keys are cut into a number of
 * parts that depends on the shapes alone; a second kernel merges the parts by their log-sum-exp. */
#include "backend/cuda/attention.cuh"
#include "backend/cuda/cudnn.cuh"

using namespace tp_attention;

namespace
{

constexpr int KEYS = 64;
/* For the number of parts: constants, so that bits do not depend on the GPU. Blocks of one warp share a multiprocessor. */
constexpr int BLOCKS_WANTED = 128, WARPS_WANTED = 512;
constexpr int PARTS_MAX = 64;
constexpr int MERGE_WARPS = 8;

/* M: 16-row blocks of a warp. */
template <typename T, int DIM, int M, int WARPS>
__global__ void __launch_bounds__(WARPS * 32) attention_kernel(const __grid_constant__ params p)
{
    constexpr int ROWS = WARPS * M * 16, THREADS = WARPS * 32;
    extern __shared__ __align__(16) unsigned char shared[];
    T *q = reinterpret_cast<T *>(shared), *k = q + ROWS * tile_ld<DIM>, *v = k + KEYS * tile_ld<DIM>;
    const query_tile t = find_query_tile<ROWS>(p);
    const key_walk<KEYS> walk(p, t.some_see);
    const span part = part_of(p, walk.n, t.split);
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * M * 16;

    const auto load_keys = [&](T *to, int step, const rows &own, const rows &prefix) {
        const key_tile tile = find_key_tile(p, t, walk, step);
        load_tile<KEYS, DIM, THREADS>(to, find_key_rows(p, tile.prefix ? prefix : own, t.kv_head, tile.row, tile.n),
                                      p.head_dim);
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
        for (int h = 0; h < 2; h++) store_result<T>(p, t, to, row[m][h], h, greatest[m][h], sum[m][h], out[m]);
    }
}

template <int DIM> struct f32_shared {
    float q[F32_TILE * (DIM + 4)], kv[F32_TILE * (DIM + 4)];
    float weights[F32_TILE * WEIGHT_LD];
    float shrink[F32_TILE], sum[F32_TILE], greatest[F32_TILE];
};

template <int DIM> __global__ void __launch_bounds__(F32_THREADS) attention_f32_kernel(const __grid_constant__ params p)
{
    extern __shared__ __align__(16) unsigned char shared[];
    f32_shared<DIM> &room = *reinterpret_cast<f32_shared<DIM> *>(shared);
    const query_tile t = find_query_tile<F32_TILE>(p);
    const key_walk<F32_TILE> walk(p, t.some_see);
    const span part = part_of(p, walk.n, t.split);
    const int y = threadIdx.x / 16, x = threadIdx.x % 16;

    load_tile_f32<F32_TILE, DIM, F32_THREADS>(room.q, query_rows{p, p.q, t.s, t.kv_head, t.first, t.end}, p.head_dim);
    float out[4][DIM / 32] = {}, greatest[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    for (int step = part.first; step < part.end; step++) {
        const key_tile tile = find_key_tile(p, t, walk, step);
        __syncthreads();
        load_tile_f32<F32_TILE, DIM, F32_THREADS>(
            room.kv, find_key_rows(p, tile.prefix ? p.prefix_k : p.k, t.kv_head, tile.row, tile.n), p.head_dim);
        __syncthreads();
        float s[2][2];
        multiply_nt_f32<DIM>(s, room.q, room.kv, p.head_dim);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = min(t.first + y + i * 16, t.end - 1), query = query_of(p, row);
            const span keys = tile_keys_seen(tile, keys_seen(p, t.s, query));
            const float slope = alibi_slope(p, t.kv_head, row);
            float most = greatest[i], unused;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int key = x + j * 16, distance = tile.position + key - (query + t.s.k_len - t.s.q_len);
                if (p.shaped) s[i][j] = shape_score(p, s[i][j], slope, distance, &unused);
                if (key < keys.first || key >= keys.end) s[i][j] = -INFINITY;
                most = fmaxf(most, s[i][j]);
            }
#pragma unroll
            for (int offset = 8; offset > 0; offset /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
            const float shift = most == -INFINITY ? 0.0f : most, shrink = expf((greatest[i] - shift) * p.unit);
            sum[i] *= shrink;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float e = expf((s[i][j] - shift) * p.unit);
                sum[i] += e;
                room.weights[(x + j * 16) * WEIGHT_LD + y + i * 16] = e;
            }
            greatest[i] = most;
            if (x == 0) room.shrink[y + i * 16] = shrink;
        }
        __syncthreads(); /* nobody reads the keys any more */
        load_tile_f32<F32_TILE, DIM, F32_THREADS>(
            room.kv, find_key_rows(p, tile.prefix ? p.prefix_v : p.v, t.kv_head, tile.row, tile.n), p.head_dim);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float shrink = room.shrink[threadIdx.x / 32 * 4 + i];
#pragma unroll
            for (int c = 0; c < DIM / 32; c++) out[i][c] *= shrink;
        }
        multiply_add_f32<DIM>(out, room.weights, room.kv);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int offset = 8; offset > 0; offset /= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], offset);
        if (x == 0) room.sum[y + i * 16] = sum[i], room.greatest[y + i * 16] = greatest[i];
    }
    __syncthreads();
    const query_rows to = {p, p.out, t.s, t.kv_head, t.first, t.end};
    for (int i = 0; i < 4; i++) {
        const int r = threadIdx.x / 32 * 4 + i;
        if (t.first + r >= t.end) continue;
        const row_result result = find_result(p, t, to, t.first + r);
        const float total = room.sum[r], inverse = total == 0.0f ? 0.0f : 1.0f / total;
        float *row = result.part == nullptr ? reinterpret_cast<float *>(result.out) : result.part;
        if (result.lse != nullptr && threadIdx.x % 32 == 0)
            *result.lse = total == 0.0f ? -INFINITY : room.greatest[r] * p.unit + logf(total);
#pragma unroll
        for (int c = 0; c < DIM / 32; c++) {
            const int column = threadIdx.x % 32 + c * 32;
            if (column < p.head_dim) row[column] = out[i][c] * inverse;
        }
    }
}

/* Rows (query, head) of all segments: the parts' results, weighted by exp(lse). A block takes a row, a warp every eighth
 * part; their sums are added in order. */
__global__ void __launch_bounds__(MERGE_WARPS * 32) merge_parts_kernel(const __grid_constant__ params p)
{
    __shared__ float sums[MERGE_WARPS][HEAD_DIM_MAX];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const segment &s = p.segments[blockIdx.y];
    for (int64_t r = blockIdx.x; r < (int64_t)s.q_len * p.heads; r += gridDim.x) {
        const int64_t index = (int64_t)s.q_start * p.heads + r;
        float lse[PARTS_MAX / 32], greatest = -INFINITY, weight = 0.0f, x[HEAD_DIM_MAX / 32] = {};
#pragma unroll
        for (int i = 0; i < PARTS_MAX / 32; i++) {
            lse[i] = lane + i * 32 < p.splits ? p.part_lse[index * p.splits + lane + i * 32] : -INFINITY;
            greatest = fmaxf(greatest, lse[i]);
        }
        greatest = tp_warp_max(greatest);
        const float shift = greatest == -INFINITY ? 0.0f : greatest;
#pragma unroll
        for (int i = 0; i < PARTS_MAX / 32; i++) weight += expf(lse[i] - shift);
        const float sum = tp_warp_sum(weight), inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
        if (threadIdx.x == 0 && p.lse != nullptr) p.lse[index] = sum == 0.0f ? -INFINITY : greatest + logf(sum);
        for (int part = warp; part < p.splits; part += MERGE_WARPS) {
            const float w = expf(p.part_lse[index * p.splits + part] - shift);
            const float *out = p.part_out + (index * p.splits + part) * p.head_dim;
#pragma unroll
            for (int i = 0; i < HEAD_DIM_MAX / 32; i++) {
                if (lane + i * 32 < p.head_dim) x[i] = fmaf(w, out[lane + i * 32], x[i]);
            }
        }
        __syncthreads(); /* the last row's sums have been read */
#pragma unroll
        for (int i = 0; i < HEAD_DIM_MAX / 32; i++) sums[warp][lane + i * 32] = x[i];
        __syncthreads();
        unsigned char *out =
            p.out.data + index / p.heads * p.out.row_bytes + index % p.heads * p.head_dim * (p.out.f32 ? 4 : 2);
        for (int c = threadIdx.x; c < p.head_dim; c += MERGE_WARPS * 32) {
            float total = 0.0f;
#pragma unroll
            for (int w = 0; w < MERGE_WARPS; w++) total += sums[w][c];
            if (p.out.f32)
                reinterpret_cast<float *>(out)[c] = total * inverse;
            else if (p.f16)
                reinterpret_cast<__half *>(out)[c] = tp_from_f32<__half>(total * inverse);
            else
                reinterpret_cast<bf16 *>(out)[c] = tp_from_f32<bf16>(total * inverse);
        }
    }
}

__global__ void fill_kernel(int64_t n, float value, float *x)
{
    const int64_t stride = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride) x[i] = value;
}

/* Parts to cut each tile's keys into, for the segments in p. */
int choose_splits(const params *p, const tp_attention_args *a, int tile)
{
    const int keys = p->q.f32 ? F32_TILE : KEYS, wanted = tile == 16 ? WARPS_WANTED : BLOCKS_WANTED;
    int64_t longest = 0, rows_end = 0;
    for (int s = 0; s < p->n_segments; s++) {
        int64_t n = p->segments[s].k_len;
        if (a->window > 0) n = tp_cuda_min(n, a->window + p->segments[s].q_len);
        if (n > longest) longest = n;
        rows_end = p->segments[s].q_start + p->segments[s].q_len;
    }
    const int64_t blocks = (int64_t)p->n_tiles * p->kv_heads,
                  steps = tp_cuda_ceil(longest, keys) + tp_cuda_ceil(p->n_prefix, keys);
    const int64_t row_bytes = (int64_t)p->heads * (p->head_dim + 1) * (int64_t)sizeof(float);
    const int64_t room = (int64_t)TP_CUDA_WORKSPACE_BYTES / (row_bytes * (rows_end > 0 ? rows_end : 1));
    int64_t splits = tp_cuda_min(tp_cuda_min(wanted / (blocks > 0 ? blocks : 1), steps), PARTS_MAX);
    splits = tp_cuda_min(splits, room);
    return splits > 1 ? (int)splits : 1;
}

void place_parts(tp_ctx *ctx, params *p)
{
    const segment *last = &p->segments[p->n_segments - 1];
    p->part_out = reinterpret_cast<float *>(tp_cuda_of(ctx)->workspace);
    p->part_lse = p->part_out + (int64_t)(last->q_start + last->q_len) * p->heads * p->splits * p->head_dim;
}

template <typename T, int DIM, int M, int WARPS> tp_status launch(tp_ctx *ctx, const params *p)
{
    constexpr size_t bytes = (size_t)(WARPS * M * 16 + 2 * KEYS) * tile_ld<DIM> * sizeof(T);
    TP_CUDA_ALLOW_SHARED(ctx, "attention", (attention_kernel<T, DIM, M, WARPS>), bytes);
    TP_CUDA_LAUNCH(ctx, "attention", (attention_kernel<T, DIM, M, WARPS>), (unsigned)(p->n_tiles * p->kv_heads * p->splits),
                   WARPS * 32, bytes, *p);
    return TP_OK;
}

template <int DIM> tp_status launch_f32(tp_ctx *ctx, const params *p)
{
    TP_CUDA_ALLOW_SHARED(ctx, "attention", attention_f32_kernel<DIM>, sizeof(f32_shared<DIM>));
    TP_CUDA_LAUNCH(ctx, "attention", attention_f32_kernel<DIM>, (unsigned)(p->n_tiles * p->kv_heads * p->splits), F32_THREADS,
                   sizeof(f32_shared<DIM>), *p);
    return TP_OK;
}

/* Rows of a tile: 16 if that is all there is, so that one warp may do it; else as many as the registers hold. *hopper: for
 * hopper_forward. */
int tile_rows(tp_ctx *ctx, const params *p, const tp_attention_args *a, bool *hopper)
{
    int64_t most = 0;
    *hopper = false;
    if (p->q.f32) return F32_TILE;
    for (int64_t s = 0; s < a->n_segments; s++) {
        if (a->segments[s].q_len * p->group > most) most = a->segments[s].q_len * p->group;
    }
    if (most <= 16) return 16;
    *hopper = hopper_takes(ctx, p);
    return *hopper ? hopper_forward_rows(p) : p->head_dim <= 128 ? 128 : 64;
}

tp_status launch_any(tp_ctx *ctx, const params *p, int tile, bool hopper)
{
    if (hopper) {
        return hopper_forward(ctx, p);
    } else if (p->q.f32) {
        TP_ATTENTION_DIM(p->head_dim, DIM, { return launch_f32<DIM>(ctx, p); });
    } else if (tile == 16) {
        TP_ATTENTION_TYPE(p, T, { TP_ATTENTION_DIM(p->head_dim, DIM, { return (launch<T, DIM, 1, 1>(ctx, p)); }); });
    } else {
        TP_ATTENTION_TYPE(
            p, T, { TP_ATTENTION_DIM(p->head_dim, DIM, { return (launch < T, DIM, DIM <= 128 ? 2 : 1, 4 > (ctx, p)); }); });
    }
    return TP_OK;
}

} // namespace

rows tp_attention::rows_of(tp_rows x, int64_t head_dim)
{
    const int size = (int)tp_cuda_size(x.dtype);
    return {static_cast<unsigned char *>(x.data), x.ld * size, size == 4, tp_rows_aligned(x) && head_dim * size % 16 == 0};
}

tp_status tp_attention::clear(tp_ctx *ctx, const char *name, tp_rows x, int64_t n, int64_t columns)
{
    const size_t size = (size_t)tp_cuda_size(x.dtype);
    if (n <= 0 || columns <= 0) return TP_OK;
    return tp_cuda_check(
        ctx, name,
        cudaMemset2DAsync(x.data, (size_t)x.ld * size, 0, (size_t)columns * size, (size_t)n, tp_cuda_of(ctx)->stream));
}

bool tp_attention::has_gaps(const tp_attention_args *a, int64_t n_rows, bool keys)
{
    int64_t done = 0;
    for (int64_t s = 0; s < a->n_segments; s++) {
        const int64_t start = keys ? a->segments[s].k_start : a->segments[s].q_start;
        if (start > done) return true;
        done = start + (keys ? a->segments[s].k_len : a->segments[s].q_len);
    }
    return done < n_rows;
}

tp_status tp_attention::begin(tp_ctx *ctx, const char *name, const tp_attention_args *a, params *p)
{
    const tp_dtype others[] = {a->k.dtype, a->v.dtype, a->out.dtype};
    TP_TRY(tp_cuda_check_dtype(ctx, name, a->q.dtype));
    for (tp_dtype other : others) {
        if (other != a->q.dtype)
            return tp_fail(ctx, TP_UNSUPPORTED, "%s: one array is %s, another %s", name, tp_dtype_name(a->q.dtype),
                           tp_dtype_name(other));
    }
    if (a->n_prefix > 0) { /* a prefix may be f32 beside 16 bits, or bf16 beside f32 */
        const tp_dtype beside = a->q.dtype == TP_F32 ? TP_BF16 : a->q.dtype;
        TP_TRY(tp_cuda_check_dtypes(ctx, name, beside, a->prefix_k.dtype));
        TP_TRY(tp_cuda_check_dtypes(ctx, name, beside, a->prefix_v.dtype));
    }
    if (a->head_dim > HEAD_DIM_MAX)
        return tp_fail(ctx, TP_UNSUPPORTED, "%s: head_dim is %lld, the CUDA kernel takes at most %d", name,
                       (long long)a->head_dim, HEAD_DIM_MAX);
    const int64_t group = a->heads / a->kv_heads;
    for (int64_t s = 0; s < a->n_segments; s++) {
        const tp_segment *x = &a->segments[s];
        if (x->q_start + x->q_len >= POSITION_MAX || x->k_start + x->k_len >= POSITION_MAX ||
            x->q_len * group * group >= POSITION_MAX)
            return tp_fail(ctx, TP_UNSUPPORTED, "%s: a segment of %lld queries and %lld keys, more than the CUDA kernel takes",
                           name, (long long)x->q_len, (long long)x->k_len);
    }
    *p = params{};
    p->f16 = a->q.dtype == TP_F16;
    p->q = rows_of(a->q, a->head_dim);
    p->k = rows_of(a->k, a->head_dim);
    p->v = rows_of(a->v, a->head_dim);
    p->out = rows_of(a->out, a->head_dim);
    if (a->n_prefix > 0) {
        p->prefix_k = rows_of(a->prefix_k, a->head_dim);
        p->prefix_v = rows_of(a->prefix_v, a->head_dim);
    }
    p->lse = a->lse;
    p->alibi = a->alibi_slopes;
    p->heads = (int)a->heads;
    p->kv_heads = (int)a->kv_heads;
    p->head_dim = (int)a->head_dim;
    p->group = (int)group;
    p->group_magic = (unsigned)((((uint64_t)1 << 32) + (uint64_t)group - 1) / (uint64_t)group);
    p->n_prefix = (int)a->n_prefix;
    p->window = (int)tp_cuda_min(a->window, POSITION_MAX);
    p->causal = a->causal;
    p->scale = a->scale;
    p->soft_cap = a->soft_cap;
    p->shaped =
        a->soft_cap > 0 || a->alibi_slopes != nullptr || !(a->scale > 0); /* the greatest of raw scores must be the greatest */
    p->unit = p->shaped ? 1.0f : a->scale;
    p->splits = 1;
    return TP_OK;
}

int64_t tp_attention::fill_segments(params *p, const tp_attention_args *a, int64_t s0, int64_t n, int tile, bool keys)
{
    p->n_segments = (int)tp_cuda_min(n, SEGMENTS);
    p->n_tiles = 0;
    for (int s = 0; s < p->n_segments; s++) {
        const tp_segment *x = &a->segments[s0 + s];
        p->segments[s] = {(int)x->q_start, (int)x->q_len, (int)x->k_start, (int)x->k_len, p->n_tiles};
        p->n_tiles += (int)tp_cuda_ceil(keys ? x->k_len : x->q_len * p->group, tile);
    }
    return p->n_segments;
}

extern "C" tp_status tp_cuda_attention(tp_ctx *ctx, const void *args)
{
    const tp_attention_args *a = static_cast<const tp_attention_args *>(args);
    params p;
    TP_TRY(begin(ctx, "attention", a, &p));
    if (a->n_q <= 0 || a->heads <= 0 || a->head_dim <= 0) return TP_OK;
    if (has_gaps(a, a->n_q, false)) {
        const int64_t n = a->n_q * a->heads;
        TP_TRY(clear(ctx, "attention", a->out, a->n_q, a->heads * a->head_dim));
        if (a->lse != nullptr)
            TP_CUDA_LAUNCH(ctx, "attention", fill_kernel, tp_cuda_blocks(ctx, n, 256), 256, 0, n, -INFINITY, a->lse);
    }
    if (tp_dnn_attention(ctx, a)) return TP_OK;
    bool hopper;
    const int tile = tile_rows(ctx, &p, a, &hopper);
    for (int64_t s0 = 0; s0 < a->n_segments; s0 += p.n_segments) {
        fill_segments(&p, a, s0, a->n_segments - s0, tile, false);
        p.splits = choose_splits(&p, a, tile);
        place_parts(ctx, &p);
        TP_TRY(launch_any(ctx, &p, tile, hopper));
        if (p.splits > 1)
            TP_CUDA_LAUNCH(ctx, "attention", merge_parts_kernel,
                           dim3((unsigned)tp_cuda_min(a->n_q * a->heads, 1024), (unsigned)p.n_segments), MERGE_WARPS * 32, 0,
                           p);
    }
    return TP_OK;
}
