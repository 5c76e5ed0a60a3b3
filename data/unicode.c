/* Properties of characters, and normalization segment by segment.
 *
 * utf8proc normalizes whole strings, sorts marks by exchanging neighbours (quadratic on hostile runs) and does not say
 * where a character came from. So a text is cut where nothing combines across the cut, and each segment goes through
 *     decompose every character -> counting sort of each run of marks by combining class -> compose. */
#include "data/unicode.h"

#include <utf8proc.h>

#include "base/mem.h"

#define L TP_CHAR_LETTER
#define N TP_CHAR_NUMBER
#define S TP_CHAR_SPACE
const unsigned char tp_ascii_class[128] = {
    0, 0, 0, 0, 0, 0, 0, 0, 0, S, S, S, S, S, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    S, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, N, N, N, N, N, N, N, N, N, N, 0, 0, 0, 0, 0, 0,
    0, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, 0, 0, 0, 0, 0,
    0, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, 0, 0, 0, 0, 0,
};
#undef L
#undef N
#undef S

static utf8proc_category_t category(uint32_t c)
{
    return utf8proc_category((utf8proc_int32_t)c);
}

static bool category_between(uint32_t c, utf8proc_category_t first, utf8proc_category_t last)
{
    utf8proc_category_t k = category(c);
    return k >= first && k <= last;
}

bool tp_char_is_space(uint32_t c)
{
    if (c < 0x80) return tp_ascii_class[c] == TP_CHAR_SPACE;
    return c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f ||
           c == 0x205f || c == 0x3000;
}

tp_char_class tp_char_class_beyond_ascii(uint32_t c)
{
    utf8proc_category_t k = category(c);
    if (k >= UTF8PROC_CATEGORY_LU && k <= UTF8PROC_CATEGORY_LO) return TP_CHAR_LETTER;
    if (k >= UTF8PROC_CATEGORY_ND && k <= UTF8PROC_CATEGORY_NO) return TP_CHAR_NUMBER;
    return tp_char_is_space(c) ? TP_CHAR_SPACE : TP_CHAR_OTHER;
}

bool tp_char_is_number(uint32_t c)
{
    return tp_char_class_of(c) == TP_CHAR_NUMBER;
}
bool tp_char_is_mark(uint32_t c)
{
    return category_between(c, UTF8PROC_CATEGORY_MN, UTF8PROC_CATEGORY_ME);
}
bool tp_char_is_nonspacing(uint32_t c)
{
    return category(c) == UTF8PROC_CATEGORY_MN;
}

bool tp_char_is_other(uint32_t c)
{
    return category_between(c, UTF8PROC_CATEGORY_CC, UTF8PROC_CATEGORY_CO);
}

bool tp_char_is_word(uint32_t c)
{
    utf8proc_category_t k = category(c);
    if (k >= UTF8PROC_CATEGORY_LU && k <= UTF8PROC_CATEGORY_NL) return true; /* L, M, Nd, Nl */
    if (k == UTF8PROC_CATEGORY_PC || c == 0x200c || c == 0x200d) return true;
    return (c >= 0x24b6 && c <= 0x24e9) || (c >= 0x1f130 && c <= 0x1f149) || (c >= 0x1f150 && c <= 0x1f169) ||
           (c >= 0x1f170 && c <= 0x1f189); /* circled and squared letters: symbols that are Alphabetic */
}

bool tp_char_is_punctuation(uint32_t c)
{
    if (c < 0x80) return c > 0x20 && c < 0x7f && tp_ascii_class[c] == TP_CHAR_OTHER;
    return category_between(c, UTF8PROC_CATEGORY_PC, UTF8PROC_CATEGORY_PO);
}

bool tp_char_is_cjk(uint32_t c)
{
    return (c >= 0x4e00 && c <= 0x9fff) || (c >= 0x3400 && c <= 0x4dbf) || (c >= 0x20000 && c <= 0x2a6df) ||
           (c >= 0x2a700 && c <= 0x2b73f) || (c >= 0x2b740 && c <= 0x2b81f) || (c >= 0x2b920 && c <= 0x2ceaf) ||
           (c >= 0xf900 && c <= 0xfaff) || (c >= 0x2f800 && c <= 0x2fa1f);
}

int tp_char_lower(uint32_t c, uint32_t out[2])
{
    if (c == 0x130) { /* the one character whose lower case is two */
        out[0] = 'i';
        out[1] = 0x307;
        return 2;
    }
    out[0] = c < 0x80 ? (c >= 'A' && c <= 'Z' ? c + 32 : c) : (uint32_t)utf8proc_tolower((utf8proc_int32_t)c);
    return 1;
}

/* ---- normalization ---- */

#define MAX_DECOMPOSITION 32 /* characters; the longest one in Unicode has 18 */

static utf8proc_option_t decompose_options(tp_normal_form form)
{
    int options = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE;
    if (form == TP_NFKC || form == TP_NFKD) options |= UTF8PROC_COMPAT;
    return (utf8proc_option_t)options;
}

static size_t decompose(uint32_t c, tp_normal_form form, utf8proc_int32_t out[MAX_DECOMPOSITION])
{
    int boundary = 0;
    utf8proc_ssize_t n =
        utf8proc_decompose_char((utf8proc_int32_t)c, out, MAX_DECOMPOSITION, decompose_options(form), &boundary);
    if (n >= 1 && n <= MAX_DECOMPOSITION) return (size_t)n;
    out[0] = (utf8proc_int32_t)c;
    return 1;
}

/* Whether the character may move left past or merge into what stands before it. Second halves of compositions are
 * marks, or the vowels and finals of Hangul. */
static bool combines(utf8proc_int32_t c)
{
    if (c < 0x300) return false;
    if ((c >= 0x1161 && c <= 0x1175) || (c >= 0x11a8 && c <= 0x11c2)) return true;
    return utf8proc_get_property(c)->combining_class != 0 || tp_char_is_mark((uint32_t)c);
}

size_t tp_normal_segment(const char *text, size_t n, tp_normal_form form)
{
    uint32_t c;
    size_t length = tp_char_next(text, n, &c);
    while (length < n && (unsigned char)text[length] >= 0x80) {
        utf8proc_int32_t parts[MAX_DECOMPOSITION];
        size_t next = tp_char_next(text + length, n - length, &c);
        decompose(c, form, parts);
        if (!combines(parts[0])) break;
        length += next;
    }
    return length;
}

static unsigned combining_class(utf8proc_int32_t c)
{
    return utf8proc_get_property(c)->combining_class & 255u;
}

/* Stable sort of chars[0..n) by combining class; `copy` has room for n. */
static void sort_marks(utf8proc_int32_t *chars, size_t n, utf8proc_int32_t *copy)
{
    size_t start[257] = {0};
    for (size_t i = 0; i < n; i++) start[combining_class(chars[i]) + 1]++;
    for (int k = 0; k < 256; k++) start[k + 1] += start[k];
    for (size_t i = 0; i < n; i++) copy[start[combining_class(chars[i])]++] = chars[i];
    memcpy(chars, copy, n * sizeof *chars);
}

static void order_marks(utf8proc_int32_t *chars, size_t n, utf8proc_int32_t *copy)
{
    for (size_t i = 0; i < n;) {
        size_t end = i;
        bool sorted = true;
        while (end < n && combining_class(chars[end]) != 0) {
            if (end > i && combining_class(chars[end]) < combining_class(chars[end - 1])) sorted = false;
            end++;
        }
        if (!sorted) sort_marks(chars + i, end - i, copy);
        i = end > i ? end : i + 1;
    }
}

tp_status tp_normal_convert(tp_ctx *ctx, tp_normal_scratch *scratch, const char *text, size_t n, tp_normal_form form,
                            tp_buf *out)
{
    size_t count = 0;
    tp_buf_clear(out);
    for (size_t i = 0; i < n;) {
        uint32_t c;
        utf8proc_int32_t parts[MAX_DECOMPOSITION];
        i += tp_char_next(text + i, n - i, &c);
        size_t n_parts = decompose(c, form, parts), need;
        if (!tp_mul_size(count + n_parts, 2, &need)) return tp_fail(ctx, TP_NOMEM, "text too long to normalize");
        TP_TRY(tp_grow(ctx, &scratch->chars, &scratch->capacity, need, sizeof *scratch->chars));
        memcpy(scratch->chars + count, parts, n_parts * sizeof *parts);
        count += n_parts;
    }
    order_marks(scratch->chars, count, scratch->chars + count);
    if (form == TP_NFC || form == TP_NFKC) {
        utf8proc_option_t compose = (utf8proc_option_t)(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
        utf8proc_ssize_t composed = utf8proc_normalize_utf32(scratch->chars, (utf8proc_ssize_t)count, compose);
        if (composed >= 0) count = (size_t)composed;
    }
    for (size_t i = 0; i < count; i++) tp_buf_codepoint(out, (uint32_t)scratch->chars[i]);
    return tp_buf_status(ctx, out, "normalized text");
}
