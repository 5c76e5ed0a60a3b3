/* Random weights of any shape, as fast as they can be written: two buffers take turns, one is written while the other is
 * filled by all threads. */
#include "models/init.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "backend/backend.h"
#include "base/map.h"
#include "base/mem.h"
#include "base/safetensors.h"
#include "models/build.h"
#include "models/parallel.h"
#include "models/quantiles.h"

#define BUFFER ((int64_t)8 << 20) /* weights of a buffer */
#define PIECE  ((int64_t)1 << 18) /* weights of a thread's turn */

/* One run. */
struct init {
    tp_ctx *ctx;
    const tp_model_config *config;
    const char *folder; /* staging */
    uint64_t seed;
    tp_dtype dtype;
    size_t size; /* bytes of a value */
    int threads;
    tp_part *parts;
    size_t n_parts;
    int *shard_of; /* [n_parts] */
    int n_shards;
    size_t *order;        /* [n_parts] parts by shard and name: the order of the files */
    void *normal;         /* quantiles in dtype */
    unsigned char one[4]; /* 1 in dtype */
    unsigned char *buffers[2];
};

/* ---- filling and writing ---- */

/* A stretch of one tensor. */
struct chunk {
    const tp_part *part;
    uint32_t number; /* of the part: its stream */
    int64_t first, n;
    unsigned char *bytes;
};

struct turn {
    const struct init *in;
    const struct chunk *fill, *write; /* NULL: nothing to do */
    tp_safetensors_writer *writer;
    tp_status written;
};

static void fill_piece(const struct init *in, const struct chunk *c, int64_t first)
{
    int64_t n = c->n - first < PIECE ? c->n - first : PIECE;
    if (c->part->role == TP_PART_WEIGHT)
        tp_quantiles_fill(in->normal, in->size, (tp_rng_key){in->seed, TP_STREAM_INIT + c->number, 0},
                          (uint64_t)(c->first + first), n, c->bytes + (size_t)first * in->size);
    else if (c->part->role == TP_PART_BIAS)
        memset(c->bytes + (size_t)first * in->size, 0, (size_t)n * in->size);
    else
        for (int64_t i = first; i < first + n; i++) memcpy(c->bytes + (size_t)i * in->size, in->one, in->size);
}

/* Item 0 writes, the others fill. */
static void run_item(void *state, int64_t item, int worker)
{
    struct turn *t = state;
    (void)worker;
    if (item > 0)
        fill_piece(t->in, t->fill, (item - 1) * PIECE);
    else if (t->write != NULL)
        t->written = tp_safetensors_write(t->in->ctx, t->writer, t->write->bytes, (size_t)t->write->n * t->in->size);
}

static tp_status run_turn(const struct init *in, tp_safetensors_writer *writer, const struct chunk *fill,
                          const struct chunk *write)
{
    struct turn turn = {in, fill, write, writer, TP_OK};
    int64_t pieces = fill != NULL ? (fill->n + PIECE - 1) / PIECE : 0;
    tp_parallel_for(in->threads, 1 + pieces, run_item, &turn);
    return turn.written;
}

/* ---- shards ---- */

static uint64_t part_bytes(const struct init *in, const tp_part *part)
{
    return (uint64_t)part->rows * (uint64_t)part->cols * in->size;
}

/* Greedy, in the order of the live model. */
static tp_status plan_shards(struct init *in)
{
    uint64_t used = 0;
    in->shard_of = tp_alloc(in->ctx, in->n_parts, sizeof *in->shard_of);
    in->order = tp_alloc(in->ctx, in->n_parts, sizeof *in->order);
    if (in->shard_of == NULL || in->order == NULL) return TP_NOMEM;
    in->n_shards = 1;
    for (size_t i = 0; i < in->n_parts; i++) {
        uint64_t bytes = part_bytes(in, &in->parts[i]);
        if (used > 0 && used + bytes > TP_INIT_SHARD_BYTES) {
            in->n_shards++;
            used = 0;
        }
        used += bytes;
        in->shard_of[i] = in->n_shards - 1;
        in->order[i] = i;
    }
    return TP_OK;
}

static int by_file_order(const void *a, const void *b, void *user)
{
    const struct init *in = user;
    size_t x = *(const size_t *)a, y = *(const size_t *)b;
    if (in->shard_of[x] != in->shard_of[y]) return in->shard_of[x] < in->shard_of[y] ? -1 : 1;
    return strcmp(in->parts[x].name, in->parts[y].name);
}

static void shard_name(const struct init *in, int shard, char out[64])
{
    if (in->n_shards == 1)
        snprintf(out, 64, "model.safetensors");
    else
        snprintf(out, 64, "model-%05d-of-%05d.safetensors", shard + 1, in->n_shards);
}

static tp_status declare(const struct init *in, tp_safetensors_writer *writer, size_t begin, size_t end)
{
    for (size_t i = begin; i < end; i++) {
        const tp_part *part = &in->parts[in->order[i]];
        bool matrix = part->role == TP_PART_WEIGHT;
        int64_t shape[2] = {part->conv1d ? part->cols : part->rows, part->conv1d ? part->rows : part->cols};
        if (!matrix) shape[0] = part->cols;
        TP_TRY(tp_safetensors_declare(in->ctx, writer, part->name, in->dtype, matrix ? 2 : 1, shape));
    }
    return TP_OK;
}

static tp_status write_tensors(const struct init *in, tp_safetensors_writer *writer, size_t begin, size_t end)
{
    struct chunk chunks[2] = {{0}}, *ready = NULL;
    int turn = 0;
    for (size_t i = begin; i < end; i++) {
        const tp_part *part = &in->parts[in->order[i]];
        int64_t total = part->rows * part->cols;
        for (int64_t first = 0; first < total; first += BUFFER, turn ^= 1) {
            struct chunk *next = &chunks[turn];
            *next = (struct chunk){part, (uint32_t)in->order[i], first, total - first < BUFFER ? total - first : BUFFER,
                                   in->buffers[turn]};
            TP_TRY(run_turn(in, writer, next, ready));
            ready = next;
        }
    }
    return run_turn(in, writer, NULL, ready);
}

static tp_status write_shard(const struct init *in, int shard, size_t begin, size_t end)
{
    char name[64];
    tp_safetensors_writer *writer;
    shard_name(in, shard, name);
    char *path = tp_path_join(in->ctx, in->folder, name);
    if (path == NULL) return TP_NOMEM;
    tp_status status = tp_safetensors_create(in->ctx, path, &writer);
    tp_free(path);
    TP_TRY(status);
    status = declare(in, writer, begin, end);
    if (status == TP_OK) status = write_tensors(in, writer, begin, end);
    if (status == TP_OK) return tp_safetensors_finish(in->ctx, writer);
    tp_safetensors_discard(writer);
    return status;
}

/* ---- the folder ---- */

static tp_status write_text(const struct init *in, const char *name, tp_buf *text)
{
    char *path = tp_path_join(in->ctx, in->folder, name);
    tp_status status = path == NULL ? TP_NOMEM : tp_buf_status(in->ctx, text, name);
    if (status == TP_OK) status = tp_file_write(in->ctx, path, text->data, text->len);
    tp_free(path);
    tp_buf_free(text);
    return status;
}

static tp_status write_index(const struct init *in)
{
    tp_buf text;
    char shard[64];
    uint64_t total = 0;
    if (in->n_shards == 1) return TP_OK;
    for (size_t i = 0; i < in->n_parts; i++) total += part_bytes(in, &in->parts[i]);
    tp_buf_init(&text, 0);
    tp_buf_printf(&text, "{\n  \"metadata\": {\"total_size\": %llu},\n  \"weight_map\": {", (unsigned long long)total);
    for (size_t i = 0; i < in->n_parts; i++) {
        shard_name(in, in->shard_of[i], shard);
        tp_buf_printf(&text, "%s\n    \"%s\": \"%s\"", i > 0 ? "," : "", in->parts[i].name, shard);
    }
    tp_buf_text(&text, "\n  }\n}\n");
    return write_text(in, "model.safetensors.index.json", &text);
}

static tp_status write_config(const struct init *in)
{
    tp_buf text;
    tp_model_config stated = *in->config; /* borrows the arrays */
    stated.dtype = in->dtype;
    tp_buf_init(&text, 0);
    tp_config_write_json(&stated, &text);
    return write_text(in, "config.json", &text);
}

static tp_status write_all(struct init *in)
{
    TP_TRY(tp_parts_list(in->ctx, in->config, &in->parts, &in->n_parts));
    TP_TRY(plan_shards(in));
    in->normal = tp_quantiles_new(in->ctx, in->config->initializer_range, in->dtype);
    if (in->normal == NULL) return TP_NOMEM;
    tp_convert_from_f32(in->dtype, &(float){1}, 1, in->one);
    for (int b = 0; b < 2; b++) {
        in->buffers[b] = tp_alloc_raw(in->ctx, (size_t)BUFFER, in->size);
        if (in->buffers[b] == NULL) return TP_NOMEM;
    }
    qsort_r(in->order, in->n_parts, sizeof *in->order, by_file_order, in);
    for (size_t begin = 0, end; begin < in->n_parts; begin = end) {
        int shard = in->shard_of[in->order[begin]];
        for (end = begin; end < in->n_parts && in->shard_of[in->order[end]] == shard;) end++;
        TP_TRY(write_shard(in, shard, begin, end));
    }
    TP_TRY(write_index(in));
    return write_config(in);
}

static void free_all(struct init *in)
{
    tp_free(in->parts);
    tp_free(in->shard_of);
    tp_free(in->order);
    tp_free(in->normal);
    tp_free(in->buffers[0]);
    tp_free(in->buffers[1]);
}

static int usable_threads(const tp_ctx *ctx)
{
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    if (ctx->device != NULL && ctx->device->threads > 0) return ctx->device->threads;
    return online > 0 && online < TP_PARALLEL_MAX ? (int)online : TP_PARALLEL_MAX;
}

/* Beside the final name, and named as unfinished folders are, so that a sweep finds what a killed run leaves. */
static tp_status write_folder(tp_ctx *ctx, const tp_model_config *config, const char *out, uint64_t seed, tp_dtype dtype)
{
    tp_buf staging;
    tp_buf_init(&staging, 0);
    tp_buf_printf(&staging, "%s.tmp-%ld-%08x", out, (long)getpid(), (unsigned)(uint32_t)tp_hash(out, strlen(out)));
    tp_status status = tp_buf_status(ctx, &staging, out);
    if (status == TP_OK) status = tp_folder_make(ctx, staging.data);
    if (status == TP_OK) {
        struct init in = {.ctx = ctx,
                          .config = config,
                          .folder = staging.data,
                          .seed = seed,
                          .dtype = dtype,
                          .size = tp_dtype_bytes(dtype),
                          .threads = usable_threads(ctx)};
        status = write_all(&in);
        free_all(&in);
        if (status == TP_OK && rename(staging.data, out) != 0)
            status = tp_fail(ctx, TP_IO_WRITE, "%s: %s", out, strerror(errno));
        if (status != TP_OK) {
            tp_ctx ignored; /* the first error is the one to report */
            tp_ctx_init(&ignored);
            (void)!tp_folder_remove(&ignored, staging.data);
        }
    }
    tp_buf_free(&staging);
    return status;
}

static tp_status read_config(tp_ctx *ctx, const char *path, tp_model_config *config)
{
    if (!tp_path_is_folder(path)) return tp_config_read(ctx, path, config);
    char *file = tp_path_join(ctx, path, "config.json");
    if (file == NULL) return TP_NOMEM;
    tp_status status = tp_config_read(ctx, file, config);
    tp_free(file);
    return status;
}

tp_status tp_model_init(tp_ctx *ctx, const char *config_path, const char *out_folder, uint64_t seed, tp_dtype dtype)
{
    struct stat info;
    tp_model_config config;
    if (dtype != TP_F32 && dtype != TP_BF16 && dtype != TP_F16)
        return tp_fail(ctx, TP_INVALID, "random weights: expected F32, BF16 or F16, got %s", tp_dtype_name(dtype));
    if (lstat(out_folder, &info) == 0) return tp_fail(ctx, TP_INVALID, "%s: exists already", out_folder);
    TP_TRY(read_config(ctx, config_path, &config));
    tp_status status = write_folder(ctx, &config, out_folder, seed, dtype);
    tp_config_free(&config);
    return status;
}
