/* The hand-written scanners against PCRE2 on random texts, and what the regex layer promises. */
#include "tests/support.h"

#include "data/regex.h"
#include "data/scan.h"
#include "data/unicode.h"

/* Characters of every general category, doubled where a pattern names them: blanks of all kinds, newlines, apostrophes and
 * the letters of contractions, U+017F, U+212A, marks, digits of several scripts, CJK, symbols, controls, U+180E. */
static const uint32_t alphabet[] = {
    ' ',    ' ',     ' ',     '\n',    '\n',   '\r',    '\t',   0x0b,   0x85,   0xa0,   0x1680, 0x2003, 0x2028, 0x2029,
    0x202f, 0x205f,  0x3000,  0x180e,  0x200b, 0x200d,  0xfeff, '\'',   '\'',   '\'',   's',    't',    'r',    'e',
    'v',    'm',     'l',     'L',     'd',    'S',     'T',    'E',    0x17f,  0x212a, 'a',    'Z',    '0',    '1',
    '9',    0xb2,    0x664,   0x967,   0x2167, 0x1d7d8, 0xbd,   '.',    ',',    '!',    '_',    '-',    '(',    0xab,
    0x2019, '+',     '$',     '^',     0xa9,   0x301,   0x93e,  0x20dd, 0x1c5,  0x2b0,  0x5d0,  0x639,  0x4f60, 0x3042,
    0xac00, 0x1f600, 0x1f3fd, 0x10330, 0,      0x1f,    0x7f,   0xad,   0xe000, 0xfffd,
};

/* Numerical Recipes' 64-bit linear congruential generator: the same texts in every run. */
static uint32_t next_random(uint64_t *state)
{
    *state = *state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(*state >> 33);
}

static size_t random_text(uint64_t *random, char *text, size_t n_chars)
{
    size_t n = 0;
    uint32_t c = ' ';
    for (size_t i = 0; i < n_chars; i++) {
        if (next_random(random) % 3 != 0 || i == 0) c = alphabet[next_random(random) % (sizeof alphabet / sizeof *alphabet)];
        n += (size_t)tp_utf8_encode(c, text + n); /* a third repeats: runs */
    }
    return n;
}

static void compare_cuts(const tp_scanner *scanner, const tp_regex *regex, const char *text, size_t n)
{
    tp_ctx ctx;
    tp_regex_walk walk;
    bool found = true;
    size_t at = 0, begin, end;
    uint64_t budget = tp_regex_budget(n);
    tp_ctx_init(&ctx);
    assert_ok(&ctx, tp_regex_begin(&ctx, regex, text, n, &budget, &walk));
    for (;;) {
        assert_ok(&ctx, tp_regex_next(&ctx, &walk, &found, &begin, &end));
        if (!found) break;
        assert_int_equal(begin, at); /* these patterns leave nothing out */
        size_t cut = tp_scanner_next(scanner, text, n, at);
        if (cut != end)
            fail_msg("%s: cut at %zu, the pattern at %zu, of \"%.*s\"", scanner->name, cut, end, (int)(n - at), text + at);
        at = end;
    }
    assert_int_equal(at, n);
    tp_regex_end(&walk);
}

static void test_scanners_cut_as_the_patterns_do(void **state)
{
    (void)state;
    tp_ctx ctx;
    char text[4 * 64];
    tp_ctx_init(&ctx);
    for (size_t i = 0; tp_scanner_at(i) != NULL; i++) {
        const tp_scanner *scanner = tp_scanner_at(i);
        tp_regex *regex;
        uint64_t random = 7 + i;
        assert_ptr_equal(tp_scanner_find(tp_span_of(scanner->pattern)), scanner);
        assert_ok(&ctx, tp_regex_new(&ctx, "test", tp_span_of(scanner->pattern), &regex));
        for (int k = 0; k < 20000; k++)
            compare_cuts(scanner, regex, text, random_text(&random, text, 1 + next_random(&random) % 24));
        tp_regex_free(regex);
    }
}

/* Ends of the matches of a pattern, as a bit per byte offset; texts are short. */
static uint64_t match_ends(const char *pattern, const char *text)
{
    tp_ctx ctx;
    tp_regex *regex;
    tp_regex_walk walk;
    bool found = true;
    size_t begin, end;
    uint64_t ends = 0, budget = tp_regex_budget(strlen(text));
    tp_ctx_init(&ctx);
    assert_ok(&ctx, tp_regex_new(&ctx, "test", tp_span_of(pattern), &regex));
    assert_ok(&ctx, tp_regex_begin(&ctx, regex, text, strlen(text), &budget, &walk));
    for (;;) {
        assert_ok(&ctx, tp_regex_next(&ctx, &walk, &found, &begin, &end));
        if (!found) break;
        ends |= UINT64_C(1) << end;
    }
    tp_regex_end(&walk);
    tp_regex_free(regex);
    return ends;
}

static void test_dialect(void **state)
{
    (void)state;
    assert_int_equal(match_ends("\\s", "\u180e \u3000"), 1u << 4 | 1u << 7); /* U+180E is no blank */
    assert_int_equal(match_ends("[^\\s]", "\u180e "), 1u << 3);
    assert_int_equal(match_ends("\\w+", "e\u0301x-\u2167"), 1u << 4 | 1u << 8); /* marks and letter numbers are words */
    assert_int_equal(match_ends("\\h+", "xfF09g"), 1u << 5);                    /* hexadecimal digits, no blanks */
    assert_int_equal(match_ends("[^(\\s|[.,])]+", "ab.cd (e"), 1u << 2 | 1u << 5 | 1u << 8); /* a class in a class */
    assert_int_equal(match_ends("b$", "ab\nb"), 1u << 2 | 1u << 4);                          /* $ at each line */
    assert_int_equal(match_ends("a*", "baac"), 1u << 0 | 1u << 3 | 1u << 4); /* empty matches, none behind a match */
    assert_int_equal(match_ends("", "\u00e9a"), 1u << 0 | 1u << 2 | 1u << 3);
}

static void test_refused_patterns(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_regex *regex;
    tp_ctx_init(&ctx);
    assert_status(&ctx, TP_FORMAT, tp_regex_new(&ctx, "t", tp_span_of("(a"), &regex));
    assert_status(&ctx, TP_FORMAT, tp_regex_new(&ctx, "t", tp_span_of("[a"), &regex));
    assert_status(&ctx, TP_FORMAT, tp_regex_new(&ctx, "t", tp_span_of("\\p{Nonsense}"), &regex));
    assert_status(&ctx, TP_UNSUPPORTED, tp_regex_new(&ctx, "t", tp_span_of("[a-z&&[^c]]"), &regex));
    assert_status(&ctx, TP_UNSUPPORTED, tp_regex_new(&ctx, "t", tp_span_of("[a[^b]]"), &regex));
    assert_status(&ctx, TP_UNSUPPORTED, tp_regex_new(&ctx, "t", tp_span_of("a\\"), &regex));
    assert_null(regex);
}

/* Nested quantifiers end in an error; long but harmless runs do not. */
static void test_limits(void **state)
{
    (void)state;
    enum { MANY = 300000 };
    tp_ctx ctx;
    tp_regex *slow, *runs;
    tp_regex_walk walk;
    bool found;
    size_t begin, end;
    char *text = malloc(MANY);
    uint64_t budget = tp_regex_budget(5001);
    tp_ctx_init(&ctx);
    memset(text, 'a', MANY);
    text[5000] = 'b';
    assert_ok(&ctx, tp_regex_new(&ctx, "t", tp_span_of("((a+)+)+$"), &slow));
    assert_ok(&ctx, tp_regex_begin(&ctx, slow, text, 5001, &budget, &walk));
    assert_status(&ctx, TP_UNSUPPORTED, tp_regex_next(&ctx, &walk, &found, &begin, &end));
    tp_regex_end(&walk);
    tp_regex_free(slow);
    memset(text, ' ', MANY);
    budget = tp_regex_budget(MANY);
    assert_ok(&ctx, tp_regex_new(&ctx, "t", tp_span_of("\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"), &runs));
    assert_ok(&ctx, tp_regex_begin(&ctx, runs, text, MANY, &budget, &walk));
    assert_ok(&ctx, tp_regex_next(&ctx, &walk, &found, &begin, &end));
    assert_true(found && begin == 0 && end == MANY);
    tp_regex_end(&walk);
    tp_regex_free(runs);
    free(text);
}

/* Closed forms: Unicode's own examples, and marks in an order that a quadratic sort would not survive. */
static void check_form(tp_normal_form form, const char *text, const char *expected)
{
    tp_ctx ctx;
    tp_normal_scratch scratch = {0};
    tp_buf out, all;
    tp_ctx_init(&ctx);
    tp_buf_init(&out, 0);
    tp_buf_init(&all, 0);
    for (size_t i = 0, n; i < strlen(text); i += n) {
        n = tp_normal_segment(text + i, strlen(text) - i, form);
        assert_ok(&ctx, tp_normal_convert(&ctx, &scratch, text + i, n, form, &out));
        tp_buf_append(&all, out.data, out.len);
    }
    assert_string_equal(tp_buf_cstr(&all), expected);
    free(scratch.chars);
    tp_buf_free(&out);
    tp_buf_free(&all);
}

static void test_normal_forms(void **state)
{
    (void)state;
    check_form(TP_NFC, "\u1e9b\u0323", "\u1e9b\u0323"); /* UAX 15, figure 6 */
    check_form(TP_NFD, "\u1e9b\u0323", "\u017f\u0323\u0307");
    check_form(TP_NFKC, "\u1e9b\u0323", "\u1e69");
    check_form(TP_NFKD, "\u1e9b\u0323", "s\u0323\u0307");
    check_form(TP_NFC, "A\u030a\u1100\u1161\u11a8x", "\u00c5\uac01x");
    check_form(TP_NFC, "\u0958\u09c7\u09be", "\u0915\u093c\u09cb"); /* an exclusion; a vowel sign that composes */
    check_form(TP_NFKC, "\uff76\uff9e\ufb01\u00bd",
               "\u30ac"
               "fi1\u2044"
               "2");
    enum { MANY = 200000 };
    char *text = malloc(4 * MANY + 2), *expected = malloc(4 * MANY + 2);
    text[0] = expected[0] = 'q';
    for (size_t i = 0; i < MANY; i++) {
        memcpy(text + 1 + 4 * i, "\u0301\u0323", 4);
        memcpy(expected + 1 + 2 * i, "\u0323", 2);
        memcpy(expected + 1 + 2 * MANY + 2 * i, "\u0301", 2);
    }
    text[4 * MANY + 1] = expected[4 * MANY + 1] = '\0';
    check_form(TP_NFD, text, expected);
    free(text);
    free(expected);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_scanners_cut_as_the_patterns_do),
        cmocka_unit_test(test_dialect),
        cmocka_unit_test(test_refused_patterns),
        cmocka_unit_test(test_limits),
        cmocka_unit_test(test_normal_forms),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
