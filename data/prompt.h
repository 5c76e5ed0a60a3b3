/* The chat template of a run, ready to render: compiled text plus the tokenizer's special tokens as variables. Training,
 * preview and generation all come through here, so that the ids before a reply are the same in each. */
#ifndef TP_DATA_PROMPT_H
#define TP_DATA_PROMPT_H

#include "data/chat.h"
#include "data/tokenizer.h"

typedef struct tp_prompt {
    tp_template *tmpl;        /* NULL: "none" */
    tp_chat_variable *tokens; /* bos_token, eos_token, ... */
    size_t n_tokens;
    tp_template_time now; /* what strftime_now sees */
} tp_prompt;

/* choice: "tokenizer_default", "chatml", "alpaca", "none", or the path of a template file. INVALID if the tokenizer has no
 * template of its own and tokenizer_default is asked for; IO_READ and FORMAT for files. */
TP_API tp_status tp_prompt_open(tp_ctx *ctx, const tp_tokenizer *tokenizer, const char *choice,
                                tp_prompt *prompt) TP_MUST_CHECK;
TP_API void tp_prompt_close(tp_prompt *prompt);
/* Fills in template variables, clock and limits of an input whose messages are set. */
TP_API void tp_prompt_fill(const tp_prompt *prompt, tp_chat_input *input);
/* Tokens of one user turn through the template, ending where the reply begins, in place of what `tokens` held. */
TP_API tp_status tp_prompt_encode_turn(tp_ctx *ctx, const tp_prompt *prompt, const tp_tokenizer *tokenizer, tp_span text,
                                       tp_tokens *tokens) TP_MUST_CHECK;

#endif
