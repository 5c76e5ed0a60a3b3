/* What a row may hold: one file per format, each turning a JSON object into a sample. */
#ifndef TP_DATA_FORMATS_H
#define TP_DATA_FORMATS_H

#include "base/json.h"
#include "data/mask.h"
#include "data/prompt.h"
#include "recipes/keys.h"

typedef struct tp_row_format tp_row_format;

/* How the rows of one file are read. Everything is borrowed. */
typedef struct tp_row_rules {
    const tp_row_format *format;
    const tp_dataset_config *block; /* columns, system */
    const tp_prompt *prompt;        /* what formats with needs_template render by */
    bool pairs;                     /* completion: prompt and completion, not text */
    bool train_on_inputs;
    int train_on_turns; /* tp_train_turns */
} tp_row_rules;

struct tp_row_format {
    const char *name;
    int type;                 /* tp_dataset_type */
    const char *columns;      /* what it wants, for messages */
    const char *const *names; /* every column it reads; ends with NULL */
    bool needs_template;
    bool (*fits)(const tp_row_rules *rules, const tp_json *row);
    tp_status (*make)(tp_ctx *ctx, const tp_row_rules *rules, const tp_json_doc *doc, tp_sample *sample);
};

extern const tp_row_format tp_format_completion, tp_format_instruction, tp_format_chat;

/* Sets rules->format and ->pairs by the first row of a file: the block's type, or for auto the first format whose columns are
 * there. FORMAT, listing the columns that are there, if none fits; UNSUPPORTED for a type without format; INVALID if the block
 * renames a column that the format does not know. */
TP_API tp_status tp_rules_choose(tp_ctx *ctx, tp_row_rules *rules, const tp_json_doc *first_row) TP_MUST_CHECK;

/* A row to a sample, replacing what it held. FORMAT with file:line:column for a row that is not as the rules say or that the
 * template refuses. */
TP_API tp_status tp_rules_apply(tp_ctx *ctx, const tp_row_rules *rules, const tp_json_doc *row,
                                tp_sample *sample) TP_MUST_CHECK;

/* A text without JSON around it: all of it is trained. */
TP_API tp_status tp_sample_from_text(tp_ctx *ctx, tp_span text, tp_sample *sample) TP_MUST_CHECK;

/* ---- for formats ---- */
/* The name that a column of ours has in the file. */
const char *tp_rules_column(const tp_row_rules *rules, const char *ours);
/* A column as string; where it is not required and absent or null, *text is empty with data NULL. */
tp_status tp_rules_string(tp_ctx *ctx, const tp_row_rules *rules, const tp_json_doc *row, const char *ours, bool required,
                          tp_span *text) TP_MUST_CHECK;
bool tp_rules_has(const tp_row_rules *rules, const tp_json *row, const char *ours);
/* Renders and masks the conversation of a row; `row` is for messages. messages: as tp_sample_from_chat. */
TP_API tp_status tp_render_row(tp_ctx *ctx, const tp_prompt *prompt, const tp_json_doc *row, tp_chat_input *input,
                               const uint8_t *messages, size_t n_messages, tp_sample *sample) TP_MUST_CHECK;

#endif
