/* The chain of stages.
 *
 * Until a joining stage (byte level, fuse, join) every event is a whole token; behind it, events are fragments of the one
 * token that the whole text has become. Stages that cannot work on fragments make the joining stage before them wait
 * for the end (`whole`). */
#include "data/decode.h"

#include "base/mem.h"
#include "data/byte_level.h"
#include "data/unicode.h"

struct flow {
    tp_ctx *ctx;
    tp_decode_walk *walk;
    tp_buf *out;
};

static tp_status enter(struct flow *f, size_t stage, tp_span text, bool fragment);

static tp_span span_of(const tp_buf *buf)
{
    return (tp_span){tp_buf_cstr(buf), buf->len};
}

static bool at_text(tp_span text, size_t at, tp_span pattern)
{
    return text.len - at >= pattern.len && memcmp(text.data + at, pattern.data, pattern.len) == 0;
}

/* ---- byte level ---- */

static void append_bytes(tp_buf *held, tp_span token)
{
    size_t before = held->len;
    for (size_t i = 0; i < token.len;) {
        uint32_t c;
        i += tp_char_next(token.data + i, token.len - i, &c);
        int byte = tp_char_to_byte(c);
        if (byte < 0) { /* no text of the byte alphabet: the token stands for itself */
            if (!held->failed) held->len = before;
            tp_buf_append(held, token.data, token.len);
            return;
        }
        tp_buf_char(held, (char)byte);
    }
}

/* Length of the part of a character that text[0..n) begins with but does not complete; 0 if no continuation can make
 * it valid. Each such part, and each other bad byte, becomes one U+FFFD. */
static size_t cut_char(const char *text, size_t n, bool *may_continue)
{
    const unsigned char *s = (const unsigned char *)text;
    size_t need = s[0] >= 0xc2 && s[0] < 0xe0 ? 2 : s[0] >= 0xe0 && s[0] < 0xf0 ? 3 : s[0] >= 0xf0 && s[0] < 0xf5 ? 4 : 0;
    *may_continue = false;
    if (need == 0) return 1;
    unsigned char low = s[0] == 0xe0   ? 0xa0
                        : s[0] == 0xf0 ? 0x90
                                       : 0x80,
                  high = s[0] == 0xed   ? 0x9f
                         : s[0] == 0xf4 ? 0x8f
                                        : 0xbf;
    size_t i = 1;
    while (i < need && i < n && s[i] >= (i == 1 ? low : 0x80) && s[i] <= (i == 1 ? high : 0xbf)) i++;
    *may_continue = i == n && i < need;
    return i;
}

/* Moves the text of `held` to `work` as UTF-8; the beginning of a character at the end stays, unless this is the end. */
static void take_utf8(tp_buf *held, tp_buf *work, bool end)
{
    size_t i = 0;
    tp_buf_clear(work);
    while (i < held->len) {
        size_t valid = tp_utf8_valid_prefix(held->data + i, held->len - i);
        tp_buf_append(work, held->data + i, valid);
        i += valid;
        if (i == held->len) break;
        bool may_continue;
        size_t bad = cut_char(held->data + i, held->len - i, &may_continue);
        if (may_continue && !end) break;
        tp_buf_text(work, "\xef\xbf\xbd");
        i += bad;
    }
    if (held->data != NULL) memmove(held->data, held->data + i, held->len - i + 1);
    held->len -= i;
}

static tp_status pass_utf8(struct flow *f, size_t stage, bool end)
{
    tp_decode_state *state = &f->walk->states[stage];
    bool whole = f->walk->decoder->stages[stage].whole;
    TP_TRY(tp_buf_status(f->ctx, &state->held, "decoded text"));
    if (whole && !end) return TP_OK;
    take_utf8(&state->held, &state->work, end);
    TP_TRY(tp_buf_status(f->ctx, &state->work, "decoded text"));
    return enter(f, stage + 1, span_of(&state->work), !whole);
}

/* ---- byte fallback ---- */

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* The byte that a token "<0xE2>" names, or -1. */
static int named_byte(tp_span token)
{
    if (token.len != 6 || memcmp(token.data, "<0x", 3) != 0 || token.data[5] != '>') return -1;
    int high = hex_digit(token.data[3]), low = hex_digit(token.data[4]);
    return high < 0 || low < 0 ? -1 : high * 16 + low;
}

static tp_status pass_run(struct flow *f, size_t stage)
{
    tp_decode_state *state = &f->walk->states[stage];
    TP_TRY(tp_buf_status(f->ctx, &state->held, "decoded text"));
    size_t n = state->held.len;
    if (n == 0) return TP_OK;
    if (tp_utf8_valid_prefix(state->held.data, n) == n) {
        TP_TRY(enter(f, stage + 1, span_of(&state->held), false));
    } else {
        for (size_t i = 0; i < n; i++) TP_TRY(enter(f, stage + 1, tp_span_of("\xef\xbf\xbd"), false));
    }
    tp_buf_clear(&state->held);
    return TP_OK;
}

static tp_status byte_fallback(struct flow *f, size_t stage, tp_span token)
{
    int byte = named_byte(token);
    if (byte >= 0) {
        tp_buf_char(&f->walk->states[stage].held, (char)byte);
        return TP_OK;
    }
    TP_TRY(pass_run(f, stage));
    return enter(f, stage + 1, token, false);
}

/* ---- replacing ---- */

/* Appends to `work`, if that is not more than a file may make of the text. */
static tp_status write_text(struct flow *f, tp_buf *work, const char *text, size_t n)
{
    if (n > f->walk->room)
        return tp_fail(f->ctx, TP_UNSUPPORTED, "decoded text: the decoder's steps make more than %d bytes of each one",
                       TP_DECODE_GROWTH);
    f->walk->room -= n;
    tp_buf_append(work, text, n);
    return TP_OK;
}

static tp_status replace_text(struct flow *f, tp_buf *work, tp_span text, tp_span pattern, tp_span content)
{
    size_t done = 0;
    tp_buf_clear(work);
    while (done < text.len && pattern.len > 0) {
        const char *found = memmem(text.data + done, text.len - done, pattern.data, pattern.len);
        if (found == NULL) break;
        TP_TRY(write_text(f, work, text.data + done, (size_t)(found - text.data) - done));
        TP_TRY(write_text(f, work, content.data, content.len));
        done = (size_t)(found - text.data) + pattern.len;
    }
    return write_text(f, work, text.data + done, text.len - done);
}

static tp_status replace_matches(struct flow *f, tp_buf *work, tp_span text, const tp_regex *regex, tp_span content)
{
    tp_regex_walk walk;
    size_t done = 0, begin, end;
    bool found = true;
    tp_buf_clear(work);
    tp_status status = tp_regex_begin(f->ctx, regex, text.data, text.len, &f->walk->budget, &walk);
    while (status == TP_OK) {
        status = tp_regex_next(f->ctx, &walk, &found, &begin, &end);
        if (status != TP_OK || !found) break;
        status = write_text(f, work, text.data + done, begin - done);
        if (status == TP_OK) status = write_text(f, work, content.data, content.len);
        done = end;
    }
    tp_regex_end(&walk);
    return status == TP_OK ? write_text(f, work, text.data + done, text.len - done) : status;
}

static tp_status pass_replaced(struct flow *f, size_t stage, tp_span text, tp_span content)
{
    const tp_decode_stage *s = &f->walk->decoder->stages[stage];
    tp_buf *work = &f->walk->states[stage].work;
    if (s->regex != NULL)
        TP_TRY(replace_matches(f, work, text, s->regex, content));
    else
        TP_TRY(replace_text(f, work, text, s->pattern, content));
    TP_TRY(tp_buf_status(f->ctx, work, "decoded text"));
    return enter(f, stage + 1, span_of(work), false);
}

static tp_status metaspace(struct flow *f, size_t stage, tp_span token)
{
    bool first = f->walk->states[stage].n_tokens == 0;
    return pass_replaced(f, stage, token,
                         first && f->walk->decoder->stages[stage].strip_first ? tp_span_of("") : tp_span_of(" "));
}

/* The last token is treated differently, so each one waits for the next. */
static tp_status suffix(struct flow *f, size_t stage, tp_span token)
{
    tp_decode_state *state = &f->walk->states[stage];
    if (state->any) TP_TRY(pass_replaced(f, stage, span_of(&state->held), tp_span_of(" ")));
    tp_buf_clear(&state->held);
    tp_buf_append(&state->held, token.data, token.len);
    return tp_buf_status(f->ctx, &state->held, "decoded text");
}

/* ---- joining and stripping ---- */

static tp_status join(struct flow *f, size_t stage, tp_span text, const char *between)
{
    tp_decode_state *state = &f->walk->states[stage];
    bool whole = f->walk->decoder->stages[stage].whole;
    if (!whole && *between == '\0') return enter(f, stage + 1, text, true);
    if (state->any) tp_buf_text(&state->held, between);
    tp_buf_append(&state->held, text.data, text.len);
    TP_TRY(tp_buf_status(f->ctx, &state->held, "decoded text"));
    if (whole) return TP_OK;
    TP_TRY(enter(f, stage + 1, span_of(&state->held), true));
    tp_buf_clear(&state->held);
    return TP_OK;
}

static tp_status strip_token(struct flow *f, size_t stage, tp_span text)
{
    const tp_decode_stage *s = &f->walk->decoder->stages[stage];
    size_t from = 0, to = text.len;
    for (size_t i = 0; i < s->start && from < to && at_text(text, from, s->pattern); i++) from += s->pattern.len;
    for (size_t i = 0; i < s->stop && to - from >= s->pattern.len && at_text(text, to - s->pattern.len, s->pattern); i++)
        to -= s->pattern.len;
    return enter(f, stage + 1, (tp_span){text.data + from, to - from}, false);
}

/* Of the joined text: the first `start` characters are dropped as they come, the last `stop` wait for what follows. */
static tp_status strip_fragment(struct flow *f, size_t stage, tp_span text)
{
    const tp_decode_stage *s = &f->walk->decoder->stages[stage];
    tp_decode_state *state = &f->walk->states[stage];
    while (!state->begun && text.len > 0) {
        if (state->stripped >= s->start || !at_text(text, 0, s->pattern)) {
            state->begun = true;
            break;
        }
        state->stripped++;
        text.data += s->pattern.len;
        text.len -= s->pattern.len;
    }
    if (s->stop == 0) return enter(f, stage + 1, text, true);
    tp_buf_append(&state->held, text.data, text.len);
    TP_TRY(tp_buf_status(f->ctx, &state->held, "decoded text"));
    size_t sure = state->held.len;
    for (size_t i = 0;
         i < s->stop && sure >= s->pattern.len && at_text(span_of(&state->held), sure - s->pattern.len, s->pattern); i++)
        sure -= s->pattern.len;
    if (sure == 0) return TP_OK;
    TP_TRY(enter(f, stage + 1, (tp_span){state->held.data, sure}, true));
    memmove(state->held.data, state->held.data + sure, state->held.len - sure + 1);
    state->held.len -= sure;
    return TP_OK;
}

/* ---- the chain ---- */

static tp_status enter(struct flow *f, size_t stage, tp_span text, bool fragment)
{
    if (stage == f->walk->decoder->count) {
        tp_buf_append(f->out, text.data, text.len);
        return tp_buf_status(f->ctx, f->out, "decoded text");
    }
    const tp_decode_stage *s = &f->walk->decoder->stages[stage];
    tp_decode_state *state = &f->walk->states[stage];
    tp_status status = TP_OK;
    switch (s->kind) {
    case TP_DECODE_BYTE_LEVEL:
        append_bytes(&state->held, text);
        status = pass_utf8(f, stage, false);
        break;
    case TP_DECODE_REPLACE:
    case TP_DECODE_REPLACE_REGEX: status = pass_replaced(f, stage, text, s->content); break;
    case TP_DECODE_BYTE_FALLBACK: status = byte_fallback(f, stage, text); break;
    case TP_DECODE_FUSE: status = join(f, stage, text, ""); break;
    case TP_DECODE_JOIN: status = join(f, stage, text, fragment ? "" : " "); break;
    case TP_DECODE_STRIP: status = fragment ? strip_fragment(f, stage, text) : strip_token(f, stage, text); break;
    case TP_DECODE_METASPACE: status = metaspace(f, stage, text); break;
    case TP_DECODE_SUFFIX: status = suffix(f, stage, text); break;
    }
    state->any = true;
    state->n_tokens++;
    return status;
}

static tp_status finish_stage(struct flow *f, size_t stage)
{
    const tp_decode_stage *s = &f->walk->decoder->stages[stage];
    tp_decode_state *state = &f->walk->states[stage];
    if (s->kind == TP_DECODE_BYTE_LEVEL) return pass_utf8(f, stage, true);
    if (s->kind == TP_DECODE_BYTE_FALLBACK) return pass_run(f, stage);
    if (s->kind == TP_DECODE_SUFFIX && state->any) return pass_replaced(f, stage, span_of(&state->held), tp_span_of(""));
    if ((s->kind == TP_DECODE_FUSE || s->kind == TP_DECODE_JOIN) && s->whole)
        return enter(f, stage + 1, span_of(&state->held), false);
    return TP_OK; /* what a strip holds at the end is what it takes off */
}

tp_status tp_decode_push(tp_ctx *ctx, tp_decode_walk *walk, tp_span token, tp_buf *out)
{
    struct flow f = {ctx, walk, out};
    if (!walk->running) {
        walk->running = true;
        walk->room = TP_DECODE_BASE;
        walk->budget = tp_regex_budget(0);
    }
    walk->room += TP_DECODE_GROWTH * (token.len + 1); /* a blank may come to each */
    walk->budget += tp_regex_budget(token.len) - tp_regex_budget(0);
    return enter(&f, 0, token, false);
}

static void start_over(tp_decode_state *state)
{
    tp_buf_clear(&state->held);
    tp_buf_clear(&state->work);
    state->n_tokens = state->stripped = 0;
    state->any = state->begun = false;
}

tp_status tp_decode_end(tp_ctx *ctx, tp_decode_walk *walk, tp_buf *out)
{
    struct flow f = {ctx, walk, out};
    tp_status status = TP_OK;
    for (size_t i = 0; i < walk->decoder->count; i++) {
        if (status == TP_OK) status = finish_stage(&f, i);
        start_over(&walk->states[i]);
    }
    walk->running = false;
    return status;
}

void tp_decode_walk_free(tp_decode_walk *walk)
{
    for (size_t i = 0; i < TP_DECODE_STAGES; i++) {
        tp_buf_free(&walk->states[i].held);
        tp_buf_free(&walk->states[i].work);
    }
    *walk = (tp_decode_walk){0};
}

/* ---- building ---- */

tp_status tp_decoder_add(tp_ctx *ctx, tp_decoder *decoder, const char *where, const tp_decode_stage *stage)
{
    if (decoder->count >= TP_DECODE_STAGES)
        return tp_fail(ctx, TP_UNSUPPORTED, "%s: more than %d stages", where, TP_DECODE_STAGES);
    tp_decode_stage *own = &decoder->stages[decoder->count++];
    *own = *stage;
    own->regex = NULL;
    own->content.data = NULL;
    own->pattern.data = tp_strndup(ctx, stage->pattern.data != NULL ? stage->pattern.data : "", stage->pattern.len);
    if (own->pattern.data == NULL) return TP_NOMEM;
    own->content.data = tp_strndup(ctx, stage->content.data != NULL ? stage->content.data : "", stage->content.len);
    if (own->content.data == NULL) return TP_NOMEM;
    if (stage->kind == TP_DECODE_REPLACE_REGEX) return tp_regex_new(ctx, where, stage->pattern, &own->regex);
    return TP_OK;
}

static bool joins(tp_decode_kind kind)
{
    return kind == TP_DECODE_BYTE_LEVEL || kind == TP_DECODE_FUSE || kind == TP_DECODE_JOIN;
}

void tp_decoder_finish(tp_decoder *decoder)
{
    bool later_needs_whole = false;
    for (size_t i = decoder->count; i-- > 0;) {
        tp_decode_kind kind = decoder->stages[i].kind;
        decoder->stages[i].whole = joins(kind) && later_needs_whole;
        later_needs_whole = later_needs_whole || (kind != TP_DECODE_FUSE && kind != TP_DECODE_JOIN && kind != TP_DECODE_STRIP);
    }
}

static void free_span(tp_span *span)
{
    char *data;
    memcpy(&data, &span->data, sizeof data); /* ours, though spans are const */
    tp_free(data);
}

void tp_decoder_free(tp_decoder *decoder)
{
    for (size_t i = 0; i < decoder->count; i++) {
        free_span(&decoder->stages[i].pattern);
        free_span(&decoder->stages[i].content);
        tp_regex_free(decoder->stages[i].regex);
    }
    *decoder = (tp_decoder){0};
}
