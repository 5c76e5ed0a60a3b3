/* Gradient of attention. With S the scores, P = exp(S - lse) and D = rowsum(dO * O), per head:
 *
 *   dV = P^T dO     dP = dO V^T     dS = P * (dP - D)     dQ = scale dS K     dK = scale dS^T Q
 *
 * An item owns 64 keys of one key head: it walks over the query tiles that see them and over the heads of the group, and
 * alone sums dK and dV. dQ of a query tile is a sum over key tiles, which different items bring. They add in the order of
 * the keys: a counter per query tile says whose turn it is. Each product is then done once, nothing is added atomically,
 * and the bits do not depend on the number of threads.
 *
 * Waiting for a turn cannot end in a deadlock: items are claimed in ascending order, keys ascend with items, so whoever
 * waits, waits for an item that some thread has begun. Nor is the wait long: the counter is asked for only after the
 * products are done, and earlier key tiles started earlier.
 *
 * A bf16 dQ is summed in f32 aside, in the workspace, and rounded once when its last key tile has been added. */
#include <sched.h>
#include <stdatomic.h>

#include "backend/cpu/simd/attention.h"
#include "base/mem.h"

#define ROUND_SEGMENTS 4096
#define ROUND_COUNTERS (1 << 20)

/* The device's workspace while this kernel runs. */
typedef struct backward_workspace {
    int64_t first_keys[ROUND_SEGMENTS + 1];    /* key tiles before each segment's */
    int64_t first_queries[ROUND_SEGMENTS + 1]; /* query tiles */
    atomic_int turn[ROUND_COUNTERS];           /* [query tile][key head of the round]: key tiles added to dq so far */
    float sums[];                              /* of dq, where it is bf16 */
} backward_workspace;

#define WORKSPACE_SUMS ((int64_t)((TP_CPU_WORKSPACE_BYTES - sizeof(backward_workspace)) / sizeof(float)))

/* Segments and key heads that are worked on together: as many as the workspace can hold counters and sums for. */
typedef struct backward_round {
    const tp_attention_backward_args *b;
    tp_cpu *cpu;
    const tp_segment *segments;
    int64_t n_segments;
    int64_t kv_head, n_kv_heads;
    int64_t prefix_tiles;
    backward_workspace *workspace;
    float *dq; /* sums of dq: itself if f32, else aside; of rows from dq_row on, columns from dq_column on */
    int64_t dq_ld, dq_row, dq_column;
} backward_round;

typedef struct backward_tile {
    const backward_round *round;
    const tp_attention_args *a;
    const tp_segment *segment;
    key_run run;
    int64_t kv_head, sharing; /* sharing: query heads of one key head */
    int64_t key, n_keys;      /* of the run */
    int64_t query, n_queries; /* of the segment */
    int64_t dim;              /* padded head_dim */
    bool all_seen;
    float *kt, *vt;            /* [head_dim][TILE], kt times scale */
    float *ks;                 /* [TILE][dim] times scale */
    float *dk, *dv;            /* [TILE][dim] */
    float *q_room, *dout_room; /* [TILE][dim], if q and dout must be converted */
    tile_rows q, dout;
    float *dq;     /* [TILE][dim] */
    float *p, *ds; /* [TILE queries][TILE keys] */
} backward_tile;

/* Key tiles first .. end-1 of a segment that some query of a tile sees. */
static span key_tiles(const tp_attention_args *a, const tp_segment *s, int64_t query, int64_t n)
{
    int64_t first = keys_seen(a, s, query).first, end = keys_seen(a, s, query + n - 1).end;
    if (first >= end) return (span){0, 0};
    return (span){first / TILE, (end - 1) / TILE + 1};
}

/* What query i sees of the tile's keys. */
TP_INLINE span tile_keys_seen(const backward_tile *t, int64_t i)
{
    if (t->all_seen) return (span){0, t->n_keys};
    span keys = keys_seen(t->a, t->segment, i);
    keys.first = keys.first < t->key ? 0 : keys.first - t->key;
    keys.end = keys.end < t->key ? 0 : keys.end - t->key;
    if (keys.end > t->n_keys) keys.end = t->n_keys;
    if (keys.first > keys.end) keys.first = keys.end;
    return keys;
}

/* p = q k^T and ds = dout v^T, 16 queries at a time up to the last key that they see. */
static void backward_products(backward_tile *t)
{
    int64_t step = t->all_seen ? t->n_queries : 16;
    for (int64_t r = 0; r < t->n_queries; r += step) {
        int64_t rows = t->n_queries - r < step ? t->n_queries - r : step;
        int64_t vectors = (tile_keys_seen(t, t->query + r + rows - 1).end + VL - 1) / VL;
        product(rows, vectors, t->a->head_dim, t->q.data + r * t->q.ld, t->q.ld, t->kt, TILE, t->p + r * TILE, TILE, false);
        product(rows, vectors, t->a->head_dim, t->dout.data + r * t->dout.ld, t->dout.ld, t->vt, TILE, t->ds + r * TILE, TILE,
                false);
    }
}

/* One row: scores and dP become P and dS; what the query does not see becomes 0. */
TP_INLINE void backward_row(backward_tile *t, int64_t r, int64_t head, bool shaped, bool masked)
{
    const tp_attention_args *a = t->a;
    int64_t query = t->query + r, index = (t->segment->q_start + query) * a->heads + head;
    span seen = tile_keys_seen(t, query);
    float lse = a->lse[index], cap = shaped ? a->soft_cap : 0.0f;
    vf shift = v_set(lse > -INFINITY ? lse : INFINITY), delta = v_set(t->round->b->delta[index]);
    vf slope = v_set(0.0f), offset = v_set(0.0f), first = v_set((float)seen.first - 1), end = v_set((float)seen.end);
    if (shaped && a->alibi_slopes != NULL) {
        slope = v_set(a->alibi_slopes[head]);
        offset = v_set((float)(t->run.position + t->key - (query + t->segment->k_len - t->segment->q_len)));
    }
    for (int64_t j = 0; j < t->n_keys; j += VL) {
        float *p = t->p + r * TILE + j, *ds = t->ds + r * TILE + j;
        if (masked && j >= seen.end) {
            v_store(p, v_set(0.0f));
            v_store(ds, v_set(0.0f));
            continue;
        }
        vf s = v_load(p), slack = v_set(1.0f), at = v_set((float)j) + v_iota();
        if (cap > 0) {
            s = soft_cap(s, cap);
            slack = slack - (s / v_set(cap)) * (s / v_set(cap)); /* derivative of cap * tanh(s / cap) */
        }
        if (shaped) s = v_fma(slope, offset + at, s);
        vf e = v_exp(s - shift), d = e * (v_load(ds) - delta);
        if (cap > 0) d = d * slack;
        if (masked) {
            vm in = v_and(v_lt(at, end), v_lt(first, at));
            e = v_pick(in, e, v_set(0.0f));
            d = v_pick(in, d, v_set(0.0f));
        }
        v_store(p, e);
        v_store(ds, d);
    }
}

/* Where query r's dq of this head is summed. */
TP_INLINE float *dq_sum(const backward_tile *t, int64_t r, int64_t head)
{
    const backward_round *round = t->round;
    int64_t row = t->segment->q_start + t->query + r - round->dq_row;
    return round->dq + row * round->dq_ld + head * t->a->head_dim - round->dq_column;
}

static void backward_rows(backward_tile *t, int64_t head)
{
    bool shaped = t->a->soft_cap > 0 || t->a->alibi_slopes != NULL;
    for (int64_t r = 0; r < t->n_queries; r++) {
        const float *sum = dq_sum(t, r, head); /* needed soon: its way from memory costs nothing here */
        for (int64_t d = 0; d < t->a->head_dim; d += 16) __builtin_prefetch(sum + d, 1, 2);
        if (shaped)
            backward_row(t, r, head, true, true);
        else if (t->all_seen)
            backward_row(t, r, head, false, false);
        else
            backward_row(t, r, head, false, true);
    }
}

/* dv += p^T dout, dk += ds^T q: blocks of keys, from the first query that sees one of them. */
static void backward_key_sums(backward_tile *t)
{
    int64_t step = t->all_seen ? t->n_keys : 2 * MR, first = 0;
    for (int64_t j = 0; j < t->n_keys; j += step) {
        int64_t keys = t->n_keys - j < step ? t->n_keys - j : step;
        while (first < t->n_queries && tile_keys_seen(t, t->query + first).end <= j) first++;
        int64_t queries = t->n_queries - first, at = first * TILE + j;
        if (queries == 0) return;
        product_tn(keys, t->dim / VL, queries, t->p + at, TILE, t->dout.data + first * t->dout.ld, t->dout.ld,
                   t->dv + j * t->dim, t->dim, true);
        product_tn(keys, t->dim / VL, queries, t->ds + at, TILE, t->q.data + first * t->q.ld, t->q.ld, t->dk + j * t->dim,
                   t->dim, true);
    }
}

/* dq = scale * ds k of this tile alone. */
static void backward_query_part(backward_tile *t)
{
    int64_t step = t->all_seen ? t->n_queries : 2 * MR;
    for (int64_t r = 0; r < t->n_queries; r += step) {
        int64_t rows = t->n_queries - r < step ? t->n_queries - r : step;
        int64_t keys = tile_keys_seen(t, t->query + r + rows - 1).end;
        product(rows, t->dim / VL, keys, t->ds + r * TILE, TILE, t->ks, t->dim, t->dq + r * t->dim, t->dim, false);
    }
}

static void wait_for(atomic_int *turn, int mine)
{
    for (int tries = 0; atomic_load_explicit(turn, memory_order_acquire) != mine; tries++) {
        if (tries > 200) sched_yield();
    }
}

/* Adds this tile's part of dq to the sum (or begins it), and writes the sum out if that was the last part. */
static void add_query_part(const backward_tile *t, int64_t head, bool begins, bool ends)
{
    tp_rows out = t->round->b->dq;
    int64_t dim = t->a->head_dim;
    for (int64_t r = 0; r < t->n_queries; r++) {
        int64_t row = t->segment->q_start + t->query + r;
        float *sum = dq_sum(t, r, head);
        for (int64_t d = 0; d < dim; d += VL) {
            vf x = v_load(t->dq + r * t->dim + d);
            if (!begins) x = v_load_n(sum + d, dim - d) + x;
            if (ends && is_bf16(out))
                v_store_bf16((uint16_t *)row_at(out, row) + head * dim + d, dim - d, x);
            else
                v_store_n(sum + d, dim - d, x);
        }
    }
}

/* The query tile q0.. of a segment, all heads of the group. `number` counts the key tiles that come before this one. */
static void backward_queries(backward_tile *t, atomic_int *turn, int number, bool ends)
{
    const tp_attention_args *a = t->a;
    int64_t row = t->segment->q_start + t->query;
    t->all_seen = true;
    if (!t->run.prefix) {
        span first = keys_seen(a, t->segment, t->query), last = keys_seen(a, t->segment, t->query + t->n_queries - 1);
        t->all_seen = last.first <= t->key && first.end >= t->key + t->n_keys;
    }
    for (int64_t g = 0; g < t->sharing; g++) {
        int64_t head = t->kv_head * t->sharing + g;
        t->q = tile_of(t->q_room, a->q, row, t->n_queries, head * a->head_dim, a->head_dim);
        t->dout = tile_of(t->dout_room, t->round->b->dout, row, t->n_queries, head * a->head_dim, a->head_dim);
        backward_products(t);
        backward_rows(t, head);
        backward_key_sums(t);
        backward_query_part(t);
        wait_for(turn, number);
        add_query_part(t, head, number == 0, ends);
    }
    atomic_store_explicit(turn, number + 1, memory_order_release);
}

/* All queries of one segment that see the tile. */
static void backward_segment(backward_tile *t, int64_t s)
{
    const backward_round *round = t->round;
    t->segment = &round->segments[s];
    for (int64_t q0 = 0; q0 < t->segment->q_len; q0 += TILE) {
        t->query = q0;
        t->n_queries = t->segment->q_len - q0 < TILE ? t->segment->q_len - q0 : TILE;
        span tiles = key_tiles(t->a, t->segment, q0, t->n_queries);
        int64_t number = t->key / TILE, last = round->prefix_tiles + (tiles.end - tiles.first) - 1;
        if (!t->run.prefix) {
            if (number < tiles.first || number >= tiles.end) continue;
            number = round->prefix_tiles + number - tiles.first;
        }
        int64_t counter = (round->workspace->first_queries[s] + q0 / TILE) * round->n_kv_heads + t->kv_head - round->kv_head;
        backward_queries(t, &round->workspace->turn[counter], (int)number, number == last);
    }
}

/* Adds the tile's sums to rows of dk or dv, which started as zeros. */
static void add_key_sums(const backward_tile *t, tp_rows out, const float *sums, float factor)
{
    int64_t dim = t->a->head_dim;
    for (int64_t j = 0; j < t->n_keys; j++) {
        unsigned char *to = (unsigned char *)row_at(out, t->run.row + t->key + j) + t->kv_head * dim * (is_bf16(out) ? 2 : 4);
        for (int64_t d = 0; d < dim; d += VL) {
            vf x = v_load(sums + j * t->dim + d) * v_set(factor);
            v_put(to, is_bf16(out), d, dim - d, v_get(to, is_bf16(out), d, dim - d) + x);
        }
    }
}

static void begin_keys(backward_tile *t, float *scratch)
{
    const tp_attention_args *a = t->a;
    int64_t column = t->kv_head * a->head_dim, tile = TILE * t->dim;
    float **tiles[] = {&t->kt, &t->vt, &t->ks, &t->dk, &t->dv, &t->q_room, &t->dout_room, &t->dq};
    for (size_t i = 0; i < sizeof tiles / sizeof tiles[0]; i++) *tiles[i] = take(&scratch, tile);
    t->p = take(&scratch, TILE * TILE);
    t->ds = take(&scratch, TILE * TILE);
    memset(t->kt, 0, (size_t)tile * sizeof(float)); /* columns behind the last key are multiplied too */
    memset(t->vt, 0, (size_t)tile * sizeof(float));
    memset(t->dk, 0, (size_t)tile * sizeof(float));
    memset(t->dv, 0, (size_t)tile * sizeof(float));
    copy_tile(t->q_room, t->run.v, t->run.row + t->key, t->n_keys, column, a->head_dim, 1.0f); /* not yet in use */
    transpose_tile(t->vt, t->q_room, t->n_keys, a->head_dim);
    copy_tile(t->ks, t->run.k, t->run.row + t->key, t->n_keys, column, a->head_dim, a->scale);
    transpose_tile(t->kt, t->ks, t->n_keys, a->head_dim);
}

static void backward_item(void *arg, int64_t i, int thread)
{
    const backward_round *round = arg;
    const tp_attention_args *a = &round->b->forward;
    int64_t tile = i / round->n_kv_heads;
    backward_tile t = {.round = round, .a = a, .kv_head = round->kv_head + i % round->n_kv_heads};
    t.sharing = a->heads / a->kv_heads;
    t.dim = padded(a->head_dim);
    float *scratch = tp_cpu_scratch(round->cpu, thread);
    if (tile < round->prefix_tiles) {
        t.run = prefix_keys(a);
        t.key = tile * TILE;
        t.n_keys = a->n_prefix - t.key < TILE ? a->n_prefix - t.key : TILE;
        begin_keys(&t, scratch);
        for (int64_t s = 0; s < round->n_segments; s++) backward_segment(&t, s);
        return;
    }
    tile -= round->prefix_tiles;
    int64_t s = find_range(round->workspace->first_keys, round->n_segments, tile);
    t.run = segment_keys(a, &round->segments[s]);
    t.key = (tile - round->workspace->first_keys[s]) * TILE;
    t.n_keys = round->segments[s].k_len - t.key < TILE ? round->segments[s].k_len - t.key : TILE;
    begin_keys(&t, scratch);
    backward_segment(&t, s);
    add_key_sums(&t, round->b->dk, t.dk, a->scale);
    add_key_sums(&t, round->b->dv, t.dv, 1.0f);
}

/* delta = rowsum(dout * out); dq becomes 0, which it stays in rows that see nothing. */
static void backward_delta_rows(const void *args, int64_t first, int64_t end, void *scratch)
{
    const tp_attention_backward_args *b = args;
    const tp_attention_args *a = &b->forward;
    bool bf16 = is_bf16(a->out);
    size_t bytes = bf16 ? 2 : 4;
    (void)scratch;
    for (int64_t r = first; r < end; r++) {
        for (int64_t h = 0; h < a->heads; h++) {
            size_t column = (size_t)(h * a->head_dim) * bytes;
            const unsigned char *out = (const unsigned char *)row_at(a->out, r) + column;
            const unsigned char *dout = (const unsigned char *)row_at(b->dout, r) + column;
            vf sum = v_set(0.0f);
            for (int64_t d = 0; d < a->head_dim; d += VL) {
                int64_t n = a->head_dim - d;
                sum = bf16 ? v_fma(v_get(out, true, d, n), v_get(dout, true, d, n), sum)
                           : v_fma(v_get(out, false, d, n), v_get(dout, false, d, n), sum);
            }
            b->delta[r * a->heads + h] = v_sum(sum);
        }
        memset(row_at(b->dq, r), 0, (size_t)(a->heads * a->head_dim) * bytes);
    }
}

static void clear_key_rows(const void *args, int64_t first, int64_t end, void *scratch)
{
    const tp_attention_backward_args *b = args;
    size_t bytes = (size_t)(b->forward.kv_heads * b->forward.head_dim) * (is_bf16(b->dk) ? 2 : 4);
    (void)scratch;
    for (int64_t r = first; r < end; r++) {
        memset(row_at(b->dk, r), 0, bytes);
        memset(row_at(b->dv, r), 0, bytes);
    }
}

/* What the rounds of one call may use: `sums` floats for a dq kept aside (NULL: dq is f32 and sums itself). */
typedef struct backward_room {
    float *sums;
    int64_t n_sums;
    int64_t kv_heads; /* per round, so that the longest segment fits */
    float *allocated; /* where the workspace is too small even for one key head */
} backward_room;

static tp_status find_room(tp_ctx *ctx, const tp_attention_backward_args *b, float *sums, backward_room *room)
{
    const tp_attention_args *a = &b->forward;
    int64_t longest = 1, per_row = a->heads / a->kv_heads * a->head_dim;
    for (int64_t s = 0; s < a->n_segments; s++) {
        if (a->segments[s].q_len > longest) longest = a->segments[s].q_len;
    }
    int64_t counters = (longest + TILE - 1) / TILE;
    *room = (backward_room){NULL, 0, a->kv_heads, NULL};
    if (counters > ROUND_COUNTERS) {
        return tp_fail(ctx, TP_UNSUPPORTED, "attention_backward: a segment of %lld queries, the CPU kernel takes at most %lld",
                       (long long)longest, (long long)ROUND_COUNTERS * TILE);
    }
    if (ROUND_COUNTERS / counters < room->kv_heads) room->kv_heads = ROUND_COUNTERS / counters;
    if (!is_bf16(b->dq)) return TP_OK;
    room->sums = sums;
    room->n_sums = WORKSPACE_SUMS;
    if (longest > WORKSPACE_SUMS / per_row) {
        room->n_sums = longest * per_row;
        room->sums = room->allocated = tp_alloc_raw(ctx, (size_t)room->n_sums, sizeof(float));
        if (room->sums == NULL) return TP_NOMEM;
    }
    if (room->n_sums / (longest * per_row) < room->kv_heads) room->kv_heads = room->n_sums / (longest * per_row);
    return TP_OK;
}

/* Takes as many segments from s0 on as one round holds. Segments that share keys must not be in one round, since each
 * would add to the same rows of dk. */
static void fill_round(backward_round *round, const backward_room *room, int64_t s0)
{
    const tp_attention_args *a = &round->b->forward;
    int64_t per_row = round->n_kv_heads * (a->heads / a->kv_heads) * a->head_dim, keys_end = 0, s = 0;
    round->segments = a->segments + s0;
    round->workspace->first_keys[0] = round->workspace->first_queries[0] = 0;
    for (; s < a->n_segments - s0 && s < ROUND_SEGMENTS; s++) {
        const tp_segment *segment = &round->segments[s];
        int64_t queries = round->workspace->first_queries[s] + (segment->q_len + TILE - 1) / TILE;
        int64_t rows = segment->q_start + segment->q_len - round->segments[0].q_start;
        bool fits = queries * round->n_kv_heads <= ROUND_COUNTERS && (room->sums == NULL || rows * per_row <= room->n_sums);
        if (s > 0 && (!fits || segment->k_start < keys_end)) break;
        keys_end = segment->k_start + segment->k_len;
        round->workspace->first_queries[s + 1] = queries;
        round->workspace->first_keys[s + 1] = round->workspace->first_keys[s] + (segment->k_len + TILE - 1) / TILE;
    }
    round->n_segments = s;
}

static void run_round(backward_round *round, const backward_room *room)
{
    const tp_attention_args *a = &round->b->forward;
    int64_t per_head = a->heads / a->kv_heads * a->head_dim;
    if (room->sums == NULL) {
        round->dq = round->b->dq.data;
        round->dq_ld = round->b->dq.ld;
        round->dq_row = round->dq_column = 0;
    } else {
        round->dq = room->sums;
        round->dq_ld = round->n_kv_heads * per_head;
        round->dq_row = round->segments[0].q_start;
        round->dq_column = round->kv_head * per_head;
    }
    int64_t counters = round->workspace->first_queries[round->n_segments] * round->n_kv_heads;
    for (int64_t i = 0; i < counters; i++) atomic_init(&round->workspace->turn[i], 0);
    int64_t tiles = round->prefix_tiles + round->workspace->first_keys[round->n_segments];
    tp_cpu_for(round->cpu, tiles * round->n_kv_heads, backward_item, round);
}

static tp_status attention_backward(tp_ctx *ctx, const void *args)
{
    const tp_attention_backward_args *b = args;
    const tp_attention_args *a = &b->forward;
    TP_TRY(check_attention(ctx, "attention_backward", a));
    TP_TRY(check_dtypes(ctx, "attention_backward", a->q.dtype, b->dout.dtype));
    TP_TRY(check_dtypes(ctx, "attention_backward", a->q.dtype, b->dq.dtype));
    TP_TRY(check_dtypes(ctx, "attention_backward", a->q.dtype, b->dk.dtype));
    TP_TRY(check_dtypes(ctx, "attention_backward", a->q.dtype, b->dv.dtype));

    backward_round round = {.b = b, .cpu = tp_cpu_of(ctx)};
    round.prefix_tiles = (a->n_prefix + TILE - 1) / TILE;
    round.workspace = (backward_workspace *)(void *)round.cpu->workspace;
    backward_room room;
    TP_TRY(find_room(ctx, b, round.workspace->sums, &room));

    for_rows(ctx, a->n_q, a->heads * a->head_dim, backward_delta_rows, b);
    for_rows(ctx, b->n_k, a->kv_heads * a->head_dim, clear_key_rows, b);
    for (round.kv_head = 0; round.kv_head < a->kv_heads; round.kv_head += room.kv_heads) {
        int64_t left = a->kv_heads - round.kv_head;
        round.n_kv_heads = left < room.kv_heads ? left : room.kv_heads;
        for (int64_t s0 = 0; s0 < a->n_segments; s0 += round.n_segments) {
            fill_round(&round, &room, s0);
            run_round(&round, &room);
        }
    }
    tp_free(room.allocated);
    return TP_OK;
}
