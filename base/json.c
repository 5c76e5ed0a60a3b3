/* JSON parser and lookups.
 *
 * Values are pushed on a stack as they are read. When a container closes, its children are the top of the stack: they
 * move to their final, contiguous place in the pool and leave the container alone on the stack. So every container's
 * children lie side by side, element i is one addition away, and there is no recursion. Strings without escapes point
 * into the text; the others are decoded into the pool. */
#include "base/json.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/file.h"
#include "base/json_node.h"
#include "base/map.h"
#include "base/mem.h"

#define CHUNK_MIN      1024u
#define CHUNK_MAX      (1u << 20)
#define SMALL_COUNT    16u               /* objects up to here are searched member by member */
#define AHEAD          8u                /* members between a prefetch and its use */
#define NO_PARENT      UINT32_MAX        /* of the root on the stack */
#define READ_MAX_NODES ((size_t)1 << 22) /* of a whole file: 100 MB */

typedef struct chunk {
    struct chunk *next;
    size_t used, size;
    char bytes[];
} chunk;

struct tp_json_doc {
    const char *text;
    size_t n;
    size_t first_line;
    char *name;
    char *owned; /* memory that text or values lie in, or NULL */
    tp_json root;
    chunk *pool; /* newest first */
};

typedef struct parser {
    tp_ctx *ctx;
    tp_json_doc *doc;
    const char *p, *end;
    bool allow_duplicates, strict_surrogates;
    size_t max_depth, max_nodes;
    size_t depth, n_nodes;
    tp_json *stack;
    size_t top, capacity;
    uint32_t open;            /* innermost open container on the stack, or NO_PARENT */
    tp_json_member_fn member; /* tp_json_each */
    void *user;
} parser;

/* ---- memory ---- */

static void *pool_take(parser *ps, size_t bytes)
{
    tp_json_doc *doc = ps->doc;
    bytes = (bytes + 7) & ~(size_t)7; /* callers pass at most 32 times a 32-bit count */
    chunk *c = doc->pool;
    if (c == NULL || c->size - c->used < bytes) {
        size_t size = c == NULL ? CHUNK_MIN : c->size < CHUNK_MAX / 2 ? c->size * 2 : CHUNK_MAX;
        if (size < bytes) size = bytes;
        c = tp_alloc_raw(ps->ctx, sizeof *c + size, 1);
        if (c == NULL) return NULL;
        *c = (chunk){.next = doc->pool, .size = size};
        doc->pool = c;
    }
    void *memory = c->bytes + c->used;
    c->used += bytes;
    return memory;
}

static void pool_free(chunk *c)
{
    while (c != NULL) {
        chunk *next = c->next;
        tp_free(c);
        c = next;
    }
}

/* ---- messages ---- */

static void line_and_column(const tp_json_doc *doc, size_t offset, size_t *line, size_t *column)
{
    *line = doc->first_line;
    *column = 1;
    for (size_t i = 0; i < offset && i < doc->n; i++) {
        if (doc->text[i] == '\n') {
            *line += 1;
            *column = 1;
        } else if (((unsigned char)doc->text[i] & 0xc0) != 0x80) { /* characters, not bytes */
            *column += 1;
        }
    }
}

/* At ps->p: "expected <what>, found <the character there>". */
static tp_status expected(parser *ps, const char *what)
{
    size_t line, column;
    line_and_column(ps->doc, (size_t)(ps->p - ps->doc->text), &line, &column);
    if (ps->p == ps->end) {
        return tp_fail(ps->ctx, TP_FORMAT, "%s:%zu:%zu: expected %s, found the end of the text", ps->doc->name, line, column,
                       what);
    }
    uint32_t codepoint;
    int bytes = tp_utf8_decode(ps->p, (size_t)(ps->end - ps->p), &codepoint);
    if (bytes == 0 || codepoint == 0) {
        return tp_fail(ps->ctx, TP_FORMAT, "%s:%zu:%zu: expected %s, found byte 0x%02x", ps->doc->name, line, column, what,
                       (unsigned)(unsigned char)*ps->p);
    }
    return tp_fail(ps->ctx, TP_FORMAT, "%s:%zu:%zu: expected %s, found '%.*s'", ps->doc->name, line, column, what, bytes,
                   ps->p);
}

static tp_status fail_at(parser *ps, size_t offset, const char *what)
{
    size_t line, column;
    line_and_column(ps->doc, offset, &line, &column);
    return tp_fail(ps->ctx, TP_FORMAT, "%s:%zu:%zu: %s", ps->doc->name, line, column, what);
}

/* ---- scalars ---- */

static void skip_blanks(parser *ps)
{
    while (ps->p < ps->end && (*ps->p == ' ' || *ps->p == '\n' || *ps->p == '\t' || *ps->p == '\r')) ps->p++;
}

/* A new node on the stack for what begins at ps->p. It stays where it is until the next push, so values are filled in
 * place. */
static tp_status push(parser *ps, tp_json **out)
{
    if (ps->max_nodes > 0 && ps->n_nodes >= ps->max_nodes) {
        char what[64];
        snprintf(what, sizeof what, "more than %zu values", ps->max_nodes);
        return fail_at(ps, (size_t)(ps->p - ps->doc->text), what);
    }
    ps->n_nodes++;
    if (ps->top == ps->capacity) TP_TRY(tp_grow(ps->ctx, &ps->stack, &ps->capacity, ps->top + 1, sizeof *ps->stack));
    *out = &ps->stack[ps->top++];
    **out = (tp_json){.offset = (uint32_t)(ps->p - ps->doc->text)};
    return TP_OK;
}

static bool is_digit(const parser *ps)
{
    return ps->p < ps->end && *ps->p >= '0' && *ps->p <= '9';
}

static tp_status digits(parser *ps)
{
    if (!is_digit(ps)) return expected(ps, "a digit");
    while (is_digit(ps)) ps->p++;
    return TP_OK;
}

static tp_status parse_number(parser *ps, tp_json *node)
{
    const char *begin = ps->p;
    if (*ps->p == '-') ps->p++;
    if (ps->p < ps->end && *ps->p == '0') {
        ps->p++;
        if (is_digit(ps)) return expected(ps, "no digit after a leading zero");
    } else {
        TP_TRY(digits(ps));
    }
    if (ps->p < ps->end && *ps->p == '.') {
        ps->p++;
        TP_TRY(digits(ps));
    }
    if (ps->p < ps->end && (*ps->p == 'e' || *ps->p == 'E')) {
        ps->p++;
        if (ps->p < ps->end && (*ps->p == '+' || *ps->p == '-')) ps->p++;
        TP_TRY(digits(ps));
    }
    node->type = TP_JSON_NUMBER;
    node->at.text = begin;
    node->len = (uint32_t)(ps->p - begin);
    return TP_OK;
}

static tp_status parse_word(parser *ps, const char *word, tp_json *node, tp_json_type type, bool flag)
{
    for (; *word != '\0'; word++, ps->p++)
        if (ps->p == ps->end || *ps->p != *word) return expected(ps, "null, true or false");
    node->type = (uint8_t)type;
    node->flag = flag;
    return TP_OK;
}

/* Four hexadecimal digits at p, or -1. */
static int32_t hex4(const char *p, const char *end)
{
    if (end - p < 4) return -1;
    int32_t value = 0;
    for (int i = 0; i < 4; i++) {
        int c = (unsigned char)p[i], digit;
        if (c >= '0' && c <= '9')
            digit = c - '0';
        else if ((c | 32) >= 'a' && (c | 32) <= 'f')
            digit = (c | 32) - 'a' + 10;
        else
            return -1;
        value = value << 4 | digit;
    }
    return value;
}

/* Escapes are checked while the string is scanned and decoded afterwards, when its length is known. On entry ps->p is at
 * the backslash, on return behind the escape. */
static tp_status check_escape(parser *ps)
{
    const char *escape = ps->p++;
    if (ps->p == ps->end || *ps->p == '\0' || strchr("\"\\/bfnrtu", *ps->p) == NULL) {
        return expected(ps, "one of \"\\/bfnrtu after the backslash");
    }
    if (*ps->p++ != 'u') return TP_OK;
    int32_t unit = hex4(ps->p, ps->end);
    if (unit < 0) return expected(ps, "four hexadecimal digits after \\u");
    ps->p += 4;
    if (!ps->strict_surrogates || unit < 0xd800 || unit > 0xdfff) return TP_OK;
    int32_t low = ps->end - ps->p >= 6 && ps->p[0] == '\\' && ps->p[1] == 'u' ? hex4(ps->p + 2, ps->end) : -1;
    if (unit > 0xdbff || low < 0xdc00 || low > 0xdfff) {
        return fail_at(ps, (size_t)(escape - ps->doc->text), "half of a surrogate pair without the other half");
    }
    ps->p += 6;
    return TP_OK;
}

/* Decodes a checked string; out has room for as many bytes as the raw text. Returns the decoded length. */
static size_t decode_string(const char *p, const char *end, char *out)
{
    char *begin = out;
    while (p < end) {
        if (*p != '\\') {
            *out++ = *p++;
            continue;
        }
        char c = p[1];
        p += 2;
        switch (c) {
        case 'b': *out++ = '\b'; break;
        case 'f': *out++ = '\f'; break;
        case 'n': *out++ = '\n'; break;
        case 'r': *out++ = '\r'; break;
        case 't': *out++ = '\t'; break;
        case 'u': {
            int32_t unit = hex4(p, end);
            p += 4;
            if (unit >= 0xd800 && unit <= 0xdbff && end - p >= 6 && p[0] == '\\' && p[1] == 'u') {
                int32_t low = hex4(p + 2, end);
                if (low >= 0xdc00 && low <= 0xdfff) {
                    unit = 0x10000 + ((unit - 0xd800) << 10) + (low - 0xdc00);
                    p += 6;
                }
            }
            if (unit >= 0xd800 && unit <= 0xdfff) unit = 0xfffd;
            out += tp_utf8_encode((uint32_t)unit, out); /* 6 bytes of text give at most 3, 12 give 4 */
            break;
        }
        default: *out++ = c; break; /* quote, backslash, slash */
        }
    }
    return (size_t)(out - begin);
}

/* Advances over bytes that need no thought: ASCII from the blank on, but quote and backslash. */
static const char *skip_plain(const char *p, const char *end)
{
    const uint64_t ones = 0x0101010101010101u, highs = 0x8080808080808080u;
    while (end - p >= 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        uint64_t quote = word ^ ones * '"', backslash = word ^ ones * '\\';
        /* The high bit of a byte is set where a xor gave zero, where the byte is below 0x20, and where it is not ASCII.
         * Borrows may set it in bytes after such a one, never before: the lowest is right (files and hosts are little-endian).
         */
        uint64_t special =
            (((quote - ones) & ~quote) | ((backslash - ones) & ~backslash) | (word - ones * 0x20) | word) & highs;
        if (special != 0) return p + __builtin_ctzll(special) / 8;
        p += 8;
    }
    while (p < end && (unsigned char)*p >= 0x20 && (unsigned char)*p < 0x80 && *p != '"' && *p != '\\') p++;
    return p;
}

static tp_status parse_string(parser *ps, tp_json *node)
{
    const char *begin = ++ps->p;
    bool escaped = false;
    for (;;) {
        ps->p = skip_plain(ps->p, ps->end);
        if (ps->p == ps->end) return expected(ps, "a closing quote");
        unsigned char c = (unsigned char)*ps->p;
        if (c == '"') break;
        if (c == '\\') {
            escaped = true;
            TP_TRY(check_escape(ps));
        } else if (c < 0x20) {
            return expected(ps, "an escape in place of a control character");
        } else {
            uint32_t codepoint;
            int bytes = tp_utf8_decode(ps->p, (size_t)(ps->end - ps->p), &codepoint);
            if (bytes == 0) return expected(ps, "valid UTF-8");
            ps->p += bytes;
        }
    }
    node->type = TP_JSON_STRING;
    node->flag = escaped;
    node->at.text = begin;
    node->len = (uint32_t)(ps->p - begin);
    if (escaped) {
        char *decoded = pool_take(ps, node->len);
        if (decoded == NULL) return TP_NOMEM;
        node->len = (uint32_t)decode_string(begin, ps->p, decoded);
        node->at.text = decoded;
    }
    ps->p++;
    return TP_OK;
}

/* ---- objects: repeated keys, hash index ---- */

static tp_span key_of(const tp_json *members, size_t i)
{
    return (tp_span){members[2 * i].at.text, members[2 * i].len};
}

/* The slot of the key, or the empty slot where it belongs. A slot holds a member's number + 1 in as many bits as a place in
 * the table takes, and the rest of its hash above them: members with other hashes are passed without a look at their keys,
 * which would be a cache miss each. */
static size_t find_slot(const uint32_t *slots, uint32_t mask, const tp_json *members, tp_span key, uint32_t hash)
{
    uint32_t i = hash & mask;
    for (; slots[i] != 0; i = (i + 1) & mask) {
        if (((slots[i] ^ hash) & ~mask) == 0 && tp_span_equal(key_of(members, (slots[i] & mask) - 1), key)) break;
    }
    return i;
}

static tp_status repeated_key(parser *ps, const tp_json *first, const tp_json *second)
{
    size_t line, column, first_line, first_column;
    line_and_column(ps->doc, first->offset, &first_line, &first_column);
    line_and_column(ps->doc, second->offset, &line, &column);
    int shown = second->len < 64 ? (int)second->len : 64;
    return tp_fail(ps->ctx, TP_FORMAT, "%s:%zu:%zu: repeated key \"%.*s\", first at %zu:%zu", ps->doc->name, line, column,
                   shown, second->at.text, first_line, first_column);
}

/* Hashes the key of member i and asks for its slot: the table is large and the order random, so this runs some members
 * ahead of the search. */
static void look_ahead(tp_json *members, uint32_t i, uint32_t count, const uint32_t *slots, uint32_t mask)
{
    if (i >= count) return;
    tp_json *key = &members[2 * (size_t)i];
    key->parent = (uint32_t)tp_hash(key->at.text, key->len);
    __builtin_prefetch(&slots[key->parent & mask]);
}

/* The member before `kept` that has the key of member i, or kept. With slots the index gets an entry for a new key. */
static uint32_t find_earlier(tp_json *members, uint32_t i, uint32_t kept, uint32_t *slots, uint32_t mask)
{
    tp_span key = key_of(members, i);
    uint32_t same = 0;
    if (slots == NULL) {
        while (same < kept && !tp_span_equal(key_of(members, same), key)) same++;
        return same;
    }
    uint32_t hash = members[2 * (size_t)i].parent;
    size_t slot = find_slot(slots, mask, members, key, hash);
    if (slots[slot] != 0) return (slots[slot] & mask) - 1;
    slots[slot] = (hash & ~mask) | (kept + 1);
    return kept;
}

/* Compacts members[0..*count) so that each key stands once, with its last value, or refuses repeated keys. With slots
 * the hash index is filled on the way; without, keys are compared pairwise. */
static tp_status settle_members(parser *ps, tp_json *members, uint32_t *count, uint32_t *slots, uint32_t mask)
{
    uint32_t kept = 0;
    for (uint32_t i = 0; i < AHEAD && slots != NULL; i++) look_ahead(members, i, *count, slots, mask);
    for (uint32_t i = 0; i < *count; i++) {
        if (slots != NULL) look_ahead(members, i + AHEAD, *count, slots, mask);
        uint32_t same = find_earlier(members, i, kept, slots, mask);
        if (same < kept) {
            if (!ps->allow_duplicates) return repeated_key(ps, &members[2 * (size_t)same], &members[2 * (size_t)i]);
            members[2 * (size_t)same + 1] = members[2 * (size_t)i + 1];
            continue;
        }
        if (kept < i) memcpy(&members[2 * (size_t)kept], &members[2 * (size_t)i], 2 * sizeof *members);
        kept++;
    }
    *count = kept;
    return TP_OK;
}

/* ---- containers ---- */

static tp_status open_container(parser *ps, tp_json *node, tp_json_type type)
{
    if (ps->depth == ps->max_depth) {
        char what[64];
        snprintf(what, sizeof what, "nested deeper than %zu", ps->max_depth);
        return fail_at(ps, node->offset, what);
    }
    ps->depth++;
    ps->p++;
    node->type = (uint8_t)type;
    node->parent = ps->open;
    ps->open = (uint32_t)(ps->top - 1);
    return TP_OK;
}

static tp_status close_object(parser *ps, tp_json *node, tp_json *members, uint32_t count)
{
    uint32_t *slots = NULL;
    size_t n_slots = 0;
    if (count > SMALL_COUNT) {
        n_slots = 64;
        while (n_slots < (size_t)count * 2) n_slots *= 2;
        slots = pool_take(ps, n_slots * sizeof *slots);
        if (slots == NULL) return TP_NOMEM;
        memset(slots, 0, n_slots * sizeof *slots);
    }
    TP_TRY(settle_members(ps, members, &count, slots, (uint32_t)(n_slots - 1)));
    tp_json *kept = pool_take(ps, ((size_t)count * 2 + 1) * sizeof *kept);
    if (kept == NULL) return TP_NOMEM;
    if (slots != NULL) *kept++ = (tp_json){.at.slots = slots, .len = (uint32_t)(n_slots - 1)};
    memcpy(kept, members, (size_t)count * 2 * sizeof *kept);
    node->at.children = kept;
    node->len = count;
    node->indexed = slots != NULL;
    return TP_OK;
}

/* Behind the closing bracket: moves the children off the stack. */
static tp_status close_container(parser *ps)
{
    tp_json node = ps->stack[ps->open];
    tp_json *children = ps->stack + ps->open + 1;
    size_t count = ps->top - ps->open - 1;
    if (count == 0) {
        node.len = 0;
    } else if (node.type == TP_JSON_OBJECT) {
        TP_TRY(close_object(ps, &node, children, (uint32_t)(count / 2)));
    } else {
        tp_json *kept = pool_take(ps, count * sizeof *kept);
        if (kept == NULL) return TP_NOMEM;
        memcpy(kept, children, count * sizeof *kept);
        node.at.children = kept;
        node.len = (uint32_t)count;
    }
    ps->top = (size_t)ps->open + 1;
    ps->open = node.parent;
    ps->stack[ps->top - 1] = node;
    ps->p++;
    ps->depth--;
    return TP_OK;
}

/* tp_json_each: hands out a member of the outermost object once it is complete, and forgets it. */
static tp_status hand_out_member(parser *ps)
{
    if (ps->member == NULL || ps->open != 0 || ps->top < 3) return TP_OK;
    TP_TRY(ps->member(ps->user, ps->ctx, ps->doc, &ps->stack[1], &ps->stack[2]));
    ps->top = 1;
    ps->n_nodes = 0;
    if (ps->doc->pool != NULL) {
        pool_free(ps->doc->pool->next);
        ps->doc->pool->next = NULL;
        ps->doc->pool->used = 0;
    }
    return TP_OK;
}

/* ---- the grammar ---- */

static tp_status parse_key(parser *ps)
{
    skip_blanks(ps);
    if (ps->p == ps->end || *ps->p != '"') return expected(ps, "a key in quotes");
    tp_json *key;
    TP_TRY(push(ps, &key));
    TP_TRY(parse_string(ps, key));
    skip_blanks(ps);
    if (ps->p == ps->end || *ps->p != ':') return expected(ps, "':'");
    ps->p++;
    return TP_OK;
}

/* Reads a scalar, or the opening of a container up to where its first value begins (*opened), or an empty container. */
static tp_status parse_value(parser *ps, bool *opened)
{
    skip_blanks(ps);
    *opened = false;
    if (ps->p == ps->end) return expected(ps, "a value");
    tp_json *node;
    TP_TRY(push(ps, &node));
    switch (*ps->p) {
    case '{':
    case '[': {
        bool object = *ps->p == '{';
        TP_TRY(open_container(ps, node, object ? TP_JSON_OBJECT : TP_JSON_ARRAY));
        skip_blanks(ps);
        if (ps->p < ps->end && *ps->p == (object ? '}' : ']')) return close_container(ps);
        *opened = true;
        return object ? parse_key(ps) : TP_OK;
    }
    case '"': return parse_string(ps, node);
    case 'n': return parse_word(ps, "null", node, TP_JSON_NULL, false);
    case 't': return parse_word(ps, "true", node, TP_JSON_BOOL, true);
    case 'f': return parse_word(ps, "false", node, TP_JSON_BOOL, false);
    default: return *ps->p == '-' || is_digit(ps) ? parse_number(ps, node) : expected(ps, "a value");
    }
}

/* Behind a complete value: closes containers until one goes on (then the next value begins at ps->p) or all are closed. */
static tp_status parse_after_value(parser *ps)
{
    while (ps->open != NO_PARENT) {
        TP_TRY(hand_out_member(ps));
        bool object = ps->stack[ps->open].type == TP_JSON_OBJECT;
        skip_blanks(ps);
        if (ps->p < ps->end && *ps->p == ',') {
            ps->p++;
            return object ? parse_key(ps) : TP_OK;
        }
        if (ps->p == ps->end || *ps->p != (object ? '}' : ']')) return expected(ps, object ? "',' or '}'" : "',' or ']'");
        TP_TRY(close_container(ps));
    }
    return TP_OK;
}

static tp_status parse_document(parser *ps)
{
    do {
        bool opened;
        TP_TRY(parse_value(ps, &opened));
        if (!opened) TP_TRY(parse_after_value(ps));
    } while (ps->open != NO_PARENT);
    skip_blanks(ps);
    if (ps->p != ps->end) return expected(ps, "nothing after the value");
    ps->doc->root = ps->stack[0];
    return TP_OK;
}

/* ---- public: parsing ---- */

static tp_status doc_new(tp_ctx *ctx, const char *text, size_t n, const tp_json_options *options, tp_json_doc **out)
{
    const char *name = options != NULL && options->name != NULL ? options->name : "json";
    if (n > UINT32_MAX) return tp_fail(ctx, TP_FORMAT, "%s: JSON text of %zu bytes: at most 4 GiB are read", name, n);
    tp_json_doc *doc = tp_alloc(ctx, 1, sizeof *doc);
    if (doc == NULL) return TP_NOMEM;
    doc->name = tp_strdup(ctx, name);
    if (doc->name == NULL) {
        tp_free(doc);
        return TP_NOMEM;
    }
    doc->text = text;
    doc->n = n;
    doc->first_line = options != NULL && options->first_line > 0 ? options->first_line : 1;
    *out = doc;
    return TP_OK;
}

static parser parser_of(tp_ctx *ctx, tp_json_doc *doc, const tp_json_options *options)
{
    static const tp_json_options defaults = {0};
    if (options == NULL) options = &defaults;
    return (parser){.ctx = ctx,
                    .doc = doc,
                    .p = doc->text,
                    .end = doc->n > 0 ? doc->text + doc->n : doc->text,
                    .allow_duplicates = options->allow_duplicates,
                    .strict_surrogates = options->strict_surrogates,
                    .max_depth = options->max_depth > 0 ? options->max_depth : TP_JSON_DEPTH,
                    .max_nodes = options->max_nodes,
                    .open = NO_PARENT};
}

tp_status tp_json_parse(tp_ctx *ctx, const char *text, size_t n, const tp_json_options *options, tp_json_doc **out)
{
    tp_json_doc *doc = NULL;
    *out = NULL;
    TP_TRY(doc_new(ctx, text, n, options, &doc));
    parser ps = parser_of(ctx, doc, options);
    tp_status status = parse_document(&ps);
    tp_free(ps.stack);
    if (status != TP_OK) {
        tp_json_free(doc);
        return status;
    }
    *out = doc;
    return TP_OK;
}

tp_status tp_json_each(tp_ctx *ctx, const char *text, size_t n, const tp_json_options *options, tp_json_member_fn member,
                       void *user)
{
    tp_json_doc *doc = NULL;
    TP_TRY(doc_new(ctx, text, n, options, &doc));
    parser ps = parser_of(ctx, doc, options);
    ps.member = member;
    ps.user = user;
    skip_blanks(&ps);
    tp_status status = ps.p < ps.end && *ps.p == '{' ? parse_document(&ps) : expected(&ps, "an object");
    tp_free(ps.stack);
    tp_json_free(doc);
    return status;
}

tp_status tp_json_read(tp_ctx *ctx, const char *path, size_t max_bytes, tp_json_doc **out)
{
    char *text;
    size_t n;
    *out = NULL;
    TP_TRY(tp_file_read(ctx, path, max_bytes, &text, &n));
    tp_status status = tp_json_parse(ctx, text, n, &(tp_json_options){.name = path, .max_nodes = READ_MAX_NODES}, out);
    if (status == TP_OK)
        tp_json_adopt(*out, text);
    else
        tp_free(text);
    return status;
}

static tp_json string_node(tp_span text, size_t offset)
{
    return (tp_json){.type = TP_JSON_STRING, .at.text = text.data, .len = (uint32_t)text.len, .offset = (uint32_t)offset};
}

tp_status tp_json_of_strings(tp_ctx *ctx, const char *text, size_t n, const tp_json_options *options,
                             const tp_json_member *members, size_t n_members, tp_json_doc **out)
{
    tp_json_doc *doc = NULL;
    *out = NULL;
    TP_TRY(doc_new(ctx, text, n, options, &doc));
    parser ps = parser_of(ctx, doc, options);
    tp_json *nodes = tp_alloc_raw(ctx, n_members, 2 * sizeof *nodes);
    tp_status status = nodes != NULL ? TP_OK : TP_NOMEM;
    for (size_t i = 0; status == TP_OK && i < n_members; i++) {
        nodes[2 * i] = string_node(members[i].key, members[i].offset);
        nodes[2 * i + 1] = string_node(members[i].value, members[i].offset);
    }
    doc->root.type = TP_JSON_OBJECT;
    if (status == TP_OK && n_members > 0) status = close_object(&ps, &doc->root, nodes, (uint32_t)n_members);
    tp_free(nodes);
    if (status != TP_OK) {
        tp_json_free(doc);
        return status;
    }
    *out = doc;
    return TP_OK;
}

void tp_json_adopt(tp_json_doc *doc, char *memory)
{
    doc->owned = memory;
}

void tp_json_free(tp_json_doc *doc)
{
    if (doc == NULL) return;
    pool_free(doc->pool);
    tp_free(doc->owned);
    tp_free(doc->name);
    tp_free(doc);
}

/* ---- public: values ---- */

const tp_json *tp_json_root(const tp_json_doc *doc)
{
    return &doc->root;
}
tp_json_type tp_json_type_of(const tp_json *value)
{
    return value != NULL ? (tp_json_type)value->type : TP_JSON_NULL;
}

static bool is(const tp_json *value, tp_json_type type)
{
    return value != NULL && value->type == type;
}

const char *tp_json_type_name(tp_json_type type)
{
    static const char *const names[] = {"null", "a boolean", "a number", "a string", "an array", "an object"};
    return (unsigned)type < sizeof names / sizeof names[0] ? names[type] : "unknown";
}

size_t tp_json_count(const tp_json *value)
{
    return is(value, TP_JSON_ARRAY) || is(value, TP_JSON_OBJECT) ? value->len : 0;
}

const tp_json *tp_json_at(const tp_json *value, size_t i)
{
    if (i >= tp_json_count(value)) return NULL;
    return value->type == TP_JSON_OBJECT ? &value->at.children[2 * i + 1] : &value->at.children[i];
}

tp_span tp_json_key_at(const tp_json *object, size_t i)
{
    if (!is(object, TP_JSON_OBJECT) || i >= object->len) return (tp_span){"", 0};
    return key_of(object->at.children, i);
}

const tp_json *tp_json_get_span(const tp_json *object, tp_span key)
{
    if (!is(object, TP_JSON_OBJECT)) return NULL;
    const tp_json *members = object->at.children;
    if (object->indexed) {
        const uint32_t *slots = members[-1].at.slots;
        uint32_t mask = members[-1].len;
        uint32_t found = slots[find_slot(slots, mask, members, key, (uint32_t)tp_hash(key.data, key.len))] & mask;
        return found != 0 ? &members[2 * (found - 1) + 1] : NULL;
    }
    for (size_t i = 0; i < object->len; i++)
        if (tp_span_equal(key_of(members, i), key)) return &members[2 * i + 1];
    return NULL;
}

const tp_json *tp_json_get(const tp_json *object, const char *key)
{
    return tp_json_get_span(object, tp_span_of(key));
}

tp_span tp_json_string(const tp_json *value)
{
    return is(value, TP_JSON_STRING) ? (tp_span){value->at.text, value->len} : (tp_span){"", 0};
}

bool tp_json_bool(const tp_json *value, bool otherwise)
{
    return is(value, TP_JSON_BOOL) ? value->flag : otherwise;
}

tp_span tp_json_number_text(const tp_json *value)
{
    return is(value, TP_JSON_NUMBER) ? (tp_span){value->at.text, value->len} : (tp_span){"", 0};
}

bool tp_json_i64(const tp_json *value, int64_t *out)
{
    tp_span text = tp_json_number_text(value);
    bool negative = text.len > 0 && text.data[0] == '-';
    int64_t sum = 0;
    if (text.len == 0) return false;
    for (size_t i = negative; i < text.len; i++) {
        if (text.data[i] < '0' || text.data[i] > '9') return false;
        int64_t digit = text.data[i] - '0'; /* summed with its sign, so that INT64_MIN is reached */
        if (!tp_mul_i64(sum, 10, &sum) || !tp_add_i64(sum, negative ? -digit : digit, &sum)) return false;
    }
    *out = sum;
    return true;
}

bool tp_json_f64(const tp_json *value, double *out)
{
    tp_span text = tp_json_number_text(value);
    char small[128], *copy = small; /* the text has no NUL behind it */
    if (text.len == 0) return false;
    if (text.len >= sizeof small) {
        copy = tp_strndup(NULL, text.data, text.len);
        if (copy == NULL) return false;
    } else {
        memcpy(small, text.data, text.len);
        small[text.len] = '\0';
    }
    double parsed = strtod(copy, NULL);
    if (copy != small) tp_free(copy);
    if (!isfinite(parsed)) return false;
    *out = parsed;
    return true;
}

const char *tp_json_where(const tp_json_doc *doc, const tp_json *value, char *out, size_t size)
{
    size_t line, column;
    line_and_column(doc, value != NULL ? value->offset : 0, &line, &column);
    snprintf(out, size, "%s:%zu:%zu", doc->name, line, column);
    return out;
}
