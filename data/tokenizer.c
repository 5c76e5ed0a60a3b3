/* Runs the parts of a tokenizer one after the other. */
#include <stdio.h>

#include "base/mem.h"
#include "data/tokenizer_parts.h"

/* ---- building ---- */

tp_status tp_tokenizer_new(tp_ctx *ctx, const char *name, tp_tokenizer **out)
{
    *out = NULL;
    tp_tokenizer *t = tp_alloc(ctx, 1, sizeof *t);
    if (t == NULL) return TP_NOMEM;
    for (int i = 0; i < TP_ROLES; i++) t->roles[i] = -1;
    t->name = tp_strdup(ctx, name);
    if (t->name == NULL) {
        tp_tokenizer_free(t);
        return TP_NOMEM;
    }
    *out = t;
    return TP_OK;
}

static void free_texts(tp_named_texts *list)
{
    for (size_t i = 0; i < list->count; i++) {
        tp_free(list->items[i].name);
        tp_free(list->items[i].text);
    }
    tp_free(list->items);
}

void tp_tokenizer_free(tp_tokenizer *t)
{
    if (t == NULL) return;
    if (t->model != NULL) t->model->free(t->model_state);
    tp_vocabulary_free(&t->vocabulary);
    tp_added_set_free(&t->raw);
    tp_added_set_free(&t->normalized);
    tp_normalizer_free(&t->normalizer);
    tp_pretokenizer_free(&t->pretokenizer);
    tp_postprocessor_free(&t->post);
    tp_decoder_free(&t->decoder);
    free_texts(&t->named);
    free_texts(&t->templates);
    tp_free(t->special);
    tp_free(t->name);
    tp_free(t);
}

tp_status tp_named_texts_add(tp_ctx *ctx, tp_named_texts *list, tp_span name, tp_span text)
{
    TP_TRY(tp_grow(ctx, &list->items, &list->capacity, list->count + 1, sizeof *list->items));
    tp_named_text *item = &list->items[list->count];
    item->name = tp_strndup(ctx, name.data, name.len);
    item->text = item->name != NULL ? tp_strndup(ctx, text.data, text.len) : NULL;
    item->n = text.len;
    if (item->text == NULL) {
        tp_free(item->name);
        return TP_NOMEM;
    }
    list->count++;
    return TP_OK;
}

static tp_status add_normalized_token(tp_ctx *ctx, tp_tokenizer *t, const tp_added_token *token)
{
    tp_layers layers = {0};
    tp_normalize_scratch scratch = {0};
    tp_added_token changed = *token;
    tp_layers_start(&layers, token->content.data, token->content.len, 0);
    tp_status status = tp_normalize(ctx, &t->normalizer, &scratch, &layers);
    changed.content = tp_layers_top(&layers);
    if (status == TP_OK) status = tp_added_set_add(ctx, &t->normalized, &changed);
    tp_layers_free(&layers);
    tp_normalize_scratch_free(&scratch);
    return status;
}

tp_status tp_tokenizer_add_token(tp_ctx *ctx, tp_tokenizer *t, const tp_added_token *token)
{
    if (!token->normalized) return tp_added_set_add(ctx, &t->raw, token);
    return add_normalized_token(ctx, t, token);
}

static void mark_special(tp_tokenizer *t, const tp_added_set *set)
{
    for (size_t i = 0; i < set->count; i++)
        if (set->tokens[i].special) t->special[set->tokens[i].id] = 1;
}

/* Tokens whose content the normalizer changes are shown by what it makes of them. As in the reference library they are
 * then no longer the special tokens that they were listed as when it comes to skipping. */
static void show_normalized(tp_tokenizer *t)
{
    for (size_t i = 0; i < t->normalized.count; i++) {
        const tp_added_token *token = &t->normalized.tokens[i];
        if (tp_span_equal(t->vocabulary.tokens[token->id], token->content)) continue;
        t->vocabulary.tokens[token->id] = token->content;
        t->special[token->id] = 0;
    }
}

void tp_tokenizer_identify(tp_tokenizer *t, const char *name, const void *bytes, size_t n)
{
    char text[256], digest[65];
    tp_sha256_hex(bytes, n, digest);
    int length = snprintf(text, sizeof text, "%s %s %.100s", t->identity, digest, name);
    tp_sha256_hex(text, (size_t)length, t->identity);
}

const char *tp_tokenizer_identity(const tp_tokenizer *t)
{
    return t->identity;
}

tp_status tp_tokenizer_finish(tp_ctx *ctx, tp_tokenizer *t)
{
    TP_TRY(tp_added_set_finish(ctx, &t->raw));
    TP_TRY(tp_added_set_finish(ctx, &t->normalized));
    t->special = tp_alloc(ctx, t->vocabulary.size, 1);
    if (t->special == NULL) return TP_NOMEM;
    mark_special(t, &t->raw);
    mark_special(t, &t->normalized);
    show_normalized(t);
    if (t->decoder.count == 0) {
        tp_decode_stage join = {.kind = TP_DECODE_JOIN};
        TP_TRY(tp_decoder_add(ctx, &t->decoder, t->name, &join));
    }
    tp_decoder_finish(&t->decoder);
    return TP_OK;
}

/* ---- scratch ---- */

tp_status tp_tokens_push(tp_ctx *ctx, tp_tokens *tokens, tp_token token)
{
    if (tokens->count == tokens->capacity)
        TP_TRY(tp_grow(ctx, &tokens->items, &tokens->capacity, tokens->count + 1, sizeof *tokens->items));
    tokens->items[tokens->count++] = token;
    return TP_OK;
}

void tp_tokens_free(tp_tokens *tokens)
{
    struct tp_encode_scratch *s = tokens->scratch;
    if (s != NULL) {
        tp_layers_free(&s->layers);
        tp_free(s->raw.items);
        tp_free(s->normalized.items);
        tp_pieces_free(&s->pieces);
        tp_normalize_scratch_free(&s->normalize);
        tp_bpe_scratch_free(&s->bpe);
        tp_free(s);
    }
    tp_free(tokens->items);
    *tokens = (tp_tokens){0};
}

/* The scratch of `tokens`, made on first use; its word cache is emptied when the tokenizer is another one. */
static tp_status prepare(tp_ctx *ctx, const tp_tokenizer *t, tp_tokens *tokens)
{
    if (tokens->scratch == NULL) tokens->scratch = tp_alloc(ctx, 1, sizeof *tokens->scratch);
    if (tokens->scratch == NULL) return TP_NOMEM;
    if (tokens->scratch->fingerprint != t->fingerprint) tp_bpe_scratch_clear(&tokens->scratch->bpe);
    tokens->scratch->fingerprint = t->fingerprint;
    return TP_OK;
}

/* ---- encoding ---- */

struct encoding {
    tp_ctx *ctx;
    const tp_tokenizer *t;
    struct tp_encode_scratch *scratch;
    tp_tokens *out;
    tp_span text;
    bool special_as_text;
    int32_t type_id;
};

static tp_status push_added(struct encoding *e, int32_t id, size_t begin, size_t end)
{
    return tp_tokens_push(e->ctx, e->out, (tp_token){.id = id, .type_id = e->type_id, .begin = begin, .end = end});
}

/* Pieces of bytes [begin, end) of the top layer through the model. */
static tp_status encode_pieces(struct encoding *e, size_t begin, size_t end)
{
    tp_layers *layers = &e->scratch->layers;
    const tp_ranges *pieces = &e->scratch->pieces.now;
    size_t n_layers = layers->count, first = e->out->count;
    TP_TRY(tp_pretokenize(e->ctx, &e->t->pretokenizer, layers, begin, end, &e->scratch->pieces));
    const char *text = tp_layers_top(layers).data;
    for (size_t i = 0; i < pieces->count; i++)
        TP_TRY(e->t->model->encode(e->ctx, e->t->model_state, e->scratch, text, pieces->items[i].begin, pieces->items[i].end,
                                   e->out));
    for (size_t i = first; i < e->out->count; i++) {
        tp_layers_origin(layers, &e->out->items[i].begin, &e->out->items[i].end);
        e->out->items[i].type_id = e->type_id;
    }
    tp_layers_cut(layers, n_layers);
    return TP_OK;
}

/* Text between the added tokens of the raw text. */
static tp_status encode_segment(struct encoding *e, size_t begin, size_t end)
{
    tp_layers *layers = &e->scratch->layers;
    tp_segments *segments = &e->scratch->normalized;
    tp_layers_start(layers, e->text.data + begin, end - begin, begin);
    TP_TRY(tp_normalize(e->ctx, &e->t->normalizer, &e->scratch->normalize, layers));
    tp_span top = tp_layers_top(layers);
    segments->count = 0;
    TP_TRY(tp_added_split(e->ctx, &e->t->normalized, e->special_as_text, top.data, 0, top.len, segments));
    for (size_t i = 0; i < segments->count; i++) {
        tp_segment segment = segments->items[i];
        if (segment.token == NULL) {
            TP_TRY(encode_pieces(e, segment.begin, segment.end));
        } else {
            tp_layers_origin(layers, &segment.begin, &segment.end);
            TP_TRY(push_added(e, segment.token->id, segment.begin, segment.end));
        }
    }
    return TP_OK;
}

static tp_status encode_text(struct encoding *e)
{
    tp_segments *segments = &e->scratch->raw;
    size_t valid = tp_utf8_valid_prefix(e->text.data, e->text.len);
    if (valid != e->text.len) return tp_fail(e->ctx, TP_INVALID, "text to encode: byte %zu is not valid UTF-8", valid);
    segments->count = 0;
    e->scratch->layers.budget = tp_regex_budget(e->text.len);
    TP_TRY(tp_added_split(e->ctx, &e->t->raw, e->special_as_text, e->text.data, 0, e->text.len, segments));
    for (size_t i = 0; i < segments->count; i++) {
        const tp_segment *segment = &segments->items[i];
        if (segment->token != NULL)
            TP_TRY(push_added(e, segment->token->id, segment->begin, segment->end));
        else
            TP_TRY(encode_segment(e, segment->begin, segment->end));
    }
    return TP_OK;
}

/* Inserted tokens stand for nothing: an empty place at the beginning of the first text until that has come, then at the
 * end of the last text that has. */
static tp_status run_template(struct encoding *e, const tp_template *template_, tp_span first, tp_span second, bool add_special)
{
    size_t place = 0;
    for (size_t i = 0; i < template_->count; i++) {
        const tp_template_item *item = &template_->items[i];
        e->type_id = item->type_id;
        if (item->kind == TP_TEMPLATE_SPECIAL) {
            if (add_special) TP_TRY(push_added(e, item->id, place, place));
            continue;
        }
        e->text = item->kind == TP_TEMPLATE_FIRST ? first : second;
        TP_TRY(encode_text(e));
        place = e->text.len;
    }
    return TP_OK;
}

static const tp_template_item alone[] = {{TP_TEMPLATE_FIRST, 0, 0}};
static const tp_template_item both[] = {{TP_TEMPLATE_FIRST, 0, 0}, {TP_TEMPLATE_SECOND, 0, 1}};

static tp_status encode(tp_ctx *ctx, const tp_tokenizer *t, const tp_template *own, const tp_template_item *plain,
                        size_t n_plain, tp_span first, tp_span second, unsigned flags, tp_tokens *tokens)
{
    TP_TRY(prepare(ctx, t, tokens));
    if ((flags & TP_ENCODE_APPEND) == 0) tokens->count = 0;
    struct encoding e = {.ctx = ctx,
                         .t = t,
                         .scratch = tokens->scratch,
                         .out = tokens,
                         .special_as_text = (flags & TP_ENCODE_SPECIAL_AS_TEXT) != 0};
    if (own->count > 0) return run_template(&e, own, first, second, (flags & TP_ENCODE_ADD_SPECIAL) != 0);
    for (size_t i = 0; i < n_plain; i++) {
        e.text = plain[i].kind == TP_TEMPLATE_FIRST ? first : second;
        e.type_id = plain[i].type_id;
        TP_TRY(encode_text(&e));
    }
    return TP_OK;
}

tp_status tp_tokenizer_encode(tp_ctx *ctx, const tp_tokenizer *t, tp_span text, unsigned flags, tp_tokens *tokens)
{
    return encode(ctx, t, &t->post.single, alone, 1, text, (tp_span){"", 0}, flags, tokens);
}

tp_status tp_tokenizer_encode_pair(tp_ctx *ctx, const tp_tokenizer *t, tp_span first, tp_span second, unsigned flags,
                                   tp_tokens *tokens)
{
    return encode(ctx, t, &t->post.pair, both, 2, first, second, flags, tokens);
}

/* ---- decoding ---- */

struct tp_stream_decoder {
    const tp_tokenizer *tokenizer;
    bool skip_special;
    tp_decode_walk walk;
};

static tp_status push_id(tp_ctx *ctx, const tp_tokenizer *t, tp_decode_walk *walk, int32_t id, bool skip_special, tp_buf *out)
{
    tp_span token = tp_vocabulary_text(&t->vocabulary, id);
    if (token.data == NULL || (skip_special && t->special[id])) return TP_OK;
    return tp_decode_push(ctx, walk, token, out);
}

tp_status tp_tokenizer_decode(tp_ctx *ctx, const tp_tokenizer *t, const int32_t *ids, size_t n, bool skip_special, tp_buf *out)
{
    tp_decode_walk walk = {.decoder = &t->decoder};
    tp_status status = TP_OK;
    for (size_t i = 0; i < n && status == TP_OK; i++) status = push_id(ctx, t, &walk, ids[i], skip_special, out);
    if (status == TP_OK) status = tp_decode_end(ctx, &walk, out);
    tp_decode_walk_free(&walk);
    return status;
}

tp_status tp_stream_decoder_new(tp_ctx *ctx, const tp_tokenizer *tokenizer, bool skip_special, tp_stream_decoder **decoder)
{
    *decoder = tp_alloc(ctx, 1, sizeof **decoder);
    if (*decoder == NULL) return TP_NOMEM;
    (*decoder)->tokenizer = tokenizer;
    (*decoder)->skip_special = skip_special;
    (*decoder)->walk.decoder = &tokenizer->decoder;
    return TP_OK;
}

void tp_stream_decoder_free(tp_stream_decoder *decoder)
{
    if (decoder == NULL) return;
    tp_decode_walk_free(&decoder->walk);
    tp_free(decoder);
}

tp_status tp_stream_decoder_push(tp_ctx *ctx, tp_stream_decoder *decoder, int32_t id, tp_buf *out)
{
    return push_id(ctx, decoder->tokenizer, &decoder->walk, id, decoder->skip_special, out);
}

tp_status tp_stream_decoder_finish(tp_ctx *ctx, tp_stream_decoder *decoder, tp_buf *out)
{
    return tp_decode_end(ctx, &decoder->walk, out);
}

/* ---- queries ---- */

size_t tp_tokenizer_size(const tp_tokenizer *t)
{
    return t->vocabulary.size;
}
tp_span tp_tokenizer_token(const tp_tokenizer *t, int64_t id)
{
    return tp_vocabulary_text(&t->vocabulary, id);
}
int32_t tp_tokenizer_id(const tp_tokenizer *t, tp_span token)
{
    return tp_vocabulary_find_any(&t->vocabulary, token);
}

bool tp_tokenizer_is_special(const tp_tokenizer *t, int64_t id)
{
    return id >= 0 && (uint64_t)id < t->vocabulary.size && t->special[id] != 0;
}

int32_t tp_tokenizer_role(const tp_tokenizer *t, tp_token_role role)
{
    return t->roles[role];
}

tp_span tp_tokenizer_role_text(const tp_tokenizer *t, tp_token_role role)
{
    tp_span text = tp_vocabulary_text(&t->vocabulary, t->roles[role]);
    return text.data != NULL ? text : (tp_span){"", 0};
}

/* Whether the template for one text has the token before (or behind) the text. */
static bool template_has(const tp_tokenizer *t, int32_t id, bool behind)
{
    bool seen = false;
    for (size_t i = 0; i < t->post.single.count; i++) {
        const tp_template_item *item = &t->post.single.items[i];
        if (item->kind != TP_TEMPLATE_SPECIAL)
            seen = true;
        else if (id >= 0 && item->id == id && seen == behind)
            return true;
    }
    return false;
}

bool tp_tokenizer_adds_bos(const tp_tokenizer *t)
{
    return template_has(t, t->roles[TP_TOKEN_BOS], false);
}
bool tp_tokenizer_adds_eos(const tp_tokenizer *t)
{
    return template_has(t, t->roles[TP_TOKEN_EOS], true);
}

bool tp_tokenizer_named(const tp_tokenizer *t, size_t i, tp_span *name, tp_span *token)
{
    if (i >= t->named.count) return false;
    *name = tp_span_of(t->named.items[i].name);
    *token = (tp_span){t->named.items[i].text, t->named.items[i].n};
    return true;
}

tp_span tp_tokenizer_chat_template(const tp_tokenizer *t, const char *name)
{
    if (name == NULL) name = "default";
    for (size_t i = 0; i < t->templates.count; i++)
        if (strcmp(t->templates.items[i].name, name) == 0)
            return (tp_span){t->templates.items[i].text, t->templates.items[i].n};
    return (tp_span){NULL, 0};
}
