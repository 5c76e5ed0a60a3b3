/* What may be the beginning of a stop string is held back until more is known. */
#include "inference/reply.h"

#include <string.h>

#include "base/mem.h"

tp_status tp_reply_open(tp_ctx *ctx, const tp_tokenizer *tokenizer, const int32_t *prompt, size_t n_prompt,
                        const tp_generate_options *options, tp_reply *reply)
{
    *reply = (tp_reply){.options = options, .n_prompt = n_prompt};
    tp_buf_init(&reply->out.text, 0);
    reply->out.finish = TP_FINISH_LENGTH;
    reply->all = tp_alloc(ctx, n_prompt + (size_t)options->max_tokens, sizeof *reply->all);
    tp_status status = reply->all != NULL ? TP_OK : TP_NOMEM;
    if (status == TP_OK && tokenizer != NULL) status = tp_stream_decoder_new(ctx, tokenizer, true, &reply->decoder);
    if (status != TP_OK) {
        tp_reply_close(reply);
        return status;
    }
    memcpy(reply->all, prompt, n_prompt * sizeof *prompt);
    return TP_OK;
}

void tp_reply_close(tp_reply *reply)
{
    tp_stream_decoder_free(reply->decoder);
    tp_generated_free(&reply->out);
    tp_free(reply->all);
    *reply = (tp_reply){0};
}

/* Length of the longest end of `text` that could be the beginning of a stop string. */
static size_t held_back(const tp_generate_options *options, const char *text, size_t n)
{
    size_t most = 0;
    for (const char *const *stop = options->stop; stop != NULL && *stop != NULL; stop++) {
        size_t length = strlen(*stop);
        for (size_t k = length > n ? n : length; k > most; k--)
            if (memcmp(text + n - k, *stop, k) == 0) most = k;
    }
    return most;
}

/* Cuts the text at the first stop string; true if there was one. */
static bool cut_at_stop(tp_reply *r)
{
    const char *first = NULL;
    tp_buf *text = &r->out.text;
    for (const char *const *stop = r->options->stop; stop != NULL && *stop != NULL; stop++) {
        const char *found = **stop != '\0' && text->len > 0 ? memmem(text->data, text->len, *stop, strlen(*stop)) : NULL;
        if (found != NULL && (first == NULL || found < first)) first = found;
    }
    if (first == NULL) return false;
    text->len = (size_t)(first - text->data);
    text->data[text->len] = '\0';
    return true;
}

/* Hands out what is certain; false if the receiver wants no more. */
static bool flush(tp_reply *r, bool all)
{
    tp_buf *text = &r->out.text;
    size_t end = text->len - (all ? 0 : held_back(r->options, tp_buf_cstr(text), text->len));
    if (end <= r->emitted || r->options->emit == NULL) return true;
    bool more = r->options->emit(r->options->emit_state, text->data + r->emitted, end - r->emitted);
    r->emitted = end;
    return more;
}

static bool is_end(const tp_generate_options *options, int32_t id)
{
    for (int i = 0; i < options->n_eos; i++)
        if (options->eos_ids[i] == id) return true;
    return false;
}

static void end(tp_reply *r, tp_finish finish)
{
    r->ended = true;
    r->out.finish = finish;
}

tp_status tp_reply_accept(tp_ctx *ctx, tp_reply *r, int32_t id)
{
    r->all[r->n_prompt + r->out.n++] = id;
    if (is_end(r->options, id)) {
        end(r, TP_FINISH_STOP);
        return TP_OK;
    }
    if (r->decoder != NULL) TP_TRY(tp_stream_decoder_push(ctx, r->decoder, id, &r->out.text));
    if (cut_at_stop(r))
        end(r, TP_FINISH_STOP);
    else if (!flush(r, false))
        end(r, TP_FINISH_CANCELLED);
    else if (r->out.n == (size_t)r->options->max_tokens)
        end(r, TP_FINISH_LENGTH);
    return TP_OK;
}

tp_status tp_reply_take(tp_ctx *ctx, tp_reply *r, tp_generated *out)
{
    if (r->decoder != NULL && r->out.finish != TP_FINISH_CANCELLED) {
        TP_TRY(tp_stream_decoder_finish(ctx, r->decoder, &r->out.text));
        cut_at_stop(r);
        flush(r, true);
    }
    TP_TRY(tp_buf_status(ctx, &r->out.text, "generated text"));
    r->out.ids = tp_alloc(ctx, (size_t)r->options->max_tokens, sizeof *r->out.ids);
    if (r->out.ids == NULL) return TP_NOMEM;
    memcpy(r->out.ids, r->all + r->n_prompt, r->out.n * sizeof *r->out.ids);
    *out = r->out;
    r->out = (tp_generated){0};
    return TP_OK;
}
