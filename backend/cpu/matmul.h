/* Inside of the CPU's matrix products: what the driver (matmul.c), the engines (one per instruction set) and the product
 * for few rows (matmul_few.c) share.
 *
 * Every product is  out [n, m] = finish(left [n, k] times right [k, m]):
 *
 *      right: a group of panels,             the driver cuts k into blocks of kc and columns into panels of `nr`. A thread
 *      kc x nr each, in L2    +--+--+        takes a group of panels, unpacks its blocks of the right side into L2, from any
 *                             |  |  |        format, and runs the row panels of the left side over them, one after the other.
 *      left, packed into      |  |  |        The left side was packed before, into the workspace, by all threads together.
 *      row panels of mr       +--+--+
 *      +--------------+       +--+           A tile of mr x nr sums lives in registers during one block of k, in which both
 *      |  mr x kc     |  ->   |tile          panels stream through L1; then it goes straight to the result where that is
 *      +--------------+       +--+           f32. Blocks are added in ascending order: a sum's order depends on k alone,
 *                                            neither on n, nor on m, nor on threads.
 *
 * A panel of the left side is not transposed: it holds, for every 16 words of k, mr rows of 16 words (64 bytes), so packing
 * is copying; the tile loop broadcasts single words. A word is an f32, or two bf16 for vdpbf16ps: the layouts are the same. */
#ifndef TP_BACKEND_CPU_MATMUL_H
#define TP_BACKEND_CPU_MATMUL_H

#include "backend/cpu/cpu.h"

/* Words of k in one run of a left panel. */
#define TP_MM_RUN 16
/* Largest mr * nr of an engine. */
#define TP_MM_TILE_MAX (14 * 32)
/* Most words of k in a block. The panel of the right side that a tile passes takes 72 KiB: it comes from L2, at 9 bytes a
 * cycle, which the hardware keeps up with; shorter blocks would have sums go to memory and back more often. */
#define TP_MM_KC_WORDS 576
/* Most words that a low-rank part adds behind the last block. */
#define TP_MM_TAIL_WORDS 64
/* Products of fewer rows go by matmul_few.c, whose sums have another order. */
#define TP_MM_FEW 8

/* The right side: a matrix as panels see it. */
typedef struct tp_mm_right {
    tp_format_id format;
    const unsigned char *data;
    int64_t row_bytes;  /* from one stored row to the next */
    int64_t rope_pairs; /* of stored rows; 0: none */
    int64_t k, m;
    bool along_k; /* stored rows are columns of the product, k runs along them; else the other way round */
    bool round_bf16;
} tp_mm_right;

/* What happens to the sums. */
typedef struct tp_mm_out {
    tp_rows c;
    float alpha, beta;
    const float *bias;
    const void *residual; /* dtype of c */
    int64_t residual_ld;
    bool transposed; /* sum [i, j] goes to c[j, i]; f32, no bias or residual */
} tp_mm_out;

/* What a tile multiplies, and where its sums go. */
typedef struct tp_mm_tile {
    int rows, cols; /* <= mr, nr. Columns from `cols` on are not written */
    int64_t words;  /* of k */
    const void *left;
    const void *right; /* rows of nr words, `right_ld` apart: an unpacked panel, or the matrix itself where it is f32 */
    int64_t right_ld;
    const float *from; /* to [rows][ld] = sums + from [rows][from_ld]; NULL: 0 */
    int64_t from_ld;
    float *to;
    int64_t ld;
} tp_mm_tile;

typedef struct tp_mm_engine {
    const char *name;
    int mr, nr;
    int per_word; /* values of k in a word: 1 or 2 */
    /* Values k0 .. k0+kc of `rows` rows of a from `row` on, to a left panel; rounded up to whole runs with zeros. */
    void (*pack)(const tp_rows *a, int64_t row, int rows, int64_t k0, int64_t kc, void *panel);
    /* The same where a is stored as [k, rows]; NULL in engines with two values a word. */
    void (*pack_transposed)(const tp_rows *a, int64_t row, int rows, int64_t k0, int64_t kc, void *panel);
    /* Values k0 .. k0+kc of columns col .. col+cols to a panel [words of kc][nr]; columns from `cols` on are zero. k0 is a
     * multiple of 32 along k, else of 8; col of nr. */
    void (*unpack)(const tp_mm_right *b, int64_t k0, int64_t kc, int64_t col, int cols, void *panel);
    /* Left panel times right panel. */
    void (*tile)(const tp_mm_tile *t);
    /* c[row.., col..] from sums [rows][ld]. */
    void (*finish)(const tp_mm_out *out, int64_t row, int64_t rows, int64_t col, int64_t cols, const float *sums, int64_t ld);
    /* For few rows: x [n][ld] f32 with zeros up to the next multiple of 32 values, then the sum of each 32 values, with
     * zeros up to a multiple of 16; sums [n][ld_sums]; n < TP_MM_FEW.
     * dot (along_k): columns col .. col+cols; the rest up to b->m may be read next. Where rows are in rotary order, these are
     * whole heads. axpy (not along_k): columns too; col is a multiple of 32. */
    void (*dot)(const tp_mm_right *b, int64_t col, int64_t cols, int n, const float *x, int64_t ld, float *sums,
                int64_t ld_sums);
    void (*axpy)(const tp_mm_right *b, int64_t col, int64_t cols, int n, const float *x, int64_t ld, float *sums,
                 int64_t ld_sums);
} tp_mm_engine;

extern const tp_mm_engine tp_mm_generic;
#if defined(__x86_64__)
extern const tp_mm_engine tp_mm_avx2, tp_mm_avx512, tp_mm_bf16_dot;
/* tp_mm_avx2's dot where nothing is rounded. */
void tp_mm_avx2_dot(const tp_mm_right *b, int64_t col, int64_t cols, int n, const float *x, int64_t ld, float *sums,
                    int64_t ld_sums);
/* The tile of tp_mm_bf16_dot in plain C, so that its packing can be tested on any CPU. */
void tp_mm_bf16_dot_tile_plain(const tp_mm_tile *t);
#endif

/* The low-rank part of a product: `rank` more columns of the left side (`low`), and as many more rows of the right side
 * (`up`). low = scaling * left times down, or given (down.data is NULL). */
typedef struct tp_mm_lowrank {
    int64_t rank;
    float scaling;
    tp_rows low; /* [n, rank] f32 */
    tp_mm_right down, up;
} tp_mm_lowrank;

/* One product. `left` is [n, k], or [k, n] if left_transposed. */
typedef struct tp_mm_product {
    int64_t n, m, k;
    tp_rows left;
    bool left_transposed;
    tp_mm_right right;
    tp_mm_out out;
    const tp_mm_lowrank *lowrank; /* NULL: none */
} tp_mm_product;

/* The blocked product, for n >= TP_MM_FEW. A low-rank part must have passed tp_mm_folds. */
void tp_mm_blocked(tp_cpu *cpu, const tp_mm_engine *engine, const tp_mm_product *p);
/* Whether the blocked product can take its low-rank part along; else it is up to three products. */
bool tp_mm_folds(const tp_cpu *cpu, const tp_mm_engine *engine, const tp_mm_product *p);
/* The same by OpenBLAS, if cpu->openblas is there; the sums' order may then depend on n and m. */
void tp_mm_openblas(tp_cpu *cpu, const tp_mm_product *p);
/* The product for n < TP_MM_FEW, reading the right side once, in its order in memory; left not transposed. */
void tp_mm_few(tp_cpu *cpu, const tp_mm_engine *engine, const tp_mm_product *p);
/* Whether it can take its low-rank part along. */
bool tp_mm_few_folds(const tp_mm_product *p);

/* tp_cpu_matmul with a given engine. */
tp_status tp_mm_run(tp_ctx *ctx, const tp_mm_engine *engine, const tp_matmul_args *args);

/* The engine for a product of this precision on this CPU. */
const tp_mm_engine *tp_mm_engine_for(const tp_cpu *cpu, tp_dtype precision);

static inline int64_t tp_mm_ceil(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}
static inline int64_t tp_mm_min(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Stored row `index` of the right side, counted in logical order. */
static inline const unsigned char *tp_mm_stored_row(const tp_mm_right *b, int64_t index)
{
    if (b->rope_pairs > 0) {
        int64_t hd = b->rope_pairs, head = index / hd, in = index % hd;
        index = head * hd + (in < hd / 2 ? 2 * in : 2 * (in - hd / 2) + 1);
    }
    return b->data + index * b->row_bytes;
}

/* The scalar definitions that vector code falls back to (matmul_generic.c). */
/* Values first .. first+n of a stored row, n <= 32 and within one block of 32; rounded if the matrix says so. */
void tp_mm_decode(const tp_mm_right *b, const unsigned char *row, int64_t first, int64_t n, float *out);
void tp_mm_generic_finish(const tp_mm_out *out, int64_t row, int64_t rows, int64_t col, int64_t cols, const float *sums,
                          int64_t ld);

#endif
