/* The lexer of the template language.
 *
 * Text outside of tags is data. A tag is {{ expression }}, {% statement %} or {# comment #}; a minus inside its brackets
 * removes the whitespace on that side, {% raw %} protects what is inside. Two rules apply besides, because chat templates are
 * written for them: blanks between the start of a line and a statement or comment disappear (lstrip_blocks) unless it begins
 * with {%+, and so does one newline right behind it (trim_blocks). */
#include "data/template_lexer.h"

#include "base/mem.h"
#include "data/template_unicode.h"

typedef struct lexer {
    tp_ctx *ctx;
    tp_arena *arena;
    const char *name;
    const char *at, *end;
    uint32_t line;
    bool line_starting; /* the tag before ended in a newline */
    tp_jtoken *tokens;
    size_t n, capacity;
} lexer;

static tp_status lex_fail(lexer *l, const char *what)
{
    return tp_fail(l->ctx, TP_FORMAT, "%s:%u: %s", l->name, l->line, what);
}

static tp_status emit(lexer *l, tp_jtoken_kind kind, const char *text, size_t n)
{
    TP_TRY(tp_grow(l->ctx, &l->tokens, &l->capacity, l->n + 1, sizeof *l->tokens));
    l->tokens[l->n++] = (tp_jtoken){kind, l->line, {text, n}};
    return TP_OK;
}

/* Moves to `to`, counting lines. */
static void advance(lexer *l, const char *to)
{
    for (; l->at < to; l->at++) l->line += *l->at == '\n';
}

static const char *skip_space(const lexer *l, const char *p)
{
    int n;
    while ((n = tp_jspace_at(p, (size_t)(l->end - p))) > 0) p += n;
    return p;
}

static bool looking_at(const lexer *l, const char *p, const char *text)
{
    size_t n = strlen(text);
    return (size_t)(l->end - p) >= n && memcmp(p, text, n) == 0;
}

/* The end of a statement or comment at p ("%}", "-%}" with the space behind it, "+%}"), or NULL. A plain end takes one newline
 * along. */
static const char *match_close(const lexer *l, const char *p, const char *close)
{
    if (p < l->end && *p == '+' && looking_at(l, p + 1, close)) return p + 3;
    if (p < l->end && *p == '-' && looking_at(l, p + 1, close)) return skip_space(l, p + 3);
    if (!looking_at(l, p, close)) return NULL;
    return p + 2 < l->end && p[2] == '\n' ? p + 3 : p + 2;
}

/* Behind "{% raw %}" if p stands at its "{%", else NULL. */
static const char *match_raw_begin(const lexer *l, const char *p)
{
    p += 2;
    if (p < l->end && (*p == '-' || *p == '+')) p++;
    p = skip_space(l, p);
    if (!looking_at(l, p, "raw")) return NULL;
    p = skip_space(l, p + 3);
    if (looking_at(l, p, "-%}")) return skip_space(l, p + 3);
    return looking_at(l, p, "%}") ? p + 2 : NULL;
}

/* Behind "{% endraw %}" if p stands at its "{%", else NULL. */
static const char *match_raw_end(const lexer *l, const char *p)
{
    p += 2;
    if (p < l->end && (*p == '-' || *p == '+')) p++;
    p = skip_space(l, p);
    if (!looking_at(l, p, "endraw")) return NULL;
    return match_close(l, skip_space(l, p + 6), "%}");
}

/* Emits the data between l->at and the tag at `tag`, with the whitespace before the tag removed as its sign and kind ask for.
 */
static tp_status data_before(lexer *l, const char *tag, bool variable)
{
    const char *end = tag;
    char sign = tag + 2 < l->end ? tag[2] : '\0';
    if (sign == '-') {
        end = l->at + tp_jrstrip_len(l->at, (size_t)(tag - l->at));
    } else if (sign != '+' && !variable) {
        const char *line = tag;
        while (line > l->at && line[-1] != '\n') line--;
        bool at_line_start = line > l->at || l->line_starting;
        if (at_line_start && skip_space(l, line) >= tag) end = line;
    }
    if (end > l->at) TP_TRY(emit(l, TP_T_DATA, l->at, (size_t)(end - l->at)));
    advance(l, tag);
    return TP_OK;
}

static tp_status lex_comment(lexer *l)
{
    const char *p = l->at + 2;
    if (p < l->end && (*p == '-' || *p == '+')) p++;
    for (; p < l->end; p++) {
        const char *close = match_close(l, p, "#}");
        if (close != NULL) {
            advance(l, close);
            return TP_OK;
        }
    }
    return lex_fail(l, "comment without its end \"#}\"");
}

static tp_status lex_raw(lexer *l, const char *body)
{
    uint32_t line = l->line;
    advance(l, body);
    l->line_starting = body[-1] == '\n';
    for (const char *p = body; p + 1 < l->end; p++) {
        if (p[0] != '{' || p[1] != '%') continue;
        const char *close = match_raw_end(l, p);
        if (close == NULL) continue;
        TP_TRY(data_before(l, p, false));
        advance(l, close);
        return TP_OK;
    }
    l->line = line;
    return lex_fail(l, "{% raw %} without {% endraw %}");
}

/* ---- inside a tag ---- */

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* Writes the character of a \x, \u or \U escape with `digits` digits; returns false if they are not there. */
static bool unescape_hex(const char *p, const char *end, int digits, char **out)
{
    uint32_t code = 0;
    for (int i = 0; i < digits; i++) {
        int d = p + i < end ? hex_digit(p[i]) : -1;
        if (d < 0) return false;
        code = code << 4 | (uint32_t)d;
    }
    if (code > 0x10FFFF) return false;
    *out += tp_utf8_encode(code >= 0xD800 && code < 0xE000 ? 0xFFFD : code, *out);
    return true;
}

/* Resolves Python's escapes in [p, end); the result is never longer. */
static tp_status unescape(lexer *l, const char *p, const char *end, tp_span *result)
{
    static const char named[] = "\\\\''\"\"a\ab\bf\fn\nr\rt\tv\v";
    char *text = tp_arena_alloc(l->ctx, l->arena, (size_t)(end - p) + 1, 1), *out = text;
    if (text == NULL) return TP_NOMEM;
    while (p < end) {
        if (*p != '\\' || p + 1 >= end) {
            *out++ = *p++;
            continue;
        }
        char c = p[1];
        const char *known = NULL;
        for (size_t i = 0; i + 1 < sizeof named; i += 2)
            if (named[i] == c) known = &named[i + 1];
        if (c == '\n') {
            p += 2;
        } else if (known != NULL) {
            *out++ = *known;
            p += 2;
        } else if (c == 'x' || c == 'u' || c == 'U') {
            int digits = c == 'x' ? 2 : c == 'u' ? 4 : 8;
            if (!unescape_hex(p + 2, end, digits, &out)) return lex_fail(l, "malformed \\x, \\u or \\U escape in a string");
            p += 2 + digits;
        } else if (c >= '0' && c <= '7') {
            uint32_t code = 0;
            p++;
            for (int i = 0; i < 3 && p < end && *p >= '0' && *p <= '7'; i++) code = code * 8 + (uint32_t)(*p++ - '0');
            out += tp_utf8_encode(code, out);
        } else if (c == 'N') {
            return lex_fail(l, "\\N{...} escapes are not supported in strings");
        } else {
            *out++ = *p++;
        }
    }
    *result = (tp_span){text, (size_t)(out - text)};
    return TP_OK;
}

static tp_status lex_string(lexer *l)
{
    const char quote = *l->at, *begin = l->at + 1, *p = begin;
    while (p < l->end && *p != quote) p += *p == '\\' ? 2 : 1;
    if (p >= l->end) return lex_fail(l, "string without its closing quote");
    tp_span text = {NULL, 0};
    TP_TRY(unescape(l, begin, p, &text));
    TP_TRY(emit(l, TP_T_STRING, text.data, text.len));
    advance(l, p + 1);
    return TP_OK;
}

static bool is_digit(char c)
{
    return c >= '0' && c <= '9';
}

/* Digits of a base with single underscores between them; returns the end. */
static const char *skip_digits(const lexer *l, const char *p, int base, bool leading_underscore)
{
    bool underscore = leading_underscore;
    while (p < l->end) {
        int d = hex_digit(*p);
        if (d >= 0 && d < base) {
            underscore = true;
            p++;
        } else if (*p == '_' && underscore && p + 1 < l->end && (d = hex_digit(p[1])) >= 0 && d < base) {
            p += 2;
        } else {
            break;
        }
    }
    return p;
}

static tp_status lex_number(lexer *l)
{
    const char *p = l->at, *whole = skip_digits(l, p, 10, false), *q = whole;
    bool is_float = false, member = l->n > 0 && l->tokens[l->n - 1].kind == TP_T_DOT && p[-1] == '.';
    if (!member && q + 1 < l->end && *q == '.' && is_digit(q[1])) {
        q = skip_digits(l, q + 1, 10, false);
        is_float = true;
    }
    if (!member && q < l->end && (*q == 'e' || *q == 'E')) {
        const char *e = q + 1;
        if (e < l->end && (*e == '+' || *e == '-')) e++;
        if (e < l->end && is_digit(*e)) {
            q = skip_digits(l, e, 10, false);
            is_float = true;
        }
    }
    if (!is_float && *p == '0' && p + 1 < l->end) {
        int c = p[1] | 32, base = c == 'x' ? 16 : c == 'o' ? 8 : c == 'b' ? 2 : 0;
        const char *digits = base != 0 ? skip_digits(l, p + 2, base, true) : NULL;
        q = digits != NULL && digits > p + 2 ? digits : whole;
    }
    TP_TRY(emit(l, is_float ? TP_T_FLOAT : TP_T_INTEGER, p, (size_t)(q - p)));
    l->at = q;
    return TP_OK;
}

static tp_status lex_name(lexer *l, bool *matched)
{
    const char *p = l->at;
    int n;
    while (p < l->end && (n = tp_jword_at(p, (size_t)(l->end - p))) > 0) p += n;
    *matched = p > l->at;
    if (!*matched) return TP_OK;
    TP_TRY(emit(l, TP_T_NAME, l->at, (size_t)(p - l->at)));
    l->at = p;
    return TP_OK;
}

static const struct {
    char text[3];
    tp_jtoken_kind kind;
} operators[] = {{"//", TP_T_FLOORDIV}, {"**", TP_T_POW},   {"==", TP_T_EQ},      {"!=", TP_T_NE},      {">=", TP_T_GE},
                 {"<=", TP_T_LE},       {"+", TP_T_ADD},    {"-", TP_T_SUB},      {"/", TP_T_DIV},      {"*", TP_T_MUL},
                 {"%", TP_T_MOD},       {"~", TP_T_TILDE},  {"[", TP_T_LBRACKET}, {"]", TP_T_RBRACKET}, {"(", TP_T_LPAREN},
                 {")", TP_T_RPAREN},    {"{", TP_T_LBRACE}, {"}", TP_T_RBRACE},   {">", TP_T_GT},       {"<", TP_T_LT},
                 {"=", TP_T_ASSIGN},    {".", TP_T_DOT},    {":", TP_T_COLON},    {"|", TP_T_PIPE},     {",", TP_T_COMMA},
                 {";", TP_T_SEMICOLON}};

/* Brackets must match inside a tag; `open` holds the closing ones still to come. */
typedef struct brackets {
    char open[256];
    size_t n;
} brackets;

static tp_status track_bracket(lexer *l, brackets *b, char c)
{
    char closing = c == '(' ? ')' : c == '[' ? ']' : c == '{' ? '}' : '\0';
    if (closing != '\0') {
        if (b->n == sizeof b->open) return lex_fail(l, "more than 256 nested parentheses");
        b->open[b->n++] = closing;
    } else if (c == ')' || c == ']' || c == '}') {
        if (b->n == 0) return tp_fail(l->ctx, TP_FORMAT, "%s:%u: unexpected '%c'", l->name, l->line, c);
        if (b->open[--b->n] != c)
            return tp_fail(l->ctx, TP_FORMAT, "%s:%u: found '%c', expected '%c'", l->name, l->line, c, b->open[b->n]);
    }
    return TP_OK;
}

static tp_status lex_operator(lexer *l, brackets *b)
{
    for (size_t i = 0; i < sizeof operators / sizeof operators[0]; i++) {
        if (!looking_at(l, l->at, operators[i].text)) continue;
        size_t n = strlen(operators[i].text);
        if (n == 1) TP_TRY(track_bracket(l, b, *l->at));
        TP_TRY(emit(l, operators[i].kind, l->at, n));
        l->at += n;
        return TP_OK;
    }
    uint32_t c = 0;
    int n = tp_utf8_decode(l->at, (size_t)(l->end - l->at), &c);
    return tp_fail(l->ctx, TP_FORMAT, "%s:%u: unexpected character '%.*s' in a tag", l->name, l->line, n, l->at);
}

/* Behind the end of the tag if it stands at p. */
static const char *match_tag_end(const lexer *l, const char *p, bool block)
{
    if (block) return match_close(l, p, "%}");
    if (looking_at(l, p, "-}}")) return skip_space(l, p + 3);
    return looking_at(l, p, "}}") ? p + 2 : NULL;
}

static tp_status lex_tag(lexer *l, bool block)
{
    brackets b = {.n = 0};
    TP_TRY(emit(l, block ? TP_T_BLOCK_BEGIN : TP_T_VARIABLE_BEGIN, l->at, 2));
    l->at += 2;
    if (l->at < l->end && (*l->at == '-' || *l->at == '+')) l->at++;
    for (;;) {
        const char *end = b.n == 0 ? match_tag_end(l, l->at, block) : NULL;
        if (end != NULL) {
            TP_TRY(emit(l, block ? TP_T_BLOCK_END : TP_T_VARIABLE_END, l->at, 2));
            advance(l, end);
            return TP_OK;
        }
        const char *p = skip_space(l, l->at);
        if (p > l->at) {
            advance(l, p);
            continue;
        }
        if (l->at >= l->end) return TP_OK; /* the parser knows best what is missing */
        bool matched = false;
        if (is_digit(*l->at)) {
            TP_TRY(lex_number(l));
        } else if (*l->at == '\'' || *l->at == '"') {
            TP_TRY(lex_string(l));
        } else {
            TP_TRY(lex_name(l, &matched));
            if (!matched) TP_TRY(lex_operator(l, &b));
        }
    }
}

/* ---- the whole text ---- */

static tp_status lex_all(lexer *l)
{
    l->line_starting = true;
    while (l->at < l->end) {
        const char *p = l->at;
        while (p + 1 < l->end && !(p[0] == '{' && (p[1] == '%' || p[1] == '{' || p[1] == '#'))) p++;
        if (p + 1 >= l->end) {
            TP_TRY(emit(l, TP_T_DATA, l->at, (size_t)(l->end - l->at)));
            advance(l, l->end);
            break;
        }
        TP_TRY(data_before(l, p, p[1] == '{'));
        const char *raw = p[1] == '%' ? match_raw_begin(l, p) : NULL;
        if (raw != NULL)
            TP_TRY(lex_raw(l, raw));
        else if (p[1] == '#')
            TP_TRY(lex_comment(l));
        else
            TP_TRY(lex_tag(l, p[1] == '%'));
        l->line_starting = l->at > p && l->at[-1] == '\n';
    }
    return emit(l, TP_T_END, l->end, 0);
}

/* CR LF and lone CR become LF; one newline at the very end is dropped. Returns the new length. */
static size_t normalize_newlines(char *text, size_t n)
{
    size_t out = 0;
    for (size_t i = 0; i < n; i++) {
        if (text[i] == '\r') {
            text[out++] = '\n';
            if (i + 1 < n && text[i + 1] == '\n') i++;
        } else {
            text[out++] = text[i];
        }
    }
    return out > 0 && text[out - 1] == '\n' ? out - 1 : out;
}

tp_status tp_jlex(tp_ctx *ctx, tp_arena *arena, const char *name, char *text, size_t n, tp_jtoken **tokens)
{
    n = normalize_newlines(text, n);
    lexer l = {.ctx = ctx, .arena = arena, .name = name, .at = text, .end = text + n, .line = 1};
    tp_status st = lex_all(&l);
    if (st != TP_OK) {
        tp_free(l.tokens);
        return st;
    }
    *tokens = l.tokens;
    return TP_OK;
}
