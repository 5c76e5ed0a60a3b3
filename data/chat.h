/* Conversations to text: the rules by which transformers.apply_chat_template feeds a chat template, with the origin of every
 * stretch of the text.
 *
 * Training and serving render through this one function, so that the text before a reply is the same in both. What of the text
 * stems from which message is tracked by the interpreter (data/template.h); the caller encodes the text without special tokens
 * and turns spans into labels:
 *   - where the template has {% generation %} blocks, text.generation says what the assistant wrote;
 *   - else the turn of message i is tp_chat_turn's range plus the first end-of-turn token behind it. */
#ifndef TP_DATA_CHAT_H
#define TP_DATA_CHAT_H

#include "data/template.h"

/* A message put together in C instead of read from JSON: instruction rows. */
typedef struct tp_chat_message {
    const char *role;
    tp_span content;
    tp_span reasoning; /* data NULL: none */
} tp_chat_message;

typedef struct tp_chat_variable {
    const char *name; /* bos_token, eos_token, ... */
    const char *text;
} tp_chat_variable;

/* What is rendered. Everything is borrowed for the call. Either `messages` (an array of objects) or `rows` is set. */
typedef struct tp_chat_input {
    const tp_json *messages;
    const tp_chat_message *rows;
    size_t n_rows;
    const tp_json *tools;     /* array of objects, or NULL: none */
    const tp_json *documents; /* array of objects, or NULL: none */
    const tp_json *kwargs;    /* object with further variables, or NULL; wins over tokens */
    const tp_chat_variable *tokens;
    size_t n_tokens;
    bool add_generation_prompt; /* end with what introduces a reply */
    /* Name of the field ("content", "reasoning_content") of the last message at whose end the text stops, so that a model goes
     * on writing it; NULL: no. Excludes add_generation_prompt. */
    const char *continue_final;
    tp_template_options options; /* clock and limits */
} tp_chat_input;

typedef tp_template_output tp_chat_text;

/* Renders the conversation. The rules of the reference: an empty conversation is refused; keys of a message whose value is null
 * are dropped; the first of reasoning_content, thinking and reasoning that is there is copied to reasoning_content, and to
 * thinking if that is absent; templates see messages, tools, documents (none if absent), add_generation_prompt, tokens and
 * kwargs. *out is initialised here and released with tp_template_output_free whatever happens. Errors: INVALID (the
 * conversation or the template's verdict on it; out->error, out->raised), NOMEM. */
TP_API tp_status tp_chat_render(tp_ctx *ctx, const tp_template *tmpl, const tp_chat_input *input,
                                tp_chat_text *out) TP_MUST_CHECK;

/* First and last byte of the text that stem from messages[message], whatever field; false if none does. Text of the template
 * between its fields, such as the tags around reasoning, lies inside. */
TP_API bool tp_chat_turn(const tp_chat_text *text, size_t message, size_t *begin, size_t *end);

/* The templates that come with tapeft: "chatml", "alpaca". NULL for other names. */
TP_API const char *tp_chat_builtin(const char *name);

#endif
