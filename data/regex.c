/* Oniguruma's dialect on PCRE2, with limits. */
#include "data/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "base/mem.h"

struct tp_regex {
    pcre2_code *code;
    char *where;
};

/* ---- translation ---- */

/* White_Space; PCRE2's own \s also takes U+180E. */
#define SPACES "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
/* Alphabetic, marks, decimal digits, connectors; PCRE2's \w has no marks. */
#define WORDS                                                                                                                  \
    "\\p{L}\\p{M}\\p{Nd}\\p{Nl}\\p{Pc}\\x{24b6}-\\x{24e9}\\x{1f130}-\\x{1f149}\\x{1f150}-\\x{1f169}\\x{1f170}-\\x{1f189}"
#define HEX "0-9a-fA-F"

struct translation {
    const char *where;
    tp_span in;
    size_t at;
    int depth; /* of character classes */
    tp_buf out;
};

static tp_status refuse(tp_ctx *ctx, const struct translation *t, const char *what)
{
    return tp_fail(ctx, TP_UNSUPPORTED, "%s: regex \"%.*s\": %s at offset %zu is not supported", t->where,
                   (int)(t->in.len < 200 ? t->in.len : 200), t->in.data, what, t->at);
}

/* The set that a backslash letter names, or NULL; *negated for the upper-case letter. */
static const char *named_set(char letter, bool *negated)
{
    *negated = letter >= 'A' && letter <= 'Z';
    switch (letter | 0x20) {
    case 's': return SPACES;
    case 'w': return WORDS;
    case 'h': return HEX;
    default: return NULL;
    }
}

static tp_status translate_escape(tp_ctx *ctx, struct translation *t)
{
    bool negated;
    if (t->at + 1 >= t->in.len) return refuse(ctx, t, "a backslash at the end");
    const char *set = named_set(t->in.data[t->at + 1], &negated);
    if (set == NULL) {
        tp_buf_append(&t->out, t->in.data + t->at, 2);
    } else if (t->depth == 0) {
        tp_buf_text(&t->out, negated ? "[^" : "[");
        tp_buf_text(&t->out, set);
        tp_buf_char(&t->out, ']');
    } else if (!negated) {
        tp_buf_text(&t->out, set);
    } else if (t->in.data[t->at + 1] == 'S') {
        tp_buf_text(&t->out, "\\S"); /* differs in U+180E alone */
    } else {
        return refuse(ctx, t, "a negated set inside a character class");
    }
    t->at += 2;
    return TP_OK;
}

/* "[" inside a class: a POSIX class is copied, a nested class is a union and loses its brackets. */
static tp_status translate_nested(tp_ctx *ctx, struct translation *t)
{
    const char *rest = t->in.data + t->at;
    size_t n = t->in.len - t->at;
    if (n > 1 && rest[1] == ':') {
        const char *close = memmem(rest, n, ":]", 2);
        if (close != NULL) {
            tp_buf_append(&t->out, rest, (size_t)(close - rest) + 2);
            t->at += (size_t)(close - rest) + 2;
            return TP_OK;
        }
    }
    if (n > 1 && rest[1] == '^') return refuse(ctx, t, "a negated class inside a character class");
    t->depth++;
    t->at++;
    return TP_OK;
}

static tp_status translate_in_class(tp_ctx *ctx, struct translation *t)
{
    char c = t->in.data[t->at];
    if (c == '[') return translate_nested(ctx, t);
    if (c == '&' && t->at + 1 < t->in.len && t->in.data[t->at + 1] == '&') return refuse(ctx, t, "an intersection of classes");
    if (c == ']') {
        t->depth--;
        if (t->depth > 0) {
            t->at++;
            return TP_OK;
        }
    }
    tp_buf_char(&t->out, c);
    t->at++;
    return TP_OK;
}

static tp_status translate(tp_ctx *ctx, struct translation *t)
{
    while (t->at < t->in.len) {
        char c = t->in.data[t->at];
        if (c == '\\') {
            TP_TRY(translate_escape(ctx, t));
        } else if (t->depth > 0) {
            TP_TRY(translate_in_class(ctx, t));
        } else {
            tp_buf_char(&t->out, c);
            t->at++;
            if (c == '[') {
                t->depth = 1;
                if (t->at < t->in.len && t->in.data[t->at] == '^') {
                    tp_buf_char(&t->out, '^');
                    t->at++;
                }
            }
        }
    }
    return tp_buf_status(ctx, &t->out, t->where);
}

/* ---- compiling ---- */

static void *pcre_alloc(size_t bytes, void *unused)
{
    (void)unused;
    return tp_alloc_raw(NULL, bytes, 1);
}

static void pcre_free(void *memory, void *unused)
{
    (void)unused;
    tp_free(memory);
}

static tp_status compile(tp_ctx *ctx, tp_regex *regex, const tp_buf *pattern, tp_span original)
{
    int error = 0;
    PCRE2_SIZE offset = 0;
    pcre2_general_context *memory = pcre2_general_context_create(pcre_alloc, pcre_free, NULL);
    pcre2_compile_context *options = memory != NULL ? pcre2_compile_context_create(memory) : NULL;
    tp_status status = TP_OK;
    if (options == NULL) {
        status = tp_fail(ctx, TP_NOMEM, "%s: regex: out of memory", regex->where);
    } else {
        pcre2_set_newline(options, PCRE2_NEWLINE_LF);
        pcre2_set_max_pattern_length(options, 1u << 20);
        regex->code =
            pcre2_compile((PCRE2_SPTR)tp_buf_cstr(pattern), pattern->len,
                          PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &error, &offset, options);
        if (regex->code == NULL) {
            PCRE2_UCHAR message[128] = "";
            pcre2_get_error_message(error, message, sizeof message);
            status =
                tp_fail(ctx, error == PCRE2_ERROR_HEAP_FAILED ? TP_NOMEM : TP_FORMAT, "%s: regex \"%.*s\" does not compile: %s",
                        regex->where, (int)(original.len < 200 ? original.len : 200), original.data, (const char *)message);
        }
    }
    pcre2_compile_context_free(options);
    pcre2_general_context_free(memory);
    return status;
}

tp_status tp_regex_new(tp_ctx *ctx, const char *where, tp_span pattern, tp_regex **out)
{
    struct translation t = {.where = where, .in = pattern};
    *out = NULL;
    tp_regex *regex = tp_alloc(ctx, 1, sizeof *regex);
    if (regex == NULL) return TP_NOMEM;
    tp_buf_init(&t.out, 0);
    regex->where = tp_strdup(ctx, where);
    tp_status status = regex->where != NULL ? translate(ctx, &t) : TP_NOMEM;
    if (status == TP_OK) status = compile(ctx, regex, &t.out, pattern);
    tp_buf_free(&t.out);
    if (status == TP_OK)
        *out = regex;
    else
        tp_regex_free(regex);
    return status;
}

void tp_regex_free(tp_regex *regex)
{
    if (regex == NULL) return;
    pcre2_code_free(regex->code);
    tp_free(regex->where);
    tp_free(regex);
}

/* ---- matching ---- */

#define STEPS_AT_FIRST  1024u
#define STEPS_AT_MOST   (1u << 30)
#define BUDGET_BASE     (UINT64_C(1) << 20)
#define BUDGET_PER_BYTE 64u
#define HEAP_LIMIT_KIB  65536u

uint64_t tp_regex_budget(size_t n)
{
    return BUDGET_BASE + (n < UINT64_MAX / (2 * BUDGET_PER_BYTE) ? BUDGET_PER_BYTE * (uint64_t)n : UINT64_MAX / 2);
}

tp_status tp_regex_begin(tp_ctx *ctx, const tp_regex *regex, const char *text, size_t n, uint64_t *budget, tp_regex_walk *walk)
{
    *walk = (tp_regex_walk){.regex = regex, .text = text, .n = n, .last_end = SIZE_MAX, .budget = budget};
    pcre2_general_context *memory = pcre2_general_context_create(pcre_alloc, pcre_free, NULL);
    if (memory != NULL) {
        walk->data = pcre2_match_data_create_from_pattern(regex->code, memory);
        walk->context = pcre2_match_context_create(memory);
    }
    pcre2_general_context_free(memory); /* its functions were copied */
    if (walk->data == NULL || walk->context == NULL) return tp_fail(ctx, TP_NOMEM, "%s: regex: out of memory", regex->where);
    pcre2_set_heap_limit(walk->context, HEAP_LIMIT_KIB);
    return TP_OK;
}

void tp_regex_end(tp_regex_walk *walk)
{
    pcre2_match_data_free(walk->data);
    pcre2_match_context_free(walk->context);
    *walk = (tp_regex_walk){0};
}

/* PCRE2 counts steps from zero at each starting place, so the first limit bounds the whole walk by a multiple of the
 * text; larger limits are paid from the budget. */
static int match_with_budget(tp_regex_walk *walk)
{
    for (uint32_t steps = STEPS_AT_FIRST;; steps *= 16) {
        pcre2_set_match_limit(walk->context, steps);
        int rc = pcre2_match(walk->regex->code, (PCRE2_SPTR)walk->text, walk->n, walk->at, PCRE2_NO_UTF_CHECK, walk->data,
                             walk->context);
        if (rc != PCRE2_ERROR_MATCHLIMIT || steps > STEPS_AT_MOST / 16 || *walk->budget < steps * UINT64_C(16)) return rc;
        *walk->budget -= steps * UINT64_C(16);
    }
}

static tp_status search(tp_ctx *ctx, tp_regex_walk *walk, bool *found)
{
    int rc = match_with_budget(walk);
    *found = rc >= 0;
    if (rc >= 0 || rc == PCRE2_ERROR_NOMATCH) return TP_OK;
    if (rc == PCRE2_ERROR_NOMEMORY) return tp_fail(ctx, TP_NOMEM, "%s: regex: out of memory", walk->regex->where);
    if (rc == PCRE2_ERROR_MATCHLIMIT || rc == PCRE2_ERROR_HEAPLIMIT || rc == PCRE2_ERROR_DEPTHLIMIT)
        return tp_fail(ctx, TP_UNSUPPORTED, "%s: regex: takes too many steps on a text of %zu bytes, at byte %zu",
                       walk->regex->where, walk->n, walk->at);
    return tp_fail(ctx, TP_UNSUPPORTED, "%s: regex: matching failed with PCRE2 error %d", walk->regex->where, rc);
}

tp_status tp_regex_next(tp_ctx *ctx, tp_regex_walk *walk, bool *found, size_t *begin, size_t *end)
{
    *found = false;
    while (walk->at <= walk->n) {
        TP_TRY(search(ctx, walk, found));
        if (!*found) {
            walk->at = walk->n + 1;
            return TP_OK;
        }
        const PCRE2_SIZE *ovector = pcre2_get_ovector_pointer(walk->data);
        *begin = ovector[0] < ovector[1] ? ovector[0] : ovector[1]; /* \K may put the begin behind the end */
        *end = ovector[1];
        if (*begin < *end || *end != walk->last_end) {
            walk->at = walk->last_end = *end;
            return TP_OK;
        }
        walk->at++;
        while (walk->at < walk->n && ((unsigned char)walk->text[walk->at] & 0xc0) == 0x80) walk->at++;
    }
    *found = false;
    return TP_OK;
}
