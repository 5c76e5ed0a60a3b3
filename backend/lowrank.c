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

tp_matmul_args tp_lowrank_du(const tp_lowrank_backward_args *args)
{
    tp_matrix b = tp_matrix_dense(args->b.dtype, args->b.data, args->out, args->rank);
    b.stride = args->b.ld;
    return (tp_matmul_args){.n = args->n,
                            .m = args->rank,
                            .k = args->out,
                            .a = args->dy,
                            .b = b,
                            .c = args->du,
                            .alpha = 1,
                            .precision = args->dy.dtype};
}

tp_matmul_tn_args tp_lowrank_db(const tp_lowrank_backward_args *args)
{
    return (tp_matmul_tn_args){.n = args->n,
                               .m = args->out,
                               .k = args->rank,
                               .a = args->dy,
                               .b = args->u,
                               .c = args->db,
                               .alpha = args->scaling,
                               .beta = 1};
}
