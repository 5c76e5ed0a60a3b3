/* Flat buffers of trained parameters. */
#include "autograd/params.h"

#include <string.h>

#include "base/mem.h"

tp_status tp_params_declare(tp_ctx *ctx, tp_params *params, const char *name, int64_t rows, int64_t cols, size_t *index)
{
    int64_t count, rounded, total;
    if (!tp_mul_i64(rows, cols, &count) || !tp_add_i64(count, TP_PARAM_ALIGN - 1, &rounded) ||
        !tp_add_i64(params->elements, rounded / TP_PARAM_ALIGN * TP_PARAM_ALIGN, &total))
        return tp_fail(ctx, TP_SHAPE, "%s: [%lld, %lld] is too large", name, (long long)rows, (long long)cols);
    TP_TRY(tp_grow(ctx, &params->list, &params->capacity, params->n + 1, sizeof *params->list));
    tp_param *p = &params->list[params->n];
    *p = (tp_param){.name = tp_strdup(ctx, name), .offset = params->elements, .count = count};
    if (p->name == NULL) return TP_NOMEM;
    p->tensor = tp_parameter(p->name, rows, cols, NULL, NULL);
    *index = params->n++;
    params->elements = total;
    params->trained += count;
    return TP_OK;
}

static size_t buffer_bytes(const tp_params *params)
{
    return (size_t)params->elements * sizeof(float);
}

tp_status tp_params_allocate(tp_ctx *ctx, tp_params *params)
{
    params->device = ctx->device;
    params->values = ctx->device->backend->alloc(ctx, ctx->device, buffer_bytes(params));
    if (params->values == NULL) return TP_NOMEM;
    for (size_t i = 0; i < params->n; i++) params->list[i].tensor.data = params->values + params->list[i].offset;
    return TP_OK;
}

tp_status tp_params_train(tp_ctx *ctx, tp_params *params)
{
    params->grads = ctx->device->backend->alloc(ctx, ctx->device, buffer_bytes(params));
    if (params->grads == NULL) return TP_NOMEM;
    for (size_t i = 0; i < params->n; i++) {
        params->list[i].tensor.grad = params->grads + params->list[i].offset;
        params->list[i].tensor.needs_grad = true;
    }
    return TP_OK;
}

tp_status tp_params_zero_grads(tp_ctx *ctx, tp_params *params)
{
    return ctx->device->backend->zero(ctx, params->grads, buffer_bytes(params));
}

void tp_params_free(tp_params *params)
{
    if (params->values != NULL) params->device->backend->free(params->device, params->values, buffer_bytes(params));
    if (params->grads != NULL) params->device->backend->free(params->device, params->grads, buffer_bytes(params));
    for (size_t i = 0; i < params->n; i++) tp_free(params->list[i].name);
    tp_free(params->list);
    *params = (tp_params){0};
}

tp_param *tp_params_find(tp_params *params, const char *name)
{
    for (size_t i = 0; i < params->n; i++)
        if (strcmp(params->list[i].name, name) == 0) return &params->list[i];
    return NULL;
}
