/* What is wrong with a recipe, all of it, in one list.
 *
 * A context keeps the first failure only. A recipe with three mistakes should be corrected in one
 * go, so reading one collects every problem here, each a line of its own that begins with the
 * place it was found ("lora.yaml:4:9: lora_r: ..."). Notes (a name of another tool was read as
 * ours) stand in the same list with status TP_OK. The lines are free of control characters. */
#ifndef TP_RECIPES_PROBLEMS_H
#define TP_RECIPES_PROBLEMS_H

#include <stdbool.h>
#include <stddef.h>

#include "base/status.h"

/* Lines that are kept; more are only counted, so that a hostile file cannot fill the screen. */
#define TP_PROBLEMS_MAX 100

typedef struct tp_problem {
    tp_status status; /* TP_OK: a note */
    char *text;       /* one line without its newline; owned by the list */
} tp_problem;

/* Zero-initialise, free once. */
typedef struct tp_problems {
    tp_problem *items;
    size_t n, capacity;
    size_t n_errors;   /* all of them, also those not kept */
    size_t n_left_out; /* errors beyond TP_PROBLEMS_MAX */
} tp_problems;

TP_API void tp_problems_free(tp_problems *problems);

/* Adds a line. Fails with NOMEM only. */
TP_API tp_status tp_problems_add(tp_ctx *ctx, tp_problems *problems, tp_status status, const char *format, ...)
    TP_PRINTF(4, 5) TP_MUST_CHECK;

/* True once further errors would only be counted: callers may save themselves costly advice. */
TP_API bool tp_problems_full(const tp_problems *problems);

/* TP_OK if the list holds no error. Else the error that decides the exit class (INVALID before the
 * rest: text errors come first) is recorded in ctx, with the number of the others behind it. */
TP_API tp_status tp_problems_status(tp_ctx *ctx, const tp_problems *problems) TP_MUST_CHECK;

#endif
