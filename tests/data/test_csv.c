/* CSV: rows as Python's csv module reads them, wherever reads are split; a message with its place for everything that is no
 * CSV; and data sets that are the same whether their rows come as CSV or as JSONL. */
#include "tests/support.h"

#include <glob.h>
#include <unistd.h>
#include <zlib.h>

#include "base/json.h"
#include "data/rows.h"
#include "tests/data/dataset_support.h"
#include "tests/failing_memory.h"

/* ---- against Python (scripts/golden/make_golden_csv.py) ---- */

static void compare_row(const char *path, const tp_row_place *place, const tp_json_doc *doc, const tp_json *expected)
{
    const tp_json *row = tp_json_root(doc), *wanted = tp_json_get(expected, "row");
    int64_t line;
    assert_true(tp_json_i64(tp_json_get(expected, "line"), &line));
    if ((int64_t)place->line != line) fail_msg("%s: line %d, expected %d", path, (int)place->line, (int)line);
    assert_int_equal(tp_json_count(row), tp_json_count(wanted));
    for (size_t i = 0; i < tp_json_count(row); i++) {
        assert_true(tp_span_equal(tp_json_key_at(row, i), tp_json_key_at(wanted, i)));
        assert_int_equal(tp_json_type_of(tp_json_at(row, i)), TP_JSON_STRING);
        if (!tp_span_equal(tp_json_string(tp_json_at(row, i)), tp_json_string(tp_json_at(wanted, i))))
            fail_msg("%s: line %d, column %zu: the value differs", path, (int)line, i + 1);
        assert_ptr_equal(tp_json_get_span(row, tp_json_key_at(wanted, i)), tp_json_at(row, i));
    }
}

/* Reads the table in blocks of block_bytes beside what is expected of it. */
static size_t compare_table(tp_ctx *ctx, const char *path, size_t block_bytes)
{
    char expected_path[1024], *again;
    tp_row_file *file, *expected_file;
    tp_row_reader reader, expected_reader;
    tp_row_place place, expected_place;
    tp_json_doc *doc, *expected;
    bool found = true, expected_found;
    size_t n = 0;
    snprintf(expected_path, sizeof expected_path, "%.*s.jsonl", (int)(strlen(path) - 4), path);
    assert_ok(ctx, tp_row_file_open(ctx, path, "train", &file));
    assert_ok(ctx, tp_row_file_open(ctx, expected_path, "train", &expected_file));
    tp_row_reader_begin(&reader, file, block_bytes);
    tp_row_reader_begin(&expected_reader, expected_file, 0);
    for (;; n++) {
        assert_ok(ctx, tp_row_reader_next(ctx, &reader, &place, &found));
        assert_ok(ctx, tp_row_reader_next(ctx, &expected_reader, &expected_place, &expected_found));
        if (found != expected_found) fail_msg("%s: %zu rows, expected %s", path, n, found ? "fewer" : "more");
        if (!found) break;
        again = malloc(place.bytes);
        assert_ok(ctx, tp_row_file_read(ctx, file, place.offset, again, place.bytes));
        assert_ok(ctx, tp_row_file_parse(ctx, file, place.line, again, place.bytes, &doc));
        assert_ok(ctx, tp_json_parse(ctx, expected_place.text, expected_place.bytes, NULL, &expected));
        compare_row(path, &place, doc, tp_json_root(expected));
        tp_json_free(doc);
        tp_json_free(expected);
        free(again);
    }
    tp_row_reader_end(&reader);
    tp_row_reader_end(&expected_reader);
    tp_row_file_close(file);
    tp_row_file_close(expected_file);
    return n;
}

static void test_as_python_reads_it(void **state)
{
    static const size_t blocks[] = {0, 1, 2, 3, 7, 64};
    glob_t tables;
    tp_ctx ctx;
    size_t rows = 0;
    (void)state;
    tp_ctx_init(&ctx);
    assert_int_equal(glob("tests/data/csv/*.csv", 0, NULL, &tables), 0);
    for (size_t i = 0; i < tables.gl_pathc; i++)
        for (size_t k = 0; k < sizeof blocks / sizeof *blocks; k++) rows += compare_table(&ctx, tables.gl_pathv[i], blocks[k]);
    print_message("%zu tables, %zu rows\n", tables.gl_pathc, rows);
    assert_int_equal(tables.gl_pathc, 14);
    assert_true(rows > 6 * 300);
    globfree(&tables);
}

/* ---- what is no CSV ---- */

/* Reads a table to its end, or to what is wrong with it. */
static tp_status read_table(fixture *f, const char *name)
{
    tp_row_file *file;
    tp_row_reader reader;
    tp_row_place row;
    tp_json_doc *doc;
    bool found = true;
    TP_TRY(tp_row_file_open(&f->ctx, scratch_path(&f->dir, name), "train", &file));
    tp_row_reader_begin(&reader, file, 0);
    tp_status status = TP_OK;
    while (status == TP_OK && found) {
        status = tp_row_reader_next(&f->ctx, &reader, &row, &found);
        if (status != TP_OK || !found) break;
        status = tp_row_file_parse(&f->ctx, file, row.line, row.text, row.bytes, &doc);
        if (status == TP_OK) tp_json_free(doc);
    }
    tp_row_reader_end(&reader);
    tp_row_file_close(file);
    return status;
}

static void expect_refusal(fixture *f, const char *text, size_t n, const char *place, const char *what)
{
    char wanted[512];
    write_file(f, "a.csv", text, n);
    tp_status status = read_table(f, "a.csv");
    if (status != TP_FORMAT) fail_msg("\"%s\" is not refused with FORMAT: %s", text, f->ctx.message);
    snprintf(wanted, sizeof wanted, "/a.csv%s: %s", place, what);
    if (strstr(f->ctx.message, wanted) == NULL) fail_msg("\"%s\": \"%s\", expected %s", text, f->ctx.message, wanted);
    tp_ctx_clear(&f->ctx);
}

#define TEN       "\xC3\xA9\xC3\xA9\xC3\xA9\xC3\xA9\xC3\xA9\xC3\xA9\xC3\xA9\xC3\xA9\xC3\xA9\xC3\xA9"
#define CUT_NAME  "x" TEN TEN TEN "\xC3\xA9" /* 63 of 64 bytes */
#define LONG_NAME "x" TEN TEN TEN TEN

static void test_refusals(void **state)
{
    static const struct {
        const char *text, *place, *what;
    } cases[] = {
        {"a,b\n1,\"2\n3,4\n", ":2:3", "column 2 (\"b\"): no quote closes the field that this one opens"},
        {"a,b\n\"1\n\n\"\"2\",\"x\n", ":4:6", "column 2 (\"b\"): no quote closes"},
        {"a,\"b\n1,2\n", ":1:3", "column 2: no quote closes"},
        {"a,b\n1\n", ":2:2", "column 2 (\"b\"): no field; the header names 2 columns"},
        {"a,b\n\"x\ny\"\n", ":3:3", "column 2 (\"b\"): no field; the header names 2 columns"},
        {"a,b\n1,2,3\n", ":2:5", "column 3: a field more than the header's 2 columns"},
        {"a,b\n1,2,\n", ":2:5", "column 3: a field more"},
        {"a,b\n1,\"2\" ,3\n", ":2:6", "column 2 (\"b\"): text behind the quote that closes the field"},
        {"a,b\n\"1\"2,3\n", ":2:4", "column 1 (\"a\"): text behind the quote"},
        {"a,b\n\"1\"\r,3\n", ":2:4", "column 1 (\"a\"): text behind the quote"},
        {"a,\"b\"c\n", ":1:6", "column 2: text behind the quote"},
        {"a,b\n1,2\"\n", ":2:4", "column 2 (\"b\"): a quote in a field without quotes around it"},
        {"a,b\n1, \"2\"\n", ":2:4", "column 2 (\"b\"): a quote in a field without quotes around it"},
        {"{\"text\": \"a\"}\n", ":1:2", "column 1: a quote in a field without quotes around it"},
        {"a,b\n1,2\r3\n", ":2:4", "column 2 (\"b\"): a carriage return that ends no line"},
        {"a,b\r1,2\r", ":1:4", "column 2: a carriage return that ends no line"},
        {"a,b,a\n1,2,3\n", ":1:5", "column 3: the header gives it the name of column 1 again"},
        {"b,\"b\"\n", ":1:3", "column 2: the header gives it the name of column 1 again"},
        {"a,,c\n1,2,3\n", ":1:3", "column 2: the header names no column here"},
        {"a,b,\n", ":1:5", "column 3: the header names no column here"},
        {"\"\"\n", ":1:1", "column 1: the header names no column here"},
        {"a,b\n\xC3\xA9,\xC3\n", ":2:3", "column 2 (\"b\"): bytes that are not UTF-8"},
        {"a,b\n1,\"\xED\xA0\x80\"\n", ":2:4", "column 2 (\"b\"): bytes that are not UTF-8"},
        {"a,\xFF\n", ":1:3", "column 2: bytes that are not UTF-8"},
        {"\xFF\xFEt\n", ":1:1", "column 1: bytes that are not UTF-8"},                      /* UTF-16 */
        {"a\n\xEF\xBB\xBF\"1\"\n", ":2:2", "column 1 (\"a\"): a quote in a field without"}, /* a mark is for the file's begin */
        {"", "", "the file is empty; expected a header that names the columns"},
        {"\xEF\xBB\xBF", "", "the file is empty"},
        {"\n\r\n\n", "", "the file is empty"},
    };
    fixture f;
    (void)state;
    fixture_begin(&f);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        expect_refusal(&f, cases[i].text, strlen(cases[i].text), cases[i].place, cases[i].what);
    /* A long name is cut, and not within a character. */
    expect_refusal(&f, LONG_NAME "\n\"1\n", strlen(LONG_NAME "\n\"1\n"), ":2:1",
                   "column 1 (\"" CUT_NAME "\"): no quote closes");
    expect_refusal(&f, "a,b\n1,x\0y\n", 10, ":2:4", "column 2 (\"b\"): a NUL byte");
    expect_refusal(&f, "a,b\n1,\"\0\"\n", 10, ":2:4", "column 2 (\"b\"): a NUL byte");
    expect_refusal(&f, "\0a,b\n", 5, ":1:1", "column 1: a NUL byte");
    fixture_end(&f);
}

/* A row that is too long by one byte, and one with a quote that the rest of the file is taken into. Holes stand for its bytes.
 */
static void test_longest_row(void **state)
{
    static const char *const heads[] = {"a\nx", "a\n\"x"};
    fixture f;
    (void)state;
    fixture_begin(&f);
    for (size_t i = 0; i < 2; i++) {
        const char *note = i == 0 ? "longer than 64 MiB" : "longer than 64 MiB, or a quote in it is not closed";
        write_file(&f, "a.csv", heads[i], strlen(heads[i]));
        for (int over = -1; over <= 1; over++) {
            assert_int_equal(truncate(scratch_path(&f.dir, "a.csv"), 2 + (off_t)TP_ROW_MAX_BYTES + over), 0);
            assert_int_equal(read_table(&f, "a.csv"), TP_FORMAT); /* within the length it is the holes that are wrong */
            assert_non_null(strstr(f.ctx.message, "/a.csv:2:"));
            const char *what = over > 0 ? note : i == 0 ? "a NUL byte" : "no quote closes";
            if (strstr(f.ctx.message, what) == NULL) fail_msg("%s, expected %s", f.ctx.message, what);
            tp_ctx_clear(&f.ctx);
        }
    }
    fixture_end(&f);
}

static void test_most_columns(void **state)
{
    fixture f;
    tp_buf text;
    (void)state;
    fixture_begin(&f);
    tp_buf_init(&text, 0);
    for (size_t n = TP_CSV_MAX_COLUMNS - 1; n <= TP_CSV_MAX_COLUMNS + 1; n++) {
        tp_buf_clear(&text);
        for (size_t i = 0; i < n; i++) tp_buf_printf(&text, "%sc%zu", i > 0 ? "," : "", i);
        tp_buf_char(&text, '\n');
        for (size_t i = 1; i < n; i++) tp_buf_char(&text, ',');
        tp_buf_char(&text, '\n');
        write_file(&f, "a.csv", text.data, text.len);
        if (n <= TP_CSV_MAX_COLUMNS)
            assert_ok(&f.ctx, read_table(&f, "a.csv"));
        else
            expect_refusal(&f, text.data, text.len, ":1:23467", "column 4097: more than 4096 columns");
    }
    tp_buf_free(&text);
    fixture_end(&f);
}

/* ---- files ---- */

static void test_packed_and_in_folders(void **state)
{
    fixture f;
    (void)state;
    fixture_begin(&f);
    gzFile packed = gzopen(scratch_path(&f.dir, "train.csv.gz"), "wb");
    assert_int_equal(gzputs(packed, "a,b\n1,\"2\n3\"\n"), 12);
    assert_int_equal(gzclose(packed), Z_OK);
    assert_ok(&f.ctx, read_table(&f, "train.csv.gz"));
    assert_ok(&f.ctx, read_table(&f, ""));
    write_file(&f, "train.csv", "a,b\n1\n", 6); /* goes before the packed one */
    assert_status(&f.ctx, TP_FORMAT, read_table(&f, ""));
    write_file(&f, "train.jsonl", "{}\n", 3);
    assert_ok(&f.ctx, read_table(&f, ""));
    fixture_end(&f);
}

/* ---- data sets ---- */

/* The same batches, in training's order, from rows written both ways; `columns` renames in both. */
static void expect_same_batches(fixture *f, const char *csv, const char *jsonl)
{
    tp_dataset *a, *b;
    tp_host_batch left = {0}, right = {0};
    char path[1024];
    write_file(f, "rows.csv", csv, strlen(csv));
    snprintf(path, sizeof path, "%s", f->dir.path);
    write_rows(f, jsonl);
    assert_ok(&f->ctx, tp_dataset_open(&f->ctx, &f->options, &a));
    f->blocks[0].path = path;
    assert_ok(&f->ctx, tp_dataset_open(&f->ctx, &f->options, &b));
    f->blocks[0].path = f->path;
    assert_int_equal(tp_dataset_micro_batches(a), tp_dataset_micro_batches(b));
    for (int64_t i = 0; i < 3 * tp_dataset_micro_batches(a); i++) {
        int64_t epoch = i / tp_dataset_micro_batches(a), number = i % tp_dataset_micro_batches(a);
        assert_ok(&f->ctx, tp_dataset_get(&f->ctx, a, epoch, number, &left));
        assert_ok(&f->ctx, tp_dataset_get(&f->ctx, b, epoch, number, &right));
        assert_int_equal(left.n, right.n);
        assert_int_equal(left.n_labels, right.n_labels);
        assert_memory_equal(left.ids, right.ids, (size_t)left.n * sizeof *left.ids);
        assert_memory_equal(left.labels, right.labels, (size_t)left.n_labels * sizeof *left.labels);
    }
    assert_ok(&f->ctx, tp_dataset_check(&f->ctx, b));
    tp_host_batch_free(&left);
    tp_host_batch_free(&right);
    tp_dataset_close(a);
    tp_dataset_close(b);
}

static void test_same_batches(void **state)
{
    static const tp_string_entry names[] = {{"instruction", "question, asked"}, {"output", "answer"}};
    fixture f;
    (void)state;
    fixture_begin(&f);
    expect_same_batches(&f, "text\none\n\"two, \"\"three\"\"\n\"\nfour\r\n",
                        "{\"text\": \"one\"}\n{\"text\": \"two, \\\"three\\\"\\n\"}\n{\"text\": \"four\"}\n");
    expect_same_batches(&f, "id,prompt,completion\n1,a,\" b,c\"\n2,d, e\n3,,f\n",
                        "{\"prompt\": \"a\", \"completion\": \" b,c\"}\n{\"prompt\": \"d\", \"completion\": \" e\"}\n"
                        "{\"prompt\": \"\", \"completion\": \"f\"}\n");
    expect_same_batches(&f, "instruction,input,output,system\r\nadd,1 2,3,\r\nsay,,b c,be brief\r\n",
                        "{\"instruction\": \"add\", \"input\": \"1 2\", \"output\": \"3\"}\n"
                        "{\"instruction\": \"say\", \"output\": \"b c\", \"system\": \"be brief\"}\n");
    f.blocks[0].columns = (tp_string_map){names, 2};
    expect_same_batches(&f, "answer,\"question, asked\"\nb,a\nd,c\n",
                        "{\"question, asked\": \"a\", \"answer\": \"b\"}\n{\"question, asked\": \"c\", \"answer\": \"d\"}\n");
    f.blocks[0].columns = (tp_string_map){0};
    f.config.packing = true;
    expect_same_batches(&f, "text\na b\nc\nd e f\ng\n",
                        "{\"text\": \"a b\"}\n{\"text\": \"c\"}\n{\"text\": \"d e f\"}\n{\"text\": \"g\"}\n");
    fixture_end(&f);
}

static tp_status open_table(fixture *f, const char *csv, tp_dataset **data)
{
    snprintf(f->path, sizeof f->path, "%s/rows.csv", f->dir.folder);
    write_file(f, "rows.csv", csv, strlen(csv));
    return tp_dataset_open(&f->ctx, &f->options, data);
}

static void refuse(fixture *f, const char *csv, const char *message)
{
    tp_dataset *data;
    assert_int_equal(open_table(f, csv, &data), TP_FORMAT);
    if (strstr(f->ctx.message, message) == NULL) fail_msg("\"%s\", expected %s", f->ctx.message, message);
    tp_ctx_clear(&f->ctx);
}

static void test_rows_that_do_not_fit(void **state)
{
    fixture f;
    tp_dataset *data;
    tp_dataset_counts counts;
    (void)state;
    fixture_begin(&f);
    refuse(&f, "text\n", "rows.csv: the file holds no row");
    refuse(&f, "question,answer\na,b\n",
           "rows.csv:2:1: expected columns messages; instruction and output; prompt and completion; "
           "or text, found question, answer (`columns: {ours: theirs}` renames them)");
    refuse(&f, "id,messages\n1,\"[{\"\"role\"\": \"\"user\"\"}]\"\n", "rows.csv:2:3: messages: ");
    f.config.on_bad_row = TP_BAD_ROW_SKIP;
    assert_ok(&f.ctx, open_table(&f, "text,x\na b,\nc\nd,e,f\n\"g\"h,\ni\"j,\nk,\n\"l\nm\",\n", &data));
    tp_dataset_count(data, &counts);
    assert_int_equal(counts.rows_read, 7);
    assert_int_equal(counts.rows_bad, 4); /* c; d,e,f; "g"h; i"j */
    assert_int_equal(counts.rows_used, 3);
    tp_dataset_close(data);
    refuse(&f, "text,x\na b,\nc,\"d\ne,f\n", "rows.csv:3:3: column 2 (\"x\"): no quote closes"); /* who knows how many rows */
    fixture_end(&f);
}

/* ---- memory ---- */

static tp_status open_and_use(fixture *f)
{
    tp_dataset *data;
    tp_host_batch batch = {0};
    TP_TRY(tp_dataset_open(&f->ctx, &f->options, &data));
    tp_status status = tp_dataset_get(&f->ctx, data, 0, 0, &batch);
    tp_host_batch_free(&batch);
    tp_dataset_close(data);
    return status;
}

static void test_every_allocation_may_fail(void **state)
{
    static const char table[] = "\xEF\xBB\xBF\"prompt\",completion,\"c\"\"\",d,e,f,g,h,i,j,k,l,m,n,o,p,q,r\n"
                                "a,\"b \"\"c\"\"\n\",,,,,,,,,,,,,,,,\n\nd,e,,,,,,,,,,,,,,,,\n";
    fixture f;
    tp_dataset *data;
    (void)state;
    fixture_begin(&f);
    assert_ok(&f.ctx, open_table(&f, table, &data));
    tp_dataset_close(data);
    assert_survives_failing_memory(&f.ctx, open_and_use(&f));
    fixture_end(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_as_python_reads_it),    cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_longest_row),           cmocka_unit_test(test_most_columns),
        cmocka_unit_test(test_packed_and_in_folders), cmocka_unit_test(test_same_batches),
        cmocka_unit_test(test_rows_that_do_not_fit),  cmocka_unit_test(test_every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
