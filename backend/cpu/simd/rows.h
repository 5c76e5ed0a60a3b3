/* Loops over rows of activations, and sums down their columns. */
#ifndef TP_BACKEND_CPU_SIMD_ROWS_H
#define TP_BACKEND_CPU_SIMD_ROWS_H

#include "backend/cpu/cpu.h"
#include "backend/cpu/simd/vec.h"

TP_INLINE bool is_bf16(tp_rows x)
{
    return x.dtype == TP_BF16;
}
TP_INLINE bool is_activation(tp_dtype dtype)
{
    return dtype == TP_F32 || dtype == TP_BF16;
}

TP_INLINE void *row_at(tp_rows x, int64_t i)
{
    return (unsigned char *)x.data + (size_t)(i * x.ld) * (x.dtype == TP_BF16 ? 2 : 4);
}

/* Fails unless dtype is one that activations may have. */
TP_MUST_CHECK static inline tp_status check_dtype(tp_ctx *ctx, const char *kernel, tp_dtype dtype)
{
    if (is_activation(dtype)) return TP_OK;
    return tp_fail(ctx, TP_UNSUPPORTED, "%s: activations are %s, the CPU kernels take F32 and BF16", kernel,
                   tp_dtype_name(dtype));
}

/* The same for two arrays that must agree. */
TP_MUST_CHECK static inline tp_status check_dtypes(tp_ctx *ctx, const char *kernel, tp_dtype a, tp_dtype b)
{
    TP_TRY(check_dtype(ctx, kernel, a));
    if (a == b) return TP_OK;
    return tp_fail(ctx, TP_UNSUPPORTED, "%s: one array is %s, another %s", kernel, tp_dtype_name(a), tp_dtype_name(b));
}

/* Rows first .. end-1 of a kernel's work; scratch is the thread's. */
typedef void (*row_body)(const void *args, int64_t first, int64_t end, void *scratch);

typedef struct row_loop {
    tp_cpu *cpu;
    row_body body;
    const void *args;
    int64_t n, step;
} row_loop;

static void row_loop_item(void *arg, int64_t i, int thread)
{
    const row_loop *loop = arg;
    int64_t first = i * loop->step, end = first + loop->step < loop->n ? first + loop->step : loop->n;
    loop->body(loop->args, first, end, tp_cpu_scratch(loop->cpu, thread));
}

/* Runs body over n rows of dim elements, about 16 K elements at a time: a few microseconds of work that fit in L2. */
static inline void for_rows(tp_ctx *ctx, int64_t n, int64_t dim, row_body body, const void *args)
{
    int64_t step = dim > 0 && dim < 16384 ? 16384 / dim : 1;
    row_loop loop = {tp_cpu_of(ctx), body, args, n, step};
    if (n > 0 && dim > 0) tp_cpu_for(loop.cpu, (n + step - 1) / step, row_loop_item, &loop);
}

/* Sums down columns: one item owns SUM_COLUMNS of them and walks all rows in order, so nothing has to be merged. Rows are
 * first summed by 64, then those sums, which keeps the error of long columns small. */
#define SUM_VECTORS 4
#define SUM_COLUMNS (SUM_VECTORS * VL)

/* What row r adds to columns c .. c+VL-1, of which n exist. */
typedef vf (*column_term)(const void *args, int64_t r, int64_t c, int64_t n);

TP_INLINE void sum_columns(const void *args, int64_t rows, int64_t columns, int64_t item, column_term term, float *out,
                           bool add)
{
    int64_t first = item * SUM_COLUMNS;
    vf total[SUM_VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < SUM_VECTORS; v++) {
        int64_t c = first + v * VL;
        total[v] = add && c < columns ? v_load_n(out + c, columns - c) : v_set(0.0f);
    }
    for (int64_t r0 = 0; r0 < rows; r0 += 64) {
        int64_t r1 = r0 + 64 < rows ? r0 + 64 : rows;
        vf part[SUM_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < SUM_VECTORS; v++) part[v] = v_set(0.0f);
        for (int64_t r = r0; r < r1; r++) {
#pragma GCC unroll 4
            for (int v = 0; v < SUM_VECTORS; v++) {
                int64_t c = first + v * VL;
                if (c < columns) part[v] = part[v] + term(args, r, c, columns - c);
            }
        }
#pragma GCC unroll 4
        for (int v = 0; v < SUM_VECTORS; v++) total[v] = total[v] + part[v];
    }
#pragma GCC unroll 4
    for (int v = 0; v < SUM_VECTORS; v++) {
        int64_t c = first + v * VL;
        if (c < columns) v_store_n(out + c, columns - c, total[v]);
    }
}

/* Runs body(args, item, ...) for every block of SUM_COLUMNS columns. */
static inline void for_columns(tp_ctx *ctx, int64_t columns, row_body body, const void *args)
{
    row_loop loop = {tp_cpu_of(ctx), body, args, (columns + SUM_COLUMNS - 1) / SUM_COLUMNS, 1};
    tp_cpu_for(loop.cpu, loop.n, row_loop_item, &loop);
}

#endif
