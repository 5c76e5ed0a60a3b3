/* GGUF: verdicts on hostile files, every value type, tensors, block sizes, typed access. */
#include "tests/support.h"

#include <math.h>
#include <unistd.h>

#include "base/gguf.h"
#include "base/json.h"
#include "base/mem.h"
#include "base/safetensors.h"
#include "tests/failing_memory.h"
#include "tests/scratch.h"

/* ---- hostile files ---- */

static void check_case(const char *path, const char *verdict, const char *what)
{
    tp_ctx ctx;
    char *bytes;
    size_t n;
    tp_status first = TP_OK;
    tp_gguf *file;
    for (int way = 0; way < 3; way++) { /* mapped, read, in memory */
        tp_status status;
        uint8_t *exact = NULL;
        tp_ctx_init(&ctx);
        setenv("TAPEFT_NO_MMAP", way == 1 ? "1" : "0", 1);
        if (way < 2) {
            status = tp_gguf_open(&ctx, path, &file);
        } else {
            assert_ok(&ctx, tp_file_read(&ctx, path, 1 << 24, &bytes, &n));
            exact = malloc(n > 0 ? n : 1);
            memcpy(exact, bytes, n);
            tp_free(bytes);
            status = tp_gguf_parse(&ctx, path, exact, n, &file);
        }
        bool accepted = status == TP_OK;
        if (strcmp(verdict, "either") != 0 && accepted != (strcmp(verdict, "accept") == 0))
            fail_msg("%s (%s): expected %s, got %s: %s", path, what, verdict, tp_status_name(status), ctx.message);
        if (way == 0) first = status;
        assert_int_equal(status, first);
        assert_int_equal(file != NULL, accepted);
        if (!accepted) {
            assert_int_equal(tp_status_exit_code(status), 3);
            if (!tp_starts_with(ctx.message, path)) fail_msg("%s: message without the file: %s", path, ctx.message);
            for (const char *p = ctx.message; *p != '\0'; p++) assert_true((unsigned char)*p >= 0x20 && *p != 0x7f);
        } else { /* everything it has can be touched */
            for (size_t i = 0; i < tp_gguf_tensor_count(file); i++) {
                const tp_gguf_tensor *t = tp_gguf_tensor_at(file, i);
                uint8_t *data = malloc(t->bytes);
                assert_ok(&ctx, tp_gguf_read(&ctx, file, t, data));
                if (tp_gguf_data(file, t) != NULL) assert_memory_equal(data, tp_gguf_data(file, t), t->bytes);
                assert_int_equal(tp_gguf_data(file, t) == NULL, way == 1);
                free(data);
            }
        }
        tp_gguf_close(file);
        free(exact);
    }
    unsetenv("TAPEFT_NO_MMAP");
}

/* G1 to G17 at the level of the container: refusals that belong to the tokenizer's or the model's reader are theirs to test,
 * and the container has to accept those files. */
static void hostile_files_get_their_verdict(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    char path[1024];
    tp_json_doc *doc;
    assert_ok(&ctx, tp_json_read(&ctx, golden_path(path, sizeof path, "bad/index.json"), 1 << 24, &doc));
    const tp_json *cases = tp_json_get(tp_json_root(doc), "cases");
    int count = 0;
    for (size_t i = 0; i < tp_json_count(cases); i++) {
        char name[256], verdict[16], what[256];
        const tp_json *c = tp_json_at(cases, i);
        tp_span text = tp_json_string(tp_json_get(c, "path")), level = tp_json_string(tp_json_get(c, "level"));
        if (text.len < 5 || memcmp(text.data, "gguf/", 5) != 0) continue;
        snprintf(name, sizeof name, "bad/%.*s", (int)text.len, text.data);
        text = tp_json_string(tp_json_get(c, "verdict"));
        bool above = tp_span_is(level, "tokenizer") || tp_span_is(level, "model");
        if (above)
            snprintf(verdict, sizeof verdict, "accept");
        else
            snprintf(verdict, sizeof verdict, "%.*s", (int)text.len, text.data);
        text = tp_json_string(tp_json_get(c, "what"));
        snprintf(what, sizeof what, "%.*s", (int)text.len, text.data);
        check_case(golden_path(path, sizeof path, name), verdict, what);
        count++;
    }
    tp_json_free(doc);
    print_message("%d hostile or odd files\n", count);
    assert_true(count >= 70);
}

/* ---- values and tensors of a file with all types ---- */

static const char *const type_names[] = {"uint8", "int8",   "uint16", "int16",  "uint32", "int32",  "float32",
                                         "bool",  "string", "array",  "uint64", "int64",  "float64"};

static void check_element(const tp_gguf *file, const tp_gguf_value *v, uint64_t i, const tp_json *expected)
{
    int64_t integer = 0;
    double real = 0;
    switch (v->element) {
    case TP_GGUF_STRING: assert_true(tp_span_equal(tp_gguf_string_at(file, v, i), tp_json_string(expected))); break;
    case TP_GGUF_BOOL: assert_int_equal(tp_gguf_i64_at(v, i), tp_json_bool(expected, false)); break;
    case TP_GGUF_F32:
    case TP_GGUF_F64:
        assert_true(tp_json_f64(expected, &real));
        assert_true(tp_gguf_f64_at(v, i) == real);
        break;
    case TP_GGUF_U64: {
        char text[32];
        snprintf(text, sizeof text, "%llu", (unsigned long long)tp_gguf_i64_at(v, i));
        assert_true(tp_span_is(tp_json_number_text(expected), text));
        break;
    }
    default: assert_true(tp_json_i64(expected, &integer)); assert_int_equal(tp_gguf_i64_at(v, i), integer);
    }
}

static void check_value(const tp_gguf *file, const tp_gguf_value *v, const tp_json *expected)
{
    const tp_json *value = tp_json_get(expected, "value");
    assert_true(tp_span_is(tp_json_string(tp_json_get(expected, "type")), type_names[v->type]));
    if (v->type != TP_GGUF_ARRAY) {
        assert_int_equal(v->count, 1);
        assert_int_equal(v->element, v->type);
        check_element(file, v, 0, value);
        return;
    }
    assert_true(tp_span_is(tp_json_string(tp_json_get(expected, "of")), type_names[v->element]));
    assert_int_equal(v->count, tp_json_count(value));
    for (uint64_t i = 0; i < v->count; i++) check_element(file, v, i, tp_json_at(value, i));
}

static double tensor_value(const tp_gguf_tensor *t, const uint8_t *p, size_t i)
{
    int8_t i8;
    int16_t i16;
    int32_t i32;
    int64_t i64;
    float f32;
    double f64;
    switch (t->type) {
    case TP_GGML_I8: memcpy(&i8, p + i, 1); return i8;
    case TP_GGML_I16: memcpy(&i16, p + 2 * i, 2); return i16;
    case TP_GGML_I32: memcpy(&i32, p + 4 * i, 4); return i32;
    case TP_GGML_I64: memcpy(&i64, p + 8 * i, 8); return (double)i64;
    case TP_GGML_F32: memcpy(&f32, p + 4 * i, 4); return (double)f32;
    case TP_GGML_F64: memcpy(&f64, p + 8 * i, 8); return f64;
    default: return NAN;
    }
}

static void check_tensor(tp_ctx *ctx, const tp_gguf *file, const tp_gguf_tensor *t, const tp_json *expected)
{
    const tp_json *shape = tp_json_get(expected, "torch_shape"), *values = tp_json_get(expected, "values");
    int64_t number = 0;
    double real = 0;
    assert_true(tp_json_i64(tp_json_get(expected, "ggml_type"), &number));
    assert_int_equal(t->type, number);
    assert_int_equal(t->rank, tp_json_count(shape));
    for (int d = 0; d < t->rank; d++) {
        assert_true(tp_json_i64(tp_json_at(shape, (size_t)d), &number));
        assert_int_equal(t->shape[d], number);
    }
    if (tp_json_count(values) == 0) return;
    uint8_t *data = malloc(t->bytes);
    assert_ok(ctx, tp_gguf_read(ctx, file, t, data));
    for (size_t i = 0; i < tp_json_count(values); i++) {
        if (isnan(tensor_value(t, data, i))) break;
        assert_true(tp_json_f64(tp_json_at(values, i), &real));
        assert_true(tensor_value(t, data, i) == real);
    }
    free(data);
}

static void every_value_type_is_read(void **state)
{
    (void)state;
    static const char *const files[] = {"gguf/metadata.gguf", "gguf/metadata_v2.gguf"};
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    char path[1024], name[256];
    tp_json_doc *doc;
    assert_ok(&ctx, tp_json_read(&ctx, golden_path(path, sizeof path, "gguf/metadata_expect.json"), 1 << 24, &doc));
    const tp_json *kv = tp_json_get(tp_json_root(doc), "kv"), *tensors = tp_json_get(tp_json_root(doc), "tensors");
    for (int f = 0; f < 2; f++) {
        tp_gguf *file;
        assert_ok(&ctx, tp_gguf_open(&ctx, golden_path(path, sizeof path, files[f]), &file));
        assert_string_equal(tp_gguf_path(file), path);
        assert_non_null(tp_gguf_file(file));
        assert_int_equal(tp_gguf_version(file), f == 0 ? 3 : 2);
        for (size_t i = 0; i < tp_gguf_value_count(file); i++) {
            const tp_gguf_value *v = tp_gguf_value_at(file, i);
            assert_ptr_equal(tp_gguf_find(file, v->key), v);
            const tp_json *expected = tp_json_get(kv, v->key);
            if (f == 0) assert_non_null(expected);
            if (expected != NULL && f == 0) check_value(file, v, expected);
        }
        if (f == 0) {
            assert_int_equal(tp_gguf_value_count(file), tp_json_count(kv));
            assert_int_equal(tp_gguf_tensor_count(file), tp_json_count(tensors));
            for (size_t i = 0; i < tp_json_count(tensors); i++) {
                tp_span key = tp_json_key_at(tensors, i);
                snprintf(name, sizeof name, "%.*s", (int)key.len, key.data);
                const tp_gguf_tensor *t = tp_gguf_tensor_find(file, name);
                assert_non_null(t);
                assert_int_equal(t->offset % 64, 0); /* its general.alignment */
                check_tensor(&ctx, file, t, tp_json_at(tensors, i));
            }
        }
        assert_null(tp_gguf_value_at(file, tp_gguf_value_count(file)));
        assert_null(tp_gguf_tensor_at(file, tp_gguf_tensor_count(file)));
        assert_null(tp_gguf_find(file, "absent"));
        assert_null(tp_gguf_tensor_find(file, "absent"));
        tp_gguf_close(file);
    }
    tp_gguf_close(NULL);
    tp_json_free(doc);
}

static void typed_access_checks_types(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    char path[1024];
    tp_gguf *file;
    int64_t i = 5;
    double d = 5;
    bool b = false;
    tp_span s = {"", 0};
    assert_ok(&ctx, tp_gguf_open(&ctx, golden_path(path, sizeof path, "gguf/metadata.gguf"), &file));
    assert_ok(&ctx, tp_gguf_need_i64(&ctx, file, "t.i8", true, -128, 127, &i));
    assert_int_equal(i, -128);
    assert_ok(&ctx, tp_gguf_need_i64(&ctx, file, "t.u32", true, 0, INT64_MAX, &i));
    assert_int_equal(i, 4294967295);
    assert_ok(&ctx, tp_gguf_need_i64(&ctx, file, "absent", false, 0, 9, &i));
    assert_int_equal(i, 4294967295);
    assert_status(&ctx, TP_FORMAT, tp_gguf_need_i64(&ctx, file, "absent", true, 0, 9, &i));
    assert_status(&ctx, TP_FORMAT, tp_gguf_need_i64(&ctx, file, "t.u8", true, 0, 254, &i));
    assert_status(&ctx, TP_FORMAT, tp_gguf_need_i64(&ctx, file, "t.u64", true, INT64_MIN, INT64_MAX, &i));
    static const char *const not_integers[] = {"t.f32", "t.f64", "t.bool", "t.string", "t.array_i32"};
    for (size_t k = 0; k < 5; k++)
        assert_status(&ctx, TP_FORMAT, tp_gguf_need_i64(&ctx, file, not_integers[k], false, INT64_MIN, INT64_MAX, &i));
    assert_ok(&ctx, tp_gguf_need_f64(&ctx, file, "t.f32", true, &d));
    assert_true(d == 0.15625);
    assert_ok(&ctx, tp_gguf_need_f64(&ctx, file, "t.f64", true, &d));
    assert_true(d == 3.141592653589793);
    assert_status(&ctx, TP_FORMAT, tp_gguf_need_f64(&ctx, file, "t.u32", true, &d));
    assert_status(&ctx, TP_FORMAT, tp_gguf_need_f64(&ctx, file, "t.array_f32", true, &d));
    assert_ok(&ctx, tp_gguf_need_bool(&ctx, file, "t.bool", true, &b));
    assert_true(b);
    assert_ok(&ctx, tp_gguf_need_bool(&ctx, file, "t.false", true, &b));
    assert_false(b);
    assert_status(&ctx, TP_FORMAT, tp_gguf_need_bool(&ctx, file, "t.u8", true, &b));
    assert_ok(&ctx, tp_gguf_need_string(&ctx, file, "general.architecture", true, &s));
    assert_true(tp_span_is(s, "llama"));
    assert_int_equal(tp_gguf_need_string(&ctx, file, "t.array_string", true, &s), TP_FORMAT);
    assert_non_null(strstr(ctx.message, "t.array_string: type array, expected string"));
    tp_ctx_clear(&ctx);
    /* Reads past the end or of another type give nothing instead of foreign bytes. */
    const tp_gguf_value *strings = tp_gguf_find(file, "t.array_string"), *u8 = tp_gguf_find(file, "t.array_u8");
    assert_int_equal(tp_gguf_string_at(file, strings, strings->count).len, 0);
    assert_int_equal(tp_gguf_string_at(file, u8, 0).len, 0);
    assert_int_equal(tp_gguf_i64_at(u8, u8->count), 0);
    assert_int_equal(tp_gguf_i64_at(strings, 0), 0);
    assert_true(tp_gguf_f64_at(u8, 0) == 0);
    tp_gguf_close(file);
}

/* ---- block sizes ---- */

/* gguf/blocks.safetensors holds blocks of each type that gguf-py knows: TYPE.bytes [blocks, bytes], TYPE.values [blocks,
 * values]. */
static void block_sizes_are_those_of_ggml(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    char path[1024], name[64];
    tp_safetensors *blocks;
    int known = 0, compared = 0;
    int64_t values = 0, bytes = 0;
    assert_ok(&ctx, tp_safetensors_open(&ctx, golden_path(path, sizeof path, "gguf/blocks.safetensors"), &blocks));
    for (uint32_t type = 0; type < 300; type++) {
        assert_int_equal(tp_ggml_type_name(type) != NULL, tp_ggml_type_block(type, &values, &bytes));
        if (tp_ggml_type_name(type) == NULL) continue;
        known++;
        snprintf(name, sizeof name, "%s.bytes", tp_ggml_type_name(type));
        const tp_entry *b = tp_safetensors_find(blocks, name);
        if (b == NULL) continue;
        snprintf(name, sizeof name, "%s.values", tp_ggml_type_name(type));
        assert_int_equal(b->shape[1], bytes);
        assert_int_equal(tp_safetensors_find(blocks, name)->shape[1], values);
        compared++;
    }
    assert_int_equal(compared * 2, tp_safetensors_count(blocks)); /* no type of the file was missed */
    assert_int_equal(known, 35);                                  /* 0-3, 6-30, 34, 35, 39-42 */
    assert_string_equal(tp_ggml_type_name(TP_GGML_Q4_K), "Q4_K");
    assert_string_equal(tp_ggml_type_name(TP_GGML_MXFP4), "MXFP4");
    static const uint32_t retired[] = {4, 5, 31, 32, 33, 36, 37, 38, 43, UINT32_MAX};
    for (size_t i = 0; i < sizeof retired / sizeof retired[0]; i++) assert_null(tp_ggml_type_name(retired[i]));
    tp_safetensors_close(blocks);
}

/* ---- files made here ---- */

static void add_u32(tp_buf *b, uint32_t x)
{
    tp_buf_append(b, &x, 4);
}
static void add_u64(tp_buf *b, uint64_t x)
{
    tp_buf_append(b, &x, 8);
}
static void add_string(tp_buf *b, const char *text)
{
    add_u64(b, strlen(text));
    tp_buf_text(b, text);
}

/* A header with one array of n strings and one F32 tensor of two values at the given alignment. */
static void make_file(tp_buf *b, int n_strings, size_t name_bytes)
{
    char name[1024];
    memset(name, 'n', name_bytes);
    name[name_bytes] = '\0';
    tp_buf_init(b, 0);
    tp_buf_text(b, "GGUF");
    add_u32(b, 3);
    add_u64(b, 1);
    add_u64(b, 2);
    add_string(b, "strings");
    add_u32(b, TP_GGUF_ARRAY);
    add_u32(b, TP_GGUF_STRING);
    add_u64(b, (uint64_t)n_strings);
    for (int i = 0; i < n_strings; i++) {
        char text[32];
        snprintf(text, sizeof text, "string %d", i);
        add_string(b, i % 3 == 0 ? "" : text);
    }
    add_string(b, "last");
    add_u32(b, TP_GGUF_U8);
    tp_buf_char(b, 7);
    add_string(b, name);
    add_u32(b, 1);
    add_u64(b, 2);
    add_u32(b, TP_GGML_F32);
    add_u64(b, 0);
    while (b->len % 32 != 0) tp_buf_char(b, 0);
    tp_buf_append(b, "\0\0\x80\x3f\0\0\0\x40", 8); /* 1, 2 */
}

/* A cut at any byte is refused, whichever way the file is read; the vocabulary is larger than the first read. */
static void every_cut_is_noticed(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    tp_buf b;
    tp_gguf *file;
    make_file(&b, 10, 3);
    for (size_t n = 0; n <= b.len; n++) {
        uint8_t *exact = malloc(n > 0 ? n : 1);
        memcpy(exact, b.data, n);
        assert_status(&ctx, n < b.len ? TP_FORMAT : TP_OK, tp_gguf_parse(&ctx, "cut", exact, n, &file));
        tp_gguf_close(file);
        free(exact);
    }
    tp_buf_free(&b);
    scratch s;
    scratch_begin(&s);
    make_file(&b, 20000, 3);
    assert_true(b.len > 300000);
    for (int way = 0; way < 2; way++) {
        setenv("TAPEFT_NO_MMAP", way == 0 ? "0" : "1", 1);
        assert_ok(&ctx, tp_file_write(&ctx, scratch_path(&s, "f.gguf"), b.data, b.len));
        assert_ok(&ctx, tp_gguf_open(&ctx, s.path, &file));
        const tp_gguf_value *strings = tp_gguf_find(file, "strings");
        assert_int_equal(strings->count, 20000);
        for (uint64_t i = 0; i < 20000; i++) {
            char text[32] = "";
            if (i % 3 != 0) snprintf(text, sizeof text, "string %d", (int)i);
            assert_true(tp_span_is(tp_gguf_string_at(file, strings, i), text));
        }
        float values[2];
        assert_ok(&ctx, tp_gguf_read(&ctx, file, tp_gguf_tensor_at(file, 0), values));
        assert_true(values[0] == 1 && values[1] == 2);
        tp_gguf_close(file);
        for (size_t cut = 1; cut < b.len; cut = cut * 3 + 1) {
            assert_ok(&ctx, tp_file_write(&ctx, s.path, b.data, b.len - cut));
            assert_status(&ctx, TP_FORMAT, tp_gguf_open(&ctx, s.path, &file));
        }
    }
    unsetenv("TAPEFT_NO_MMAP");
    tp_buf_free(&b);
    scratch_end(&s);
}

/* A file without tensors and with one entry, "k", whose type and value come next. */
static void begin_one_entry(tp_buf *b)
{
    tp_buf_init(b, 0);
    tp_buf_text(b, "GGUF");
    add_u32(b, 3);
    add_u64(b, 0);
    add_u64(b, 1);
    add_string(b, "k");
}

static void limits_hold_on_both_sides(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    tp_buf b;
    tp_gguf *file;
    for (size_t n = 511; n <= 513; n++) { /* G12: kept whole or refused */
        make_file(&b, 1, n);
        assert_status(&ctx, n <= TP_GGUF_NAME_MAX ? TP_OK : TP_FORMAT, tp_gguf_parse(&ctx, "x", b.data, b.len, &file));
        if (file != NULL) assert_int_equal(strlen(tp_gguf_tensor_at(file, 0)->name), n);
        tp_gguf_close(file);
        tp_buf_free(&b);
    }
    for (uint32_t n = TP_GGUF_MAX_VALUES - 1; n <= TP_GGUF_MAX_VALUES + 1; n++) {
        tp_buf_init(&b, 0);
        tp_buf_text(&b, "GGUF");
        add_u32(&b, 3);
        add_u64(&b, 0);
        add_u64(&b, n);
        for (uint32_t i = 0; i < n; i++) {
            char key[16];
            snprintf(key, sizeof key, "%u", i);
            add_string(&b, key);
            add_u32(&b, TP_GGUF_U8);
            tp_buf_char(&b, 1);
        }
        assert_status(&ctx, n <= TP_GGUF_MAX_VALUES ? TP_OK : TP_FORMAT, tp_gguf_parse(&ctx, "x", b.data, b.len, &file));
        tp_gguf_close(file);
        tp_buf_free(&b);
    }
    for (uint64_t n = TP_GGUF_STRING_MAX - 1; n <= TP_GGUF_STRING_MAX + 1; n++) {
        begin_one_entry(&b);
        add_u32(&b, TP_GGUF_STRING);
        add_u64(&b, n);
        char *large = calloc(1, b.len + n);
        memcpy(large, b.data, b.len);
        assert_status(&ctx, n <= TP_GGUF_STRING_MAX ? TP_OK : TP_FORMAT, tp_gguf_parse(&ctx, "x", large, b.len + n, &file));
        tp_gguf_close(file);
        free(large);
        tp_buf_free(&b);
    }
}

/* A sparse file: the limit holds before memory for the metadata is taken. */
static void metadata_beyond_the_limit_is_not_read(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_buf b;
    tp_gguf *file;
    scratch s;
    const uint64_t n = TP_GGUF_HEAD_MAX;
    tp_ctx_init(&ctx);
    scratch_begin(&s);
    begin_one_entry(&b);
    add_u32(&b, TP_GGUF_ARRAY);
    add_u32(&b, TP_GGUF_U8);
    add_u64(&b, n);
    assert_ok(&ctx, tp_file_write(&ctx, scratch_path(&s, "f.gguf"), b.data, b.len));
    assert_int_equal(truncate(s.path, (off_t)(b.len + n)), 0);
    assert_int_equal(tp_gguf_open(&ctx, s.path, &file), TP_FORMAT);
    assert_non_null(strstr(ctx.message, "metadata of more than 536870912 bytes"));
    tp_buf_free(&b);
    scratch_end(&s);
}

static tp_status open_and_close(tp_ctx *ctx, const char *path)
{
    tp_gguf *file;
    TP_TRY(tp_gguf_open(ctx, path, &file));
    tp_gguf_close(file);
    return TP_OK;
}

static void memory_may_run_out(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    char path[1024];
    scratch s;
    scratch_begin(&s);
    tp_buf b;
    make_file(&b, 9000, 3); /* several reads, several growths */
    assert_ok(&ctx, tp_file_write(&ctx, scratch_path(&s, "f.gguf"), b.data, b.len));
    tp_buf_free(&b);
    assert_survives_failing_memory(&ctx, open_and_close(&ctx, s.path));
    assert_survives_failing_memory(&ctx, open_and_close(&ctx, golden_path(path, sizeof path, "gguf/metadata.gguf")));
    scratch_end(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(hostile_files_get_their_verdict),
        cmocka_unit_test(every_value_type_is_read),
        cmocka_unit_test(typed_access_checks_types),
        cmocka_unit_test(block_sizes_are_those_of_ggml),
        cmocka_unit_test(every_cut_is_noticed),
        cmocka_unit_test(limits_hold_on_both_sides),
        cmocka_unit_test(metadata_beyond_the_limit_is_not_read),
        cmocka_unit_test(memory_may_run_out),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
