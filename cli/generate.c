/* tapeft generate MODEL: the new text on stdout, nothing else. */
#include <errno.h>
#include <string.h>

#include "base/json.h"
#include "base/mem.h"
#include "cli/open.h"
#include "cli/prompts.h"
#include "cli/signals.h"
#include "data/prompt.h"
#include "data/rows.h"
#include "data/source.h"
#include "inference/generate.h"

#define PROMPT_MAX_BYTES ((size_t)64 << 20)
#define MAX_STOPS        16

struct request {
    tp_generate_options options;
    tp_prompts prompts;
    const char *stops[MAX_STOPS + 1];
    char *text;      /* of --file; owned */
    bool json, rows; /* rows: a prompt per row, JSON out */
    int write_error; /* errno of stdout; 0: none */
    const volatile sig_atomic_t *stop;
};

/* ---- the prompt ---- */

static tp_status read_stream(tp_ctx *ctx, FILE *from, char **text, size_t *n)
{
    tp_buf buf;
    char piece[65536];
    size_t got;
    tp_buf_init(&buf, PROMPT_MAX_BYTES);
    while ((got = fread(piece, 1, sizeof piece, from)) > 0) tp_buf_append(&buf, piece, got);
    tp_status status = ferror(from) ? tp_fail(ctx, TP_IO_READ, "the prompt cannot be read from standard input")
                                    : tp_buf_status(ctx, &buf, "prompt");
    if (status == TP_OK) {
        *n = buf.len;
        *text = tp_strndup(ctx, tp_buf_cstr(&buf), buf.len);
        if (*text == NULL) status = TP_NOMEM;
    }
    tp_buf_free(&buf);
    return status;
}

static tp_status prompt_text(tp_ctx *ctx, const tp_args *args, struct request *r, tp_span *text)
{
    const char *file = tp_args_value(args, "file"), *given = tp_args_value(args, "prompt");
    if ((file != NULL) + (given != NULL) + tp_args_has(args, "ids") != 1)
        return tp_fail(ctx, TP_INVALID, "generate: exactly one of --prompt, --file and --ids is needed");
    if (given != NULL) *text = tp_span_of(given);
    if (file == NULL) return TP_OK;
    size_t n = 0;
    TP_TRY(strcmp(file, "-") == 0 ? read_stream(ctx, stdin, &r->text, &n)
                                  : tp_file_read(ctx, file, PROMPT_MAX_BYTES, &r->text, &n));
    *text = (tp_span){r->text, n};
    return TP_OK;
}

static tp_status read_ids(tp_ctx *ctx, const char *text, tp_tokens *out)
{
    while (*text != '\0') {
        size_t n = strcspn(text, ", ");
        char number[24];
        int64_t id;
        if (n > 0) {
            snprintf(number, sizeof number, "%.*s", (int)(n < 23 ? n : 23), text);
            if (n > 22 || !tp_parse_i64(number, &id) || id < 0 || id > INT32_MAX)
                return tp_fail(ctx, TP_INVALID, "--ids: expected token ids, got \"%s\"", number);
            TP_TRY(tp_tokens_push(ctx, out, (tp_token){.id = (int32_t)id}));
        }
        text += n + strspn(text + n, ", ");
    }
    return out->count > 0 ? TP_OK : tp_fail(ctx, TP_INVALID, "--ids: no token ids");
}

/* One user turn through the chat template, ending where the reply begins. An adapter brings the template it was trained by. */
static tp_status encode_chat(tp_ctx *ctx, const tp_args *args, const tp_tokenizer *tokenizer, tp_span text, tp_tokens *out)
{
    tp_prompt prompt;
    const char *adapter = tp_args_value(args, "adapter");
    char *own = adapter != NULL ? tp_cli_model_file(ctx, adapter, "chat_template.jinja") : NULL;
    TP_TRY(ctx->status);
    tp_status opened = tp_prompt_open(ctx, tokenizer, own != NULL ? own : "tokenizer_default", &prompt);
    tp_free(own);
    TP_TRY(opened);
    tp_status status = tp_prompt_encode_turn(ctx, &prompt, tokenizer, text, out);
    tp_prompt_close(&prompt);
    return status;
}

/* How a text becomes tokens. */
struct encoding {
    const tp_args *args;
    const tp_tokenizer *tokenizer;
};

static tp_status encode_text(tp_ctx *ctx, void *state, tp_span text, tp_tokens *out)
{
    const struct encoding *e = state;
    if (e->tokenizer == NULL) return tp_fail(ctx, TP_INVALID, "generate: the model has no tokenizer; prompts must be ids");
    if (tp_args_has(e->args, "chat")) return encode_chat(ctx, e->args, e->tokenizer, text, out);
    return tp_tokenizer_encode(ctx, e->tokenizer, text, TP_ENCODE_ADD_SPECIAL, out);
}

static tp_status one_prompt(tp_ctx *ctx, const tp_args *args, struct encoding *encoding, struct request *r)
{
    tp_span text = {"", 0};
    tp_tokens tokens = {0};
    tp_status status = prompt_text(ctx, args, r, &text);
    if (status == TP_OK && tp_args_has(args, "ids") && tp_args_has(args, "chat"))
        status = tp_fail(ctx, TP_INVALID, "--chat: without effect with --ids");
    if (status == TP_OK)
        status = tp_args_has(args, "ids") ? read_ids(ctx, tp_args_value(args, "ids"), &tokens)
                                          : encode_text(ctx, encoding, text, &tokens);
    if (status == TP_OK) status = tp_prompts_add(ctx, &r->prompts, &tokens);
    tp_tokens_free(&tokens);
    return status;
}

static tp_status make_prompts(tp_ctx *ctx, const tp_args *args, const tp_tokenizer *tokenizer, struct request *r)
{
    struct encoding encoding = {args, tokenizer};
    if (!r->rows) return one_prompt(ctx, args, &encoding, r);
    if (tp_args_has(args, "prompt") || tp_args_has(args, "ids"))
        return tp_fail(ctx, TP_INVALID, "generate: exactly one of --prompt, --file and --ids is needed");
    return tp_prompts_read(ctx, &r->prompts, tp_args_value(args, "file"), encode_text, &encoding);
}

/* ---- options ---- */

/* generation_config.json of the model folder, where it samples; else greedy. */
static tp_status sampling_defaults(tp_ctx *ctx, const char *model, tp_sampling *s)
{
    char *path = tp_cli_model_file(ctx, model, "generation_config.json");
    tp_json_doc *doc = NULL;
    bool samples = false;
    *s = TP_SAMPLING_GREEDY;
    if (path == NULL) return ctx->status;
    tp_status status = tp_json_read(ctx, path, (size_t)1 << 20, &doc);
    const tp_json *root = doc != NULL ? tp_json_root(doc) : NULL;
    if (status == TP_OK) status = tp_json_need_bool(ctx, doc, root, "do_sample", false, &samples);
    if (status == TP_OK)
        status = tp_json_need_f64(ctx, doc, root, "repetition_penalty", false, 0.01, 100, &s->repetition_penalty);
    if (status == TP_OK && samples) {
        s->temperature = 1;
        s->top_k = 50; /* the library's own default */
        status = tp_json_need_f64(ctx, doc, root, "temperature", false, 0, 100, &s->temperature);
        if (status == TP_OK) status = tp_json_need_i64(ctx, doc, root, "top_k", false, 0, INT32_MAX, &s->top_k);
        if (status == TP_OK) status = tp_json_need_f64(ctx, doc, root, "top_p", false, 0, 1, &s->top_p);
        if (status == TP_OK) status = tp_json_need_f64(ctx, doc, root, "min_p", false, 0, 1, &s->min_p);
    }
    tp_json_free(doc);
    tp_free(path);
    return status;
}

static tp_status read_options(tp_ctx *ctx, const tp_args *args, struct request *r)
{
    tp_sampling *s = &r->options.sampling;
    int64_t seed = 42;
    r->options.max_tokens = 256;
    TP_TRY(sampling_defaults(ctx, args->positional[0], s));
    TP_TRY(tp_args_i64(ctx, args, "max-tokens", 1, 1 << 24, &r->options.max_tokens));
    TP_TRY(tp_args_f64(ctx, args, "temperature", 0, 100, &s->temperature));
    TP_TRY(tp_args_i64(ctx, args, "top-k", 0, INT32_MAX, &s->top_k));
    TP_TRY(tp_args_f64(ctx, args, "top-p", 0, 1, &s->top_p));
    TP_TRY(tp_args_f64(ctx, args, "min-p", 0, 1, &s->min_p));
    TP_TRY(tp_args_f64(ctx, args, "repetition-penalty", 0.01, 100, &s->repetition_penalty));
    TP_TRY(tp_args_i64(ctx, args, "seed", 0, INT64_MAX, &seed));
    s->seed = (uint64_t)seed;
    for (size_t i = 0; tp_args_value_at(args, "stop", i) != NULL; i++) {
        if (i == MAX_STOPS) return tp_fail(ctx, TP_INVALID, "--stop: at most %d", MAX_STOPS);
        if (*tp_args_value_at(args, "stop", i) == '\0') return tp_fail(ctx, TP_INVALID, "--stop: an empty string");
        r->stops[i] = tp_args_value_at(args, "stop", i);
    }
    r->options.stop = r->stops;
    return TP_OK;
}

/* ---- output ---- */

/* JSON comes as a whole at the end, but every piece is an occasion to stop. */
static bool emit(void *state, const char *text, size_t n)
{
    struct request *r = state;
    if (!r->json && !r->rows && (fwrite(text, 1, n, stdout) != n || fflush(stdout) != 0)) r->write_error = errno;
    return r->write_error == 0 && *r->stop == 0;
}

static tp_status print_json(tp_ctx *ctx, const tp_generated *g)
{
    static const char *const reasons[] = {
        [TP_FINISH_STOP] = "stop", [TP_FINISH_LENGTH] = "length", [TP_FINISH_CANCELLED] = "cancelled"};
    tp_buf out;
    tp_buf_init(&out, 0);
    tp_buf_text(&out, "{\"ids\": [");
    for (size_t i = 0; i < g->n; i++) tp_buf_printf(&out, "%s%d", i > 0 ? ", " : "", (int)g->ids[i]);
    tp_buf_text(&out, "], \"text\": ");
    tp_json_write_string(&out, tp_buf_cstr(&g->text), g->text.len);
    tp_buf_printf(&out, ", \"finish_reason\": \"%s\"}\n", reasons[g->finish]);
    tp_status status = tp_buf_status(ctx, &out, "result");
    if (status == TP_OK) status = tp_cli_print(ctx, out.data, out.len);
    tp_buf_free(&out);
    return status;
}

/* Replies wait for those to earlier prompts. */
struct replies {
    tp_ctx *ctx;
    struct request *request;
    tp_generated *all; /* [prompts] */
    bool *ready;
    size_t printed, tokens;
    tp_status status;
};

static bool take_reply(void *state, size_t index, tp_generated *reply)
{
    struct replies *replies = state;
    struct request *r = replies->request;
    replies->all[index] = *reply;
    replies->ready[index] = true;
    replies->tokens += reply->n;
    while (replies->status == TP_OK && r->write_error == 0 && replies->printed < r->prompts.n &&
           replies->ready[replies->printed]) {
        tp_generated *next = &replies->all[replies->printed++];
        if (*r->stop == 0 || !r->rows) /* or it may be cut off */
            replies->status = r->json || r->rows ? print_json(replies->ctx, next) : tp_cli_print(replies->ctx, "\n", 1);
        tp_generated_free(next);
    }
    return replies->status == TP_OK && r->write_error == 0 && *r->stop == 0;
}

static tp_status generate_with(tp_ctx *ctx, tp_generator *generator, const tp_tokenizer *tokenizer, struct request *r)
{
    struct replies replies = {.ctx = ctx, .request = r};
    replies.all = tp_alloc(ctx, r->prompts.n, sizeof *replies.all);
    replies.ready = tp_alloc(ctx, r->prompts.n, sizeof *replies.ready);
    tp_status status = replies.all != NULL && replies.ready != NULL ? TP_OK : TP_NOMEM;
    if (status == TP_OK)
        status = tp_generate_all(ctx, generator, tokenizer, r->prompts.items, r->prompts.n, &r->options, take_reply, &replies);
    if (status == TP_OK) status = replies.status;
    if (status == TP_OK && r->write_error != 0) status = tp_fail(ctx, TP_IO_WRITE, "stdout: %s", strerror(r->write_error));
    if (status == TP_OK && *r->stop != 0) status = tp_fail(ctx, TP_PREEMPTED, "stopped after %zu tokens", replies.tokens);
    for (size_t i = 0; replies.all != NULL && i < r->prompts.n; i++) tp_generated_free(&replies.all[i]);
    tp_free(replies.all);
    tp_free(replies.ready);
    return status;
}

static tp_status generate_on(tp_ctx *ctx, tp_model *model, const tp_tokenizer *tokenizer, struct request *r)
{
    tp_generator *generator;
    int64_t ends[TP_MAX_ENDS], context = (int64_t)r->prompts.longest + r->options.max_tokens;
    if (context > model->config.max_positions) context = model->config.max_positions;
    if ((int64_t)r->prompts.longest >= context)
        return tp_fail(ctx, TP_SHAPE, "the prompt has %zu tokens, the model's context %lld", r->prompts.longest,
                       (long long)model->config.max_positions);
    r->options.eos_ids = ends;
    r->options.n_eos = tp_end_tokens(model, tokenizer, ends);
    r->options.emit = emit;
    r->options.emit_state = r;
    r->stop = tp_cli_catch_stop();
    TP_TRY(tp_generator_open_many(ctx, model, context, r->prompts.n, &generator));
    tp_status status = generate_with(ctx, generator, tokenizer, r);
    tp_generator_close(generator);
    return status;
}

static tp_status run(tp_ctx *ctx, const tp_args *args)
{
    const char *file = tp_args_value(args, "file");
    struct request r = {.json = tp_args_has(args, "json"), .rows = file != NULL && tp_row_path_holds_objects(file)};
    tp_tokenizer *tokenizer = NULL;
    tp_cli_model opened = {0};
    tp_status status = read_options(ctx, args, &r);
    if (status == TP_OK) status = tp_tokenizer_for(ctx, args->positional[0], &tokenizer);
    if (status == TP_IO_READ &&
        (r.rows || (r.json && tp_args_has(args, "ids")))) { /* ids in, ids out: no tokenizer is needed */
        tp_ctx_clear(ctx);
        status = TP_OK;
    }
    if (status == TP_OK) status = make_prompts(ctx, args, tokenizer, &r);
    if (status == TP_OK) status = tp_cli_model_open(ctx, args, args->positional[0], &opened);
    if (status == TP_OK) status = generate_on(ctx, opened.model, tokenizer, &r);
    tp_cli_model_close(&opened);
    tp_prompts_free(&r.prompts);
    tp_tokenizer_free(tokenizer);
    tp_free(r.text);
    return status;
}

static const tp_flag flags[] = {
    {"adapter", "DIR", false, false, "a PEFT adapter folder"},
    {"prompt", "TEXT", false, false, "encoded as it is, special tokens recognised"},
    {"file", "FILE", false, false, "the prompt is the file's text; - reads standard input; .jsonl or .csv: a prompt per row"},
    {"ids", "I,J,...", false, false, "the prompt as token ids"},
    {"chat", NULL, false, false, "the prompt is one user turn, rendered by the chat template"},
    {"max-tokens", "N", false, false, "new tokens at most (default 256)"},
    {"temperature", "T", false, false, "0: greedy"},
    {"top-k", "K", false, false, "sample among the K likeliest (0: all)"},
    {"top-p", "P", false, false, "sample among the likeliest that reach probability P"},
    {"min-p", "P", false, false, "leave out what is less likely than P times the best"},
    {"repetition-penalty", "R", false, false, "above 1: repeat less"},
    {"stop", "TEXT", false, true, "end before this text"},
    {"seed", "N", false, false, "of sampling (default 42)"},
    TP_FLAG_JSON,
    TP_FLAG_PRECISION,
    TP_FLAG_DEVICE,
    TP_FLAG_THREADS,
    TP_FLAG_FORCE,
    TP_FLAG_END,
};

const tp_command tp_command_generate = {
    "generate", "MODEL --prompt TEXT [--chat] [--adapter DIR] ...", "generate text from a prompt", flags, 1, 1, run};
