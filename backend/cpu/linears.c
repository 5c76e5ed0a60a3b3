/* Linears of few rows: the CPU has nothing to gain from one pass, so they are the kernels that they stand for, one by one. */
#include "backend/cpu/cpu.h"

static tp_matmul_args product_of(const tp_linears_args *a, int i, tp_rows x)
{
    const tp_linears_part *part = &a->parts[i];
    return (tp_matmul_args){.n = a->n,
                            .m = part->w.rows,
                            .k = a->k,
                            .a = x,
                            .b = part->w,
                            .nt = true,
                            .c = part->y,
                            .alpha = 1,
                            .bias = part->bias,
                            .residual = i == 0 && !a->swiglu ? a->residual : NULL,
                            .residual_ld = a->residual_ld,
                            .precision = a->precision,
                            .lowrank = part->lowrank};
}

static tp_status swiglu(tp_ctx *ctx, const tp_linears_args *a)
{
    tp_rows y = a->parts[0].y;
    tp_swiglu_args args = {.n = a->n, .dim = a->parts[0].w.rows, .gate = y, .up = a->parts[1].y, .y = y};
    TP_TRY(tp_cpu_swiglu(ctx, &args));
    if (a->residual == NULL) return TP_OK;
    tp_add_args add = {.n = args.n, .dim = args.dim, .x = y, .z = y};
    add.y = (tp_rows){(char *)(uintptr_t)a->residual, y.dtype, a->residual_ld};
    return tp_cpu_add(ctx, &add);
}

tp_status tp_cpu_linears(tp_ctx *ctx, const void *arguments)
{
    const tp_linears_args *a = arguments;
    tp_rows x = a->x;
    if (a->norm_weight != NULL) {
        tp_rmsnorm_args norm = {.n = a->n, .dim = a->k, .x = x, .y = a->normed, .weight = a->norm_weight, .eps = a->eps};
        TP_TRY(tp_cpu_rmsnorm(ctx, &norm));
        x = a->normed;
    }
    for (int i = 0; i < a->n_parts; i++) {
        tp_matmul_args product = product_of(a, i, x);
        TP_TRY(tp_cpu_matmul(ctx, &product));
    }
    return a->swiglu ? swiglu(ctx, a) : TP_OK;
}
