/* The list of formats, and what they share. */
#include "data/formats.h"

#include <stdio.h>

#include "base/mem.h"

#define PLACE_BYTES 1024

/* In the order in which they are tried: rows with more than one kind of columns are the richer kind. */
static const tp_row_format *const formats[] = {&tp_format_chat, &tp_format_instruction, &tp_format_completion};
#define N_FORMATS (sizeof formats / sizeof *formats)

/* ---- columns ---- */

const char *tp_rules_column(const tp_row_rules *rules, const char *ours)
{
    const tp_string_map *map = &rules->block->columns;
    for (size_t i = 0; i < map->n; i++)
        if (strcmp(map->items[i].name, ours) == 0) return map->items[i].value;
    return ours;
}

bool tp_rules_has(const tp_row_rules *rules, const tp_json *row, const char *ours)
{
    return tp_json_type_of(tp_json_get(row, tp_rules_column(rules, ours))) != TP_JSON_NULL;
}

tp_status tp_rules_string(tp_ctx *ctx, const tp_row_rules *rules, const tp_json_doc *row, const char *ours, bool required,
                          tp_span *text)
{
    *text = (tp_span){NULL, 0};
    return tp_json_need_string(ctx, row, tp_json_root(row), tp_rules_column(rules, ours), required, text);
}

/* ---- choosing ---- */

/* "question, answer": the first columns of a row. */
static const char *list_columns(const tp_json *row, char *out, size_t size)
{
    size_t n = 0;
    snprintf(out, size, "none");
    for (size_t i = 0; i < tp_json_count(row) && i < 8 && n < size; i++) {
        tp_span key = tp_json_key_at(row, i);
        int wrote = snprintf(out + n, size - n, "%s%.*s", n > 0 ? ", " : "", (int)(key.len < 64 ? key.len : 64), key.data);
        n += wrote > 0 ? (size_t)wrote : 0;
    }
    return out;
}

static tp_status no_format(tp_ctx *ctx, const tp_row_rules *rules, const tp_json_doc *row)
{
    char place[PLACE_BYTES], there[640];
    const char *wanted =
        rules->format != NULL ? rules->format->columns : "messages; instruction and output; prompt and completion; or text";
    return tp_fail(ctx, TP_FORMAT, "%s: expected columns %s, found %s (`columns: {ours: theirs}` renames them)",
                   tp_json_where(row, tp_json_root(row), place, sizeof place), wanted,
                   list_columns(tp_json_root(row), there, sizeof there));
}

static tp_status need_object(tp_ctx *ctx, const tp_json_doc *row)
{
    char place[PLACE_BYTES];
    tp_json_type type = tp_json_type_of(tp_json_root(row));
    if (type == TP_JSON_OBJECT) return TP_OK;
    return tp_fail(ctx, TP_FORMAT, "%s: expected a row to be an object, got %s",
                   tp_json_where(row, tp_json_root(row), place, sizeof place), tp_json_type_name(type));
}

/* A renamed column that nobody reads is a slip of the pen. */
static tp_status check_renamed(tp_ctx *ctx, const tp_row_rules *rules)
{
    const tp_string_map *map = &rules->block->columns;
    for (size_t i = 0; i < map->n; i++) {
        const char *const *known = rules->format->names;
        while (*known != NULL && strcmp(*known, map->items[i].name) != 0) known++;
        if (*known != NULL) continue;
        const char *near = tp_nearest_name(map->items[i].name, rules->format->names);
        return tp_fail(ctx, TP_INVALID, "%s: columns: rows of type %s have no column \"%s\"%s%s%s", rules->block->path,
                       rules->format->name, map->items[i].name, near != NULL ? "; did you mean " : "", near != NULL ? near : "",
                       near != NULL ? "?" : "");
    }
    return TP_OK;
}

tp_status tp_rules_choose(tp_ctx *ctx, tp_row_rules *rules, const tp_json_doc *first_row)
{
    const tp_json *row = tp_json_root(first_row);
    int type = rules->block->type;
    TP_TRY(need_object(ctx, first_row));
    rules->format = NULL;
    for (size_t i = 0; i < N_FORMATS && rules->format == NULL; i++)
        if (type == TP_DATASET_AUTO ? formats[i]->fits(rules, row) : type == formats[i]->type) rules->format = formats[i];
    if (rules->format == NULL && type != TP_DATASET_AUTO)
        return tp_fail(ctx, TP_UNSUPPORTED, "%s: rows of type %s are not available in this version", rules->block->path,
                       tp_config_word("datasets[].type", type));
    if (rules->format != NULL) TP_TRY(check_renamed(ctx, rules));
    if (rules->format == NULL || !rules->format->fits(rules, row)) return no_format(ctx, rules, first_row);
    rules->pairs = rules->format == &tp_format_completion && !tp_rules_has(rules, row, "text");
    return TP_OK;
}

/* ---- making samples ---- */

tp_status tp_rules_apply(tp_ctx *ctx, const tp_row_rules *rules, const tp_json_doc *row, tp_sample *sample)
{
    TP_TRY(need_object(ctx, row));
    tp_sample_clear(sample);
    return rules->format->make(ctx, rules, row, sample);
}

tp_status tp_sample_from_text(tp_ctx *ctx, tp_span text, tp_sample *sample)
{
    tp_sample_clear(sample);
    tp_buf_append(&sample->text, text.data, text.len);
    TP_TRY(tp_buf_status(ctx, &sample->text, "row"));
    return tp_sample_train(ctx, sample, 0, text.len, text.len);
}

tp_status tp_render_row(tp_ctx *ctx, const tp_prompt *prompt, const tp_json_doc *row, tp_chat_input *input,
                        const uint8_t *messages, size_t n_messages, tp_sample *sample)
{
    char place[PLACE_BYTES];
    tp_chat_text text;
    tp_prompt_fill(prompt, input);
    tp_status status = tp_chat_render(ctx, prompt->tmpl, input, &text);
    if (status == TP_OK) {
        status = tp_sample_from_chat(ctx, &text, messages, n_messages, tp_template_has_generation(prompt->tmpl), sample);
    } else if (status == TP_INVALID) { /* the template is as the recipe wants it: the row is not */
        (void)tp_fail_in(ctx, "%s", tp_json_where(row, tp_json_root(row), place, sizeof place));
        ctx->status = status = TP_FORMAT;
    }
    tp_template_output_free(&text);
    return status;
}
