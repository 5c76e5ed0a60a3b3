/* YAML for recipes: a tree of nodes that know where they stand.
 *
 * The file goes through libyaml's event interface, behind a filter: no anchors, aliases, tags or
 * merge keys (an alias of 300 bytes can stand for 10^9 values), no second document, nothing but
 * UTF-8, at most TP_YAML_DEPTH levels, TP_YAML_NODES nodes and TP_YAML_BYTES bytes, no key twice in
 * a block. The depth is checked as events arrive, so a million '[' end after 65 of them.
 *
 * Scalars keep their text; what they mean (YAML 1.2 core schema) is decided when a field of some
 * type reads them, so that `no` and `010` stay text in a string field.
 *
 * Nodes and texts live in the tree's arena: they may be moved between blocks and are released all
 * at once. */
#ifndef TP_RECIPES_YAML_H
#define TP_RECIPES_YAML_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/arena.h"
#include "base/status.h"
#include "base/text.h"
#include "recipes/problems.h"

#define TP_YAML_DEPTH 64
#define TP_YAML_NODES 10000
#define TP_YAML_BYTES ((size_t)1 << 20)

/* A place for messages: "lora.yaml:4:9", or the source alone ("override 2") where line is 0. */
typedef struct tp_mark {
    const char *source; /* lives in the tree's arena */
    uint32_t line, column;
} tp_mark;

typedef enum tp_yaml_kind { TP_YAML_SCALAR, TP_YAML_LIST, TP_YAML_BLOCK } tp_yaml_kind;

typedef struct tp_yaml {
    tp_yaml_kind kind;
    bool plain;       /* a scalar without quotes: core schema types apply */
    bool wrong;       /* set once a problem with the value was reported */
    const char *text; /* a scalar's; NUL-terminated, no NUL inside */
    const char *key;  /* of a block's member; NULL for list elements and the root */
    uint32_t key_hash;
    tp_mark at, key_at;
    struct tp_yaml *parent, *first, *last, *next; /* children in the order of the file */
    struct tp_yaml *neighbour;                    /* while the text is read: next in its row of keys (yaml.c) */
    size_t n;                                     /* how many */
} tp_yaml;

typedef struct tp_yaml_tree {
    tp_arena arena;
    size_t n_nodes; /* keys count too */
} tp_yaml_tree;

TP_API void tp_yaml_tree_init(tp_yaml_tree *tree);
TP_API void tp_yaml_tree_free(tp_yaml_tree *tree);

/* Parses text[0..n) into the tree. `one_line`: marks carry the source only. *root is NULL if the text
 * holds no value or if it was refused; a refusal is in `problems`. The status is TP_OK or NOMEM. */
TP_API tp_status tp_yaml_parse(tp_ctx *ctx, tp_yaml_tree *tree, tp_problems *problems, const char *source, bool one_line,
                               const char *text, size_t n, tp_yaml **root) TP_MUST_CHECK;

/* ---- walking and changing ---- */
TP_API tp_yaml *tp_yaml_find(const tp_yaml *block, const char *key); /* NULL: absent, or no block */
TP_API tp_yaml *tp_yaml_at(const tp_yaml *list, size_t i);
/* The node after `node` in the order of the text, inside `root`; NULL at the end. */
TP_API tp_yaml *tp_yaml_after(const tp_yaml *node, const tp_yaml *root);
/* A node outside any block or list; NULL with NOMEM. `text` is for scalars. */
TP_API tp_yaml *tp_yaml_new(tp_ctx *ctx, tp_yaml_tree *tree, tp_yaml_kind kind, tp_mark at, const char *text);
/* The key is borrowed: it lives in the arena or is a constant. */
TP_API void tp_yaml_set_key(tp_yaml *node, const char *key, tp_mark at);
TP_API void tp_yaml_append(tp_yaml *parent, tp_yaml *node);
TP_API void tp_yaml_unlink(tp_yaml *node);
TP_API void tp_yaml_replace(tp_yaml *old, tp_yaml *node); /* takes old's place, with its own key and marks */

/* ---- core schema ---- */
typedef enum tp_yaml_type { TP_YAML_TEXT, TP_YAML_NULL, TP_YAML_BOOL, TP_YAML_INT, TP_YAML_FLOAT } tp_yaml_type;

typedef struct tp_yaml_value {
    bool boolean;
    int64_t integer; /* INT, if it fits */
    double number;   /* INT and FLOAT; may be infinite or NaN */
    bool fits;       /* INT: integer holds it */
} tp_yaml_value;

/* The type of a scalar, and its value; quoted scalars are TEXT. value may be NULL. */
TP_API tp_yaml_type tp_yaml_scalar_type(const tp_yaml *scalar, tp_yaml_value *value);

/* ---- for messages ---- */
TP_API const char *tp_mark_text(tp_mark mark, char *out, size_t size);
/* "datasets.0.limit": the way from the root. */
TP_API const char *tp_yaml_path(const tp_yaml *node, char *out, size_t size);
/* "8.0", "null", "\"eight\"", "the string \"8\"", "a list", "a block": what was found, cut to a readable length. */
TP_API const char *tp_yaml_describe(const tp_yaml *node, char *out, size_t size);

#endif
