/* Pre-tokenizers: text into the pieces that the model works on, one after the other.
 *
 * A pre-tokenizer is a list of steps. Most only cut (or drop) ranges of the text; some also rewrite it, which adds a
 * layer (data/aligned.h). */
#ifndef TP_DATA_PRETOKENIZE_H
#define TP_DATA_PRETOKENIZE_H

#include "data/aligned.h"
#include "data/regex.h"
#include "data/scan.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum tp_cut_kind {
    TP_CUT_SCANNER,      /* scanner */
    TP_CUT_REGEX,        /* pattern as a regex */
    TP_CUT_LITERAL,      /* pattern, literally */
    TP_CUT_DIGITS,       /* \p{N} */
    TP_CUT_PUNCTUATION,  /* ASCII punctuation and \p{P} */
    TP_CUT_SPACES,       /* White_Space */
    TP_CUT_WORDS,        /* \w+|[^\w\s]+ */
    TP_CUT_PREFIX_SPACE, /* rewrites: a blank in front of pieces that do not begin with one */
    TP_CUT_BYTE_LEVEL,   /* rewrites: every byte by its character */
    TP_CUT_METASPACE     /* rewrites: blanks by `pattern`, and one in front as `scheme` says */
} tp_cut_kind;

/* What becomes of the matches, in tokenizer.json's words. */
typedef enum tp_split_behavior {
    TP_SPLIT_REMOVED,
    TP_SPLIT_ISOLATED,
    TP_SPLIT_MERGED_WITH_PREVIOUS,
    TP_SPLIT_MERGED_WITH_NEXT,
    TP_SPLIT_CONTIGUOUS /* neighbouring matches together */
} tp_split_behavior;

typedef enum tp_prepend_scheme {
    TP_PREPEND_ALWAYS,
    TP_PREPEND_FIRST, /* only the piece at the very beginning of the original */
    TP_PREPEND_NEVER
} tp_prepend_scheme;

typedef struct tp_cut_step {
    tp_cut_kind kind;
    tp_split_behavior behavior;
    bool invert; /* what the pattern does not match counts as the match */
    tp_prepend_scheme scheme;
    tp_span pattern;
    const tp_scanner *scanner;
    tp_regex *regex;
} tp_cut_step;

typedef struct tp_pretokenizer {
    tp_cut_step *steps;
    size_t count, capacity;
} tp_pretokenizer;

#define TP_CUT_STEPS 32 /* steps a pre-tokenizer may have */

/* Appends a step; copies the pattern, finds its scanner or makes the regex (kind TP_CUT_REGEX becomes
 * TP_CUT_SCANNER where one exists). `where` goes in front of messages. */
TP_API tp_status tp_pretokenizer_add(tp_ctx *ctx, tp_pretokenizer *pre, const char *where,
                                     const tp_cut_step *step) TP_MUST_CHECK;
TP_API void tp_pretokenizer_drop_last(tp_pretokenizer *pre);
TP_API void tp_pretokenizer_free(tp_pretokenizer *pre);

typedef struct tp_range {
    size_t begin, end; /* in the top layer */
} tp_range;

typedef struct tp_ranges {
    tp_range *items;
    size_t count, capacity;
} tp_ranges;

/* Pieces of one text, and the list that the next step writes. Scratch of one thread; zero-initialised is empty. */
typedef struct tp_pieces {
    tp_ranges now, next;
} tp_pieces;
TP_API void tp_pieces_free(tp_pieces *pieces);

/* Cuts bytes [begin, end) of the top layer, valid UTF-8, into pieces->now: ranges of the then top layer, in order, none
 * empty. */
TP_API tp_status tp_pretokenize(tp_ctx *ctx, const tp_pretokenizer *pre, tp_layers *layers, size_t begin, size_t end,
                                tp_pieces *pieces) TP_MUST_CHECK;

#ifdef __cplusplus
}
#endif
#endif
