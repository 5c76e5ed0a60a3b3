/* Field tables: what a recipe may say, where each value goes, and what the reference prints.
 *
 * A section is a constant table of fields. A field says under which key a value stands, of what
 * type and range it is, which names other tools use for it, under which condition it has an effect,
 * and at which offset of the program's config struct it is stored. Validation, the written-out
 * recipe, --help and docs/recipes.md are all made from the same tables.
 *
 *     static const tp_field fields[] = {
 *         {.key = "lora_r", .type = TP_FIELD_INT, .offset = AT(lora.rank), .otherwise = "16", .range = TP_RANGE(1, 1024),
 *          .aliases = (const tp_alias[]){{"r"}, {"lora_rank"}, {0}}, .when = &lora, .help = "rank"},
 *
 * Strings and arrays that end up in the config belong to the recipe. */
#ifndef TP_RECIPES_SCHEMA_H
#define TP_RECIPES_SCHEMA_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "base/text.h"
#include "recipes/problems.h"

typedef struct tp_recipe tp_recipe; /* recipe.h */

/* ---- what lies at a field's offset ---- */
#define TP_UNSET (-1) /* an integer field without default that the recipe does not set; floats are 0, strings NULL */

typedef struct tp_strings {
    const char *const *items;
    size_t n;
} tp_strings;

typedef struct tp_ints {
    const int64_t *items;
    size_t n;
} tp_ints;

/* Modules by name: a word with a meaning (all-linear), a regular expression for whole paths, or a list of
 * dotted suffixes. */
typedef struct tp_patterns {
    enum { TP_PATTERNS_UNSET, TP_PATTERNS_WORD, TP_PATTERNS_REGEX, TP_PATTERNS_LIST } kind;
    const char *text; /* of WORD and REGEX */
    tp_strings list;
} tp_patterns;

typedef struct tp_number_entry {
    const char *name;
    double value;
} tp_number_entry;
typedef struct tp_number_map {
    const tp_number_entry *items; /* in the order of the file */
    size_t n;
} tp_number_map;

typedef struct tp_string_entry {
    const char *name, *value;
} tp_string_entry;
typedef struct tp_string_map {
    const tp_string_entry *items;
    size_t n;
} tp_string_map;

/* A vocabulary id, or the text of a token where text is not NULL. */
typedef struct tp_token_entry {
    const char *text;
    int64_t id;
} tp_token_entry;
typedef struct tp_token_list {
    const tp_token_entry *items;
    size_t n;
} tp_token_list;

/* Part of a whole: a fraction, or a count where rows is not 0. Both 0: nothing. */
typedef struct tp_share {
    double fraction;
    int64_t rows;
} tp_share;

/* A list of blocks: n structs of the section's item_bytes. */
typedef struct tp_blocks {
    const void *items;
    size_t n;
} tp_blocks;

typedef enum tp_field_type {                      /* stored as */
                             TP_FIELD_BOOL,       /* bool */
                             TP_FIELD_INT,        /* int64_t */
                             TP_FIELD_FLOAT,      /* double */
                             TP_FIELD_SIZE,       /* uint64_t bytes; 0 for the word "auto" */
                             TP_FIELD_STRING,     /* const char * */
                             TP_FIELD_INPUT,      /* const char *: a path that must exist, or one of the words */
                             TP_FIELD_OUTPUT,     /* const char *: a path that we write */
                             TP_FIELD_ENUM,       /* int: index into words */
                             TP_FIELD_ENUMS,      /* tp_ints: one word, or a list of them */
                             TP_FIELD_STRINGS,    /* tp_strings: a list */
                             TP_FIELD_PATTERNS,   /* tp_patterns */
                             TP_FIELD_LAYERS,     /* tp_ints: a number, "8-15", or a list of both */
                             TP_FIELD_COUNT_MAP,  /* tp_number_map: pattern: integer */
                             TP_FIELD_NUMBER_MAP, /* tp_number_map: pattern: number */
                             TP_FIELD_STRING_MAP, /* tp_string_map */
                             TP_FIELD_TOKENS,     /* tp_token_list */
                             TP_FIELD_SHARE,      /* tp_share */
                             TP_FIELD_BLOCKS,     /* tp_blocks */
                             TP_FIELD_TYPE_COUNT
} tp_field_type;

/* ---- tables ---- */
/* Allowed numbers; all zero: no bound. `above` and `below` leave the end itself out. */
typedef struct tp_range {
    double min, max;
    bool above, below, set;
} tp_range;
#define TP_RANGE(lo, hi)                                                                                                       \
    {                                                                                                                          \
        .min = (lo), .max = (hi), .set = true                                                                                  \
    }
#define TP_FROM(lo)                                                                                                            \
    {                                                                                                                          \
        .min = (lo), .max = INFINITY, .set = true                                                                              \
    }
#define TP_ABOVE(lo)                                                                                                           \
    {                                                                                                                          \
        .min = (lo), .max = INFINITY, .above = true, .set = true                                                               \
    }
#define TP_ABOVE_TO(lo, hi)                                                                                                    \
    {                                                                                                                          \
        .min = (lo), .max = (hi), .above = true, .set = true                                                                   \
    }
#define TP_FROM_BELOW(lo, hi)                                                                                                  \
    {                                                                                                                          \
        .min = (lo), .max = (hi), .below = true, .set = true                                                                   \
    }

/* Another tool's name for a key.
 *   {"r"}                              the value is taken as it is
 *   {"mask_prompt", "!"}               a bool with the opposite meaning
 *   {"bf16", "true", "bf16"}           the value "true" under this name means "bf16" under ours
 * Several rows may have one name: they translate several values. Values without a row are taken as they are
 * if `open` is set in one of the rows, else refused. */
typedef struct tp_alias {
    const char *name, *from, *to;
    bool open;
} tp_alias;

/* When a key has an effect. */
typedef struct tp_when {
    const char *text; /* completes "it is for ..." */
    const char *key;  /* the key that decides; problems with its value silence this condition */
    bool (*holds)(const void *config);
} tp_when;

struct tp_section;

typedef struct tp_field {
    const char *key; /* dotted where the value stands in a block: quant.type */
    tp_field_type type;
    size_t offset;
    const char *otherwise;    /* default as YAML; NULL: none */
    const char *default_note; /* for the reference, where the default depends on other things */
    tp_range range;
    const char *const *words; /* NULL-terminated */
    const char *help;
    const tp_alias *aliases;        /* ends with an empty row */
    const tp_when *when;            /* NULL: always */
    const struct tp_section *block; /* of TP_FIELD_BLOCKS */
    bool required;                  /* inside a block: if the block is there */
} tp_field;

typedef struct tp_check tp_check;

typedef struct tp_section {
    const char *title; /* heading of the reference */
    const char *note;  /* sentences below its table, or NULL */
    const tp_field *fields;
    size_t n_fields;
    size_t item_bytes; /* of one block, where the section describes a list of blocks */
    /* Fills in defaults that depend on other keys; runs after every section was read. May be NULL. */
    void (*settle)(const tp_recipe *recipe, void *config);
    /* Rules between keys, reported with tp_check_problem. May be NULL. Status: OK or NOMEM. */
    tp_status (*check)(tp_check *check, const void *config);
} tp_section;

/* A name that tools use for different things, and what to write instead. */
typedef struct tp_refused_key {
    const char *name, *why;
} tp_refused_key;

typedef struct tp_schema {
    const tp_section *const *sections;
    size_t n_sections;
    size_t config_bytes;
    const tp_refused_key *refused; /* ends with an empty row; may be NULL */
} tp_schema;

/* ---- for check functions ---- */
struct tp_check {
    tp_ctx *ctx;
    const tp_recipe *recipe;
    tp_problems *problems;
};
/* Reports "where: key: text" as INVALID, where the key stands in the recipe. */
TP_API tp_status tp_check_problem(tp_check *check, const char *key, const char *format, ...) TP_PRINTF(3, 4) TP_MUST_CHECK;
/* True if the recipe sets the key (or, for a block's name, has the block). */
TP_API bool tp_check_given(const tp_check *check, const char *key);

/* ---- from the tables ---- */
/* The field with that key; NULL: none. "datasets[].type" is a key of the blocks in datasets. */
TP_API const tp_field *tp_schema_field(const tp_schema *schema, const char *key);

/* The name of the first key whose values differ between two configs that were read with this schema, NULL if
 * none does. *from starts at 0 and is moved past the key, so that a loop finds all of them. */
TP_API const char *tp_schema_difference(const tp_schema *schema, const void *a, const void *b, size_t *from);

/* Appends every key that has an effect, with its value, as YAML that reads back to the same config. */
TP_API void tp_schema_write(const tp_schema *schema, const void *config, tp_buf *out);

/* Appends the tables as Markdown: docs/recipes.md. */
TP_API void tp_schema_write_reference(const tp_schema *schema, tp_buf *out);

/* What the tables say of one key, in lines for people: "lora_r", another tool's name for it, "datasets[].type", or all keys of
 * a block, "quant". False, and nothing written, if there is none. */
TP_API bool tp_schema_write_key(const tp_schema *schema, const char *name, tp_buf *out);

#endif
