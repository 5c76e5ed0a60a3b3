/* Decoders: token texts back to text, one token at a time.
 *
 * A decoder is a chain of stages. Token texts go in one after the other; what comes out of the last stage is text whose
 * bytes can no longer change, whatever tokens follow. Decoding a whole sequence is the same walk with an end. Stages
 * hold back only what they must: the beginning of a character that is not complete, a run of byte tokens, trailing
 * blanks that may have to go. */
#ifndef TP_DATA_DECODE_H
#define TP_DATA_DECODE_H

#include "base/status.h"
#include "base/text.h"
#include "data/regex.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum tp_decode_kind {
    TP_DECODE_BYTE_LEVEL,    /* characters of the byte alphabet to bytes; broken UTF-8 to U+FFFD; joins all tokens */
    TP_DECODE_REPLACE,       /* pattern by content in each token */
    TP_DECODE_REPLACE_REGEX, /* the same for a regex */
    TP_DECODE_BYTE_FALLBACK, /* runs of <0xXX> to bytes; U+FFFD for each byte of a run that is not UTF-8 */
    TP_DECODE_FUSE,          /* joins all tokens into one */
    TP_DECODE_STRIP,         /* up to `start` characters `pattern` at the beginning of each token, `stop` at its end */
    TP_DECODE_METASPACE,     /* pattern by a blank; in the first token by nothing if strip_first */
    TP_DECODE_SUFFIX,        /* pattern by a blank; in the last token by nothing */
    TP_DECODE_JOIN           /* a blank between tokens: what happens without a decoder */
} tp_decode_kind;

typedef struct tp_decode_stage {
    tp_decode_kind kind;
    tp_span pattern, content;
    tp_regex *regex;
    size_t start, stop;
    bool strip_first;
    bool whole; /* set by tp_decoder_finish: a joining stage must wait for the end, since a later one needs the whole */
} tp_decode_stage;

#define TP_DECODE_STAGES    16
#define TP_DECODE_STRIP_MAX 1024 /* characters that a stage may take off an end */
#define TP_DECODE_GROWTH    64   /* bytes that replacing may write for each byte that comes in, over all stages */
#define TP_DECODE_BASE      4096 /* and once */

typedef struct tp_decoder {
    tp_decode_stage stages[TP_DECODE_STAGES];
    size_t count;
} tp_decoder;

/* Appends a stage; copies the spans and makes the regex. */
TP_API tp_status tp_decoder_add(tp_ctx *ctx, tp_decoder *decoder, const char *where,
                                const tp_decode_stage *stage) TP_MUST_CHECK;
/* Call once after the last stage. */
TP_API void tp_decoder_finish(tp_decoder *decoder);
TP_API void tp_decoder_free(tp_decoder *decoder);

/* One decoding. Zero-initialised except for the decoder, which is borrowed. */
typedef struct tp_decode_state {
    size_t n_tokens; /* that came in */
    tp_buf held;     /* text that waits */
    tp_buf work;     /* text being rewritten */
    bool any;        /* something came in */
    size_t stripped; /* characters taken off the beginning of the joined token */
    bool begun;      /* text that is not stripped has come */
} tp_decode_state;

typedef struct tp_decode_walk {
    const tp_decoder *decoder;
    bool running;    /* a token has come */
    size_t room;     /* bytes that replacing may still write */
    uint64_t budget; /* of regexes (data/regex.h) */
    tp_decode_state states[TP_DECODE_STAGES];
} tp_decode_walk;

/* The next token; appends to `out` what has become certain. */
TP_API tp_status tp_decode_push(tp_ctx *ctx, tp_decode_walk *walk, tp_span token, tp_buf *out) TP_MUST_CHECK;
/* Behind the last token: appends the rest. The walk is then as new. */
TP_API tp_status tp_decode_end(tp_ctx *ctx, tp_decode_walk *walk, tp_buf *out) TP_MUST_CHECK;
TP_API void tp_decode_walk_free(tp_decode_walk *walk);

#ifdef __cplusplus
}
#endif
#endif
