/* Attention of the next tokens against the cache, put together from the kernels that it stands for. */
#include <string.h>

#include "backend/cpu/cpu.h"

static tp_rows row_of(tp_rows x, int64_t row)
{
    x.data = (char *)x.data + (size_t)(row * x.ld) * tp_dtype_bytes(x.dtype);
    return x;
}

static tp_status norm_heads(tp_ctx *ctx, tp_rows x, const float *weight, float eps, int64_t heads, int64_t head_dim)
{
    x.ld = head_dim;
    tp_rmsnorm_args args = {.n = heads, .dim = head_dim, .x = x, .y = x, .weight = weight, .eps = eps};
    return weight != NULL ? tp_cpu_rmsnorm(ctx, &args) : TP_OK;
}

static tp_status rotate(tp_ctx *ctx, const tp_attend_args *a, tp_rows x, int64_t heads)
{
    tp_rope_args args = {
        .n = a->n, .heads = heads, .head_dim = a->head_dim, .half = a->half, .x = x, .cos = a->cos, .sin = a->sin};
    return a->half > 0 ? tp_cpu_rope(ctx, &args) : TP_OK;
}

static tp_status attend_row(tp_ctx *ctx, const tp_attend_args *a, int64_t row)
{
    tp_rows k = row_of(a->cache_k, row * a->capacity), v = row_of(a->cache_v, row * a->capacity);
    size_t bytes = (size_t)(a->kv_heads * a->head_dim) * tp_dtype_bytes(k.dtype);
    memcpy(row_of(k, a->used[row]).data, row_of(a->k, row).data, bytes);
    memcpy(row_of(v, a->used[row]).data, row_of(a->v, row).data, bytes);
    tp_segment segment = {.q_len = 1, .k_len = a->used[row] + 1};
    tp_attention_args args = {.n_q = 1,
                              .heads = a->heads,
                              .kv_heads = a->kv_heads,
                              .head_dim = a->head_dim,
                              .q = row_of(a->q, row),
                              .k = k,
                              .v = v,
                              .out = row_of(a->out, row),
                              .segments = &segment,
                              .n_segments = 1,
                              .causal = true,
                              .window = a->window,
                              .scale = a->scale};
    return tp_cpu_attention(ctx, &args);
}

tp_status tp_cpu_attend(tp_ctx *ctx, const void *arguments)
{
    const tp_attend_args *a = arguments;
    for (int64_t row = 0; row < a->n; row++) {
        TP_TRY(norm_heads(ctx, row_of(a->q, row), a->q_norm, a->eps, a->heads, a->head_dim));
        TP_TRY(norm_heads(ctx, row_of(a->k, row), a->k_norm, a->eps, a->kv_heads, a->head_dim));
    }
    TP_TRY(rotate(ctx, a, a->q, a->heads));
    TP_TRY(rotate(ctx, a, a->k, a->kv_heads));
    for (int64_t row = 0; row < a->n; row++) TP_TRY(attend_row(ctx, a, row));
    return TP_OK;
}
