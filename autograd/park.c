#include "autograd/park.h"

#include "base/mem.h"

void tp_park_free(tp_park *park)
{
    for (size_t i = 0; i < park->capacity && park->list != NULL; i++)
        if (park->list[i].host != NULL)
            park->device->backend->host_free(park->device, park->list[i].host, park->list[i].capacity);
    tp_free(park->list);
    *park = (tp_park){0};
}

static tp_status make_room(tp_ctx *ctx, tp_parked *parked, size_t bytes)
{
    const tp_backend *backend = ctx->device->backend;
    if (parked->capacity >= bytes) return TP_OK;
    if (parked->host != NULL) backend->host_free(ctx->device, parked->host, parked->capacity);
    parked->capacity = 0;
    parked->host = backend->host_alloc(ctx, ctx->device, bytes);
    if (parked->host == NULL) return TP_NOMEM;
    parked->capacity = bytes;
    return TP_OK;
}

tp_status tp_park_leave(tp_ctx *ctx, tp_park *park, tp_tensor *x, size_t bytes)
{
    size_t before = park->capacity;
    park->device = ctx->device;
    TP_TRY(tp_grow(ctx, &park->list, &park->capacity, park->n + 1, sizeof *park->list));
    for (size_t i = before; i < park->capacity; i++) park->list[i] = (tp_parked){0};
    tp_parked *parked = &park->list[park->n];
    TP_TRY(make_room(ctx, parked, bytes));
    parked->x = x;
    parked->bytes = bytes;
    parked->state = TP_PARK_LEAVING;
    park->n++;
    return ctx->device->backend->copy_beside(ctx, parked->host, x->data, bytes, &parked->ticket);
}

tp_status tp_park_wait(tp_ctx *ctx, tp_parked *parked)
{
    return ctx->device->backend->wait_beside(ctx, parked->ticket);
}

tp_status tp_park_return(tp_ctx *ctx, tp_parked *parked)
{
    parked->state = TP_PARK_COMING;
    return ctx->device->backend->copy_beside(ctx, parked->x->data, parked->host, parked->bytes, &parked->ticket);
}
