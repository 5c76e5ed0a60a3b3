/* Attention, forward: softmax(scale q k^T) v without a score matrix (Dao 2023, arXiv:2307.08691).
 *
 * An item is a tile of queries of one segment, times the query heads that share a key head: its rows are (query, head)
 * pairs, so a grouped model reads each key once for the whole group. The item walks over the keys that its rows see, 64 at
 * a time, keeping per row the greatest score so far, the sum of exponentials and the weighted sum of v; all three are
 * rescaled when a greater score turns up.
 *
 * Scores of a tile lie transposed, [key][row]: rows are the vector lanes. So the softmax of 16 rows runs side by side and
 * nothing is summed across lanes. Segments of so few rows that most lanes would be empty go to attention_few.c. */
#include "backend/cpu/simd/attention.h"

typedef struct attention_tile {
    const tp_attention_args *a;
    const tp_segment *segment;
    int64_t query, n_queries; /* of the segment */
    int64_t head, n_heads;    /* query heads; all read kv_head */
    int64_t kv_head;
    int64_t rows;           /* n_queries * n_heads; row r is query r / n_heads, head r % n_heads */
    int64_t vectors;        /* that hold `rows` lanes */
    int64_t dim;            /* padded head_dim */
    bool started;           /* a key tile has been seen */
    float *q;               /* [head_dim][TILE], times scale */
    float *k_room, *v_room; /* [key][dim], if keys and values must be converted */
    tile_rows k, v;
    float *scores;                  /* [key][TILE] */
    float *out;                     /* [row][dim] */
    float *greatest, *sum, *shrink; /* per row: so far, so far, factor of this step */
    float *before, *after;          /* per row: keys j of this tile with after < j < before are seen */
    float *slope, *offset;          /* per row, ALiBi: slope, and position of the tile's key 0 minus the diagonal's */
} attention_tile;

/* Marks what each row sees of keys k0 .. k0+n-1 of its segment. True if every row sees all of them. */
static bool mark_rows(attention_tile *t, const key_run *run, int64_t k0, int64_t n)
{
    const tp_attention_args *a = t->a;
    for (int64_t i = 0; a->alibi_slopes != NULL && i < t->n_queries; i++) {
        int64_t diagonal = t->query + i + t->segment->k_len - t->segment->q_len;
        for (int64_t r = i * t->n_heads; r < (i + 1) * t->n_heads; r++) t->offset[r] = (float)(run->position + k0 - diagonal);
    }
    if (run->prefix) return true;
    span first = keys_seen(a, t->segment, t->query);
    span last = keys_seen(a, t->segment, t->query + t->n_queries - 1);
    if (last.first <= k0 && first.end >= k0 + n) return true;
    for (int64_t i = 0; i < t->n_queries; i++) {
        span seen = keys_seen(a, t->segment, t->query + i);
        int64_t after = seen.first - k0 - 1, before = seen.end - k0;
        after = after < -1 ? -1 : after < n ? after : n;
        before = before < 0 ? 0 : before < n ? before : n;
        for (int64_t r = i * t->n_heads; r < (i + 1) * t->n_heads; r++) {
            t->after[r] = (float)after;
            t->before[r] = (float)before;
        }
    }
    return false;
}

/* scores [n][TILE] = k q; where rows at the start of the tile see no key from j on, their vectors are left out. */
static void lane_scores(attention_tile *t, int64_t n, bool all_seen)
{
    int64_t step = all_seen ? n : 2 * MR;
    for (int64_t j = 0; j < n; j += step) {
        int64_t keys = n - j < step ? n - j : step, row = 0;
        while (!all_seen && row < t->rows && t->before[row] <= (float)j) row++;
        int64_t skip = row / VL;
        if (skip == t->vectors) continue;
        product(keys, t->vectors - skip, t->a->head_dim, t->k.data + j * t->k.ld, t->k.ld, t->q + skip * VL, TILE,
                t->scores + j * TILE + skip * VL, TILE, false);
    }
}

static void lane_shape(attention_tile *t, int64_t n)
{
    float cap = t->a->soft_cap;
    for (int64_t j = 0; j < n; j++) {
        float *row = t->scores + j * TILE;
        for (int64_t v = 0; v < t->vectors * VL; v += VL) {
            vf s = v_load(row + v);
            if (cap > 0) s = soft_cap(s, cap);
            if (t->a->alibi_slopes != NULL) s = v_fma(v_load(t->slope + v), v_load(t->offset + v) + v_set((float)j), s);
            v_store(row + v, s);
        }
    }
}

static void lane_mask(attention_tile *t, int64_t n)
{
    for (int64_t v = 0; v < t->vectors * VL; v += VL) {
        vf before = v_load(t->before + v), after = v_load(t->after + v);
        for (int64_t j = 0; j < n; j++) {
            vf at = v_set((float)j);
            vm seen = v_and(v_lt(at, before), v_lt(after, at));
            v_store(t->scores + j * TILE + v, v_pick(seen, v_load(t->scores + j * TILE + v), v_set(-INFINITY)));
        }
    }
}

/* Scores become exponentials. A row that has seen nothing keeps -infinity; -FLT_MAX stands for it in the difference. */
static void lane_softmax(attention_tile *t, int64_t n)
{
    for (int64_t v = 0; v < t->vectors * VL; v += VL) {
        float *s = t->scores + v;
        vf old = v_load(t->greatest + v), even = old, odd = old;
        int64_t j = 0;
        for (; j + 2 <= n; j += 2) {
            even = v_max(even, v_load(s + j * TILE));
            odd = v_max(odd, v_load(s + j * TILE + TILE));
        }
        if (j < n) even = v_max(even, v_load(s + j * TILE));
        vf greatest = v_max(even, odd), shift = v_max(v_set(-3.4e38f), greatest);
        vf shrink = v_exp(old - shift), sum = v_load(t->sum + v) * shrink;
        for (j = 0; j < n; j++) {
            vf e = v_exp(v_load(s + j * TILE) - shift);
            sum = sum + e;
            v_store(s + j * TILE, e);
        }
        v_store(t->greatest + v, greatest);
        v_store(t->shrink + v, shrink);
        v_store(t->sum + v, sum);
    }
}

/* out (+)= scores^T v, for each block of rows over the keys that it sees. */
static void lane_values(attention_tile *t, int64_t n, bool all_seen)
{
    int64_t step = all_seen ? t->rows : MR;
    for (int64_t r = 0; r < t->rows; r += step) {
        int64_t rows = t->rows - r < step ? t->rows - r : step, first = 0, end = n;
        if (!all_seen) {
            first = (int64_t)t->after[r] + 1;
            end = (int64_t)t->before[r + rows - 1];
            if (first > end) first = end;
        }
        product_tn(rows, t->dim / VL, end - first, t->scores + first * TILE + r, TILE, t->v.data + first * t->v.ld, t->v.ld,
                   t->out + r * t->dim, t->dim, t->started);
    }
}

/* Weights what is summed so far by the factor of this step, where that is not 1. */
static void shrink_out(attention_tile *t)
{
    for (int64_t r = 0; t->started && r < t->rows; r++) {
        if (t->shrink[r] == 1.0f) continue;
        for (int64_t d = 0; d < t->dim; d += VL) {
            float *out = t->out + r * t->dim + d;
            v_store(out, v_load(out) * v_set(t->shrink[r]));
        }
    }
}

static void attend_keys(attention_tile *t, const key_run *run, int64_t k0, int64_t n)
{
    const tp_attention_args *a = t->a;
    bool all_seen = mark_rows(t, run, k0, n);
    int64_t column = t->kv_head * a->head_dim;
    t->k = tile_of(t->k_room, run->k, run->row + k0, n, column, a->head_dim);
    t->v = tile_of(t->v_room, run->v, run->row + k0, n, column, a->head_dim);
    lane_scores(t, n, all_seen);
    if (a->soft_cap > 0 || a->alibi_slopes != NULL) lane_shape(t, n);
    if (!all_seen) lane_mask(t, n);
    lane_softmax(t, n);
    shrink_out(t);
    lane_values(t, n, all_seen);
    t->started = true;
}

/* Keys first .. end-1 of a run, a tile at a time. */
static void attend_run(attention_tile *t, const key_run *run, int64_t first, int64_t end)
{
    for (int64_t k0 = first; k0 < end; k0 += TILE) attend_keys(t, run, k0, end - k0 < TILE ? end - k0 : TILE);
}

static void begin_tile(attention_tile *t, float *scratch)
{
    const tp_attention_args *a = t->a;
    t->rows = t->n_queries * t->n_heads;
    t->vectors = (t->rows + VL - 1) / VL;
    t->dim = padded(a->head_dim);
    t->started = false;
    t->q = take(&scratch, TILE * t->dim);
    t->k_room = take(&scratch, TILE * t->dim);
    t->v_room = take(&scratch, TILE * t->dim);
    t->out = take(&scratch, TILE * t->dim);
    t->scores = take(&scratch, TILE * TILE);
    float **arrays[] = {&t->greatest, &t->sum, &t->shrink, &t->before, &t->after, &t->slope, &t->offset};
    for (size_t i = 0; i < sizeof arrays / sizeof arrays[0]; i++) {
        *arrays[i] = take(&scratch, TILE);
        memset(*arrays[i], 0, TILE * sizeof(float)); /* lanes without a row must not hold NaN */
    }
    float *rows = t->k_room; /* free until the first keys come */
    for (int64_t i = 0; i < t->n_queries; i++) {
        for (int64_t h = 0; h < t->n_heads; h++) {
            int64_t r = i * t->n_heads + h, head = t->head + h;
            t->greatest[r] = -INFINITY;
            if (a->alibi_slopes != NULL) t->slope[r] = a->alibi_slopes[head];
            copy_tile(rows + r * t->dim, a->q, t->segment->q_start + t->query + i, 1, head * a->head_dim, a->head_dim,
                      a->scale);
        }
    }
    memset(t->q, 0, (size_t)(TILE * a->head_dim) * sizeof(float));
    transpose_tile(t->q, rows, t->rows, a->head_dim);
}

static void end_tile(const attention_tile *t)
{
    for (int64_t i = 0; i < t->n_queries; i++) {
        for (int64_t h = 0; h < t->n_heads; h++) {
            int64_t r = i * t->n_heads + h;
            bool empty = !t->started || t->sum[r] == 0.0f;
            write_row(t->a, t->segment->q_start + t->query + i, t->head + h, empty ? NULL : t->out + r * t->dim, t->greatest[r],
                      t->sum[r]);
        }
    }
}

typedef struct attention_job {
    const tp_attention_args *a;
    tp_cpu *cpu;
    const tp_segment *segments;
    int64_t n_segments;
    int64_t *first_tile;        /* [n_segments + 1] */
    int64_t group, group_parts; /* query heads per item, items per group of heads that share a key head */
    int64_t queries;            /* per item */
} attention_job;

static void attention_item(void *arg, int64_t i, int thread)
{
    const attention_job *job = arg;
    const tp_attention_args *a = job->a;
    int64_t units = a->kv_heads * job->group_parts, unit = i % units, sharing = a->heads / a->kv_heads;
    int64_t tile = job->first_tile[job->n_segments] - 1 - i / units; /* the last ones see most keys: first */
    int64_t s = find_range(job->first_tile, job->n_segments, tile), part = unit % job->group_parts;
    attention_tile t = {.a = a, .segment = &job->segments[s], .kv_head = unit / job->group_parts};
    t.query = (tile - job->first_tile[s]) * job->queries;
    t.n_queries = t.segment->q_len - t.query < job->queries ? t.segment->q_len - t.query : job->queries;
    t.head = t.kv_head * sharing + part * job->group;
    t.n_heads = sharing - part * job->group < job->group ? sharing - part * job->group : job->group;
    begin_tile(&t, tp_cpu_scratch(job->cpu, thread));

    key_run prefix = prefix_keys(a), own = segment_keys(a, t.segment);
    attend_run(&t, &prefix, 0, a->n_prefix);
    attend_run(&t, &own, keys_seen(a, t.segment, t.query).first, keys_seen(a, t.segment, t.query + t.n_queries - 1).end);
    end_tile(&t);
}

/* Rows first .. end-1 of out belong to no segment. */
static void clear_rows(const tp_attention_args *a, int64_t first, int64_t end)
{
    for (int64_t r = first; r < end; r++) {
        memset(row_at(a->out, r), 0, (size_t)(a->heads * a->head_dim) * (is_bf16(a->out) ? 2 : 4));
        for (int64_t h = 0; a->lse != NULL && h < a->heads; h++) a->lse[r * a->heads + h] = -INFINITY;
    }
}

/* The segments of many rows among n, whose item numbers fit into the workspace. */
static void attend_segments(attention_job *job, const tp_segment *segments, int64_t n)
{
    const tp_attention_args *a = job->a;
    job->segments = segments;
    job->n_segments = n;
    job->first_tile[0] = 0;
    for (int64_t s = 0; s < n; s++) {
        int64_t tiles = is_few(a, &segments[s]) ? 0 : (segments[s].q_len + job->queries - 1) / job->queries;
        job->first_tile[s + 1] = job->first_tile[s] + tiles;
    }
    tp_cpu_for(job->cpu, job->first_tile[n] * a->kv_heads * job->group_parts, attention_item, job);
}

static tp_status attention(tp_ctx *ctx, const void *args)
{
    const tp_attention_args *a = args;
    TP_TRY(check_attention(ctx, "attention", a));
    int64_t sharing = a->heads / a->kv_heads, done = 0;
    attention_job job = {.a = a, .cpu = tp_cpu_of(ctx)};
    job.first_tile = (int64_t *)(void *)job.cpu->workspace;
    job.group_parts = (sharing + TILE - 1) / TILE;
    job.group = (sharing + job.group_parts - 1) / job.group_parts;
    job.queries = TILE / job.group;
    for (int64_t s0 = 0; s0 < a->n_segments; s0 += SEGMENTS_AT_ONCE) {
        int64_t n = a->n_segments - s0 < SEGMENTS_AT_ONCE ? a->n_segments - s0 : SEGMENTS_AT_ONCE;
        attend_segments(&job, a->segments + s0, n);
        attend_few_segments(job.cpu, a, a->segments + s0, n);
    }
    for (int64_t s = 0; s < a->n_segments; s++) {
        clear_rows(a, done, a->segments[s].q_start);
        done = a->segments[s].q_start + a->segments[s].q_len;
    }
    clear_rows(a, done, a->n_q);
    return TP_OK;
}
