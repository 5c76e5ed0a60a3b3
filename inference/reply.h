/* The text of one reply while it grows: tokens come in one by one, text that is certain goes out, stop strings and end tokens
 * end it. */
#ifndef TP_INFERENCE_REPLY_H
#define TP_INFERENCE_REPLY_H

#include "inference/generate.h"

typedef struct tp_reply {
    const tp_generate_options *options;
    tp_stream_decoder *decoder; /* NULL: no text */
    int32_t *all;               /* prompt and reply: what the repetition penalty counts */
    size_t n_prompt, emitted;
    bool ended;
    tp_generated out; /* without its ids until tp_reply_take */
} tp_reply;

/* tokenizer may be NULL. Prompt is copied. */
tp_status tp_reply_open(tp_ctx *ctx, const tp_tokenizer *tokenizer, const int32_t *prompt, size_t n_prompt,
                        const tp_generate_options *options, tp_reply *reply) TP_MUST_CHECK;
void tp_reply_close(tp_reply *reply);
/* The next token. Sets `ended` if it is the last one: by an end token, a stop string, max_tokens, or because emit wants no
 * more. */
tp_status tp_reply_accept(tp_ctx *ctx, tp_reply *reply, int32_t id) TP_MUST_CHECK;
/* The reply as it is now, which is its end; the caller's to free. */
tp_status tp_reply_take(tp_ctx *ctx, tp_reply *reply, tp_generated *out) TP_MUST_CHECK;

#endif
