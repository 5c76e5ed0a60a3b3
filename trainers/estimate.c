/* How long a step of a plan takes here: its products at the rate of one that is made now, of the model's own widths, plus the
 * bytes of all kernels at the rate of a copy. Parts overlap in one place and wait in another, so it is a guide, not a promise.
 */
#include "backend/kernels.h"
#include "trainers/metrics.h"
#include "trainers/run.h"

#define ROWS        512 /* of the product: enough for its full rate */
#define COPY_FLOATS (1 << 22)
#define WARM_UP     1
#define MEASURED_S  0.05 /* at least so long, and so often */
#define REPEATS     3
#define MOST        1000

typedef struct bench {
    tp_ctx *ctx;
    tp_dtype dtype;
    int64_t n, m, k; /* c [n, m] = a [n, k] b^T */
    size_t bytes[3];
    void *memory[3]; /* a, b, c */
} bench;

static tp_status multiply(const bench *b)
{
    tp_matmul_args args = {.n = b->n,
                           .m = b->m,
                           .k = b->k,
                           .a = {b->memory[0], b->dtype, b->k},
                           .b = tp_matrix_dense(b->dtype, b->memory[1], b->m, b->k),
                           .nt = true,
                           .c = {b->memory[2], b->dtype, b->m},
                           .alpha = 1,
                           .precision = b->dtype};
    return tp_run_matmul(b->ctx, &args);
}

static tp_status copy(const bench *b)
{
    tp_scale_args args = {
        .n = b->n, .dim = b->m, .x = {b->memory[0], b->dtype, b->m}, .y = {b->memory[2], b->dtype, b->m}, .alpha = 1};
    return tp_run_scale(b->ctx, &args);
}

/* Seconds of the fastest of several runs. */
static tp_status measure(const bench *b, tp_status (*work)(const bench *), double *seconds)
{
    const tp_backend *backend = b->ctx->device->backend;
    double spent = 0, best = 0;
    for (int i = 0; i < MOST && (i < REPEATS + WARM_UP || spent < MEASURED_S); i++) {
        TP_TRY(backend->sync(b->ctx));
        double began = tp_now();
        TP_TRY(work(b));
        TP_TRY(backend->sync(b->ctx));
        double took = tp_now() - began;
        if (i < WARM_UP) continue;
        spent += took;
        if (i == WARM_UP || took < best) best = took;
    }
    *seconds = best;
    return TP_OK;
}

static tp_status with_memory(bench *b, tp_status (*work)(const bench *), double *seconds)
{
    tp_device *device = b->ctx->device;
    tp_status status = TP_OK;
    for (int i = 0; i < 3 && status == TP_OK; i++) {
        b->memory[i] = device->backend->alloc(b->ctx, device, b->bytes[i]);
        if (b->memory[i] == NULL) status = TP_NOMEM;
    }
    if (status == TP_OK) status = measure(b, work, seconds);
    for (int i = 0; i < 3; i++)
        if (b->memory[i] != NULL) device->backend->free(device, b->memory[i], b->bytes[i]);
    return status;
}

/* The widest linear of a block stands for the products. */
static tp_status product_rate(tp_run *run, tp_dtype dtype, double *flops_per_second)
{
    const tp_model *model = run->shape_model;
    bench b = {.ctx = run->ctx, .dtype = dtype, .n = ROWS, .m = 1, .k = 1};
    double seconds = 0;
    for (size_t i = 0; i < model->n_linears; i++) {
        const tp_matrix *w = &model->linears[i]->weight;
        if (!model->linears[i]->is_head && w->rows * w->cols > b.m * b.k) b.m = w->rows, b.k = w->cols;
    }
    size_t each = tp_dtype_bytes(dtype);
    b.bytes[0] = (size_t)(b.n * b.k) * each;
    b.bytes[1] = (size_t)(b.m * b.k) * each;
    b.bytes[2] = (size_t)(b.n * b.m) * each;
    TP_TRY(with_memory(&b, multiply, &seconds));
    *flops_per_second = seconds > 0 ? 2 * (double)b.n * (double)b.m * (double)b.k / seconds : 0;
    return TP_OK;
}

static tp_status copy_rate(tp_run *run, double *bytes_per_second)
{
    bench b = {.ctx = run->ctx, .dtype = TP_F32, .n = COPY_FLOATS / 1024, .m = 1024};
    double seconds = 0;
    b.bytes[0] = b.bytes[2] = COPY_FLOATS * sizeof(float);
    b.bytes[1] = sizeof(float);
    TP_TRY(with_memory(&b, copy, &seconds));
    *bytes_per_second = seconds > 0 ? 2.0 * (double)b.bytes[0] / seconds : 0;
    return TP_OK;
}

tp_status tp_run_estimate(tp_run *run)
{
    tp_plan *plan = &run->plan;
    double f32 = 0, narrow = 0, bytes = 0;
    if (plan->flops_f32 > 0) TP_TRY(product_rate(run, TP_F32, &f32));
    if (plan->flops_narrow > 0) TP_TRY(product_rate(run, run->precision, &narrow));
    TP_TRY(copy_rate(run, &bytes));
    plan->seconds_per_step = 0;
    if (f32 > 0) plan->seconds_per_step += plan->flops_f32 / f32;
    if (narrow > 0) plan->seconds_per_step += plan->flops_narrow / narrow;
    if (bytes > 0) plan->seconds_per_step += plan->bytes_moved / bytes;
    return TP_OK;
}
