/* Added tokens: texts that are cut out as one token before the rest is normalized and split.
 *
 * A set holds the tokens that are looked for in the same kind of text: one set for raw text, one for normalized text. In
 * each, matches are found from left to right, the longest one at the leftmost place. The flags then discard a match
 * (single_word) or let it grow over whitespace (lstrip, rstrip). */
#ifndef TP_DATA_ADDED_TOKENS_H
#define TP_DATA_ADDED_TOKENS_H

#include "base/status.h"
#include "base/text.h"
#include "data/tokens.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tp_added_token {
    tp_span content; /* what is looked for */
    int32_t id;
    bool single_word; /* no word character may stand before or behind */
    bool lstrip, rstrip;
    bool special;
    bool normalized; /* looked for in normalized text */
} tp_added_token;

typedef struct tp_added_set {
    tp_added_token *tokens; /* sorted by content, so that a walk narrows a range; contents are the set's own */
    size_t count, capacity;
    uint32_t first[257]; /* tokens whose content begins with byte b: [first[b], first[b + 1]) */
} tp_added_set;

/* Copies the content. Empty contents are left out. */
TP_API tp_status tp_added_set_add(tp_ctx *ctx, tp_added_set *set, const tp_added_token *token) TP_MUST_CHECK;
/* Sorts; call once after the last token, also for an empty set. Of equal contents the first added wins. */
TP_API tp_status tp_added_set_finish(tp_ctx *ctx, tp_added_set *set) TP_MUST_CHECK;
TP_API void tp_added_set_free(tp_added_set *set);

typedef struct tp_segment {
    const tp_added_token *token; /* NULL: text between tokens */
    size_t begin, end;
} tp_segment;

typedef struct tp_segments {
    tp_segment *items;
    size_t count, capacity;
} tp_segments;

/* Appends the segments of text[begin, end), which must be valid UTF-8: tokens and what lies between, none empty.
 * skip_special leaves special tokens in the text. A token that takes whitespace may overlap the one behind it, as in the
 * reference library. */
TP_API tp_status tp_added_split(tp_ctx *ctx, const tp_added_set *set, bool skip_special, const char *text, size_t begin,
                                size_t end, tp_segments *out) TP_MUST_CHECK;

#ifdef __cplusplus
}
#endif
#endif
