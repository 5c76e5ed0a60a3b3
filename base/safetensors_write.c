/* safetensors writer: declarations first, which fix the header and every offset, then the bytes in file order. */
#include <stdio.h>
#include <stdlib.h>

#include "base/json.h"
#include "base/map.h"
#include "base/mem.h"
#include "base/safetensors.h"

typedef struct tensor {
    tp_entry entry;
    char *name; /* entry.name, ours */
} tensor;

struct tp_safetensors_writer {
    char *path;
    tp_writer *out;
    tensor *tensors;
    size_t count, capacity;
    tp_map *names;
    tp_map *metadata_keys;
    tp_buf metadata;  /* ,"key":"value" pairs */
    bool sealed;      /* sorted: no more declarations */
    bool began;       /* the header is written */
    size_t current;   /* tensor whose bytes come next */
    uint64_t written; /* of the current tensor */
};

/* ---- declarations ---- */

tp_status tp_safetensors_create(tp_ctx *ctx, const char *path, tp_safetensors_writer **out)
{
    *out = NULL;
    tp_safetensors_writer *w = tp_alloc(ctx, 1, sizeof *w);
    if (w == NULL) return TP_NOMEM;
    tp_buf_init(&w->metadata, TP_SAFETENSORS_HEADER_MAX);
    w->path = tp_strdup(ctx, path);
    w->names = tp_map_new(ctx, false);
    w->metadata_keys = tp_map_new(ctx, false);
    tp_status status = w->path != NULL && w->names != NULL && w->metadata_keys != NULL ? TP_OK : TP_NOMEM;
    if (status == TP_OK) status = tp_writer_open(ctx, path, &w->out);
    if (status == TP_OK) status = tp_safetensors_add_metadata(ctx, w, "format", "pt");
    if (status != TP_OK)
        tp_safetensors_discard(w);
    else
        *out = w;
    return status;
}

/* Text that reads back as it was written: the header has to be UTF-8. */
static bool is_text(const char *text)
{
    return tp_utf8_valid_prefix(text, strlen(text)) == strlen(text);
}

tp_status tp_safetensors_add_metadata(tp_ctx *ctx, tp_safetensors_writer *w, const char *key, const char *value)
{
    bool repeated;
    if (w->began) return tp_fail(ctx, TP_INTERNAL, "%s: metadata %s comes after the header", w->path, key);
    if (!is_text(key) || !is_text(value)) return tp_fail(ctx, TP_INTERNAL, "%s: metadata %s is not UTF-8", w->path, key);
    TP_TRY(tp_map_put(ctx, w->metadata_keys, tp_span_of(key), 0, &repeated));
    if (repeated) return tp_fail(ctx, TP_INTERNAL, "%s: metadata %s given twice", w->path, key);
    if (w->metadata.len > 0) tp_buf_char(&w->metadata, ',');
    tp_json_write_string(&w->metadata, key, strlen(key));
    tp_buf_char(&w->metadata, ':');
    tp_json_write_string(&w->metadata, value, strlen(value));
    return tp_buf_status(ctx, &w->metadata, w->path);
}

static tp_status check_declaration(tp_ctx *ctx, const tp_safetensors_writer *w, const char *name, tp_dtype dtype, int rank,
                                   const int64_t *shape, uint64_t *bytes)
{
    int64_t bits = tp_dtype_bits(dtype);
    if (w->sealed) return tp_fail(ctx, TP_INTERNAL, "%s: %s: declared too late", w->path, name);
    if (strlen(name) > TP_SAFETENSORS_NAME_MAX || !is_text(name) || strcmp(name, "__metadata__") == 0)
        return tp_fail(ctx, TP_INTERNAL, "%s: \"%s\" cannot be the name of a tensor", w->path, name);
    if (bits == 0 || rank < 0 || rank > TP_MAX_RANK)
        return tp_fail(ctx, TP_INTERNAL, "%s: %s: dtype %d with %d dimensions", w->path, name, (int)dtype, rank);
    bool empty = false;
    for (int i = 0; i < rank; i++) {
        if (shape[i] < 0) return tp_fail(ctx, TP_INTERNAL, "%s: %s: dimension %d is negative", w->path, name, i);
        empty = empty || shape[i] == 0;
    }
    for (int i = 0; i < rank && !empty; i++)
        if (!tp_mul_i64(bits, shape[i], &bits))
            return tp_fail(ctx, TP_SHAPE, "%s: %s: the sizes of the shape overflow", w->path, name);
    if (empty) bits = 0;
    if (bits % 8 != 0) return tp_fail(ctx, TP_SHAPE, "%s: %s: %lld bits do not fill bytes", w->path, name, (long long)bits);
    *bytes = (uint64_t)bits / 8;
    return TP_OK;
}

tp_status tp_safetensors_declare(tp_ctx *ctx, tp_safetensors_writer *w, const char *name, tp_dtype dtype, int rank,
                                 const int64_t *shape)
{
    uint64_t bytes = 0;
    bool repeated;
    TP_TRY(check_declaration(ctx, w, name, dtype, rank, shape, &bytes));
    TP_TRY(tp_grow(ctx, &w->tensors, &w->capacity, w->count + 1, sizeof *w->tensors));
    TP_TRY(tp_map_put(ctx, w->names, tp_span_of(name), 0, &repeated));
    if (repeated) return tp_fail(ctx, TP_INTERNAL, "%s: %s declared twice", w->path, name);
    tensor *t = &w->tensors[w->count];
    *t = (tensor){.name = tp_strdup(ctx, name)};
    if (t->name == NULL) return TP_NOMEM;
    t->entry = (tp_entry){.name = t->name, .dtype = dtype, .rank = rank, .bytes = bytes};
    for (int i = 0; i < rank; i++) t->entry.shape[i] = shape[i];
    w->count++;
    return TP_OK;
}

/* ---- header ---- */

static int by_dtype_and_name(const void *a, const void *b)
{
    const tensor *x = a, *y = b;
    if (x->entry.dtype != y->entry.dtype) return x->entry.dtype > y->entry.dtype ? -1 : 1;
    return strcmp(x->name, y->name);
}

static void write_entry(tp_buf *out, const tp_entry *entry)
{
    tp_json_write_string(out, entry->name, strlen(entry->name));
    tp_buf_printf(out, ":{\"dtype\":\"%s\",\"shape\":[", tp_dtype_name(entry->dtype));
    for (int i = 0; i < entry->rank; i++) tp_buf_printf(out, i > 0 ? ",%lld" : "%lld", (long long)entry->shape[i]);
    tp_buf_printf(out, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)entry->offset,
                  (unsigned long long)(entry->offset + entry->bytes));
}

static void seal(tp_safetensors_writer *w)
{
    if (!w->sealed && w->count > 0) qsort(w->tensors, w->count, sizeof *w->tensors, by_dtype_and_name);
    w->sealed = true;
}

/* Places the tensors and makes the header: 8 bytes of length, JSON, blanks up to a multiple of 8. */
static tp_status make_header(tp_ctx *ctx, tp_safetensors_writer *w, tp_buf *out)
{
    uint64_t end = 0, length;
    tp_buf_append(out, "\0\0\0\0\0\0\0\0", 8);
    tp_buf_text(out, "{\"__metadata__\":{");
    tp_buf_text(out, tp_buf_cstr(&w->metadata));
    tp_buf_char(out, '}');
    for (size_t i = 0; i < w->count; i++) {
        tp_entry *entry = &w->tensors[i].entry;
        entry->offset = end;
        if (__builtin_add_overflow(end, entry->bytes, &end) || end > (uint64_t)INT64_MAX)
            return tp_fail(ctx, TP_SHAPE, "%s: more than 2^63 bytes", w->path);
        tp_buf_char(out, ',');
        write_entry(out, entry);
    }
    tp_buf_char(out, '}');
    while (out->len % 8 != 0 && !out->failed) tp_buf_char(out, ' ');
    TP_TRY(tp_buf_status(ctx, out, w->path));
    length = out->len - 8;
    memcpy(out->data, &length, 8); /* hosts are little-endian, as the file is */
    for (size_t i = 0; i < w->count; i++) w->tensors[i].entry.offset += out->len;
    return TP_OK;
}

static tp_status begin(tp_ctx *ctx, tp_safetensors_writer *w)
{
    tp_buf header;
    if (w->began) return TP_OK;
    w->began = true;
    seal(w);
    tp_buf_init(&header, (size_t)TP_SAFETENSORS_HEADER_MAX + 8);
    tp_status status = make_header(ctx, w, &header);
    if (status == TP_OK) status = tp_writer_write(ctx, w->out, header.data, header.len);
    tp_buf_free(&header);
    return status;
}

/* ---- bytes ---- */

/* Passes tensors that are complete, empty ones among them. */
static void pass_complete(tp_safetensors_writer *w)
{
    while (w->current < w->count && w->written == w->tensors[w->current].entry.bytes) {
        w->current++;
        w->written = 0;
    }
}

const tp_entry *tp_safetensors_next(tp_safetensors_writer *w)
{
    seal(w);
    pass_complete(w);
    return w->current < w->count ? &w->tensors[w->current].entry : NULL;
}

tp_status tp_safetensors_write(tp_ctx *ctx, tp_safetensors_writer *w, const void *bytes, size_t n)
{
    TP_TRY(begin(ctx, w));
    pass_complete(w);
    if (n == 0) return TP_OK;
    if (w->current == w->count) return tp_fail(ctx, TP_INTERNAL, "%s: %zu bytes after the last tensor", w->path, n);
    const tp_entry *entry = &w->tensors[w->current].entry;
    if (n > entry->bytes - w->written)
        return tp_fail(ctx, TP_INTERNAL, "%s: %s: %zu bytes too many", w->path, entry->name,
                       (size_t)(n - (entry->bytes - w->written)));
    TP_TRY(tp_writer_write(ctx, w->out, bytes, n));
    w->written += n;
    return TP_OK;
}

static void writer_free(tp_safetensors_writer *w)
{
    for (size_t i = 0; i < w->count; i++) tp_free(w->tensors[i].name);
    tp_free(w->tensors);
    tp_map_free(w->names);
    tp_map_free(w->metadata_keys);
    tp_buf_free(&w->metadata);
    tp_free(w->path);
    tp_free(w);
}

tp_status tp_safetensors_finish(tp_ctx *ctx, tp_safetensors_writer *w)
{
    tp_status status = begin(ctx, w);
    pass_complete(w);
    if (status == TP_OK && w->current < w->count)
        status = tp_fail(ctx, TP_INTERNAL, "%s: %s: %llu bytes were not written", w->path, w->tensors[w->current].name,
                         (unsigned long long)(w->tensors[w->current].entry.bytes - w->written));
    if (status == TP_OK)
        status = tp_writer_finish(ctx, w->out);
    else
        tp_writer_discard(w->out);
    writer_free(w);
    return status;
}

void tp_safetensors_discard(tp_safetensors_writer *w)
{
    if (w == NULL) return;
    tp_writer_discard(w->out);
    writer_free(w);
}

/* ---- all at once ---- */

static tp_status declare_all(tp_ctx *ctx, tp_safetensors_writer *w, const tp_named_array *arrays, size_t n,
                             const char *const *metadata)
{
    for (; metadata != NULL && metadata[0] != NULL; metadata += 2) {
        if (strcmp(metadata[0], "format") == 0) continue; /* "pt" is there already */
        TP_TRY(tp_safetensors_add_metadata(ctx, w, metadata[0], metadata[1]));
    }
    for (size_t i = 0; i < n; i++)
        TP_TRY(tp_safetensors_declare(ctx, w, arrays[i].name, arrays[i].dtype, arrays[i].rank, arrays[i].shape));
    return TP_OK;
}

static tp_status write_all(tp_ctx *ctx, tp_safetensors_writer *w, const tp_named_array *arrays, const tp_map *by_name)
{
    for (const tp_entry *entry; (entry = tp_safetensors_next(w)) != NULL;) {
        int64_t i = 0;
        if (!tp_map_get(by_name, tp_span_of(entry->name), &i))
            return tp_fail(ctx, TP_INTERNAL, "%s: not declared", entry->name);
        TP_TRY(tp_safetensors_write(ctx, w, arrays[i].data, (size_t)entry->bytes));
    }
    return TP_OK;
}

tp_status tp_safetensors_save(tp_ctx *ctx, const char *path, const tp_named_array *arrays, size_t n,
                              const char *const *metadata)
{
    tp_safetensors_writer *w;
    TP_TRY(tp_safetensors_create(ctx, path, &w));
    tp_map *by_name = tp_map_new(ctx, true);
    tp_status status = by_name != NULL ? declare_all(ctx, w, arrays, n, metadata) : TP_NOMEM;
    for (size_t i = 0; i < n && status == TP_OK; i++)
        status = tp_map_put(ctx, by_name, tp_span_of(arrays[i].name), (int64_t)i, NULL);
    if (status == TP_OK) status = write_all(ctx, w, arrays, by_name);
    tp_map_free(by_name);
    if (status == TP_OK) return tp_safetensors_finish(ctx, w);
    tp_safetensors_discard(w);
    return status;
}
