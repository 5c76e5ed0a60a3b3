/* safetensors: verdicts on hostile files, content of real ones, and a writer that repeats the reference's bytes. */
#include "tests/support.h"

#include <dirent.h>
#include <math.h>
#include <unistd.h>

#include "base/json.h"
#include "base/mem.h"
#include "base/safetensors.h"
#include "tests/failing_memory.h"
#include "tests/scratch.h"

/* A file in memory from its header, with the right length in front and n_data bytes 0, 1, 2, ... behind. */
static uint8_t *image_of(const char *header, size_t n_data, size_t *n)
{
    uint64_t length = strlen(header);
    *n = 8 + length + n_data;
    uint8_t *bytes = malloc(*n);
    assert_non_null(bytes);
    memcpy(bytes, &length, 8);
    memcpy(bytes + 8, header, length);
    for (size_t i = 0; i < n_data; i++) bytes[8 + length + i] = (uint8_t)i;
    return bytes;
}

static tp_status parse_header(tp_ctx *ctx, const char *header, size_t n_data)
{
    size_t n;
    uint8_t *bytes = image_of(header, n_data, &n);
    tp_safetensors *file;
    tp_status status = tp_safetensors_parse(ctx, "x.safetensors", bytes, n, &file);
    tp_safetensors_close(file);
    free(bytes);
    return status;
}

/* ---- hostile files ---- */

static void check_case(const char *path, const char *verdict, const char *what)
{
    tp_ctx ctx;
    char *bytes;
    size_t n;
    tp_status statuses[3];
    tp_safetensors *file;
    for (int way = 0; way < 3; way++) { /* mapped, read, in memory: one rule on every path */
        tp_ctx_init(&ctx);
        setenv("TAPEFT_NO_MMAP", way == 1 ? "1" : "0", 1);
        if (way < 2) {
            statuses[way] = tp_safetensors_open(&ctx, path, &file);
        } else {
            assert_ok(&ctx, tp_file_read(&ctx, path, 1 << 24, &bytes, &n));
            uint8_t *exact = malloc(n > 0 ? n : 1); /* without the NUL behind it, so that a sanitizer sees one byte too many */
            memcpy(exact, bytes, n);
            tp_free(bytes);
            statuses[way] = tp_safetensors_parse(&ctx, path, exact, n, &file);
            free(exact);
        }
        bool accepted = statuses[way] == TP_OK;
        if (strcmp(verdict, "either") != 0 && accepted != (strcmp(verdict, "accept") == 0))
            fail_msg("%s (%s): expected %s, got %s: %s", path, what, verdict, tp_status_name(statuses[way]), ctx.message);
        assert_int_equal(statuses[way], statuses[0]);
        assert_int_equal(file != NULL, accepted);
        if (!accepted) {
            assert_int_equal(tp_status_exit_code(statuses[way]), 3);
            if (!tp_starts_with(ctx.message, path)) fail_msg("%s: message without the file: %s", path, ctx.message);
            for (const char *p = ctx.message; *p != '\0'; p++) assert_true((unsigned char)*p >= 0x20 && *p != 0x7f);
            assert_int_equal(tp_utf8_valid_prefix(ctx.message, strlen(ctx.message)), strlen(ctx.message));
        }
        tp_safetensors_close(file);
    }
    unsetenv("TAPEFT_NO_MMAP");
}

/* S1 to S12, S16: bad/index.json says what has to happen. */
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
        tp_span text = tp_json_string(tp_json_get(tp_json_at(cases, i), "path"));
        if (text.len < 12 || memcmp(text.data, "safetensors/", 12) != 0) continue;
        snprintf(name, sizeof name, "bad/%.*s", (int)text.len, text.data);
        text = tp_json_string(tp_json_get(tp_json_at(cases, i), "verdict"));
        snprintf(verdict, sizeof verdict, "%.*s", (int)text.len, text.data);
        text = tp_json_string(tp_json_get(tp_json_at(cases, i), "what"));
        snprintf(what, sizeof what, "%.*s", (int)text.len, text.data);
        check_case(golden_path(path, sizeof path, name), verdict, what);
        count++;
    }
    tp_json_free(doc);
    print_message("%d hostile or odd files\n", count);
    assert_true(count >= 90);
}

static void limits_hold_on_both_sides(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    char header[4096], name[600];
    for (int n = 511; n <= 513; n++) {
        memset(name, 'n', (size_t)n);
        name[n] = '\0';
        snprintf(header, sizeof header, "{\"%s\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", name);
        assert_status(&ctx, n <= 512 ? TP_OK : TP_FORMAT, parse_header(&ctx, header, 1));
    }
    for (int rank = 7; rank <= 9; rank++) {
        char shape[64] = "1";
        size_t used = 1;
        for (int i = 1; i < rank; i++) used += (size_t)snprintf(shape + used, sizeof shape - used, ",1");
        snprintf(header, sizeof header, "{\"a\":{\"dtype\":\"U8\",\"shape\":[%s],\"data_offsets\":[0,1]}}", shape);
        assert_status(&ctx, rank <= TP_MAX_RANK ? TP_OK : TP_FORMAT, parse_header(&ctx, header, 1));
    }
    /* A header of 100,000,000 bytes is read, one more is not. */
    size_t most = TP_SAFETENSORS_HEADER_MAX;
    char *bytes = malloc(8 + most + 1);
    memset(bytes, ' ', 8 + most + 1);
    for (uint64_t n = most; n <= most + 1; n++) {
        tp_safetensors *file;
        memcpy(bytes, &n, 8);
        memcpy(bytes + 8, "{}", 2);
        assert_status(&ctx, n == most ? TP_OK : TP_FORMAT, tp_safetensors_parse(&ctx, "big", bytes, 8 + n, &file));
        tp_safetensors_close(file);
    }
    free(bytes);
    assert_status(&ctx, TP_FORMAT,
                  parse_header(&ctx, "{\"a\\u0000b\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1));
    assert_int_equal(parse_header(&ctx, "{\"a\":{\"dtype\":\"U8\",\"shape\":[9],\"data_offsets\":[0,9]}}", 5), TP_FORMAT);
    assert_string_equal(ctx.message, "x.safetensors: truncated: 4 bytes missing"); /* S9 */
    tp_ctx_clear(&ctx);
    assert_status(
        &ctx, TP_FORMAT,
        parse_header(&ctx,
                     "{\"a\":{\"dtype\":\"U8\",\"shape\":[9223372036854775807],\"data_offsets\":[0,9223372036854775807]}}", 5));
    assert_status(
        &ctx, TP_FORMAT,
        parse_header(&ctx, "{\"a\":{\"dtype\":\"F32\",\"shape\":[2,0,9223372036854775807],\"data_offsets\":[0,4]}}", 4));
}

/* ---- real files ---- */

static void contents_are_read(void **state)
{
    (void)state;
    const char *header = "{\"b\":{\"dtype\":\"BF16\",\"shape\":[2,1],\"data_offsets\":[4,8]},"
                         "\"__metadata__\":{\"format\":\"pt\",\"k\\n\":\"v\"},"
                         "\"a\":{\"dtype\":\"I16\",\"shape\":[2],\"data_offsets\":[0,4]},"
                         "\"e\":{\"dtype\":\"F64\",\"shape\":[0,3],\"data_offsets\":[8,8]},"
                         "\"s\":{\"dtype\":\"U64\",\"shape\":[],\"data_offsets\":[8,16]}}";
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    size_t n;
    uint8_t *bytes = image_of(header, 16, &n);
    tp_safetensors *file;
    const char *key, *value;
    int64_t integers[2];
    float floats[2];
    bytes[8 + strlen(header) + 15] = 0xff; /* s is above 2^63 */
    assert_ok(&ctx, tp_safetensors_parse(&ctx, "x", bytes, n, &file));
    assert_int_equal(tp_safetensors_count(file), 4);
    static const char *const order[] = {"a", "b", "e", "s"};
    for (size_t i = 0; i < 4; i++) {
        assert_string_equal(tp_safetensors_at(file, i)->name, order[i]);
        assert_ptr_equal(tp_safetensors_find(file, order[i]), tp_safetensors_at(file, i));
    }
    assert_null(tp_safetensors_at(file, 4));
    assert_null(tp_safetensors_find(file, "__metadata__"));
    assert_int_equal(tp_safetensors_metadata_count(file), 2);
    assert_string_equal(tp_safetensors_metadata(file, "format"), "pt");
    assert_null(tp_safetensors_metadata(file, "other"));
    tp_safetensors_metadata_at(file, 1, &key, &value);
    assert_string_equal(key, "k\n");
    assert_string_equal(value, "v");
    assert_string_equal(tp_safetensors_path(file), "x");
    assert_null(tp_safetensors_file(file));
    const tp_entry *a = tp_safetensors_find(file, "a"), *b = tp_safetensors_find(file, "b"),
                   *s = tp_safetensors_find(file, "s");
    assert_int_equal(b->rank, 2);
    assert_int_equal(b->shape[0], 2);
    assert_int_equal(b->bytes, 4);
    assert_memory_equal(tp_safetensors_data(file, b), "\4\5\6\7", 4);
    assert_ok(&ctx, tp_safetensors_read_i64(&ctx, file, a, 0, 2, integers));
    assert_true(integers[0] == 0x0100 && integers[1] == 0x0302);
    assert_ok(&ctx, tp_safetensors_read_i64(&ctx, file, a, 1, 1, integers));
    assert_true(integers[0] == 0x0302);
    assert_ok(&ctx, tp_safetensors_read_f32(&ctx, file, b, 0, 2, floats));
    assert_true(floats[0] == tp_f32_from_bits(0x05040000) && floats[1] == tp_f32_from_bits(0x07060000));
    assert_ok(&ctx, tp_safetensors_read_f32(&ctx, file, tp_safetensors_find(file, "e"), 0, 0, floats));
    assert_status(&ctx, TP_SHAPE, tp_safetensors_read_f32(&ctx, file, b, 1, 2, floats));
    assert_status(&ctx, TP_SHAPE, tp_safetensors_read_f32(&ctx, file, b, UINT64_MAX, 2, floats));
    assert_status(&ctx, TP_FORMAT, tp_safetensors_read_f32(&ctx, file, a, 0, 1, floats));
    assert_status(&ctx, TP_FORMAT, tp_safetensors_read_i64(&ctx, file, b, 0, 1, integers));
    assert_status(&ctx, TP_FORMAT, tp_safetensors_read_i64(&ctx, file, s, 0, 1, integers)); /* does not fit */
    tp_safetensors_close(file);
    tp_safetensors_close(NULL);
    free(bytes);
}

/* Every integer type against its definition: two elements of bytes 0xff 0xfe ... and their widened values. */
static void integers_are_widened(void **state)
{
    (void)state;
    static const struct {
        const char *dtype;
        int size;
        int64_t value;
    } cases[] = {{"BOOL", 1, 1}, {"U8", 1, 0xfe},        {"I8", 1, -2},  {"U16", 2, 0xfffe},
                 {"I16", 2, -2}, {"U32", 4, 0xfffffffe}, {"I32", 4, -2}, {"I64", 8, -2}};
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char header[256];
        size_t n;
        int64_t out[2] = {0, 0};
        tp_safetensors *file;
        snprintf(header, sizeof header, "{\"a\":{\"dtype\":\"%s\",\"shape\":[2],\"data_offsets\":[0,%d]}}", cases[i].dtype,
                 2 * cases[i].size);
        uint8_t *bytes = image_of(header, (size_t)(2 * cases[i].size), &n);
        memset(bytes + 8 + strlen(header), 0xff, (size_t)(2 * cases[i].size));
        bytes[8 + strlen(header) + (size_t)cases[i].size] = 0xfe;
        assert_ok(&ctx, tp_safetensors_parse(&ctx, "x", bytes, n, &file));
        assert_ok(&ctx, tp_safetensors_read_i64(&ctx, file, tp_safetensors_at(file, 0), 0, 2, out));
        assert_int_equal(out[1], cases[i].value);
        tp_safetensors_close(file);
        free(bytes);
    }
}

/* gguf/index.json states dtype and shape of each tensor: {"Q4_0.bytes": "U8 [22, 18]", ...}. */
static void shapes_are_those_of_the_index(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    char path[1024], expected[128];
    tp_json_doc *doc;
    tp_safetensors *file;
    assert_ok(&ctx, tp_json_read(&ctx, golden_path(path, sizeof path, "gguf/index.json"), 1 << 24, &doc));
    const tp_json *tensors = tp_json_get(tp_json_get(tp_json_get(tp_json_root(doc), "files"), "blocks.safetensors"), "tensors");
    assert_ok(&ctx, tp_safetensors_open(&ctx, golden_path(path, sizeof path, "gguf/blocks.safetensors"), &file));
    assert_true(tp_json_count(tensors) > 5);
    assert_int_equal(tp_json_count(tensors), tp_safetensors_count(file));
    for (size_t i = 0; i < tp_json_count(tensors); i++) {
        tp_span key = tp_json_key_at(tensors, i);
        char name[64];
        snprintf(name, sizeof name, "%.*s", (int)key.len, key.data);
        const tp_entry *entry = tp_safetensors_find(file, name);
        assert_non_null(entry);
        int n = snprintf(expected, sizeof expected, "%s [", tp_dtype_name(entry->dtype));
        for (int d = 0; d < entry->rank; d++)
            n += snprintf(expected + n, sizeof expected - (size_t)n, "%s%lld", d > 0 ? ", " : "", (long long)entry->shape[d]);
        snprintf(expected + n, sizeof expected - (size_t)n, "]");
        assert_true(tp_span_is(tp_json_string(tp_json_at(tensors, i)), expected));
    }
    tp_safetensors_close(file);
    tp_json_free(doc);
}

/* ---- writing ---- */

static tp_status copy(tp_ctx *ctx, const tp_safetensors *from, const char *path)
{
    tp_safetensors_writer *w;
    TP_TRY(tp_safetensors_create(ctx, path, &w));
    tp_status status = TP_OK;
    for (size_t i = tp_safetensors_count(from); i-- > 0 && status == TP_OK;) { /* in another order than the file's */
        const tp_entry *e = tp_safetensors_at(from, i);
        status = tp_safetensors_declare(ctx, w, e->name, e->dtype, e->rank, e->shape);
    }
    for (const tp_entry *e; status == TP_OK && (e = tp_safetensors_next(w)) != NULL;) {
        const char *data = tp_safetensors_data(from, tp_safetensors_find(from, e->name));
        uint64_t third = e->bytes / 3;
        status = tp_safetensors_write(ctx, w, data, (size_t)third);
        if (status == TP_OK) status = tp_safetensors_write(ctx, w, data + third, (size_t)(e->bytes - third));
    }
    if (status == TP_OK) return tp_safetensors_finish(ctx, w);
    tp_safetensors_discard(w);
    return status;
}

/* The models were written by the reference implementation with {"format":"pt"}: read and written again they have to give
 * the same bytes, also over the very file that is mapped (S13). */
static void copies_equal_what_the_reference_wrote(void **state)
{
    (void)state;
    scratch s;
    scratch_begin(&s);
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    char models[1024], path[2048], there[65], here[65];
    int count = 0;
    DIR *dir = opendir(golden_path(models, sizeof models, "models"));
    assert_non_null(dir);
    for (struct dirent *e; (e = readdir(dir)) != NULL;) {
        tp_safetensors *file;
        if (e->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "%s/%s/model.safetensors", models, e->d_name);
        if (!tp_path_exists(path)) continue; /* a sharded one, or one without weights */
        assert_ok(&ctx, tp_safetensors_open(&ctx, path, &file));
        if (tp_safetensors_metadata_count(file) == 1 && tp_safetensors_data(file, tp_safetensors_at(file, 0)) != NULL) {
            assert_ok(&ctx, copy(&ctx, file, scratch_path(&s, "copy")));
            assert_ok(&ctx, tp_sha256_file(&ctx, path, there));
            assert_ok(&ctx, tp_sha256_file(&ctx, s.path, here));
            assert_string_equal(here, there);
            count++;
        }
        tp_safetensors_close(file);
    }
    closedir(dir);
    assert_true(count >= 5);
    print_message("%d files\n", count);
    tp_safetensors *file;
    assert_ok(&ctx, tp_safetensors_open(&ctx, scratch_path(&s, "copy"), &file));
    assert_ok(&ctx, copy(&ctx, file, s.path));
    tp_safetensors_close(file);
    assert_ok(&ctx, tp_sha256_file(&ctx, s.path, there));
    assert_string_equal(here, there);
    scratch_end(&s);
}

static void headers_have_the_stated_layout(void **state)
{
    (void)state;
    scratch s;
    scratch_begin(&s);
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    char *bytes;
    size_t n;
    const float f[2] = {1, 2};
    const uint8_t u[3] = {7, 8, 9};
    const int64_t l = -1;
    const tp_named_array arrays[] = {
        {.name = "b\"", .dtype = TP_U8, .rank = 1, .shape = {3}, .data = u},
        {.name = "z", .dtype = TP_F32, .rank = 2, .shape = {1, 2}, .data = f},
        {.name = "a", .dtype = TP_U8, .rank = 2, .shape = {0, 5}, .data = NULL},
        {.name = "c", .dtype = TP_I64, .rank = 0, .data = &l},
    };
    const char *const metadata[] = {"note", "\xc3\xa4\n", "format", "pt", NULL};
    assert_ok(&ctx, tp_safetensors_save(&ctx, scratch_path(&s, "f"), arrays, 4, metadata));
    assert_ok(&ctx, tp_file_read(&ctx, s.path, 10000, &bytes, &n));
    static const char expected[] = "{\"__metadata__\":{\"format\":\"pt\",\"note\":\"\xc3\xa4\\n\"},"
                                   "\"c\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[0,8]},"
                                   "\"z\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[8,16]},"
                                   "\"a\":{\"dtype\":\"U8\",\"shape\":[0,5],\"data_offsets\":[16,16]},"
                                   "\"b\\\"\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[16,19]}}";
    uint64_t length;
    memcpy(&length, bytes, 8);
    assert_int_equal(length % 8, 0);
    assert_in_range(length, sizeof expected - 1, sizeof expected + 6);
    assert_memory_equal(bytes + 8, expected, sizeof expected - 1);
    for (size_t i = sizeof expected - 1; i < length; i++) assert_int_equal(bytes[8 + i], ' ');
    assert_int_equal(n, 8 + length + 19);
    assert_memory_equal(bytes + 8 + length, &l, 8);
    assert_memory_equal(bytes + 8 + length + 8, f, 8);
    assert_memory_equal(bytes + 8 + length + 16, u, 3);
    tp_free(bytes);
    tp_safetensors *file;
    assert_ok(&ctx, tp_safetensors_open(&ctx, s.path, &file));
    assert_int_equal(tp_safetensors_count(file), 4);
    assert_non_null(tp_safetensors_file(file));
    tp_safetensors_close(file);
    assert_ok(&ctx, tp_safetensors_save(&ctx, scratch_path(&s, "none"), NULL, 0, NULL)); /* S12 */
    assert_ok(&ctx, tp_safetensors_open(&ctx, s.path, &file));
    assert_int_equal(tp_safetensors_count(file), 0);
    tp_safetensors_close(file);
    scratch_end(&s);
}

static void the_writer_is_strict(void **state)
{
    (void)state;
    scratch s;
    scratch_begin(&s);
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    tp_safetensors_writer *w;
    const int64_t two[8] = {2}, huge[2] = {INT64_MAX, 2}, negative[1] = {-1};
    char name[600];
    memset(name, 'n', sizeof name);
    name[513] = '\0';
    assert_ok(&ctx, tp_safetensors_create(&ctx, scratch_path(&s, "f"), &w));
    assert_ok(&ctx, tp_safetensors_declare(&ctx, w, "a", TP_U8, 1, two));
    assert_status(&ctx, TP_INTERNAL, tp_safetensors_declare(&ctx, w, "a", TP_U8, 1, two));
    assert_status(&ctx, TP_INTERNAL, tp_safetensors_declare(&ctx, w, name, TP_U8, 1, two));
    assert_status(&ctx, TP_INTERNAL, tp_safetensors_declare(&ctx, w, "\xff", TP_U8, 1, two));
    assert_status(&ctx, TP_INTERNAL, tp_safetensors_declare(&ctx, w, "__metadata__", TP_U8, 1, two));
    assert_status(&ctx, TP_INTERNAL, tp_safetensors_declare(&ctx, w, "b", TP_DTYPE_COUNT, 1, two));
    assert_status(&ctx, TP_INTERNAL, tp_safetensors_declare(&ctx, w, "b", TP_U8, 9, two));
    assert_status(&ctx, TP_INTERNAL, tp_safetensors_declare(&ctx, w, "b", TP_U8, 1, negative));
    assert_status(&ctx, TP_SHAPE, tp_safetensors_declare(&ctx, w, "b", TP_U8, 2, huge));
    assert_status(&ctx, TP_SHAPE, tp_safetensors_declare(&ctx, w, "b", TP_F4, 0, two));
    assert_status(&ctx, TP_INTERNAL, tp_safetensors_add_metadata(&ctx, w, "format", "tf"));
    assert_status(&ctx, TP_INTERNAL, tp_safetensors_add_metadata(&ctx, w, "k", "\xff"));
    assert_string_equal(tp_safetensors_next(w)->name, "a");
    assert_status(&ctx, TP_INTERNAL, tp_safetensors_declare(&ctx, w, "late", TP_U8, 1, two));
    assert_status(&ctx, TP_INTERNAL, tp_safetensors_write(&ctx, w, "123", 3));
    assert_ok(&ctx, tp_safetensors_write(&ctx, w, "1", 1));
    assert_status(&ctx, TP_INTERNAL, tp_safetensors_add_metadata(&ctx, w, "k", "v"));
    assert_status(&ctx, TP_INTERNAL, tp_safetensors_finish(&ctx, w)); /* a byte is missing */
    assert_false(tp_path_exists(s.path));
    assert_ok(&ctx, tp_safetensors_create(&ctx, s.path, &w));
    tp_safetensors_discard(w);
    tp_safetensors_discard(NULL);
    assert_false(tp_path_exists(s.path));
    assert_status(&ctx, TP_IO_WRITE, tp_safetensors_create(&ctx, scratch_path(&s, "absent/f"), &w));
    scratch_end(&s);
}

static tp_status open_and_close(tp_ctx *ctx, const char *path)
{
    tp_safetensors *file;
    TP_TRY(tp_safetensors_open(ctx, path, &file));
    tp_safetensors_close(file);
    return TP_OK;
}

static void memory_may_run_out(void **state)
{
    (void)state;
    scratch s;
    scratch_begin(&s);
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    enum { N = 40 };
    tp_named_array arrays[N];
    char names[N][16];
    for (int i = 0; i < N; i++) {
        snprintf(names[i], sizeof names[i], "t\n%d", i);
        arrays[i] = (tp_named_array){.name = names[i], .dtype = TP_U8, .rank = 1, .shape = {3}, .data = "xyz"};
    }
    const char *const metadata[] = {"k", "v", NULL};
    assert_survives_failing_memory(&ctx, tp_safetensors_save(&ctx, scratch_path(&s, "f"), arrays, N, metadata));
    assert_survives_failing_memory(&ctx, open_and_close(&ctx, s.path));
    scratch_end(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(hostile_files_get_their_verdict),
        cmocka_unit_test(limits_hold_on_both_sides),
        cmocka_unit_test(contents_are_read),
        cmocka_unit_test(integers_are_widened),
        cmocka_unit_test(shapes_are_those_of_the_index),
        cmocka_unit_test(copies_equal_what_the_reference_wrote),
        cmocka_unit_test(headers_have_the_stated_layout),
        cmocka_unit_test(the_writer_is_strict),
        cmocka_unit_test(memory_may_run_out),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
