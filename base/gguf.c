/* GGUF reader.
 *
 *   "GGUF"  u32 version  u64 tensors  u64 values
 *   values   string key, u32 type, value; a string is a u64 length and its bytes, an array u32 type, u64 count, elements
 *   tensors  string name, u32 dimensions, u64 size of each (fastest first), u32 type, u64 offset from the data
 *   blanks up to the alignment, then the tensors' data in the same order, each filled up to the alignment
 *
 * The part before the data is read into memory of our own, as much of it as parsing asks for, so that what was checked
 * stays what is used even if somebody writes to the file. While that memory grows, values and names are kept as
 * offsets into it; `settle` turns them into pointers at the end. */
#include "base/gguf.h"

#include <stdio.h>

#include "base/map.h"
#include "base/mem.h"

#define FIRST_READ       65536u
#define VALUE_MIN_BYTES  14u /* key of one byte, type, one byte */
#define TENSOR_MIN_BYTES 24u /* empty name, no dimensions */

typedef struct place { /* bytes in the head of the file */
    uint64_t offset, bytes;
} place;

typedef struct value {
    tp_gguf_value public;
    char *key;        /* with a NUL behind it */
    place raw;        /* becomes public.data */
    uint64_t *starts; /* array of strings: where each begins (its length), from raw.offset */
} value;

struct tp_gguf {
    char *path;
    tp_file *file;
    const uint8_t *mapped; /* all of the file, or NULL */
    uint64_t size;
    const uint8_t *head; /* bytes [0, head_bytes) of the file */
    uint8_t *owned_head; /* the same if it is ours */
    size_t head_bytes, head_capacity;
    uint64_t position; /* of the parser */
    uint32_t version;
    uint64_t alignment, data_begin;
    value *values;
    size_t n_values, values_capacity;
    tp_gguf_tensor *tensors;
    size_t n_tensors, tensors_capacity;
    tp_map *by_key, *by_name;
};

/* ---- bounded reader ---- */

static tp_status fail_at(tp_ctx *ctx, const tp_gguf *g, uint64_t position, const char *what)
{
    return tp_fail(ctx, TP_FORMAT, "%s: at byte %llu: %s", g->path, (unsigned long long)position, what);
}

/* Makes sure that n bytes from the position on are in the head. */
static tp_status need(tp_ctx *ctx, tp_gguf *g, uint64_t n, const char *what)
{
    if (n > g->size - g->position)
        return tp_fail(ctx, TP_FORMAT, "%s: at byte %llu: truncated: %s takes %llu bytes, %llu are left", g->path,
                       (unsigned long long)g->position, what, (unsigned long long)n,
                       (unsigned long long)(g->size - g->position));
    uint64_t end = g->position + n;
    if (end <= g->head_bytes) return TP_OK;
    if (end > TP_GGUF_HEAD_MAX)
        return tp_fail(ctx, TP_FORMAT, "%s: at byte %llu: metadata of more than %llu bytes", g->path,
                       (unsigned long long)g->position, (unsigned long long)TP_GGUF_HEAD_MAX);
    uint64_t want = end > FIRST_READ ? end + end / 2 : FIRST_READ; /* some more each time; end is at most 2^63 */
    if (want > g->size) want = g->size;
    if (want > SIZE_MAX) return tp_fail(ctx, TP_NOMEM, "%s: metadata of %llu bytes", g->path, (unsigned long long)end);
    TP_TRY(tp_grow(ctx, &g->owned_head, &g->head_capacity, (size_t)want, 1));
    g->head = g->owned_head;
    TP_TRY(tp_file_pread(ctx, g->file, g->head_bytes, g->owned_head + g->head_bytes, (size_t)want - g->head_bytes));
    g->head_bytes = (size_t)want;
    return TP_OK;
}

static tp_status take(tp_ctx *ctx, tp_gguf *g, void *out, size_t n, const char *what)
{
    TP_TRY(need(ctx, g, n, what));
    memcpy(out, g->head + g->position, n);
    g->position += n;
    return TP_OK;
}

/* The bytes of a string; they are in the head afterwards. */
static tp_status take_string(tp_ctx *ctx, tp_gguf *g, const char *what, place *out)
{
    uint64_t n;
    TP_TRY(take(ctx, g, &n, 8, what));
    if (n > TP_GGUF_STRING_MAX && n <= g->size - g->position)
        return tp_fail(ctx, TP_FORMAT, "%s: at byte %llu: %s of %llu bytes, at most %llu are read", g->path,
                       (unsigned long long)g->position, what, (unsigned long long)n, (unsigned long long)TP_GGUF_STRING_MAX);
    TP_TRY(need(ctx, g, n, what));
    *out = (place){g->position, n};
    g->position += n;
    return TP_OK;
}

/* A name: short, without NUL; a copy with a NUL behind it. */
static tp_status take_name(tp_ctx *ctx, tp_gguf *g, const char *what, char **out)
{
    place at;
    uint64_t begin = g->position;
    TP_TRY(take_string(ctx, g, what, &at));
    const char *text = (const char *)g->head + at.offset;
    if (at.bytes > TP_GGUF_NAME_MAX)
        return tp_fail(ctx, TP_FORMAT, "%s: at byte %llu: %s of %llu bytes, at most %d are allowed", g->path,
                       (unsigned long long)begin, what, (unsigned long long)at.bytes, TP_GGUF_NAME_MAX);
    if (at.bytes > 0 && memchr(text, '\0', (size_t)at.bytes) != NULL)
        return tp_fail(ctx, TP_FORMAT, "%s: at byte %llu: %s holds a NUL", g->path, (unsigned long long)begin, what);
    *out = tp_strndup(ctx, text, (size_t)at.bytes);
    return *out != NULL ? TP_OK : TP_NOMEM;
}

/* ---- values ---- */

static const struct {
    const char *name;
    unsigned bytes; /* 0: not fixed */
} value_types[] = {{"u8", 1},   {"i8", 1},     {"u16", 2},   {"i16", 2}, {"u32", 4}, {"i32", 4}, {"f32", 4},
                   {"bool", 1}, {"string", 0}, {"array", 0}, {"u64", 8}, {"i64", 8}, {"f64", 8}};
#define N_VALUE_TYPES (sizeof value_types / sizeof value_types[0])

static tp_status take_type(tp_ctx *ctx, tp_gguf *g, const char *key, tp_gguf_type *out)
{
    uint32_t type;
    uint64_t begin = g->position;
    TP_TRY(take(ctx, g, &type, 4, "a value type"));
    if (type >= N_VALUE_TYPES)
        return tp_fail(ctx, TP_FORMAT, "%s: at byte %llu: %s: unknown value type %u", g->path, (unsigned long long)begin, key,
                       type);
    *out = (tp_gguf_type)type;
    return TP_OK;
}

/* Strings of an array: each is looked at once, and where it begins is kept. */
static tp_status take_strings(tp_ctx *ctx, tp_gguf *g, value *v)
{
    size_t capacity = 0;
    place at;
    for (uint64_t i = 0; i < v->public.count; i++) {
        if (i % 4096 == 0) { /* grown as the strings turn out to be there */
            uint64_t left = v->public.count - i;
            TP_TRY(tp_grow(ctx, &v->starts, &capacity, (size_t)(i + (left < 4096 ? left : 4096)), sizeof *v->starts));
        }
        v->starts[i] = g->position - v->raw.offset;
        TP_TRY(take_string(ctx, g, "a string of an array", &at));
    }
    return TP_OK;
}

static tp_status take_array(tp_ctx *ctx, tp_gguf *g, value *v)
{
    uint64_t begin = g->position, bytes;
    TP_TRY(take_type(ctx, g, v->key, &v->public.element));
    TP_TRY(take(ctx, g, &v->public.count, 8, "an array's count"));
    v->raw.offset = g->position;
    if (v->public.element == TP_GGUF_ARRAY)
        return tp_fail(ctx, TP_FORMAT, "%s: at byte %llu: %s: arrays of arrays are not supported", g->path,
                       (unsigned long long)begin, v->key);
    unsigned size = v->public.element == TP_GGUF_STRING ? 8 : value_types[v->public.element].bytes; /* at least */
    if (__builtin_mul_overflow(v->public.count, (uint64_t)size, &bytes) || bytes > g->size - g->position)
        return tp_fail(ctx, TP_FORMAT, "%s: at byte %llu: %s: array of %llu elements of type %s, but %llu bytes are left",
                       g->path, (unsigned long long)begin, v->key, (unsigned long long)v->public.count,
                       value_types[v->public.element].name, (unsigned long long)(g->size - g->position));
    if (v->public.element == TP_GGUF_STRING) return take_strings(ctx, g, v);
    TP_TRY(need(ctx, g, bytes, "an array"));
    g->position += bytes;
    return TP_OK;
}

static tp_status take_value(tp_ctx *ctx, tp_gguf *g)
{
    uint64_t begin = g->position;
    TP_TRY(tp_grow(ctx, &g->values, &g->values_capacity, g->n_values + 1, sizeof *g->values));
    value *v = &g->values[g->n_values++];
    *v = (value){.public = {.count = 1}};
    TP_TRY(take_name(ctx, g, "a key", &v->key));
    v->public.key = v->key;
    if (v->key[0] == '\0') return fail_at(ctx, g, begin, "empty key");
    bool repeated;
    TP_TRY(tp_map_put(ctx, g->by_key, tp_span_of(v->key), (int64_t)g->n_values - 1, &repeated));
    if (repeated)
        return tp_fail(ctx, TP_FORMAT, "%s: at byte %llu: key %s given twice", g->path, (unsigned long long)begin, v->key);
    TP_TRY(take_type(ctx, g, v->key, &v->public.type));
    v->public.element = v->public.type;
    v->raw.offset = g->position;
    place at;
    if (v->public.type == TP_GGUF_ARRAY) {
        TP_TRY(take_array(ctx, g, v));
    } else if (v->public.type == TP_GGUF_STRING) {
        TP_TRY(take_string(ctx, g, "a string", &at));
    } else {
        TP_TRY(need(ctx, g, value_types[v->public.type].bytes, "a value"));
        g->position += value_types[v->public.type].bytes;
    }
    v->raw.bytes = g->position - v->raw.offset;
    return TP_OK;
}

static void settle(tp_gguf *g)
{
    for (size_t i = 0; i < g->n_values; i++) {
        g->values[i].public.data = g->head + g->values[i].raw.offset;
        g->values[i].public.bytes = g->values[i].raw.bytes;
    }
}

/* ---- tensors ---- */

static tp_status take_dimensions(tp_ctx *ctx, tp_gguf *g, tp_gguf_tensor *t)
{
    uint32_t rank;
    uint64_t begin = g->position;
    TP_TRY(take(ctx, g, &rank, 4, "a number of dimensions"));
    if (rank > TP_GGUF_RANK_MAX)
        return tp_fail(ctx, TP_FORMAT, "%s: at byte %llu: %s: %u dimensions, at most %d are allowed", g->path,
                       (unsigned long long)begin, t->name, rank, TP_GGUF_RANK_MAX);
    t->rank = (int)rank;
    for (uint32_t i = 0; i < rank; i++) {
        int64_t size;
        begin = g->position;
        TP_TRY(take(ctx, g, &size, 8, "a dimension"));
        if (size <= 0)
            return tp_fail(ctx, TP_FORMAT, "%s: at byte %llu: %s: dimension %u is %llu, expected 1 to 2^63 - 1", g->path,
                           (unsigned long long)begin, t->name, i, (unsigned long long)size);
        t->shape[rank - 1 - i] = size;
    }
    return TP_OK;
}

/* Bytes of the tensor from its type and shape. */
static tp_status size_tensor(tp_ctx *ctx, tp_gguf *g, tp_gguf_tensor *t)
{
    int64_t values, block_bytes, elements = 1, bytes;
    if (!tp_ggml_type_block(t->type, &values, &block_bytes))
        return tp_fail(ctx, TP_FORMAT, "%s: %s: unknown or retired tensor type %u", g->path, t->name, t->type);
    int64_t row = t->rank > 0 ? t->shape[t->rank - 1] : 1;
    if (row % values != 0)
        return tp_fail(ctx, TP_FORMAT, "%s: %s: rows of %lld values, blocks of %s have %lld", g->path, t->name, (long long)row,
                       tp_ggml_type_name(t->type), (long long)values);
    bool fits = true;
    for (int i = 0; i < t->rank; i++) fits = fits && tp_mul_i64(elements, t->shape[i], &elements);
    if (!fits || !tp_mul_i64(elements / values, block_bytes, &bytes))
        return tp_fail(ctx, TP_FORMAT, "%s: %s: the sizes of the shape overflow", g->path, t->name);
    t->bytes = (uint64_t)bytes;
    return TP_OK;
}

static tp_status take_tensor(tp_ctx *ctx, tp_gguf *g)
{
    char *name;
    uint64_t begin = g->position;
    bool repeated;
    TP_TRY(tp_grow(ctx, &g->tensors, &g->tensors_capacity, g->n_tensors + 1, sizeof *g->tensors));
    TP_TRY(take_name(ctx, g, "a tensor name", &name));
    tp_gguf_tensor *t = &g->tensors[g->n_tensors++];
    *t = (tp_gguf_tensor){.name = name};
    TP_TRY(tp_map_put(ctx, g->by_name, tp_span_of(name), (int64_t)g->n_tensors - 1, &repeated));
    if (repeated)
        return tp_fail(ctx, TP_FORMAT, "%s: at byte %llu: tensor %s given twice", g->path, (unsigned long long)begin, name);
    TP_TRY(take_dimensions(ctx, g, t));
    TP_TRY(take(ctx, g, &t->type, 4, "a tensor type"));
    TP_TRY(take(ctx, g, &t->offset, 8, "a tensor offset"));
    return size_tensor(ctx, g, t);
}

/* x rounded up to the alignment, a power of two; false if it does not fit into 63 bits. */
static bool align(const tp_gguf *g, uint64_t x, uint64_t *out)
{
    uint64_t sum;
    if (__builtin_add_overflow(x, g->alignment - 1, &sum) || sum > (uint64_t)INT64_MAX) return false;
    *out = sum & ~(g->alignment - 1);
    return true;
}

/* Tensors lie in order, each right behind the one before and its padding; the last one's padding may be missing. */
static tp_status place_tensors(tp_ctx *ctx, tp_gguf *g)
{
    uint64_t next = 0;
    if (!align(g, g->position, &g->data_begin)) return fail_at(ctx, g, g->position, "the data would begin past 2^63");
    for (size_t i = 0; i < g->n_tensors; i++) {
        tp_gguf_tensor *t = &g->tensors[i];
        if (t->offset != next)
            return tp_fail(ctx, TP_FORMAT, "%s: %s: offset %llu, expected %llu", g->path, t->name,
                           (unsigned long long)t->offset, (unsigned long long)next);
        uint64_t padded, end;
        bool fits = align(g, t->bytes, &padded) && !__builtin_add_overflow(next, padded, &next) && next <= (uint64_t)INT64_MAX;
        if (!fits || __builtin_add_overflow(g->data_begin + t->offset, t->bytes, &end))
            return tp_fail(ctx, TP_FORMAT, "%s: %s: %llu bytes and their padding overflow", g->path, t->name,
                           (unsigned long long)t->bytes);
        if (end > g->size)
            return tp_fail(ctx, TP_FORMAT, "%s: %s: truncated: %llu bytes missing", g->path, t->name,
                           (unsigned long long)(end - g->size));
        t->offset += g->data_begin;
    }
    return TP_OK;
}

/* ---- the whole file ---- */

static tp_status take_alignment(tp_ctx *ctx, tp_gguf *g)
{
    const tp_gguf_value *v = tp_gguf_find(g, "general.alignment");
    g->alignment = 32;
    if (v == NULL) return TP_OK;
    if (v->type != TP_GGUF_U32)
        return tp_fail(ctx, TP_FORMAT, "%s: general.alignment: type %s, expected u32", g->path, value_types[v->type].name);
    int64_t n = tp_gguf_i64_at(v, 0);
    if (n < TP_GGUF_ALIGN_MIN || n > TP_GGUF_ALIGN_MAX || (n & (n - 1)) != 0)
        return tp_fail(ctx, TP_FORMAT, "%s: general.alignment: %lld, expected a power of two from %d to %d", g->path,
                       (long long)n, TP_GGUF_ALIGN_MIN, TP_GGUF_ALIGN_MAX);
    g->alignment = (uint64_t)n;
    return TP_OK;
}

static tp_status take_version(tp_ctx *ctx, tp_gguf *g)
{
    char magic[4];
    TP_TRY(take(ctx, g, magic, 4, "the magic"));
    if (memcmp(magic, "GGUF", 4) != 0)
        return tp_fail(ctx, TP_FORMAT, "%s: begins with \"%.4s\", expected \"GGUF\"", g->path, magic);
    TP_TRY(take(ctx, g, &g->version, 4, "the version"));
    if (g->version != 0 && (g->version & 0xffff) == 0)
        return tp_fail(ctx, TP_UNSUPPORTED, "%s: a big-endian GGUF file; only little-endian ones are read", g->path);
    if (g->version != 2 && g->version != 3)
        return tp_fail(ctx, TP_UNSUPPORTED, "%s: GGUF version %u; versions 2 and 3 are read", g->path, g->version);
    return TP_OK;
}

static tp_status take_count(tp_ctx *ctx, tp_gguf *g, const char *what, uint64_t most, uint64_t record, uint64_t *count)
{
    TP_TRY(take(ctx, g, count, 8, what));
    uint64_t fit = (g->size - g->position) / record;
    if (*count <= most && *count <= fit) return TP_OK;
    return tp_fail(ctx, TP_FORMAT, "%s: %llu %s: at most %llu are read, and this file has room for %llu", g->path,
                   (unsigned long long)*count, what, (unsigned long long)most, (unsigned long long)fit);
}

static tp_status parse_all(tp_ctx *ctx, tp_gguf *g)
{
    uint64_t n_tensors, n_values;
    g->by_key = tp_map_new(ctx, true);
    g->by_name = tp_map_new(ctx, true);
    if (g->by_key == NULL || g->by_name == NULL) return TP_NOMEM;
    TP_TRY(take_version(ctx, g));
    TP_TRY(take_count(ctx, g, "tensors", TP_GGUF_MAX_TENSORS, TENSOR_MIN_BYTES, &n_tensors));
    TP_TRY(take_count(ctx, g, "values", TP_GGUF_MAX_VALUES, VALUE_MIN_BYTES, &n_values));
    for (uint64_t i = 0; i < n_values; i++) TP_TRY(take_value(ctx, g));
    for (uint64_t i = 0; i < n_tensors; i++) TP_TRY(take_tensor(ctx, g));
    settle(g);
    TP_TRY(take_alignment(ctx, g));
    return place_tensors(ctx, g);
}

/* ---- public: open, close, look up ---- */

tp_status tp_gguf_open(tp_ctx *ctx, const char *path, tp_gguf **out)
{
    *out = NULL;
    tp_gguf *g = tp_alloc(ctx, 1, sizeof *g);
    if (g == NULL) return TP_NOMEM;
    g->path = tp_strdup(ctx, path);
    tp_status status = g->path != NULL ? tp_file_open(ctx, path, &g->file) : TP_NOMEM;
    if (status == TP_OK) {
        g->size = tp_file_size(g->file);
        g->mapped = tp_file_map(g->file);
        status = parse_all(ctx, g);
    }
    if (status != TP_OK)
        tp_gguf_close(g);
    else
        *out = g;
    return status;
}

tp_status tp_gguf_parse(tp_ctx *ctx, const char *name, const void *bytes, size_t n, tp_gguf **out)
{
    *out = NULL;
    tp_gguf *g = tp_alloc(ctx, 1, sizeof *g);
    if (g == NULL) return TP_NOMEM;
    g->path = tp_strdup(ctx, name);
    g->mapped = g->head = bytes;
    g->size = g->head_bytes = n;
    tp_status status = g->path != NULL ? parse_all(ctx, g) : TP_NOMEM;
    if (status != TP_OK)
        tp_gguf_close(g);
    else
        *out = g;
    return status;
}

void tp_gguf_close(tp_gguf *g)
{
    if (g == NULL) return;
    for (size_t i = 0; i < g->n_values; i++) {
        tp_free(g->values[i].key);
        tp_free(g->values[i].starts);
    }
    for (size_t i = 0; i < g->n_tensors; i++) {
        void *name;
        memcpy(&name, &g->tensors[i].name, sizeof name); /* ours, const only for readers */
        tp_free(name);
    }
    tp_free(g->values);
    tp_free(g->tensors);
    tp_free(g->owned_head);
    tp_map_free(g->by_key);
    tp_map_free(g->by_name);
    tp_file_close(g->file);
    tp_free(g->path);
    tp_free(g);
}

const char *tp_gguf_path(const tp_gguf *g)
{
    return g->path;
}
tp_file *tp_gguf_file(const tp_gguf *g)
{
    return g->file;
}
uint32_t tp_gguf_version(const tp_gguf *g)
{
    return g->version;
}
size_t tp_gguf_value_count(const tp_gguf *g)
{
    return g->n_values;
}
size_t tp_gguf_tensor_count(const tp_gguf *g)
{
    return g->n_tensors;
}
const tp_gguf_value *tp_gguf_value_at(const tp_gguf *g, size_t i)
{
    return i < g->n_values ? &g->values[i].public : NULL;
}
const tp_gguf_tensor *tp_gguf_tensor_at(const tp_gguf *g, size_t i)
{
    return i < g->n_tensors ? &g->tensors[i] : NULL;
}

const tp_gguf_value *tp_gguf_find(const tp_gguf *g, const char *key)
{
    int64_t i;
    return tp_map_get(g->by_key, tp_span_of(key), &i) ? &g->values[i].public : NULL;
}

const tp_gguf_tensor *tp_gguf_tensor_find(const tp_gguf *g, const char *name)
{
    int64_t i;
    return tp_map_get(g->by_name, tp_span_of(name), &i) ? &g->tensors[i] : NULL;
}

const void *tp_gguf_data(const tp_gguf *g, const tp_gguf_tensor *tensor)
{
    return g->mapped != NULL ? g->mapped + tensor->offset : NULL;
}

tp_status tp_gguf_read(tp_ctx *ctx, const tp_gguf *g, const tp_gguf_tensor *tensor, void *bytes)
{
    if (g->file != NULL && g->mapped == NULL) return tp_file_pread(ctx, g->file, tensor->offset, bytes, (size_t)tensor->bytes);
    memcpy(bytes, g->mapped + tensor->offset, (size_t)tensor->bytes);
    return TP_OK;
}

/* ---- public: values ---- */

tp_span tp_gguf_string_at(const tp_gguf *g, const tp_gguf_value *array, uint64_t i)
{
    int64_t found;
    if (i >= array->count || array->element != TP_GGUF_STRING) return (tp_span){"", 0};
    if (!tp_map_get(g->by_key, tp_span_of(array->key), &found)) return (tp_span){"", 0};
    const uint8_t *p = array->data;
    if (array->type == TP_GGUF_ARRAY) p += g->values[found].starts[i];
    uint64_t n;
    memcpy(&n, p, 8);
    return (tp_span){(const char *)p + 8, (size_t)n};
}

int64_t tp_gguf_i64_at(const tp_gguf_value *v, uint64_t i)
{
    const uint8_t *p = v->data;
    int16_t i16;
    uint16_t u16;
    int32_t i32;
    uint32_t u32;
    int64_t i64;
    if (i >= v->count) return 0;
    switch (v->element) {
    case TP_GGUF_U8: return p[i];
    case TP_GGUF_I8: return (int8_t)p[i];
    case TP_GGUF_U16: memcpy(&u16, p + 2 * i, 2); return u16;
    case TP_GGUF_I16: memcpy(&i16, p + 2 * i, 2); return i16;
    case TP_GGUF_U32: memcpy(&u32, p + 4 * i, 4); return u32;
    case TP_GGUF_I32: memcpy(&i32, p + 4 * i, 4); return i32;
    case TP_GGUF_BOOL: return p[i] != 0;
    case TP_GGUF_U64:
    case TP_GGUF_I64: memcpy(&i64, p + 8 * i, 8); return i64;
    default: return 0;
    }
}

double tp_gguf_f64_at(const tp_gguf_value *v, uint64_t i)
{
    const uint8_t *p = v->data;
    float f32;
    double f64;
    if (i >= v->count) return 0;
    switch (v->element) {
    case TP_GGUF_F32: memcpy(&f32, p + 4 * i, 4); return (double)f32;
    case TP_GGUF_F64: memcpy(&f64, p + 8 * i, 8); return f64;
    default: return 0;
    }
}

/* The value, or NULL if it is absent; *status says whether that is a failure. */
static const tp_gguf_value *find(tp_ctx *ctx, const tp_gguf *g, const char *key, bool required, tp_status *status)
{
    const tp_gguf_value *v = tp_gguf_find(g, key);
    *status = v == NULL && required ? tp_fail(ctx, TP_FORMAT, "%s: %s: missing", g->path, key) : TP_OK;
    return v;
}

static tp_status refuse_type(tp_ctx *ctx, const tp_gguf *g, const tp_gguf_value *v, const char *expected)
{
    return tp_fail(ctx, TP_FORMAT, "%s: %s: type %s, expected %s", g->path, v->key, value_types[v->type].name, expected);
}

tp_status tp_gguf_need_i64(tp_ctx *ctx, const tp_gguf *g, const char *key, bool required, int64_t min, int64_t max,
                           int64_t *out)
{
    tp_status status;
    const tp_gguf_value *v = find(ctx, g, key, required, &status);
    if (v == NULL) return status;
    if (v->type == TP_GGUF_ARRAY || v->type == TP_GGUF_STRING || v->type == TP_GGUF_BOOL || v->type == TP_GGUF_F32 ||
        v->type == TP_GGUF_F64)
        return refuse_type(ctx, g, v, "an integer");
    int64_t number = tp_gguf_i64_at(v, 0);
    if (v->type == TP_GGUF_U64 && number < 0) return tp_fail(ctx, TP_FORMAT, "%s: %s: above 2^63 - 1", g->path, key);
    if (number < min || number > max)
        return tp_fail(ctx, TP_FORMAT, "%s: %s: %lld, expected an integer from %lld to %lld", g->path, key, (long long)number,
                       (long long)min, (long long)max);
    *out = number;
    return TP_OK;
}

tp_status tp_gguf_need_f64(tp_ctx *ctx, const tp_gguf *g, const char *key, bool required, double *out)
{
    tp_status status;
    const tp_gguf_value *v = find(ctx, g, key, required, &status);
    if (v == NULL) return status;
    if (v->type != TP_GGUF_F32 && v->type != TP_GGUF_F64) return refuse_type(ctx, g, v, "f32 or f64");
    *out = tp_gguf_f64_at(v, 0);
    return TP_OK;
}

tp_status tp_gguf_need_bool(tp_ctx *ctx, const tp_gguf *g, const char *key, bool required, bool *out)
{
    tp_status status;
    const tp_gguf_value *v = find(ctx, g, key, required, &status);
    if (v == NULL) return status;
    if (v->type != TP_GGUF_BOOL) return refuse_type(ctx, g, v, "bool");
    *out = tp_gguf_i64_at(v, 0) != 0;
    return TP_OK;
}

tp_status tp_gguf_need_string(tp_ctx *ctx, const tp_gguf *g, const char *key, bool required, tp_span *out)
{
    tp_status status;
    const tp_gguf_value *v = find(ctx, g, key, required, &status);
    if (v == NULL) return status;
    if (v->type != TP_GGUF_STRING) return refuse_type(ctx, g, v, "string");
    *out = tp_gguf_string_at(g, v, 0);
    return TP_OK;
}
