/* Text data sets from end to end: ids and labels against rows put together by hand, the rules for rows that are too long,
 * malformed or held out, and batches that depend on nothing but seed, epoch and number. */
#include "tests/support.h"

#include <unistd.h>

#include "base/json.h"
#include "base/safetensors.h"
#include "data/source.h"
#include "tests/data/dataset_support.h"
#include "tests/failing_memory.h"

/* ---- what rows become ---- */

/* A row made by hand: pieces encoded one by one; '+' in front of a learned piece, '-' of another, '*' adds bos, '$' a learned
 * eos. */
static void expect_row(fixture *f, const tp_dataset *data, int64_t number, const char *const *pieces)
{
    tp_preview p;
    tp_tokens tokens = {0};
    size_t at = 0;
    assert_ok(&f->ctx, tp_dataset_preview(&f->ctx, data, number, &p));
    for (size_t i = 0; pieces[i] != NULL; i++) {
        const char *piece = pieces[i];
        bool learned = piece[0] == '+' || piece[0] == '$';
        tokens.count = 0;
        if (piece[0] == '*')
            assert_ok(&f->ctx,
                      tp_tokens_push(&f->ctx, &tokens, (tp_token){.id = tp_tokenizer_role(f->tokenizer, TP_TOKEN_BOS)}));
        else if (piece[0] == '$')
            assert_ok(&f->ctx,
                      tp_tokens_push(&f->ctx, &tokens, (tp_token){.id = tp_tokenizer_role(f->tokenizer, TP_TOKEN_EOS)}));
        else
            assert_ok(&f->ctx, tp_tokenizer_encode(&f->ctx, f->tokenizer, tp_span_of(piece + 1), TP_ENCODE_PLAIN, &tokens));
        for (size_t k = 0; k < tokens.count; k++, at++) {
            assert_true(at < p.tokens.count);
            if (p.tokens.items[at].id != tokens.items[k].id || p.labels[at] != (learned && at > 0 ? tokens.items[k].id : -100))
                fail_msg("row %d, token %zu: id %d, label %d, in piece \"%s\"", (int)number, at, (int)p.tokens.items[at].id,
                         (int)p.labels[at], piece);
        }
    }
    assert_int_equal(at, p.tokens.count);
    tp_tokens_free(&tokens);
    tp_preview_free(&p);
}

#define EXPECT_ROW(f, data, number, ...) expect_row(f, data, number, (const char *const[]){__VA_ARGS__, NULL})

static void test_completion(void **state)
{
    fixture f;
    (void)state;
    fixture_begin(&f);
    write_rows(&f, "{\"text\": \"some text\"}\n{\"text\": \"more\"}\n");
    tp_dataset *data = open_rows(&f);
    EXPECT_ROW(&f, data, 0, "+some text", "$");
    EXPECT_ROW(&f, data, 1, "+more", "$");
    tp_dataset_close(data);
    write_rows(&f, "{\"prompt\": \"some \", \"completion\": \" text\"}\n");
    data = open_rows(&f);
    EXPECT_ROW(&f, data, 0, "-some ", "+ text", "$");
    tp_dataset_close(data);
    f.config.train_on_inputs = true;
    data = open_rows(&f);
    EXPECT_ROW(&f, data, 0, "+some ", "+ text", "$");
    tp_dataset_close(data);
    fixture_end(&f);
}

#define PROMPT(user) "-<|im_start|>user\n" user "<|im_end|>\n<|im_start|>assistant\n"

static void test_instruction(void **state)
{
    static const tp_string_entry names[] = {{"instruction", "q"}, {"output", "a"}};
    fixture f;
    (void)state;
    fixture_begin(&f);
    write_rows(&f, "{\"q\": \"Add.\", \"input\": \"1 2\", \"a\": \" 3\"}\n{\"q\": \"Say\", \"input\": \"\", \"a\": \"\\nhi\"}\n"
                   "{\"q\": \"Say\", \"system\": \"Own.\", \"a\": \"ho\"}\n");
    f.blocks[0].columns = (tp_string_map){names, 2};
    tp_dataset *data = open_rows(&f);
    EXPECT_ROW(&f, data, 0, PROMPT("Add.\n\n1 2"), "+ 3<|im_end|>", "-\n");
    EXPECT_ROW(&f, data, 1, PROMPT("Say"), "+\nhi<|im_end|>", "-\n");
    EXPECT_ROW(&f, data, 2, "-<|im_start|>system\nOwn.<|im_end|>\n<|im_start|>user\nSay<|im_end|>\n<|im_start|>assistant\n",
               "+ho<|im_end|>", "-\n");
    tp_dataset_close(data);
    f.blocks[0].system = "Be.";
    data = open_rows(&f);
    EXPECT_ROW(&f, data, 1, "-<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nSay<|im_end|>\n<|im_start|>assistant\n",
               "+\nhi<|im_end|>", "-\n");
    EXPECT_ROW(&f, data, 2, "-<|im_start|>system\nOwn.<|im_end|>\n<|im_start|>user\nSay<|im_end|>\n<|im_start|>assistant\n",
               "+ho<|im_end|>", "-\n");
    tp_dataset_close(data);
    fixture_end(&f);
}

static void test_chat(void **state)
{
    fixture f;
    (void)state;
    fixture_begin(&f);
    write_rows(&f, "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"},"
                   " {\"role\": \"user\", \"content\": \"c\"}, {\"role\": \"assistant\", \"content\": \"d\"}]}\n"
                   "{\"conversations\": [{\"from\": \"human\", \"value\": \"a\"}, {\"from\": \"gpt\", \"value\": \"b\"}]}\n"
                   "{\"messages\": [{\"role\": \"user\", \"content\": \"a\", \"train\": true}, {\"role\": \"assistant\", "
                   "\"content\": \"b\", \"train\": false}]}\n");
    tp_dataset *data = open_rows(&f);
    EXPECT_ROW(&f, data, 0, PROMPT("a"), "+b<|im_end|>", "-\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n",
               "+d<|im_end|>", "-\n");
    EXPECT_ROW(&f, data, 1, PROMPT("a"), "+b<|im_end|>", "-\n");
    EXPECT_ROW(&f, data, 2, "-<|im_start|>user\n", "+a<|im_end|>", "-\n<|im_start|>assistant\nb<|im_end|>\n");
    tp_dataset_close(data);
    f.config.train_on_turns = TP_TURNS_LAST;
    f.blocks[0].system = "S";
    data = open_rows(&f);
    EXPECT_ROW(&f, data, 0,
               "-<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_"
               "start|>user\nc<|im_end|>\n<|im_start|>assistant\n",
               "+d<|im_end|>", "-\n");
    tp_dataset_close(data);
    f.config.train_on_inputs = true;
    f.blocks[0].system = NULL;
    data = open_rows(&f);
    EXPECT_ROW(&f, data, 1, "-<|im_start|>user\n", "+a<|im_end|>", "-\n<|im_start|>assistant\n", "+b<|im_end|>", "-\n");
    tp_dataset_close(data);
    fixture_end(&f);
}

/* The counts of a whole file against a slow model that knows nothing of spans: prompt and reply are encoded apart. */
static void test_counts(void **state)
{
    static const tp_string_entry names[] = {{"instruction", "question"}, {"output", "answer"}};
    fixture f;
    tp_dataset_counts counts;
    tp_tokens prompt = {0}, reply = {0};
    char *text;
    size_t n;
    int64_t tokens = 0, labels = 0, rows = 0, longest = 0;
    (void)state;
    fixture_begin(&f);
    f.blocks[0].path = "recipes/data/gsm8k/test.jsonl";
    f.blocks[0].columns = (tp_string_map){names, 2};
    f.options.max_length = 2048;
    assert_ok(&f.ctx, tp_file_read(&f.ctx, f.blocks[0].path, 1 << 24, &text, &n));
    for (char *line = text, *end; (end = strchr(line, '\n')) != NULL; line = end + 1, rows++) {
        tp_json_doc *doc;
        tp_buf all;
        tp_buf_init(&all, 0);
        assert_ok(&f.ctx, tp_json_parse(&f.ctx, line, (size_t)(end - line), NULL, &doc));
        tp_span question = tp_json_string(tp_json_get(tp_json_root(doc), "question")),
                answer = tp_json_string(tp_json_get(tp_json_root(doc), "answer"));
        tp_buf_printf(&all, "<|im_start|>user\n%.*s<|im_end|>\n<|im_start|>assistant\n", (int)question.len, question.data);
        assert_ok(&f.ctx, tp_tokenizer_encode(&f.ctx, f.tokenizer, (tp_span){all.data, all.len}, TP_ENCODE_PLAIN, &prompt));
        tp_buf_clear(&all);
        tp_buf_printf(&all, "%.*s<|im_end|>\n", (int)answer.len, answer.data);
        assert_ok(&f.ctx, tp_tokenizer_encode(&f.ctx, f.tokenizer, (tp_span){all.data, all.len}, TP_ENCODE_PLAIN, &reply));
        tokens += (int64_t)(prompt.count + reply.count);
        labels += (int64_t)reply.count - 1;
        if ((int64_t)(prompt.count + reply.count) > longest) longest = (int64_t)(prompt.count + reply.count);
        tp_buf_free(&all);
        tp_json_free(doc);
    }
    tp_dataset *data = open_rows(&f);
    tp_dataset_count(data, &counts);
    assert_int_equal(counts.rows_used, rows);
    assert_int_equal(counts.tokens, tokens);
    assert_int_equal(counts.labels, labels);
    assert_int_equal(counts.longest_row, longest);
    tp_dataset_close(data);
    tp_tokens_free(&prompt);
    tp_tokens_free(&reply);
    tp_free(text);
    fixture_end(&f);
}

/* ---- batches ---- */

/* Order-independent sum over the documents of an epoch: ids, labels and where they stand. */
struct totals {
    int64_t segments, tokens, labels;
    uint64_t sum;
};

static void add_batch(const tp_host_batch *b, struct totals *t)
{
    int64_t at = 0, label = 0;
    for (int64_t s = 0; s < b->n_segments; s++) {
        const tp_segment *segment = &b->segments[s];
        uint64_t hash = 1469598103934665603u;
        assert_int_equal(segment->q_start, at); /* each attends to itself alone */
        assert_int_equal(segment->k_start, at);
        assert_int_equal(segment->q_len, segment->k_len);
        for (int64_t i = 0; i < segment->q_len; i++, at++) {
            assert_int_equal(b->positions[at], i);
            hash = (hash ^ (uint64_t)b->ids[at]) * 1099511628211u;
        }
        for (; label < b->n_labels && b->label_rows[label] < at; label++) {
            int64_t row = b->label_rows[label];
            assert_in_range(row, at - segment->q_len, at - 2); /* predicts a token of its own document */
            assert_int_equal(b->labels[label], b->ids[row + 1]);
            hash = (hash ^ (uint64_t)(row - at)) * 1099511628211u;
        }
        t->sum += hash;
    }
    assert_int_equal(at, b->n);
    assert_int_equal(label, b->n_labels);
    t->segments += b->n_segments;
    t->tokens += b->n;
    t->labels += b->n_labels;
}

static void total_epoch(fixture *f, const tp_dataset *data, int64_t epoch, struct totals *t)
{
    tp_host_batch batch = {0};
    int64_t rows, labels, segments, longest;
    *t = (struct totals){0};
    tp_dataset_largest(data, &rows, &labels, &segments, &longest);
    for (int64_t i = 0; i < tp_dataset_micro_batches(data); i++) {
        assert_ok(&f->ctx, tp_dataset_get(&f->ctx, data, epoch, i, &batch));
        assert_true(batch.n <= rows && batch.n_labels <= labels && batch.n_segments <= segments &&
                    batch.max_position <= longest);
        assert_true(batch.n_labels > 0);
        add_batch(&batch, t);
    }
    tp_host_batch_free(&batch);
}

static void test_epochs(void **state)
{
    fixture f;
    struct totals first, other;
    tp_dataset_counts counts;
    (void)state;
    fixture_begin(&f);
    write_pairs(&f, 101);
    f.options.micro_batch_size = 4;
    f.options.max_length = 64;
    tp_dataset *plain = open_rows(&f);
    total_epoch(&f, plain, 0, &first);
    tp_dataset_count(plain, &counts);
    assert_int_equal(first.segments, 101);
    assert_int_equal(first.tokens, counts.tokens);
    assert_int_equal(first.labels, counts.labels);
    assert_int_equal(tp_dataset_micro_batches(plain), 26);
    tp_dataset_close(plain);
    for (int mode = 0; mode < 8; mode++) {
        f.config.shuffle = (mode & 1) != 0;
        f.config.packing = (mode & 2) != 0;
        f.config.group_by_length = (mode & 4) != 0;
        tp_dataset *data = open_rows(&f);
        for (int64_t epoch = 0; epoch < 3; epoch++) {
            total_epoch(&f, data, epoch, &other);
            assert_memory_equal(&first, &other, sizeof first);
        }
        if (f.config.packing) assert_true(tp_dataset_micro_batches(data) < 20);
        tp_dataset_close(data);
    }
    fixture_end(&f);
}

static bool same_batch(const tp_host_batch *a, const tp_host_batch *b)
{
    return a->n == b->n && a->n_labels == b->n_labels && a->n_segments == b->n_segments &&
           memcmp(a->ids, b->ids, (size_t)a->n * sizeof *a->ids) == 0 &&
           memcmp(a->labels, b->labels, (size_t)a->n_labels * sizeof *a->labels) == 0 &&
           memcmp(a->label_rows, b->label_rows, (size_t)a->n_labels * sizeof *a->labels) == 0;
}

/* Any batch at any time, in any order, from any opening. */
static void test_resume(void **state)
{
    fixture f;
    (void)state;
    fixture_begin(&f);
    write_pairs(&f, 57);
    f.options.max_length = 64;
    for (int mode = 0; mode < 2; mode++) {
        tp_host_batch once = {0}, again = {0};
        f.config.packing = mode != 0;
        f.config.group_by_length = mode == 0;
        tp_dataset *a = open_rows(&f), *b = open_rows(&f);
        int64_t n = tp_dataset_micro_batches(a);
        assert_string_equal(tp_dataset_fingerprint(a), tp_dataset_fingerprint(b));
        for (int64_t i = 0; i < n; i++) {
            assert_ok(&f.ctx, tp_dataset_get(&f.ctx, a, 2, i, &once));
            assert_ok(&f.ctx, tp_dataset_get(&f.ctx, b, 1, n - 1 - i, &again));
            assert_ok(&f.ctx, tp_dataset_get(&f.ctx, b, 2, i, &again));
            assert_true(same_batch(&once, &again));
        }
        tp_dataset_close(a);
        tp_dataset_close(b);
        tp_host_batch_free(&once);
        tp_host_batch_free(&again);
    }
    fixture_end(&f);
}

/* ---- rows too long ---- */

static void test_too_long(void **state)
{
    fixture f;
    tp_dataset *data;
    tp_dataset_counts counts;
    tp_preview p;
    (void)state;
    fixture_begin(&f);
    write_rows(
        &f,
        "{\"prompt\": \"a b c d\", \"completion\": \"1 2\"}\n{\"prompt\": \"a b c d\", \"completion\": \"1 2 3 4 5 6 7 8 9\"}\n"
        "{\"prompt\": \"a b c d e f g h i j k l m n\", \"completion\": \"1\"}\n");
    f.options.max_length = 12;
    assert_status(&f.ctx, TP_FORMAT, tp_dataset_open(&f.ctx, &f.options, &data));
    f.config.max_dropped = 0.7;
    data = open_rows(&f);
    tp_dataset_count(data, &counts);
    assert_int_equal(counts.rows_read, 3);
    assert_int_equal(counts.rows_used, 1);
    assert_int_equal(counts.rows_dropped, 2);
    assert_ok(&f.ctx, tp_dataset_preview(&f.ctx, data, 1, &p));
    assert_true(p.dropped && p.line == 2);
    tp_preview_free(&p);
    assert_status(&f.ctx, TP_INVALID, tp_dataset_preview(&f.ctx, data, 3, &p));
    tp_dataset_close(data);
    f.config.excess_length = TP_EXCESS_TRUNCATE; /* the third row has nothing left to learn */
    data = open_rows(&f);
    tp_dataset_count(data, &counts);
    assert_int_equal(counts.rows_used, 2);
    assert_int_equal(counts.rows_dropped, 1);
    assert_int_equal(counts.longest_row, 12);
    tp_dataset_close(data);
    f.config.excess_length = TP_EXCESS_RAISE;
    assert_int_equal(tp_dataset_open(&f.ctx, &f.options, &data), TP_FORMAT);
    assert_non_null(strstr(f.ctx.message, "rows.jsonl:2: "));
    tp_ctx_clear(&f.ctx);
    f.config.excess_length = TP_EXCESS_SPLIT;
    assert_status(&f.ctx, TP_INVALID, tp_dataset_open(&f.ctx, &f.options, &data));
    assert_string_equal(f.last_key, "excess_length_strategy");
    fixture_end(&f);
}

/* Parts of a split text follow each other without gap, and nothing but the first token of each goes unlearned. */
static void check_split(fixture *f, size_t text_bytes, int64_t max_length)
{
    tp_buf joined;
    tp_dataset_counts counts;
    tp_preview p;
    int64_t parts = 0;
    tp_buf_init(&joined, 0);
    f->options.max_length = max_length;
    tp_dataset *data = open_rows(f);
    tp_dataset_count(data, &counts);
    for (;; parts++) {
        if (tp_dataset_preview(&f->ctx, data, parts, &p) != TP_OK) break;
        assert_true((int64_t)p.tokens.count <= max_length && p.tokens.count > 1);
        for (size_t i = 0; i < p.tokens.count; i++) assert_int_equal(p.labels[i], i == 0 ? -100 : p.tokens.items[i].id);
        tp_buf_append(&joined, p.text.data, p.text.len);
        tp_preview_free(&p);
    }
    assert_int_equal(f->ctx.status, TP_INVALID);
    tp_ctx_clear(&f->ctx);
    assert_int_equal(joined.len, text_bytes);
    assert_int_equal(counts.labels, counts.tokens - parts);
    assert_int_equal(counts.rows_used, 1);
    for (size_t i = 0; i < joined.len; i++)
        assert_int_equal(joined.data[i], i % 61 == 60 ? '\n' : i % 7 == 0 ? ' ' : (int)('a' + i % 5));
    struct totals t;
    total_epoch(f, data, 1, &t);
    assert_int_equal(t.segments, parts);
    assert_int_equal(t.labels, counts.labels);
    tp_dataset_close(data);
    tp_buf_free(&joined);
}

static void test_split(void **state)
{
    static char text[30000];
    fixture f;
    (void)state;
    fixture_begin(&f);
    for (size_t i = 0; i < sizeof text; i++) text[i] = i % 61 == 60 ? '\n' : i % 7 == 0 ? ' ' : (char)('a' + i % 5);
    write_file(&f, "a.txt", text, sizeof text);
    char path[1100];
    snprintf(path, sizeof path, "%s", f.dir.path);
    f.blocks[0].path = path;
    f.config.excess_length = TP_EXCESS_SPLIT;
    for (int64_t length = 8; length < 600; length += 37) check_split(&f, sizeof text, length);
    check_split(&f, sizeof text, 100000);
    f.blocks[0].type = TP_DATASET_CHAT;
    tp_dataset *data;
    assert_status(&f.ctx, TP_INVALID, tp_dataset_open(&f.ctx, &f.options, &data));
    assert_string_equal(f.last_key, "datasets");
    fixture_end(&f);
}

/* ---- which rows, and how often ---- */

static void test_weight_and_limit(void **state)
{
    fixture f;
    struct totals one, two, both;
    (void)state;
    fixture_begin(&f);
    write_pairs(&f, 400);
    f.blocks[0].limit = 100;
    tp_dataset *data = open_rows(&f);
    total_epoch(&f, data, 0, &one);
    assert_int_equal(one.segments, 100);
    tp_dataset_close(data);
    f.blocks[0].weight = 2;
    data = open_rows(&f);
    total_epoch(&f, data, 0, &two);
    assert_int_equal(two.segments, 200);
    assert_true(two.sum == 2 * one.sum);
    tp_dataset_close(data);
    f.blocks[0].weight = 1.25;
    f.blocks[0].limit = TP_UNSET;
    data = open_rows(&f);
    total_epoch(&f, data, 0, &both);
    assert_in_range(both.segments, 465, 535); /* 500, standard deviation 8.7 */
    tp_dataset_close(data);
    fixture_end(&f);
}

static void test_held_out(void **state)
{
    fixture f;
    struct totals all, training, held;
    tp_dataset *data;
    (void)state;
    fixture_begin(&f);
    write_pairs(&f, 400);
    data = open_rows(&f);
    total_epoch(&f, data, 0, &all);
    tp_dataset_close(data);
    f.options.held_out = true;
    assert_ok(&f.ctx, tp_dataset_open(&f.ctx, &f.options, &data));
    assert_null(data);
    for (int mode = 0; mode < 2; mode++) {
        f.config.val_set_size = mode == 0 ? (tp_share){.rows = 37} : (tp_share){.fraction = 0.1};
        f.options.held_out = false;
        data = open_rows(&f);
        total_epoch(&f, data, 0, &training);
        tp_dataset_close(data);
        f.options.held_out = true;
        data = open_rows(&f);
        total_epoch(&f, data, 0, &held);
        if (mode == 0)
            assert_int_equal(held.segments, 37);
        else
            assert_in_range(held.segments, 16, 64); /* 40, standard deviation 6 */
        assert_int_equal(held.segments + training.segments, 400);
        assert_true(held.sum + training.sum == all.sum);
        tp_dataset_close(data);
    }
    /* Held-out rows keep their order, whatever the recipe says of shuffling, and each comes once, whatever its weight. */
    f.test_block = f.blocks[0];
    f.test_block.weight = 3;
    f.config.test_datasets = (tp_datasets){&f.test_block, 1};
    f.config.val_set_size = (tp_share){0};
    data = open_rows(&f);
    tp_host_batch batch = {0};
    tp_preview p;
    for (int64_t i = 0; i < 200; i++) {
        assert_ok(&f.ctx, tp_dataset_get(&f.ctx, data, 0, i, &batch));
        assert_ok(&f.ctx, tp_dataset_preview(&f.ctx, data, 2 * i, &p));
        assert_int_equal(batch.segments[0].q_len, p.tokens.count);
        for (size_t k = 0; k < p.tokens.count; k++) assert_int_equal(batch.ids[k], p.tokens.items[k].id);
        tp_preview_free(&p);
    }
    assert_int_equal(tp_dataset_micro_batches(data), 200);
    tp_host_batch_free(&batch);
    tp_dataset_close(data);
    f.options.held_out = false;
    f.config.val_set_size = (tp_share){.rows = 400};
    assert_status(&f.ctx, TP_INVALID, tp_dataset_open(&f.ctx, &f.options, &data));
    assert_string_equal(f.last_key, "val_set_size");
    fixture_end(&f);
}

/* ---- what is refused ---- */

static void refuse(fixture *f, const char *rows, tp_status expected, const char *says)
{
    tp_dataset *data;
    write_rows(f, rows);
    tp_status status = tp_dataset_open(&f->ctx, &f->options, &data);
    if (status != expected || strstr(f->ctx.message, says) == NULL)
        fail_msg("expected %s with \"%s\", got %s: %s", tp_status_name(expected), says, tp_status_name(status), f->ctx.message);
    tp_ctx_clear(&f->ctx);
}

static void test_refusals(void **state)
{
    fixture f;
    (void)state;
    fixture_begin(&f);
    refuse(&f, "{\"question\": \"a\"}\n", TP_FORMAT, "rows.jsonl:1:1: expected columns messages");
    refuse(&f, "{\"messages\": [{\"role\": \"assistant\", \"content\": \"\"}]}\n", TP_FORMAT, "1 without a token to learn");
    refuse(&f, "{\"text\": \"<s><s>\"}\n", TP_FORMAT, "rows.jsonl:1: the row begins with bos twice");
    refuse(&f, "{\"messages\": [{\"role\": \"assistant\", \"content\": [{\"type\": \"image\"}]}]}\n", TP_FORMAT,
           "rows.jsonl:1:");
    refuse(&f, "{\"messages\": [{\"from\": \"robot\", \"value\": \"\"}]}\n", TP_FORMAT, "got \"robot\"");
    refuse(&f, "{\"messages\": [{\"role\": \"assistant\", \"content\": \"a\", \"train\": 1}]}\n", TP_FORMAT, "train: expected");
    refuse(&f, "{\"messages\": [{\"role\": \"assistant\", \"content\": \"a\"}], \"tools\": \"x\"}\n", TP_FORMAT,
           "tools: expected an array");
    f.blocks[0].type = TP_DATASET_INSTRUCTION;
    refuse(&f, "{\"text\": \"a\"}\n", TP_FORMAT, "expected columns instruction and output, found text");
    f.config.chat_template = "none";
    refuse(&f, "{\"instruction\": \"a\", \"output\": \"b\"}\n", TP_INVALID, "recipe.yaml:1:1: chat_template: none");
    assert_string_equal(f.last_key, "chat_template");
    f.config.chat_template = "tokenizer_default";
    f.blocks[0].type = TP_DATASET_AUTO;
    f.options.vocab_size = 100;
    refuse(&f, "{\"text\": \"a\"}\n{\"text\": \"there\"}\n", TP_FORMAT, "lies beyond the model's embedding of 100 rows");
    f.options.vocab_size = 1000;
    open_tokenizer(&f,
                   "{\"bos_token\": \"<s>\", \"chat_template\": \"{% for m in messages %}{{ m.content }}\\n{% endfor %}\"}");
    refuse(&f, "{\"text\": \"a b\"}\n", TP_FORMAT, "no row trains an end token");
    refuse(&f, "{\"instruction\": \"a\", \"output\": \"b c\"}\n", TP_FORMAT, "no row trains an end token");
    open_tokenizer(&f, "{\"eos_token\": \"</s>\", \"chat_template\": \"{{ raise_exception('not this') }}\"}");
    refuse(&f, "{\"instruction\": \"a\", \"output\": \"b c\"}\n", TP_FORMAT, "not this");
    open_tokenizer(&f, "{\"eos_token\": \"</s>\"}");
    refuse(&f, "{\"instruction\": \"a\", \"output\": \"b c\"}\n", TP_INVALID, "recipe.yaml:1:1: chat_template");
    fixture_end(&f);
}

static void test_bad_rows_skipped(void **state)
{
    fixture f;
    tp_dataset_counts counts;
    (void)state;
    fixture_begin(&f);
    f.config.on_bad_row = TP_BAD_ROW_SKIP;
    write_rows(&f, "{broken\n{\"text\": \"a b\"}\n\n3\n{\"text\": 3}\n{\"text\": \"c\"}\n");
    tp_dataset *data = open_rows(&f);
    tp_dataset_count(data, &counts);
    assert_int_equal(counts.rows_read, 5);
    assert_int_equal(counts.rows_bad, 3);
    assert_int_equal(counts.rows_used, 2);
    EXPECT_ROW(&f, data, 1, "+c", "$");
    tp_dataset_close(data);
    refuse(&f, "{broken\n", TP_FORMAT, "1 are malformed");
    refuse(&f, "{\"text\": \"a\"}\n{\"text\": \"<s><s>\"}\n", TP_FORMAT, "bos twice"); /* no matter of one row */
    fixture_end(&f);
}

/* ---- files that change ---- */

static void test_changes(void **state)
{
    fixture f;
    tp_host_batch batch = {0};
    char before[65];
    (void)state;
    fixture_begin(&f);
    write_rows(&f, "{\"text\": \"a b\"}\n{\"text\": \"c d\"}\n");
    tp_dataset *data = open_rows(&f);
    assert_ok(&f.ctx, tp_dataset_check(&f.ctx, data));
    snprintf(before, sizeof before, "%s", tp_dataset_fingerprint(data));
    FILE *file = fopen(f.path, "r+b"); /* in place, as an editor may do */
    assert_non_null(file);
    assert_int_equal(fputs("{\"text\": \"\"}   ", file) < 0, 0);
    fclose(file);
    tp_status status = tp_dataset_get(&f.ctx, data, 0, 0, &batch);
    assert_int_equal(status, TP_CHECKPOINT);
    assert_non_null(strstr(f.ctx.message, "changed since it was opened"));
    tp_ctx_clear(&f.ctx);
    assert_status(&f.ctx, TP_CHECKPOINT, tp_dataset_check(&f.ctx, data));
    tp_dataset_close(data);
    f.config.max_dropped = 1;
    data = open_rows(&f);
    assert_string_not_equal(before, tp_dataset_fingerprint(data));
    snprintf(before, sizeof before, "%s", tp_dataset_fingerprint(data));
    tp_dataset_close(data);
    f.options.max_length = 100;
    data = open_rows(&f);
    assert_string_not_equal(before, tp_dataset_fingerprint(data));
    tp_dataset_close(data);
    tp_host_batch_free(&batch);
    fixture_end(&f);
}

/* ---- memory ---- */

static tp_status open_and_use(fixture *f)
{
    tp_dataset *data;
    tp_preview p = {0};
    tp_host_batch batch = {0};
    TP_TRY(tp_dataset_open(&f->ctx, &f->options, &data));
    tp_status status = tp_dataset_get(&f->ctx, data, 0, 0, &batch);
    if (status == TP_OK) status = tp_dataset_preview(&f->ctx, data, 1, &p);
    if (status == TP_OK) tp_preview_free(&p);
    tp_host_batch_free(&batch);
    tp_dataset_close(data);
    return status;
}

static void test_memory(void **state)
{
    fixture f;
    (void)state;
    fixture_begin(&f);
    f.config.packing = f.config.group_by_length = true;
    f.config.val_set_size = (tp_share){.rows = 1};
    f.blocks[0].system = "S";
    write_rows(&f, "{\"instruction\": \"a\", \"input\": \"i\", \"output\": \"b\"}\n{\"instruction\": \"a\", \"output\": "
                   "\"c\"}\n{\"instruction\": \"d\", \"output\": \"c\"}\n");
    assert_survives_failing_memory(&f.ctx, open_and_use(&f));
    write_rows(&f, "{\"conversations\": [{\"from\": \"human\", \"value\": \"a\"}, {\"from\": \"gpt\", \"value\": \"b\"}]}\n"
                   "{\"conversations\": [{\"from\": \"human\", \"value\": \"c\"}, {\"from\": \"gpt\", \"value\": \"b\"}]}\n"
                   "{\"conversations\": [{\"from\": \"human\", \"value\": \"c\"}, {\"from\": \"gpt\", \"value\": \"d\"}]}\n");
    assert_survives_failing_memory(&f.ctx, open_and_use(&f));
    fixture_end(&f);
}

/* ---- against recorded batches of a published model ---- */

enum { RECORDED = 30, MOST_CELLS = 1024 };

/* Micro-batches [rows, columns] of golden/smollm2. */
struct recorded {
    size_t rows, columns;
    int64_t ids[MOST_CELLS], labels[MOST_CELLS], mask[MOST_CELLS];
};

static void read_table(fixture *f, const tp_safetensors *file, int batch, const char *what, struct recorded *r, int64_t *out)
{
    char name[64];
    snprintf(name, sizeof name, "%d.%s", batch, what);
    const tp_entry *e = tp_safetensors_find(file, name);
    assert_non_null(e);
    r->rows = (size_t)e->shape[0];
    r->columns = (size_t)e->shape[1];
    assert_in_range(r->rows * r->columns, 1, MOST_CELLS);
    assert_ok(&f->ctx, tp_safetensors_read_i64(&f->ctx, file, e, 0, r->rows * r->columns, out));
}

/* Whether row k is this preview's; then labels must agree too. */
static bool is_row(const tp_preview *p, const struct recorded *r, size_t k)
{
    const int64_t *ids = r->ids + k * r->columns, *labels = r->labels + k * r->columns, *mask = r->mask + k * r->columns;
    size_t n = 0;
    while (n < r->columns && mask[n] == 1) n++;
    if (n != p->tokens.count) return false;
    for (size_t i = 0; i < n; i++)
        if (p->tokens.items[i].id != ids[i]) return false;
    for (size_t i = 0; i < n; i++)
        if (p->labels[i] != labels[i]) fail_msg("label of token %zu", i);
    return true;
}

/* How many of the recorded rows the data set holds. */
static size_t find_recorded(fixture *f, const tp_dataset *data, int64_t n_rows, const tp_safetensors *file)
{
    static struct recorded recorded[RECORDED];
    tp_preview p;
    size_t found = 0;
    for (int b = 0; b < RECORDED; b++) {
        read_table(f, file, b, "input_ids", &recorded[b], recorded[b].ids);
        read_table(f, file, b, "labels", &recorded[b], recorded[b].labels);
        read_table(f, file, b, "attention_mask", &recorded[b], recorded[b].mask);
    }
    for (int64_t row = 0; row < n_rows; row++) {
        assert_ok(&f->ctx, tp_dataset_preview(&f->ctx, data, row, &p));
        for (int b = 0; b < RECORDED; b++)
            for (size_t k = 0; k < recorded[b].rows; k++) found += is_row(&p, &recorded[b], k);
        tp_preview_free(&p);
    }
    return found;
}

static void test_smollm2(void **state)
{
    static const tp_string_entry names[] = {{"instruction", "question"}, {"output", "answer"}};
    const char *model = getenv("TAPEFT_SMOLLM2");
    char path[4096];
    fixture f;
    tp_dataset_counts counts;
    tp_safetensors *file;
    (void)state;
    if (model == NULL || model[0] == '\0') {
        print_message("TAPEFT_SMOLLM2 does not name the model file\n");
        skip();
    }
    fixture_begin(&f);
    tp_tokenizer_free(f.tokenizer);
    assert_ok(&f.ctx, tp_tokenizer_for(&f.ctx, model, &f.tokenizer));
    f.options.tokenizer = f.tokenizer;
    f.options.vocab_size = 49152;
    f.options.max_length = 2048;
    f.blocks[0].path = "recipes/data/gsm8k";
    f.blocks[0].columns = (tp_string_map){names, 2};
    tp_dataset *data = open_rows(&f);
    tp_dataset_count(data, &counts);
    assert_int_equal(counts.rows_used, 1800);
    print_message("gsm8k: %d tokens, %d labels\n", (int)counts.tokens, (int)counts.labels);
    if (tp_safetensors_open(&f.ctx, golden_path(path, sizeof path, "smollm2/batches.safetensors"), &file) == TP_OK) {
        size_t found = find_recorded(&f, data, counts.rows_used, file);
        print_message("%zu of the 60 recorded rows are in this part of the data, and equal\n", found);
        assert_true(found > 3); /* 1,800 of 7,473 rows are here: 14 are expected */
        tp_safetensors_close(file);
    }
    tp_ctx_clear(&f.ctx);
    tp_dataset_close(data);
    fixture_end(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_completion), cmocka_unit_test(test_instruction), cmocka_unit_test(test_chat),
        cmocka_unit_test(test_counts),     cmocka_unit_test(test_epochs),      cmocka_unit_test(test_resume),
        cmocka_unit_test(test_too_long),   cmocka_unit_test(test_split),       cmocka_unit_test(test_weight_and_limit),
        cmocka_unit_test(test_held_out),   cmocka_unit_test(test_refusals),    cmocka_unit_test(test_bad_rows_skipped),
        cmocka_unit_test(test_changes),    cmocka_unit_test(test_memory),      cmocka_unit_test(test_smollm2),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
