/* The optimizer interface, the list of kinds, and their state on disk. */
#include "trainers/optim.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/mem.h"
#include "base/safetensors.h"

static tp_status adamw_update(tp_ctx *ctx, tp_optim *o)
{
    tp_adamw_args args = {.n = o->params->elements,
                          .w = o->params->values,
                          .m = o->state[0],
                          .v = o->state[1],
                          .g = o->params->grads,
                          .state = o->step_state,
                          .beta1 = (float)o->options.beta1,
                          .beta2 = (float)o->options.beta2,
                          .epsilon = (float)o->options.epsilon,
                          .weight_decay = (float)o->options.weight_decay};
    return tp_run_adamw(ctx, &args);
}

static tp_status sgd_update(tp_ctx *ctx, tp_optim *o)
{
    tp_sgd_args args = {.n = o->params->elements,
                        .w = o->params->values,
                        .m = o->state[0],
                        .g = o->params->grads,
                        .state = o->step_state,
                        .momentum = (float)o->options.momentum,
                        .weight_decay = (float)o->options.weight_decay};
    return tp_run_sgd(ctx, &args);
}

static const tp_optim_kind kinds[] = {
    {"adamw", {"exp_avg", "exp_avg_sq"}, adamw_update},
    {"sgd", {"momentum_buffer", NULL}, sgd_update},
};

static size_t buffer_bytes(const tp_optim *o)
{
    return (size_t)o->params->elements * sizeof(float);
}

static bool keeps_state(const tp_optim *o, int i)
{
    return o->kind->states[i] != NULL && (o->kind->update != sgd_update || o->options.momentum > 0);
}

static tp_status allocate(tp_ctx *ctx, tp_optim *o)
{
    const tp_backend *backend = ctx->device->backend;
    for (int i = 0; i < TP_OPTIM_STATES; i++)
        if (keeps_state(o, i) && (o->state[i] = backend->alloc(ctx, ctx->device, buffer_bytes(o))) == NULL) return TP_NOMEM;
    o->step_state = backend->alloc(ctx, ctx->device, sizeof *o->step_state);
    return o->step_state != NULL ? TP_OK : TP_NOMEM;
}

tp_status tp_optim_open(tp_ctx *ctx, const char *name, const tp_optim_options *options, tp_params *params, tp_optim **result)
{
    const tp_optim_kind *kind = NULL;
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (strcmp(kinds[i].name, name) == 0) kind = &kinds[i];
    if (kind == NULL) return tp_fail(ctx, TP_INVALID, "optimizer: \"%s\" is unknown; known are adamw, sgd", name);
    tp_optim *o = tp_alloc(ctx, 1, sizeof *o);
    if (o == NULL) return TP_NOMEM;
    o->kind = kind;
    o->options = *options;
    o->params = params;
    o->loss_scale = 1;
    tp_status status = allocate(ctx, o);
    if (status != TP_OK) {
        tp_optim_close(o);
        return status;
    }
    *result = o;
    return TP_OK;
}

void tp_optim_close(tp_optim *o)
{
    if (o == NULL) return;
    tp_device *device = o->params->device;
    for (int i = 0; i < TP_OPTIM_STATES; i++)
        if (o->state[i] != NULL) device->backend->free(device, o->state[i], buffer_bytes(o));
    if (o->step_state != NULL) device->backend->free(device, o->step_state, sizeof *o->step_state);
    tp_free(o);
}

tp_status tp_optim_begin(tp_ctx *ctx, tp_optim *o, double learning_rate, double loss_mean, double loss_spread)
{
    double t = (double)(o->steps + 1);
    /* Of the betas as the kernel has them, in f32: 1 - 0.999f is off by 1e-5, and the corrections have to be off alike. */
    double beta1 = (float)o->options.beta1, beta2 = (float)o->options.beta2;
    tp_step_state state = {.learning_rate = (float)learning_rate,
                           .bias1 = (float)(1 - pow(beta1, t)),
                           .bias2 = (float)(1 - pow(beta2, t)),
                           .max_norm = (float)o->options.max_grad_norm,
                           .loss_scale = o->loss_scale,
                           .loss_mean = loss_mean,
                           .loss_spread = loss_spread};
    return ctx->device->backend->copy_in(ctx, o->step_state, &state, sizeof state);
}

tp_status tp_optim_micro_batch(tp_ctx *ctx, tp_optim *o, uint64_t draw, float grad_scale)
{
    tp_step_state state = {.draw = draw, .grad_scale = grad_scale};
    return ctx->device->backend->copy_in(ctx, &o->step_state->draw, &state.draw, sizeof state - offsetof(tp_step_state, draw));
}

tp_status tp_optim_update(tp_ctx *ctx, tp_optim *o)
{
    tp_grad_norm_args norm = {.n = o->params->elements, .g = o->params->grads, .state = o->step_state};
    TP_TRY(tp_run_grad_norm(ctx, &norm));
    return o->kind->update(ctx, o);
}

tp_status tp_optim_end(tp_ctx *ctx, tp_optim *o, tp_optim_result *result)
{
    tp_step_state state;
    TP_TRY(ctx->device->backend->copy_out(ctx, &state, o->step_state, sizeof state));
    *result = (tp_optim_result){.grad_norm = state.norm, .loss_sum = state.loss_sum, .finite = state.finite != 0};
    if (result->finite) o->steps++;
    return TP_OK;
}

/* ---- state on disk ---- */

static tp_status save_arrays(tp_ctx *ctx, const tp_optim *o, float *const host[], const char *path)
{
    size_t n = 0, most = o->params->n * TP_OPTIM_STATES;
    tp_named_array *arrays = tp_alloc(ctx, most, sizeof *arrays);
    tp_buf names;
    tp_buf_init(&names, 0);
    size_t *starts = tp_alloc(ctx, most, sizeof *starts);
    tp_status status = arrays != NULL && starts != NULL ? TP_OK : TP_NOMEM;
    for (size_t p = 0; status == TP_OK && p < o->params->n; p++) {
        const tp_param *param = &o->params->list[p];
        for (int i = 0; i < TP_OPTIM_STATES; i++) {
            if (o->state[i] == NULL) continue;
            starts[n] = names.len;
            tp_buf_printf(&names, "%s.%s", param->name, o->kind->states[i]);
            tp_buf_char(&names, '\0');
            arrays[n++] = (tp_named_array){
                .dtype = TP_F32, .rank = 2, .shape = {param->tensor.rows, param->tensor.cols}, .data = host[i] + param->offset};
        }
    }
    if (status == TP_OK) status = tp_buf_status(ctx, &names, path);
    for (size_t i = 0; status == TP_OK && i < n; i++) arrays[i].name = names.data + starts[i];
    const char *metadata[] = {"optimizer", o->kind->name, NULL};
    if (status == TP_OK) status = tp_safetensors_save(ctx, path, arrays, n, metadata);
    tp_buf_free(&names);
    tp_free(starts);
    tp_free(arrays);
    return status;
}

tp_status tp_optim_save(tp_ctx *ctx, const tp_optim *o, const char *path)
{
    float *host[TP_OPTIM_STATES] = {NULL};
    tp_status status = TP_OK;
    for (int i = 0; i < TP_OPTIM_STATES && status == TP_OK; i++) {
        if (o->state[i] == NULL) continue;
        host[i] = tp_alloc_raw(ctx, 1, buffer_bytes(o));
        status = host[i] != NULL ? ctx->device->backend->copy_out(ctx, host[i], o->state[i], buffer_bytes(o)) : TP_NOMEM;
    }
    if (status == TP_OK) status = save_arrays(ctx, o, host, path);
    for (int i = 0; i < TP_OPTIM_STATES; i++) tp_free(host[i]);
    return status;
}

static tp_status load_one(tp_ctx *ctx, tp_optim *o, const tp_safetensors *file, const tp_param *param, int i, float *host)
{
    char name[TP_SAFETENSORS_NAME_MAX + 32];
    snprintf(name, sizeof name, "%s.%s", param->name, o->kind->states[i]);
    const tp_entry *e = tp_safetensors_find(file, name);
    if (e == NULL) return tp_fail(ctx, TP_CHECKPOINT, "%s: %s is missing", tp_safetensors_path(file), name);
    if (e->rank != 2 || e->shape[0] != param->tensor.rows || e->shape[1] != param->tensor.cols || e->dtype != TP_F32)
        return tp_fail(ctx, TP_CHECKPOINT, "%s: %s: expected F32 [%lld, %lld]", tp_safetensors_path(file), name,
                       (long long)param->tensor.rows, (long long)param->tensor.cols);
    TP_TRY(tp_safetensors_read(ctx, file, e, host));
    return ctx->device->backend->copy_in(ctx, o->state[i] + param->offset, host, (size_t)param->count * sizeof *host);
}

tp_status tp_optim_load(tp_ctx *ctx, tp_optim *o, const char *path)
{
    tp_safetensors *file;
    TP_TRY(tp_safetensors_open(ctx, path, &file));
    float *host = tp_alloc_raw(ctx, (size_t)o->params->elements, sizeof *host);
    tp_status status = host != NULL ? TP_OK : TP_NOMEM;
    const char *kind = tp_safetensors_metadata(file, "optimizer");
    if (status == TP_OK && (kind == NULL || strcmp(kind, o->kind->name) != 0))
        status = tp_fail(ctx, TP_CHECKPOINT, "%s: state of optimizer %s, the recipe says %s", path,
                         kind != NULL ? kind : "(unnamed)", o->kind->name);
    for (size_t p = 0; status == TP_OK && p < o->params->n; p++)
        for (int i = 0; status == TP_OK && i < TP_OPTIM_STATES; i++)
            if (o->state[i] != NULL) status = load_one(ctx, o, file, &o->params->list[p], i, host);
    tp_free(host);
    tp_safetensors_close(file);
    return status;
}
