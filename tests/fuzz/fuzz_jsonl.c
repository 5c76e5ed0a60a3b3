/* Rows of text: they are the same wherever reads are split, each is a line of the input, and what a format makes of one is a
 * sample whose trained stretches lie inside its text. */
#include "base/json.h"
#include "data/formats.h"
#include "tests/fuzz/row_file.h"

static const char chat[] =
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% endif %}{% endfor %}";

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
        if (memchr(row.text, '\n', row.bytes) != NULL) abort();
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
    tp_prompt prompt = {0};
    tp_status status;
    size_t n;
    fuzz_row *rows = fuzz_rows(ctx, file, n_bytes, &n, &status);
    if (status != TP_OK || tp_template_compile(ctx, "fuzz", chat, sizeof chat - 1, &prompt.tmpl) != TP_OK) abort();
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
        tp_row_file *file = fuzz_open(&ctx, data, n, endings[i]);
        if (file != NULL) check_file(&ctx, file, i < 2 ? n : n * 200);
        tp_row_file_close(file);
        tp_ctx_clear(&ctx);
    }
    return 0;
}
