/* Matrix products: argument checks, the choice of engine, and the blocked driver. matmul.h has the picture. */
#include "backend/cpu/matmul.h"

#include <stdatomic.h>

#include "backend/lowrank.h"

/* Shares of the workspace: packed left side; sums that wait for the next chunk of k, or the low-rank part's unpacked `down`. */
#define LEFT_BYTES ((int64_t)10 << 20)
#define SUMS_BYTES ((int64_t)4 << 20)
/* Most rows packed at once: 37 panels of 14. */
#define ROWS_MAX 518
/* Most columns of a group: a block of its right side takes 240 KiB; two of them, sums of 518 rows and the stream of the left
 * side share L2. */
#define GROUP_COLS  96
#define RIGHT_WORDS (GROUP_COLS * (TP_MM_KC_WORDS + TP_MM_TAIL_WORDS))
/* Units of work that a thread begins with, at least, where rows can be cut for it. */
#define LANE_UNITS 4
/* Threads that begin with units of their own; further ones take from them. */
#define LANES_MAX 64
/* Left panels that one item packs. */
#define PACK_PANELS 4
/* Most words of k that are summed in one chain of additions. Longer ones are cut, and their sums added: two chains of 288 have
 * 0.7 of the rounding error of one of 576, and cost 1 %. */
#define CHAIN_WORDS 304
/* A product of no more columns, or no more k, is thin. */
#define THIN_COLS 64

_Static_assert(LEFT_BYTES + SUMS_BYTES <= (int64_t)TP_CPU_WORKSPACE_BYTES, "the shares must fit");
_Static_assert(2 * RIGHT_WORDS * 4 + GROUP_COLS * (ROWS_MAX + 16) * 4 <= TP_CPU_SCRATCH_BYTES, "two groups and sums must fit");

/* One pass: some rows, some columns, one chunk of k. */
typedef struct pass {
    tp_cpu *cpu;
    const tp_mm_engine *e;
    const tp_mm_product *p;
    int64_t row0, rows; /* of this pass */
    int64_t panel_rows; /* rows per left panel; the last may have fewer */
    int64_t n_panels;
    int64_t k0, k_end, kc; /* the chunk, and the block size in values */
    int64_t tail;          /* words of the low-rank part, behind the last block; 0: none */
    int64_t col0, col_end; /* columns; col0 is a multiple of nr */
    int64_t group_cols;    /* columns of one group, a multiple of nr */
    int64_t n_groups;
    int64_t splits; /* parts into which the rows of a group are cut: group * splits + part is a unit of work */
    int64_t lanes;
    bool direct;                       /* tiles go to the result; no sums, no finish */
    bool in_place;                     /* tiles read whole panels of the right side where they lie */
    float *left;                       /* packed: [block][panel][words of block][panel_rows] */
    float *down;                       /* of the low-rank part, unpacked: [block][words of block][columns][nr] */
    float *sums;                       /* [column panel][row panel][tile], or NULL where k is one chunk */
    _Atomic uint64_t units[LANES_MAX]; /* of each lane: the first that nobody has taken << 32 | end */
} pass;

static int64_t block_k(const pass *s, int64_t k) /* values of k in the block at k */
{
    return tp_mm_min(s->kc, s->k_end - k);
}

static int64_t tail_words(const pass *s, int64_t k)
{
    return k + s->kc >= s->p->k ? s->tail : 0;
}

/* Words that the block at k takes in a left panel: whole runs. */
static int64_t block_words(const pass *s, int64_t k)
{
    return (tp_mm_ceil(tp_mm_ceil(block_k(s, k), s->e->per_word), TP_MM_RUN) + tp_mm_ceil(tail_words(s, k), TP_MM_RUN)) *
           TP_MM_RUN;
}

static int64_t rows_of(const pass *s, int64_t panel)
{
    return tp_mm_min(s->panel_rows, s->rows - panel * s->panel_rows);
}

/* Blocks before k are whole, so they take rows * (k - k0) / per_word words. */
static float *left_panel(const pass *s, int64_t k, int64_t panel)
{
    return s->left + s->rows * ((k - s->k0) / s->e->per_word) + panel * s->panel_rows * block_words(s, k);
}

/* ---- the low-rank part ---- */

/* Of a panel of rows: low = scaling * left down, from the packed left side, and behind the left panel of the last block. */
static void pack_low(const pass *s, int64_t panel, float *tile)
{
    const tp_mm_engine *e = s->e;
    const tp_mm_lowrank *l = s->p->lowrank;
    int64_t row = s->row0 + panel * s->panel_rows, rows = rows_of(s, panel), last = 0;
    tp_mm_out out = {.c = l->low, .alpha = l->scaling};
    for (int64_t col = 0; col < l->rank && l->down.data != NULL; col += e->nr) {
        int cols = (int)tp_mm_min(e->nr, l->rank - col);
        tp_mm_tile t = {.rows = (int)rows, .cols = cols, .right_ld = e->nr, .to = tile, .ld = e->nr, .from_ld = e->nr};
        const float *down = s->down + col * tp_mm_ceil(s->p->k, e->per_word);
        for (int64_t k = 0; k < s->p->k; k += s->kc) {
            t.words = tp_mm_ceil(block_k(s, k), e->per_word);
            t.left = left_panel(s, k, panel);
            t.right = down;
            e->tile(&t);
            down += t.words * e->nr;
            t.from = tile;
        }
        e->finish(&out, row, rows, col, cols, tile, e->nr);
    }
    while (last + s->kc < s->p->k) last += s->kc;
    int64_t words = tp_mm_ceil(s->p->k - last, e->per_word); /* a multiple of TP_MM_RUN, or the part would not fold */
    e->pack(&l->low, row, (int)rows, 0, l->rank, left_panel(s, last, panel) + words * rows);
}

static void unpack_down_item(void *arg, int64_t item, int thread)
{
    (void)thread;
    const pass *s = arg;
    const tp_mm_lowrank *l = s->p->lowrank;
    int64_t blocks = tp_mm_ceil(s->p->k, s->kc), col = item / blocks * s->e->nr, k = item % blocks * s->kc;
    float *to = s->down + col * tp_mm_ceil(s->p->k, s->e->per_word) + k / s->e->per_word * s->e->nr;
    s->e->unpack(&l->down, k, block_k(s, k), col, (int)tp_mm_min(s->e->nr, l->rank - col), to);
}

bool tp_mm_folds(const tp_cpu *cpu, const tp_mm_engine *e, const tp_mm_product *p)
{
    if (p->n < TP_MM_FEW) return tp_mm_few_folds(p);
    int64_t per_word = e->per_word, words = tp_mm_ceil(p->k, per_word), rank = p->lowrank->rank;
    bool whole_runs = p->k % (TP_MM_RUN * per_word) == 0, wide = p->m > THIN_COLS && p->k > THIN_COLS;
    return wide && whole_runs && !p->left_transposed && (e != &tp_mm_generic || cpu->openblas == NULL) &&
           tp_mm_ceil(rank, per_word) <= TP_MM_TAIL_WORDS && ROWS_MAX * (words + TP_MM_TAIL_WORDS) * 4 <= LEFT_BYTES &&
           tp_mm_ceil(rank, e->nr) * e->nr * words * 4 <= SUMS_BYTES;
}

/* ---- packing ---- */

static void pack_item(void *arg, int64_t item, int thread)
{
    const pass *s = arg;
    int64_t end = tp_mm_min((item + 1) * PACK_PANELS, s->n_panels);
    for (int64_t k = s->k0; k < s->k_end; k += s->kc) {
        for (int64_t panel = item * PACK_PANELS; panel < end; panel++) {
            int64_t row = s->row0 + panel * s->panel_rows;
            if (s->p->left_transposed)
                s->e->pack_transposed(&s->p->left, row, (int)rows_of(s, panel), k, block_k(s, k), left_panel(s, k, panel));
            else
                s->e->pack(&s->p->left, row, (int)rows_of(s, panel), k, block_k(s, k), left_panel(s, k, panel));
        }
    }
    for (int64_t panel = item * PACK_PANELS; s->tail > 0 && panel < end; panel++)
        pack_low(s, panel, tp_cpu_scratch(s->cpu, thread));
}

/* Asks for the elements of c that a tile will read or write, while its sums are computed. */
static void prefetch_tile(const tp_mm_out *out, int64_t row, int64_t rows, int64_t col, int64_t cols)
{
    if (out->transposed) return;
    int64_t size = out->c.dtype == TP_BF16 ? 2 : 4;
    for (int64_t r = row; r < row + rows; r++) {
        const unsigned char *p = (const unsigned char *)out->c.data + (r * out->c.ld + col) * size;
        for (int64_t at = 0; at < cols * size; at += 64) __builtin_prefetch(p + at, 1, 2);
        __builtin_prefetch(p + cols * size - 1, 1, 2);
    }
}

/* ---- multiplying ---- */

/* Whether tiles can be added to the result as they are, and from where the first one takes what was there. */
static bool goes_direct(const tp_mm_out *out)
{
    bool one_source = out->beta == 0 || (out->beta == 1 && out->residual == NULL);
    return out->c.dtype == TP_F32 && out->alpha == 1 && one_source && out->bias == NULL && !out->transposed;
}

static void aim_at_result(tp_mm_tile *t, const tp_mm_out *out, int64_t row, int64_t col, bool first)
{
    t->from = t->to = (float *)out->c.data + row * out->c.ld + col;
    t->from_ld = t->ld = out->c.ld;
    if (!first || out->beta != 0) return;
    t->from = out->residual != NULL ? (const float *)out->residual + row * out->residual_ld + col : NULL;
    t->from_ld = out->residual_ld;
}

/* A tile, in chains of about the same length. */
static void run_chains(const tp_mm_engine *e, tp_mm_tile t)
{
    int64_t words = t.words, chains = tp_mm_ceil(words, CHAIN_WORDS);
    int64_t chain = tp_mm_ceil(tp_mm_ceil(words, chains), TP_MM_RUN) * TP_MM_RUN;
    const float *left = t.left, *right = t.right;
    for (int64_t at = 0; at < words; at += chain) {
        t.words = tp_mm_min(chain, words - at);
        t.left = left + at * t.rows;
        t.right = right + at * t.right_ld;
        e->tile(&t);
        t.from = t.to;
        t.from_ld = t.ld;
    }
}

/* One block of one group: what a right buffer holds, panel after panel. */
typedef struct step {
    int64_t k, col, col_end;
    int64_t words, tail; /* of k, and of the low-rank part behind it */
    const float *left;   /* its first panel of the left side */
    int64_t left_words;  /* and the words of a row there */
} step;

static step step_at(const pass *s, int64_t group, int64_t k)
{
    step t = {.k = k, .col = s->col0 + group * s->group_cols, .tail = tail_words(s, k)};
    t.col_end = tp_mm_min(s->col_end, t.col + s->group_cols);
    t.words = tp_mm_ceil(block_k(s, k), s->e->per_word);
    t.left = left_panel(s, k, 0);
    t.left_words = block_words(s, k);
    return t;
}

static float *right_panel(const pass *s, const step *t, float *right, int64_t panel)
{
    return right + panel * (t->words + t->tail) * s->e->nr;
}

/* A step is unpacked in units: values of k of one panel where k runs along stored rows, else of all panels, for these lie
 * side by side in memory. Behind them comes a unit per panel of the low-rank part. Along rows, units are as long as keeps them
 * few; across, each value of k is another row, and as few bytes as possible are asked for at once. */
#define ALONG  192
#define ACROSS 8

static int64_t unit_k(const pass *s)
{
    return s->p->right.along_k ? ALONG : ACROSS;
}

static int64_t unit_count(const pass *s, const step *t)
{
    int64_t panels = tp_mm_ceil(t->col_end - t->col, s->e->nr), units = tp_mm_ceil(block_k(s, t->k), unit_k(s));
    return (s->p->right.along_k ? units * panels : units) + (t->tail > 0 ? panels : 0);
}

/* What a unit covers: values k .. k + kc of panels first .. end; false if it is of the low-rank part. */
static bool unit_at(const pass *s, const step *t, int64_t unit, int64_t *k, int64_t *kc, int64_t *first, int64_t *end)
{
    int64_t panels = tp_mm_ceil(t->col_end - t->col, s->e->nr), units = tp_mm_ceil(block_k(s, t->k), unit_k(s));
    bool along = s->p->right.along_k;
    *k = unit % units * unit_k(s);
    *kc = tp_mm_min(unit_k(s), block_k(s, t->k) - *k);
    *first = along ? unit / units : 0;
    *end = along ? *first + 1 : panels;
    int64_t low = unit - (along ? units * panels : units);
    if (low < 0) return true;
    *first = low;
    *end = low + 1;
    return false;
}

/* Few row panels do not pay for unpacking what tiles can read: f32 rows of which panels are pieces. */
static bool reads_in_place(const pass *s)
{
    const tp_mm_right *b = &s->p->right;
    bool as_it_is = b->format == TP_FORMAT_F32 && !b->along_k && !b->round_bf16 && b->rope_pairs == 0 && s->e->per_word == 1;
    return as_it_is && s->n_panels <= 2 && s->tail == 0 && b->row_bytes % 4 == 0 && (uintptr_t)b->data % 4 == 0;
}

static void unpack_unit(const pass *s, const step *t, int64_t unit, float *right)
{
    const tp_mm_engine *e = s->e;
    int64_t k, kc, first, end;
    bool main = unit_at(s, t, unit, &k, &kc, &first, &end);
    for (int64_t panel = first; panel < end; panel++) {
        int64_t col = t->col + panel * e->nr;
        int cols = (int)tp_mm_min(e->nr, t->col_end - col);
        float *to = right_panel(s, t, right, panel);
        if (s->in_place && cols == e->nr) continue;
        if (main)
            e->unpack(&s->p->right, t->k + k, kc, col, cols, to + k / e->per_word * e->nr);
        else
            e->unpack(&s->p->lowrank->up, 0, s->p->lowrank->rank, col, cols, to + t->words * e->nr);
    }
}

/* Asks for the bytes of a unit: pieces of rows, which the hardware does not foresee. */
static void prefetch_unit(const pass *s, const step *t, int64_t unit)
{
    const tp_mm_right *b = &s->p->right;
    const tp_format *f = &tp_formats[b->format];
    int64_t k, kc, first, end;
    if (!unit_at(s, t, unit, &k, &kc, &first, &end)) return;
    int64_t col = t->col + first * s->e->nr, cols = tp_mm_min(t->col + end * s->e->nr, t->col_end) - col;
    int64_t rows = b->along_k ? cols : kc, row0 = b->along_k ? col : t->k + k;
    int64_t from = b->along_k ? t->k + k : col, count = b->along_k ? kc : cols;
    int64_t begin = from / f->block * f->block_bytes, bytes = tp_mm_ceil(count, f->block) * f->block_bytes;
    for (int64_t r = 0; r < rows; r++) {
        const unsigned char *p = tp_mm_stored_row(b, row0 + r) + begin;
        for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(p + at, 0, 2);
        __builtin_prefetch(p + bytes - 1, 0, 2);
    }
}

/* One row panel of a step times one column panel. `sums`: of this tile, or any place if it is finished now. */
static void multiply_tile(const pass *s, const step *now, int64_t panel, int64_t col, int cols, const float *right, float *sums)
{
    const tp_mm_out *out = &s->p->out;
    int64_t k = now->k, row = panel * s->panel_rows, rows = rows_of(s, panel);
    bool last = k + s->kc >= s->p->k;
    tp_mm_tile t = {.rows = (int)rows, .cols = cols, .words = now->words + now->tail, .right = right};
    t.left = now->left + row * now->left_words;
    row += s->row0;
    t.right_ld = t.from_ld = t.ld = s->e->nr;
    t.to = sums;
    t.from = k > 0 ? sums : NULL;
    if (s->in_place && cols == s->e->nr) {
        t.right = s->p->right.data + k * s->p->right.row_bytes + col * 4;
        t.right_ld = s->p->right.row_bytes / 4;
    }
    if (s->direct) aim_at_result(&t, out, row, col, k == 0);
    if (s->direct || last) prefetch_tile(out, row, rows, col, cols);
    run_chains(s->e, t);
    if (last && !s->direct) s->e->finish(out, row, rows, col, cols, sums, s->e->nr);
}

/* The row panels first .. end times one step's right buffer. Between row panels, a share of the next step is unpacked, whose
 * bytes were asked for one row panel earlier: neither waits for memory. */
static void multiply_step(const pass *s, const step *t, const float *right, const step *next, float *next_right, int64_t first,
                          int64_t end, float *sums, int64_t col_step, int64_t row_step)
{
    int64_t n = end - first, units = next != NULL ? unit_count(s, next) : 0, nr = s->e->nr;
    for (int64_t u = 0; u < units / n; u++) prefetch_unit(s, next, u);
    for (int64_t i = 0; i < n; i++) {
        for (int64_t u = (i + 1) * units / n; u < (i + 2) * units / n && u < units; u++) prefetch_unit(s, next, u);
        for (int64_t col = t->col, j = 0; col < t->col_end; col += nr, j++)
            multiply_tile(s, t, first + i, col, (int)tp_mm_min(nr, t->col_end - col), right + j * (t->words + t->tail) * nr,
                          sums + j * col_step + i * row_step);
        for (int64_t u = i * units / n; u < (i + 1) * units / n; u++) unpack_unit(s, next, u, next_right);
    }
}

/* ---- who does what ---- */

/* Each thread begins with a lane of neighbouring units and takes them in order. One that has done its own takes the last of
 * whoever has most left: a thread slowed down by others, or by what else runs on its core, does not hold up the rest. */

/* The next unit of a lane that has at least `least` left, or -1. */
static int64_t take_own(pass *s, int64_t lane, uint64_t least)
{
    uint64_t units = atomic_load(&s->units[lane]);
    while ((uint32_t)units - (units >> 32) >= least) {
        if (atomic_compare_exchange_weak(&s->units[lane], &units, units + ((uint64_t)1 << 32))) return (int64_t)(units >> 32);
    }
    return -1;
}

static int64_t take_other(pass *s)
{
    for (;;) {
        uint64_t most = 0, from = 0;
        int64_t lane = 0;
        for (int64_t i = 0; i < s->lanes; i++) {
            uint64_t units = atomic_load(&s->units[i]), n = (uint32_t)units - (units >> 32);
            if (n > most) most = n, from = units, lane = i;
        }
        if (most == 0) return -1;
        if (atomic_compare_exchange_strong(&s->units[lane], &from, from - 1)) return (int64_t)(uint32_t)from - 1;
    }
}

/* One unit after the other: a group of column panels times a range of row panels, over the chunk. While a step lasts, its part
 * of the right side stays in L2 and all row panels pass. The next unit is taken early, so that its first step is unpacked
 * meanwhile, but not the last of the lane: others may be free for it sooner. */
static void multiply_lane(void *arg, int64_t lane, int thread)
{
    pass *s = arg;
    int64_t nr = s->e->nr, tile = s->e->mr * nr;
    float *right[2] = {tp_cpu_scratch(s->cpu, thread), NULL}, *own = NULL;
    right[1] = right[0] + RIGHT_WORDS;
    own = right[1] + RIGHT_WORDS;
    bool keep = !s->direct && s->kc < s->p->k; /* each tile's own sums until the last block; else all use one place */
    int current = 0;
    step now = {.col = -1}, next = {.col = -1};
    for (int64_t unit = -1, ahead = -1;; unit = ahead) {
        if (unit < 0) {
            unit = take_own(s, lane, 1);
            if (unit < 0) unit = take_other(s);
            if (unit < 0) return;
            next = step_at(s, unit / s->splits, s->k0);
            for (int64_t u = 0, n = unit_count(s, &next); u < n; u++) {
                if (u + 1 < n) prefetch_unit(s, &next, u + 1);
                unpack_unit(s, &next, u, right[current]);
            }
        }
        int64_t split = unit % s->splits, first = split * s->n_panels / s->splits, end = (split + 1) * s->n_panels / s->splits;
        int64_t row_step = keep ? tile : 0, col_step = keep ? tile * (s->sums != NULL ? s->n_panels : end - first) : 0;
        now = next;
        bool more = now.k + s->kc < s->k_end;
        ahead = more ? unit : take_own(s, lane, 2);
        if (ahead >= 0) next = step_at(s, ahead / s->splits, more ? now.k + s->kc : s->k0);
        bool other = ahead >= 0 && (next.col != now.col || next.k != now.k);
        float *sums = s->sums != NULL ? s->sums + (now.col - s->col0) / nr * col_step + first * row_step : own;
        multiply_step(s, &now, right[current], other ? &next : NULL, right[1 - current], first, end, sums, col_step, row_step);
        if (other) current = 1 - current;
    }
}

/* Groups are as wide as fits twice into half of L2, and each thread gets the same number. Where there are few, rows are cut as
 * well: a thread that has one part of a group after the other unpacks it once, if k is one block. */
static void run_pass(pass *s)
{
    int64_t threads = s->cpu->device.threads, panels = tp_mm_ceil(s->col_end - s->col0, s->e->nr), most = GROUP_COLS / s->e->nr;
    if (s->tail > 0 && s->p->lowrank->down.data != NULL) {
        int64_t columns = tp_mm_ceil(s->p->lowrank->rank, s->e->nr);
        tp_cpu_for(s->cpu, columns * tp_mm_ceil(s->p->k, s->kc), unpack_down_item, s);
    }
    tp_cpu_for(s->cpu, tp_mm_ceil(s->n_panels, PACK_PANELS), pack_item, s);
    int64_t groups = tp_mm_ceil(tp_mm_ceil(panels, most), threads) * threads, group = tp_mm_ceil(panels, groups);
    s->n_groups = tp_mm_ceil(panels, group);
    s->group_cols = group * s->e->nr;
    bool one_block = s->k_end - s->k0 <= s->kc, few = s->n_groups < threads;
    s->splits = 1;
    if ((one_block || few) && s->n_groups < LANE_UNITS * threads && threads > 1)
        s->splits = tp_mm_min(tp_mm_ceil(LANE_UNITS * threads, s->n_groups), tp_mm_ceil(s->n_panels, PACK_PANELS));
    int64_t units = s->n_groups * s->splits;
    s->lanes = tp_mm_min(tp_mm_min(threads, LANES_MAX), units);
    for (int64_t i = 0; i < s->lanes; i++)
        s->units[i] = (uint64_t)(i * units / s->lanes) << 32 | (uint64_t)((i + 1) * units / s->lanes);
    tp_cpu_for(s->cpu, s->lanes, multiply_lane, s);
}

/* All columns and all of k for some rows. */
static void run_rows(pass *s)
{
    const tp_mm_engine *e = s->e;
    int64_t k = s->p->k, m = s->p->m, tile = (int64_t)e->mr * e->nr;
    int64_t chunk = LEFT_BYTES / 4 / s->rows * e->per_word / s->kc * s->kc;
    if (chunk >= k) { /* the common case */
        s->k0 = 0, s->k_end = k;
        s->col0 = 0, s->col_end = m;
        s->sums = NULL;
        run_pass(s);
        return;
    }
    int64_t group = s->direct ? m : SUMS_BYTES / 4 / (s->n_panels * tile) * e->nr;
    s->sums = (float *)(void *)(s->cpu->workspace + LEFT_BYTES);
    for (s->col0 = 0; s->col0 < m; s->col0 = s->col_end) {
        s->col_end = tp_mm_min(m, s->col0 + group);
        for (s->k0 = 0; s->k0 < k; s->k0 = s->k_end) {
            s->k_end = tp_mm_min(k, s->k0 + chunk);
            run_pass(s);
        }
    }
}

/* ---- thin products ---- */

/* With few columns, or few k, packing the left side costs as much as multiplying it. Then the right side, which is small,
 * is unpacked as a whole, and items are rows: each packs some of its rows into L1 and multiplies them at once. */
#define THIN_RIGHT_BYTES ((int64_t)512 << 10)

typedef struct thin {
    tp_cpu *cpu;
    const tp_mm_engine *e;
    const tp_mm_product *p;
    int64_t kc, blocks, columns; /* blocks of k, panels of columns */
    int64_t panel_rows, n_panels, item_panels;
    float *right; /* [block][column panel][words][nr] */
} thin;

static int64_t thin_words(const thin *s, int64_t block)
{
    return tp_mm_ceil(tp_mm_min(s->kc, s->p->k - block * s->kc), s->e->per_word);
}

static float *thin_right(const thin *s, int64_t block, int64_t column)
{
    return s->right + (block * s->columns * (s->kc / s->e->per_word) + column * thin_words(s, block)) * s->e->nr;
}

static void thin_unpack_item(void *arg, int64_t item, int thread)
{
    (void)thread;
    const thin *s = arg;
    int64_t block = item / s->columns, column = item % s->columns, k = block * s->kc, col = column * s->e->nr;
    s->e->unpack(&s->p->right, k, tp_mm_min(s->kc, s->p->k - k), col, (int)tp_mm_min(s->e->nr, s->p->m - col),
                 thin_right(s, block, column));
}

/* One row panel times all columns, for one block of k. */
static void thin_panel(const thin *s, int64_t block, int64_t panel, float *left, float *sums)
{
    const tp_mm_engine *e = s->e;
    const tp_mm_product *p = s->p;
    int64_t tile = s->blocks == 1 ? 0 : (int64_t)e->mr * e->nr; /* of one block, each tile is finished before the next */
    int64_t row = panel * s->panel_rows, rows = tp_mm_min(s->panel_rows, p->n - row), words = thin_words(s, block);
    const float *right = thin_right(s, block, 0);
    bool last = block + 1 == s->blocks, direct = goes_direct(&p->out);
    e->pack(&p->left, row, (int)rows, block * s->kc, tp_mm_min(s->kc, p->k - block * s->kc), left);
    for (int64_t col = 0; col < p->m; col += e->nr, sums += tile, right += words * e->nr) {
        int64_t cols = tp_mm_min(e->nr, p->m - col), next = col + e->nr;
        if ((last || direct) && next < p->m) prefetch_tile(&p->out, row, rows, next, tp_mm_min(e->nr, p->m - next));
        tp_mm_tile t = {.rows = (int)rows, .cols = (int)cols, .words = words, .left = left, .right = right};
        t.right_ld = t.from_ld = t.ld = e->nr;
        t.to = sums;
        t.from = block > 0 ? sums : NULL;
        if (direct) aim_at_result(&t, &p->out, row, col, block == 0);
        e->tile(&t);
        if (last && !direct) e->finish(&p->out, row, rows, col, cols, sums, e->nr);
    }
}

static void thin_item(void *arg, int64_t item, int thread)
{
    const thin *s = arg;
    int64_t first = item * s->item_panels, end = tp_mm_min(first + s->item_panels, s->n_panels);
    int64_t panel_sums = s->blocks == 1 ? 0 : s->columns * s->e->mr * s->e->nr;
    float *left = tp_cpu_scratch(s->cpu, thread), *sums = left + TP_MM_KC_WORDS * s->e->mr;
    for (int64_t block = 0; block < s->blocks; block++) {
        for (int64_t panel = first; panel < end; panel++)
            thin_panel(s, block, panel, left, sums + (panel - first) * panel_sums);
    }
}

/* False if the product is not thin. */
static bool run_thin(tp_cpu *cpu, const tp_mm_engine *e, const tp_mm_product *p, int64_t kc)
{
    thin s = {.cpu = cpu, .e = e, .p = p, .kc = kc, .blocks = tp_mm_ceil(p->k, kc), .columns = tp_mm_ceil(p->m, e->nr)};
    int64_t right_bytes = s.blocks * (kc / e->per_word) * s.columns * e->nr * 4;
    bool narrow = p->m <= THIN_COLS && right_bytes <= (int64_t)TP_CPU_WORKSPACE_BYTES;
    bool shallow = s.blocks == 1 && p->k <= THIN_COLS && right_bytes <= THIN_RIGHT_BYTES;
    if (p->left_transposed || !(narrow || shallow)) return false;
    s.right = (float *)(void *)cpu->workspace;
    s.n_panels = tp_mm_ceil(p->n, e->mr);
    s.panel_rows = tp_mm_ceil(p->n, s.n_panels);
    s.n_panels = tp_mm_ceil(p->n, s.panel_rows);
    int64_t share = s.n_panels / (4 * cpu->device.threads);
    s.item_panels = share < 1 ? 1 : tp_mm_min(share, PACK_PANELS);
    tp_cpu_for(cpu, s.blocks * s.columns, thin_unpack_item, &s);
    tp_cpu_for(cpu, tp_mm_ceil(s.n_panels, s.item_panels), thin_item, &s);
    return true;
}

/* ---- entry points ---- */

void tp_mm_blocked(tp_cpu *cpu, const tp_mm_engine *e, const tp_mm_product *p)
{
    if (e == &tp_mm_generic && cpu->openblas != NULL) {
        tp_mm_openblas(cpu, p);
        return;
    }
    int64_t limit = (int64_t)TP_MM_KC_WORDS * e->per_word, blocks = tp_mm_ceil(p->k, limit);
    int64_t kc = tp_mm_ceil(tp_mm_ceil(p->k, blocks), 32) * 32; /* <= limit, for limit is a multiple of 32 */
    if (p->lowrank == NULL && run_thin(cpu, e, p, kc)) return;
    int64_t passes = tp_mm_ceil(p->n, ROWS_MAX);
    pass s = {.cpu = cpu, .e = e, .p = p, .kc = kc, .direct = goes_direct(&p->out)};
    s.left = (float *)(void *)cpu->workspace;
    s.down = (float *)(void *)(cpu->workspace + LEFT_BYTES);
    s.tail = p->lowrank != NULL ? tp_mm_ceil(p->lowrank->rank, e->per_word) : 0;
    for (int64_t i = 0; i < passes; i++) {
        s.row0 = i * p->n / passes;
        s.rows = (i + 1) * p->n / passes - s.row0;
        s.n_panels = tp_mm_ceil(s.rows, e->mr);
        s.panel_rows = tp_mm_ceil(s.rows, s.n_panels); /* 16 rows as 8 + 8: a tile of 2 would stall on latency */
        s.n_panels = tp_mm_ceil(s.rows, s.panel_rows);
        s.in_place = reads_in_place(&s);
        run_rows(&s);
    }
}

const tp_mm_engine *tp_mm_engine_for(const tp_cpu *cpu, tp_dtype precision)
{
#if defined(__x86_64__)
    if (cpu->isa == TP_CPU_AVX512) return precision == TP_BF16 && cpu->bf16_dot ? &tp_mm_bf16_dot : &tp_mm_avx512;
    if (cpu->isa == TP_CPU_AVX2) return &tp_mm_avx2;
#endif
    (void)cpu;
    (void)precision;
    return &tp_mm_generic;
}

/* c = beta * c + bias + residual, for k = 0. */
static void finish_without_sums(const tp_mm_product *p)
{
    static const float zeros[TP_MM_TILE_MAX];
    for (int64_t i = 0; i < p->n; i++) {
        for (int64_t j = 0; j < p->m; j += TP_MM_TILE_MAX)
            tp_mm_generic_finish(&p->out, i, 1, j, tp_mm_min(TP_MM_TILE_MAX, p->m - j), zeros, TP_MM_TILE_MAX);
    }
}

/* Its shape is checked: rows x cols as the product needs them. */
static tp_status right_of(tp_ctx *ctx, const tp_matrix *b, bool nt, tp_mm_right *right)
{
    if (b->format < 0 || b->format >= TP_FORMAT_COUNT)
        return tp_fail(ctx, TP_UNSUPPORTED, "matmul: the cpu backend has no weight format number %d", (int)b->format);
    const tp_format *f = &tp_formats[b->format];
    if (b->transposed && (!f->dense || b->rope_pairs > 0))
        return tp_fail(ctx, TP_UNSUPPORTED, "matmul: a transposed matrix must be dense and in plain row order");
    int64_t stored_cols = b->transposed ? b->rows : b->cols;
    *right = (tp_mm_right){
        .format = b->format,
        .data = b->data,
        .row_bytes = f->dense && b->stride > 0 ? b->stride * f->block_bytes : tp_format_row_bytes(b->format, stored_cols),
        .rope_pairs = b->rope_pairs,
        .k = nt ? b->cols : b->rows,
        .m = nt ? b->rows : b->cols,
        .along_k = nt != b->transposed,
        .round_bf16 = b->round_bf16 && b->format != TP_FORMAT_BF16,
    };
    return TP_OK;
}

static tp_status right_fits(tp_ctx *ctx, const char *what, const tp_mm_right *b, int64_t k, int64_t m)
{
    if (b->k == k && b->m == m) return TP_OK;
    return tp_fail(ctx, TP_INTERNAL, "matmul: the %s is %lld x %lld, the product needs %lld x %lld", what, (long long)b->k,
                   (long long)b->m, (long long)k, (long long)m);
}

static tp_status lowrank_of(tp_ctx *ctx, const tp_matmul_args *args, tp_mm_lowrank *lowrank)
{
    const tp_lowrank_args *l = args->lowrank;
    *lowrank = (tp_mm_lowrank){.rank = l->rank, .scaling = l->scaling, .low = l->low};
    TP_TRY(right_of(ctx, &l->up, args->nt, &lowrank->up));
    TP_TRY(right_fits(ctx, "low-rank part's up side", &lowrank->up, l->rank, args->m));
    if (l->down.data == NULL) return TP_OK;
    TP_TRY(right_of(ctx, &l->down, args->nt, &lowrank->down));
    return right_fits(ctx, "low-rank part's down side", &lowrank->down, args->k, l->rank);
}

static tp_status run_parts(tp_ctx *ctx, const tp_mm_engine *engine, const tp_matmul_args *args)
{
    tp_matmul_args parts[TP_LOWRANK_PARTS];
    int n = tp_lowrank_split(args, parts);
    for (int i = 0; i < n; i++) TP_TRY(tp_mm_run(ctx, engine, &parts[i]));
    return TP_OK;
}

tp_status tp_mm_run(tp_ctx *ctx, const tp_mm_engine *engine, const tp_matmul_args *args)
{
    tp_cpu *cpu = tp_cpu_of(ctx);
    tp_mm_lowrank lowrank;
    tp_mm_product p = {.n = args->n, .m = args->m, .k = args->k, .left = args->a};
    p.out = (tp_mm_out){args->c, args->alpha, args->beta, args->bias, args->residual, args->residual_ld, false};
    TP_TRY(right_of(ctx, &args->b, args->nt, &p.right));
    if (p.n <= 0 || p.m <= 0) return TP_OK;
    TP_TRY(right_fits(ctx, "right side", &p.right, p.k, p.m));
    if (args->lowrank != NULL) {
        TP_TRY(lowrank_of(ctx, args, &lowrank));
        p.lowrank = &lowrank;
        if (!tp_mm_folds(cpu, engine, &p)) return run_parts(ctx, engine, args);
    }
    if (p.k <= 0)
        finish_without_sums(&p);
    else if (p.n < TP_MM_FEW)
        tp_mm_few(cpu, engine, &p);
    else
        tp_mm_blocked(cpu, engine, &p);
    return TP_OK;
}

tp_status tp_cpu_matmul(tp_ctx *ctx, const void *arguments)
{
    const tp_matmul_args *args = arguments;
    return tp_mm_run(ctx, tp_mm_engine_for(tp_cpu_of(ctx), args->precision), args);
}

/* c = a^T b is the product of a, transposed, with b as the right side. The side with more columns becomes the right one:
 * it is read in place of being transposed, and panels are wide. */
tp_status tp_cpu_matmul_tn(tp_ctx *ctx, const void *arguments)
{
    const tp_matmul_tn_args *args = arguments;
    bool swap = args->m > args->k;
    const tp_rows *left = swap ? &args->b : &args->a, *right = swap ? &args->a : &args->b;
    int64_t n = swap ? args->k : args->m, m = swap ? args->m : args->k;
    tp_mm_product p = {.n = n, .m = m, .k = args->n, .left = *left, .left_transposed = true};
    p.out = (tp_mm_out){.c = {args->c, TP_F32, args->k}, .alpha = args->alpha, .beta = args->beta, .transposed = swap};
    tp_format_id format = right->dtype == TP_BF16 ? TP_FORMAT_BF16 : TP_FORMAT_F32;
    p.right = (tp_mm_right){.format = format, .data = right->data, .k = args->n, .m = m};
    p.right.row_bytes = right->ld * tp_formats[format].block_bytes;
    if (n <= 0 || m <= 0) return TP_OK;
    tp_cpu *cpu = tp_cpu_of(ctx);
    if (args->n <= 0)
        finish_without_sums(&p);
    else
        tp_mm_blocked(cpu, tp_mm_engine_for(cpu, TP_F32), &p);
    return TP_OK;
}
