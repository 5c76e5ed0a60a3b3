/* The token cache: what it holds against ids that the tokenizers library computed, runs with and without it batch for batch,
 * damage of every kind, what makes a new one and what does not, and everything that can go wrong with the disk. */
#include "tests/support.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/json.h"
#include "base/log.h"
#include "data/rows.h"
#include "tests/data/dataset_support.h"
#include "tests/failing_memory.h"

/* ---- the fixture with a cache, and what it says ---- */

typedef struct cached {
    fixture f;
    char folder[600], said[8192];
    tp_log log;
} cached;

static void hear(tp_log_level level, const char *text, void *user)
{
    cached *c = user;
    size_t n = strlen(c->said);
    snprintf(c->said + n, sizeof c->said - n, "%s%s\n", level >= TP_LOG_WARN ? "warning: " : "", text);
}

static void cached_begin(cached *c)
{
    fixture_begin(&c->f);
    snprintf(c->folder, sizeof c->folder, "%s/cache", c->f.dir.folder);
    c->said[0] = '\0';
    c->log = (tp_log){TP_LOG_INFO, hear, c};
    c->f.ctx.log = &c->log;
    c->f.config.cache_dir = c->folder;
    c->f.config.max_dropped = 1;
    c->f.options.keeps_tokens = true;
}

static bool says(const cached *c, const char *text)
{
    return strstr(c->said, text) != NULL;
}

static tp_dataset *open_and_hear(cached *c)
{
    c->said[0] = '\0';
    return open_rows(&c->f);
}

/* Path of the one entry of the cache (several: fails), or of a file in it. */
static const char *entry_path(cached *c, const char *file)
{
    static char path[2048];
    size_t n = 0;
    DIR *dir = opendir(c->folder);
    assert_non_null(dir);
    for (struct dirent *e; (e = readdir(dir)) != NULL;) {
        if (e->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "%s/%s%s%s", c->folder, e->d_name, file != NULL ? "/" : "", file != NULL ? file : "");
        n++;
    }
    closedir(dir);
    assert_int_equal(n, 1);
    return path;
}

static size_t count_entries(const cached *c)
{
    size_t n = 0;
    DIR *dir = opendir(c->folder);
    if (dir == NULL) return 0;
    for (struct dirent *e; (e = readdir(dir)) != NULL;) n += e->d_name[0] != '.';
    closedir(dir);
    return n;
}

static uint32_t *read_words(cached *c, size_t *n)
{
    char *bytes;
    assert_ok(&c->f.ctx, tp_file_read(&c->f.ctx, entry_path(c, "tokens.bin"), 1 << 24, &bytes, n));
    assert_int_equal(*n % 4, 0);
    *n /= 4;
    uint32_t *words = malloc((*n + 1) * sizeof *words);
    assert_non_null(words);
    memcpy(words, bytes, *n * sizeof *words);
    tp_free(bytes);
    return words;
}

/* ---- against the tokenizers library ---- */

static void put_ids(const tp_json *list, uint32_t *out, size_t *n)
{
    for (size_t i = 0; i < tp_json_count(list); i++) {
        int64_t id;
        assert_true(tp_json_i64(tp_json_at(list, i), &id));
        out[(*n)++] = (uint32_t)id;
    }
}

/* Every case as a row; `out` gets what tokens.bin has to hold: rows of two tokens and more, learned but for their first. */
static size_t write_cases(cached *c, const tp_json *root, uint32_t *out, size_t most)
{
    const tp_json *cases = tp_json_get(root, "cases");
    tp_buf rows;
    size_t n = 0;
    tp_buf_init(&rows, 0);
    for (size_t i = 0; i < tp_json_count(cases); i++) {
        const tp_json *item = tp_json_at(cases, i);
        tp_span text = tp_json_string(tp_json_get(item, "text"));
        size_t first = n;
        tp_buf_text(&rows, "{\"text\": ");
        tp_json_write_string(&rows, text.data, text.len);
        tp_buf_text(&rows, "}\n");
        assert_true(n + tp_json_count(tp_json_get(item, "ids")) + 16 < most);
        if (tp_json_get(item, "ids_special") != NULL) {
            put_ids(tp_json_get(item, "ids_special"), out, &n);
        } else {
            put_ids(tp_json_get(root, "before"), out, &n);
            put_ids(tp_json_get(item, "ids"), out, &n);
            put_ids(tp_json_get(root, "after"), out, &n);
        }
        if (n - first < 2 || (int64_t)(n - first) > c->f.options.max_length) n = first;
        for (size_t k = first + 1; k < n; k++) out[k] |= 0x80000000u;
    }
    write_file(&c->f, "rows.jsonl", rows.data, rows.len);
    tp_buf_free(&rows);
    return n;
}

static void check_tokenizer(const char *name)
{
    enum { MOST = 1 << 20 };
    cached c;
    char path[4096], relative[128];
    tp_json_doc *doc;
    size_t n;
    uint32_t *expected = malloc(MOST * sizeof *expected);
    assert_non_null(expected);
    cached_begin(&c);
    tp_tokenizer_free(c.f.tokenizer);
    snprintf(relative, sizeof relative, "tokenizers/%s", name);
    assert_ok(&c.f.ctx, tp_tokenizer_open(&c.f.ctx, golden_path(path, sizeof path, relative), &c.f.tokenizer));
    c.f.options.tokenizer = c.f.tokenizer;
    c.f.options.vocab_size = (int64_t)tp_tokenizer_size(c.f.tokenizer);
    c.f.options.held_out = true; /* these tokenizers name no eos that could be trained */
    c.f.config.test_datasets = (tp_datasets){&c.f.test_block, 1};
    snprintf(relative, sizeof relative, "tokenizers/%s/cases.json", name);
    assert_ok(&c.f.ctx, tp_json_read(&c.f.ctx, golden_path(path, sizeof path, relative), 1 << 26, &doc));
    size_t n_expected = write_cases(&c, tp_json_root(doc), expected, MOST);
    tp_dataset_close(open_and_hear(&c));
    uint32_t *words = read_words(&c, &n);
    assert_int_equal(n, n_expected);
    for (size_t i = 0; i < n; i++)
        if (words[i] != expected[i]) fail_msg("%s: word %zu: %08x, expected %08x", name, i, words[i], expected[i]);
    print_message("%s: %zu tokens\n", name, n);
    free(words);
    free(expected);
    tp_json_free(doc);
    fixture_end(&c.f);
}

static void test_golden_ids(void **state)
{
    (void)state;
    check_tokenizer("gpt2");
    check_tokenizer("llama3");
    check_tokenizer("qwen2");
    check_tokenizer("mistral");
}

/* ---- with and without ---- */

static void assert_same_data(fixture *f, const tp_dataset *a, const tp_dataset *b)
{
    tp_dataset_counts left, right;
    tp_host_batch x = {0}, y = {0};
    int64_t m[2][4];
    tp_dataset_count(a, &left);
    tp_dataset_count(b, &right);
    assert_memory_equal(&left, &right, sizeof left);
    tp_dataset_largest(a, &m[0][0], &m[0][1], &m[0][2], &m[0][3]);
    tp_dataset_largest(b, &m[1][0], &m[1][1], &m[1][2], &m[1][3]);
    assert_memory_equal(m[0], m[1], sizeof m[0]);
    assert_string_equal(tp_dataset_fingerprint(a), tp_dataset_fingerprint(b));
    assert_int_equal(tp_dataset_micro_batches(a), tp_dataset_micro_batches(b));
    for (int64_t epoch = 0; epoch < 2; epoch++)
        for (int64_t i = 0; i < tp_dataset_micro_batches(a); i++) {
            assert_ok(&f->ctx, tp_dataset_get(&f->ctx, a, epoch, i, &x));
            assert_ok(&f->ctx, tp_dataset_get(&f->ctx, b, epoch, i, &y));
            assert_true(x.n == y.n && x.n_labels == y.n_labels && x.n_segments == y.n_segments && x.n_tokens == y.n_tokens);
            assert_memory_equal(x.ids, y.ids, (size_t)x.n * sizeof *x.ids);
            assert_memory_equal(x.positions, y.positions, (size_t)x.n * sizeof *x.ids);
            assert_memory_equal(x.labels, y.labels, (size_t)x.n_labels * sizeof *x.ids);
            assert_memory_equal(x.label_rows, y.label_rows, (size_t)x.n_labels * sizeof *x.ids);
        }
    tp_host_batch_free(&x);
    tp_host_batch_free(&y);
}

static void assert_same_preview(fixture *f, const tp_dataset *a, const tp_dataset *b, int64_t row)
{
    tp_preview p, q;
    assert_ok(&f->ctx, tp_dataset_preview(&f->ctx, a, row, &p));
    assert_ok(&f->ctx, tp_dataset_preview(&f->ctx, b, row, &q));
    assert_string_equal(tp_buf_cstr(&p.text), tp_buf_cstr(&q.text));
    assert_int_equal(p.tokens.count, q.tokens.count);
    assert_memory_equal(p.labels, q.labels, p.tokens.count * sizeof *p.labels);
    tp_preview_free(&p);
    tp_preview_free(&q);
}

/* The rows as they are now: without a cache, while one is made, and from it. */
static void check_equal(cached *c)
{
    c->f.config.cache_dir = NULL;
    tp_dataset *plain = open_and_hear(c);
    c->f.config.cache_dir = c->folder;
    tp_dataset *first = open_and_hear(c);
    assert_true(says(c, "are kept in"));
    tp_dataset *second = open_and_hear(c);
    assert_true(says(c, "come from"));
    assert_same_data(&c->f, plain, first);
    assert_same_data(&c->f, plain, second);
    assert_same_preview(&c->f, plain, second, 0);
    tp_dataset_close(plain);
    tp_dataset_close(first);
    tp_dataset_close(second);
}

#define CHAT(a, b)                                                                                                             \
    "{\"messages\": [{\"role\": \"user\", \"content\": \"" a "\"}, {\"role\": \"assistant\", \"content\": \"" b "\"}]}\n"

static void test_equal(void **state)
{
    cached c;
    (void)state;
    cached_begin(&c);
    write_pairs(&c.f, 60);
    check_equal(&c);
    c.f.blocks[0].weight = 2.25;
    c.f.config.packing = true;
    check_equal(&c);
    c.f.config.packing = false;
    c.f.options.max_length = 20; /* long rows are dropped */
    check_equal(&c);
    c.f.config.excess_length = TP_EXCESS_TRUNCATE;
    check_equal(&c);
    c.f.config.val_set_size = (tp_share){.fraction = 0.3};
    check_equal(&c);
    c.f.options.held_out = true;
    check_equal(&c);
    c.f.options.held_out = false;
    c.f.config.val_set_size = (tp_share){0};
    c.f.blocks[0].weight = 1;
    write_rows(&c.f, CHAT("a", "b") CHAT("c d", "e f g") CHAT("h", "i"));
    check_equal(&c);
    /* Bad rows in front of the one that says how all are read, and a row of which a part had been taken already. */
    c.f.config.on_bad_row = TP_BAD_ROW_SKIP;
    c.f.config.excess_length = TP_EXCESS_SPLIT;
    write_rows(&c.f, "{broken\n{\"text\": \"one two three four five six seven eight nine ten eleven twelve thirteen\"}\n"
                     "{\"text\": 3}\n{\"text\": \"more of it\"}\n");
    check_equal(&c);
    fixture_end(&c.f);
}

/* Plain text, parts of one row. */
static void test_equal_text(void **state)
{
    cached c;
    tp_buf text;
    (void)state;
    cached_begin(&c);
    tp_buf_init(&text, 0);
    for (int i = 0; i < 3000; i++) tp_buf_printf(&text, "%d%s", i * 7919, i % 9 == 0 ? "\n" : " ");
    write_file(&c.f, "rows.txt", text.data, text.len);
    tp_buf_free(&text);
    snprintf(c.f.path, sizeof c.f.path, "%s/rows.txt", c.f.dir.folder);
    c.f.config.excess_length = TP_EXCESS_SPLIT;
    c.f.options.max_length = 33;
    check_equal(&c);
    fixture_end(&c.f);
}

/* A file that holds no row of this side: nothing says how its rows are read. */
static void test_file_without_rows(void **state)
{
    cached c;
    char other[1100];
    (void)state;
    cached_begin(&c);
    write_pairs(&c.f, 40);
    snprintf(other, sizeof other, "%s/other.jsonl", c.f.dir.folder);
    write_file(&c.f, "other.jsonl", CHAT("a", "b"), strlen(CHAT("a", "b")));
    c.f.blocks[1].path = other;
    c.f.config.datasets = (tp_datasets){c.f.blocks, 2};
    c.f.config.val_set_size = (tp_share){.rows = 1};
    c.f.options.held_out = true; /* one row: one of the files has none */
    check_equal(&c);
    fixture_end(&c.f);
}

/* ---- it is the cache that is read ---- */

/* Rewrites a file of the entry and makes the manifest agree. */
static void forge(cached *c, const char *name, size_t at, uint32_t value)
{
    char path[2048], manifest_path[2048], *text, *bytes, old[65], hex[65];
    size_t n, n_text;
    snprintf(path, sizeof path, "%s", entry_path(c, name));
    snprintf(manifest_path, sizeof manifest_path, "%s", entry_path(c, "manifest.json"));
    assert_ok(&c->f.ctx, tp_file_read(&c->f.ctx, path, 1 << 24, &bytes, &n));
    assert_true(at + 4 <= n);
    tp_sha256_hex(bytes, n, old);
    memcpy(bytes + at, &value, 4);
    tp_sha256_hex(bytes, n, hex);
    assert_ok(&c->f.ctx, tp_file_write(&c->f.ctx, path, bytes, n));
    assert_ok(&c->f.ctx, tp_file_read(&c->f.ctx, manifest_path, 1 << 20, &text, &n_text));
    char *place = strstr(text, old);
    assert_non_null(place);
    memcpy(place, hex, 64);
    assert_ok(&c->f.ctx, tp_file_write(&c->f.ctx, manifest_path, text, n_text));
    tp_free(bytes);
    tp_free(text);
}

static void test_is_read(void **state)
{
    cached c;
    tp_host_batch batch = {0};
    (void)state;
    cached_begin(&c);
    c.f.config.shuffle = false;
    write_rows(&c.f, "{\"text\": \"some text\"}\n{\"text\": \"more\"}\n");
    tp_dataset_close(open_and_hear(&c));
    forge(&c, "tokens.bin", 0, 77);
    tp_dataset *data = open_and_hear(&c);
    assert_true(says(&c, "come from"));
    assert_ok(&c.f.ctx, tp_dataset_get(&c.f.ctx, data, 0, 0, &batch));
    assert_int_equal(batch.ids[0], 77);
    tp_dataset_close(data);
    tp_host_batch_free(&batch);
    fixture_end(&c.f);
}

/* ---- damage ---- */

static void cut_short(cached *c, const char *name, off_t by)
{
    struct stat info;
    const char *path = entry_path(c, name);
    assert_int_equal(stat(path, &info), 0);
    assert_int_equal(truncate(path, info.st_size - by), 0);
}

static void flip(cached *c, const char *name, long at)
{
    FILE *file = fopen(entry_path(c, name), "r+b");
    assert_non_null(file);
    assert_int_equal(fseek(file, at, SEEK_SET), 0);
    int byte = fgetc(file);
    assert_int_equal(fseek(file, at, SEEK_SET), 0);
    assert_true(fputc(byte ^ 1, file) != EOF);
    fclose(file);
}

enum { DAMAGES = 12 };

/* Rows of 40 bytes stand behind one source of 16; file, tokens and labels are their words 4, 7 and 8; then the draws. */
static void damage(cached *c, int kind, size_t n_rows)
{
    switch (kind) {
    case 0: cut_short(c, "tokens.bin", 4); return;
    case 1: cut_short(c, "rows.bin", 1); return;
    case 2: flip(c, "tokens.bin", 9); return;
    case 3: flip(c, "rows.bin", 20); return;
    case 4: assert_int_equal(unlink(entry_path(c, "manifest.json")), 0); return;
    case 5: assert_int_equal(unlink(entry_path(c, "tokens.bin")), 0); return;
    case 6: flip(c, "manifest.json", 1); return;
    case 7: forge(c, "rows.bin", 16 + 16, 9); return;                 /* a file that is not there */
    case 8: forge(c, "rows.bin", 16 + 28, 1000000); return;           /* more tokens than are there */
    case 9: forge(c, "rows.bin", 16 + 32, 1000000); return;           /* more labels than tokens */
    case 10: forge(c, "rows.bin", 16 + 40 * n_rows, 1000000); return; /* a draw of no row */
    default: forge(c, "rows.bin", 8, (uint32_t)TP_ROW_MAX_BYTES + 1); /* a first row that is too long */
    }
}

static void test_damage(void **state)
{
    cached c;
    (void)state;
    cached_begin(&c);
    write_pairs(&c.f, 30);
    c.f.config.cache_dir = NULL;
    tp_dataset *plain = open_and_hear(&c);
    c.f.config.cache_dir = c.folder;
    tp_dataset_close(open_and_hear(&c));
    for (int kind = 0; kind < DAMAGES; kind++) {
        damage(&c, kind, 30);
        c.f.options.keeps_tokens = false;
        tp_dataset *data = open_and_hear(&c);
        if (!says(&c, "the token cache is not used")) fail_msg("damage %d: %s", kind, c.said);
        assert_same_data(&c.f, plain, data);
        tp_dataset_close(data);
        c.f.options.keeps_tokens = true;
        data = open_and_hear(&c);
        if (!says(&c, "the token cache is made again") || !says(&c, "are kept in")) fail_msg("damage %d: %s", kind, c.said);
        assert_same_data(&c.f, plain, data);
        tp_dataset_close(data);
        tp_dataset_close(open_and_hear(&c));
        if (!says(&c, "come from")) fail_msg("damage %d: %s", kind, c.said);
        assert_int_equal(count_entries(&c), 1);
    }
    tp_dataset_close(plain);
    fixture_end(&c.f);
}

/* A whole folder, but of other rows, under the name that is looked for. */
static void test_foreign(void **state)
{
    cached c;
    char name[2048], aside[2100];
    (void)state;
    cached_begin(&c);
    write_pairs(&c.f, 30);
    tp_dataset_close(open_and_hear(&c));
    snprintf(name, sizeof name, "%s", entry_path(&c, NULL));
    snprintf(aside, sizeof aside, "%s/aside", c.f.dir.folder);
    assert_int_equal(rename(name, aside), 0);
    write_pairs(&c.f, 31);
    tp_dataset_close(open_and_hear(&c));
    snprintf(name, sizeof name, "%s", entry_path(&c, NULL));
    assert_ok(&c.f.ctx, tp_folder_remove(&c.f.ctx, name));
    assert_int_equal(rename(aside, name), 0);
    tp_dataset *data = open_and_hear(&c);
    assert_true(says(&c, "made from something else"));
    assert_true(says(&c, "made again"));
    tp_dataset_counts counts;
    tp_dataset_count(data, &counts);
    assert_int_equal(counts.rows_read, 31);
    tp_dataset_close(data);
    fixture_end(&c.f);
}

/* Cut while it is in use: the rows come from the text. */
static void test_lost_in_use(void **state)
{
    cached c;
    (void)state;
    cached_begin(&c);
    write_pairs(&c.f, 30);
    c.f.config.cache_dir = NULL;
    tp_dataset *plain = open_and_hear(&c);
    c.f.config.cache_dir = c.folder;
    tp_dataset *data = open_and_hear(&c);
    assert_int_equal(truncate(entry_path(&c, "tokens.bin"), 16), 0);
    assert_same_data(&c.f, plain, data);
    assert_true(says(&c, "warning: cache_dir:"));
    tp_dataset_close(plain);
    tp_dataset_close(data);
    fixture_end(&c.f);
}

/* ---- what the key depends on ---- */

static void expect_new(cached *c, bool is_new, const char *what)
{
    size_t before = count_entries(c);
    tp_dataset_close(open_and_hear(c));
    if (count_entries(c) != before + is_new || says(c, is_new ? "come from" : "are kept in")) fail_msg("%s: %s", what, c->said);
}

static void test_key(void **state)
{
    static const tp_string_entry columns[] = {{"prompt", "prompt"}};
    cached c;
    struct stat info;
    (void)state;
    cached_begin(&c);
    write_pairs(&c.f, 30);
    expect_new(&c, true, "first");
    expect_new(&c, false, "again");
    c.f.options.seed = 8;
    c.f.options.micro_batch_size = 3;
    c.f.config.packing = c.f.config.group_by_length = true;
    c.f.config.shuffle = false;
    c.f.config.max_dropped = 0.9;
    expect_new(&c, false, "order");
    c.f.options.max_length = 40;
    expect_new(&c, true, "max_length");
    c.f.config.train_on_inputs = true;
    expect_new(&c, true, "train_on_inputs");
    c.f.config.train_on_turns = TP_TURNS_LAST;
    expect_new(&c, true, "train_on_turns");
    c.f.config.excess_length = TP_EXCESS_TRUNCATE;
    expect_new(&c, true, "excess_length_strategy");
    c.f.config.on_bad_row = TP_BAD_ROW_SKIP;
    expect_new(&c, true, "on_bad_row");
    c.f.config.chat_template = "chatml";
    expect_new(&c, true, "chat_template");
    c.f.blocks[0].system = "S";
    expect_new(&c, true, "system");
    c.f.blocks[0].limit = 29;
    expect_new(&c, true, "limit");
    c.f.blocks[0].weight = 2;
    expect_new(&c, true, "weight");
    c.f.blocks[0].type = TP_DATASET_COMPLETION;
    expect_new(&c, true, "type");
    c.f.blocks[0].columns = (tp_string_map){columns, 1};
    expect_new(&c, true, "columns");
    c.f.config.val_set_size = (tp_share){.rows = 3};
    expect_new(&c, true, "val_set_size");
    c.f.options.held_out = true;
    expect_new(&c, true, "held out");
    c.f.options.vocab_size += 64;
    expect_new(&c, true, "embedding");
    open_tokenizer(&c.f, "{\"eos_token\": \"</s>\", \"bos_token\": \"<s>\"}");
    expect_new(&c, true, "tokenizer_config.json");
    /* A byte in the middle, size and time as they were. */
    assert_int_equal(stat(c.f.path, &info), 0);
    FILE *file = fopen(c.f.path, "r+b");
    assert_non_null(file);
    assert_int_equal(fseek(file, 15, SEEK_SET), 0);
    assert_true(fputc('9', file) != EOF);
    fclose(file);
    struct timespec times[2] = {info.st_atim, info.st_mtim};
    assert_int_equal(utimensat(AT_FDCWD, c.f.path, times, 0), 0);
    expect_new(&c, true, "data");
    expect_new(&c, false, "at last");
    fixture_end(&c.f);
}

/* ---- the disk ---- */

static void test_only_read(void **state)
{
    cached c;
    (void)state;
    cached_begin(&c);
    write_pairs(&c.f, 30);
    c.f.options.keeps_tokens = false;
    tp_dataset_close(open_and_hear(&c));
    assert_string_equal(c.said, "");
    assert_false(tp_path_exists(c.folder));
    fixture_end(&c.f);
}

/* A folder that cannot be made, and a disk that fills up at once, while rows are read, and with the last of them: a warning,
 * the same batches, nothing left behind. */
static void test_no_room(void **state)
{
    static const rlim_t sizes[] = {0, 3000, 70000, 100000};
    cached c;
    struct rlimit before, now;
    (void)state;
    cached_begin(&c);
    write_pairs(&c.f, 3000);
    c.f.config.cache_dir = NULL;
    tp_dataset *plain = open_and_hear(&c), *data;
    c.f.config.cache_dir = c.f.path; /* a file */
    data = open_and_hear(&c);
    assert_true(says(&c, "warning: cache_dir:"));
    assert_same_data(&c.f, plain, data);
    tp_dataset_close(data);
    c.f.config.cache_dir = c.folder;
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        now = (struct rlimit){sizes[i], before.rlim_max};
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &now), 0);
        data = open_and_hear(&c);
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
        if (!says(&c, "warning: cache_dir:")) fail_msg("%d bytes: %s", (int)sizes[i], c.said);
        assert_same_data(&c.f, plain, data);
        tp_dataset_close(data);
        assert_int_equal(count_entries(&c), 0);
    }
    data = open_and_hear(&c);
    assert_true(says(&c, "are kept in"));
    tp_dataset_close(data);
    tp_dataset_close(plain);
    fixture_end(&c.f);
}

/* Several processes make the same one at once, again and again. */
static void test_at_once(void **state)
{
    enum { PROCESSES = 4, ROUNDS = 3 };
    cached c;
    pid_t pids[PROCESSES];
    (void)state;
    cached_begin(&c);
    write_pairs(&c.f, 50);
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < PROCESSES; i++) {
            pids[i] = fork();
            assert_true(pids[i] >= 0);
            if (pids[i] > 0) continue;
            tp_dataset *data;
            tp_host_batch batch = {0};
            bool good = tp_dataset_open(&c.f.ctx, &c.f.options, &data) == TP_OK;
            for (int64_t k = 0; good && k < tp_dataset_micro_batches(data); k++)
                good = tp_dataset_get(&c.f.ctx, data, 0, k, &batch) == TP_OK;
            _exit(good && !says(&c, "warning") ? 0 : 1);
        }
        for (int i = 0; i < PROCESSES; i++) {
            int status;
            assert_int_equal(waitpid(pids[i], &status, 0), pids[i]);
            assert_int_equal(status, 0);
        }
        assert_ok(&c.f.ctx, tp_publish_verify(&c.f.ctx, entry_path(&c, NULL), NULL));
        tp_dataset_close(open_and_hear(&c));
        assert_true(says(&c, "come from"));
        if (round % 2 == 0)
            assert_ok(&c.f.ctx, tp_folder_remove(&c.f.ctx, c.folder));
        else
            flip(&c, "tokens.bin", 3);
    }
    fixture_end(&c.f);
}

/* ---- memory ---- */

static tp_status open_and_use(cached *c, bool fresh)
{
    fixture *f = &c->f;
    tp_dataset *data;
    tp_host_batch batch = {0};
    if (fresh && tp_path_exists(c->folder) && tp_folder_remove(NULL, c->folder) != TP_OK) return TP_NOMEM;
    TP_TRY(tp_dataset_open(&f->ctx, &f->options, &data));
    tp_status status = tp_dataset_get(&f->ctx, data, 0, 0, &batch);
    tp_host_batch_free(&batch);
    tp_dataset_close(data);
    return status;
}

static void test_memory(void **state)
{
    cached c;
    (void)state;
    cached_begin(&c);
    c.f.ctx.log = NULL;
    write_rows(&c.f, CHAT("a", "b") CHAT("c", "d"));
    assert_survives_failing_memory(&c.f.ctx, open_and_use(&c, true));
    assert_survives_failing_memory(&c.f.ctx, open_and_use(&c, false));
    fixture_end(&c.f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden_ids), cmocka_unit_test(test_equal),
        cmocka_unit_test(test_equal_text), cmocka_unit_test(test_file_without_rows),
        cmocka_unit_test(test_is_read),    cmocka_unit_test(test_damage),
        cmocka_unit_test(test_foreign),    cmocka_unit_test(test_lost_in_use),
        cmocka_unit_test(test_key),        cmocka_unit_test(test_only_read),
        cmocka_unit_test(test_no_room),    cmocka_unit_test(test_at_once),
        cmocka_unit_test(test_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
