/* Products of 1 to 7 rows: decoding. The weights are read once, in their order in memory; that takes all the time, so the
 * rest is arranged around it. Each thread takes whole stored rows (dot products), or, where k runs across stored rows, a
 * range of columns to which it adds row after row. A sum's order depends on k alone. */
#include <string.h>

#include "backend/cpu/matmul.h"

/* Bytes of the right side that an item should read at least, and columns that it may hold sums for. */
#define ITEM_BYTES ((int64_t)64 << 10)
#define ITEM_COLS  ((int64_t)2048)

typedef struct few {
    tp_cpu *cpu;
    const tp_mm_engine *e;
    const tp_mm_product *p;
    const float *x;
    int64_t ld; /* of x */
    int64_t item_cols;
} few;

static void few_item(void *arg, int64_t item, int thread)
{
    const few *s = arg;
    const tp_mm_product *p = s->p;
    float *sums = tp_cpu_scratch(s->cpu, thread);
    int64_t col = item * s->item_cols, cols = tp_mm_min(s->item_cols, p->m - col);
    if (p->right.along_k)
        s->e->dot(&p->right, col, cols, (int)p->n, s->x, s->ld, sums, s->item_cols);
    else
        s->e->axpy(&p->right, col, cols, (int)p->n, s->x, s->ld, sums, s->item_cols);
    s->e->finish(&p->out, 0, p->n, col, cols, sums, s->item_cols);
}

/* The left side as f32; behind each row zeros up to a multiple of 32 values, then the sums of 32 values each. */
static float *widen(const tp_mm_product *p, unsigned char *workspace, int64_t ld)
{
    float *x = (float *)(void *)workspace;
    size_t bytes = tp_dtype_bytes(p->left.dtype);
    int64_t blocks = tp_mm_ceil(p->k, 32);
    for (int64_t i = 0; i < p->n; i++) {
        const unsigned char *row = (const unsigned char *)p->left.data + (size_t)(i * p->left.ld) * bytes;
        float *to = x + i * ld, *block_sums = to + blocks * 32;
        tp_convert_to_f32(p->left.dtype, row, (size_t)p->k, to);
        memset(to + p->k, 0, (size_t)(ld - p->k) * sizeof *x);
        for (int64_t b = 0; p->right.format == TP_FORMAT_Q4_1 && b < blocks; b++) {
            for (int j = 0; j < 32; j++) block_sums[b] += to[b * 32 + j];
        }
    }
    return x;
}

void tp_mm_few(tp_cpu *cpu, const tp_mm_engine *e, const tp_mm_product *p)
{
    int64_t blocks = tp_mm_ceil(p->k, 32), ld = blocks * 32 + tp_mm_ceil(blocks, 16) * 16;
    if (p->n * ld * (int64_t)sizeof(float) > (int64_t)TP_CPU_WORKSPACE_BYTES) { /* rows of over 500,000 values */
        tp_mm_blocked(cpu, e, p);
        return;
    }
    few s = {.cpu = cpu, .e = e, .p = p, .ld = ld};
    s.x = widen(p, cpu->workspace, ld);
    const tp_format *f = &tp_formats[p->right.format];
    int64_t col_bytes = tp_mm_ceil(p->k * f->block_bytes, f->block);
    int64_t cols = tp_mm_ceil(tp_mm_ceil(ITEM_BYTES, col_bytes), 32) * 32;
    /* Across stored rows few columns would mean a jump in memory every few hundred bytes. */
    int64_t share = tp_mm_ceil(tp_mm_ceil(p->m, cpu->device.threads), 32) * 32;
    if (!p->right.along_k && cols < share) cols = share;
    s.item_cols = tp_mm_min(cols, ITEM_COLS);
    tp_cpu_for(cpu, tp_mm_ceil(p->m, s.item_cols), few_item, &s);
}
