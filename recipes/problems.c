/* The list of problems: tp_fail's escaping, one line each, at most TP_PROBLEMS_MAX errors. */
#include "recipes/problems.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/mem.h"

void tp_problems_free(tp_problems *problems)
{
    for (size_t i = 0; i < problems->n; i++) tp_free(problems->items[i].text);
    tp_free(problems->items);
    *problems = (tp_problems){0};
}

bool tp_problems_full(const tp_problems *problems)
{
    return problems->n >= TP_PROBLEMS_MAX;
}

tp_status tp_problems_add(tp_ctx *ctx, tp_problems *problems, tp_status status, const char *format, ...)
{
    if (status != TP_OK) problems->n_errors++;
    if (tp_problems_full(problems)) {
        if (status != TP_OK) problems->n_left_out++;
        return TP_OK;
    }
    char raw[TP_MESSAGE_BYTES];
    va_list args;
    va_start(args, format);
    vsnprintf(raw, sizeof raw, format, args);
    va_end(args);
    tp_ctx line; /* a context of its own, for its escaping of control characters */
    tp_ctx_init(&line);
    tp_status unused = tp_fail(&line, TP_INVALID, "%s", raw);
    (void)unused;
    TP_TRY(tp_grow(ctx, &problems->items, &problems->capacity, problems->n + 1, sizeof *problems->items));
    char *text = tp_strdup(ctx, line.message);
    if (text == NULL) return TP_NOMEM;
    problems->items[problems->n++] = (tp_problem){status, text};
    return TP_OK;
}

tp_status tp_problems_status(tp_ctx *ctx, const tp_problems *problems)
{
    const tp_problem *first = NULL;
    for (size_t i = 0; i < problems->n; i++) {
        const tp_problem *p = &problems->items[i];
        if (p->status == TP_OK) continue;
        if (first == NULL || (first->status != TP_INVALID && p->status == TP_INVALID)) first = p;
    }
    if (first == NULL && problems->n_errors == 0) return TP_OK;
    if (first == NULL) return tp_fail(ctx, TP_INVALID, "%zu problems in the recipe", problems->n_errors);
    if (problems->n_errors == 1) return tp_fail(ctx, first->status, "%s", first->text);
    return tp_fail(ctx, first->status, "%s (and %zu more)", first->text, problems->n_errors - 1);
}
