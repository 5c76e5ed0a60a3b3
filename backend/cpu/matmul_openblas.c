/* The blocked product by OpenBLAS, for CPUs where our own engine is plain C: both sides are decoded to f32 block by block
 * into a thread's scratch, and OpenBLAS, on one thread of its own, multiplies the blocks. Items are blocks of the result, so
 * the bits do not depend on threads; how OpenBLAS sums inside a block may depend on the block's size. */
#include "backend/cpu/matmul.h"
#include "backend/cpu/openblas.h"

/* Sizes of a block: 128 KiB of the left side, 256 KiB of the right, 128 KiB of sums. */
enum { ROWS = 128, COLS = 256, DEPTH = 256 };

_Static_assert((ROWS * DEPTH + DEPTH * COLS + ROWS * COLS) * sizeof(float) <= TP_CPU_SCRATCH_BYTES,
               "a block must fit the scratch");

typedef struct job {
    tp_cpu *cpu;
    const tp_mm_product *p;
    int64_t col_blocks;
} job;

static void decode_left(const tp_mm_product *p, int64_t row, int64_t rows, int64_t k, int64_t kc, float *out)
{
    const unsigned char *data = p->left.data;
    int64_t size = (int64_t)tp_dtype_bytes(p->left.dtype), ld = p->left.ld;
    if (!p->left_transposed) {
        for (int64_t r = 0; r < rows; r++)
            tp_convert_to_f32(p->left.dtype, data + ((row + r) * ld + k) * size, (size_t)kc, out + r * DEPTH);
        return;
    }
    float line[ROWS];
    for (int64_t i = 0; i < kc; i++) {
        tp_convert_to_f32(p->left.dtype, data + ((k + i) * ld + row) * size, (size_t)rows, line);
        for (int64_t r = 0; r < rows; r++) out[r * DEPTH + i] = line[r];
    }
}

/* Stored rows as they are: [cols][DEPTH] if k runs along them, else [kc][COLS]. */
static void decode_right(const tp_mm_right *b, int64_t k, int64_t kc, int64_t col, int64_t cols, float *out)
{
    int64_t rows = b->along_k ? cols : kc, first = b->along_k ? col : k, from = b->along_k ? k : col,
            n = b->along_k ? kc : cols;
    int64_t ld = b->along_k ? DEPTH : COLS;
    for (int64_t r = 0; r < rows; r++) {
        const unsigned char *row = tp_mm_stored_row(b, first + r);
        for (int64_t i = 0; i < n; i += 32) tp_mm_decode(b, row, from + i, tp_mm_min(32, n - i), out + r * ld + i);
    }
}

static void multiply(void *arg, int64_t item, int thread)
{
    const job *s = arg;
    const tp_mm_product *p = s->p;
    float *left = tp_cpu_scratch(s->cpu, thread), *right = left + ROWS * DEPTH, *sums = right + DEPTH * COLS;
    int64_t row = item / s->col_blocks * ROWS, col = item % s->col_blocks * COLS;
    int64_t rows = tp_mm_min(ROWS, p->n - row), cols = tp_mm_min(COLS, p->m - col);
    for (int64_t k = 0; k < p->k; k += DEPTH) {
        int64_t kc = tp_mm_min(DEPTH, p->k - k);
        decode_left(p, row, rows, k, kc, left);
        decode_right(&p->right, k, kc, col, cols, right);
        tp_openblas_sgemm(s->cpu->openblas, p->right.along_k, rows, cols, kc, left, DEPTH, right,
                          p->right.along_k ? DEPTH : COLS, k > 0 ? 1.0f : 0.0f, sums, COLS);
    }
    tp_mm_generic_finish(&p->out, row, rows, col, cols, sums, COLS);
}

void tp_mm_openblas(tp_cpu *cpu, const tp_mm_product *p)
{
    job s = {cpu, p, tp_mm_ceil(p->m, COLS)};
    tp_cpu_for(cpu, tp_mm_ceil(p->n, ROWS) * s.col_blocks, multiply, &s);
}
