/* tapeft logits MODEL: token ids in, logits and on request every hidden state out, one sequence at a time. */
#include <string.h>

#include "base/mem.h"
#include "base/safetensors.h"
#include "cli/open.h"
#include "models/measure.h"

/* Rows of logits made at once: 64 x 150,000 f32 are 38 MB. */
#define LOGITS_ROWS 64

struct job {
    tp_ctx *ctx;
    tp_model *model;
    tp_tape *tape;
    const char *in; /* the input's path, for messages */
    int64_t n_rows, n_columns;
    int64_t *ids, *mask; /* [n_rows, n_columns]; mask NULL: ones */
    bool hidden;
    float **states; /* [layers + 1] of [n_rows, n_columns, D]; NULL entries unless hidden */
    float *final;   /* [n_rows, n_columns, D] */
    int64_t row;    /* under way */
};

static tp_status read_table(tp_ctx *ctx, const tp_safetensors *file, const char *name, struct job *job, int64_t **values)
{
    const tp_entry *e = tp_safetensors_find(file, name);
    if (e == NULL) return TP_OK;
    if (e->rank != 2 || e->shape[0] < 1 || e->shape[1] < 1)
        return tp_fail(ctx, TP_SHAPE, "%s: %s: expected two dimensions [B, T]", tp_safetensors_path(file), name);
    if (job->n_rows != 0 && (e->shape[0] != job->n_rows || e->shape[1] != job->n_columns))
        return tp_fail(ctx, TP_SHAPE, "%s: %s: [%lld, %lld], input_ids is [%lld, %lld]", tp_safetensors_path(file), name,
                       (long long)e->shape[0], (long long)e->shape[1], (long long)job->n_rows, (long long)job->n_columns);
    job->n_rows = e->shape[0];
    job->n_columns = e->shape[1];
    *values = tp_alloc(ctx, (size_t)job->n_rows * (size_t)job->n_columns, sizeof **values);
    if (*values == NULL) return TP_NOMEM;
    return tp_safetensors_read_i64(ctx, file, e, 0, (size_t)(job->n_rows * job->n_columns), *values);
}

static tp_status read_input(tp_ctx *ctx, const char *path, struct job *job)
{
    tp_safetensors *file;
    TP_TRY(tp_safetensors_open(ctx, path, &file));
    tp_status status = read_table(ctx, file, "input_ids", job, &job->ids);
    if (status == TP_OK && job->ids == NULL) status = tp_fail(ctx, TP_FORMAT, "%s: input_ids is missing", path);
    if (status == TP_OK) status = read_table(ctx, file, "attention_mask", job, &job->mask);
    tp_safetensors_close(file);
    return status;
}

/* Device rows of one sequence into its place of a host table. */
static tp_status fetch(struct job *job, const tp_tensor *from, float *table)
{
    size_t n = (size_t)(from->rows * from->cols);
    float *target = table + (size_t)job->row * n;
    void *narrow = from->dtype == TP_F32 ? target : tp_alloc_raw(job->ctx, n, tp_dtype_bytes(from->dtype));
    if (narrow == NULL) return TP_NOMEM;
    tp_status status = job->ctx->device->backend->copy_out(job->ctx, narrow, from->data, n * tp_dtype_bytes(from->dtype));
    if (narrow != target) {
        if (status == TP_OK) tp_convert_to_f32(from->dtype, narrow, n, target);
        tp_free(narrow);
    }
    return status;
}

/* Index 0: input of the first layer, i: output of layer i, -1: input of the head. A failure stays in the context. */
static void observe(void *state, int index, tp_tensor *hidden)
{
    struct job *job = state;
    if (index < 0)
        (void)fetch(job, hidden, job->final);
    else if (job->hidden)
        (void)fetch(job, hidden, job->states[index]);
}

/* What would be a caller's mistake is the file's fault here. */
static tp_status bad_input(struct job *job, tp_status status)
{
    if (status == TP_INVALID) job->ctx->status = TP_FORMAT;
    return tp_fail_in(job->ctx, "%s", job->in);
}

static tp_status run_sequence(struct job *job, int64_t max_position)
{
    tp_owned_batch owned;
    const int64_t *mask = job->mask != NULL ? job->mask + job->row * job->n_columns : NULL;
    tp_status status = tp_batch_from_rows(job->ctx, job->ids + job->row * job->n_columns, mask, 1, job->n_columns,
                                          job->model->config.vocab_size, &owned);
    if (status != TP_OK) return bad_input(job, status);
    owned.batch.max_position = max_position;
    tp_pass pass = {.tape = job->tape, .batch = &owned.batch, .observe = observe, .observe_state = job};
    tp_tape_no_grad_begin(job->tape);
    tp_model_forward(job->model, &pass);
    tp_tape_no_grad_end(job->tape);
    status = tp_tape_status(job->tape);
    tp_tape_reset(job->tape);
    tp_owned_batch_free(&owned);
    return status != TP_OK ? status : job->ctx->status;
}

/* What dynamic RoPE scaling looks at: the largest position + 1 of the whole padded batch, as the reference does. */
static tp_status longest(struct job *job, int64_t *max_position)
{
    tp_owned_batch owned;
    tp_status status =
        tp_batch_from_rows(job->ctx, job->ids, job->mask, job->n_rows, job->n_columns, job->model->config.vocab_size, &owned);
    if (status != TP_OK) return bad_input(job, status);
    *max_position = owned.batch.max_position;
    tp_owned_batch_free(&owned);
    return TP_OK;
}

static tp_status run_all(struct job *job)
{
    size_t n = (size_t)(job->n_rows * job->n_columns), dim = (size_t)job->model->config.hidden_size,
           layers = (size_t)job->model->config.n_layers, bytes = 0;
    int64_t max_position = 0;
    if (job->n_columns > job->model->config.max_positions)
        return tp_fail(job->ctx, TP_SHAPE, "input_ids: %lld columns, the model takes %lld positions", (long long)job->n_columns,
                       (long long)job->model->config.max_positions);
    job->final = tp_alloc(job->ctx, n * dim, sizeof *job->final);
    job->states = tp_alloc(job->ctx, layers + 1, sizeof *job->states);
    if (job->final == NULL || job->states == NULL) return TP_NOMEM;
    for (size_t i = 0; job->hidden && i <= layers; i++)
        if ((job->states[i] = tp_alloc(job->ctx, n * dim, sizeof **job->states)) == NULL) return TP_NOMEM;
    TP_TRY(tp_model_measure(job->ctx, job->model, &(tp_measure){.rows = job->n_columns, .logits_rows = LOGITS_ROWS}, &bytes));
    TP_TRY(tp_tape_new(job->ctx, bytes, job->model->precision, &job->tape));
    TP_TRY(longest(job, &max_position));
    for (job->row = 0; job->row < job->n_rows; job->row++) TP_TRY(run_sequence(job, max_position));
    return TP_OK;
}

/* ---- writing ---- */

static tp_status write_logits(struct job *job, tp_safetensors_writer *writer)
{
    const tp_backend *backend = job->ctx->device->backend;
    int64_t n = job->n_rows * job->n_columns, dim = job->model->config.hidden_size, vocab = job->model->config.vocab_size;
    tp_dtype dtype = job->model->precision;
    size_t row_bytes = (size_t)dim * tp_dtype_bytes(dtype);
    float *out = tp_alloc_raw(job->ctx, (size_t)LOGITS_ROWS * (size_t)vocab, sizeof *out);
    void *narrow = tp_alloc_raw(job->ctx, LOGITS_ROWS, row_bytes),
         *device = backend->alloc(job->ctx, job->ctx->device, LOGITS_ROWS * row_bytes);
    tp_status status = out != NULL && narrow != NULL && device != NULL ? TP_OK : TP_NOMEM;
    for (int64_t first = 0; status == TP_OK && first < n; first += LOGITS_ROWS) {
        int64_t rows = n - first < LOGITS_ROWS ? n - first : LOGITS_ROWS;
        tp_convert_from_f32(dtype, job->final + first * dim, (size_t)(rows * dim), narrow);
        status = backend->copy_in(job->ctx, device, narrow, (size_t)rows * row_bytes);
        tp_tensor *logits = status == TP_OK ? tp_logits(job->tape, tp_tape_input(job->tape, dtype, rows, dim, device, false),
                                                        &job->model->head.weight, NULL, rows)
                                            : NULL;
        if (status == TP_OK) status = tp_tape_status(job->tape);
        if (status == TP_OK) status = backend->copy_out(job->ctx, out, logits->data, (size_t)(rows * vocab) * sizeof *out);
        tp_tape_reset(job->tape);
        if (status == TP_OK) status = tp_safetensors_write(job->ctx, writer, out, (size_t)(rows * vocab) * sizeof *out);
    }
    if (device != NULL) backend->free(job->ctx->device, device, LOGITS_ROWS * row_bytes);
    tp_free(narrow);
    tp_free(out);
    return status;
}

static tp_status write_entry(struct job *job, tp_safetensors_writer *writer, const tp_entry *entry)
{
    const float *table = job->final;
    int64_t layer;
    if (strcmp(entry->name, "logits") == 0) return write_logits(job, writer);
    if (tp_parse_i64(entry->name + strlen("hidden."), &layer)) table = job->states[layer];
    return tp_safetensors_write(job->ctx, writer, table, (size_t)entry->bytes);
}

static tp_status declare_all(struct job *job, tp_safetensors_writer *writer)
{
    int64_t hidden[] = {job->n_rows, job->n_columns, job->model->config.hidden_size},
            logits[] = {job->n_rows, job->n_columns, job->model->config.vocab_size};
    char name[48];
    for (int64_t i = 0; job->hidden && i <= job->model->config.n_layers; i++) {
        snprintf(name, sizeof name, "hidden.%lld", (long long)i);
        TP_TRY(tp_safetensors_declare(job->ctx, writer, name, TP_F32, 3, hidden));
    }
    if (job->hidden) TP_TRY(tp_safetensors_declare(job->ctx, writer, "hidden.final", TP_F32, 3, hidden));
    return tp_safetensors_declare(job->ctx, writer, "logits", TP_F32, 3, logits);
}

static tp_status write_output(struct job *job, const char *path)
{
    tp_safetensors_writer *writer;
    TP_TRY(tp_safetensors_create(job->ctx, path, &writer));
    tp_status status = declare_all(job, writer);
    for (const tp_entry *entry; status == TP_OK && (entry = tp_safetensors_next(writer)) != NULL;)
        status = write_entry(job, writer, entry);
    if (status == TP_OK) return tp_safetensors_finish(job->ctx, writer);
    tp_safetensors_discard(writer);
    return status;
}

static void free_job(struct job *job)
{
    for (int64_t i = 0; job->states != NULL && i <= job->model->config.n_layers; i++) tp_free(job->states[i]);
    tp_free(job->states);
    tp_free(job->final);
    tp_free(job->ids);
    tp_free(job->mask);
    tp_tape_free(job->tape);
}

static tp_status run(tp_ctx *ctx, const tp_args *args)
{
    const char *in = tp_args_value(args, "in"), *out = tp_args_value(args, "out");
    struct job job = {.ctx = ctx, .in = in, .hidden = tp_args_has(args, "hidden")};
    tp_cli_model opened = {0};
    if (in == NULL || out == NULL) return tp_fail(ctx, TP_INVALID, "logits: --in FILE and --out FILE are needed");
    TP_TRY(tp_cli_check_out_file(ctx, "out", out));
    tp_status status = read_input(ctx, in, &job);
    if (status == TP_OK) status = tp_cli_model_open(ctx, args, args->positional[0], &opened);
    if (status == TP_OK) {
        job.model = opened.model;
        status = run_all(&job);
        if (status == TP_OK) status = write_output(&job, out);
    }
    free_job(&job);
    tp_cli_model_close(&opened);
    return status;
}

static const tp_flag flags[] = {
    {"in", "FILE", false, false, "safetensors with input_ids [B, T] and perhaps attention_mask [B, T]"},
    {"out", "FILE", false, false, "safetensors that gets logits [B, T, V] in F32; an existing file is replaced"},
    {"adapter", "DIR", false, false, "a PEFT adapter folder"},
    {"hidden", NULL, false, false, "also hidden.0 (input of layer 1), hidden.i (output of layer i), hidden.final"},
    TP_FLAG_PRECISION,
    TP_FLAG_DEVICE,
    TP_FLAG_THREADS,
    TP_FLAG_FORCE,
    TP_FLAG_END,
};

const tp_command tp_command_logits = {
    "logits", "MODEL --in FILE --out FILE [--adapter DIR] [--hidden]", "logits of token ids", flags, 1, 1, run};
