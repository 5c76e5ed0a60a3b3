/* One function per kind of step; each reads the top layer and writes the next. */
#include "data/normalize.h"

#include "base/mem.h"
#include "data/byte_level.h"

/* A layer being written: text before `kept` is done, text from there to the current place is still to be copied. */
struct rewrite {
    tp_span in;
    tp_layer *layer; /* NULL until something changes */
    size_t kept;
};

static void keep_until(struct rewrite *r, size_t at)
{
    tp_layer_keep(r->layer, r->in.data + r->kept, at - r->kept, r->kept);
    r->kept = at;
}

/* in[from, from + from_n) becomes bytes[0..n). */
static void change(struct rewrite *r, size_t from, size_t from_n, const char *bytes, size_t n)
{
    keep_until(r, from);
    tp_layer_replace(r->layer, bytes, n, from, from_n);
    r->kept = from + from_n;
}

static tp_status begin(tp_ctx *ctx, tp_layers *layers, struct rewrite *r)
{
    *r = (struct rewrite){.in = tp_layers_top(layers)};
    return tp_layers_open(ctx, layers, 0, &r->layer);
}

static tp_status finish(tp_ctx *ctx, tp_layers *layers, struct rewrite *r)
{
    keep_until(r, r->in.len);
    return tp_layers_close(ctx, layers, r->in.len);
}

static bool is_ascii(tp_span text)
{
    for (size_t i = 0; i < text.len; i++)
        if ((unsigned char)text.data[i] >= 0x80) return false;
    return true;
}

static tp_status normal_form(tp_ctx *ctx, tp_layers *layers, tp_normalize_scratch *scratch, tp_normal_form form)
{
    struct rewrite r;
    if (is_ascii(tp_layers_top(layers))) return TP_OK;
    TP_TRY(begin(ctx, layers, &r));
    for (size_t i = 0; i < r.in.len;) {
        const char *segment = r.in.data + i;
        size_t n = tp_normal_segment(segment, r.in.len - i, form);
        if (n > 1) {
            TP_TRY(tp_normal_convert(ctx, &scratch->chars, segment, n, form, &scratch->segment));
            if (scratch->segment.len != n || memcmp(scratch->segment.data, segment, n) != 0)
                change(&r, i, n, scratch->segment.data, scratch->segment.len);
        }
        i += n;
    }
    return finish(ctx, layers, &r);
}

/* Steps that look at one character at a time: what it becomes, as bytes. False: it stays. */
typedef bool (*mapping)(uint32_t c, tp_buf *becomes);

static bool lowered(uint32_t c, tp_buf *becomes)
{
    uint32_t lower[2];
    int n = tp_char_lower(c, lower);
    if (n == 1 && lower[0] == c) return false;
    for (int i = 0; i < n; i++) tp_buf_codepoint(becomes, lower[i]);
    return true;
}

static bool without_marks(uint32_t c, tp_buf *becomes)
{
    (void)becomes;
    return c >= 0x300 && tp_char_is_mark(c);
}

static bool without_nonspacing(uint32_t c, tp_buf *becomes)
{
    (void)becomes;
    return c >= 0x300 && tp_char_is_nonspacing(c);
}

static bool cleaned(uint32_t c, tp_buf *becomes)
{
    if (c == '\t' || c == '\n' || c == '\r' || (c != ' ' && tp_char_is_space(c) && !tp_char_is_other(c))) {
        tp_buf_char(becomes, ' ');
        return true;
    }
    return c == 0xfffd || tp_char_is_other(c);
}

static bool between_blanks(uint32_t c, tp_buf *becomes)
{
    if (!tp_char_is_cjk(c)) return false;
    tp_buf_char(becomes, ' ');
    tp_buf_codepoint(becomes, c);
    tp_buf_char(becomes, ' ');
    return true;
}

static tp_status map_chars(tp_ctx *ctx, tp_layers *layers, tp_normalize_scratch *scratch, mapping map)
{
    struct rewrite r;
    TP_TRY(begin(ctx, layers, &r));
    for (size_t i = 0; i < r.in.len;) {
        uint32_t c;
        size_t n = tp_char_next(r.in.data + i, r.in.len - i, &c);
        tp_buf_clear(&scratch->segment);
        if (map(c, &scratch->segment)) change(&r, i, n, tp_buf_cstr(&scratch->segment), scratch->segment.len);
        i += n;
    }
    TP_TRY(tp_buf_status(ctx, &scratch->segment, "normalized text"));
    return finish(ctx, layers, &r);
}

static tp_status byte_level(tp_ctx *ctx, tp_layers *layers)
{
    struct rewrite r;
    TP_TRY(begin(ctx, layers, &r));
    for (size_t i = 0; i < r.in.len; i++) {
        char bytes[4];
        uint32_t c = tp_byte_to_char((unsigned char)r.in.data[i]);
        if (c >= 0x80 || c != (unsigned char)r.in.data[i]) change(&r, i, 1, bytes, (size_t)tp_utf8_encode(c, bytes));
    }
    return finish(ctx, layers, &r);
}

static tp_status strip(tp_ctx *ctx, tp_layers *layers, bool left, bool right)
{
    struct rewrite r;
    uint32_t c;
    tp_span text = tp_layers_top(layers);
    size_t from = 0, to = text.len;
    while (left && from < to) {
        size_t n = tp_char_next(text.data + from, to - from, &c);
        if (!tp_char_is_space(c)) break;
        from += n;
    }
    while (right && to > from) {
        size_t last = to - 1;
        while (last > from && ((unsigned char)text.data[last] & 0xc0) == 0x80) last--;
        tp_char_next(text.data + last, to - last, &c);
        if (!tp_char_is_space(c)) break;
        to = last;
    }
    if (from == 0 && to == text.len) return TP_OK;
    TP_TRY(begin(ctx, layers, &r));
    if (from > 0) change(&r, 0, from, "", 0);
    if (to < text.len) change(&r, to, text.len - to, "", 0);
    return finish(ctx, layers, &r);
}

static tp_status prepend(tp_ctx *ctx, tp_layers *layers, tp_span content)
{
    struct rewrite r;
    if (tp_layers_top(layers).len == 0 || content.len == 0) return TP_OK;
    TP_TRY(begin(ctx, layers, &r));
    change(&r, 0, 0, content.data, content.len);
    return finish(ctx, layers, &r);
}

static tp_status replace(tp_ctx *ctx, tp_layers *layers, tp_span pattern, tp_span content)
{
    struct rewrite r;
    TP_TRY(begin(ctx, layers, &r));
    for (size_t i = 0; i < r.in.len;) {
        const char *found = memmem(r.in.data + i, r.in.len - i, pattern.data, pattern.len);
        if (found == NULL) break;
        change(&r, (size_t)(found - r.in.data), pattern.len, content.data, content.len);
        i = r.kept;
    }
    return finish(ctx, layers, &r);
}

static tp_status replace_regex(tp_ctx *ctx, tp_layers *layers, const tp_regex *regex, tp_span content)
{
    struct rewrite r;
    tp_regex_walk walk;
    bool found = true;
    TP_TRY(begin(ctx, layers, &r));
    tp_status status = tp_regex_begin(ctx, regex, r.in.data, r.in.len, &layers->budget, &walk);
    while (status == TP_OK && found) {
        size_t from, to;
        status = tp_regex_next(ctx, &walk, &found, &from, &to);
        if (status == TP_OK && found) change(&r, from, to - from, content.data, content.len);
    }
    tp_regex_end(&walk);
    return status == TP_OK ? finish(ctx, layers, &r) : status;
}

static tp_status run_step(tp_ctx *ctx, const tp_normal_step *step, tp_normalize_scratch *scratch, tp_layers *layers)
{
    switch (step->kind) {
    case TP_NORMAL_FORM: return normal_form(ctx, layers, scratch, step->form);
    case TP_NORMAL_LOWERCASE: return map_chars(ctx, layers, scratch, lowered);
    case TP_NORMAL_STRIP: return strip(ctx, layers, step->left, step->right);
    case TP_NORMAL_STRIP_ACCENTS: return map_chars(ctx, layers, scratch, without_marks);
    case TP_NORMAL_STRIP_NONSPACING: return map_chars(ctx, layers, scratch, without_nonspacing);
    case TP_NORMAL_PREPEND: return prepend(ctx, layers, step->content);
    case TP_NORMAL_REPLACE: return replace(ctx, layers, step->pattern, step->content);
    case TP_NORMAL_REPLACE_REGEX: return replace_regex(ctx, layers, step->regex, step->content);
    case TP_NORMAL_BYTE_LEVEL: return byte_level(ctx, layers);
    case TP_NORMAL_CLEAN: return map_chars(ctx, layers, scratch, cleaned);
    case TP_NORMAL_CJK: return map_chars(ctx, layers, scratch, between_blanks);
    }
    return tp_fail(ctx, TP_INTERNAL, "normalizer step %d", (int)step->kind);
}

tp_status tp_normalize(tp_ctx *ctx, const tp_normalizer *normalizer, tp_normalize_scratch *scratch, tp_layers *layers)
{
    for (size_t i = 0; i < normalizer->count; i++) TP_TRY(run_step(ctx, &normalizer->steps[i], scratch, layers));
    return TP_OK;
}

void tp_normalize_scratch_free(tp_normalize_scratch *scratch)
{
    tp_free(scratch->chars.chars);
    tp_buf_free(&scratch->segment);
    *scratch = (tp_normalize_scratch){0};
}

/* ---- building ---- */

static tp_status copy_span(tp_ctx *ctx, tp_span from, tp_span *to)
{
    to->data = tp_strndup(ctx, from.data != NULL ? from.data : "", from.len);
    to->len = from.len;
    return to->data != NULL ? TP_OK : TP_NOMEM;
}

static void free_span(tp_span *span)
{
    char *data;
    memcpy(&data, &span->data, sizeof data); /* ours, though spans are const */
    tp_free(data);
}

tp_status tp_normalizer_add(tp_ctx *ctx, tp_normalizer *normalizer, const char *where, const tp_normal_step *step)
{
    if (normalizer->count >= TP_NORMAL_STEPS)
        return tp_fail(ctx, TP_UNSUPPORTED, "%s: more than %d steps", where, TP_NORMAL_STEPS);
    if (step->kind == TP_NORMAL_REPLACE && step->pattern.len == 0)
        return tp_fail(ctx, TP_UNSUPPORTED, "%s: an empty pattern", where);
    TP_TRY(tp_grow(ctx, &normalizer->steps, &normalizer->capacity, normalizer->count + 1, sizeof *normalizer->steps));
    tp_normal_step *own = &normalizer->steps[normalizer->count++];
    *own = *step;
    own->pattern = own->content = (tp_span){NULL, 0};
    own->regex = NULL;
    TP_TRY(copy_span(ctx, step->pattern, &own->pattern));
    TP_TRY(copy_span(ctx, step->content, &own->content));
    if (step->kind == TP_NORMAL_REPLACE_REGEX) TP_TRY(tp_regex_new(ctx, where, step->pattern, &own->regex));
    return TP_OK;
}

void tp_normalizer_free(tp_normalizer *normalizer)
{
    for (size_t i = 0; i < normalizer->count; i++) {
        free_span(&normalizer->steps[i].pattern);
        free_span(&normalizer->steps[i].content);
        tp_regex_free(normalizer->steps[i].regex);
    }
    tp_free(normalizer->steps);
    *normalizer = (tp_normalizer){0};
}
