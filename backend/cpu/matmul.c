/* Matrix products: argument checks, the choice of engine, and the blocked driver. matmul.h has the picture. */
#include "backend/cpu/matmul.h"

/* Shares of the workspace: packed left side, and sums that wait for the next chunk of k. */
#define LEFT_BYTES ((int64_t)10 << 20)
#define SUMS_BYTES ((int64_t)4 << 20)
/* Most rows packed at once: 37 panels of 14. Their block of kc words, 0.5 MiB, stays in L2 while panels pass. */
#define ROWS_MAX 518
/* Most columns of an item: the sums of 518 rows take 0.25 MiB of scratch. */
#define ITEM_COLS 128
/* Left panels that one item packs. */
#define PACK_PANELS 4

_Static_assert(LEFT_BYTES + SUMS_BYTES <= (int64_t)TP_CPU_WORKSPACE_BYTES, "the shares must fit");

/* One pass: some rows, some columns, one chunk of k. */
typedef struct pass {
    tp_cpu *cpu;
    const tp_mm_engine *e;
    const tp_mm_product *p;
    int64_t row0, rows; /* of this pass */
    int64_t panel_rows; /* rows per left panel; the last may have fewer */
    int64_t n_panels;
    int64_t k0, k_end, kc; /* the chunk, and the block size in values */
    int64_t col0, col_end; /* columns; col0 is a multiple of nr */
    int64_t item_cols;     /* columns of one item, a multiple of nr */
    int64_t splits;        /* parts into which the rows of an item's panels are cut */
    float *left;           /* packed: [block][panel][words of block][panel_rows] */
    float *sums;           /* [column panel][row panel][tile], or NULL where k is one chunk */
} pass;

static int64_t block_words(const pass *s, int64_t k) /* words of the block at k, rounded up to whole runs */
{
    int64_t kc = tp_mm_min(s->kc, s->k_end - k);
    return tp_mm_ceil(tp_mm_ceil(kc, s->e->per_word), TP_MM_RUN) * TP_MM_RUN;
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

static void pack_item(void *arg, int64_t item, int thread)
{
    (void)thread;
    const pass *s = arg;
    int64_t end = tp_mm_min((item + 1) * PACK_PANELS, s->n_panels);
    for (int64_t k = s->k0; k < s->k_end; k += s->kc) {
        for (int64_t panel = item * PACK_PANELS; panel < end; panel++) {
            int64_t row = s->row0 + panel * s->panel_rows, kc = tp_mm_min(s->kc, s->k_end - k);
            if (s->p->left_transposed)
                s->e->pack_transposed(&s->p->left, row, (int)rows_of(s, panel), k, kc, left_panel(s, k, panel));
            else
                s->e->pack(&s->p->left, row, (int)rows_of(s, panel), k, kc, left_panel(s, k, panel));
        }
    }
}

/* Asks for part `i` of `n` of the bytes that a panel will be unpacked from, while other sums are computed: panels are cut
 * across rows, so that the hardware does not foresee them. */
static void prefetch_right(const tp_mm_right *b, int64_t k, int64_t kc, int64_t col, int64_t cols, int64_t i, int64_t n)
{
    const tp_format *f = &tp_formats[b->format];
    int64_t rows = b->along_k ? cols : kc, row0 = b->along_k ? col : k;
    int64_t from = b->along_k ? k : col, count = b->along_k ? kc : cols;
    int64_t begin = from / f->block * f->block_bytes, bytes = tp_mm_ceil(count, f->block) * f->block_bytes;
    for (int64_t r = i * rows / n; r < (i + 1) * rows / n; r++) {
        const unsigned char *p = tp_mm_stored_row(b, row0 + r) + begin;
        for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(p + at, 0, 2);
        __builtin_prefetch(p + bytes - 1, 0, 2);
    }
}

/* The same for the elements of c that a tile will write. */
static void prefetch_tile(const tp_mm_out *out, int64_t row, int64_t rows, int64_t col, int64_t cols)
{
    if (out->transposed) return;
    int64_t size = out->c.dtype == TP_BF16 ? 2 : 4;
    for (int64_t r = row; r < row + rows; r++) {
        const unsigned char *p = (const unsigned char *)out->c.data + (r * out->c.ld + col) * size;
        for (int64_t at = 0; at < cols * size; at += 64) __builtin_prefetch(p + at, 1, 3);
        __builtin_prefetch(p + cols * size - 1, 1, 3);
    }
}

/* One block of k of one column panel times row panels `first` .. `end`. */
static void multiply_block(const pass *s, int64_t k, int64_t col, int64_t next_k, int64_t next_col, int64_t first, int64_t end,
                           float *right, float *sums)
{
    const tp_mm_engine *e = s->e;
    const tp_mm_product *p = s->p;
    int64_t kc = tp_mm_min(s->kc, s->k_end - k), words = tp_mm_ceil(kc, e->per_word), tile = (int64_t)e->mr * e->nr;
    int64_t step = s->kc >= p->k ? 0 : tile; /* of one block, each tile is finished before the next begins */
    int cols = (int)tp_mm_min(e->nr, s->col_end - col);
    bool last = k + kc == p->k;
    const float *left = left_panel(s, k, first);
    int64_t left_step = s->panel_rows * block_words(s, k);
    e->unpack(&p->right, k, kc, col, cols, right);
    for (int64_t panel = first; panel < end; panel++, left += left_step) {
        float *t = sums + (panel - first) * step;
        int64_t row = s->row0 + panel * s->panel_rows, rows = rows_of(s, panel);
        if (next_k < s->k_end)
            prefetch_right(&p->right, next_k, tp_mm_min(s->kc, s->k_end - next_k), next_col,
                           tp_mm_min(e->nr, s->col_end - next_col), panel - first, end - first);
        if (last) prefetch_tile(&p->out, row, rows, col, cols);
        e->tile((int)rows, cols, words, left, right, t, k > 0);
        if (last) e->finish(&p->out, row, rows, col, cols, t, e->nr);
    }
}

/* Some column panels times a range of row panels, over the chunk. k is the outer loop: while a block of k lasts, the left
 * side's part of it stays in L2 and serves all the panels. */
static void multiply_item(void *arg, int64_t item, int thread)
{
    const pass *s = arg;
    int64_t split = item % s->splits, nr = s->e->nr, tile = s->e->mr * nr;
    int64_t first = split * s->n_panels / s->splits, end = (split + 1) * s->n_panels / s->splits;
    int64_t col0 = s->col0 + item / s->splits * s->item_cols, col_end = tp_mm_min(s->col_end, col0 + s->item_cols);
    float *right = tp_cpu_scratch(s->cpu, thread), *sums = right + TP_MM_KC_WORDS * nr;
    if (s->sums != NULL) sums = s->sums + ((col0 - s->col0) / nr * s->n_panels + first) * tile;
    for (int64_t k = s->k0; k < s->k_end; k += s->kc) {
        for (int64_t col = col0; col < col_end; col += nr) {
            bool wraps = col + nr >= col_end;
            int64_t next_k = wraps ? k + s->kc : k, next_col = wraps ? col0 : col + nr;
            multiply_block(s, k, col, next_k, next_col, first, end, right, sums + (col - col0) / nr * s->n_panels * tile);
        }
    }
}

/* Items are panels, or a few neighbours where there are many. Where there
 * are too few for all threads, rows are cut as well, at the price of unpacking a panel more than once. */
static void run_pass(pass *s)
{
    int64_t threads = s->cpu->device.threads, panels = tp_mm_ceil(s->col_end - s->col0, s->e->nr), wanted = 3 * threads;
    tp_cpu_for(s->cpu, tp_mm_ceil(s->n_panels, PACK_PANELS), pack_item, s);
    int64_t group = panels / wanted;
    s->item_cols = (group < 1 ? 1 : tp_mm_min(group, ITEM_COLS / s->e->nr)) * s->e->nr;
    s->splits = 1;
    if (threads > 1 && panels < wanted) s->splits = tp_mm_min(tp_mm_ceil(wanted, panels), tp_mm_ceil(s->n_panels, PACK_PANELS));
    tp_cpu_for(s->cpu, tp_mm_ceil(s->col_end - s->col0, s->item_cols) * s->splits, multiply_item, s);
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
    int64_t group = SUMS_BYTES / 4 / (s->n_panels * tile) * e->nr;
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
#define THIN_COLS        64
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
    bool last = block + 1 == s->blocks;
    e->pack(&p->left, row, (int)rows, block * s->kc, tp_mm_min(s->kc, p->k - block * s->kc), left);
    for (int64_t col = 0; col < p->m; col += e->nr, sums += tile, right += words * e->nr) {
        int64_t cols = tp_mm_min(e->nr, p->m - col), next = col + e->nr;
        if (last && next < p->m) prefetch_tile(&p->out, row, rows, next, tp_mm_min(e->nr, p->m - next));
        e->tile((int)rows, (int)cols, words, left, right, sums, block > 0);
        if (last) e->finish(&p->out, row, rows, col, cols, sums, e->nr);
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
    if (run_thin(cpu, e, p, kc)) return;
    int64_t passes = tp_mm_ceil(p->n, ROWS_MAX);
    pass s = {.cpu = cpu, .e = e, .p = p, .kc = kc, .left = (float *)(void *)cpu->workspace};
    for (int64_t i = 0; i < passes; i++) {
        s.row0 = i * p->n / passes;
        s.rows = (i + 1) * p->n / passes - s.row0;
        s.n_panels = tp_mm_ceil(s.rows, e->mr);
        s.panel_rows = tp_mm_ceil(s.rows, s.n_panels); /* 16 rows as 8 + 8: a tile of 2 would stall on latency */
        s.n_panels = tp_mm_ceil(s.rows, s.panel_rows);
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

tp_status tp_mm_run(tp_ctx *ctx, const tp_mm_engine *engine, const tp_matmul_args *args)
{
    tp_mm_product p = {.n = args->n, .m = args->m, .k = args->k, .left = args->a};
    p.out = (tp_mm_out){args->c, args->alpha, args->beta, args->bias, args->residual, args->residual_ld, false};
    TP_TRY(right_of(ctx, &args->b, args->nt, &p.right));
    if (p.n <= 0 || p.m <= 0) return TP_OK;
    if (p.right.k != p.k || p.right.m != p.m)
        return tp_fail(ctx, TP_INTERNAL, "matmul: the right side is %lld x %lld, the product needs %lld x %lld",
                       (long long)args->b.rows, (long long)args->b.cols, (long long)(args->nt ? p.m : p.k),
                       (long long)(args->nt ? p.k : p.m));
    tp_cpu *cpu = tp_cpu_of(ctx);
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
