/* Every cutting step tells a splitter which ranges match and which do not, from left to right without gaps; the splitter
 * turns that into pieces as the behavior says. So each source of matches is one short function, and each behavior one
 * case. */
#include "data/pretokenize.h"

#include "base/mem.h"
#include "data/byte_level.h"
#include "data/unicode.h"

struct splitter {
    tp_ctx *ctx;
    tp_ranges *out;
    tp_split_behavior behavior;
    bool invert;
    uint64_t *budget; /* of regexes */
    size_t first;     /* pieces in `out` that belong to earlier input */
    bool previous;    /* the last range was a match */
    tp_range held;    /* a match that waits for its successor (merged with next) */
    bool holding;
};

static tp_status push(struct splitter *s, size_t begin, size_t end)
{
    if (begin == end) return TP_OK;
    TP_TRY(tp_grow(s->ctx, &s->out->items, &s->out->capacity, s->out->count + 1, sizeof *s->out->items));
    s->out->items[s->out->count++] = (tp_range){begin, end};
    return TP_OK;
}

static tp_status extend_last(struct splitter *s, size_t begin, size_t end)
{
    if (s->out->count == s->first) return push(s, begin, end);
    s->out->items[s->out->count - 1].end = end;
    return TP_OK;
}

static tp_status release_held(struct splitter *s)
{
    if (!s->holding) return TP_OK;
    s->holding = false;
    return push(s, s->held.begin, s->held.end);
}

static tp_status merge_with_next(struct splitter *s, size_t begin, size_t end, bool match)
{
    if (!match && s->holding) {
        s->holding = false;
        return push(s, s->held.begin, end);
    }
    TP_TRY(release_held(s));
    if (!match) return push(s, begin, end);
    s->holding = true;
    s->held = (tp_range){begin, end};
    return TP_OK;
}

/* The next range of the input, and whether the pattern matched it. */
static tp_status tell(struct splitter *s, size_t begin, size_t end, bool match)
{
    tp_status status = TP_OK;
    match = match != s->invert;
    switch (s->behavior) {
    case TP_SPLIT_REMOVED: status = match ? TP_OK : push(s, begin, end); break;
    case TP_SPLIT_ISOLATED: status = push(s, begin, end); break;
    case TP_SPLIT_CONTIGUOUS: status = match == s->previous ? extend_last(s, begin, end) : push(s, begin, end); break;
    case TP_SPLIT_MERGED_WITH_PREVIOUS:
        status = match && !s->previous ? extend_last(s, begin, end) : push(s, begin, end);
        break;
    case TP_SPLIT_MERGED_WITH_NEXT: status = merge_with_next(s, begin, end, match); break;
    }
    s->previous = match;
    return status;
}

/* ---- where matches come from ---- */

static tp_status cut_by_scanner(struct splitter *s, const tp_scanner *scanner, tp_span text, tp_range piece)
{
    for (size_t at = piece.begin; at < piece.end;) {
        size_t end = tp_scanner_next(scanner, text.data, piece.end, at);
        TP_TRY(tell(s, at, end, true));
        at = end;
    }
    return TP_OK;
}

static tp_status cut_by_regex(struct splitter *s, const tp_regex *regex, tp_span text, tp_range piece)
{
    tp_regex_walk walk;
    size_t done = 0, begin, end, n = piece.end - piece.begin;
    bool found = true;
    tp_status status = tp_regex_begin(s->ctx, regex, text.data + piece.begin, n, s->budget, &walk);
    while (status == TP_OK) {
        status = tp_regex_next(s->ctx, &walk, &found, &begin, &end);
        if (status != TP_OK || !found) break;
        if (begin > done) status = tell(s, piece.begin + done, piece.begin + begin, false);
        if (status == TP_OK) status = tell(s, piece.begin + begin, piece.begin + end, true);
        done = end;
    }
    tp_regex_end(&walk);
    if (status == TP_OK && done < n) status = tell(s, piece.begin + done, piece.end, false);
    return status;
}

static tp_status cut_by_literal(struct splitter *s, tp_span pattern, tp_span text, tp_range piece)
{
    size_t done = piece.begin;
    while (done < piece.end) {
        const char *found = memmem(text.data + done, piece.end - done, pattern.data, pattern.len);
        if (found == NULL) break;
        size_t begin = (size_t)(found - text.data);
        if (begin > done) TP_TRY(tell(s, done, begin, false));
        TP_TRY(tell(s, begin, begin + pattern.len, true));
        done = begin + pattern.len;
    }
    return done < piece.end ? tell(s, done, piece.end, false) : TP_OK;
}

/* Every character with the property is a match of its own. */
static tp_status cut_by_property(struct splitter *s, bool (*property)(uint32_t), tp_span text, tp_range piece)
{
    size_t done = piece.begin;
    for (size_t at = piece.begin; at < piece.end;) {
        uint32_t c;
        size_t end = at + tp_char_next(text.data + at, piece.end - at, &c);
        if (property(c)) {
            if (at > done) TP_TRY(tell(s, done, at, false));
            TP_TRY(tell(s, at, end, true));
            done = end;
        }
        at = end;
    }
    return done < piece.end ? tell(s, done, piece.end, false) : TP_OK;
}

/* \w+|[^\w\s]+ */
static tp_status cut_by_words(struct splitter *s, tp_span text, tp_range piece)
{
    enum { NONE, SPACE, WORD, OTHER } kind = NONE;
    size_t begin = piece.begin;
    for (size_t at = piece.begin; at < piece.end;) {
        uint32_t c;
        size_t length = tp_char_next(text.data + at, piece.end - at, &c);
        int now = tp_char_is_word(c) ? WORD : tp_char_is_space(c) ? SPACE : OTHER;
        if (now != (int)kind && at > begin) {
            TP_TRY(tell(s, begin, at, kind != SPACE));
            begin = at;
        }
        kind = now;
        at += length;
    }
    return begin < piece.end ? tell(s, begin, piece.end, kind != SPACE) : TP_OK;
}

static tp_status cut_piece(struct splitter *s, const tp_cut_step *step, tp_span text, tp_range piece)
{
    switch (step->kind) {
    case TP_CUT_SCANNER: return cut_by_scanner(s, step->scanner, text, piece);
    case TP_CUT_REGEX: return cut_by_regex(s, step->regex, text, piece);
    case TP_CUT_LITERAL: return cut_by_literal(s, step->pattern, text, piece);
    case TP_CUT_DIGITS: return cut_by_property(s, tp_char_is_number, text, piece);
    case TP_CUT_PUNCTUATION: return cut_by_property(s, tp_char_is_punctuation, text, piece);
    case TP_CUT_SPACES: return cut_by_property(s, tp_char_is_space, text, piece);
    case TP_CUT_WORDS: return cut_by_words(s, text, piece);
    default: return tp_fail(s->ctx, TP_INTERNAL, "pre-tokenizer step %d", (int)step->kind);
    }
}

static tp_status cut(tp_ctx *ctx, const tp_cut_step *step, tp_layers *layers, tp_pieces *pieces)
{
    tp_span text = tp_layers_top(layers);
    pieces->next.count = 0;
    for (size_t i = 0; i < pieces->now.count; i++) {
        struct splitter s = {.ctx = ctx,
                             .out = &pieces->next,
                             .behavior = step->behavior,
                             .invert = step->invert,
                             .budget = &layers->budget,
                             .first = pieces->next.count};
        TP_TRY(cut_piece(&s, step, text, pieces->now.items[i]));
        TP_TRY(release_held(&s));
    }
    tp_ranges swap = pieces->now;
    pieces->now = pieces->next;
    pieces->next = swap;
    return TP_OK;
}

/* ---- steps that rewrite ---- */

static bool begins_with(tp_span text, tp_range piece, tp_span prefix)
{
    return piece.end - piece.begin >= prefix.len && memcmp(text.data + piece.begin, prefix.data, prefix.len) == 0;
}

static void write_bytes(tp_layer *layer, tp_span text, tp_range piece)
{
    for (size_t i = piece.begin; i < piece.end; i++) {
        char bytes[4];
        uint32_t c = tp_byte_to_char((unsigned char)text.data[i]);
        if (c < 0x80)
            tp_layer_keep(layer, text.data + i, 1, i);
        else
            tp_layer_replace(layer, bytes, (size_t)tp_utf8_encode(c, bytes), i, 1);
    }
}

static void write_metaspace(tp_layer *layer, tp_span mark, tp_span text, tp_range piece)
{
    for (size_t i = piece.begin; i < piece.end;) {
        const char *blank = memchr(text.data + i, ' ', piece.end - i);
        size_t end = blank != NULL ? (size_t)(blank - text.data) : piece.end;
        tp_layer_keep(layer, text.data + i, end - i, i);
        if (blank != NULL) tp_layer_replace(layer, mark.data, mark.len, end++, 1);
        i = end;
    }
}

static bool wants_metaspace(const tp_cut_step *step, tp_layers *layers, tp_span text, tp_range piece)
{
    if (step->scheme == TP_PREPEND_NEVER) return false;
    if (begins_with(text, piece, step->pattern) || text.data[piece.begin] == ' ') return false;
    if (step->scheme == TP_PREPEND_ALWAYS) return true;
    size_t begin = piece.begin, end = piece.end;
    tp_layers_origin(layers, &begin, &end);
    return begin == 0;
}

static void write_piece(const tp_cut_step *step, tp_layers *layers, tp_layer *layer, tp_span text, tp_range piece)
{
    switch (step->kind) {
    case TP_CUT_BYTE_LEVEL: write_bytes(layer, text, piece); break;
    case TP_CUT_METASPACE:
        if (wants_metaspace(step, layers, text, piece))
            tp_layer_replace(layer, step->pattern.data, step->pattern.len, piece.begin, 0);
        write_metaspace(layer, step->pattern, text, piece);
        break;
    default:
        if (text.data[piece.begin] != ' ') tp_layer_replace(layer, " ", 1, piece.begin, 0);
        tp_layer_keep(layer, text.data + piece.begin, piece.end - piece.begin, piece.begin);
    }
}

static bool changes_nothing(const tp_cut_step *step, tp_span text, const tp_pieces *pieces)
{
    if (step->kind != TP_CUT_PREFIX_SPACE) return false;
    for (size_t i = 0; i < pieces->now.count; i++)
        if (text.data[pieces->now.items[i].begin] != ' ') return false;
    return true;
}

static tp_status rewrite(tp_ctx *ctx, const tp_cut_step *step, tp_layers *layers, tp_pieces *pieces)
{
    tp_layer *layer;
    tp_span text = tp_layers_top(layers);
    tp_ranges *now = &pieces->now;
    if (now->count == 0 || changes_nothing(step, text, pieces)) return TP_OK;
    size_t from = now->items[0].begin, until = now->items[now->count - 1].end;
    TP_TRY(tp_layers_open(ctx, layers, from, &layer));
    for (size_t i = 0; i < now->count; i++) {
        size_t begin = layer->text.len;
        write_piece(step, layers, layer, text, now->items[i]);
        now->items[i] = (tp_range){begin, layer->text.len};
    }
    return tp_layers_close(ctx, layers, until);
}

/* ---- */

static bool rewrites(tp_cut_kind kind)
{
    return kind >= TP_CUT_PREFIX_SPACE;
}

tp_status tp_pretokenize(tp_ctx *ctx, const tp_pretokenizer *pre, tp_layers *layers, size_t begin, size_t end,
                         tp_pieces *pieces)
{
    pieces->now.count = 0;
    if (begin == end) return TP_OK;
    TP_TRY(tp_grow(ctx, &pieces->now.items, &pieces->now.capacity, 1, sizeof *pieces->now.items));
    pieces->now.items[0] = (tp_range){begin, end};
    pieces->now.count = 1;
    for (size_t i = 0; i < pre->count; i++) {
        const tp_cut_step *step = &pre->steps[i];
        if (rewrites(step->kind))
            TP_TRY(rewrite(ctx, step, layers, pieces));
        else
            TP_TRY(cut(ctx, step, layers, pieces));
    }
    return TP_OK;
}

void tp_pieces_free(tp_pieces *pieces)
{
    tp_free(pieces->now.items);
    tp_free(pieces->next.items);
    *pieces = (tp_pieces){0};
}

/* ---- building ---- */

tp_status tp_pretokenizer_add(tp_ctx *ctx, tp_pretokenizer *pre, const char *where, const tp_cut_step *step)
{
    if (pre->count >= TP_CUT_STEPS) return tp_fail(ctx, TP_UNSUPPORTED, "%s: more than %d steps", where, TP_CUT_STEPS);
    if ((step->kind == TP_CUT_LITERAL || step->kind == TP_CUT_METASPACE) && step->pattern.len == 0)
        return tp_fail(ctx, TP_UNSUPPORTED, "%s: an empty pattern", where);
    TP_TRY(tp_grow(ctx, &pre->steps, &pre->capacity, pre->count + 1, sizeof *pre->steps));
    tp_cut_step *own = &pre->steps[pre->count++];
    *own = *step;
    own->regex = NULL;
    own->pattern = (tp_span){NULL, step->pattern.len};
    own->pattern.data = tp_strndup(ctx, step->pattern.data != NULL ? step->pattern.data : "", step->pattern.len);
    if (own->pattern.data == NULL) return TP_NOMEM;
    if (step->kind != TP_CUT_REGEX) return TP_OK;
    own->scanner = tp_scanner_find(step->pattern);
    if (own->scanner == NULL) return tp_regex_new(ctx, where, step->pattern, &own->regex);
    own->kind = TP_CUT_SCANNER;
    return TP_OK;
}

void tp_pretokenizer_drop_last(tp_pretokenizer *pre)
{
    tp_cut_step *step = &pre->steps[--pre->count];
    char *pattern;
    memcpy(&pattern, &step->pattern.data, sizeof pattern); /* ours, though spans are const */
    tp_free(pattern);
    tp_regex_free(step->regex);
}

void tp_pretokenizer_free(tp_pretokenizer *pre)
{
    while (pre->count > 0) tp_pretokenizer_drop_last(pre);
    tp_free(pre->steps);
    *pre = (tp_pretokenizer){0};
}
