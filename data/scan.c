/* The patterns of GPT-2, Llama 3 and Qwen 2 as scanners.
 *
 * Each function walks the pattern's alternatives in order at one place; the first that matches wins. The comments give
 * the alternative that a line stands for. L, N, S and O are the classes of data/unicode.h. */
#include "data/scan.h"

#include "data/unicode.h"

/* End of the run of characters of one class that begins at `at`. */
static size_t run_end(const char *text, size_t n, size_t at, tp_char_class class)
{
    while (at < n) {
        uint32_t c;
        size_t length = tp_char_next(text + at, n - at, &c);
        if (tp_char_class_of(c) != class) break;
        at += length;
    }
    return at;
}

static size_t digits_end(const char *text, size_t n, size_t at, unsigned most)
{
    for (unsigned i = 0; at < n && (most == 0 || i < most); i++) {
        uint32_t c;
        size_t length = tp_char_next(text + at, n - at, &c);
        if (tp_char_class_of(c) != TP_CHAR_NUMBER) break;
        at += length;
    }
    return at;
}

static size_t newlines_end(const char *text, size_t n, size_t at)
{
    while (at < n && (text[at] == '\r' || text[at] == '\n')) at++;
    return at;
}

static size_t previous_char(const char *text, size_t at)
{
    do at--;
    while (at > 0 && ((unsigned char)text[at] & 0xc0) == 0x80);
    return at;
}

/* \s+(?!\S) | \s+ : the whole run at the end of the text, else all but its last character, which the next piece may
 * want; a single character stands alone. */
static size_t spaces_end(const char *text, size_t n, size_t at)
{
    size_t end = run_end(text, n, at, TP_CHAR_SPACE);
    if (end == n) return end;
    size_t last = previous_char(text, end);
    return last > at ? last : end;
}

/* 's 't 're 've 'm 'll 'd : their length at text[at] == '\'', or 0. */
static size_t contraction(const char *text, size_t n, size_t at, bool ignore_case, bool long_s)
{
    size_t left = n - at;
    if (left < 2) return 0;
    char a = text[at + 1], b = left > 2 ? text[at + 2] : '\0';
    if (long_s && (unsigned char)a == 0xc5 && (unsigned char)b == 0xbf) return 3; /* U+017F */
    if (ignore_case) {
        if (a >= 'A' && a <= 'Z') a = (char)(a | 0x20);
        if (b >= 'A' && b <= 'Z') b = (char)(b | 0x20);
    }
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return 3;
    return 0;
}

/* 's|'t|'re|'ve|'m|'ll|'d| ?L+| ?N+| ?O+|\s+(?!\S)|\s+ */
static size_t next_gpt2(const tp_scanner *scanner, const char *text, size_t n, size_t at)
{
    (void)scanner;
    if (text[at] == '\'') {
        size_t length = contraction(text, n, at, false, false);
        if (length > 0) return at + length;
    }
    size_t start = at + (text[at] == ' ' && at + 1 < n);
    uint32_t c;
    tp_char_next(text + start, n - start, &c);
    tp_char_class class = tp_char_class_of(c);
    return class == TP_CHAR_SPACE ? spaces_end(text, n, at) : run_end(text, n, start, class);
}

/* \s*[\r\n]+ : greedy blanks go back to the last newline of their run; 0 if there is none. */
static size_t blank_lines_end(const char *text, size_t n, size_t at)
{
    size_t end = run_end(text, n, at, TP_CHAR_SPACE);
    while (end > at && text[end - 1] != '\r' && text[end - 1] != '\n') end--;
    return end > at ? end : 0;
}

/* (?i:'s|'t|'re|'ve|'m|'ll|'d) | [^\r\n L N]?L+ | N{1,digits} | ?O+[\r\n]* | \s*[\r\n]+ | \s+(?!\S) | \s+ */
static size_t next_llama3(const tp_scanner *scanner, const char *text, size_t n, size_t at)
{
    uint32_t c, d = 0;
    if (text[at] == '\'') {
        size_t length = contraction(text, n, at, true, scanner->long_s);
        if (length > 0) return at + length;
    }
    size_t second = at + tp_char_next(text + at, n - at, &c);
    tp_char_class class = tp_char_class_of(c);
    if (class == TP_CHAR_LETTER) return run_end(text, n, second, TP_CHAR_LETTER);
    if (class == TP_CHAR_NUMBER) return digits_end(text, n, at, scanner->digits);
    if (second < n) tp_char_next(text + second, n - second, &d);
    tp_char_class after = second < n ? tp_char_class_of(d) : TP_CHAR_SPACE;
    if (after == TP_CHAR_LETTER && c != '\r' && c != '\n') return run_end(text, n, second, TP_CHAR_LETTER);
    if (class == TP_CHAR_OTHER || (c == ' ' && after == TP_CHAR_OTHER))
        return newlines_end(text, n, run_end(text, n, second, TP_CHAR_OTHER));
    size_t lines = blank_lines_end(text, n, at);
    return lines > 0 ? lines : spaces_end(text, n, at);
}

#define CASELESS    "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
#define SPELLED_OUT "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
#define BLANKS      "\\s+(?!\\S)|\\s+"
#define WORD        "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
#define REST        "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|" BLANKS

static const tp_scanner scanners[] = {
    {"gpt2", "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|" BLANKS, next_gpt2, 0, false},
    {"llama3", CASELESS WORD "\\p{N}{1,3}" REST, next_llama3, 3, true},
    {"qwen2", CASELESS WORD "\\p{N}" REST, next_llama3, 1, true},
    {"llama3 without case folding", SPELLED_OUT WORD "\\p{N}{1,3}" REST, next_llama3, 3, false},
    {"qwen2 without case folding", SPELLED_OUT WORD "\\p{N}" REST, next_llama3, 1, false},
    {"any number", CASELESS WORD "\\p{N}+" REST, next_llama3, 0, true},
    /* Possessive, and one newline for many: both change nothing, since L is no part of the optional class and the
     * blanks before the newline are greedy. */
    {"cl100k", CASELESS "|[^\\r\\n\\p{L}\\p{N}]?+\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]++[\\r\\n]*|\\s*[\\r\\n]|" BLANKS,
     next_llama3, 3, true},
};

const tp_scanner *tp_scanner_at(size_t i)
{
    return i < sizeof scanners / sizeof *scanners ? &scanners[i] : NULL;
}
const tp_scanner *tp_scanner_gpt2(void)
{
    return &scanners[0];
}

const tp_scanner *tp_scanner_find(tp_span pattern)
{
    for (size_t i = 0; i < sizeof scanners / sizeof *scanners; i++)
        if (tp_span_is(pattern, scanners[i].pattern)) return &scanners[i];
    return NULL;
}
