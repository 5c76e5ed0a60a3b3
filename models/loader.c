/* Opening a model: find every tensor the configuration asks for, check it, and use it in place or bring it to the device.
 *
 *     stored as            f32 compute        bf16 compute                                  f16 compute (GPU)
 *     F32                  in place           converted to BF16 memory of our own           converted to F16
 *     F16                  in place           converted                                     in place
 *     BF16                 in place           in place                                      converted
 *     Q8_0, Q4_0, Q4_1     in place           in place, rounded to bf16 when unpacked       in place, rounded when unpacked
 *
 * "In place" needs a mapped file and a device that reads the host's memory; otherwise the same bytes are copied, and if it is
 * wanted, linears of one input are stacked on the way (models/joint.c). Norms and
 * biases become f32 vectors in one block. The dry backend gets shapes and an address that nobody reads. */
#include <stdio.h>
#include <string.h>

#include "base/mem.h"
#include "models/scan.h"
#include "models/source.h"

#define SAMPLE         4096 /* bytes of each end of a tensor that the fingerprint sees */
#define ALIGN          256  /* bytes between the beginnings of what shares a block */
#define LISTED_MISSING 5    /* names in the message about missing tensors */

/* A model under construction. */
struct opening {
    tp_ctx *ctx;
    tp_model *model;
    const tp_model_options *options;
    tp_part *parts;
    tp_stored *stored; /* [n] */
    tp_transfer *transfers;
    size_t n, n_transfers;
};

static void *nowhere(void)
{
    return (void *)(uintptr_t)4096;
}

static tp_format_id held_format(tp_format_id stored, tp_dtype precision)
{
    return precision != TP_F32 && tp_formats[stored].dense ? tp_format_of(precision) : stored;
}

/* ---- checks ---- */

static tp_status check_missing(const struct opening *o)
{
    size_t missing = 0;
    tp_buf names;
    tp_buf_init(&names, TP_MESSAGE_BYTES / 2);
    for (size_t i = 0; i < o->n; i++) {
        if (o->stored[i].name != NULL) continue;
        if (missing++ < LISTED_MISSING)
            tp_buf_printf(&names, "%s%s", missing > 1 ? ", " : "",
                          o->model->store->gguf != NULL ? o->parts[i].gguf : o->parts[i].name);
    }
    tp_status status = tp_buf_status(o->ctx, &names, "names of missing tensors");
    if (status == TP_OK && missing > 0)
        status = tp_fail(o->ctx, TP_FORMAT, "%s: %zu tensor%s missing: %s%s", o->model->path, missing,
                         missing == 1 ? " is" : "s are", tp_buf_cstr(&names), missing > LISTED_MISSING ? ", ..." : "");
    tp_buf_free(&names);
    return status;
}

static const char *shape_text(const int64_t *shape, int rank, char out[128])
{
    size_t used = (size_t)snprintf(out, 128, "[");
    for (int d = 0; d < rank && used < 100; d++)
        used += (size_t)snprintf(out + used, 128 - used, "%s%lld", d > 0 ? ", " : "", (long long)shape[d]);
    snprintf(out + used, 128 - used, "]");
    return out;
}

static tp_status check_tensor(tp_ctx *ctx, const tp_part *part, const tp_stored *s)
{
    char found[128], wanted[128];
    bool matrix = part->role == TP_PART_WEIGHT;
    int64_t shape[2] = {s->transposed ? part->cols : part->rows, s->transposed ? part->rows : part->cols};
    if (!matrix) shape[0] = part->cols;
    int rank = matrix ? 2 : 1;
    if (s->rank != rank || memcmp(s->shape, shape, (size_t)rank * sizeof *shape) != 0)
        return tp_fail(ctx, TP_SHAPE, "%s: %s: shape %s, the configuration needs %s", tp_file_path(s->file), s->name,
                       shape_text(s->shape, s->rank, found), shape_text(shape, rank, wanted));
    if (s->format == TP_FORMAT_COUNT)
        return tp_fail(ctx, TP_UNSUPPORTED,
                       "%s: %s: tensors of type %s are not supported; available: F32, BF16, F16, and Q8_0, Q4_0, Q4_1 in GGUF",
                       tp_file_path(s->file), s->name, s->type);
    if (!matrix && !tp_formats[s->format].dense)
        return tp_fail(ctx, TP_UNSUPPORTED, "%s: %s: a vector of type %s, expected F32, BF16 or F16", tp_file_path(s->file),
                       s->name, s->type);
    return TP_OK;
}

static tp_status check_all(const struct opening *o)
{
    TP_TRY(check_missing(o));
    for (size_t i = 0; i < o->n; i++) TP_TRY(check_tensor(o->ctx, &o->parts[i], &o->stored[i]));
    return TP_OK;
}

/* ---- matrices ---- */

/* GGUF's arch "llama" (our families llama and mistral) interleaves the halves of each head of q and k. */
static bool interleaved(const struct opening *o, const tp_part *part)
{
    tp_family family = o->model->config.family;
    return part->rotary && o->model->store->gguf != NULL && (family == TP_FAMILY_LLAMA || family == TP_FAMILY_MISTRAL);
}

static uint64_t stacked_bytes(const tp_joint *joint)
{
    const tp_matrix *w = &joint->weight;
    return (uint64_t)(w->rows + joint->room) * (uint64_t)w->stride * (uint64_t)tp_formats[w->format].block_bytes;
}

static uint64_t matrix_bytes(const tp_matrix *w)
{
    return (uint64_t)w->rows * (uint64_t)w->cols / (uint64_t)tp_formats[w->format].block *
           (uint64_t)tp_formats[w->format].block_bytes;
}

/* Everything but the address of what will be in memory of our own. */
static void describe_matrix(struct opening *o, const tp_part *part, const tp_stored *s)
{
    tp_matrix *w = tp_part_matrix(o->model, part);
    tp_format_id held = held_format(s->format, o->options->precision);
    *w = (tp_matrix){.format = held,
                     .rows = part->rows,
                     .cols = part->cols,
                     .transposed = s->transposed,
                     .rope_pairs = interleaved(o, part) ? (int32_t)o->model->config.head_dim : 0,
                     .round_bf16 = o->options->precision == TP_BF16 && !tp_formats[held].dense};
    o->model->weight_bytes += matrix_bytes(w);
}

/* The address of what is used where it lies. */
static void find_in_place(struct opening *o, tp_matrix *w, const tp_stored *s)
{
    const tp_backend *backend = o->ctx->device->backend;
    if (w->stride > 0) return;
    if (!backend->computes) w->data = nowhere();
    if (!backend->computes || !backend->host_memory || w->format != s->format) return;
    const char *map = tp_file_map(s->file);
    if (map == NULL) return;
    w->data = map + s->offset;
    o->model->store->in_place = true;
}

/* ---- stacked matrices ---- */

/* Columns that keep rows at multiples of 32 bytes in either precision. */
static int64_t room_for(const tp_joint *joint, int64_t rank)
{
    return (joint->n * rank + 15) / 16 * 16;
}

/* All of them or none, one behind the other. */
static bool biases_fit(const tp_joint *joint)
{
    for (int i = 1; i < joint->n; i++) {
        const tp_tensor *before = &joint->members[i - 1]->bias, *bias = &joint->members[i]->bias;
        if ((before->data == NULL) != (bias->data == NULL)) return false;
        if (bias->data != NULL && (float *)bias->data != (float *)before->data + before->cols) return false;
    }
    return true;
}

/* Dense, of the precision's own format, and stored row by row. */
static bool can_be_stacked(const struct opening *o, const tp_joint *joint)
{
    tp_format_id format = tp_format_of(o->options->precision);
    for (int i = 0; i < joint->n; i++) {
        const tp_matrix *w = &joint->members[i]->weight;
        if (w->format != format || w->transposed || w->rope_pairs > 0 || w->cols * 4 > TP_TRANSFER_ROW_BYTES) return false;
    }
    return joint->n > 0 && biases_fit(joint);
}

/* Shape, strides and bytes; the address comes with the memory. */
static void stack(struct opening *o, tp_joint *joint)
{
    if (!can_be_stacked(o, joint)) return;
    joint->room = room_for(joint, o->options->room_rank);
    joint->weight = joint->members[0]->weight;
    joint->weight.rows = 0;
    joint->weight.stride = joint->weight.cols + joint->room;
    for (int i = 0; i < joint->n; i++) {
        joint->weight.rows += joint->members[i]->weight.rows;
        joint->members[i]->weight.stride = joint->weight.stride;
        o->model->weight_bytes -= matrix_bytes(&joint->members[i]->weight);
    }
    if (joint->members[0]->bias.data != NULL)
        joint->bias = tp_parameter(NULL, 1, joint->weight.rows, joint->members[0]->bias.data, NULL);
    if (joint->room > o->model->room) o->model->room = joint->room;
    o->model->weight_bytes += stacked_bytes(joint);
}

static void stack_all(struct opening *o)
{
    if (!o->options->join) return;
    for (int64_t i = 0; i < o->model->config.n_layers; i++)
        for (int j = 0; j < TP_JOINTS; j++) stack(o, &o->model->blocks[i].joints[j]);
}

static tp_status place_stacked(struct opening *o, tp_joint *joint)
{
    char *memory = nowhere();
    if (joint->weight.rows == 0) return TP_OK;
    if (o->ctx->device->backend->computes) memory = tp_store_alloc(o->ctx, o->model->store, (size_t)stacked_bytes(joint));
    if (memory == NULL) return TP_NOMEM;
    joint->weight.data = memory;
    for (int i = 0; i < joint->n; i++) {
        tp_matrix *w = &joint->members[i]->weight;
        w->data = memory;
        memory += w->rows * w->stride * tp_formats[w->format].block_bytes;
    }
    return TP_OK;
}

static tp_status place_all_stacked(struct opening *o)
{
    for (int64_t i = 0; i < o->model->config.n_layers; i++)
        for (int j = 0; j < TP_JOINTS; j++) TP_TRY(place_stacked(o, &o->model->blocks[i].joints[j]));
    return TP_OK;
}

static uint64_t own_bytes(const tp_matrix *w)
{
    return w->data == NULL ? (matrix_bytes(w) + ALIGN - 1) / ALIGN * ALIGN : 0;
}

/* One block for all matrices that are not used in place, so that the system can give it large pages. */
static tp_status add_transfers(struct opening *o)
{
    uint64_t total = 0;
    for (size_t i = 0; i < o->n; i++)
        if (o->parts[i].role == TP_PART_WEIGHT) total += own_bytes(tp_part_matrix(o->model, &o->parts[i]));
    char *memory = total > 0 ? tp_store_alloc(o->ctx, o->model->store, (size_t)total) : NULL;
    if (total > 0 && memory == NULL) return TP_NOMEM;
    for (size_t i = 0; i < o->n; i++) {
        if (o->parts[i].role != TP_PART_WEIGHT) continue;
        tp_matrix *w = tp_part_matrix(o->model, &o->parts[i]);
        tp_transfer transfer = {
            .from = &o->stored[i], .in_place = w->data, .to = w->format, .check = o->options->check_weights};
        if (w->data == NULL) {
            transfer.memory = memory;
            memory += own_bytes(w);
            w->data = transfer.memory;
        }
        if (w->stride > 0) {
            transfer.in_place = NULL;
            transfer.memory = (void *)(uintptr_t)w->data;
            transfer.row_values = w->cols;
            transfer.stride = w->stride;
        }
        if (transfer.memory != NULL || transfer.check) o->transfers[o->n_transfers++] = transfer;
    }
    return TP_OK;
}

static tp_status place_matrices(struct opening *o)
{
    for (size_t i = 0; i < o->n; i++)
        if (o->parts[i].role == TP_PART_WEIGHT) describe_matrix(o, &o->parts[i], &o->stored[i]);
    stack_all(o);
    for (size_t i = 0; i < o->n; i++)
        if (o->parts[i].role == TP_PART_WEIGHT) find_in_place(o, tp_part_matrix(o->model, &o->parts[i]), &o->stored[i]);
    TP_TRY(place_all_stacked(o));
    if (!o->ctx->device->backend->computes) return TP_OK;
    o->transfers = tp_alloc(o->ctx, o->n, sizeof *o->transfers);
    if (o->transfers == NULL) return TP_NOMEM;
    TP_TRY(add_transfers(o));
    return tp_store_transfer(o->ctx, o->transfers, o->n_transfers);
}

/* ---- norms and biases ---- */

/* Values that a vector takes. */
static size_t padded(int64_t n)
{
    const size_t step = ALIGN / sizeof(float);
    return ((size_t)n + step - 1) / step * step;
}

/* Back to the order of the live model. */
static tp_status unpermute(tp_ctx *ctx, float *values, int64_t n, int32_t head_dim)
{
    tp_matrix order = {.rope_pairs = head_dim};
    float *stored = tp_alloc_raw(ctx, (size_t)n, sizeof *stored);
    if (stored == NULL) return TP_NOMEM;
    memcpy(stored, values, (size_t)n * sizeof *stored);
    for (int64_t i = 0; i < n; i++) values[i] = stored[tp_matrix_stored_row(&order, i)];
    tp_free(stored);
    return TP_OK;
}

static tp_status read_vector(const struct opening *o, size_t i, float *out)
{
    const tp_part *part = &o->parts[i];
    TP_TRY(tp_stored_read_f32(o->ctx, &o->stored[i], o->options->check_weights, out));
    if (o->options->precision == TP_BF16) /* a base stored wider is rounded as a whole */
        for (int64_t c = 0; c < part->cols; c++) out[c] = tp_bf16_to_f32(tp_f32_to_bf16(out[c]));
    if (o->options->precision == TP_F16)
        for (int64_t c = 0; c < part->cols; c++) out[c] = tp_f16_to_f32(tp_f32_to_f16(out[c]));
    return interleaved(o, part) ? unpermute(o->ctx, out, part->cols, (int32_t)o->model->config.head_dim) : TP_OK;
}

static tp_status read_vectors(const struct opening *o, float *host)
{
    for (size_t i = 0, at = 0; i < o->n; i++) {
        if (o->parts[i].role == TP_PART_WEIGHT) continue;
        TP_TRY(read_vector(o, i, host + at));
        at += padded(o->parts[i].cols);
    }
    return TP_OK;
}

/* Every vector is a tensor over one block of the device. */
static tp_status place_vectors(struct opening *o)
{
    bool computes = o->ctx->device->backend->computes;
    size_t total = 0, at = 0;
    float *memory = nowhere(), *host = NULL;
    for (size_t i = 0; i < o->n; i++)
        if (o->parts[i].role != TP_PART_WEIGHT) total += padded(o->parts[i].cols);
    if (computes) {
        memory = tp_store_alloc(o->ctx, o->model->store, total * sizeof *memory);
        host = tp_alloc(o->ctx, total, sizeof *host);
        tp_status status = memory != NULL && host != NULL ? read_vectors(o, host) : TP_NOMEM;
        if (status == TP_OK) status = o->ctx->device->backend->copy_in(o->ctx, memory, host, total * sizeof *memory);
        tp_free(host);
        TP_TRY(status);
    }
    for (size_t i = 0; i < o->n; i++) {
        if (o->parts[i].role == TP_PART_WEIGHT) continue;
        *tp_part_vector(o->model, &o->parts[i]) = tp_parameter(NULL, 1, o->parts[i].cols, memory + at, NULL);
        at += padded(o->parts[i].cols);
    }
    o->model->weight_bytes += total * sizeof(float);
    return TP_OK;
}

/* ---- fingerprint ---- */

static tp_status sample(tp_ctx *ctx, const tp_stored *s, tp_buf *out)
{
    unsigned char bytes[2 * SAMPLE];
    uint8_t digest[32];
    size_t n = (size_t)(s->bytes < sizeof bytes ? s->bytes : sizeof bytes), head = n / 2;
    TP_TRY(tp_file_pread(ctx, s->file, s->offset, bytes, head));
    TP_TRY(tp_file_pread(ctx, s->file, s->offset + s->bytes - (n - head), bytes + head, n - head));
    tp_sha256(bytes, n, digest);
    tp_buf_append(out, digest, sizeof digest);
    return TP_OK;
}

static tp_status fingerprint(const struct opening *o)
{
    char shape[128];
    tp_buf text;
    tp_status status = TP_OK;
    tp_buf_init(&text, 0);
    tp_config_write_json(&o->model->config, &text);
    for (size_t i = 0; i < o->n && status == TP_OK; i++) {
        const tp_stored *s = &o->stored[i];
        tp_buf_printf(&text, "%s %s %s\n", s->name, s->type, shape_text(s->shape, s->rank, shape));
        status = sample(o->ctx, s, &text);
    }
    if (status == TP_OK) status = tp_buf_status(o->ctx, &text, "fingerprint");
    if (status == TP_OK) tp_sha256_hex(text.data, text.len, o->model->fingerprint);
    tp_buf_free(&text);
    return status;
}

/* ---- the public functions ---- */

static tp_status open_parts(struct opening *o, const tp_source *source)
{
    tp_model *model = o->model;
    TP_TRY(tp_parts_list(o->ctx, &model->config, &o->parts, &o->n));
    o->stored = tp_alloc(o->ctx, o->n, sizeof *o->stored);
    if (o->stored == NULL) return TP_NOMEM;
    TP_TRY(source->locate(o->ctx, model->store, &model->config, o->parts, o->n, o->stored));
    TP_TRY(check_all(o));
    TP_TRY(place_vectors(o));
    TP_TRY(place_matrices(o));
    if (model->config.tied) model->head.weight = model->embedding;
    return fingerprint(o);
}

static tp_status finish(struct opening *o, tp_status status, tp_model **model)
{
    tp_free(o->parts);
    tp_free(o->stored);
    tp_free(o->transfers);
    if (status == TP_OK)
        *model = o->model;
    else
        tp_model_free(o->model);
    return status;
}

static tp_status choose_source(tp_ctx *ctx, const char *path, const tp_source **source)
{
    *source = &tp_source_hf;
    if (tp_path_is_folder(path)) return TP_OK;
    if (!tp_path_exists(path)) return tp_fail(ctx, TP_IO_READ, "%s: no such file or folder", path);
    if (tp_ends_with(path, ".safetensors") || tp_ends_with(path, ".json"))
        return tp_fail(ctx, TP_INVALID, "%s: expected the model's folder or a .gguf file, got a file of the folder", path);
    *source = &tp_source_gguf;
    return TP_OK;
}

tp_status tp_model_open(tp_ctx *ctx, const char *path, const tp_model_options *options, tp_model **model)
{
    const tp_source *source;
    tp_model_config config = {0};
    struct opening o = {.ctx = ctx, .options = options};
    *model = NULL;
    TP_TRY(choose_source(ctx, path, &source));
    tp_model_store *store = tp_store_new(ctx);
    if (store == NULL) return TP_NOMEM;
    tp_status status = source->open(ctx, path, store, &config);
    if (status != TP_OK) {
        tp_store_free(store);
        return status;
    }
    TP_TRY(tp_model_new(ctx, &config, store, path, options->precision, &o.model));
    return finish(&o, open_parts(&o, source), model);
}

/* What a folder written from this configuration would hold. */
static void pretend_stored(struct opening *o)
{
    tp_dtype dtype = o->model->config.dtype;
    tp_format_id format = tp_format_of(dtype);
    for (size_t i = 0; i < o->n; i++)
        o->stored[i] = (tp_stored){
            .name = o->parts[i].name, .format = format, .transposed = o->parts[i].conv1d && o->parts[i].role == TP_PART_WEIGHT};
}

static tp_status shape_parts(struct opening *o)
{
    TP_TRY(tp_parts_list(o->ctx, &o->model->config, &o->parts, &o->n));
    o->stored = tp_alloc(o->ctx, o->n, sizeof *o->stored);
    if (o->stored == NULL) return TP_NOMEM;
    pretend_stored(o);
    TP_TRY(place_vectors(o));
    TP_TRY(place_matrices(o));
    if (o->model->config.tied) o->model->head.weight = o->model->embedding;
    return TP_OK;
}

tp_status tp_model_from_config(tp_ctx *ctx, const tp_model_config *config, const tp_model_options *options, tp_model **model)
{
    tp_model_config copy;
    struct opening o = {.ctx = ctx, .options = options};
    *model = NULL;
    if (ctx->device->backend->computes) return tp_fail(ctx, TP_UNSUPPORTED, "a model without weights needs the dry device");
    TP_TRY(tp_config_copy(ctx, config, &copy));
    tp_model_store *store = tp_store_new(ctx);
    if (store == NULL) {
        tp_config_free(&copy);
        return TP_NOMEM;
    }
    TP_TRY(tp_model_new(ctx, &copy, store, "", options->precision, &o.model));
    return finish(&o, shape_parts(&o), model);
}

tp_status tp_model_check(tp_ctx *ctx, const tp_model *model)
{
    const tp_model_store *store = model->store;
    if (!store->in_place) return TP_OK;
    if (store->gguf != NULL) return tp_file_check(ctx, tp_gguf_file(store->gguf));
    for (size_t i = 0; i < store->n_shards; i++) TP_TRY(tp_file_check(ctx, tp_safetensors_file(store->shards[i])));
    return TP_OK;
}
