/* Products of 1 to 7 rows: decoding. The weights are read once, in their order in memory; that takes all the time, so the
 * rest is arranged around it.
 *
 * Each thread has a lane: a stretch of the right side that it reads from one end to the other, chunk by chunk, as memory
 * likes best. A thread that comes to the end of its lane takes chunks from the far ends of the others', so nobody waits for
 * one that was late or was held up. A chunk is whole stored rows (dot products), or, where k runs across stored rows, a range
 * of columns to which row after row is added. A sum's order depends on k alone.
 *
 * A low-rank part comes along: first all threads multiply its `down` side, whose few sums every chunk then needs. */
#include <stdatomic.h>
#include <string.h>

#include "backend/cpu/ahead.h"
#include "backend/cpu/matmul.h"

#define LANES 64
/* Bytes of the right side that a chunk should have, and columns that it may hold sums for. */
#define CHUNK_BYTES ((int64_t)32 << 10)
#define CHUNK_COLS  ((int64_t)2048)
/* Sums of the `down` side that are one piece of work. */
#define DOWN_COLS ((int64_t)8)

typedef float vector4 __attribute__((vector_size(16)));
typedef uint16_t halves4 __attribute__((vector_size(8)));
typedef uint32_t words4 __attribute__((vector_size(16)));

/* Chunks that nobody has taken: the first << 32 | one past the last. */
typedef struct lane {
    _Atomic uint64_t left;
    int64_t end;         /* of all of its chunks */
    char other_line[48]; /* so that lanes do not share a line of the cache */
} lane;

typedef struct few {
    tp_cpu *cpu;
    const tp_mm_engine *e;
    const tp_mm_product *p;
    const float *x;
    int64_t ld; /* of x */
    int64_t chunk_cols, n_lanes;
    lane *lanes;
    /* of the low-rank part */
    float *low; /* scaled, as another x */
    int64_t low_ld, down_pieces;
    _Atomic int64_t down_taken, down_done;
} few;

/* ---- lanes ---- */

static void fill_lanes(few *s, int64_t chunks)
{
    for (int64_t i = 0; i < s->n_lanes; i++) {
        s->lanes[i].end = (i + 1) * chunks / s->n_lanes;
        atomic_init(&s->lanes[i].left, (uint64_t)(i * chunks / s->n_lanes) << 32 | (uint64_t)s->lanes[i].end);
    }
}

/* The owner's next chunk, or a thief's; -1: none is left. */
static int64_t take(lane *l, bool owner)
{
    uint64_t left = atomic_load(&l->left);
    for (;;) {
        uint64_t first = left >> 32, end = left & UINT32_MAX;
        if (first == end) return -1;
        uint64_t rest = owner ? (first + 1) << 32 | end : first << 32 | (end - 1);
        if (atomic_compare_exchange_weak(&l->left, &left, rest)) return (int64_t)(owner ? first : end - 1);
    }
}

/* ---- the low-rank part ---- */

static void multiply_down(few *s)
{
    const tp_mm_lowrank *l = s->p->lowrank;
    for (;;) {
        int64_t piece = atomic_fetch_add(&s->down_taken, 1), col = piece * DOWN_COLS;
        if (piece >= s->down_pieces) return;
        int64_t cols = tp_mm_min(DOWN_COLS, l->rank - col);
        tp_mm_right down = l->down;
        down.m = col + cols; /* what follows is another thread's */
        s->e->dot(&down, col, cols, (int)s->p->n, s->x, s->ld, s->low + col, s->low_ld);
        for (int64_t i = 0; i < s->p->n; i++)
            for (int64_t j = col; j < col + cols; j++) s->low[i * s->low_ld + j] *= l->scaling;
        atomic_fetch_add(&s->down_done, 1);
    }
}

/* Asks for the columns' part of `up`, which will be needed when they have been multiplied. */
static void fetch_up(const few *s, int64_t col, int64_t cols)
{
    const tp_mm_right *up = &s->p->lowrank->up;
    const unsigned char *at = up->data + col * up->row_bytes;
    for (int64_t i = 0; i < cols * up->row_bytes; i += 64) __builtin_prefetch(at + i, 0, 3);
}

/* sums += low times the columns' part of `up`. The threads that took pieces of `down` are at them or have done them. */
static void add_up(few *s, int64_t col, int64_t cols, float *sums, int64_t ld)
{
    const tp_mm_lowrank *l = s->p->lowrank;
    float *more = sums + s->p->n * ld;
    while (atomic_load(&s->down_done) < s->down_pieces) tp_threads_pause();
    s->e->dot(&l->up, col, cols, (int)s->p->n, s->low, s->low_ld, more, ld);
    for (int64_t i = 0; i < s->p->n; i++) {
        for (int64_t j = i * ld; j < i * ld + cols; j += 4) { /* rows have room up to a multiple of 32 columns */
            vector4 a, b;
            memcpy(&a, sums + j, sizeof a);
            memcpy(&b, more + j, sizeof b);
            a += b;
            memcpy(sums + j, &a, sizeof a);
        }
    }
}

/* ---- chunks ---- */

/* `end`: the column up to which this thread will read on. */
static void multiply_chunk(few *s, int64_t chunk, int64_t end, float *sums)
{
    const tp_mm_product *p = s->p;
    int64_t col = chunk * s->chunk_cols, cols = tp_mm_min(s->chunk_cols, p->m - col), ld = tp_mm_ceil(s->chunk_cols, 32) * 32;
    tp_mm_right right = p->right;
    right.m = tp_mm_min(p->m, end);
    if (p->lowrank != NULL) fetch_up(s, col, cols);
    if (right.along_k)
        s->e->dot(&right, col, cols, (int)p->n, s->x, s->ld, sums, ld);
    else
        s->e->axpy(&right, col, cols, (int)p->n, s->x, s->ld, sums, ld);
    if (p->lowrank != NULL) add_up(s, col, cols, sums, ld);
    s->e->finish(&p->out, 0, p->n, col, cols, sums, ld);
}

/* What one thread does: its own lane, then what is left of the others'. */
static void few_item(void *arg, int64_t item, int thread)
{
    few *s = arg;
    float *sums = tp_cpu_scratch(s->cpu, thread);
    if (s->down_pieces > 0) multiply_down(s);
    int64_t chunk;
    while ((chunk = take(&s->lanes[item], true)) >= 0) multiply_chunk(s, chunk, s->lanes[item].end * s->chunk_cols, sums);
    for (int64_t i = 1; i < s->n_lanes; i++) {
        while ((chunk = take(&s->lanes[(item + i) % s->n_lanes], false)) >= 0)
            multiply_chunk(s, chunk, (chunk + 1) * s->chunk_cols, sums);
    }
}

/* ---- the left side ---- */

/* Floats that a row of k values takes as x: zeros up to a multiple of 32 values, then the sums of 32 values each. */
static int64_t x_row(int64_t k)
{
    int64_t blocks = tp_mm_ceil(k, 32);
    return blocks * 32 + tp_mm_ceil(blocks, 16) * 16;
}

/* tp_convert_to_f32, faster where it counts. */
static void convert(tp_dtype dtype, const unsigned char *from, int64_t k, float *to)
{
    int64_t i = 0;
    for (; dtype == TP_BF16 && i + 4 <= k; i += 4) {
        halves4 h;
        memcpy(&h, from + 2 * i, sizeof h);
        words4 bits = __builtin_convertvector(h, words4) << 16;
        memcpy(to + i, &bits, sizeof bits);
    }
    tp_convert_to_f32(dtype, from + (size_t)i * tp_dtype_bytes(dtype), (size_t)(k - i), to + i);
}

static void widen(const tp_rows *from, int64_t n, int64_t k, bool block_sums, float *x)
{
    size_t bytes = tp_dtype_bytes(from->dtype);
    int64_t ld = x_row(k), blocks = tp_mm_ceil(k, 32);
    for (int64_t i = 0; i < n; i++) {
        float *to = x + i * ld, *sums = to + blocks * 32;
        convert(from->dtype, (const unsigned char *)from->data + (size_t)(i * from->ld) * bytes, k, to);
        memset(to + k, 0, (size_t)(ld - k) * sizeof *x);
        for (int64_t b = 0; block_sums && b < blocks; b++) {
            for (int j = 0; j < 32; j++) sums[b] += to[b * 32 + j];
        }
    }
}

/* Room for `low`, or what the caller gives as it. */
static void prepare_lowrank(few *s, float *room)
{
    const tp_mm_lowrank *l = s->p->lowrank;
    s->low = room;
    s->low_ld = x_row(l->rank);
    if (l->down.data == NULL) {
        widen(&l->low, s->p->n, l->rank, false, room);
    } else {
        memset(room, 0, (size_t)(s->p->n * s->low_ld) * sizeof *room);
        s->down_pieces = tp_mm_ceil(l->rank, DOWN_COLS);
    }
}

static void give_low(const few *s)
{
    const tp_mm_lowrank *l = s->p->lowrank;
    for (int64_t i = 0; i < s->p->n; i++)
        memcpy((float *)l->low.data + i * l->low.ld, s->low + i * s->low_ld, (size_t)l->rank * sizeof(float));
}

/* What thread 0 reads first is not told: it is the caller, and never idle. */
static void begin_reading(const few *s, int64_t chunks)
{
    const tp_mm_product *p = s->p;
    tp_cpu_stretch stretch = {
        .data = p->right.data, .chunk_bytes = s->chunk_cols * p->right.row_bytes, .chunks = chunks, .lanes = s->n_lanes};
    if (s->down_pieces > 0) {
        stretch.first = p->lowrank->down.data;
        stretch.first_bytes = DOWN_COLS * p->lowrank->down.row_bytes;
        stretch.first_pieces = s->down_pieces;
    }
    tp_cpu_ahead_begins(s->cpu->ahead, s->cpu->pool, &stretch);
}

/* ---- entry points ---- */

/* Not so for rows of over 500,000 values and heads of over 2048. */
static bool fits(const tp_mm_product *p)
{
    int64_t floats = p->n * (x_row(p->k) + (p->lowrank != NULL ? x_row(p->lowrank->rank) : 0));
    return floats * (int64_t)sizeof(float) <= (int64_t)TP_CPU_WORKSPACE_BYTES && p->right.rope_pairs <= CHUNK_COLS;
}

static bool is_plain(const tp_mm_right *b)
{
    return b->data == NULL || (tp_formats[b->format].dense && b->along_k && b->rope_pairs == 0);
}

bool tp_mm_few_folds(const tp_mm_product *p)
{
    return p->k > 0 && p->lowrank->rank > 0 && p->right.along_k && is_plain(&p->lowrank->up) && is_plain(&p->lowrank->down) &&
           fits(p);
}

void tp_mm_few(tp_cpu *cpu, const tp_mm_engine *e, const tp_mm_product *p)
{
    lane lanes[LANES];
    int64_t ld = x_row(p->k);
    if (!fits(p)) {
        tp_mm_blocked(cpu, e, p);
        return;
    }
    few s = {.cpu = cpu, .e = e, .p = p, .x = (float *)(void *)cpu->workspace, .ld = ld, .lanes = lanes};
    widen(&p->left, p->n, p->k, p->right.format == TP_FORMAT_Q4_1, (float *)(void *)cpu->workspace);
    if (p->lowrank != NULL) prepare_lowrank(&s, (float *)(void *)cpu->workspace + p->n * ld);
    const tp_format *f = &tp_formats[p->right.format];
    int64_t threads = cpu->device.threads, col_bytes = tp_mm_ceil(p->k * f->block_bytes, f->block);
    int64_t unit = !p->right.along_k ? 32 : p->right.rope_pairs > 0 ? p->right.rope_pairs : 8;
    /* Across stored rows few columns would mean a jump in memory every few hundred bytes. */
    int64_t cols = p->right.along_k ? tp_mm_ceil(CHUNK_BYTES, col_bytes) : tp_mm_ceil(p->m, threads);
    s.chunk_cols = tp_mm_ceil(tp_mm_min(cols, CHUNK_COLS), unit) * unit;
    int64_t chunks = tp_mm_ceil(p->m, s.chunk_cols);
    s.n_lanes = tp_mm_min(tp_mm_min(threads, LANES), chunks);
    fill_lanes(&s, chunks);
    if (p->right.along_k) begin_reading(&s, chunks);
    tp_cpu_for(cpu, s.n_lanes, few_item, &s);
    if (p->lowrank != NULL && p->lowrank->down.data != NULL) give_low(&s);
}
