/* Which modules an adapter applies to: PEFT's rules for target_modules, exclude_modules, layers and patterns. */
#ifndef TP_PEFT_TARGET_H
#define TP_PEFT_TARGET_H

#include "base/status.h"
#include "base/text.h"

/* A list of dotted suffixes, or one Python regular expression that must match a whole path. */
typedef struct tp_names {
    bool is_regex;
    const char *const *list; /* borrowed; is_regex: one entry */
    size_t n;
} tp_names;

/* "^(a|b)$"-style keys of rank_pattern and alpha_pattern, in file order. */
typedef struct tp_pattern {
    const char *key;
    double value;
} tp_pattern;

typedef struct tp_targets {
    tp_names include; /* n 0 with all_linear */
    bool all_linear;
    tp_names exclude;      /* n 0: none */
    const int64_t *layers; /* layers_to_transform; n_layers 0: all */
    size_t n_layers;
    const char *const *layers_pattern;
    size_t n_layers_pattern;
} tp_targets;

/* Does the module at `path` take part? INVALID if a regular expression does not compile. *exact (may be NULL) tells which
 * entry of a list matched, so that the caller can report entries that match nothing; -1 otherwise. */
TP_API tp_status tp_target_match(tp_ctx *ctx, const tp_targets *targets, const char *path, bool is_head, bool *matches,
                                 int *entry) TP_MUST_CHECK;
/* Value of the first key for which (.*\.)?(key)$ matches path, else `otherwise`. *index: which, or -1. */
TP_API tp_status tp_pattern_value(tp_ctx *ctx, const tp_pattern *patterns, size_t n, const char *path, double otherwise,
                                  double *value, int *index) TP_MUST_CHECK;

#endif
