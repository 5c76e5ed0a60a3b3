/* Rows of text: they are the same wherever reads are split, each is a line of the input, and what a format makes of one is a
 * sample whose trained stretches lie inside its text. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/json.h"
#include "data/formats.h"
#include "data/rows.h"

static const char chat[] =
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% endif %}{% endfor %}";

struct found {
    uint64_t offset, line;
    size_t bytes;
};

/* The input as a file, written anew for each run; the name is gone once it is open. */
static tp_row_file *open_input(tp_ctx *ctx, const uint8_t *data, size_t n, const char *ending)
{
    char path[64];
    tp_row_file *file = NULL;
    snprintf(path, sizeof path, "%s/tapeft-fuzz-%ld%s", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp", (long)getpid(),
             ending);
    FILE *out = fopen(path, "wb");
    if (out == NULL || fwrite(data, 1, n, out) != n || fclose(out) != 0) abort();
    if (tp_row_file_open(ctx, path, "train", &file) != TP_OK && ctx->message[0] == '\0') abort();
    unlink(path);
    return file;
}

/* Reads all rows in blocks of block_bytes and compares them with rows[0..*n) if `compare`, else fills these in. */
static void read_rows(tp_ctx *ctx, tp_row_file *file, size_t block_bytes, struct found *rows, size_t *n, bool compare)
{
    tp_row_reader reader;
    tp_row_place row;
    bool found = true;
    size_t i = 0;
    tp_row_reader_begin(&reader, file, block_bytes);
    for (;; i++) {
        if (tp_row_reader_next(ctx, &reader, &row, &found) != TP_OK) abort();
        if (!found) break;
        struct found now = {row.offset, row.line, row.bytes};
        if (!compare)
            rows[i] = now;
        else if (i >= *n || rows[i].offset != now.offset || rows[i].line != now.line || rows[i].bytes != now.bytes)
            abort();
        if (memchr(row.text, '\n', row.bytes) != NULL && !tp_row_file_is_plain(file)) abort();
        char *again = malloc(row.bytes + 1);
        if (again == NULL || tp_row_file_read(ctx, file, row.offset, again, row.bytes) != TP_OK ||
            memcmp(again, row.text, row.bytes) != 0)
            abort();
        free(again);
    }
    if (compare && i != *n) abort();
    *n = i;
    tp_row_reader_end(&reader);
}

static void check_sample(const tp_sample *sample)
{
    for (size_t i = 0; i < sample->n_trained; i++) {
        const tp_trained *t = &sample->trained[i];
        if (t->begin > t->end || t->end > sample->text.len || t->limit > sample->text.len) abort();
        if (i > 0 && t->begin < sample->trained[i - 1].begin) abort();
    }
}

/* Every row as JSON, by the rules of the first one. */
static void make_samples(tp_ctx *ctx, tp_row_file *file, const tp_prompt *prompt)
{
    static const tp_dataset_config block = {.path = "fuzz", .type = TP_DATASET_AUTO, .system = "S"};
    tp_row_rules rules = {.block = &block, .prompt = prompt, .train_on_inputs = true};
    tp_row_reader reader;
    tp_row_place row;
    tp_sample sample = {0};
    bool found = true;
    tp_row_reader_begin(&reader, file, 0);
    while (tp_row_reader_next(ctx, &reader, &row, &found) == TP_OK && found) {
        tp_json_doc *doc;
        tp_status status =
            tp_json_parse(ctx, row.text, row.bytes, &(tp_json_options){.name = "fuzz", .first_line = row.line}, &doc);
        if (status == TP_OK) {
            if (rules.format == NULL) status = tp_rules_choose(ctx, &rules, doc);
            if (status == TP_OK) status = tp_rules_apply(ctx, &rules, doc, &sample);
            if (status == TP_OK) check_sample(&sample);
            tp_json_free(doc);
        }
        if (status != TP_OK && (status != TP_FORMAT || ctx->message[0] == '\0')) abort();
        tp_ctx_clear(ctx);
    }
    tp_row_reader_end(&reader);
    tp_sample_free(&sample);
}

static void check_file(tp_ctx *ctx, tp_row_file *file, size_t n_bytes)
{
    static const size_t splits[] = {1, 2, 3, 7, 64};
    tp_prompt prompt = {0};
    struct found *rows = malloc((n_bytes + 1) * sizeof *rows);
    size_t n = 0;
    if (rows == NULL || tp_template_compile(ctx, "fuzz", chat, sizeof chat - 1, &prompt.tmpl) != TP_OK) abort();
    read_rows(ctx, file, 0, rows, &n, false);
    for (size_t i = 0; i < sizeof splits / sizeof *splits; i++) read_rows(ctx, file, splits[i], rows, &n, true);
    if (!tp_row_file_is_plain(file)) make_samples(ctx, file, &prompt);
    tp_prompt_close(&prompt);
    free(rows);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static const char *const endings[] = {".jsonl", ".txt", ".jsonl.gz"};
    bool packed = n > 2 && data[0] == 0x1F && data[1] == 0x8B;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    for (size_t i = 0; i < (packed ? 3 : 2); i++) {
        tp_row_file *file = open_input(&ctx, data, n, endings[i]);
        if (file != NULL) check_file(&ctx, file, i < 2 ? n : n * 200);
        tp_row_file_close(file);
        tp_ctx_clear(&ctx);
    }
    return 0;
}
