/* tapeft tokenize MODEL: rows of text or messages to ids, or ids to text, one JSON row each. */
#include <string.h>

#include "base/json.h"
#include "base/mem.h"
#include "cli/open.h"
#include "data/formats.h"
#include "data/rows.h"
#include "data/source.h"

struct job {
    tp_ctx *ctx;
    tp_tokenizer *tokenizer;
    tp_prompt prompt;
    bool prompt_open;
    bool decode, no_special, generation_prompt, skip_special;
    tp_sample sample;
    tp_encoded encoded;
    int32_t *ids;
    size_t ids_capacity;
    tp_buf out, text, line;
};

/* ---- output ---- */

static void write_ids(tp_buf *out, const int32_t *ids, size_t n)
{
    tp_buf_text(out, "{\"ids\": [");
    for (size_t i = 0; i < n; i++) tp_buf_printf(out, "%s%d", i > 0 ? ", " : "", (int)ids[i]);
    tp_buf_text(out, "], \"text\": ");
}

static tp_status print_out(struct job *job)
{
    tp_buf_text(&job->out, "}\n");
    TP_TRY(tp_buf_status(job->ctx, &job->out, "result"));
    TP_TRY(tp_cli_print(job->ctx, job->out.data, job->out.len));
    tp_buf_clear(&job->out);
    return TP_OK;
}

/* ---- the three kinds of rows ---- */

static tp_status encode_text(struct job *job, tp_span text)
{
    tp_tokens *tokens = &job->encoded.tokens;
    TP_TRY(
        tp_tokenizer_encode(job->ctx, job->tokenizer, text, job->no_special ? TP_ENCODE_PLAIN : TP_ENCODE_ADD_SPECIAL, tokens));
    TP_TRY(tp_grow(job->ctx, &job->ids, &job->ids_capacity, tokens->count, sizeof *job->ids));
    for (size_t i = 0; i < tokens->count; i++) job->ids[i] = tokens->items[i].id;
    write_ids(&job->out, job->ids, tokens->count);
    tp_json_write_string(&job->out, text.data, text.len);
    return print_out(job);
}

/* As training sees it, cut where replies begin; with --generation-prompt as serving does, in one piece. */
static tp_status encode_sample(struct job *job)
{
    const tp_encoded *e = &job->encoded;
    const tp_buf *text = &job->sample.text;
    TP_TRY(tp_sample_encode(job->ctx, job->tokenizer, &job->sample, 0, text->len, !job->generation_prompt, &job->encoded));
    write_ids(&job->out, e->ids, e->tokens.count);
    tp_json_write_string(&job->out, tp_buf_cstr(text), text->len);
    tp_buf_text(&job->out, ", \"mask\": [");
    for (size_t i = 0; i < e->tokens.count; i++)
        tp_buf_printf(&job->out, "%s%d", i > 0 ? ", " : "", e->labels[i] != TP_NO_LABEL);
    tp_buf_char(&job->out, ']');
    return print_out(job);
}

/* Any conversation that the template renders; the mask shows the turns of the assistant. */
static tp_status encode_messages(struct job *job, const tp_json_doc *row, const tp_json *messages)
{
    const tp_json *tools = tp_json_get(tp_json_root(row), "tools");
    size_t n = tp_json_count(messages);
    if (!job->prompt_open) TP_TRY(tp_prompt_open(job->ctx, job->tokenizer, "tokenizer_default", &job->prompt));
    job->prompt_open = true;
    uint8_t *flags = tp_alloc(job->ctx, n, sizeof *flags);
    if (flags == NULL) return TP_NOMEM;
    for (size_t i = 0; i < n; i++)
        if (tp_span_is(tp_json_string(tp_json_get(tp_json_at(messages, i), "role")), "assistant"))
            flags[i] = TP_MESSAGE_ASSISTANT | TP_MESSAGE_TRAINED;
    tp_chat_input input = {.messages = messages,
                           .tools = tp_json_count(tools) > 0 ? tools : NULL,
                           .add_generation_prompt = job->generation_prompt};
    tp_status status = tp_render_row(job->ctx, &job->prompt, row, &input, flags, n, &job->sample);
    tp_free(flags);
    return status == TP_OK ? encode_sample(job) : status;
}

static tp_status decode_ids(struct job *job, const tp_json_doc *row, const tp_json *ids)
{
    size_t n = tp_json_count(ids);
    char place[1024];
    int64_t id;
    if (tp_json_type_of(ids) != TP_JSON_ARRAY)
        return tp_fail(job->ctx, TP_FORMAT, "%s: ids: expected an array", tp_json_where(row, ids, place, sizeof place));
    TP_TRY(tp_grow(job->ctx, &job->ids, &job->ids_capacity, n, sizeof *job->ids));
    for (size_t i = 0; i < n; i++) {
        const tp_json *item = tp_json_at(ids, i);
        if (!tp_json_i64(item, &id) || id < 0 || id > INT32_MAX)
            return tp_fail(job->ctx, TP_FORMAT, "%s: ids: expected a token id", tp_json_where(row, item, place, sizeof place));
        job->ids[i] = (int32_t)id;
    }
    tp_buf_clear(&job->text);
    TP_TRY(tp_tokenizer_decode(job->ctx, job->tokenizer, job->ids, n, job->skip_special, &job->text));
    TP_TRY(tp_buf_status(job->ctx, &job->text, "text"));
    write_ids(&job->out, job->ids, n);
    tp_json_write_string(&job->out, tp_buf_cstr(&job->text), job->text.len);
    return print_out(job);
}

/* ---- rows ---- */

static tp_status handle_row(struct job *job, const tp_json_doc *row)
{
    const tp_json *root = tp_json_root(row), *ids = tp_json_get(root, "ids"), *messages = tp_json_get(root, "messages"),
                  *text = tp_json_get(root, "text");
    char place[1024];
    if (job->decode && ids != NULL) return decode_ids(job, row, ids);
    if (!job->decode && messages != NULL) return encode_messages(job, row, messages);
    if (!job->decode && tp_json_type_of(text) == TP_JSON_STRING) return encode_text(job, tp_json_string(text));
    return tp_fail(job->ctx, TP_FORMAT, "%s: expected a row with %s", tp_json_where(row, root, place, sizeof place),
                   job->decode ? "ids" : "text or messages");
}

static tp_status each_row(struct job *job, tp_row_file *file)
{
    tp_row_reader reader;
    tp_row_place place;
    tp_json_doc *doc;
    bool found = true;
    tp_status status = TP_OK;
    tp_row_reader_begin(&reader, file, 0);
    while (status == TP_OK && found) {
        status = tp_row_reader_next(job->ctx, &reader, &place, &found);
        if (status != TP_OK || !found) break;
        if (tp_row_file_is_plain(file)) {
            status = encode_text(job, (tp_span){place.text, place.bytes});
            continue;
        }
        status = tp_row_file_parse(job->ctx, file, place.line, place.text, place.bytes, &doc);
        if (status != TP_OK) break;
        status = handle_row(job, doc);
        tp_json_free(doc);
    }
    tp_row_reader_end(&reader);
    return status;
}

/* The next line of standard input, into job->line; *found is false behind the last. */
static tp_status next_line(struct job *job, bool *found)
{
    char piece[65536];
    tp_buf_clear(&job->line);
    while (fgets(piece, sizeof piece, stdin) != NULL) {
        tp_buf_append(&job->line, piece, strlen(piece)); /* a NUL byte cuts the line, which then is no JSON */
        if (strchr(piece, '\n') != NULL) break;
    }
    *found = job->line.len > 0;
    if (ferror(stdin)) return tp_fail(job->ctx, TP_IO_READ, "standard input cannot be read");
    return tp_buf_status(job->ctx, &job->line, "a row of standard input");
}

/* Rows from a pipe are answered one by one. */
static tp_status each_line(struct job *job)
{
    bool found = true;
    for (size_t line = 1;; line++) {
        TP_TRY(next_line(job, &found));
        if (!found) return TP_OK;
        const char *text = tp_buf_cstr(&job->line);
        if (text[strspn(text, " \t\r\n")] == '\0') continue;
        tp_json_doc *doc;
        tp_json_options options = {.name = "standard input", .first_line = line, .max_nodes = TP_ROW_MAX_VALUES};
        TP_TRY(tp_json_parse(job->ctx, text, job->line.len, &options, &doc));
        tp_status status = handle_row(job, doc);
        tp_json_free(doc);
        TP_TRY(status);
        (void)fflush(stdout); /* main sees what went wrong */
    }
}

static tp_status tokenize_file(struct job *job, const char *in)
{
    tp_row_file *file;
    TP_TRY(tp_row_file_open(job->ctx, in, "train", &file));
    tp_status status = each_row(job, file);
    tp_row_file_close(file);
    return status;
}

static tp_status run(tp_ctx *ctx, const tp_args *args)
{
    const char *in = tp_args_value(args, "in");
    struct job job = {.ctx = ctx,
                      .decode = tp_args_has(args, "decode"),
                      .no_special = tp_args_has(args, "no-special"),
                      .generation_prompt = tp_args_has(args, "generation-prompt"),
                      .skip_special = tp_args_has(args, "skip-special")};
    if (in == NULL) return tp_fail(ctx, TP_INVALID, "tokenize: --in FILE is needed");
    if (job.skip_special && !job.decode) return tp_fail(ctx, TP_INVALID, "--skip-special: without effect but with --decode");
    if (job.decode && (job.no_special || job.generation_prompt))
        return tp_fail(ctx, TP_INVALID, "--%s: without effect with --decode",
                       job.no_special ? "no-special" : "generation-prompt");
    if (job.decode && (tp_ends_with(in, ".txt") || tp_ends_with(in, ".csv") || tp_ends_with(in, ".csv.gz")))
        return tp_fail(ctx, TP_INVALID, "%s: --decode reads rows with ids, from a .jsonl file", in);
    tp_buf_init(&job.out, 0);
    tp_buf_init(&job.text, 0);
    tp_buf_init(&job.line, TP_ROW_MAX_BYTES);
    tp_status status = tp_tokenizer_for(ctx, args->positional[0], &job.tokenizer);
    if (status == TP_OK) status = strcmp(in, "-") == 0 ? each_line(&job) : tokenize_file(&job, in);
    if (job.prompt_open) tp_prompt_close(&job.prompt);
    tp_tokenizer_free(job.tokenizer);
    tp_sample_free(&job.sample);
    tp_encoded_free(&job.encoded);
    tp_buf_free(&job.out);
    tp_buf_free(&job.text);
    tp_buf_free(&job.line);
    tp_free(job.ids);
    return status;
}

static const tp_flag flags[] = {
    {"in", "FILE", false, false,
     "rows {text}, {messages, tools?} or {ids}: .jsonl, .csv (or .gz of them) or .txt; - reads standard input"},
    {"no-special", NULL, false, false, "add no bos and eos to texts"},
    {"generation-prompt", NULL, false, false, "end conversations where the reply begins"},
    {"decode", NULL, false, false, "ids to text"},
    {"skip-special", NULL, false, false, "with --decode: leave special tokens out"},
    TP_FLAG_JSON,
    TP_FLAG_END,
};

const tp_command tp_command_tokenize = {
    "tokenize",
    "MODEL --in FILE.jsonl [--no-special] [--generation-prompt] [--decode [--skip-special]]",
    "texts and conversations to token ids, and back",
    flags,
    1,
    1,
    run};
