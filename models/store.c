/* Bytes from files to where they are computed with.
 *
 * Tensors that are used in place are only looked at. The others stream through pread in pieces that stay in the cache: the
 * file's pages never become part of this process, so nothing is held twice. */
#include "models/store.h"

#include <string.h>

#include "base/mem.h"
#include "models/parallel.h"
#include "models/scan.h"

#define PIECE ((uint64_t)TP_TRANSFER_ROW_BYTES)

/* ---- ownership ---- */

tp_model_store *tp_store_new(tp_ctx *ctx)
{
    tp_model_store *store = tp_alloc(ctx, 1, sizeof *store);
    if (store != NULL) store->device = ctx->device;
    return store;
}

void tp_store_free(tp_model_store *store)
{
    if (store == NULL) return;
    for (size_t i = 0; i < store->n_owned; i++)
        store->device->backend->free(store->device, store->owned[i].memory, store->owned[i].bytes);
    for (size_t i = 0; i < store->n_shards; i++) tp_safetensors_close(store->shards[i]);
    if (store->gguf != NULL) tp_gguf_close(store->gguf);
    tp_map_free(store->names);
    tp_free(store->owned);
    tp_free(store->shards);
    tp_free(store->listed);
    tp_free(store);
}

void *tp_store_alloc(tp_ctx *ctx, tp_model_store *store, size_t bytes)
{
    if (tp_grow(ctx, &store->owned, &store->owned_capacity, store->n_owned + 1, sizeof *store->owned) != TP_OK) return NULL;
    void *memory = store->device->backend->alloc(ctx, store->device, bytes);
    if (memory != NULL) store->owned[store->n_owned++] = (struct tp_owned){memory, bytes};
    return memory;
}

/* ---- transfers ---- */

/* Concurrent pieces share nothing: each worker has its own error and buffers. */
struct worker {
    tp_ctx ctx;
    unsigned char *in; /* PIECE bytes of the file */
    uint16_t *out;     /* the same converted, where it does not go straight to its place */
    void *rows;        /* device memory, where that is not the host's, for rows that will lie apart */
    int64_t failed;    /* first piece that failed, or -1 */
};

struct job {
    const tp_transfer *list;
    size_t n;
    int64_t *first; /* [n + 1] number of the first piece of each transfer */
    bool host_memory;
    struct worker workers[TP_PARALLEL_MAX];
};

/* Whole blocks, or whole rows of those that lie apart. */
static uint64_t piece_bytes(const tp_transfer *t)
{
    uint64_t unit = (uint64_t)tp_formats[t->from->format].block_bytes;
    if (t->row_values > 0) unit *= (uint64_t)t->row_values;
    return PIECE / unit * unit;
}

static tp_status check_piece(struct worker *w, const tp_stored *from, uint64_t done, const void *bytes, size_t n)
{
    int64_t at = tp_scan_finite(from->format, bytes, n);
    if (at < 0) return TP_OK;
    at += (int64_t)(done / (uint64_t)tp_formats[from->format].block_bytes);
    return tp_fail(&w->ctx, TP_NUMERIC, "%s: %s: %s %lld is not finite", tp_file_path(from->file), from->name,
                   tp_formats[from->format].dense ? "value" : "the scale of block", (long long)at);
}

/* `count` values in t->to, from number `first` on, to where their rows lie; a device with memory of its own spreads them. */
static tp_status place_rows(struct job *job, struct worker *w, const tp_transfer *t, uint64_t first, const void *values,
                            size_t count)
{
    tp_dtype dtype = tp_formats[t->to].dtype;
    size_t size = tp_dtype_bytes(dtype), row_bytes = (size_t)t->row_values * size;
    int64_t row = (int64_t)first / t->row_values, rows = (int64_t)count / t->row_values;
    tp_rows to = {(char *)t->memory + (size_t)(row * t->stride) * size, dtype, t->stride};
    if (job->host_memory) {
        for (int64_t r = 0; r < rows; r++)
            memcpy((char *)to.data + (size_t)(r * to.ld) * size, (const char *)values + (size_t)r * row_bytes, row_bytes);
        return TP_OK;
    }
    TP_TRY(w->ctx.device->backend->copy_in(&w->ctx, w->rows, values, count * size));
    tp_scale_args spread = {.n = rows, .dim = t->row_values, .x = {w->rows, dtype, t->row_values}, .y = to, .alpha = 1};
    return tp_run_scale(&w->ctx, &spread);
}

/* Same format: straight to where it goes if that is host memory. */
static tp_status copy_piece(struct job *job, struct worker *w, const tp_transfer *t, uint64_t done, size_t n)
{
    bool straight = job->host_memory && t->row_values == 0;
    size_t size = (size_t)tp_formats[t->from->format].block_bytes;
    char *to = (char *)t->memory + done;
    unsigned char *bytes = straight ? (unsigned char *)to : w->in;
    TP_TRY(tp_file_pread(&w->ctx, t->from->file, t->from->offset + done, bytes, n));
    if (t->check) TP_TRY(check_piece(w, t->from, done, bytes, n));
    if (t->row_values > 0) return place_rows(job, w, t, done / size, bytes, n / size);
    return straight ? TP_OK : w->ctx.device->backend->copy_in(&w->ctx, to, bytes, n);
}

/* What was finite before it was rounded to f16. */
static tp_status check_range(struct worker *w, const tp_stored *from, uint64_t first, const uint16_t *values, size_t n)
{
    int64_t at = tp_scan_finite(TP_FORMAT_F16, values, 2 * n);
    if (at < 0) return TP_OK;
    return tp_fail(&w->ctx, TP_NUMERIC, "%s: %s: value %lld is outside the range of fp16, +-65504; bf16 holds it",
                   tp_file_path(from->file), from->name, (long long)((int64_t)first + at));
}

static tp_status narrow_piece(struct job *job, struct worker *w, const tp_transfer *t, uint64_t done, size_t n)
{
    bool straight = job->host_memory && t->row_values == 0;
    size_t size = t->from->format == TP_FORMAT_F32 ? 4 : 2, count = n / size;
    char *to = (char *)t->memory + done / size * 2;
    TP_TRY(tp_file_pread(&w->ctx, t->from->file, t->from->offset + done, w->in, n));
    if (t->check) TP_TRY(check_piece(w, t->from, done, w->in, n));
    uint16_t *out = straight ? (uint16_t *)(void *)to : w->out;
    if (t->to == TP_FORMAT_BF16)
        tp_narrow_to_bf16(t->from->format, w->in, count, out);
    else
        tp_narrow_to_f16(t->from->format, w->in, count, out);
    if (t->check && t->to == TP_FORMAT_F16) TP_TRY(check_range(w, t->from, done / size, out, count));
    if (t->row_values > 0) return place_rows(job, w, t, done / size, w->out, count);
    return straight ? TP_OK : w->ctx.device->backend->copy_in(&w->ctx, to, w->out, 2 * count);
}

static tp_status run_piece(struct job *job, struct worker *w, int64_t piece)
{
    size_t low = 0, high = job->n; /* the transfer with first[low] <= piece < first[low + 1] */
    while (high - low > 1) {
        size_t middle = (low + high) / 2;
        if (job->first[middle] <= piece)
            low = middle;
        else
            high = middle;
    }
    const tp_transfer *t = &job->list[low];
    uint64_t size = piece_bytes(t), done = (uint64_t)(piece - job->first[low]) * size;
    size_t n = (size_t)(t->from->bytes - done < size ? t->from->bytes - done : size);
    if (t->in_place != NULL) return t->check ? check_piece(w, t->from, done, (const char *)t->in_place + done, n) : TP_OK;
    return t->to == t->from->format ? copy_piece(job, w, t, done, n) : narrow_piece(job, w, t, done, n);
}

static void body(void *state, int64_t piece, int number)
{
    struct job *job = state;
    struct worker *w = &job->workers[number];
    if (w->failed < 0 && run_piece(job, w, piece) != TP_OK) w->failed = piece;
}

static tp_status prepare(tp_ctx *ctx, struct job *job, int threads)
{
    job->first = tp_alloc(ctx, job->n + 1, sizeof *job->first);
    if (job->first == NULL) return TP_NOMEM;
    for (size_t i = 0; i < job->n; i++) {
        uint64_t size = piece_bytes(&job->list[i]);
        job->first[i + 1] = job->first[i] + (int64_t)((job->list[i].from->bytes + size - 1) / size);
    }
    for (int t = 0; t < threads; t++) {
        struct worker *w = &job->workers[t];
        tp_ctx_init(&w->ctx);
        w->ctx.device = ctx->device;
        w->failed = -1;
        w->in = tp_alloc_raw(ctx, (size_t)PIECE, 1);
        if (w->in == NULL) return TP_NOMEM;
        w->out = tp_alloc_raw(ctx, (size_t)PIECE, 1);
        if (w->out == NULL) return TP_NOMEM;
        if (job->host_memory) continue;
        w->rows = ctx->device->backend->alloc(ctx, ctx->device, (size_t)PIECE);
        if (w->rows == NULL) return TP_NOMEM;
    }
    return TP_OK;
}

/* Every piece before the lowest failed one was looked at, so that one is the same for any number of threads. */
static tp_status first_failure(tp_ctx *ctx, const struct job *job, int threads)
{
    const struct worker *worst = NULL;
    for (int t = 0; t < threads; t++) {
        const struct worker *w = &job->workers[t];
        if (w->failed >= 0 && (worst == NULL || w->failed < worst->failed)) worst = w;
    }
    return worst == NULL ? TP_OK : tp_fail(ctx, worst->ctx.status, "%s", worst->ctx.message);
}

tp_status tp_store_transfer(tp_ctx *ctx, const tp_transfer *list, size_t n)
{
    if (n == 0) return TP_OK;
    struct job *job = tp_alloc(ctx, 1, sizeof *job);
    if (job == NULL) return TP_NOMEM;
    *job = (struct job){.list = list, .n = n, .host_memory = ctx->device->backend->host_memory};
    int threads = job->host_memory ? ctx->device->threads : 1;
    if (threads > TP_PARALLEL_MAX) threads = TP_PARALLEL_MAX;
    if (threads < 1) threads = 1;
    tp_status status = prepare(ctx, job, threads);
    if (status == TP_OK) {
        tp_parallel_for(threads, job->first[n], body, job);
        status = first_failure(ctx, job, threads);
    }
    for (int t = 0; t < threads; t++) {
        struct worker *w = &job->workers[t];
        if (w->rows != NULL) ctx->device->backend->free(ctx->device, w->rows, (size_t)PIECE);
        tp_free(w->in);
        tp_free(w->out);
    }
    tp_free(job->first);
    tp_free(job);
    return status;
}

tp_status tp_stored_read_f32(tp_ctx *ctx, const tp_stored *from, bool check, float *out)
{
    size_t size = (size_t)tp_formats[from->format].block_bytes, n = (size_t)from->bytes / size;
    void *bytes = tp_alloc_raw(ctx, n, size);
    if (bytes == NULL) return TP_NOMEM;
    tp_status status = tp_file_pread(ctx, from->file, from->offset, bytes, n * size);
    int64_t bad = status == TP_OK && check ? tp_scan_finite(from->format, bytes, n * size) : -1;
    if (bad >= 0)
        status =
            tp_fail(ctx, TP_NUMERIC, "%s: %s: value %lld is not finite", tp_file_path(from->file), from->name, (long long)bad);
    if (status == TP_OK) tp_convert_to_f32(tp_formats[from->format].dtype, bytes, n, out);
    tp_free(bytes);
    return status;
}
