/* From spans of text to labels of tokens. */
#include "data/mask.h"

#include <stdlib.h>

#include "base/mem.h"

/* ---- samples ---- */

void tp_sample_clear(tp_sample *s)
{
    tp_buf_clear(&s->text);
    s->n_trained = 0;
    s->rendered = false;
}

void tp_sample_free(tp_sample *s)
{
    tp_buf_free(&s->text);
    tp_free(s->trained);
    *s = (tp_sample){0};
}

tp_status tp_sample_train(tp_ctx *ctx, tp_sample *s, size_t begin, size_t end, size_t limit)
{
    TP_TRY(tp_grow(ctx, &s->trained, &s->capacity, s->n_trained + 1, sizeof *s->trained));
    s->trained[s->n_trained++] = (tp_trained){begin, end, limit};
    return TP_OK;
}

/* ---- turns of a conversation ---- */

/* Bytes [begin, end) are what stems from a message; end 0: nothing does. Behind limit the next message begins. */
struct turn {
    size_t begin, end, limit;
};

static void find_turns(const tp_chat_text *text, struct turn *turns)
{
    for (size_t i = 0; i < text->n_spans; i++) {
        const tp_template_span *span = &text->spans[i];
        struct turn *turn = &turns[span->message];
        if (span->begin >= span->end) continue;
        if (turn->end == 0 || span->begin < turn->begin) turn->begin = span->begin;
        if (span->end < turn->end) continue;
        turn->end = span->end;
        size_t next = i + 1;
        turn->limit = next < text->n_spans ? text->spans[next].begin : text->text.len;
    }
}

static int by_place(const void *left, const void *right)
{
    const tp_trained *a = left, *b = right;
    if (a->begin != b->begin) return a->begin < b->begin ? -1 : 1;
    return (a->end > b->end) - (a->end < b->end);
}

/* The message of each marked range is the one that the text in it stems from. A range without such text belongs to the next
 * message of the assistant. */
static tp_status train_marked(tp_ctx *ctx, const tp_chat_text *text, const uint8_t *messages, size_t n_messages,
                              tp_sample *sample)
{
    size_t at = 0, message = 0; /* span; first message that is still to come */
    for (size_t g = 0; g < text->n_generation; g++) {
        const tp_template_range *range = &text->generation[g];
        while (at < text->n_spans && text->spans[at].end <= range->begin) {
            if (text->spans[at].message >= message) message = text->spans[at].message + 1;
            at++;
        }
        if (at < text->n_spans && text->spans[at].begin < range->end) {
            message = text->spans[at].message;
        } else {
            while (message < n_messages && (messages[message] & TP_MESSAGE_ASSISTANT) == 0) message++;
        }
        if (range->begin < range->end && message < n_messages && (messages[message] & TP_MESSAGE_TRAINED) != 0)
            TP_TRY(tp_sample_train(ctx, sample, range->begin, range->end, range->end));
        message += message < n_messages;
    }
    return TP_OK;
}

static tp_status train_turns(tp_ctx *ctx, const struct turn *turns, const uint8_t *messages, size_t n_messages, bool marked,
                             tp_sample *sample)
{
    for (size_t i = 0; i < n_messages; i++) {
        if ((messages[i] & TP_MESSAGE_TRAINED) == 0 || turns[i].end == 0) continue;
        if (marked && (messages[i] & TP_MESSAGE_ASSISTANT) != 0) continue;
        TP_TRY(tp_sample_train(ctx, sample, turns[i].begin, turns[i].end, turns[i].limit));
    }
    return TP_OK;
}

tp_status tp_sample_from_chat(tp_ctx *ctx, const tp_chat_text *text, const uint8_t *messages, size_t n_messages, bool marked,
                              tp_sample *sample)
{
    tp_sample_clear(sample);
    sample->rendered = true;
    tp_buf_append(&sample->text, tp_buf_cstr(&text->text), text->text.len);
    TP_TRY(tp_buf_status(ctx, &sample->text, "row"));
    struct turn *turns = tp_alloc(ctx, n_messages, sizeof *turns);
    if (turns == NULL) return TP_NOMEM;
    find_turns(text, turns);
    tp_status status = marked ? train_marked(ctx, text, messages, n_messages, sample) : TP_OK;
    if (status == TP_OK) status = train_turns(ctx, turns, messages, n_messages, marked, sample);
    if (status == TP_OK && sample->n_trained > 1) qsort(sample->trained, sample->n_trained, sizeof *sample->trained, by_place);
    tp_free(turns);
    return status;
}

/* ---- encoding ---- */

void tp_encoded_free(tp_encoded *e)
{
    tp_tokens_free(&e->tokens);
    tp_free(e->ids);
    tp_free(e->labels);
    *e = (tp_encoded){0};
}

bool tp_ends_turn(const tp_tokenizer *tokenizer, int32_t id)
{
    if (id == tp_tokenizer_role(tokenizer, TP_TOKEN_EOS)) return true;
    return tp_tokenizer_is_special(tokenizer, id) && id != tp_tokenizer_role(tokenizer, TP_TOKEN_BOS);
}

static tp_status encode_piece(tp_ctx *ctx, const tp_tokenizer *tokenizer, const tp_sample *s, size_t begin, size_t end,
                              unsigned flags, tp_tokens *tokens)
{
    size_t first = (flags & TP_ENCODE_APPEND) != 0 ? tokens->count : 0;
    TP_TRY(tp_tokenizer_encode(ctx, tokenizer, (tp_span){tp_buf_cstr(&s->text) + begin, end - begin}, flags, tokens));
    for (size_t i = first; i < tokens->count; i++) {
        tokens->items[i].begin += begin;
        tokens->items[i].end += begin;
    }
    return TP_OK;
}

/* The post-processor may end each text with eos; behind the last piece, and only there, it is put by hand. */
static void drop_added_eos(const tp_tokenizer *tokenizer, tp_tokens *tokens)
{
    if (tokens->count == 0) return;
    const tp_token *last = &tokens->items[tokens->count - 1];
    if (last->begin == last->end && last->id == tp_tokenizer_role(tokenizer, TP_TOKEN_EOS) && tp_tokenizer_adds_eos(tokenizer))
        tokens->count--;
}

static tp_status encode_pieces(tp_ctx *ctx, const tp_tokenizer *tokenizer, const tp_sample *s, size_t begin, size_t end,
                               bool cut, tp_tokens *tokens)
{
    unsigned flags = begin == 0 && !s->rendered ? TP_ENCODE_ADD_SPECIAL : TP_ENCODE_PLAIN;
    size_t at = begin, i = 0;
    tokens->count = 0;
    do {
        size_t next = end;
        while (i < s->n_trained && s->trained[i].begin <= at) i++;
        if (cut && i < s->n_trained && s->trained[i].begin < end) next = s->trained[i].begin;
        TP_TRY(encode_piece(ctx, tokenizer, s, at, next, flags | TP_ENCODE_APPEND, tokens));
        if ((flags & TP_ENCODE_ADD_SPECIAL) != 0) drop_added_eos(tokenizer, tokens);
        flags = TP_ENCODE_PLAIN;
        at = next;
    } while (at < end);
    int32_t eos = tp_tokenizer_role(tokenizer, TP_TOKEN_EOS);
    if (s->rendered || end != s->text.len || eos < 0) return TP_OK;
    return tp_tokens_push(ctx, tokens, (tp_token){.id = eos, .begin = end, .end = end});
}

/* First token that begins at `place` or behind. */
static size_t token_at(const tp_tokens *tokens, size_t place)
{
    size_t low = 0, high = tokens->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (tokens->items[middle].begin < place)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Where the stretch ends once its end-of-turn token is counted in. */
static size_t extended_end(const tp_tokenizer *tokenizer, const tp_tokens *tokens, const tp_trained *t)
{
    size_t other = 0;
    int32_t eos = tp_tokenizer_role(tokenizer, TP_TOKEN_EOS);
    for (size_t i = token_at(tokens, t->end); i < tokens->count && tokens->items[i].begin < t->limit; i++) {
        const tp_token *token = &tokens->items[i];
        if (token->id == eos) return token->end;
        if (other == 0 && tp_ends_turn(tokenizer, token->id)) other = token->end;
    }
    return other != 0 ? other : t->end;
}

static void label_stretch(const tp_tokenizer *tokenizer, const tp_trained *t, tp_encoded *e)
{
    const tp_token *items = e->tokens.items;
    size_t end = t->limit > t->end ? extended_end(tokenizer, &e->tokens, t) : t->end;
    size_t i = token_at(&e->tokens, t->begin);
    while (i > 0 && items[i - 1].end > t->begin) i--;
    for (; i < e->tokens.count && items[i].begin < end; i++) e->labels[i] = items[i].id;
}

static void finish_labels(const tp_tokenizer *tokenizer, tp_encoded *e)
{
    e->n_labels = 0;
    e->learns_end = false;
    for (size_t i = 0; i < e->tokens.count; i++) {
        e->ids[i] = e->tokens.items[i].id;
        if (i == 0) e->labels[i] = TP_NO_LABEL; /* nothing precedes it that could predict it */
        if (e->labels[i] == TP_NO_LABEL) continue;
        e->n_labels++;
        if (tp_ends_turn(tokenizer, e->ids[i])) e->learns_end = true;
    }
}

tp_status tp_sample_encode(tp_ctx *ctx, const tp_tokenizer *tokenizer, const tp_sample *s, size_t begin, size_t end, bool cut,
                           tp_encoded *e)
{
    TP_TRY(encode_pieces(ctx, tokenizer, s, begin, end, cut, &e->tokens));
    TP_TRY(tp_grow(ctx, &e->ids, &e->ids_capacity, e->tokens.count, sizeof *e->ids));
    TP_TRY(tp_grow(ctx, &e->labels, &e->labels_capacity, e->tokens.count, sizeof *e->labels));
    for (size_t i = 0; i < e->tokens.count; i++) e->labels[i] = TP_NO_LABEL;
    for (size_t i = 0; i < s->n_trained; i++) label_stretch(tokenizer, &s->trained[i], e);
    bool eos_added = !s->rendered && end == s->text.len && tp_tokenizer_role(tokenizer, TP_TOKEN_EOS) >= 0;
    if (eos_added) e->labels[e->tokens.count - 1] = e->tokens.items[e->tokens.count - 1].id;
    finish_labels(tokenizer, e);
    return TP_OK;
}
