/* Shared between the files that read and write recipes; not for other folders. */
#ifndef TP_RECIPES_PARTS_H
#define TP_RECIPES_PARTS_H

#include <string.h>

#include "recipes/recipe.h"
#include "recipes/schema.h"
#include "recipes/yaml.h"

struct tp_recipe {
    tp_yaml_tree tree;
    tp_yaml *root; /* after includes, overrides and variables */
    const char *name;
    const tp_schema *schema;
};

/* What the steps of one reading share. */
typedef struct tp_reading {
    tp_ctx *ctx;
    tp_recipe *recipe;
    tp_problems *problems;
    size_t n_files;
} tp_reading;

/* In all of these the status is TP_OK or NOMEM: what is wrong with the text goes to the problems. */

/* INVALID at a place: "mark: text". */
tp_status tp_reading_problem(tp_reading *r, tp_mark at, const char *format, ...) TP_PRINTF(3, 4) TP_MUST_CHECK;

/* include.c: the file with everything it includes; *root is NULL after a problem. */
tp_status tp_reading_file(tp_reading *r, const char *path, tp_yaml **root) TP_MUST_CHECK;
tp_status tp_reading_text(tp_reading *r, const char *name, const char *text, size_t n, tp_yaml **root) TP_MUST_CHECK;
/* Moves the members of `over` into `base`: blocks merge by key, the rest is replaced. */
void tp_merge_blocks(tp_yaml *base, tp_yaml *over);

/* overrides.c */
tp_status tp_reading_override(tp_reading *r, size_t number, const char *text) TP_MUST_CHECK;
/* The node that a dotted way leads to, or NULL. */
tp_yaml *tp_yaml_walk(const tp_yaml *root, const char *path);

/* vars.c: takes `vars` out of the root and fills every ${name}. */
tp_status tp_reading_variables(tp_reading *r) TP_MUST_CHECK;

/* alias.c: gives members of a root their own names. A name that several keys could mean is left
 * for tp_reading_settle_name, which knows the adapter: *field is its key, NULL after a problem. */
tp_status tp_reading_names(tp_reading *r, tp_yaml *root) TP_MUST_CHECK;
tp_status tp_reading_settle_name(tp_reading *r, tp_yaml *node, const void *config, const tp_field **field) TP_MUST_CHECK;
bool tp_name_is_ambiguous(const tp_schema *schema, const char *name);
/* Our key for another tool's name, or NULL; of several the first. */
const char *tp_name_of_alias(const tp_schema *schema, const char *name);

/* fields.c: every value of the root into config. */
tp_status tp_reading_fields(tp_reading *r, const char *const *optional, void *config) TP_MUST_CHECK;

/* values.c: one value. */
/* Sets the default. */
tp_status tp_value_default(tp_reading *r, const tp_field *field, void *at) TP_MUST_CHECK;
/* Reads a node of any type but TP_FIELD_BLOCKS; *wrong is the node that does not fit, or NULL. */
tp_status tp_value_read(tp_reading *r, const tp_field *field, const tp_yaml *node, void *at,
                        const tp_yaml **wrong) TP_MUST_CHECK;
/* "an integer from 1 to 1024": what the field wants, or what it wants as an element of its list or map. */
const char *tp_value_expected(const tp_field *field, bool element, char *out, size_t size);
const char *tp_range_text(const tp_range *range, char *out, size_t size);

/* value_write.c */
bool tp_value_is_set(const tp_field *field, const void *at);
bool tp_value_same(const tp_field *field, const void *a, const void *b);
void tp_value_write(const tp_field *field, const void *at, tp_buf *out); /* one line, flow style; not TP_FIELD_BLOCKS */

/* strcmp without the call for most pairs: every key of a recipe is held against every name that there is. */
static inline bool tp_same_name(const char *a, const char *b)
{
    return a[0] == b[0] && strcmp(a, b) == 0;
}

static inline void *tp_field_at(const tp_field *field, void *config)
{
    return (char *)config + field->offset;
}
static inline const void *tp_field_in(const tp_field *field, const void *config)
{
    return (const char *)config + field->offset;
}

#endif
