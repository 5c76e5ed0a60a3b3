/* Regular expressions from tokenizer files, matched under limits.
 *
 * The files are written for Oniguruma in Ruby's dialect; matching is done by PCRE2. tp_regex_new translates what the two
 * read differently (\s \w \h, nested character classes) and refuses what it cannot express. A match is given few steps
 * first; only when it asks for more does it draw on a budget proportional to the text, so that nested quantifiers end in
 * an error instead of running for hours. The budget is the caller's: one for a text, into however many pieces it is cut. */
#ifndef TP_DATA_REGEX_H
#define TP_DATA_REGEX_H

#include "base/status.h"
#include "base/text.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tp_regex tp_regex; /* immutable, may be shared between threads */

/* `where` goes in front of messages. FORMAT if the pattern does not compile, UNSUPPORTED for what has no counterpart. */
TP_API tp_status tp_regex_new(tp_ctx *ctx, const char *where, tp_span pattern, tp_regex **regex) TP_MUST_CHECK;
TP_API void tp_regex_free(tp_regex *regex);

/* Steps beyond the few that every search has, for all searches in a text of n bytes together. */
TP_API uint64_t tp_regex_budget(size_t n);

/* Walks through the matches in a text, from left to right. An empty match directly behind the previous match is passed
 * over. */
typedef struct tp_regex_walk {
    const tp_regex *regex;
    const char *text;
    size_t n;
    size_t at;       /* where the next search begins; n + 1 when there is none */
    size_t last_end; /* of the previous match; SIZE_MAX before the first */
    uint64_t *budget;
    void *data; /* PCRE2's match data and context */
    void *context;
} tp_regex_walk;

/* text[0..n) must be valid UTF-8 and stay alive; tp_regex_end releases the walk in every case. What searches take beyond the
 * few steps goes off *budget. */
TP_API tp_status tp_regex_begin(tp_ctx *ctx, const tp_regex *regex, const char *text, size_t n, uint64_t *budget,
                                tp_regex_walk *walk) TP_MUST_CHECK;
/* *found is false behind the last match. UNSUPPORTED when the pattern takes too many steps on this text. */
TP_API tp_status tp_regex_next(tp_ctx *ctx, tp_regex_walk *walk, bool *found, size_t *begin, size_t *end) TP_MUST_CHECK;
TP_API void tp_regex_end(tp_regex_walk *walk);

#ifdef __cplusplus
}
#endif
#endif
