/* What the tokenizer asks about characters, and Unicode normalization that keeps track of places.
 *
 * The properties come from utf8proc; they are worded as the reference tokenizers word them (Rust's char methods and
 * the \w and \s of its regex crate), which differ in places from C's and PCRE's. */
#ifndef TP_DATA_UNICODE_H
#define TP_DATA_UNICODE_H

#include "base/status.h"
#include "base/text.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The four kinds of characters that the pre-tokenizer patterns distinguish. */
typedef enum tp_char_class {
    TP_CHAR_OTHER,  /* marks, punctuation, symbols, controls, unassigned */
    TP_CHAR_LETTER, /* \p{L} */
    TP_CHAR_NUMBER, /* \p{N} */
    TP_CHAR_SPACE   /* White_Space */
} tp_char_class;

extern const unsigned char tp_ascii_class[128];
TP_API tp_char_class tp_char_class_beyond_ascii(uint32_t c);
static inline tp_char_class tp_char_class_of(uint32_t c)
{
    return c < 0x80 ? (tp_char_class)tp_ascii_class[c] : tp_char_class_beyond_ascii(c);
}
TP_API bool tp_char_is_space(uint32_t c);       /* White_Space */
TP_API bool tp_char_is_number(uint32_t c);      /* \p{N} */
TP_API bool tp_char_is_word(uint32_t c);        /* Alphabetic, \p{M}, \p{Nd}, \p{Pc}, Join_Control */
TP_API bool tp_char_is_punctuation(uint32_t c); /* ASCII punctuation and \p{P} */
TP_API bool tp_char_is_mark(uint32_t c);        /* \p{M} */
TP_API bool tp_char_is_nonspacing(uint32_t c);  /* \p{Mn} */
TP_API bool tp_char_is_other(uint32_t c);       /* control, format, surrogate, private use */
TP_API bool tp_char_is_cjk(uint32_t c);         /* the ideographs that BertNormalizer puts blanks around */

/* Lower case of one character without context: writes one or two characters, returns how many. */
TP_API int tp_char_lower(uint32_t c, uint32_t out[2]);

/* Reads the character at text[0..n), n > 0, and returns its length. A byte that begins no character is read as
 * U+FFFD of length 1, so that a walk ends on any input. */
static inline size_t tp_char_next(const char *text, size_t n, uint32_t *c)
{
    if ((unsigned char)text[0] < 0x80) {
        *c = (unsigned char)text[0];
        return 1;
    }
    int length = tp_utf8_decode(text, n, c);
    if (length > 0) return (size_t)length;
    *c = 0xfffd;
    return 1;
}

typedef enum tp_normal_form { TP_NFC, TP_NFD, TP_NFKC, TP_NFKD } tp_normal_form;

/* Length of the shortest beginning of text[0..n), n > 0, that normalizes independently of what follows: a starter with
 * all that may combine with it. */
TP_API size_t tp_normal_segment(const char *text, size_t n, tp_normal_form form);

/* Characters of one segment while it is normalized; kept between calls. */
typedef struct tp_normal_scratch {
    int32_t *chars; /* room for the reordered copy behind the characters */
    size_t capacity;
} tp_normal_scratch;

/* Normalizes one segment into `out` (cleared first). Linear in the segment's length, also for long runs of marks. */
TP_API tp_status tp_normal_convert(tp_ctx *ctx, tp_normal_scratch *scratch, const char *text, size_t n, tp_normal_form form,
                                   tp_buf *out) TP_MUST_CHECK;

#ifdef __cplusplus
}
#endif
#endif
