/* Attention of a handful of queries, as in decoding: one token against a long cache. The work is to read keys and values
 * once, at the speed of memory.
 *
 * An item is a part of a segment's keys, for all heads, so that items read whole rows. Query heads that share a key head
 * read it together. Scores are dot products, [row][key], since rows would not fill the lanes of a vector. Parts are joined
 * in order, each weighted by the exponential of its greatest score. */
#include "backend/cpu/simd/attention.h"

#define FEW_ROWS  8   /* (query, head) pairs that read one key head */
#define FEW_KEYS  256 /* of a part, at least; and of a step */
#define FEW_AHEAD 8   /* keys to prefetch */

/* Whether a segment is for this file: too few rows to be lanes. */
TP_INLINE bool is_few(const tp_attention_args *a, const tp_segment *s)
{
    return s->q_len * (a->heads / a->kv_heads) <= FEW_ROWS;
}

typedef struct few_job {
    const tp_attention_args *a;
    tp_cpu *cpu;
    const tp_segment *segments;
    int64_t n_segments, part_keys;
    int64_t *first_part;  /* [n_segments + 1] */
    int64_t *first_state; /* [n_segments + 1] of segments with several parts: [part][query][head] */
    float *states;        /* greatest score, sum of exponentials, sums of v [dim] */
} few_job;

typedef struct few_rows {
    const tp_attention_args *a;
    const tp_segment *segment;
    int64_t kv_head, sharing, rows; /* row r is query r / sharing, head kv_head * sharing + r % sharing */
    int64_t dim;                    /* padded head_dim */
    bool started;
    float *q, *out; /* [row][dim]; q times scale */
    float *scores;  /* [row][FEW_KEYS] */
    float *v_room;  /* [TILE][dim], for values that must be converted */
    float greatest[FEW_ROWS], sum[FEW_ROWS], shrink[FEW_ROWS];
} few_rows;

/* ------------------------------------------------------------------------------------------------- one step of keys */

/* Scores of `rows` rows against two keys. */
TP_INLINE void few_dots(few_rows *t, const void *key, const void *next, bool bf16, int64_t first, int rows, int64_t j)
{
    int64_t head_dim = t->a->head_dim, d = 0;
    const float *q = t->q + first * t->dim;
    vf sum[4], other[4];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) sum[r] = other[r] = v_set(0.0f);
    for (; d + VL <= head_dim; d += VL) {
        vf x = v_get(key, bf16, d, VL), y = v_get(next, bf16, d, VL);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            vf z = v_load(q + r * t->dim + d);
            sum[r] = v_fma(x, z, sum[r]);
            other[r] = v_fma(y, z, other[r]);
        }
    }
    if (d < head_dim) {
        vf x = v_get(key, bf16, d, head_dim - d), y = v_get(next, bf16, d, head_dim - d);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            vf z = v_load(q + r * t->dim + d);
            sum[r] = v_fma(x, z, sum[r]);
            other[r] = v_fma(y, z, other[r]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        t->scores[(first + r) * FEW_KEYS + j] = v_sum(sum[r]);
        t->scores[(first + r) * FEW_KEYS + j + 1] = v_sum(other[r]);
    }
}

TP_INLINE void few_prefetch(const void *row, int64_t offset, int64_t bytes)
{
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch((const unsigned char *)row + offset + b, 0, 2);
}

/* While one head is worked on, key and value of the next one come from memory: heads lie apart, and no hardware follows
 * that. The first head fetches its own too, keys a little ahead. */
TP_INLINE void few_fetch(const few_rows *t, const key_run *run, int64_t row, int64_t bytes)
{
    int64_t head = t->a->head_dim * bytes, offset = t->kv_head * head;
    if (t->kv_head == 0) {
        few_prefetch(row_at(run->k, row + FEW_AHEAD), 0, head);
        few_prefetch(row_at(run->v, row), 0, head);
    }
    if (t->kv_head + 1 < t->a->kv_heads) {
        few_prefetch(row_at(run->k, row), offset + head, head);
        few_prefetch(row_at(run->v, row), offset + head, head);
    }
}

TP_INLINE void few_scores_as(few_rows *t, const key_run *run, int64_t k0, int64_t n, bool bf16)
{
    int64_t bytes = bf16 ? 2 : 4, offset = t->kv_head * t->a->head_dim * bytes;
    for (int64_t j = 0; j < n; j += 2) {
        int64_t row = run->row + k0 + j, second = j + 1 < n ? row + 1 : row; /* a lone last key is taken twice */
        const void *key = (const unsigned char *)row_at(run->k, row) + offset;
        const void *next = (const unsigned char *)row_at(run->k, second) + offset;
        few_fetch(t, run, row, bytes);
        few_fetch(t, run, second, bytes);
        for (int64_t r = 0; r < t->rows; r += 4) {
            int64_t rows = t->rows - r;
            if (rows >= 4)
                few_dots(t, key, next, bf16, r, 4, j);
            else if (rows == 3)
                few_dots(t, key, next, bf16, r, 3, j);
            else if (rows == 2)
                few_dots(t, key, next, bf16, r, 2, j);
            else
                few_dots(t, key, next, bf16, r, 1, j);
        }
    }
}

static void few_scores(few_rows *t, const key_run *run, int64_t k0, int64_t n)
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
        int64_t query = r / t->sharing, diagonal = query + t->segment->k_len - t->segment->q_len;
        int64_t head = t->kv_head * t->sharing + r % t->sharing;
        for (int64_t j = 0; shaped && j < n; j += VL) {
            vf s = v_load(row + j);
            if (a->soft_cap > 0) s = soft_cap(s, a->soft_cap);
            if (a->alibi_slopes != NULL)
                s = v_fma(v_set(a->alibi_slopes[head]), v_set((float)(run->position + k0 + j - diagonal)) + v_iota(), s);
            v_store(row + j, s);
        }
        span seen = run->prefix ? (span){0, k0 + n} : keys_seen(a, t->segment, query);
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

static void few_values(few_rows *t, const key_run *run, int64_t k0, int64_t n)
{
    int64_t head_dim = t->a->head_dim, column = t->kv_head * head_dim;
    int64_t step = !is_bf16(run->v) && t->dim == head_dim ? n : TILE; /* n: read where they lie */
    for (int64_t j = 0; j < n; j += step) {
        int64_t keys = n - j < step ? n - j : step;
        tile_rows v = tile_of(t->v_room, run->v, run->row + k0 + j, keys, column, head_dim);
        product(t->rows, t->dim / VL, keys, t->scores + j, FEW_KEYS, v.data, v.ld, t->out, t->dim, t->started || j > 0);
    }
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

/* How many parts of part_keys keys a segment has; 0 if it is not for this file. */
static int64_t few_parts(const tp_attention_args *a, const tp_segment *s, int64_t part_keys)
{
    if (s->q_len == 0 || !is_few(a, s)) return 0;
    span keys = few_keys(a, s);
    int64_t parts = (keys.end - keys.first + part_keys - 1) / part_keys;
    return parts > 1 ? parts : 1;
}

/* What a part leaves of row r: to be joined, or final if there is no other part. */
static void few_leave(const few_job *job, const few_rows *t, int64_t s, int64_t part, int64_t r)
{
    const tp_attention_args *a = job->a;
    int64_t query = r / t->sharing, head = t->kv_head * t->sharing + r % t->sharing;
    const float *out = t->out + r * t->dim;
    if (job->first_part[s + 1] - job->first_part[s] == 1) {
        bool empty = !t->started || t->sum[r] == 0.0f;
        write_row(a, t->segment->q_start + query, head, empty ? NULL : out, t->greatest[r], t->sum[r]);
        return;
    }
    float *state = job->states + (job->first_state[s] + (part * t->segment->q_len + query) * a->heads + head) * (t->dim + 2);
    state[0] = t->greatest[r];
    state[1] = t->started ? t->sum[r] : 0.0f;
    if (t->started) memcpy(state + 2, out, (size_t)t->dim * sizeof(float));
}

static void few_item(void *arg, int64_t i, int thread)
{
    const few_job *job = arg;
    const tp_attention_args *a = job->a;
    int64_t s = find_range(job->first_part, job->n_segments, i), part = i - job->first_part[s];
    few_rows t = {.a = a, .segment = &job->segments[s], .sharing = a->heads / a->kv_heads, .dim = padded(a->head_dim)};
    float *scratch = tp_cpu_scratch(job->cpu, thread);
    t.rows = t.segment->q_len * t.sharing;
    t.q = take(&scratch, FEW_ROWS * t.dim);
    t.out = take(&scratch, FEW_ROWS * t.dim);
    t.scores = take(&scratch, FEW_ROWS * FEW_KEYS);
    t.v_room = take(&scratch, TILE * t.dim);

    span keys = few_keys(a, t.segment);
    int64_t first = keys.first + part * job->part_keys;
    int64_t end = keys.end - first < job->part_keys ? keys.end : first + job->part_keys;
    key_run prefix = prefix_keys(a), own = segment_keys(a, t.segment);
    for (t.kv_head = 0; t.kv_head < a->kv_heads; t.kv_head++) {
        t.started = false;
        for (int64_t r = 0; r < t.rows; r++) {
            int64_t row = t.segment->q_start + r / t.sharing, head = t.kv_head * t.sharing + r % t.sharing;
            copy_tile(t.q + r * t.dim, a->q, row, 1, head * a->head_dim, a->head_dim, a->scale);
            t.greatest[r] = -INFINITY;
            t.sum[r] = 0.0f;
        }
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
        int64_t parts = few_parts(a, &job->segments[s], job->part_keys);
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
