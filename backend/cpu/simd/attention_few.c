/* Attention of a handful of queries, as in decoding: one token against a long cache. The work is to read keys and values
 * once, at the speed of memory.
 *
 * An item is a part of a segment's keys, for all heads, so that items read whole rows, in the order in which they lie; while
 * keys are multiplied, the next ones and their values are fetched. Query heads that share a key head read it together.
 * Scores are dot products, [row][key], since rows would not fill the lanes of a vector. Parts are joined in order, each
 * weighted by the exponential of its greatest score. */
#include "backend/cpu/simd/attention.h"

#define FEW_ROWS      8   /* (query, head) pairs that read one key head */
#define FEW_HEAD_ROWS 128 /* of all heads that are worked on together: what their q and out take fits the scratch */
#define FEW_KEYS      64  /* of a step; and of a part, at least */
#define FEW_PARTS     32  /* of a segment, roughly, at most: parts cost their joining */
#define FEW_AHEAD     8   /* keys to prefetch */

/* Keys whose scores are summed together: what the registers hold, times four rows. */
#if TP_SIMD_BITS == 512
#define FEW_KEYS_AT_ONCE 4
#else
#define FEW_KEYS_AT_ONCE 2
#endif

/* Whether a segment is for this file: too few rows to be lanes. */
TP_INLINE bool is_few(const tp_attention_args *a, const tp_segment *s)
{
    return s->q_len * (a->heads / a->kv_heads) <= FEW_ROWS;
}

typedef struct few_job {
    const tp_attention_args *a;
    tp_cpu *cpu;
    const tp_segment *segments;
    int64_t n_segments, part_keys; /* part_keys: of a part, at least */
    int64_t *first_part;           /* [n_segments + 1] */
    int64_t *first_state;          /* [n_segments + 1] of segments with several parts: [part][query][head] */
    float *states;                 /* greatest score, sum of exponentials, sums of v [dim] */
} few_job;

/* Some key heads and all the rows that read them: row r belongs to key head kv_first + r / rows_per_head; of those of one
 * head, row i is query i / sharing, head kv_head * sharing + i % sharing. */
typedef struct few_rows {
    const tp_attention_args *a;
    const tp_segment *segment;
    int64_t kv_first, kv_end;
    int64_t sharing, rows_per_head, rows;
    int64_t dim; /* padded head_dim */
    bool started;
    float *q, *out; /* [row][dim]; q times scale */
    float *scores;  /* [row][FEW_KEYS] */
    float greatest[FEW_HEAD_ROWS], sum[FEW_HEAD_ROWS], shrink[FEW_HEAD_ROWS];
} few_rows;

typedef struct few_place {
    int64_t query, head;
} few_place;

TP_INLINE few_place few_place_of(const few_rows *t, int64_t r)
{
    int64_t kv_head = t->kv_first + r / t->rows_per_head, i = r % t->rows_per_head;
    return (few_place){i / t->sharing, kv_head * t->sharing + i % t->sharing};
}

/* ------------------------------------------------------------------------------------------------- one step of keys */

/* Scores of `rows` rows against FEW_KEYS_AT_ONCE keys; `q` and `scores` are those of the first row. */
TP_INLINE void few_dots(const float *q, int64_t dim, int64_t head_dim, const void *const *keys, bool bf16, int rows,
                        float *scores)
{
    vf sum[4][4];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) sum[r][k] = v_set(0.0f);
    }
    for (int64_t d = 0; d < head_dim; d += VL) {
        vf x[FEW_KEYS_AT_ONCE];
#pragma GCC unroll 4
        for (int k = 0; k < FEW_KEYS_AT_ONCE; k++) x[k] = v_get(keys[k], bf16, d, head_dim - d);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            vf z = v_load(q + r * dim + d);
#pragma GCC unroll 4
            for (int k = 0; k < FEW_KEYS_AT_ONCE; k++) sum[r][k] = v_fma(x[k], z, sum[r][k]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        float four[4];
        v_sum4(sum[r][0], sum[r][1], sum[r][2], sum[r][3], four);
        memcpy(scores + r * FEW_KEYS, four, FEW_KEYS_AT_ONCE * sizeof(float));
    }
}

TP_INLINE void few_head_scores(const few_rows *t, int64_t first_row, const void *const *keys, bool bf16, int64_t j)
{
    for (int64_t r = first_row; r < first_row + t->rows_per_head; r += 4) {
        int64_t rows = first_row + t->rows_per_head - r;
        const float *q = t->q + r * t->dim;
        float *scores = t->scores + r * FEW_KEYS + j;
        if (rows >= 4)
            few_dots(q, t->dim, t->a->head_dim, keys, bf16, 4, scores);
        else if (rows == 3)
            few_dots(q, t->dim, t->a->head_dim, keys, bf16, 3, scores);
        else if (rows == 2)
            few_dots(q, t->dim, t->a->head_dim, keys, bf16, 2, scores);
        else
            few_dots(q, t->dim, t->a->head_dim, keys, bf16, 1, scores);
    }
}

TP_INLINE void few_prefetch(const void *row, int64_t offset, int64_t bytes)
{
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch((const unsigned char *)row + offset + b, 0, 3);
}

/* Keys k0 .. k0+n-1 of a run. A lone last key is taken more than once. */
TP_INLINE void few_scores_as(const few_rows *t, const key_run *run, int64_t k0, int64_t n, bool bf16)
{
    int64_t head = t->a->head_dim * (bf16 ? 2 : 4), offset = t->kv_first * head, bytes = (t->kv_end - t->kv_first) * head;
    for (int64_t j = 0; j < n; j += FEW_KEYS_AT_ONCE) {
        const void *keys[FEW_KEYS_AT_ONCE];
        for (int64_t k = 0; k < FEW_KEYS_AT_ONCE; k++) {
            int64_t row = run->row + k0 + (j + k < n ? j + k : n - 1);
            keys[k] = (const unsigned char *)row_at(run->k, row) + offset;
            few_prefetch(row_at(run->k, row + FEW_AHEAD), offset, bytes);
            few_prefetch(row_at(run->v, row), offset, bytes);
        }
        for (int64_t kv = t->kv_first; kv < t->kv_end; kv++) {
            few_head_scores(t, (kv - t->kv_first) * t->rows_per_head, keys, bf16, j);
            for (int64_t k = 0; k < FEW_KEYS_AT_ONCE; k++) keys[k] = (const unsigned char *)keys[k] + head;
        }
    }
}

static void few_scores(const few_rows *t, const key_run *run, int64_t k0, int64_t n)
{
    if (is_bf16(run->k))
        few_scores_as(t, run, k0, n, true);
    else
        few_scores_as(t, run, k0, n, false);
}

/* Soft cap, ALiBi and mask. What lies behind the n-th score, up to a whole vector, becomes -infinity. */
static void few_shape_and_mask(few_rows *t, const key_run *run, int64_t k0, int64_t n)
{
    const tp_attention_args *a = t->a;
    bool shaped = a->soft_cap > 0 || a->alibi_slopes != NULL;
    int64_t whole = (n + VL - 1) / VL * VL;
    for (int64_t r = 0; r < t->rows; r++) {
        float *row = t->scores + r * FEW_KEYS;
        few_place at = few_place_of(t, r);
        int64_t diagonal = at.query + t->segment->k_len - t->segment->q_len;
        for (int64_t j = 0; shaped && j < n; j += VL) {
            vf s = v_load(row + j);
            if (a->soft_cap > 0) s = soft_cap(s, a->soft_cap);
            if (a->alibi_slopes != NULL)
                s = v_fma(v_set(a->alibi_slopes[at.head]), v_set((float)(run->position + k0 + j - diagonal)) + v_iota(), s);
            v_store(row + j, s);
        }
        span seen = run->prefix ? (span){0, k0 + n} : keys_seen(a, t->segment, at.query);
        for (int64_t j = 0; j < n && k0 + j < seen.first; j++) row[j] = -INFINITY;
        for (int64_t j = seen.end > k0 ? seen.end - k0 : 0; j < whole; j++) row[j] = -INFINITY;
        for (int64_t j = n; j < whole; j++) row[j] = -INFINITY;
    }
}

static void few_softmax(few_rows *t, int64_t n)
{
    for (int64_t r = 0; r < t->rows; r++) {
        float *s = t->scores + r * FEW_KEYS, old = t->greatest[r], shrink[VL];
        vf most = v_set(old), sum = v_set(0.0f);
        for (int64_t j = 0; j < n; j += VL) most = v_max(most, v_load(s + j));
        float greatest = v_greatest(most), shift = greatest > -3.4e38f ? greatest : -3.4e38f;
        for (int64_t j = 0; j < n; j += VL) {
            vf e = v_exp(v_load(s + j) - v_set(shift));
            sum = sum + e;
            v_store(s + j, e);
        }
        v_store(shrink, v_exp(v_set(old - shift)));
        t->greatest[r] = greatest;
        t->shrink[r] = shrink[0];
        t->sum[r] = t->sum[r] * shrink[0] + v_sum(sum);
    }
}

static void few_shrink(few_rows *t)
{
    for (int64_t r = 0; t->started && r < t->rows; r++) {
        for (int64_t d = 0; d < t->dim && t->shrink[r] != 1.0f; d += VL) {
            float *out = t->out + r * t->dim + d;
            v_store(out, v_load(out) * v_set(t->shrink[r]));
        }
    }
}

/* out [rows][dim], vectors d .. d+nv-1, (+)= scores [rows][n] times a head's values, which lie `stride` bytes apart. Of the
 * last vector `lanes` elements exist. */
TP_INLINE void few_add_values(int rows, int nv, const unsigned char *v, int64_t stride, bool bf16, int64_t n, int64_t lanes,
                              const float *scores, float *out, int64_t dim, bool add)
{
    vf sum[4][4];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
        for (int i = 0; i < nv; i++) sum[r][i] = add ? v_load(out + r * dim + i * VL) : v_set(0.0f);
    }
    for (int64_t j = 0; j < n; j++, v += stride) {
        vf x[4];
#pragma GCC unroll 4
        for (int i = 0; i < nv; i++) x[i] = v_get(v, bf16, i * VL, i + 1 < nv ? VL : lanes);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            vf p = v_set(scores[r * FEW_KEYS + j]);
#pragma GCC unroll 4
            for (int i = 0; i < nv; i++) sum[r][i] = v_fma(p, x[i], sum[r][i]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
        for (int i = 0; i < nv; i++) v_store(out + r * dim + i * VL, sum[r][i]);
    }
}

/* The same for any head_dim: NV_MAX vectors at a time where they are whole. */
TP_INLINE void few_add_head(int rows, const unsigned char *v, int64_t stride, bool bf16, int64_t n, int64_t head_dim,
                            const float *scores, float *out, int64_t dim, bool add)
{
    int64_t size = bf16 ? 2 : 4, d = 0;
    for (; d + NV_MAX * VL <= head_dim; d += NV_MAX * VL)
        few_add_values(rows, NV_MAX, v + d * size, stride, bf16, n, VL, scores, out + d, dim, add);
    for (; d < head_dim; d += VL)
        few_add_values(rows, 1, v + d * size, stride, bf16, n, head_dim - d, scores, out + d, dim, add);
}

TP_INLINE void few_values_as(few_rows *t, const key_run *run, int64_t k0, int64_t n, bool bf16)
{
    int64_t head_dim = t->a->head_dim, size = bf16 ? 2 : 4, stride = run->v.ld * size;
    const unsigned char *v = (const unsigned char *)row_at(run->v, run->row + k0) + t->kv_first * head_dim * size;
    for (int64_t first = 0; first < t->rows; first += t->rows_per_head, v += head_dim * size) {
        for (int64_t r = first; r < first + t->rows_per_head; r += 4) {
            int64_t rows = first + t->rows_per_head - r;
            const float *scores = t->scores + r * FEW_KEYS;
            float *out = t->out + r * t->dim;
            if (rows >= 4)
                few_add_head(4, v, stride, bf16, n, head_dim, scores, out, t->dim, t->started);
            else if (rows == 3)
                few_add_head(3, v, stride, bf16, n, head_dim, scores, out, t->dim, t->started);
            else if (rows == 2)
                few_add_head(2, v, stride, bf16, n, head_dim, scores, out, t->dim, t->started);
            else
                few_add_head(1, v, stride, bf16, n, head_dim, scores, out, t->dim, t->started);
        }
    }
}

static void few_values(few_rows *t, const key_run *run, int64_t k0, int64_t n)
{
    if (is_bf16(run->v))
        few_values_as(t, run, k0, n, true);
    else
        few_values_as(t, run, k0, n, false);
}

/* Keys first .. end-1 of a run. */
static void few_attend(few_rows *t, const key_run *run, int64_t first, int64_t end)
{
    for (int64_t k0 = first; k0 < end; k0 += FEW_KEYS) {
        int64_t n = end - k0 < FEW_KEYS ? end - k0 : FEW_KEYS;
        few_scores(t, run, k0, n);
        few_shape_and_mask(t, run, k0, n);
        few_softmax(t, n);
        few_shrink(t);
        few_values(t, run, k0, n);
        t->started = true;
    }
}

/* ------------------------------------------------------------------------------------------------- parts of segments */

/* Keys that the first and the last query, and so all, see at most. */
TP_INLINE span few_keys(const tp_attention_args *a, const tp_segment *s)
{
    return (span){keys_seen(a, s, 0).first, keys_seen(a, s, s->q_len - 1).end};
}

/* Keys of each part but the last: long segments have longer parts. */
static int64_t few_part_keys(const few_job *job, span keys)
{
    int64_t steps = (keys.end - keys.first + FEW_PARTS * FEW_KEYS - 1) / (FEW_PARTS * FEW_KEYS);
    return job->part_keys > steps * FEW_KEYS ? job->part_keys : steps * FEW_KEYS;
}

/* How many parts a segment has; 0 if it is not for this file. */
static int64_t few_parts(const few_job *job, const tp_segment *s)
{
    if (s->q_len == 0 || !is_few(job->a, s)) return 0;
    span keys = few_keys(job->a, s);
    int64_t part_keys = few_part_keys(job, keys), parts = (keys.end - keys.first + part_keys - 1) / part_keys;
    return parts > 1 ? parts : 1;
}

/* What a part leaves of row r: to be joined, or final if there is no other part. */
static void few_leave(const few_job *job, const few_rows *t, int64_t s, int64_t part, int64_t r)
{
    const tp_attention_args *a = job->a;
    few_place at = few_place_of(t, r);
    const float *out = t->out + r * t->dim;
    if (job->first_part[s + 1] - job->first_part[s] == 1) {
        bool empty = !t->started || t->sum[r] == 0.0f;
        write_row(a, t->segment->q_start + at.query, at.head, empty ? NULL : out, t->greatest[r], t->sum[r]);
        return;
    }
    int64_t state_row = job->first_state[s] + (part * t->segment->q_len + at.query) * a->heads + at.head;
    float *state = job->states + state_row * (t->dim + 2);
    state[0] = t->greatest[r];
    state[1] = t->started ? t->sum[r] : 0.0f;
    if (t->started) memcpy(state + 2, out, (size_t)t->dim * sizeof(float));
}

static void few_start(few_rows *t)
{
    const tp_attention_args *a = t->a;
    t->rows = (t->kv_end - t->kv_first) * t->rows_per_head;
    t->started = false;
    for (int64_t r = 0; r < t->rows; r++) {
        few_place at = few_place_of(t, r);
        copy_tile(t->q + r * t->dim, a->q, t->segment->q_start + at.query, 1, at.head * a->head_dim, a->head_dim, a->scale);
        t->greatest[r] = -INFINITY;
        t->sum[r] = 0.0f;
    }
}

static void few_item(void *arg, int64_t i, int thread)
{
    const few_job *job = arg;
    const tp_attention_args *a = job->a;
    int64_t s = find_range(job->first_part, job->n_segments, i), part = i - job->first_part[s];
    few_rows t = {.a = a, .segment = &job->segments[s], .sharing = a->heads / a->kv_heads, .dim = padded(a->head_dim)};
    float *scratch = tp_cpu_scratch(job->cpu, thread);
    t.rows_per_head = t.segment->q_len * t.sharing;
    t.q = take(&scratch, FEW_HEAD_ROWS * t.dim);
    t.out = take(&scratch, FEW_HEAD_ROWS * t.dim);
    t.scores = take(&scratch, FEW_HEAD_ROWS * FEW_KEYS);

    span keys = few_keys(a, t.segment);
    int64_t part_keys = few_part_keys(job, keys), first = keys.first + part * part_keys;
    int64_t end = keys.end - first < part_keys ? keys.end : first + part_keys;
    int64_t heads = FEW_HEAD_ROWS / t.rows_per_head;
    key_run prefix = prefix_keys(a), own = segment_keys(a, t.segment);
    for (t.kv_first = 0; t.kv_first < a->kv_heads; t.kv_first = t.kv_end) {
        t.kv_end = a->kv_heads - t.kv_first < heads ? a->kv_heads : t.kv_first + heads;
        few_start(&t);
        if (part == 0) few_attend(&t, &prefix, 0, a->n_prefix);
        few_attend(&t, &own, first, end);
        for (int64_t r = 0; r < t.rows; r++) few_leave(job, &t, s, part, r);
    }
}

/* Joins the parts of one row: sums weighted by exp(greatest - greatest of all), in order. */
static void few_join(const few_job *job, int64_t s, int64_t query, int64_t head, float *out)
{
    const tp_attention_args *a = job->a;
    int64_t dim = padded(a->head_dim), parts = job->first_part[s + 1] - job->first_part[s];
    int64_t step = job->segments[s].q_len * a->heads * (dim + 2);
    const float *states = job->states + (job->first_state[s] + query * a->heads + head) * (dim + 2);
    float greatest = -INFINITY, sum = 0.0f, weight[VL];
    for (int64_t p = 0; p < parts; p++) greatest = states[p * step] > greatest ? states[p * step] : greatest;
    memset(out, 0, (size_t)dim * sizeof(float));
    for (int64_t p = 0; p < parts; p++) {
        const float *state = states + p * step;
        if (state[1] == 0.0f) continue; /* saw nothing */
        v_store(weight, v_exp(v_set(state[0] - greatest)));
        sum += weight[0] * state[1];
        for (int64_t d = 0; d < dim; d += VL) v_store(out + d, v_fma(v_set(weight[0]), v_load(state + 2 + d), v_load(out + d)));
    }
    write_row(a, job->segments[s].q_start + query, head, sum == 0.0f ? NULL : out, greatest, sum);
}

static void few_join_item(void *arg, int64_t s, int thread)
{
    const few_job *job = arg;
    if (job->first_part[s + 1] - job->first_part[s] <= 1) return;
    for (int64_t query = 0; query < job->segments[s].q_len; query++) {
        for (int64_t head = 0; head < job->a->heads; head++) few_join(job, s, query, head, tp_cpu_scratch(job->cpu, thread));
    }
}

/* Numbers the parts. False if their states do not fit into the workspace. */
static bool few_number(few_job *job, int64_t room)
{
    const tp_attention_args *a = job->a;
    job->first_part[0] = job->first_state[0] = 0;
    for (int64_t s = 0; s < job->n_segments; s++) {
        int64_t parts = few_parts(job, &job->segments[s]);
        int64_t states = parts > 1 ? parts * job->segments[s].q_len * a->heads : 0;
        job->first_part[s + 1] = job->first_part[s] + parts;
        job->first_state[s + 1] = job->first_state[s] + states;
        if (job->first_state[s + 1] > room) return false;
    }
    return true;
}

/* All segments of few rows among n <= SEGMENTS_AT_ONCE. */
static void attend_few_segments(tp_cpu *cpu, const tp_attention_args *a, const tp_segment *segments, int64_t n)
{
    few_job job = {.a = a, .cpu = cpu, .segments = segments, .n_segments = n, .part_keys = FEW_KEYS};
    job.first_part = (int64_t *)(void *)cpu->workspace;
    job.first_state = job.first_part + SEGMENTS_AT_ONCE + 1;
    job.states = (float *)(void *)(job.first_state + SEGMENTS_AT_ONCE + 1);
    int64_t used = 2 * (SEGMENTS_AT_ONCE + 1) * (int64_t)sizeof(int64_t);
    int64_t room = ((int64_t)TP_CPU_WORKSPACE_BYTES - used) / (int64_t)sizeof(float) / (padded(a->head_dim) + 2);
    while (!few_number(&job, room)) job.part_keys *= 2;
    if (job.first_part[n] == 0) return;
    tp_cpu_for(cpu, job.first_part[n], few_item, &job);
    if (job.first_state[n] > 0) tp_cpu_for(cpu, n, few_join_item, &job);
}
