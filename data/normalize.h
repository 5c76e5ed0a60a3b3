/* Normalizers: what a tokenizer does to text before it looks for words.
 *
 * A normalizer is a list of steps, each of which puts a layer of rewritten text on the one below (data/aligned.h) or
 * leaves it alone when it has nothing to change. */
#ifndef TP_DATA_NORMALIZE_H
#define TP_DATA_NORMALIZE_H

#include "data/aligned.h"
#include "data/regex.h"
#include "data/unicode.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum tp_normal_kind {
    TP_NORMAL_FORM,             /* form */
    TP_NORMAL_LOWERCASE,        /* every character alone */
    TP_NORMAL_STRIP,            /* whitespace at the ends: left, right */
    TP_NORMAL_STRIP_ACCENTS,    /* drops \p{M} */
    TP_NORMAL_STRIP_NONSPACING, /* drops \p{Mn} */
    TP_NORMAL_PREPEND,          /* content, in front of text that is not empty */
    TP_NORMAL_REPLACE,          /* pattern, literally, by content */
    TP_NORMAL_REPLACE_REGEX,    /* pattern as a regex by content, literally */
    TP_NORMAL_BYTE_LEVEL,       /* every byte by its character (data/byte_level.h) */
    TP_NORMAL_CLEAN,            /* drops controls, NUL and U+FFFD; whitespace becomes a blank */
    TP_NORMAL_CJK               /* blanks around ideographs */
} tp_normal_kind;

typedef struct tp_normal_step {
    tp_normal_kind kind;
    tp_normal_form form;
    bool left, right;
    tp_span pattern, content;
    tp_regex *regex;
} tp_normal_step;

typedef struct tp_normalizer {
    tp_normal_step *steps;
    size_t count, capacity;
} tp_normalizer;

#define TP_NORMAL_STEPS 32 /* steps a normalizer may have */

/* Appends a step; copies the spans, makes the regex. `where` goes in front of messages. */
TP_API tp_status tp_normalizer_add(tp_ctx *ctx, tp_normalizer *normalizer, const char *where,
                                   const tp_normal_step *step) TP_MUST_CHECK;
TP_API void tp_normalizer_free(tp_normalizer *normalizer);

/* Scratch of one thread; zero-initialised is empty. */
typedef struct tp_normalize_scratch {
    tp_normal_scratch chars;
    tp_buf segment;
} tp_normalize_scratch;
TP_API void tp_normalize_scratch_free(tp_normalize_scratch *scratch);

/* Normalizes the top of `layers`, which must be valid UTF-8, into a new top. */
TP_API tp_status tp_normalize(tp_ctx *ctx, const tp_normalizer *normalizer, tp_normalize_scratch *scratch,
                              tp_layers *layers) TP_MUST_CHECK;

#ifdef __cplusplus
}
#endif
#endif
