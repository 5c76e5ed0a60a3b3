/* Chat templates: the part of Jinja2 that model repositories use, interpreted.
 *
 * A template arrives with a model and is therefore code from a stranger. It can read the variables
 * that it is given and write text, and nothing else: there are no files, imports, attributes of a host
 * language or clocks but the one passed in. Parsing is bounded (1 MiB of source, 128 nested statements,
 * 256 nested parentheses), and so is every render (10^7 steps, 16 MiB per string, 256 MiB in all).
 *
 * The dialect is that of transformers.apply_chat_template: Jinja2's ImmutableSandboxedEnvironment with
 * trim_blocks, lstrip_blocks, loop controls and {% generation %}; values behave as in Python. Integers
 * have 128 bits and overflow is an error. Missing from it are template loading (include, import,
 * extends: an error when reached, as there), `lipsum` and the filters random and urlize.
 *
 * Provenance. Text that stems from a message stays known as such while the template slices, strips,
 * splits, joins, replaces and concatenates it: each string carries a map of its buffer, and a render
 * reports which bytes of the output are which message's content. Labels for training come from these
 * ranges, never from searching the text. */
#ifndef TP_DATA_TEMPLATE_H
#define TP_DATA_TEMPLATE_H

#include "base/json.h"
#include "base/status.h"
#include "base/text.h"

typedef struct tp_template tp_template;

/* What went wrong, named as the reference implementation names it. */
typedef enum tp_template_error {
    TP_TEMPLATE_NO_ERROR,
    TP_TEMPLATE_RAISED,    /* the template called raise_exception */
    TP_TEMPLATE_UNDEFINED, /* something was done with a value that does not exist */
    TP_TEMPLATE_TYPE,
    TP_TEMPLATE_VALUE,
    TP_TEMPLATE_ZERO_DIVISION,
    TP_TEMPLATE_OVERFLOW,
    TP_TEMPLATE_LOOKUP, /* KeyError, IndexError */
    TP_TEMPLATE_ATTRIBUTE,
    TP_TEMPLATE_SECURITY,  /* reached for something that the sandbox hides */
    TP_TEMPLATE_RECURSION, /* nested too deep */
    TP_TEMPLATE_RUNTIME,   /* what only the template engine knows */
    TP_TEMPLATE_ARGUMENT,  /* a filter got arguments it cannot use */
    TP_TEMPLATE_LIMIT,     /* steps, memory or output used up */
    TP_TEMPLATE_ERROR_COUNT
} tp_template_error;

/* "TypeError", "UndefinedError", ... */
TP_API const char *tp_template_error_name(tp_template_error error);

/* Parses text[0..n), which is copied. `name` stands in messages ("name:line: ..."). The result is immutable and may be
 * used by several threads at once; tp_template_free accepts NULL.
 * Errors: FORMAT (does not parse, larger than a limit, invalid UTF-8), NOMEM. */
TP_API tp_status tp_template_compile(tp_ctx *ctx, const char *name, const char *text, size_t n,
                                     tp_template **tmpl) TP_MUST_CHECK;
TP_API void tp_template_free(tp_template *tmpl);

/* The source as it was given. */
TP_API tp_span tp_template_source(const tp_template *tmpl);
/* Whether the template holds {% generation %} blocks, whose spans then tell what the assistant wrote. */
TP_API bool tp_template_has_generation(const tp_template *tmpl);

/* Wall-clock time for strftime_now. Fields as people write them: month 1-12, day 1-31. */
typedef struct tp_template_time {
    int year, month, day, hour, minute, second;
} tp_template_time;

/* "2025-03-09T07:05:02"; false if it is not such a time. */
TP_API bool tp_template_time_parse(const char *text, tp_template_time *time);

#define TP_TEMPLATE_STEPS  10000000
#define TP_TEMPLATE_OUTPUT ((size_t)16 << 20)
#define TP_TEMPLATE_MEMORY ((size_t)256 << 20)

typedef struct tp_template_options {
    const tp_template_time *now; /* NULL: strftime_now is an error */
    int64_t max_steps;           /* 0: TP_TEMPLATE_STEPS */
    size_t max_output;           /* bytes of any one string; 0: TP_TEMPLATE_OUTPUT */
    size_t max_memory;           /* bytes of all values together; 0: TP_TEMPLATE_MEMORY */
} tp_template_options;

/* Fields of a message that are followed through the render. */
typedef enum tp_template_field {
    TP_FIELD_CONTENT = 1, /* content: a string, the text of its parts, or a tool's result */
    TP_FIELD_REASONING,   /* reasoning_content, thinking, reasoning */
    TP_FIELD_TOOL_CALLS   /* strings inside tool_calls, and arguments written as JSON */
} tp_template_field;

/* Bytes [begin, end) of the output that stem from a field of messages[message]. */
typedef struct tp_template_span {
    size_t message;
    tp_template_field field;
    size_t begin, end;
} tp_template_span;

/* Bytes [begin, end) written inside one {% generation %} block; empty blocks give empty ranges. */
typedef struct tp_template_range {
    size_t begin, end;
} tp_template_range;

/* Result of a render, owned by the caller, released with tp_template_output_free whether the render worked or not. */
typedef struct tp_template_output {
    tp_buf text;             /* empty after an error */
    tp_template_span *spans; /* in order, disjoint; touching ranges of one field of one message are joined */
    size_t n_spans;
    tp_template_range *generation; /* in the order in which the blocks began */
    size_t n_generation;
    tp_template_error error; /* what kind of failure, after one inside the template */
    char *raised;            /* the exact text given to raise_exception, NUL behind it; NULL otherwise */
    size_t raised_len;
} tp_template_output;

TP_API void tp_template_output_free(tp_template_output *out);

/* A variable: exactly one of json and text is set. The variable called "messages" is the one whose strings are followed. */
typedef struct tp_template_variable {
    const char *name;
    const tp_json *json;
    const char *text;
} tp_template_variable;

/* Renders with the given variables; everything else is undefined. *out is initialised here. The JSON is borrowed until the call
 * returns and never changed.
 * Errors: INVALID (the template failed: out->error and out->raised tell), NOMEM. */
TP_API tp_status tp_template_render(tp_ctx *ctx, const tp_template *tmpl, const tp_template_options *options,
                                    const tp_template_variable *variables, size_t n_variables,
                                    tp_template_output *out) TP_MUST_CHECK;

#endif
