/* Low-rank parts as products of their own; lowrank.h. */
#include "backend/lowrank.h"

int tp_lowrank_split(const tp_matmul_args *args, tp_matmul_args parts[TP_LOWRANK_PARTS])
{
    const tp_lowrank_args *l = args->lowrank;
    int n = l->down.data != NULL ? 1 : 0;
    if (n > 0)
        parts[0] = (tp_matmul_args){.n = args->n,
                                    .m = l->rank,
                                    .k = args->k,
                                    .a = args->a,
                                    .b = l->down,
                                    .nt = args->nt,
                                    .c = l->low,
                                    .alpha = l->scaling,
                                    .precision = args->precision};
    parts[n] = *args;
    parts[n].lowrank = NULL;
    parts[n + 1] = (tp_matmul_args){.n = args->n,
                                    .m = args->m,
                                    .k = l->rank,
                                    .a = l->low,
                                    .b = l->up,
                                    .nt = args->nt,
                                    .c = args->c,
                                    .alpha = args->alpha,
                                    .beta = 1,
                                    .precision = args->precision};
    return n + 2;
}

/* Where a part begins: its rows of the weight, its columns of the margin. */
static void begin_of(const tp_lowrank_backward_args *args, int part, int64_t *row, int64_t *column)
{
    *row = *column = 0;
    for (int i = 0; i < part; i++) *row += args->rows[i], *column += args->rank[i];
}

static tp_rows from(tp_rows rows, int64_t row, int64_t column)
{
    rows.data = (char *)rows.data + (size_t)(row * rows.ld + column) * tp_dtype_bytes(rows.dtype);
    return rows;
}

tp_matmul_args tp_lowrank_du(const tp_lowrank_backward_args *args, int part)
{
    int64_t row, column;
    begin_of(args, part, &row, &column);
    tp_matrix b = tp_matrix_dense(args->b.dtype, from(args->b, row, column).data, args->rows[part], args->rank[part]);
    b.stride = args->b.ld;
    return (tp_matmul_args){.n = args->n,
                            .m = args->rank[part],
                            .k = args->rows[part],
                            .a = from(args->dy, 0, row),
                            .b = b,
                            .c = from(args->du, 0, column),
                            .alpha = 1,
                            .precision = args->dy.dtype};
}

tp_matmul_tn_args tp_lowrank_db(const tp_lowrank_backward_args *args, int part)
{
    int64_t row, column;
    begin_of(args, part, &row, &column);
    return (tp_matmul_tn_args){.n = args->n,
                               .m = args->rows[part],
                               .k = args->rank[part],
                               .a = from(args->dy, 0, row),
                               .b = from(args->u, 0, column),
                               .c = args->db[part],
                               .alpha = args->scaling[part],
                               .beta = 1};
}

tp_status tp_swiglu_factors_apart(tp_ctx *ctx, const tp_swiglu_factors_args *args)
{
    const tp_swiglu_backward_args *g = &args->swiglu;
    bool before = false;
    TP_TRY(tp_run_swiglu_backward(ctx, g));
    for (int i = 0; i < TP_PACKED_PARTS; i++) before = before || args->before.rank[i] > 0;
    if (before) TP_TRY(tp_run_lowrank_backward(ctx, &args->before));
    if (args->behind.c == NULL) return TP_OK;
    tp_swiglu_args again = {.n = g->n, .dim = g->dim, .gate = g->gate, .up = g->up, .y = g->dy};
    tp_matmul_tn_args behind = args->behind;
    behind.b = g->dy;
    TP_TRY(tp_run_swiglu(ctx, &again));
    return tp_run_matmul_tn(ctx, &behind);
}

/* ---- behind dropout ---- */

bool tp_drops_in_products(const tp_device *device, tp_dtype dtype, int64_t in, const int64_t rank[TP_PACKED_PARTS])
{
    bool fine = device->drops_in_products && dtype == TP_BF16 && in % 64 == 0;
    for (int i = 0; i < TP_PACKED_PARTS; i++) fine = fine && rank[i] % 8 == 0 && rank[i] <= 32;
    return fine;
}

static tp_dropout_args dropout_of(const tp_dropped_args *args, int part, tp_rows x, tp_rows y)
{
    return (tp_dropout_args){.n = args->n,
                             .dim = args->in,
                             .x = x,
                             .y = y,
                             .p = args->p[part],
                             .key = args->key[part],
                             .first_row = args->first_row,
                             .state = args->state};
}

static tp_matrix factor_of(const tp_dropped_args *args, int part, int64_t row)
{
    tp_matrix a = tp_matrix_dense(args->a.dtype, from(args->a, row, 0).data, args->rank[part], args->in);
    a.stride = args->a.ld;
    return a;
}

tp_status tp_dropped_down_apart(tp_ctx *ctx, const tp_dropped_args *args)
{
    for (int64_t i = 0, column = 0; i < TP_PACKED_PARTS; column += args->rank[i++]) {
        if (args->rank[i] == 0) continue;
        tp_dropout_args drop = dropout_of(args, (int)i, args->x, args->scratch);
        tp_matmul_args down = {.n = args->n,
                               .m = args->rank[i],
                               .k = args->in,
                               .a = args->scratch,
                               .b = factor_of(args, (int)i, column),
                               .nt = true,
                               .c = from(args->low, 0, column),
                               .alpha = 1,
                               .precision = args->x.dtype};
        TP_TRY(tp_run_dropout(ctx, &drop));
        TP_TRY(tp_run_matmul(ctx, &down));
    }
    return TP_OK;
}

tp_status tp_dropped_gradient_apart(tp_ctx *ctx, const tp_dropped_args *args)
{
    for (int64_t i = 0, column = 0; i < TP_PACKED_PARTS; column += args->rank[i++]) {
        if (args->rank[i] == 0 || args->da[i] == NULL) continue;
        tp_dropout_args drop = dropout_of(args, (int)i, args->x, args->scratch);
        tp_matmul_tn_args gradient = {.n = args->n,
                                      .m = args->rank[i],
                                      .k = args->in,
                                      .a = from(args->low, 0, column),
                                      .b = args->scratch,
                                      .c = args->da[i],
                                      .alpha = 1,
                                      .beta = 1};
        TP_TRY(tp_run_dropout(ctx, &drop));
        TP_TRY(tp_run_matmul_tn(ctx, &gradient));
    }
    return TP_OK;
}

tp_status tp_dropped_up_apart(tp_ctx *ctx, const tp_dropped_args *args)
{
    for (int64_t i = 0, column = 0; i < TP_PACKED_PARTS; column += args->rank[i++]) {
        if (args->rank[i] == 0) continue;
        tp_matmul_args up = {.n = args->n,
                             .m = args->in,
                             .k = args->rank[i],
                             .a = from(args->low, 0, column),
                             .b = factor_of(args, (int)i, column),
                             .c = args->scratch,
                             .alpha = 1,
                             .precision = args->dx.dtype};
        tp_dropout_args drop = dropout_of(args, (int)i, args->scratch, args->dx);
        drop.accumulate = true;
        TP_TRY(tp_run_matmul(ctx, &up));
        TP_TRY(tp_run_dropout(ctx, &drop));
    }
    return TP_OK;
}
