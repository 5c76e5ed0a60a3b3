/* What attention and its gradient share: which keys a query sees, and tiles copied into cache as f32. */
#ifndef TP_BACKEND_CPU_SIMD_ATTENTION_H
#define TP_BACKEND_CPU_SIMD_ATTENTION_H

#include "backend/cpu/simd/product.h"
#include "backend/cpu/simd/rows.h"

#define TILE             64    /* rows of a tile, of queries as of keys; a multiple of every VL */
#define HEAD_DIM_MAX     256   /* so that all tiles of a thread fit in its scratch */
#define SEGMENTS_AT_ONCE 32768 /* whose numbering fits into the workspace beside other things */

/* Keys first .. end-1 of a segment. */
typedef struct span {
    int64_t first, end;
} span;

/* What query i of a segment sees. Both ends never fall as i grows. */
TP_INLINE span keys_seen(const tp_attention_args *a, const tp_segment *s, int64_t i)
{
    int64_t diagonal = i + (s->k_len - s->q_len);
    span keys = {0, s->k_len};
    if (a->causal && diagonal + 1 < keys.end) keys.end = diagonal + 1 > 0 ? diagonal + 1 : 0;
    if (a->window > 0 && diagonal - a->window + 1 > 0) keys.first = diagonal - a->window + 1;
    if (keys.first > keys.end) keys.first = keys.end;
    return keys;
}

/* Keys that a tile looks at together: a stretch of a segment's own keys, or of the prefix, which stands before position 0
 * and is hidden from nobody. */
typedef struct key_run {
    tp_rows k, v;
    int64_t row;      /* of the run's key 0 in k and v */
    int64_t position; /* of its key 0, counted in the segment */
    bool prefix;
} key_run;

TP_INLINE key_run prefix_keys(const tp_attention_args *a)
{
    return (key_run){a->prefix_k, a->prefix_v, 0, -a->n_prefix, true};
}
TP_INLINE key_run segment_keys(const tp_attention_args *a, const tp_segment *s)
{
    return (key_run){a->k, a->v, s->k_start, 0, false};
}

/* head_dim rounded up to whole vectors: the row length of tiles. */
TP_INLINE int64_t padded(int64_t head_dim)
{
    return (head_dim + VL - 1) / VL * VL;
}

/* The next n floats of a thread's scratch, aligned for vectors. */
TP_INLINE float *take(float **scratch, int64_t n)
{
    float *p = *scratch;
    *scratch += (n + 15) / 16 * 16;
    return p;
}

TP_INLINE void copy_tile_as(float *to, tp_rows x, int64_t row, int64_t n, int64_t column, int64_t dim, float factor, bool bf16)
{
    int64_t ld = padded(dim);
    for (int64_t r = 0; r < n; r++) {
        const unsigned char *from = (const unsigned char *)row_at(x, row + r) + column * (bf16 ? 2 : 4);
        for (int64_t d = 0; d < dim; d += VL) v_store(to + r * ld + d, v_get(from, bf16, d, dim - d) * v_set(factor));
    }
}

/* to [n, padded(dim)] = factor * x[row .. row+n-1, column .. column+dim-1], zeros behind. */
static void copy_tile(float *to, tp_rows x, int64_t row, int64_t n, int64_t column, int64_t dim, float factor)
{
    if (is_bf16(x))
        copy_tile_as(to, x, row, n, column, dim, factor, true);
    else
        copy_tile_as(to, x, row, n, column, dim, factor, false);
}

/* Rows of a tile, wherever they lie. */
typedef struct tile_rows {
    const float *data;
    int64_t ld;
} tile_rows;

/* The tile of x as f32 rows of padded(dim): x itself if that is what it holds, else a copy at `room`. */
TP_INLINE tile_rows tile_of(float *room, tp_rows x, int64_t row, int64_t n, int64_t column, int64_t dim)
{
    if (!is_bf16(x) && dim % VL == 0) return (tile_rows){(const float *)row_at(x, row) + column, x.ld};
    copy_tile(room, x, row, n, column, dim, 1.0f);
    return (tile_rows){room, padded(dim)};
}

/* to [dim, TILE] = transpose of from [n, padded(dim)]; columns from n on are not written. */
static void transpose_tile(float *to, const float *from, int64_t n, int64_t dim)
{
    int64_t ld = padded(dim), r = 0;
#if TP_SIMD_BITS > 128 /* x86 */
    for (; r + 4 <= n; r += 4) {
        const float *p = from + r * ld;
        for (int64_t d = 0; d + 4 <= dim; d += 4) {
            __m128 a = _mm_loadu_ps(p + d), b = _mm_loadu_ps(p + ld + d);
            __m128 c = _mm_loadu_ps(p + 2 * ld + d), e = _mm_loadu_ps(p + 3 * ld + d);
            _MM_TRANSPOSE4_PS(a, b, c, e);
            _mm_storeu_ps(to + d * TILE + r, a);
            _mm_storeu_ps(to + (d + 1) * TILE + r, b);
            _mm_storeu_ps(to + (d + 2) * TILE + r, c);
            _mm_storeu_ps(to + (d + 3) * TILE + r, e);
        }
        for (int64_t d = dim / 4 * 4; d < dim; d++) {
            for (int64_t i = 0; i < 4; i++) to[d * TILE + r + i] = p[i * ld + d];
        }
    }
#endif
    for (; r < n; r++) {
        for (int64_t d = 0; d < dim; d++) to[d * TILE + r] = from[r * ld + d];
    }
}

/* What happens to scale * q k between product and softmax. */
TP_INLINE vf soft_cap(vf score, float cap)
{
    return v_set(cap) * v_tanh(score / v_set(cap));
}

TP_MUST_CHECK static inline tp_status check_attention(tp_ctx *ctx, const char *kernel, const tp_attention_args *a)
{
    TP_TRY(check_dtypes(ctx, kernel, a->q.dtype, a->k.dtype));
    TP_TRY(check_dtypes(ctx, kernel, a->q.dtype, a->v.dtype));
    TP_TRY(check_dtypes(ctx, kernel, a->q.dtype, a->out.dtype));
    if (a->n_prefix > 0) {
        TP_TRY(check_dtype(ctx, kernel, a->prefix_k.dtype));
        TP_TRY(check_dtype(ctx, kernel, a->prefix_v.dtype));
    }
    if (a->head_dim <= HEAD_DIM_MAX) return TP_OK;
    return tp_fail(ctx, TP_UNSUPPORTED, "%s: head_dim is %lld, the CPU kernel takes at most %d", kernel, (long long)a->head_dim,
                   HEAD_DIM_MAX);
}

/* A finished row: out / sum goes to a row and head of a->out, zeros if it saw no key (out is NULL then). */
static void write_row(const tp_attention_args *a, int64_t row, int64_t head, const float *out, float greatest, float sum)
{
    bool bf16 = is_bf16(a->out);
    vf factor = v_set(1.0f / sum);
    unsigned char *to = (unsigned char *)row_at(a->out, row) + head * a->head_dim * (bf16 ? 2 : 4);
    for (int64_t d = 0; d < a->head_dim; d += VL) {
        vf x = v_set(0.0f);
        if (out != NULL) x = v_load(out + d) * factor;
        v_put(to, bf16, d, a->head_dim - d, x);
    }
    if (a->lse != NULL) a->lse[row * a->heads + head] = out != NULL ? greatest + logf(sum) : -INFINITY;
}

/* The s with first[s] <= i < first[s + 1], among n ranges of which some may be empty. */
static int64_t find_range(const int64_t *first, int64_t n, int64_t i)
{
    int64_t low = 0, high = n;
    while (high - low > 1) {
        int64_t middle = low + (high - low) / 2;
        if (first[middle] <= i)
            low = middle;
        else
            high = middle;
    }
    return low;
}

#endif
