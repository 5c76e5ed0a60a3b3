/* Low-rank factors into the margin of a stacked weight (they are few; plain loops will do), and what comes back to them. */
#include "backend/cpu/cpu.h"
#include "backend/lowrank.h"
#include "base/dtype.h"

static void put(tp_rows w, int64_t row, int64_t column, float value)
{
    int64_t at = row * w.ld + column;
    if (w.dtype == TP_BF16)
        ((uint16_t *)w.data)[at] = tp_f32_to_bf16(value);
    else
        ((float *)w.data)[at] = value;
}

static void pack_columns(const tp_pack_lowrank_args *args)
{
    int64_t row = 0, column = 0;
    for (int i = 0; i < TP_PACKED_PARTS; i++) {
        for (int64_t r = 0; r < args->rows[i]; r++)
            for (int64_t c = 0; c < args->used; c++) {
                bool own = c >= column && c < column + args->rank[i];
                float value = own ? args->scaling[i] * args->b[i][r * args->rank[i] + c - column] : 0.0f;
                put(args->w, row + r, args->in + c, value);
            }
        row += args->rows[i];
        column += args->rank[i];
    }
}

static void pack_rows(const tp_pack_lowrank_args *args)
{
    int64_t row = args->out;
    for (int i = 0; i < TP_PACKED_PARTS; i++)
        for (int64_t r = 0; r < args->rank[i]; r++, row++)
            for (int64_t c = 0; c < args->in; c++) put(args->w, row, c, args->a[i][r * args->in + c]);
}

tp_status tp_cpu_pack_lowrank(tp_ctx *ctx, const void *arguments)
{
    const tp_pack_lowrank_args *args = arguments;
    if (args->w.dtype != TP_F32 && args->w.dtype != TP_BF16)
        return tp_fail(ctx, TP_UNSUPPORTED, "pack_lowrank: expected f32 or bf16, got %s", tp_dtype_name(args->w.dtype));
    pack_columns(args);
    pack_rows(args);
    return TP_OK;
}

tp_status tp_cpu_lowrank_backward(tp_ctx *ctx, const void *arguments)
{
    const tp_lowrank_backward_args *args = arguments;
    for (int i = 0; i < TP_PACKED_PARTS; i++) {
        if (args->rank[i] <= 0) continue;
        tp_matmul_args du = tp_lowrank_du(args, i);
        TP_TRY(tp_cpu_matmul(ctx, &du));
        if (args->db[i] == NULL) continue;
        tp_matmul_tn_args db = tp_lowrank_db(args, i);
        TP_TRY(tp_cpu_matmul_tn(ctx, &db));
    }
    return TP_OK;
}

tp_status tp_cpu_swiglu_factors(tp_ctx *ctx, const void *arguments)
{
    return tp_swiglu_factors_apart(ctx, arguments);
}

tp_status tp_cpu_dropped_down(tp_ctx *ctx, const void *arguments)
{
    return tp_dropped_down_apart(ctx, arguments);
}

tp_status tp_cpu_dropped_gradient(tp_ctx *ctx, const void *arguments)
{
    return tp_dropped_gradient_apart(ctx, arguments);
}

tp_status tp_cpu_dropped_up(tp_ctx *ctx, const void *arguments)
{
    return tp_dropped_up_apart(ctx, arguments);
}
