/* Overrides: `key=value`, with dots and indices, and `~key`.
 *
 * The value is YAML, so its type comes from the schema like that of a file. A way that meets no list
 * becomes a small recipe of its own, which is merged over the file's: names of other tools and blocks
 * work as they do there. A way through a list changes that element in place. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "recipes/parts.h"

#define SEGMENTS_MAX 16

/* One override, cut up. The segments point into `way`, whose dots have become NULs. */
struct override {
    tp_mark at;
    char *way;
    const char *segments[SEGMENTS_MAX];
    size_t n;
};

static bool is_index(const char *segment, size_t *index)
{
    size_t n = strlen(segment);
    if (n == 0 || n > 9 || strspn(segment, "0123456789") != n) return false;
    *index = strtoul(segment, NULL, 10);
    return true;
}

static tp_yaml *child_of(const tp_yaml *node, const char *segment)
{
    size_t index;
    if (node->kind == TP_YAML_LIST) return is_index(segment, &index) ? tp_yaml_at(node, index) : NULL;
    return tp_yaml_find(node, segment);
}

tp_yaml *tp_yaml_walk(const tp_yaml *root, const char *path)
{
    char segment[128];
    tp_yaml *found = NULL;
    for (const tp_yaml *node = root; node != NULL; node = found) {
        size_t n = strcspn(path, ".");
        if (n >= sizeof segment) return NULL;
        memcpy(segment, path, n);
        segment[n] = '\0';
        found = child_of(node, segment);
        if (path[n] == '\0') return found;
        path += n + 1;
    }
    return NULL;
}

/* ---- cutting up ---- */

/* False if the way is empty, has an empty segment, or too many. */
static bool cut(struct override *o)
{
    char *p = o->way;
    for (o->n = 0; o->n < SEGMENTS_MAX;) {
        char *dot = strchr(p, '.');
        if (dot != NULL) *dot = '\0';
        if (*p == '\0') return false;
        o->segments[o->n++] = p;
        if (dot == NULL) return true;
        p = dot + 1;
    }
    return false;
}

/* "override 2", in the arena. */
static tp_status name_override(tp_reading *r, size_t number, tp_mark *at)
{
    char name[40];
    int n = snprintf(name, sizeof name, "override %zu", number);
    *at = (tp_mark){.source = tp_arena_strndup(r->ctx, &r->recipe->tree.arena, name, (size_t)n)};
    return at->source != NULL ? TP_OK : TP_NOMEM;
}

/* ---- setting ---- */

static bool passes_list(const tp_yaml *root, const struct override *o)
{
    const tp_yaml *node = root;
    for (size_t i = 0; i < o->n && node != NULL; i++) {
        if (node->kind == TP_YAML_LIST) return true;
        node = child_of(node, o->segments[i]);
    }
    return false;
}

static tp_status set_by_merging(tp_reading *r, const struct override *o, tp_yaml *value)
{
    tp_yaml *scratch = tp_yaml_new(r->ctx, &r->recipe->tree, TP_YAML_BLOCK, o->at, NULL), *block = scratch;
    for (size_t i = 0; i + 1 < o->n && block != NULL; i++) {
        tp_yaml *inner = tp_yaml_new(r->ctx, &r->recipe->tree, TP_YAML_BLOCK, o->at, NULL);
        if (inner == NULL) return TP_NOMEM;
        tp_yaml_set_key(inner, o->segments[i], o->at);
        tp_yaml_append(block, inner);
        block = inner;
    }
    if (block == NULL) return TP_NOMEM;
    tp_yaml_set_key(value, o->segments[o->n - 1], o->at);
    tp_yaml_append(block, value);
    TP_TRY(tp_reading_names(r, scratch));
    tp_merge_blocks(r->recipe->root, scratch);
    return TP_OK;
}

static tp_status set_in_place(tp_reading *r, const struct override *o, tp_yaml *value)
{
    tp_yaml *node = r->recipe->root;
    char path[512];
    for (size_t i = 0; i < o->n; i++) {
        bool last = i + 1 == o->n;
        tp_yaml *child = child_of(node, o->segments[i]);
        if (child == NULL && node->kind == TP_YAML_LIST)
            return tp_reading_problem(r, o->at, "%s: the list has %zu entries, counted from 0; there is no %.40s",
                                      tp_yaml_path(node, path, sizeof path), node->n, o->segments[i]);
        if (child == NULL && node->kind == TP_YAML_SCALAR)
            return tp_reading_problem(r, o->at, "%s: not a block, so it has no %.40s", tp_yaml_path(node, path, sizeof path),
                                      o->segments[i]);
        tp_yaml *fresh = last            ? value
                         : child == NULL ? tp_yaml_new(r->ctx, &r->recipe->tree, TP_YAML_BLOCK, o->at, NULL)
                                         : NULL;
        if (fresh == NULL && child == NULL) return TP_NOMEM;
        if (fresh != NULL && node->kind == TP_YAML_BLOCK) tp_yaml_set_key(fresh, o->segments[i], o->at);
        if (fresh != NULL && child != NULL)
            tp_yaml_replace(child, fresh);
        else if (fresh != NULL)
            tp_yaml_append(node, fresh);
        node = fresh != NULL ? fresh : child;
    }
    return TP_OK;
}

static tp_status set(tp_reading *r, const struct override *o, const char *text)
{
    tp_yaml *value = NULL;
    size_t errors = r->problems->n_errors;
    TP_TRY(tp_yaml_parse(r->ctx, &r->recipe->tree, r->problems, o->at.source, true, text, strlen(text), &value));
    if (r->problems->n_errors > errors) return TP_OK;
    if (value == NULL) value = tp_yaml_new(r->ctx, &r->recipe->tree, TP_YAML_SCALAR, o->at, "");
    if (value == NULL) return TP_NOMEM;
    if (strcmp(o->segments[0], "include") == 0) return tp_reading_problem(r, o->at, "include: only a file can include others");
    return passes_list(r->recipe->root, o) ? set_in_place(r, o, value) : set_by_merging(r, o, value);
}

/* ---- deleting ---- */

static tp_status unset(tp_reading *r, tp_mark at, const char *way)
{
    tp_yaml *node = tp_yaml_walk(r->recipe->root, way);
    const char *ours = tp_name_of_alias(r->recipe->schema, way);
    if (node == NULL && ours != NULL) node = tp_yaml_walk(r->recipe->root, ours);
    if (node == NULL) return tp_reading_problem(r, at, "%.80s: nothing to delete, the recipe does not set it", way);
    tp_yaml_unlink(node);
    return TP_OK;
}

tp_status tp_reading_override(tp_reading *r, size_t number, const char *text)
{
    struct override o = {.n = 0};
    TP_TRY(name_override(r, number, &o.at));
    if (text[0] == '~') return unset(r, o.at, text + 1);
    const char *equals = strchr(text, '=');
    if (equals == NULL) return tp_reading_problem(r, o.at, "expected key=value or ~key, got \"%.80s\"", text);
    o.way = tp_arena_strndup(r->ctx, &r->recipe->tree.arena, text, (size_t)(equals - text));
    if (o.way == NULL) return TP_NOMEM;
    if (!cut(&o)) return tp_reading_problem(r, o.at, "expected a key such as quant.block or datasets.0.limit before the =");
    return set(r, &o, equals + 1);
}
