/* Leftmost-longest search in a sorted list.
 *
 * All contents that begin with the same d bytes stand together, shortest first. So a walk from one place keeps a range
 * of candidates and narrows it by a byte at a time: no automaton to build, and its memory is the list itself. */
#include "data/added_tokens.h"

#include "base/mem.h"
#include "data/unicode.h"

tp_status tp_added_set_add(tp_ctx *ctx, tp_added_set *set, const tp_added_token *token)
{
    if (token->content.len == 0) return TP_OK;
    if (token->content.len > TP_ADDED_TOKEN_MAX)
        return tp_fail(ctx, TP_UNSUPPORTED, "added token %d has %zu bytes, at most %d are supported", token->id,
                       token->content.len, TP_ADDED_TOKEN_MAX);
    TP_TRY(tp_grow(ctx, &set->tokens, &set->capacity, set->count + 1, sizeof *set->tokens));
    char *content = tp_strndup(ctx, token->content.data, token->content.len);
    if (content == NULL) return TP_NOMEM;
    set->tokens[set->count] = *token;
    set->tokens[set->count++].content.data = content;
    return TP_OK;
}

static void free_token(tp_added_token *token)
{
    char *content;
    memcpy(&content, &token->content.data, sizeof content); /* ours, though spans are const */
    tp_free(content);
}

void tp_added_set_free(tp_added_set *set)
{
    for (size_t i = 0; i < set->count; i++) free_token(&set->tokens[i]);
    tp_free(set->tokens);
    *set = (tp_added_set){0};
}

static int compare(tp_span a, tp_span b)
{
    size_t n = a.len < b.len ? a.len : b.len;
    int order = memcmp(a.data, b.data, n);
    return order != 0 ? order : (a.len > b.len) - (a.len < b.len);
}

/* Merge sort by content: stable, and n log n on any input. */
static void merge_sort(tp_added_token *tokens, tp_added_token *copy, size_t n)
{
    for (size_t width = 1; width < n; width *= 2) {
        for (size_t low = 0; low < n; low += 2 * width) {
            size_t middle = low + width < n ? low + width : n, high = low + 2 * width < n ? low + 2 * width : n;
            size_t a = low, b = middle;
            for (size_t i = low; i < high; i++)
                copy[i] =
                    a < middle && (b == high || compare(tokens[a].content, tokens[b].content) <= 0) ? tokens[a++] : tokens[b++];
        }
        memcpy(tokens, copy, n * sizeof *tokens);
    }
}

static void drop_repeated(tp_added_set *set)
{
    size_t n = 0;
    for (size_t i = 0; i < set->count; i++) {
        if (n > 0 && tp_span_equal(set->tokens[n - 1].content, set->tokens[i].content))
            free_token(&set->tokens[i]);
        else
            set->tokens[n++] = set->tokens[i];
    }
    set->count = n;
}

tp_status tp_added_set_finish(tp_ctx *ctx, tp_added_set *set)
{
    tp_added_token *copy = tp_alloc_raw(ctx, set->count, sizeof *copy);
    if (copy == NULL) return TP_NOMEM;
    merge_sort(set->tokens, copy, set->count);
    tp_free(copy);
    drop_repeated(set);
    size_t i = 0;
    for (unsigned b = 0; b <= 256; b++) {
        while (i < set->count && (unsigned char)set->tokens[i].content.data[0] < b) i++;
        set->first[b] = (uint32_t)i;
    }
    return TP_OK;
}

/* The longest token that text[0..n) begins with, or NULL. */
static const tp_added_token *longest_at(const tp_added_set *set, const char *text, size_t n)
{
    const tp_added_token *best = NULL;
    size_t low = set->first[(unsigned char)text[0]], high = set->first[(unsigned char)text[0] + 1];
    for (size_t depth = 1; low < high; depth++) {
        if (set->tokens[low].content.len == depth) best = &set->tokens[low++];
        if (depth == n || low == high) break;
        unsigned char next = (unsigned char)text[depth];
        unsigned char least = (unsigned char)set->tokens[low].content.data[depth];
        if (least == (unsigned char)set->tokens[high - 1].content.data[depth]) { /* all of them go on with one byte */
            if (least != next) break;
            continue;
        }
        size_t end = high;
        while (low < end) { /* first candidate whose byte is not smaller */
            size_t middle = low + (end - low) / 2;
            if ((unsigned char)set->tokens[middle].content.data[depth] < next)
                low = middle + 1;
            else
                end = middle;
        }
        for (size_t a = low; a < high;) { /* first one whose byte is larger */
            size_t middle = a + (high - a) / 2;
            if ((unsigned char)set->tokens[middle].content.data[depth] > next)
                high = middle;
            else
                a = middle + 1;
        }
    }
    return best;
}

/* ---- flags ---- */

static size_t before(const char *text, size_t begin, size_t at, uint32_t *c)
{
    do at--;
    while (at > begin && ((unsigned char)text[at] & 0xc0) == 0x80);
    tp_char_next(text + at, 4, c);
    return at;
}

static bool stands_alone(const char *text, size_t begin, size_t end, size_t from, size_t to)
{
    uint32_t c;
    if (from > begin) {
        size_t at = before(text, begin, from, &c);
        if (at < from && tp_char_is_word(c)) return false;
    }
    if (to == end) return true;
    tp_char_next(text + to, end - to, &c);
    return !tp_char_is_word(c);
}

static size_t spaces_before(const char *text, size_t begin, size_t at)
{
    while (at > begin) {
        uint32_t c;
        size_t previous = before(text, begin, at, &c);
        if (!tp_char_is_space(c)) break;
        at = previous;
    }
    return at;
}

/* End of the whitespace behind `at`. `seen` is the last stretch that was found: tokens that are blanks themselves ask at every
 * place of it. */
static size_t spaces_behind(const char *text, size_t end, size_t at, tp_segment *seen)
{
    if (at >= seen->begin && at < seen->end) return seen->end;
    seen->begin = at;
    while (at < end) {
        uint32_t c;
        size_t length = tp_char_next(text + at, end - at, &c);
        if (!tp_char_is_space(c)) break;
        at += length;
    }
    return seen->end = at;
}

static tp_status push(tp_ctx *ctx, tp_segments *out, const tp_added_token *token, size_t begin, size_t end)
{
    if (begin >= end) return TP_OK;
    TP_TRY(tp_grow(ctx, &out->items, &out->capacity, out->count + 1, sizeof *out->items));
    out->items[out->count++] = (tp_segment){token, begin, end};
    return TP_OK;
}

tp_status tp_added_split(tp_ctx *ctx, const tp_added_set *set, bool skip_special, const char *text, size_t begin, size_t end,
                         tp_segments *out)
{
    size_t done = begin;
    tp_segment blanks = {NULL, 0, 0};
    for (size_t at = begin; at < end && set->count > 0;) {
        const tp_added_token *token = NULL;
        unsigned char byte = (unsigned char)text[at];
        if (set->first[byte] < set->first[byte + 1u]) token = longest_at(set, text + at, end - at);
        if (token == NULL) {
            at++;
            continue;
        }
        size_t from = at, to = at + token->content.len;
        at = to; /* the search goes on behind the content, whatever the flags add */
        if (skip_special && token->special) continue;
        if (token->single_word && !stands_alone(text, begin, end, from, to)) continue;
        if (token->lstrip) from = spaces_before(text, done < from ? done : from, from);
        if (token->rstrip) to = spaces_behind(text, end, to, &blanks);
        TP_TRY(push(ctx, out, NULL, done, from));
        TP_TRY(push(ctx, out, token, from, to));
        done = to;
    }
    return push(ctx, out, NULL, done, end);
}
