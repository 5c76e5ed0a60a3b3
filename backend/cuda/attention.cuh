/* What attention and its gradient share: how work is cut, which keys a query sees, tiles in shared memory, tensor cores.
 *
 * The rows of a tile are pairs (query, head): all query heads that share a key head lie side by side, row r of a segment
 * being query r / group and head r % group. So a grouped model reads each key once for the whole group, and one token
 * against a long cache still fills a tile's rows with its heads.
 *
 * Segments travel in the kernel's parameters, at most SEGMENTS of them per launch: nothing is copied and a captured launch
 * keeps its own. */
#ifndef TP_BACKEND_CUDA_ATTENTION_CUH
#define TP_BACKEND_CUDA_ATTENTION_CUH

#include "backend/cuda/cuda.cuh"

namespace tp_attention {

typedef __nv_bfloat16 bf16;

constexpr int SEGMENTS = 120;
constexpr int HEAD_DIM_MAX = 256;
constexpr int64_t POSITION_MAX = (int64_t)1 << 30; /* so that sums of positions fit in an int */
constexpr float LOG2E = 1.44269504f;

struct segment {
    int q_start, q_len, k_start, k_len;
    int first_tile; /* of queries, or of keys in the kernel that owns them */
};

/* Rows as attention reads and writes them. */
struct rows {
    unsigned char *data;
    int64_t row_bytes;
    bool f32, aligned; /* aligned: every head of every row starts where 16-byte accesses may */
};

struct params {
    rows q, k, v, out, prefix_k, prefix_v, dout, dq, dk, dv;
    bool f16;              /* what is not f32 is f16, not bf16 */
    float *lse, *delta;
    const float *alibi;
    int heads, kv_heads, head_dim;
    int group;             /* query heads of one key head */
    unsigned group_magic;  /* r / group is the upper half of r * group_magic */
    int n_prefix;
    int window;            /* 0: none */
    bool causal;
    bool shaped;           /* scores are scaled, capped and shifted before the softmax, not within its exponential */
    bool accumulate;       /* dk and dv are added to */
    float scale, soft_cap;
    float unit;            /* scores times this are exponents of e: 1 if shaped, else scale */
    int splits;            /* of a tile's keys; each writes its own part of the result */
    float *part_out, *part_lse;
    int n_segments, n_tiles;
    segment segments[SEGMENTS];
};

/* ---- what a block works on ---- */

__device__ __forceinline__ int query_of(const params &p, int row)
{
    return p.group == 1 ? row : (int)__umulhi((unsigned)row, p.group_magic);
}

/* Keys first .. end-1 of a segment. */
struct span {
    int first, end;
};

/* What a query sees. Both ends never fall as the query grows. */
__device__ __forceinline__ span keys_seen(const params &p, const segment &s, int query)
{
    const int diagonal = query + s.k_len - s.q_len;
    span keys = {0, s.k_len};
    if (p.causal) keys.end = min(keys.end, max(diagonal + 1, 0));
    if (p.window > 0) keys.first = max(diagonal - p.window + 1, 0);
    keys.first = min(keys.first, keys.end);
    return keys;
}

__device__ __forceinline__ const segment &segment_of(const params &p, int tile)
{
    int low = 0, high = p.n_segments;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (p.segments[middle].first_tile <= tile)
            low = middle;
        else
            high = middle;
    }
    return p.segments[low];
}

/* A tile of queries: rows first .. end-1 of the segment, of one key head, and what all of them together see. */
struct query_tile {
    segment s;
    int kv_head, split;
    int first, end;
    span all_see, some_see; /* keys that every row sees, and that any does */
};

template <int ROWS> __device__ __forceinline__ query_tile find_query_tile(const params &p)
{
    query_tile t;
    const int units = p.kv_heads * p.splits, unit = blockIdx.x % units;
    const int tile = p.n_tiles - 1 - blockIdx.x / units; /* the last ones see most keys: first */
    t.s = segment_of(p, tile);
    t.kv_head = unit / p.splits;
    t.split = unit % p.splits;
    t.first = (tile - t.s.first_tile) * ROWS;
    t.end = min(t.first + ROWS, t.s.q_len * p.group);
    const span low = keys_seen(p, t.s, query_of(p, t.first)), high = keys_seen(p, t.s, query_of(p, t.end - 1));
    t.all_see = {high.first, low.end};
    t.some_see = {low.first, high.end};
    return t;
}

/* Element (query, head) of arrays [n_q, heads]. */
__device__ __forceinline__ int64_t row_index(const params &p, const segment &s, int kv_head, int row)
{
    const int query = query_of(p, row);
    return (int64_t)(s.q_start + query) * p.heads + kv_head * p.group + (row - query * p.group);
}

/* Where rows of queries, or of one key head, lie. nullptr for those that are not there. */
struct query_rows {
    const params &p;
    const rows &x;
    const segment &s;
    int kv_head, first, end;
    __device__ __forceinline__ unsigned char *at(int r) const
    {
        const int row = first + r, query = query_of(p, row);
        if (row >= end) return nullptr;
        const int head = kv_head * p.group + (row - query * p.group);
        return x.data + (int64_t)(s.q_start + query) * x.row_bytes + (int64_t)head * p.head_dim * (x.f32 ? 4 : 2);
    }
};

struct key_rows {
    const rows &x;
    unsigned char *first;
    int n;
    __device__ __forceinline__ unsigned char *at(int r) const { return r < n ? first + (int64_t)r * x.row_bytes : nullptr; }
};

__device__ __forceinline__ key_rows find_key_rows(const params &p, const rows &x, int kv_head, int row, int n)
{
    return {x, x.data + (int64_t)row * x.row_bytes + (int64_t)kv_head * p.head_dim * (x.f32 ? 4 : 2), n};
}

/* The keys of a tile of queries in steps of KEYS: first those of the prefix, then the segment's own. */
template <int KEYS> struct key_walk {
    int prefix_tiles, first, n; /* n: steps; step i >= prefix_tiles is tile first + i - prefix_tiles of the segment */

    __device__ __forceinline__ key_walk(const params &p, span some_see)
    {
        prefix_tiles = (p.n_prefix + KEYS - 1) / KEYS;
        first = some_see.first / KEYS;
        n = prefix_tiles + (some_see.first < some_see.end ? (some_see.end - 1) / KEYS + 1 - first : 0);
    }
};

/* One step of it: keys key .. key+n-1 of the prefix or the segment. */
struct key_tile {
    bool prefix;
    int key, n;
    int row;      /* of key 0 of the tile in its array */
    int position; /* of the same, counted in the segment; the prefix stands before 0 */
    bool all_seen;
};

template <int KEYS>
__device__ __forceinline__ key_tile find_key_tile(const params &p, const query_tile &t, const key_walk<KEYS> &walk, int step)
{
    key_tile k;
    k.prefix = step < walk.prefix_tiles;
    k.key = (k.prefix ? step : walk.first + step - walk.prefix_tiles) * KEYS;
    k.n = min(KEYS, (k.prefix ? p.n_prefix : t.s.k_len) - k.key);
    k.row = (k.prefix ? 0 : t.s.k_start) + k.key;
    k.position = k.key - (k.prefix ? p.n_prefix : 0);
    k.all_seen = k.n == KEYS && (k.prefix || (t.all_see.first <= k.key && t.all_see.end >= k.key + KEYS));
    return k;
}

/* What one row sees of it, as numbers of the tile's keys. */
__device__ __forceinline__ span tile_keys_seen(const key_tile &k, span seen)
{
    return k.prefix ? span{0, k.n} : span{seen.first - k.key, min(seen.end - k.key, k.n)};
}

/* The score that the softmax sees, from q k^T: natural units; slack: its derivative by scale * q k^T. */
__device__ __forceinline__ float shape_score(const params &p, float score, float slope, int distance, float *slack)
{
    score *= p.scale;
    *slack = 1.0f;
    if (p.soft_cap > 0) {
        const float t = tanhf(score / p.soft_cap);
        score = p.soft_cap * t;
        *slack = 1.0f - t * t;
    }
    return fmaf(slope, (float)distance, score);
}

__device__ __forceinline__ float alibi_slope(const params &p, int kv_head, int row)
{
    if (p.alibi == nullptr) return 0.0f;
    return p.alibi[kv_head * p.group + row - query_of(p, row) * p.group];
}

/* ---- tiles in shared memory ---- */

/* T, here and below: the 16-bit type of a kernel, bf16 or f16. Where nothing says otherwise it is bf16. */
template <typename T = bf16> __device__ __forceinline__ float read_value(const unsigned char *row, int column, bool f32)
{
    return f32 ? reinterpret_cast<const float *>(row)[column] : tp_to_f32(reinterpret_cast<const T *>(row)[column]);
}

__device__ __forceinline__ void copy_async(void *to, const void *from, bool there)
{
    const unsigned address = (unsigned)__cvta_generic_to_shared(to);
    const int bytes = there ? 16 : 0; /* the rest of the 16 is filled with zeros */
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/* Until at most PENDING of the thread's last groups are under way. */
template <int PENDING> __device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

/* The row of a tile of 16-bit values is 16 bytes longer than its values: eight rows at the same column then lie in different banks. */
template <int DIM> constexpr int tile_ld = DIM + 8;

/* to [ROWS][tile_ld<DIM>] = the rows in 16 bits, zeros behind head_dim and for rows that are not there. May still be under way
 * when it returns: copy_commit, copy_wait and a barrier come before the tile is read. */
template <int ROWS, int DIM, int THREADS, typename T, typename Source>
__device__ __forceinline__ void load_tile(T *to, const Source &source, int head_dim)
{
    constexpr int CHUNKS = DIM / 8;
    const bool quick = source.x.aligned && !source.x.f32;
#pragma unroll 4
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
        const int r = i / CHUNKS, c = i % CHUNKS * 8;
        const unsigned char *row = source.at(r);
        T *chunk = to + r * tile_ld<DIM> + c;
        if (quick) {
            const bool there = row != nullptr && c < head_dim;
            copy_async(chunk, there ? row + c * 2 : source.x.data, there);
        } else {
#pragma unroll 1 /* rare: not worth eight copies in every kernel */
            for (int e = 0; e < 8; e++)
                chunk[e] = tp_from_f32<T>(row != nullptr && c + e < head_dim ? read_value<T>(row, c + e, source.x.f32) : 0.0f);
        }
    }
}

/* The same in f32, rows of DIM + 4 values. Complete after a barrier. */
template <int ROWS, int DIM, int THREADS, typename Source>
__device__ __forceinline__ void load_tile_f32(float *to, const Source &source, int head_dim)
{
    constexpr int CHUNKS = DIM / 4;
    const bool quick = source.x.aligned && source.x.f32;
#pragma unroll 2
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
        const int r = i / CHUNKS, c = i % CHUNKS * 4;
        const unsigned char *row = source.at(r);
        float4 x = make_float4(0, 0, 0, 0);
        if (quick && row != nullptr && c < head_dim) {
            x = *reinterpret_cast<const float4 *>(row + c * 4);
        } else if (row != nullptr) {
            if (c < head_dim) x.x = read_value(row, c, source.x.f32);
            if (c + 1 < head_dim) x.y = read_value(row, c + 1, source.x.f32);
            if (c + 2 < head_dim) x.z = read_value(row, c + 2, source.x.f32);
            if (c + 3 < head_dim) x.w = read_value(row, c + 3, source.x.f32);
        }
        *reinterpret_cast<float4 *>(to + r * (DIM + 4) + c) = x;
    }
}

/* ---- tensor cores ----
 *
 * mma.m16n8k16: c [16, 8] f32 += a [16, 16] b [16, 8]. Lane l holds of c rows l/4 (c[0], c[1]) and l/4 + 8 (c[2], c[3]),
 * columns 2 (l%4) and the next; two c side by side, packed to 16 bits, are an a. */

template <typename T = bf16>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
#define TP_MMA(type)                                                                                                   \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "  \
                 "{%0,%1,%2,%3};"                                                                                      \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
    if constexpr (tp_same<T, bf16>::yes)
        TP_MMA("bf16");
    else
        TP_MMA("f16");
#undef TP_MMA
}

__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], const void *row)
{
    const unsigned address = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&x)[4], const void *row)
{
    const unsigned address = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
}

/* c [M*16, N*8] = a b^T over DIM: a is the warp's M*16 rows of one tile, b the N*8 rows of another. */
template <int M, int N, int DIM, typename T>
__device__ __forceinline__ void multiply_nt(float (&c)[M][N][4], const T *a, const T *b)
{
    const int lane = threadIdx.x % 32;
    const T *a_row = a + (lane % 16) * tile_ld<DIM> + lane / 16 * 8;
    const T *b_row = b + (lane / 16 * 8 + lane % 8) * tile_ld<DIM> + lane / 8 % 2 * 8;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) c[m][n][i] = 0.0f;
#pragma unroll
    for (int k = 0; k < DIM; k += 16) {
        uint32_t x[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) load_matrices(x[m], a_row + m * 16 * tile_ld<DIM> + k);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t y[4];
            load_matrices(y, b_row + n * 8 * tile_ld<DIM> + k);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma<T>(c[m][n], x[m], y[0], y[1]);
                mma<T>(c[m][n + 1], x[m], y[2], y[3]);
            }
        }
    }
}

/* c [M*16, COLUMNS] += w b: w [M*16, K*8] are results of multiply_nt, rounded to 16 bits; b is K*8 rows of a tile, from the
 * column on that the pointer stands at. */
template <int M, int K, int DIM, int COLUMNS, typename T>
__device__ __forceinline__ void multiply_add(float (&c)[M][COLUMNS / 8][4], const float (&w)[M][K][4], const T *b)
{
    const int lane = threadIdx.x % 32;
    const T *b_row = b + (lane % 16) * tile_ld<DIM> + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < K; k += 2) {
        uint32_t x[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) {
            x[m][0] = tp_pack<T>(w[m][k][0], w[m][k][1]);
            x[m][1] = tp_pack<T>(w[m][k][2], w[m][k][3]);
            x[m][2] = tp_pack<T>(w[m][k + 1][0], w[m][k + 1][1]);
            x[m][3] = tp_pack<T>(w[m][k + 1][2], w[m][k + 1][3]);
        }
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n += 2) {
            uint32_t y[4];
            load_matrices_transposed(y, b_row + k * 8 * tile_ld<DIM> + n * 8);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma<T>(c[m][n], x[m], y[0], y[1]);
                mma<T>(c[m][n + 1], x[m], y[2], y[3]);
            }
        }
    }
}

/* Two neighbouring values of a row, of which `left` are within the head. */
template <typename T>
__device__ __forceinline__ void store_pair(unsigned char *row, int column, int left, bool aligned, float a, float b)
{
    T *to = reinterpret_cast<T *>(row) + column;
    if (aligned && left >= 2) {
        *reinterpret_cast<uint32_t *>(to) = tp_pack<T>(a, b);
    } else {
        if (left > 0) to[0] = tp_from_f32<T>(a);
        if (left > 1) to[1] = tp_from_f32<T>(b);
    }
}

/* ---- forward ---- */

/* Part of the walk that this block takes. */
__device__ __forceinline__ span part_of(const params &p, int steps, int split)
{
    const int per = (steps + p.splits - 1) / p.splits;
    return {min(split * per, steps), min((split + 1) * per, steps)};
}

/* Where the results of a row go: to out and lse, or aside if the keys are split. */
struct row_result {
    unsigned char *out;
    float *part, *lse;
};

__device__ __forceinline__ row_result find_result(const params &p, const query_tile &t, const query_rows &out, int row)
{
    const int64_t index = row_index(p, t.s, t.kv_head, row);
    if (p.splits == 1) return {out.at(row - t.first), nullptr, p.lse == nullptr ? nullptr : p.lse + index};
    const int64_t part = index * p.splits + t.split;
    return {nullptr, p.part_out + part * p.head_dim, p.part_lse + part};
}

/* The scores of two rows of a lane (tensor cores' layout) become exponentials; greatest and sum go on, the sum over the lane's
 * own columns. What is summed so far is to be multiplied by shrink. */
template <int N>
__device__ __forceinline__ void softmax_step(const params &p, const query_tile &t, const key_tile &tile, const int (&row)[2],
                                             const span (&seen)[2], float (&s)[N][4], float (&greatest)[2], float (&sum)[2],
                                             float (&shrink)[2])
{
    const int lane = threadIdx.x % 32;
    const float factor = p.unit * LOG2E;
    if (p.shaped) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int r = min(row[h], t.end - 1), diagonal = query_of(p, r) + t.s.k_len - t.s.q_len;
            const float slope = alibi_slope(p, t.kv_head, r);
#pragma unroll
            for (int n = 0; n < N; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float unused;
                    s[n][h * 2 + i] = shape_score(p, s[n][h * 2 + i], slope, tile.position + n * 8 + lane % 4 * 2 + i - diagonal, &unused);
                }
            }
        }
    }
    if (!tile.all_seen) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const span keys = tile_keys_seen(tile, seen[h]);
#pragma unroll
            for (int n = 0; n < N; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int j = n * 8 + lane % 4 * 2 + i;
                    if (j < keys.first || j >= keys.end) s[n][h * 2 + i] = -INFINITY;
                }
            }
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float most = greatest[h], added = 0.0f;
#pragma unroll
        for (int n = 0; n < N; n++) most = fmaxf(most, fmaxf(s[n][h * 2], s[n][h * 2 + 1]));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
        /* A row that has seen nothing keeps -infinity; 0 stands for it in differences. The difference comes before the factor:
         * one multiply-add with a rounded product of great scores would be off by more than an exponent. */
        const float shift = most == -INFINITY ? 0.0f : most;
        shrink[h] = exp2f((greatest[h] - shift) * factor);
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                s[n][h * 2 + i] = exp2f((s[n][h * 2 + i] - shift) * factor);
                added += s[n][h * 2 + i];
            }
        }
        greatest[h] = most;
        sum[h] = fmaf(sum[h], shrink[h], added);
    }
}

/* A row, finished, goes to its place: sum over all columns, values n * 8 + lane % 4 * 2 and the next of o[n]. */
template <typename T, int N>
__device__ __forceinline__ void store_result(const params &p, const query_tile &t, const query_rows &to, int row, int h, float greatest,
                                             float sum, const float (&o)[N][4])
{
    const int lane = threadIdx.x % 32;
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (row >= t.end) return;
    const row_result result = find_result(p, t, to, row);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    if (result.lse != nullptr && lane % 4 == 0) *result.lse = sum == 0.0f ? -INFINITY : greatest * p.unit + logf(sum);
#pragma unroll
    for (int n = 0; n < N; n++) {
        const int column = n * 8 + lane % 4 * 2, left = p.head_dim - column;
        const float a = o[n][h * 2] * inverse, b = o[n][h * 2 + 1] * inverse;
        if (result.part == nullptr) {
            store_pair<T>(result.out, column, left, p.out.aligned, a, b);
        } else {
            if (left > 0) result.part[column] = a;
            if (left > 1) result.part[column + 1] = b;
        }
    }
}

/* ---- backward ---- */

/* What turns a score and its dP into P and dS. */
struct row_terms {
    float lse, delta; /* lse in units of exponents of 2; infinity for rows without keys, whose P is then 0 */
};

__device__ __forceinline__ row_terms find_terms(const params &p, const segment &s, int kv_head, int row, int end)
{
    if (row >= end) return {INFINITY, 0.0f};
    const int64_t index = row_index(p, s, kv_head, row);
    const float lse = p.lse[index];
    return {lse == -INFINITY ? INFINITY : lse * LOG2E, p.delta[index]};
}

/* score and dp become P and dS. */
__device__ __forceinline__ void finish(const params &p, float &score, float &dp, row_terms terms, float slope, int distance, bool seen)
{
    float slack = 1.0f;
    if (p.shaped) score = shape_score(p, score, slope, distance, &slack);
    score = seen ? exp2f(fmaf(score, p.unit * LOG2E, -terms.lse)) : 0.0f;
    dp = seen ? score * (dp - terms.delta) * slack : 0.0f;
}

/* A tile of keys of one key head, and the rows of its segment that see any of them. */
struct owned_keys {
    segment s;
    int kv_head, key, n;
    int first_row, end_row;
};

template <int KEYS> __device__ __forceinline__ owned_keys find_owned_keys(const params &p)
{
    owned_keys t;
    const int tile = blockIdx.x / p.kv_heads; /* the first ones are seen by most rows: first */
    t.s = segment_of(p, tile);
    t.kv_head = blockIdx.x % p.kv_heads;
    t.key = (tile - t.s.first_tile) * KEYS;
    t.n = min(KEYS, t.s.k_len - t.key);
    const int shift = t.s.k_len - t.s.q_len;
    int first = 0, end = t.s.q_len;
    if (p.causal) first = max(0, t.key - shift);
    if (p.window > 0) end = max(0, min(end, t.key + t.n - 1 - shift + p.window));
    t.first_row = min(first, end) * p.group;
    t.end_row = end * p.group;
    return t;
}

/* Whether all rows of a step see all keys of the tile. */
__device__ __forceinline__ bool all_seen(const params &p, const owned_keys &t, int row, int rows, int keys)
{
    if (t.n < keys || row + rows > t.end_row) return false;
    return keys_seen(p, t.s, query_of(p, row)).end >= t.key + keys && keys_seen(p, t.s, query_of(p, row + rows - 1)).first <= t.key;
}

/* Stores two neighbouring sums of a key's row, or adds them. */
template <typename T>
__device__ __forceinline__ void store_sums(const params &p, const rows &x, unsigned char *row, int column, float a, float b)
{
    const int left = p.head_dim - column;
    if (p.accumulate) {
        if (left > 0) a += read_value<T>(row, column, false);
        if (left > 1) b += read_value<T>(row, column + 1, false);
    }
    store_pair<T>(row, column, left, x.aligned, a, b);
}

/* ---- f32: 256 threads, tiles of 32 rows ----
 *
 * Products by plain multiply-add. Of scores [32, 32] a thread holds rows y and y + 16 by columns x and x + 16, with
 * y = thread / 16, x = thread % 16. Of sums [32, DIM] it holds rows 4 (thread / 32) and the next three by columns
 * thread % 32 + 32 k. Between the two, weights lie in shared memory as [column of scores][WEIGHT_LD]. */

constexpr int F32_TILE = 32;
constexpr int F32_THREADS = 256;
constexpr int WEIGHT_LD = 36;

template <int DIM> __device__ __forceinline__ void multiply_nt_f32(float (&s)[2][2], const float *a, const float *b, int head_dim)
{
    const float *a0 = a + threadIdx.x / 16 * (DIM + 4), *b0 = b + threadIdx.x % 16 * (DIM + 4);
    s[0][0] = s[0][1] = s[1][0] = s[1][1] = 0.0f;
    for (int c = 0; c < head_dim; c += 4) {
        float x[2][4], y[2][4];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            tp_load<4>(a0 + i * 16 * (DIM + 4) + c, x[i]);
            tp_load<4>(b0 + i * 16 * (DIM + 4) + c, y[i]);
        }
#pragma unroll
        for (int e = 0; e < 4; e++)
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < 2; j++) s[i][j] = fmaf(x[i][e], y[j][e], s[i][j]);
    }
}

template <int DIM>
__device__ __forceinline__ void multiply_add_f32(float (&sum)[4][DIM / 32], const float *weights, const float *values)
{
    const float *w = weights + threadIdx.x / 32 * 4, *v = values + threadIdx.x % 32;
    for (int j = 0; j < F32_TILE; j++) {
        float x[4];
        tp_load<4>(w + j * WEIGHT_LD, x);
#pragma unroll
        for (int k = 0; k < DIM / 32; k++) {
            const float y = v[j * (DIM + 4) + k * 32];
#pragma unroll
            for (int i = 0; i < 4; i++) sum[i][k] = fmaf(x[i], y, sum[i][k]);
        }
    }
}

/* ---- host ---- */

/* Checks the arguments and fills what does not depend on segments. */
tp_status begin(tp_ctx *ctx, const char *name, const tp_attention_args *a, params *p);
rows rows_of(tp_rows x, int64_t head_dim);

/* Sets up the launches of a kernel whose tiles have `tile` rows (queries times group, or keys if `keys`): takes up to SEGMENTS
 * segments from s0 on, and returns how many. */
int64_t fill_segments(params *p, const tp_attention_args *a, int64_t s0, int64_t n, int tile, bool keys);

/* Whether rows of queries, or of keys, lie outside all segments. */
bool has_gaps(const tp_attention_args *a, int64_t n_rows, bool keys);

/* attention_hopper.cu: kernels on Hopper's own tensor core instructions, for what they take: bf16 or f16, aligned, heads of up to
 * 128. The functions say how many rows, or keys, their tiles have. */
bool hopper_takes(tp_ctx *ctx, const params *p);
int hopper_forward_rows(const params *p);
int hopper_key_rows(const params *p);
int hopper_query_rows(const params *p);
tp_status hopper_forward(tp_ctx *ctx, const params *p);
tp_status hopper_key_gradient(tp_ctx *ctx, const params *p);
tp_status hopper_query_gradient(tp_ctx *ctx, const params *p);

/* Zeros in all rows. */
tp_status clear(tp_ctx *ctx, const char *name, tp_rows x, int64_t n, int64_t columns);

} // namespace tp_attention

/* Runs the statements with the constant DIM: the smallest head size there are kernels for that holds head_dim. More sizes would
 * save a padded head of 80 or 96 some work, and cost a minute of compiling each. */
#define TP_ATTENTION_DIM(head_dim, DIM, ...)                 \
    do {                                                     \
        if ((head_dim) <= 64) {                              \
            constexpr int DIM = 64;                          \
            __VA_ARGS__                                      \
        } else if ((head_dim) <= 128) {                      \
            constexpr int DIM = 128;                         \
            __VA_ARGS__                                      \
        } else {                                             \
            constexpr int DIM = 256;                         \
            __VA_ARGS__                                      \
        }                                                    \
    } while (0)

/* Runs the statements with the 16-bit type T. */
#define TP_ATTENTION_TYPE(p, T, ...)                         \
    do {                                                     \
        if ((p)->f16) {                                      \
            using T = __half;                                \
            __VA_ARGS__                                      \
        } else {                                             \
            using T = tp_attention::bf16;                    \
            __VA_ARGS__                                      \
        }                                                    \
    } while (0)

#endif
