/* loss = sum_i [ logsumexp(z_i) - z_i[label_i] ],  z_i = x_i W^T          dz = softmax(z) - onehot,  dx = dz W
 *
 * Logits of all tokens never exist at once: labelled rows are gathered, and a chunk of logits at a time is made, turned into
 * its loss and its gradient in place, and multiplied back into dx. W is frozen, so two products per chunk are all there is
 * (Liger, arXiv:2410.10989). Under bf16 and f16 the gradient has 16 bits as well, since that product would round it. Backward
 * only hands the finished dx over. */
#include "autograd/op.h"
#include "autograd/ops.h"

/* Logits that exist at once, where the device names no better number. Larger chunks unpack the head fewer times: 96 MiB, 512
 * rows of 49152, are 6 % faster than 64. */
#define CHUNK_BYTES ((uint64_t)96 << 20)
/* Tiles of products have so many rows or a divisor of it. */
#define CHUNK_ROWS 128

struct cross_entropy_record {
    tp_record record;
    tp_tensor *x;
    const int32_t *rows;
    int64_t n;
};

static const char op_name[] = "linear_cross_entropy";

/* The rows that a chunk of n or fewer can have. */
static int64_t most_rows(const tp_device *device, int64_t n, int64_t vocab)
{
    uint64_t bytes = device->logits_bytes > 0 ? device->logits_bytes : CHUNK_BYTES;
    int64_t most = (int64_t)(bytes / sizeof(float)) / vocab;
    if (most < 16) most = 16;
    if (most > CHUNK_ROWS) most -= most % CHUNK_ROWS;
    return n < most ? n : most;
}

/* Chunks of about the same number of rows, whole tiles of them if there is room. */
static int64_t chunk_rows(int64_t n, int64_t most)
{
    if (n <= most) return n;
    int64_t chunks = (n + most - 1) / most;
    int64_t rows = (n + chunks - 1) / chunks;
    return most >= CHUNK_ROWS ? (rows + CHUNK_ROWS - 1) / CHUNK_ROWS * CHUNK_ROWS : rows;
}

static tp_status gather(tp_tape *tape, const tp_tensor *x, const int32_t *rows, int64_t n, tp_rows out)
{
    tp_gather_rows_args args = {.n = n, .dim = x->cols, .index = rows, .in = tp_tensor_rows(x), .out = out};
    return tp_run_gather_rows(tp_tape_ctx(tape), &args);
}

static tp_status cross_entropy_backward(tp_tape *tape, tp_record *base)
{
    struct cross_entropy_record *r = (struct cross_entropy_record *)base;
    tp_tensor *x = r->x;
    bool accumulate;
    tp_rows dx = tp_grad_for(tape, x, &accumulate), compact = {tp_storage_data(base->saved[0]), x->dtype, x->cols};
    if (dx.data == NULL) return tp_tape_status(tape);
    tp_scatter_rows_args args = {
        .n = r->n, .dim = x->cols, .rows = x->rows, .index = r->rows, .in = compact, .out = dx, .zero_rest = true};
    if (!accumulate) return tp_run_scatter_rows(tp_tape_ctx(tape), &args);
    tp_storage *full = tp_op_alloc(tape, op_name, (size_t)(x->rows * x->cols) * tp_dtype_bytes(x->dtype));
    if (full == NULL) return tp_tape_status(tape);
    args.out = (tp_rows){tp_storage_data(full), x->dtype, x->cols};
    TP_TRY(tp_run_scatter_rows(tp_tape_ctx(tape), &args));
    tp_add_args sum = {.n = x->rows, .dim = x->cols, .x = dx, .y = args.out, .z = dx};
    TP_TRY(tp_run_add(tp_tape_ctx(tape), &sum));
    tp_op_release(tape, full);
    return TP_OK;
}

static const tp_op cross_entropy_op = {.name = op_name, .backward = cross_entropy_backward, .is_loss = true};

/* One chunk: logits, losses, and (if wanted) dx in place of the gathered x. */
static tp_status run_chunk(tp_tape *tape, const tp_cross_entropy_spec *spec, tp_rows x, int64_t dim, int64_t first, int64_t n,
                           float *logits, float *losses, bool want_grad)
{
    tp_ctx *ctx = tp_tape_ctx(tape);
    int64_t vocab = spec->head->rows;
    tp_rows z = {logits, TP_F32, vocab};
    x.data = (char *)x.data + (size_t)(first * dim) * tp_dtype_bytes(x.dtype);
    tp_matmul_args forward = {.n = n,
                              .m = vocab,
                              .k = dim,
                              .a = x,
                              .b = *spec->head,
                              .nt = true,
                              .c = z,
                              .alpha = 1,
                              .precision = tp_tape_precision(tape)};
    TP_TRY(tp_run_matmul(ctx, &forward));
    tp_cross_entropy_args loss = {.n = n,
                                  .vocab = vocab,
                                  .logits = logits,
                                  .ld = vocab,
                                  .labels = spec->labels + first,
                                  .loss = losses + first,
                                  .grad_scale = spec->grad_scale,
                                  .want_grad = want_grad,
                                  .narrow = tp_tape_precision(tape) != TP_F32,
                                  .narrow_type = tp_tape_precision(tape),
                                  .state = spec->state};
    TP_TRY(tp_run_cross_entropy(ctx, &loss));
    if (!want_grad) return TP_OK;
    if (loss.narrow) z = (tp_rows){logits, loss.narrow_type, 2 * vocab};
    tp_matmul_args backward = {
        .n = n, .m = dim, .k = vocab, .a = z, .b = *spec->head, .c = x, .alpha = 1, .precision = tp_tape_precision(tape)};
    return tp_run_matmul(ctx, &backward);
}

tp_tensor *tp_linear_cross_entropy(tp_tape *tape, tp_tensor *x, const tp_cross_entropy_spec *spec)
{
    const tp_tensor *inputs[] = {x};
    if (!tp_op_begin(tape, op_name, inputs, 1)) return NULL;
    int64_t dim = x->cols, vocab = spec->head->rows, n = spec->n;
    int64_t most = most_rows(tp_tape_ctx(tape)->device, n, vocab), step = chunk_rows(n, most);
    if (dim != spec->head->cols || n > x->rows)
        return tp_op_fail(tape, op_name, TP_SHAPE, "x is [%lld, %lld], the head has %lld columns, %lld labels",
                          (long long)x->rows, (long long)dim, (long long)spec->head->cols, (long long)n);
    bool wants = tp_wants_grad(x), record = wants && tp_tape_recording(tape);
    tp_ctx *ctx = tp_tape_ctx(tape);
    tp_tensor *out = tp_op_output(tape, op_name, TP_F32, 1, 1, wants);
    tp_storage *compact = tp_op_alloc(tape, op_name, (size_t)(n * dim) * tp_dtype_bytes(x->dtype));
    tp_storage *losses = tp_op_alloc(tape, op_name, (size_t)n * sizeof(float));
    tp_storage *logits = tp_op_alloc(tape, op_name, (size_t)(most * vocab) * sizeof(float)); /* fits fewer labels too */
    if (out == NULL || compact == NULL || losses == NULL || logits == NULL) return NULL;
    tp_rows gathered = {tp_storage_data(compact), x->dtype, dim};
    float *each = spec->losses != NULL ? spec->losses : tp_storage_data(losses);
    if (!tp_op_ok(tape, op_name, gather(tape, x, spec->rows, n, gathered))) return NULL;
    for (int64_t first = 0; first < n; first += step) {
        int64_t rows = n - first < step ? n - first : step;
        if (!tp_op_ok(tape, op_name, run_chunk(tape, spec, gathered, dim, first, rows, tp_storage_data(logits), each, record)))
            return NULL;
    }
    tp_column_sum_args sum = {.n = n, .m = 1, .a = {each, TP_F32, 1}, .out = out->data};
    tp_scale_args scale = {.n = 1, .dim = 1, .x = tp_tensor_rows(out), .y = tp_tensor_rows(out), .alpha = spec->grad_scale};
    tp_add_loss_args add = {out->data, spec->state};
    if (!tp_op_ok(tape, op_name, tp_run_column_sum(ctx, &sum))) return NULL;
    if (!tp_op_ok(tape, op_name, add.state != NULL ? tp_run_add_loss(ctx, &add) : tp_run_scale(ctx, &scale))) return NULL;
    tp_op_release(tape, logits);
    tp_op_release(tape, losses);
    if (!record) {
        tp_op_release(tape, compact);
        return out;
    }
    struct cross_entropy_record *r = tp_op_record(tape, &cross_entropy_op, sizeof *r, out, NULL, NULL);
    if (r == NULL) return NULL;
    r->record.saved[0] = compact;
    r->x = x;
    r->rows = spec->rows;
    r->n = n;
    return out;
}

tp_tensor *tp_logits(tp_tape *tape, tp_tensor *x, const tp_matrix *head, const int32_t *rows, int64_t n)
{
    const tp_tensor *inputs[] = {x};
    if (!tp_op_begin(tape, "logits", inputs, 1)) return NULL;
    tp_tensor *from = x;
    if (rows != NULL) {
        from = tp_op_output(tape, "logits", x->dtype, n, x->cols, false);
        if (from == NULL || !tp_op_ok(tape, "logits", gather(tape, x, rows, n, tp_tensor_rows(from)))) return NULL;
    }
    if (x->cols != head->cols)
        return tp_op_fail(tape, "logits", TP_SHAPE, "x has %lld columns, the head %lld", (long long)x->cols,
                          (long long)head->cols);
    tp_tensor *out = tp_op_output(tape, "logits", TP_F32, from->rows, head->rows, false);
    if (out == NULL) return NULL;
    tp_matmul_args args = {.n = from->rows,
                           .m = head->rows,
                           .k = x->cols,
                           .a = tp_tensor_rows(from),
                           .b = *head,
                           .nt = true,
                           .c = tp_tensor_rows(out),
                           .alpha = 1,
                           .precision = tp_tape_precision(tape)};
    return tp_op_ok(tape, "logits", tp_run_matmul(tp_tape_ctx(tape), &args)) ? out : NULL;
}
