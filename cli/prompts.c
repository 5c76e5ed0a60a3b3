/* Rows are read one after the other and encoded at once; only tokens stay. */
#include "cli/prompts.h"

#include "base/json.h"
#include "base/mem.h"
#include "data/rows.h"

tp_status tp_prompts_add(tp_ctx *ctx, tp_prompts *prompts, const tp_tokens *tokens)
{
    TP_TRY(tp_grow(ctx, &prompts->items, &prompts->capacity, prompts->n + 1, sizeof *prompts->items));
    int32_t *ids = tp_alloc(ctx, tokens->count, sizeof *ids);
    if (ids == NULL) return TP_NOMEM;
    for (size_t i = 0; i < tokens->count; i++) ids[i] = tokens->items[i].id;
    prompts->items[prompts->n++] = (tp_prompt_ids){ids, tokens->count};
    if (tokens->count > prompts->longest) prompts->longest = tokens->count;
    return TP_OK;
}

void tp_prompts_free(tp_prompts *prompts)
{
    for (size_t i = 0; i < prompts->n; i++) tp_free((int32_t *)(uintptr_t)prompts->items[i].ids);
    tp_free(prompts->items);
    *prompts = (tp_prompts){0};
}

static tp_status read_ids(tp_ctx *ctx, const tp_json_doc *row, const tp_json *ids, tp_tokens *out)
{
    char place[1024];
    int64_t id;
    for (size_t i = 0; i < tp_json_count(ids); i++) {
        const tp_json *item = tp_json_at(ids, i);
        if (!tp_json_i64(item, &id) || id < 0 || id > INT32_MAX)
            return tp_fail(ctx, TP_FORMAT, "%s: ids: expected a token id", tp_json_where(row, item, place, sizeof place));
        TP_TRY(tp_tokens_push(ctx, out, (tp_token){.id = (int32_t)id}));
    }
    return TP_OK;
}

static tp_status encode_row(tp_ctx *ctx, const tp_json_doc *row, tp_prompt_encode encode, void *state, tp_tokens *out)
{
    const tp_json *root = tp_json_root(row), *text = tp_json_get(root, "prompt"), *ids = tp_json_get(root, "ids");
    char place[1024];
    if (tp_json_type_of(text) == TP_JSON_STRING)
        TP_TRY(encode(ctx, state, tp_json_string(text), out));
    else if (tp_json_type_of(ids) == TP_JSON_ARRAY)
        TP_TRY(read_ids(ctx, row, ids, out));
    else
        return tp_fail(ctx, TP_FORMAT, "%s: expected a row with \"prompt\", a text, or \"ids\", an array",
                       tp_json_where(row, root, place, sizeof place));
    if (out->count > 0) return TP_OK;
    return tp_fail(ctx, TP_FORMAT, "%s: the prompt is empty", tp_json_where(row, root, place, sizeof place));
}

static tp_status add_row(tp_ctx *ctx, tp_prompts *prompts, const tp_row_file *file, const tp_row_place *row,
                         tp_prompt_encode encode, void *state)
{
    tp_json_doc *doc;
    tp_tokens tokens = {0};
    TP_TRY(tp_row_file_parse(ctx, file, row->line, row->text, row->bytes, &doc));
    tp_status status = encode_row(ctx, doc, encode, state, &tokens);
    if (status == TP_OK) status = tp_prompts_add(ctx, prompts, &tokens);
    tp_tokens_free(&tokens);
    tp_json_free(doc);
    return status;
}

tp_status tp_prompts_read(tp_ctx *ctx, tp_prompts *prompts, const char *path, tp_prompt_encode encode, void *state)
{
    tp_row_file *file;
    tp_row_reader reader;
    tp_row_place row;
    bool found = true;
    TP_TRY(tp_row_file_open(ctx, path, "train", &file));
    tp_row_reader_begin(&reader, file, 0);
    tp_status status = TP_OK;
    while (status == TP_OK && found) {
        status = tp_row_reader_next(ctx, &reader, &row, &found);
        if (status == TP_OK && found) status = add_row(ctx, prompts, file, &row, encode, state);
    }
    tp_row_reader_end(&reader);
    tp_row_file_close(file);
    if (status == TP_OK && prompts->n == 0) status = tp_fail(ctx, TP_FORMAT, "%s: no rows", path);
    return status;
}
