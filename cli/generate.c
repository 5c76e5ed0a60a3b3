/* tapeft generate MODEL: the new text on stdout, nothing else. */
#include <errno.h>
#include <string.h>

#include "base/json.h"
#include "base/mem.h"
#include "cli/open.h"
#include "cli/signals.h"
#include "data/prompt.h"
#include "data/source.h"
#include "inference/generate.h"

#define PROMPT_MAX_BYTES ((size_t)64 << 20)
#define MAX_STOPS        16

struct request {
    tp_generate_options options;
    tp_tokens prompt;
    const char *stops[MAX_STOPS + 1];
    char *text; /* of --file; owned */
    bool json;
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

/* One user turn through the chat template, ending where the reply begins. */
static tp_status encode_chat(tp_ctx *ctx, const tp_tokenizer *tokenizer, tp_span text, tp_tokens *out)
{
    tp_prompt prompt;
    TP_TRY(tp_prompt_open(ctx, tokenizer, "tokenizer_default", &prompt));
    tp_status status = tp_prompt_encode_turn(ctx, &prompt, tokenizer, text, out);
    tp_prompt_close(&prompt);
    return status;
}

static tp_status make_prompt(tp_ctx *ctx, const tp_args *args, const tp_tokenizer *tokenizer, struct request *r)
{
    tp_span text = {"", 0};
    TP_TRY(prompt_text(ctx, args, r, &text));
    if (tp_args_has(args, "ids")) return read_ids(ctx, tp_args_value(args, "ids"), &r->prompt);
    if (tp_args_has(args, "chat")) return encode_chat(ctx, tokenizer, text, &r->prompt);
    return tp_tokenizer_encode(ctx, tokenizer, text, TP_ENCODE_ADD_SPECIAL, &r->prompt);
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
    if (!r->json && (fwrite(text, 1, n, stdout) != n || fflush(stdout) != 0)) r->write_error = errno;
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

static tp_status print_result(tp_ctx *ctx, const struct request *r, const tp_generated *result)
{
    if (r->write_error != 0) return tp_fail(ctx, TP_IO_WRITE, "stdout: %s", strerror(r->write_error));
    TP_TRY(r->json ? print_json(ctx, result) : tp_cli_print(ctx, "\n", 1));
    return *r->stop == 0 ? TP_OK : tp_fail(ctx, TP_PREEMPTED, "stopped after %zu tokens", result->n);
}

static tp_status generate_on(tp_ctx *ctx, tp_model *model, const tp_tokenizer *tokenizer, struct request *r)
{
    tp_generator *generator;
    tp_generated result;
    int64_t ends[TP_MAX_ENDS], context = (int64_t)r->prompt.count + r->options.max_tokens;
    if (context > model->config.max_positions) context = model->config.max_positions;
    if ((int64_t)r->prompt.count >= context)
        return tp_fail(ctx, TP_SHAPE, "the prompt has %zu tokens, the model's context %lld", r->prompt.count,
                       (long long)model->config.max_positions);
    r->options.eos_ids = ends;
    r->options.n_eos = tp_end_tokens(model, tokenizer, ends);
    r->options.emit = emit;
    r->options.emit_state = r;
    r->stop = tp_cli_catch_stop();
    int32_t *ids = tp_alloc(ctx, r->prompt.count, sizeof *ids);
    if (ids == NULL) return TP_NOMEM;
    for (size_t i = 0; i < r->prompt.count; i++) ids[i] = r->prompt.items[i].id;
    tp_status status = tp_generator_open(ctx, model, context, &generator);
    if (status == TP_OK) {
        status = tp_generate(ctx, generator, tokenizer, ids, r->prompt.count, &r->options, &result);
        if (status == TP_OK) {
            status = print_result(ctx, r, &result);
            tp_generated_free(&result);
        }
        tp_generator_close(generator);
    }
    tp_free(ids);
    return status;
}

static tp_status run(tp_ctx *ctx, const tp_args *args)
{
    struct request r = {.json = tp_args_has(args, "json")};
    tp_tokenizer *tokenizer = NULL;
    tp_cli_model opened = {0};
    tp_status status = read_options(ctx, args, &r);
    if (status == TP_OK) status = tp_tokenizer_for(ctx, args->positional[0], &tokenizer);
    if (status == TP_IO_READ && r.json && tp_args_has(args, "ids")) { /* ids in, ids out: no tokenizer is needed */
        tp_ctx_clear(ctx);
        status = TP_OK;
    }
    if (status == TP_OK) status = make_prompt(ctx, args, tokenizer, &r);
    if (status == TP_OK) status = tp_cli_model_open(ctx, args, args->positional[0], &opened);
    if (status == TP_OK) status = generate_on(ctx, opened.model, tokenizer, &r);
    tp_cli_model_close(&opened);
    tp_tokens_free(&r.prompt);
    tp_tokenizer_free(tokenizer);
    tp_free(r.text);
    return status;
}

static const tp_flag flags[] = {
    {"adapter", "DIR", false, false, "a PEFT adapter folder"},
    {"prompt", "TEXT", false, false, "encoded as it is, special tokens recognised"},
    {"file", "FILE", false, false, "the prompt is the file's text; - reads standard input"},
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
