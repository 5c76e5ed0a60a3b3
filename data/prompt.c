/* Choosing and compiling the chat template. */
#include "data/prompt.h"

#include <time.h>

#include "base/file.h"
#include "base/mem.h"

static tp_status compile_choice(tp_ctx *ctx, const tp_tokenizer *tokenizer, const char *choice, tp_prompt *prompt)
{
    const char *builtin = tp_chat_builtin(choice);
    if (strcmp(choice, "none") == 0) return TP_OK;
    if (builtin != NULL) return tp_template_compile(ctx, choice, builtin, strlen(builtin), &prompt->tmpl);
    if (strcmp(choice, "tokenizer_default") == 0) {
        tp_span text = tp_tokenizer_chat_template(tokenizer, NULL);
        if (text.data == NULL)
            return tp_fail(ctx, TP_INVALID,
                           "chat_template: the tokenizer has no chat template; choose chatml, alpaca, none or a file");
        return tp_template_compile(ctx, "chat template", text.data, text.len, &prompt->tmpl);
    }
    char *text;
    size_t n;
    TP_TRY(tp_file_read(ctx, choice, TP_TEMPLATE_FILE_BYTES, &text, &n));
    tp_status status = tp_template_compile(ctx, choice, text, n, &prompt->tmpl);
    tp_free(text);
    return status;
}

static tp_status copy_tokens(tp_ctx *ctx, const tp_tokenizer *tokenizer, tp_prompt *prompt)
{
    size_t capacity = 0;
    tp_span name, token;
    for (size_t i = 0; tp_tokenizer_named(tokenizer, i, &name, &token); i++) {
        if (tp_span_is(name, "additional_special_tokens")) continue;
        TP_TRY(tp_grow(ctx, &prompt->tokens, &capacity, prompt->n_tokens + 1, sizeof *prompt->tokens));
        tp_chat_variable *v = &prompt->tokens[prompt->n_tokens];
        *v = (tp_chat_variable){tp_strndup(ctx, name.data, name.len), tp_strndup(ctx, token.data, token.len)};
        prompt->n_tokens++;
        if (v->name == NULL || v->text == NULL) return TP_NOMEM;
    }
    return TP_OK;
}

static tp_template_time clock_now(void)
{
    time_t seconds = time(NULL);
    struct tm tm;
    if (localtime_r(&seconds, &tm) == NULL) return (tp_template_time){2000, 1, 1, 0, 0, 0};
    return (tp_template_time){tm.tm_year + 1900, tm.tm_mon + 1, tm.tm_mday, tm.tm_hour, tm.tm_min, tm.tm_sec};
}

tp_status tp_prompt_open(tp_ctx *ctx, const tp_tokenizer *tokenizer, const char *choice, tp_prompt *prompt)
{
    *prompt = (tp_prompt){.now = clock_now()};
    tp_status status = compile_choice(ctx, tokenizer, choice, prompt);
    if (status == TP_OK) status = copy_tokens(ctx, tokenizer, prompt);
    if (status != TP_OK) tp_prompt_close(prompt);
    return status;
}

static void free_text(const char *text)
{
    void *memory;
    memcpy(&memory, &text, sizeof memory);
    tp_free(memory);
}

void tp_prompt_close(tp_prompt *prompt)
{
    for (size_t i = 0; i < prompt->n_tokens; i++) {
        free_text(prompt->tokens[i].name);
        free_text(prompt->tokens[i].text);
    }
    tp_free(prompt->tokens);
    tp_template_free(prompt->tmpl);
    *prompt = (tp_prompt){0};
}

void tp_prompt_fill(const tp_prompt *prompt, tp_chat_input *input)
{
    input->tokens = prompt->tokens;
    input->n_tokens = prompt->n_tokens;
    input->options.now = &prompt->now;
}

tp_status tp_prompt_encode_turn(tp_ctx *ctx, const tp_prompt *prompt, const tp_tokenizer *tokenizer, tp_span text,
                                tp_tokens *tokens)
{
    tp_chat_text rendered;
    tp_chat_message message = {.role = "user", .content = text};
    tp_chat_input input = {.rows = &message, .n_rows = 1, .add_generation_prompt = true};
    tp_prompt_fill(prompt, &input);
    tp_status status = tp_chat_render(ctx, prompt->tmpl, &input, &rendered);
    if (status == TP_OK)
        status = tp_tokenizer_encode(ctx, tokenizer, (tp_span){tp_buf_cstr(&rendered.text), rendered.text.len}, TP_ENCODE_PLAIN,
                                     tokens);
    tp_template_output_free(&rendered);
    return status;
}
