/* From libyaml's events to a tree, refusing what recipes do not use.
 *
 *   bytes -> UTF-8 check -> libyaml events -> filter -> nodes
 *
 * libyaml 0.2.5 has neither a depth limit nor a check for repeated keys, and its time grows with
 * the square of the nesting; stopping at the 65th level keeps both in hand. The builder holds the
 * innermost open list or block and climbs with parent links, so depth costs no stack. */
#include "recipes/yaml.h"

#include <stdio.h>
#include <string.h>
#include <yaml.h>

#include "base/map.h"
#include "base/mem.h"

#define ROWS 1024 /* of the keys that were read: a recipe holds 5,000 at most */

struct builder {
    tp_ctx *ctx;
    tp_yaml_tree *tree;
    tp_problems *problems;
    const char *source; /* in the arena */
    bool one_line;
    tp_yaml *root, *open; /* open: innermost list or block, NULL at the top */
    int depth, n_documents;
    const char *key; /* read, its value not yet */
    tp_mark key_at;
    bool stopped;        /* by a problem: the tree is not to be used */
    tp_yaml *rows[ROWS]; /* members of blocks by block and key, to find repeated keys */
};

static tp_mark mark_at(const struct builder *b, size_t line, size_t column)
{
    if (b->one_line) return (tp_mark){b->source, 0, 0};
    return (tp_mark){b->source, (uint32_t)line + 1, (uint32_t)column + 1};
}

static tp_mark mark_of(const struct builder *b, yaml_mark_t m)
{
    return mark_at(b, m.line, m.column);
}

/* Reports a problem that ends the reading of this text. */
static tp_status stop(struct builder *b, tp_mark at, const char *what)
{
    char place[512];
    b->stopped = true;
    return tp_problems_add(b->ctx, b->problems, TP_INVALID, "%s: %s", tp_mark_text(at, place, sizeof place), what);
}

static tp_status stop_name(struct builder *b, tp_mark at, const char *before, const char *name, const char *after)
{
    char what[256];
    snprintf(what, sizeof what, "%s%.60s%s", before, name, after);
    return stop(b, at, what);
}

/* ---- nodes ---- */

static uint32_t hash_of(const char *key)
{
    return (uint32_t)tp_hash(key, strlen(key));
}

void tp_yaml_tree_init(tp_yaml_tree *tree)
{
    tp_arena_init(&tree->arena, 16384);
    tree->n_nodes = 0;
}

void tp_yaml_tree_free(tp_yaml_tree *tree)
{
    tp_arena_free(&tree->arena);
}

tp_yaml *tp_yaml_new(tp_ctx *ctx, tp_yaml_tree *tree, tp_yaml_kind kind, tp_mark at, const char *text)
{
    tp_yaml *node = tp_arena_alloc(ctx, &tree->arena, 1, sizeof *node);
    if (node == NULL) return NULL;
    *node = (tp_yaml){.kind = kind, .plain = true, .at = at, .text = text};
    return node;
}

void tp_yaml_set_key(tp_yaml *node, const char *key, tp_mark at)
{
    node->key = key;
    node->key_hash = hash_of(key);
    node->key_at = at;
}

void tp_yaml_append(tp_yaml *parent, tp_yaml *node)
{
    node->parent = parent;
    node->next = NULL;
    if (parent->last != NULL)
        parent->last->next = node;
    else
        parent->first = node;
    parent->last = node;
    parent->n++;
}

/* The link that points to node. */
static tp_yaml **link_to(tp_yaml *node)
{
    tp_yaml **link = &node->parent->first;
    while (*link != node) link = &(*link)->next;
    return link;
}

void tp_yaml_unlink(tp_yaml *node)
{
    tp_yaml *parent = node->parent, *before = NULL;
    for (tp_yaml *c = parent->first; c != node; c = c->next) before = c;
    *link_to(node) = node->next;
    if (parent->last == node) parent->last = before;
    parent->n--;
    node->parent = node->next = NULL;
}

void tp_yaml_replace(tp_yaml *old, tp_yaml *node)
{
    tp_yaml *parent = old->parent;
    node->parent = parent;
    node->next = old->next;
    *link_to(old) = node;
    if (parent->last == old) parent->last = node;
    old->parent = old->next = NULL;
}

tp_yaml *tp_yaml_find(const tp_yaml *block, const char *key)
{
    if (block == NULL || block->kind != TP_YAML_BLOCK) return NULL;
    uint32_t hash = hash_of(key);
    for (tp_yaml *c = block->first; c != NULL; c = c->next)
        if (c->key_hash == hash && strcmp(c->key, key) == 0) return c;
    return NULL;
}

tp_yaml *tp_yaml_at(const tp_yaml *list, size_t i)
{
    if (list == NULL || list->kind != TP_YAML_LIST || i >= list->n) return NULL;
    tp_yaml *c = list->first;
    while (i-- > 0) c = c->next;
    return c;
}

tp_yaml *tp_yaml_after(const tp_yaml *node, const tp_yaml *root)
{
    if (node->first != NULL) return node->first;
    while (node != root && node->next == NULL) node = node->parent;
    return node == root ? NULL : node->next;
}

/* ---- events ---- */

static tp_status count_node(struct builder *b, tp_mark at)
{
    if (++b->tree->n_nodes <= TP_YAML_NODES) return TP_OK;
    char what[64];
    snprintf(what, sizeof what, "more than %d nodes", TP_YAML_NODES);
    return stop(b, at, what);
}

/* Where a member of the open block is listed: blocks that stand at different places use different rows for the same key. */
static tp_yaml **row_of(struct builder *b, uint32_t key_hash)
{
    return &b->rows[(key_hash ^ (b->open->at.line * 31 + b->open->at.column)) % ROWS];
}

/* The first member of the open block with that key: the last one in its row. */
static const tp_yaml *find_twin(struct builder *b, const char *key)
{
    const tp_yaml *twin = NULL;
    uint32_t hash = hash_of(key);
    for (const tp_yaml *c = *row_of(b, hash); c != NULL; c = c->neighbour)
        if (c->parent == b->open && c->key_hash == hash && strcmp(c->key, key) == 0) twin = c;
    return twin;
}

/* Puts a new value where the text has it: under the pending key, in the open list, or at the top. */
static tp_status place(struct builder *b, tp_yaml *node)
{
    if (b->open == NULL) {
        b->root = node;
        return TP_OK;
    }
    if (b->open->kind == TP_YAML_BLOCK) {
        tp_yaml_set_key(node, b->key, b->key_at);
        tp_yaml **row = row_of(b, node->key_hash);
        node->neighbour = *row;
        *row = node;
        b->key = NULL;
    }
    tp_yaml_append(b->open, node);
    return TP_OK;
}

static bool wants_key(const struct builder *b)
{
    return b->open != NULL && b->open->kind == TP_YAML_BLOCK && b->key == NULL;
}

/* A repeated key is reported and read on, so that one pass finds all of them. */
static tp_status take_key(struct builder *b, const char *key, bool plain, tp_mark at)
{
    if (plain && strcmp(key, "<<") == 0) return stop(b, at, "<<: merge keys are refused; use include");
    const tp_yaml *twin = find_twin(b, key);
    b->key = key;
    b->key_at = at;
    if (twin == NULL) return TP_OK;
    char place_text[512], first[512];
    return tp_problems_add(b->ctx, b->problems, TP_INVALID, "%s: %.200s: given twice, first at %s",
                           tp_mark_text(at, place_text, sizeof place_text), key,
                           tp_mark_text(twin->key_at, first, sizeof first));
}

static tp_status take_scalar(struct builder *b, const yaml_event_t *event)
{
    tp_mark at = mark_of(b, event->start_mark);
    const char *value = (const char *)event->data.scalar.value;
    size_t n = event->data.scalar.length;
    if (memchr(value, '\0', n) != NULL) return stop_name(b, at, "\"", value, "\": a NUL character inside");
    const char *text = tp_arena_strndup(b->ctx, &b->tree->arena, value, n);
    if (text == NULL) return TP_NOMEM;
    bool plain = event->data.scalar.style == YAML_PLAIN_SCALAR_STYLE;
    if (wants_key(b)) return take_key(b, text, plain, at);
    tp_yaml *node = tp_yaml_new(b->ctx, b->tree, TP_YAML_SCALAR, at, text);
    if (node == NULL) return TP_NOMEM;
    node->plain = plain;
    return place(b, node);
}

static tp_status take_start(struct builder *b, tp_yaml_kind kind, tp_mark at)
{
    if (wants_key(b))
        return stop(b, at, kind == TP_YAML_LIST ? "a key must be a name, got a list" : "a key must be a name, got a block");
    if (b->depth >= TP_YAML_DEPTH) {
        char what[64];
        snprintf(what, sizeof what, "nested deeper than %d levels", TP_YAML_DEPTH);
        return stop(b, at, what);
    }
    tp_yaml *node = tp_yaml_new(b->ctx, b->tree, kind, at, NULL);
    if (node == NULL) return TP_NOMEM;
    TP_TRY(place(b, node));
    b->open = node;
    b->depth++;
    return TP_OK;
}

static tp_status take_document(struct builder *b, const yaml_event_t *event)
{
    tp_mark at = mark_of(b, event->start_mark);
    if (b->n_documents++ > 0) return stop(b, at, "a second document; a recipe is one");
    const yaml_version_directive_t *version = event->data.document_start.version_directive;
    if (version != NULL && (version->major != 1 || version->minor != 2)) return stop(b, at, "recipes are YAML 1.2");
    if (event->data.document_start.tag_directives.start != event->data.document_start.tag_directives.end)
        return stop(b, at, "tags are refused");
    return TP_OK;
}

/* What recipes may not contain, the same for scalars, lists and blocks. */
static tp_status refuse_extras(struct builder *b, const yaml_event_t *event)
{
    const yaml_char_t *anchor = NULL, *tag = NULL;
    switch (event->type) {
    case YAML_ALIAS_EVENT:
        return stop_name(b, mark_of(b, event->start_mark), "alias *", (const char *)event->data.alias.anchor,
                         ": refused, write the value out");
    case YAML_SCALAR_EVENT:
        anchor = event->data.scalar.anchor;
        tag = event->data.scalar.tag;
        break;
    case YAML_SEQUENCE_START_EVENT:
        anchor = event->data.sequence_start.anchor;
        tag = event->data.sequence_start.tag;
        break;
    case YAML_MAPPING_START_EVENT:
        anchor = event->data.mapping_start.anchor;
        tag = event->data.mapping_start.tag;
        break;
    default: return TP_OK;
    }
    if (anchor != NULL)
        return stop_name(b, mark_of(b, event->start_mark), "anchor &", (const char *)anchor, ": refused, write the value out");
    if (tag != NULL)
        return stop_name(b, mark_of(b, event->start_mark), "tag ", (const char *)tag, ": refused, recipes have no tags");
    return count_node(b, mark_of(b, event->start_mark));
}

static tp_status take_event(struct builder *b, const yaml_event_t *event)
{
    TP_TRY(refuse_extras(b, event));
    if (b->stopped) return TP_OK;
    switch (event->type) {
    case YAML_DOCUMENT_START_EVENT: return take_document(b, event);
    case YAML_SCALAR_EVENT: return take_scalar(b, event);
    case YAML_SEQUENCE_START_EVENT: return take_start(b, TP_YAML_LIST, mark_of(b, event->start_mark));
    case YAML_MAPPING_START_EVENT: return take_start(b, TP_YAML_BLOCK, mark_of(b, event->start_mark));
    case YAML_SEQUENCE_END_EVENT:
    case YAML_MAPPING_END_EVENT:
        b->open = b->open->parent;
        b->depth--;
        return TP_OK;
    default: return TP_OK;
    }
}

/* ---- text ---- */

static bool printable(uint32_t c)
{
    return c == '\t' || c == '\n' || c == '\r' || (c >= 0x20 && c <= 0x7e) || c == 0x85 || (c >= 0xa0 && c < 0xd800) ||
           (c >= 0xe000 && c <= 0xfffd && c != 0xfeff) || c >= 0x10000;
}

/* UTF-8 and printable characters only, checked here because libyaml names no line for them. */
static tp_status check_characters(struct builder *b, const char *text, size_t n)
{
    size_t line = 0, column = 0;
    if (n >= 2 && (memcmp(text, "\xff\xfe", 2) == 0 || memcmp(text, "\xfe\xff", 2) == 0))
        return stop(b, mark_at(b, 0, 0), "UTF-16; recipes are UTF-8");
    for (size_t i = 0; i < n;) {
        uint32_t c = 0;
        int length = tp_utf8_decode(text + i, n - i, &c);
        char what[64];
        if (length == 0) {
            snprintf(what, sizeof what, "byte 0x%02x is not UTF-8", (unsigned)(unsigned char)text[i]);
            return stop(b, mark_at(b, line, column), what);
        }
        if (!printable(c)) {
            snprintf(what, sizeof what, "control character U+%04X", (unsigned)c);
            return stop(b, mark_at(b, line, column), what);
        }
        column = c == '\n' ? 0 : column + 1;
        line += c == '\n';
        i += (size_t)length;
    }
    return TP_OK;
}

static bool tab_in_indent(const char *text, size_t n, size_t line)
{
    size_t i = 0;
    for (; i < n && line > 0; i++) line -= text[i] == '\n';
    while (i < n && text[i] == ' ') i++;
    return i < n && text[i] == '\t';
}

/* libyaml's own complaint, with the place where it noticed. */
static tp_status syntax_problem(struct builder *b, const yaml_parser_t *parser, const char *text, size_t n)
{
    if (parser->error == YAML_MEMORY_ERROR) return tp_fail(b->ctx, TP_NOMEM, "%s: out of memory", b->source);
    char what[256], begun[64] = "";
    const char *tab = tab_in_indent(text, n, parser->problem_mark.line) ? "; a tab cannot indent" : "";
    if (parser->context != NULL && parser->context_mark.line < parser->problem_mark.line)
        snprintf(begun, sizeof begun, " begun in line %zu", parser->context_mark.line + 1);
    snprintf(what, sizeof what, "%s%s%s%s%s", parser->context != NULL ? parser->context : "", begun,
             parser->context != NULL ? ": " : "", parser->problem != NULL ? parser->problem : "not YAML", tab);
    return stop(b, mark_of(b, parser->problem_mark), what);
}

static tp_status parse_events(struct builder *b, yaml_parser_t *parser, const char *text, size_t n)
{
    for (bool end = false; !end && !b->stopped;) {
        yaml_event_t event;
        if (!yaml_parser_parse(parser, &event)) return syntax_problem(b, parser, text, n);
        end = event.type == YAML_STREAM_END_EVENT;
        tp_status st = take_event(b, &event);
        yaml_event_delete(&event);
        TP_TRY(st);
    }
    return TP_OK;
}

tp_status tp_yaml_parse(tp_ctx *ctx, tp_yaml_tree *tree, tp_problems *problems, const char *source, bool one_line,
                        const char *text, size_t n, tp_yaml **root)
{
    *root = NULL;
    struct builder b = {.ctx = ctx, .tree = tree, .problems = problems, .one_line = one_line};
    b.source = tp_arena_strndup(ctx, &tree->arena, source, strlen(source));
    if (b.source == NULL) return TP_NOMEM;
    if (n > TP_YAML_BYTES) {
        char what[64];
        snprintf(what, sizeof what, "longer than %zu bytes", TP_YAML_BYTES);
        return stop(&b, (tp_mark){b.source, 0, 0}, what);
    }
    if (n >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0) {
        text += 3;
        n -= 3;
    }
    TP_TRY(check_characters(&b, text, n));
    if (b.stopped) return TP_OK;
    yaml_parser_t parser;
    if (!yaml_parser_initialize(&parser)) return tp_fail(ctx, TP_NOMEM, "%s: out of memory", source);
    yaml_parser_set_encoding(&parser, YAML_UTF8_ENCODING);
    yaml_parser_set_input_string(&parser, (const unsigned char *)text, n);
    tp_status st = parse_events(&b, &parser, text, n);
    yaml_parser_delete(&parser);
    if (st == TP_OK && !b.stopped) *root = b.root;
    return st;
}
