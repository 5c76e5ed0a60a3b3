/* Finding rows: line ends, marks, blank lines, split points, sizes, compression, and what is no file of rows
 * (golden/bad/jsonl). */
#include "tests/support.h"

#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include "base/json.h"
#include "data/rows.h"
#include "tests/data/dataset_support.h"

/* ---- lines ---- */

/* "line@offset:text|" for every row, read in blocks of block_bytes. */
static void list_rows(fixture *f, const char *name, size_t block_bytes, tp_buf *out)
{
    tp_row_file *file;
    tp_row_reader reader;
    tp_row_place row;
    bool found = true;
    char again[256];
    tp_buf_clear(out);
    assert_ok(&f->ctx, tp_row_file_open(&f->ctx, scratch_path(&f->dir, name), "train", &file));
    tp_row_reader_begin(&reader, file, block_bytes);
    for (;;) {
        assert_ok(&f->ctx, tp_row_reader_next(&f->ctx, &reader, &row, &found));
        if (!found) break;
        tp_buf_printf(out, "%d@%d:", (int)row.line, (int)row.offset);
        tp_buf_append(out, row.text, row.bytes);
        tp_buf_char(out, '|');
        assert_true(row.bytes <= sizeof again);
        assert_ok(&f->ctx, tp_row_file_read(&f->ctx, file, row.offset, again, row.bytes));
        assert_memory_equal(again, row.text, row.bytes);
    }
    tp_row_reader_end(&reader);
    tp_row_file_close(file);
}

static void expect_rows(fixture *f, const char *text, const char *expected)
{
    tp_buf out;
    tp_buf_init(&out, 0);
    write_file(f, "a.jsonl", text, strlen(text));
    for (size_t block = 1; block < strlen(text) + 3; block++) {
        list_rows(f, "a.jsonl", block, &out);
        assert_string_equal(tp_buf_cstr(&out), expected);
    }
    tp_buf_free(&out);
}

static void test_lines(void **state)
{
    fixture f;
    (void)state;
    fixture_begin(&f);
    expect_rows(&f, "one\ntwo\n", "1@0:one|2@4:two|");
    expect_rows(&f, "one\ntwo", "1@0:one|2@4:two|");
    expect_rows(&f, "one\r\ntwo\r\n", "1@0:one|2@5:two|");
    expect_rows(&f, "\xEF\xBB\xBFone\n", "1@3:one|");
    expect_rows(&f, "\n \t\r\none\n\n\n  two \n\n", "3@5:one|6@11:  two |");
    expect_rows(&f, "\xEF\xBB\xBF\n\n", "");
    expect_rows(&f, "a\rb\r\r\n", "1@0:a\rb\r|");
    expect_rows(&f, "x\n\xEF\xBB\xBFy", "1@0:x|2@2:\xEF\xBB\xBFy|");
    fixture_end(&f);
}

static void test_text_file_is_one_row(void **state)
{
    fixture f;
    tp_buf out;
    (void)state;
    fixture_begin(&f);
    tp_buf_init(&out, 0);
    write_file(&f, "a.txt", "\xEF\xBB\xBFone\r\n\ntwo\n", 13);
    for (size_t block = 1; block < 16; block++) {
        list_rows(&f, "a.txt", block, &out);
        assert_string_equal(tp_buf_cstr(&out), "1@3:one\r\n\ntwo\n|");
    }
    tp_buf_free(&out);
    fixture_end(&f);
}

static tp_status read_all(fixture *f, const char *path)
{
    tp_row_file *file;
    tp_row_reader reader;
    tp_row_place row;
    bool found = true;
    TP_TRY(tp_row_file_open(&f->ctx, path, "train", &file));
    tp_row_reader_begin(&reader, file, 0);
    tp_status status = TP_OK;
    while (status == TP_OK && found) status = tp_row_reader_next(&f->ctx, &reader, &row, &found);
    tp_row_reader_end(&reader);
    tp_row_file_close(file);
    return status;
}

/* A row that is too long by one byte, in a file with holes so that the disk holds little of it. */
static void test_longest_row(void **state)
{
    fixture f;
    (void)state;
    fixture_begin(&f);
    write_file(&f, "long.jsonl", "x\n", 2);
    assert_int_equal(truncate(f.dir.path, 2 + (off_t)TP_ROW_MAX_BYTES), 0);
    assert_ok(&f.ctx, read_all(&f, f.dir.path));
    assert_int_equal(truncate(f.dir.path, 3 + (off_t)TP_ROW_MAX_BYTES), 0);
    tp_status status = read_all(&f, f.dir.path);
    assert_int_equal(status, TP_FORMAT);
    assert_non_null(strstr(f.ctx.message, "long.jsonl:2: "));
    tp_ctx_clear(&f.ctx);
    fixture_end(&f);
}

/* ---- kinds of files ---- */

static void test_other_files(void **state)
{
    fixture f;
    (void)state;
    fixture_begin(&f);
    write_file(&f, "a.tsv", "a\tb\n", 4);
    assert_status(&f.ctx, TP_UNSUPPORTED, read_all(&f, f.dir.path));
    write_file(&f, "a.json", "[]", 2);
    assert_status(&f.ctx, TP_UNSUPPORTED, read_all(&f, f.dir.path));
    assert_status(&f.ctx, TP_IO_READ, read_all(&f, scratch_path(&f.dir, "absent.jsonl")));
    assert_status(&f.ctx, TP_IO_READ, read_all(&f, f.dir.folder)); /* no train.jsonl in it */
    assert_int_equal(mkfifo(scratch_path(&f.dir, "fifo.jsonl"), 0600), 0);
    assert_status(&f.ctx, TP_FORMAT, read_all(&f, f.dir.path));
    assert_int_equal(symlink("loop.jsonl", scratch_path(&f.dir, "loop.jsonl")), 0);
    assert_status(&f.ctx, TP_IO_READ, read_all(&f, f.dir.path));
    write_file(&f, "train.jsonl", "{}\n", 3);
    assert_ok(&f.ctx, read_all(&f, f.dir.folder));
    fixture_end(&f);
}

static size_t gzip(const char *text, size_t n, char *out, size_t room)
{
    z_stream z = {0};
    assert_int_equal(deflateInit2(&z, 9, Z_DEFLATED, 31, 8, Z_DEFAULT_STRATEGY), Z_OK);
    z.next_in = (Bytef *)(uintptr_t)text;
    z.avail_in = (uInt)n;
    z.next_out = (Bytef *)out;
    z.avail_out = (uInt)room;
    assert_int_equal(deflate(&z, Z_FINISH), Z_STREAM_END);
    deflateEnd(&z);
    return room - z.avail_out;
}

static void test_gzip(void **state)
{
    fixture f;
    tp_buf out;
    char packed[4096];
    static char zeros[1 << 20];
    (void)state;
    fixture_begin(&f);
    tp_buf_init(&out, 0);
    size_t n = gzip("one\ntw", 6, packed, sizeof packed);
    n += gzip("o\nthree", 7, packed + n, sizeof packed - n); /* members follow each other */
    write_file(&f, "a.jsonl.gz", packed, n);
    list_rows(&f, "a.jsonl.gz", 0, &out);
    assert_string_equal(tp_buf_cstr(&out), "1@0:one|2@4:two|3@8:three|");
    for (size_t cut = 1; cut < n; cut++) { /* a cut between the members leaves a whole file */
        write_file(&f, "a.jsonl.gz", packed, cut);
        tp_status status = read_all(&f, f.dir.path);
        assert_true(status == TP_FORMAT || status == TP_OK);
        if (status == TP_OK) assert_true(cut > n / 3 && cut < n * 2 / 3);
        tp_ctx_clear(&f.ctx);
    }
    packed[n] = 'x';
    write_file(&f, "a.jsonl.gz", packed, n + 1);
    assert_status(&f.ctx, TP_FORMAT, read_all(&f, f.dir.path));
    n = gzip(zeros, sizeof zeros, packed, sizeof packed);
    write_file(&f, "a.jsonl.gz", packed, n);
    assert_status(&f.ctx, TP_FORMAT, read_all(&f, f.dir.path));
    tp_buf_free(&out);
    fixture_end(&f);
}

/* ---- recorded verdicts ---- */

static const tp_json *find_field(const tp_json *row, const char *key, tp_json_type type)
{
    const tp_json *value = tp_json_get(row, key);
    return tp_json_type_of(value) == type ? value : NULL;
}

static void check_verdict(fixture *f, const tp_json *row, size_t *n)
{
    char relative[256], path[4096], line[32];
    tp_dataset *data;
    tp_dataset_counts counts;
    int64_t number;
    tp_span name = tp_json_string(tp_json_get(row, "path")), verdict = tp_json_string(tp_json_get(row, "verdict"));
    if (name.len < 6 || memcmp(name.data, "jsonl/", 6) != 0) return;
    snprintf(relative, sizeof relative, "bad/%.*s", (int)name.len, name.data);
    f->blocks[0].path = golden_path(path, sizeof path, relative);
    tp_status status = tp_dataset_open(&f->ctx, &f->options, &data);
    if (status != TP_OK && f->ctx.message[0] == '\0') fail_msg("%s: no message", relative);
    if (tp_span_is(verdict, "accept") && status != TP_OK) fail_msg("%s: %s", relative, f->ctx.message);
    if (tp_span_is(verdict, "refuse")) {
        if (tp_status_exit_code(status) != 3)
            fail_msg("%s: exit class %d: %s", relative, tp_status_exit_code(status), f->ctx.message);
        const tp_json *wanted = find_field(row, "line", TP_JSON_NUMBER);
        if (wanted != NULL && tp_json_i64(wanted, &number)) {
            snprintf(line, sizeof line, ":%d:", (int)number);
            if (strstr(f->ctx.message, line) == NULL)
                fail_msg("%s: line %d is not named: %s", relative, (int)number, f->ctx.message);
        }
    }
    if (status == TP_OK) {
        tp_dataset_count(data, &counts);
        if (tp_json_i64(tp_json_get(row, "rows"), &number)) assert_int_equal(counts.rows_used, number);
        tp_dataset_close(data);
    }
    tp_ctx_clear(&f->ctx);
    ++*n;
}

static void test_recorded_files(void **state)
{
    fixture f;
    char path[4096];
    tp_json_doc *index;
    size_t n = 0;
    (void)state;
    fixture_begin(&f);
    f.options.max_length = f.options.max_positions = 1 << 24; /* one row has 5 MB */
    f.config.max_dropped = 0;
    assert_ok(&f.ctx, tp_json_read(&f.ctx, golden_path(path, sizeof path, "bad/index.json"), 1 << 22, &index));
    const tp_json *cases = tp_json_get(tp_json_root(index), "cases");
    for (size_t i = 0; i < tp_json_count(cases); i++) check_verdict(&f, tp_json_at(cases, i), &n);
    print_message("%zu recorded files\n", n);
    assert_true(n > 40);
    tp_json_free(index);
    fixture_end(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lines),       cmocka_unit_test(test_text_file_is_one_row),
        cmocka_unit_test(test_longest_row), cmocka_unit_test(test_other_files),
        cmocka_unit_test(test_gzip),        cmocka_unit_test(test_recorded_files),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
