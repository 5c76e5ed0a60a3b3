/* safetensors reader.
 *
 *   8 bytes     n, little-endian
 *   n bytes     {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...}, blanks to fill up
 *   the rest    the tensors' bytes, one after the other, offsets counted from here
 *
 * The header is parsed member by member, so that memory stays near the size of the entries; then the entries are put in
 * the order of their offsets and must tile the rest of the file exactly: no hole, no overlap, nothing behind. */
#include "base/safetensors.h"

#include <stdio.h>
#include <stdlib.h>

#include "base/json.h"
#include "base/map.h"
#include "base/mem.h"

#define HEADER_DEPTH     16         /* an entry needs 3; unknown members may nest a little */
#define MEMBER_MAX_NODES (1u << 20) /* in one entry, or in __metadata__: 24 MiB */
#define PIECE_BYTES      65536

typedef struct pair {
    char *key, *value;
} pair;

struct tp_safetensors {
    char *path;
    tp_file *file;        /* NULL: parsed from memory */
    const uint8_t *bytes; /* mapping or memory; NULL: read with pread */
    uint64_t size;        /* of the whole file */
    uint64_t data_begin;  /* of the first tensor */
    tp_entry *entries;    /* in file order; offsets from the start of the file */
    size_t count, capacity;
    tp_map *by_name; /* -> index into entries; the keys are the entries' names */
    pair *metadata;
    size_t metadata_count, metadata_capacity;
    bool has_metadata;
};

/* ---- header: one member ---- */

static tp_status fail_at(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *value, const char *name, const char *what)
{
    char where[1024];
    return tp_fail(ctx, TP_FORMAT, "%s: %s: %s", tp_json_where(doc, value, where, sizeof where), name, what);
}

static tp_status take_metadata(tp_safetensors *st, tp_ctx *ctx, const tp_json_doc *doc, const tp_json *value)
{
    if (st->has_metadata) return fail_at(ctx, doc, value, "__metadata__", "repeated");
    st->has_metadata = true;
    if (tp_json_type_of(value) != TP_JSON_OBJECT)
        return fail_at(ctx, doc, value, "__metadata__", "expected an object that maps strings to strings");
    size_t n = tp_json_count(value);
    TP_TRY(tp_grow(ctx, &st->metadata, &st->metadata_capacity, n, sizeof *st->metadata));
    for (size_t i = 0; i < n; i++) {
        tp_span key = tp_json_key_at(value, i), text = tp_json_string(tp_json_at(value, i));
        if (tp_json_type_of(tp_json_at(value, i)) != TP_JSON_STRING)
            return fail_at(ctx, doc, tp_json_at(value, i), "__metadata__", "expected a string");
        pair *p = &st->metadata[st->metadata_count++];
        p->key = tp_strndup(ctx, key.data, key.len);
        p->value = tp_strndup(ctx, text.data, text.len);
        if (p->key == NULL || p->value == NULL) return TP_NOMEM;
    }
    return TP_OK;
}

/* NULL and a failure if the member is missing or of another type. */
static const tp_json *need(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *entry, const char *name, const char *key,
                           tp_json_type type)
{
    const tp_json *value = tp_json_get(entry, key);
    char what[64];
    if (value != NULL && tp_json_type_of(value) == type) return value;
    snprintf(what, sizeof what, "%s: expected %s, got %s", key, tp_json_type_name(type),
             value != NULL ? tp_json_type_name(tp_json_type_of(value)) : "nothing");
    fail_at(ctx, doc, value != NULL ? value : entry, name, what);
    return NULL;
}

static tp_status take_shape(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *shape, tp_entry *entry)
{
    size_t rank = tp_json_count(shape);
    if (rank > TP_MAX_RANK) {
        char what[64];
        snprintf(what, sizeof what, "%zu dimensions, at most %d are supported", rank, TP_MAX_RANK);
        return fail_at(ctx, doc, shape, entry->name, what);
    }
    entry->rank = (int)rank;
    for (size_t i = 0; i < rank; i++) {
        if (!tp_json_i64(tp_json_at(shape, i), &entry->shape[i]) || entry->shape[i] < 0)
            return fail_at(ctx, doc, tp_json_at(shape, i), entry->name, "shape: expected an integer from 0 to 2^63 - 1");
    }
    return TP_OK;
}

/* Fills offset (still relative to the data) and bytes from "data_offsets". */
static tp_status take_offsets(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *offsets, tp_entry *entry)
{
    int64_t begin, end;
    if (tp_json_count(offsets) != 2 || !tp_json_i64(tp_json_at(offsets, 0), &begin) ||
        !tp_json_i64(tp_json_at(offsets, 1), &end) || begin < 0 || end < 0)
        return fail_at(ctx, doc, offsets, entry->name, "data_offsets: expected two integers from 0 to 2^63 - 1");
    if (end < begin) return fail_at(ctx, doc, offsets, entry->name, "data_offsets: the end lies before the beginning");
    entry->offset = (uint64_t)begin;
    entry->bytes = (uint64_t)(end - begin);
    return TP_OK;
}

static tp_status take_tensor(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *value, tp_entry *entry)
{
    if (tp_json_type_of(value) != TP_JSON_OBJECT) return fail_at(ctx, doc, value, entry->name, "expected an object");
    const tp_json *dtype = need(ctx, doc, value, entry->name, "dtype", TP_JSON_STRING);
    const tp_json *shape = dtype != NULL ? need(ctx, doc, value, entry->name, "shape", TP_JSON_ARRAY) : NULL;
    const tp_json *offsets = shape != NULL ? need(ctx, doc, value, entry->name, "data_offsets", TP_JSON_ARRAY) : NULL;
    if (offsets == NULL) return TP_FORMAT;
    tp_span name = tp_json_string(dtype);
    if (!tp_dtype_parse(name.data, name.len, &entry->dtype)) {
        char what[64];
        snprintf(what, sizeof what, "unknown dtype \"%.*s\"", name.len < 32 ? (int)name.len : 32, name.data);
        return fail_at(ctx, doc, dtype, entry->name, what);
    }
    TP_TRY(take_shape(ctx, doc, shape, entry));
    return take_offsets(ctx, doc, offsets, entry);
}

static tp_status take_member(void *user, tp_ctx *ctx, const tp_json_doc *doc, const tp_json *key, const tp_json *value)
{
    tp_safetensors *st = user;
    tp_span text = tp_json_string(key);
    if (tp_span_is(text, "__metadata__")) return take_metadata(st, ctx, doc, value);
    if (text.len > TP_SAFETENSORS_NAME_MAX) return fail_at(ctx, doc, key, "tensor name", "longer than 512 bytes");
    if (text.len > 0 && memchr(text.data, '\0', text.len) != NULL) return fail_at(ctx, doc, key, "tensor name", "holds a NUL");
    TP_TRY(tp_grow(ctx, &st->entries, &st->capacity, st->count + 1, sizeof *st->entries));
    char *name = tp_strndup(ctx, text.data, text.len);
    if (name == NULL) return TP_NOMEM;
    tp_entry *entry = &st->entries[st->count++];
    *entry = (tp_entry){.name = name};
    bool repeated;
    TP_TRY(tp_map_put(ctx, st->by_name, (tp_span){name, text.len}, 0, &repeated));
    if (repeated) return fail_at(ctx, doc, key, name, "tensor name given twice");
    return take_tensor(ctx, doc, value, entry);
}

/* ---- header: all of it ---- */

static tp_status read_bytes(tp_ctx *ctx, const tp_safetensors *st, uint64_t offset, void *out, size_t n)
{
    if (n == 0) return TP_OK;
    if (st->bytes == NULL) return tp_file_pread(ctx, st->file, offset, out, n);
    memcpy(out, st->bytes + offset, n);
    return TP_OK;
}

static tp_status parse_header(tp_ctx *ctx, tp_safetensors *st, const char *text, size_t n)
{
    size_t valid = tp_utf8_valid_prefix(text, n);
    if (valid < n) return tp_fail(ctx, TP_FORMAT, "%s: byte %zu of the header is not valid UTF-8", st->path, valid);
    const tp_json_options options = {
        .name = st->path, .max_depth = HEADER_DEPTH, .max_nodes = MEMBER_MAX_NODES, .strict_surrogates = true};
    return tp_json_each(ctx, text, n, &options, take_member, st);
}

static tp_status read_header(tp_ctx *ctx, tp_safetensors *st)
{
    uint64_t n;
    if (st->size < 8)
        return tp_fail(ctx, TP_FORMAT, "%s: %llu bytes, a safetensors file begins with 8 bytes for the length of its header",
                       st->path, (unsigned long long)st->size);
    TP_TRY(read_bytes(ctx, st, 0, &n, 8));
    if (n > TP_SAFETENSORS_HEADER_MAX)
        return tp_fail(ctx, TP_FORMAT, "%s: header of %llu bytes, at most %u are allowed (is this a safetensors file?)",
                       st->path, (unsigned long long)n, TP_SAFETENSORS_HEADER_MAX);
    if (n > st->size - 8)
        return tp_fail(ctx, TP_FORMAT, "%s: truncated: header of %llu bytes, %llu bytes missing", st->path,
                       (unsigned long long)n, (unsigned long long)(n - (st->size - 8)));
    if (n == 0) return tp_fail(ctx, TP_FORMAT, "%s: header of 0 bytes, expected a JSON object", st->path);
    st->data_begin = 8 + n;
    /* A copy, so that the text stays what was checked even if somebody writes to the file. */
    char *text = tp_alloc_raw(ctx, (size_t)n, 1);
    if (text == NULL) return TP_NOMEM;
    tp_status status = read_bytes(ctx, st, 8, text, (size_t)n);
    if (status == TP_OK) status = parse_header(ctx, st, text, (size_t)n);
    tp_free(text);
    return status;
}

/* ---- entries: order, sizes, cover ---- */

static int by_offset(const void *a, const void *b)
{
    const tp_entry *x = a, *y = b;
    if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
    if (x->bytes != y->bytes) return x->bytes < y->bytes ? -1 : 1;
    return strcmp(x->name, y->name); /* empty tensors at one place: any fixed order */
}

/* Bytes that dtype and shape need; FORMAT if they overflow or do not fill whole bytes. */
static tp_status bytes_needed(tp_ctx *ctx, const tp_safetensors *st, const tp_entry *entry, uint64_t *bytes)
{
    int64_t bits = tp_dtype_bits(entry->dtype);
    bool empty = false, fits = true;
    for (int i = 0; i < entry->rank; i++) empty = empty || entry->shape[i] == 0;
    for (int i = 0; i < entry->rank && !empty; i++) fits = fits && tp_mul_i64(bits, entry->shape[i], &bits);
    if (!fits) return tp_fail(ctx, TP_FORMAT, "%s: %s: the sizes of the shape overflow", st->path, entry->name);
    if (empty) bits = 0;
    if (bits % 8 != 0)
        return tp_fail(ctx, TP_FORMAT, "%s: %s: %lld bits of %s do not fill whole bytes", st->path, entry->name,
                       (long long)bits, tp_dtype_name(entry->dtype));
    *bytes = (uint64_t)bits / 8;
    return TP_OK;
}

static tp_status check_entries(tp_ctx *ctx, tp_safetensors *st)
{
    uint64_t end = 0, available = st->size - st->data_begin;
    if (st->count > 0) qsort(st->entries, st->count, sizeof *st->entries, by_offset);
    for (size_t i = 0; i < st->count; i++) {
        tp_entry *entry = &st->entries[i];
        uint64_t needed = 0;
        if (entry->offset != end)
            return tp_fail(ctx, TP_FORMAT, "%s: %s: data_offsets begin at %llu, expected %llu (%s)", st->path, entry->name,
                           (unsigned long long)entry->offset, (unsigned long long)end,
                           entry->offset > end ? "a hole" : "an overlap");
        TP_TRY(bytes_needed(ctx, st, entry, &needed));
        if (needed != entry->bytes)
            return tp_fail(ctx, TP_FORMAT, "%s: %s: data_offsets span %llu bytes, dtype and shape need %llu", st->path,
                           entry->name, (unsigned long long)entry->bytes, (unsigned long long)needed);
        end += entry->bytes; /* both below 2^63 */
        if (end > (uint64_t)INT64_MAX) return tp_fail(ctx, TP_FORMAT, "%s: %s: ends past 2^63 bytes", st->path, entry->name);
        entry->offset += st->data_begin;
        TP_TRY(tp_map_put(ctx, st->by_name, tp_span_of(entry->name), (int64_t)i, NULL));
    }
    if (end > available)
        return tp_fail(ctx, TP_FORMAT, "%s: truncated: %llu bytes missing", st->path, (unsigned long long)(end - available));
    if (end < available)
        return tp_fail(ctx, TP_FORMAT, "%s: %llu bytes after the last tensor", st->path, (unsigned long long)(available - end));
    return TP_OK;
}

/* ---- public: open, close ---- */

static tp_status open_common(tp_ctx *ctx, tp_safetensors *st)
{
    st->by_name = tp_map_new(ctx, true);
    if (st->by_name == NULL) return TP_NOMEM;
    TP_TRY(read_header(ctx, st));
    return check_entries(ctx, st);
}

tp_status tp_safetensors_open(tp_ctx *ctx, const char *path, tp_safetensors **out)
{
    *out = NULL;
    tp_safetensors *st = tp_alloc(ctx, 1, sizeof *st);
    if (st == NULL) return TP_NOMEM;
    st->path = tp_strdup(ctx, path);
    tp_status status = st->path != NULL ? tp_file_open(ctx, path, &st->file) : TP_NOMEM;
    if (status == TP_OK) {
        st->size = tp_file_size(st->file);
        st->bytes = tp_file_map(st->file);
        status = open_common(ctx, st);
    }
    if (status != TP_OK)
        tp_safetensors_close(st);
    else
        *out = st;
    return status;
}

tp_status tp_safetensors_parse(tp_ctx *ctx, const char *name, const void *bytes, size_t n, tp_safetensors **out)
{
    static const uint8_t nothing[1];
    *out = NULL;
    tp_safetensors *st = tp_alloc(ctx, 1, sizeof *st);
    if (st == NULL) return TP_NOMEM;
    st->path = tp_strdup(ctx, name);
    st->bytes = n > 0 ? bytes : nothing;
    st->size = n;
    tp_status status = st->path != NULL ? open_common(ctx, st) : TP_NOMEM;
    if (status != TP_OK)
        tp_safetensors_close(st);
    else
        *out = st;
    return status;
}

void tp_safetensors_close(tp_safetensors *st)
{
    if (st == NULL) return;
    for (size_t i = 0; i < st->count; i++) {
        void *name;
        memcpy(&name, &st->entries[i].name, sizeof name); /* ours, const only for readers */
        tp_free(name);
    }
    for (size_t i = 0; i < st->metadata_count; i++) {
        tp_free(st->metadata[i].key);
        tp_free(st->metadata[i].value);
    }
    tp_free(st->entries);
    tp_free(st->metadata);
    tp_map_free(st->by_name);
    tp_file_close(st->file);
    tp_free(st->path);
    tp_free(st);
}

/* ---- public: look up ---- */

const char *tp_safetensors_path(const tp_safetensors *st)
{
    return st->path;
}
tp_file *tp_safetensors_file(const tp_safetensors *st)
{
    return st->file;
}
size_t tp_safetensors_count(const tp_safetensors *st)
{
    return st->count;
}
const tp_entry *tp_safetensors_at(const tp_safetensors *st, size_t i)
{
    return i < st->count ? &st->entries[i] : NULL;
}

const tp_entry *tp_safetensors_find(const tp_safetensors *st, const char *name)
{
    int64_t i;
    return tp_map_get(st->by_name, tp_span_of(name), &i) ? &st->entries[i] : NULL;
}

size_t tp_safetensors_metadata_count(const tp_safetensors *st)
{
    return st->metadata_count;
}

void tp_safetensors_metadata_at(const tp_safetensors *st, size_t i, const char **key, const char **value)
{
    *key = st->metadata[i].key;
    *value = st->metadata[i].value;
}

const char *tp_safetensors_metadata(const tp_safetensors *st, const char *key)
{
    for (size_t i = 0; i < st->metadata_count; i++)
        if (strcmp(st->metadata[i].key, key) == 0) return st->metadata[i].value;
    return NULL;
}

/* ---- public: values ---- */

const void *tp_safetensors_data(const tp_safetensors *st, const tp_entry *entry)
{
    return st->bytes != NULL ? st->bytes + entry->offset : NULL;
}

tp_status tp_safetensors_read(tp_ctx *ctx, const tp_safetensors *st, const tp_entry *entry, void *bytes)
{
    return read_bytes(ctx, st, entry->offset, bytes, (size_t)entry->bytes);
}

/* Whether elements [first, first + n) exist; all dtypes that come here have whole bytes. */
static tp_status check_range(tp_ctx *ctx, const tp_safetensors *st, const tp_entry *entry, uint64_t first, size_t n)
{
    uint64_t elements = entry->bytes / tp_dtype_bytes(entry->dtype);
    if (first <= elements && n <= elements - first) return TP_OK;
    return tp_fail(ctx, TP_SHAPE, "%s: %s: elements %llu + %zu asked for, there are %llu", st->path, entry->name,
                   (unsigned long long)first, n, (unsigned long long)elements);
}

/* The bytes of n elements from `first` on: in place, or read into piece. */
static tp_status get_piece(tp_ctx *ctx, const tp_safetensors *st, const tp_entry *entry, uint64_t first, size_t n,
                           uint8_t *piece, const uint8_t **bytes)
{
    size_t size = tp_dtype_bytes(entry->dtype);
    uint64_t offset = entry->offset + first * size;
    *bytes = st->bytes != NULL ? st->bytes + offset : piece;
    return st->bytes != NULL ? TP_OK : tp_file_pread(ctx, st->file, offset, piece, n * size);
}

tp_status tp_safetensors_read_f32(tp_ctx *ctx, const tp_safetensors *st, const tp_entry *entry, uint64_t first, size_t n,
                                  float *out)
{
    uint8_t piece[PIECE_BYTES];
    const uint8_t *bytes;
    if (!tp_dtype_is_float(entry->dtype))
        return tp_fail(ctx, TP_FORMAT, "%s: %s: dtype %s, expected F16, BF16, F32 or F64", st->path, entry->name,
                       tp_dtype_name(entry->dtype));
    TP_TRY(check_range(ctx, st, entry, first, n));
    size_t most = PIECE_BYTES / tp_dtype_bytes(entry->dtype);
    for (size_t done = 0; done < n;) {
        size_t now = n - done < most ? n - done : most;
        TP_TRY(get_piece(ctx, st, entry, first + done, now, piece, &bytes));
        tp_convert_to_f32(entry->dtype, bytes, now, out + done);
        done += now;
    }
    return TP_OK;
}

static int64_t integer_at(tp_dtype dtype, const uint8_t *p)
{
    int16_t i16;
    uint16_t u16;
    int32_t i32;
    uint32_t u32;
    int64_t i64;
    switch (dtype) {
    case TP_I8: return (int8_t)*p;
    case TP_I16: memcpy(&i16, p, 2); return i16;
    case TP_U16: memcpy(&u16, p, 2); return u16;
    case TP_I32: memcpy(&i32, p, 4); return i32;
    case TP_U32: memcpy(&u32, p, 4); return u32;
    case TP_I64:
    case TP_U64: memcpy(&i64, p, 8); return i64;
    case TP_BOOL: return *p != 0;
    default: return *p; /* U8 */
    }
}

static bool is_integer(tp_dtype dtype)
{
    switch (dtype) {
    case TP_BOOL:
    case TP_U8:
    case TP_I8:
    case TP_I16:
    case TP_U16:
    case TP_I32:
    case TP_U32:
    case TP_I64:
    case TP_U64: return true;
    default: return false;
    }
}

tp_status tp_safetensors_read_i64(tp_ctx *ctx, const tp_safetensors *st, const tp_entry *entry, uint64_t first, size_t n,
                                  int64_t *out)
{
    uint8_t piece[PIECE_BYTES];
    const uint8_t *bytes;
    if (!is_integer(entry->dtype))
        return tp_fail(ctx, TP_FORMAT, "%s: %s: dtype %s, expected integers or BOOL", st->path, entry->name,
                       tp_dtype_name(entry->dtype));
    TP_TRY(check_range(ctx, st, entry, first, n));
    size_t size = tp_dtype_bytes(entry->dtype), most = PIECE_BYTES / size;
    for (size_t done = 0; done < n;) {
        size_t now = n - done < most ? n - done : most;
        TP_TRY(get_piece(ctx, st, entry, first + done, now, piece, &bytes));
        for (size_t i = 0; i < now; i++) {
            out[done + i] = integer_at(entry->dtype, bytes + i * size);
            if (entry->dtype == TP_U64 && out[done + i] < 0)
                return tp_fail(ctx, TP_FORMAT, "%s: %s: element %llu is above 2^63 - 1", st->path, entry->name,
                               (unsigned long long)(first + done + i));
        }
        done += now;
    }
    return TP_OK;
}
