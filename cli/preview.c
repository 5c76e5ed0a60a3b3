/* tapeft preview RECIPE: what training will see of the first rows, and which tokens of it are learned. */
#include <string.h>
#include <unistd.h>

#include "backend/backend.h"
#include "base/json.h"
#include "cli/open.h"
#include "data/dataset.h"
#include "data/source.h"
#include "models/model.h"

#define DEFAULT_ROWS 5

/* ---- opening ---- */

struct place {
    const tp_recipe *recipe;
    char text[512];
};

static const char *where_key(void *state, const char *key)
{
    struct place *p = state;
    return tp_recipe_where(p->recipe, key, p->text, sizeof p->text);
}

/* What a data set must know of the model, from its shapes alone. */
static tp_status read_shape(tp_ctx *ctx, const char *path, int64_t *max_positions, int64_t *vocab_size)
{
    tp_ctx dry;
    tp_model *model = NULL;
    tp_model_options options = {.precision = TP_F32};
    tp_ctx_init(&dry);
    dry.log = ctx->log;
    tp_status status = tp_device_open(&dry, "dry", 1, &dry.device);
    if (status == TP_OK) status = tp_model_open(&dry, path, &options, &model);
    if (status == TP_OK) {
        *max_positions = model->config.max_positions;
        *vocab_size = model->config.vocab_size;
    } else {
        (void)tp_fail(ctx, status, "%s", dry.message);
    }
    tp_model_free(model);
    if (dry.device != NULL) tp_device_close(dry.device);
    return status;
}

static bool is_ready_tokens(const tp_dataset_config *block)
{
    return block->type == TP_DATASET_TOKENS || tp_ends_with(block->path, ".safetensors");
}

static tp_status open_data(tp_ctx *ctx, const tp_cli_recipe *r, tp_tokenizer **tokenizer, tp_dataset **data)
{
    const tp_config *c = &r->config;
    struct place place = {.recipe = r->recipe};
    tp_dataset_options options = {.config = &c->data,
                                  .micro_batch_size = c->train.micro_batch_size,
                                  .shows = true,
                                  .seed = (uint64_t)c->run.seed,
                                  .where = where_key,
                                  .where_state = &place};
    TP_TRY(read_shape(ctx, c->run.base_model, &options.max_positions, &options.vocab_size));
    if (!is_ready_tokens(&c->data.datasets.items[0]))
        TP_TRY(tp_tokenizer_for(ctx, c->run.tokenizer != NULL ? c->run.tokenizer : c->run.base_model, tokenizer));
    options.tokenizer = *tokenizer;
    options.micro_batch_size_given = tp_recipe_given(r->recipe, "micro_batch_size");
    options.max_length = options.max_positions < 2048 ? options.max_positions : 2048;
    if (c->data.max_seq_length != TP_UNSET) options.max_length = c->data.max_seq_length;
    if (options.max_length > options.max_positions)
        return tp_fail(ctx, TP_INVALID, "%s: max_seq_length: %lld is more than the model's %lld",
                       where_key(&place, "max_seq_length"), (long long)options.max_length, (long long)options.max_positions);
    return tp_dataset_open(ctx, &options, data);
}

/* ---- printing ---- */

/* What a token shows: its bytes of the text, less those an earlier token showed, or its name where it stands for none. */
static void show_token(tp_buf *out, const tp_preview *p, const tp_tokenizer *tokenizer, size_t i, size_t *shown)
{
    const tp_token *token = &p->tokens.items[i];
    size_t begin = token->begin > *shown ? token->begin : *shown;
    if (token->begin == token->end && tokenizer != NULL) {
        tp_span name = tp_tokenizer_token(tokenizer, token->id);
        tp_cli_show_text(out, name.data != NULL ? name.data : "", name.len);
    } else if (token->begin == token->end) {
        tp_buf_printf(out, "%d ", (int)token->id);
    }
    if (token->end <= begin) return;
    tp_cli_show_text(out, p->text.data + begin, token->end - begin);
    *shown = token->end;
}

static void write_text(const tp_preview *p, const tp_tokenizer *tokenizer, int64_t row, bool colour, tp_buf *out)
{
    const char *open = colour ? "\x1b[32m" : "[", *close = colour ? "\x1b[0m" : "]";
    size_t shown = 0, labels = 0;
    for (size_t i = 0; i < p->tokens.count; i++) labels += p->labels[i] >= 0;
    tp_buf_printf(out, "row %lld, ", (long long)row);
    tp_cli_show_text(out, p->file, strlen(p->file));
    if (p->line > 0) tp_buf_printf(out, ":%zu", p->line);
    tp_buf_printf(out, ": %zu tokens, %zu labels%s\n", p->tokens.count, labels, p->dropped ? " (dropped)" : "");
    for (size_t i = 0; i < p->tokens.count; i++) {
        bool learned = p->labels[i] >= 0;
        if (learned && (i == 0 || p->labels[i - 1] < 0)) tp_buf_text(out, open);
        show_token(out, p, tokenizer, i, &shown);
        if (learned && (i + 1 == p->tokens.count || p->labels[i + 1] < 0)) tp_buf_text(out, close);
    }
    tp_buf_text(out, "\n\n");
}

static void write_json(const tp_preview *p, int64_t row, tp_buf *out)
{
    tp_buf_printf(out, "{\"row\": %lld, \"text\": ", (long long)row);
    tp_json_write_string(out, tp_buf_cstr(&p->text), p->text.len);
    tp_buf_text(out, ", \"ids\": [");
    for (size_t i = 0; i < p->tokens.count; i++) tp_buf_printf(out, "%s%d", i > 0 ? ", " : "", (int)p->tokens.items[i].id);
    tp_buf_text(out, "], \"labels\": [");
    for (size_t i = 0; i < p->tokens.count; i++) tp_buf_printf(out, "%s%d", i > 0 ? ", " : "", (int)p->labels[i]);
    tp_buf_printf(out, "], \"file\": ");
    tp_json_write_string(out, p->file, strlen(p->file));
    tp_buf_printf(out, ", \"line\": %zu, \"dropped\": %s}\n", p->line, p->dropped ? "true" : "false");
}

static tp_status print_row(tp_ctx *ctx, const tp_args *args, const tp_dataset *data, const tp_tokenizer *tokenizer, int64_t row)
{
    tp_preview preview;
    tp_buf out;
    TP_TRY(tp_dataset_preview(ctx, data, row, &preview));
    tp_buf_init(&out, 0);
    if (tp_args_has(args, "json"))
        write_json(&preview, row, &out);
    else
        write_text(&preview, tokenizer, row, isatty(STDOUT_FILENO) == 1, &out);
    tp_status status = tp_buf_status(ctx, &out, "preview");
    if (status == TP_OK) status = tp_cli_print(ctx, out.data, out.len);
    tp_buf_free(&out);
    tp_preview_free(&preview);
    return status;
}

static tp_status print_rows(tp_ctx *ctx, const tp_args *args, const tp_dataset *data, const tp_tokenizer *tokenizer,
                            int64_t rows)
{
    for (int64_t i = 0; i < rows; i++) {
        tp_status status = print_row(ctx, args, data, tokenizer, i);
        if (status == TP_INVALID && i > 0) { /* behind the last row */
            tp_ctx_clear(ctx);
            return TP_OK;
        }
        if (status != TP_OK) return status;
    }
    return TP_OK;
}

static tp_status run(tp_ctx *ctx, const tp_args *args)
{
    static const char *const optional[] = {"output_dir", NULL};
    tp_cli_recipe recipe;
    tp_tokenizer *tokenizer = NULL;
    tp_dataset *data = NULL;
    int64_t rows = DEFAULT_ROWS;
    TP_TRY(tp_args_i64(ctx, args, "rows", 1, INT64_MAX, &rows));
    TP_TRY(tp_cli_recipe_open(ctx, args, optional, false, false, &recipe));
    tp_status status = open_data(ctx, &recipe, &tokenizer, &data);
    if (status == TP_OK) status = print_rows(ctx, args, data, tokenizer, rows);
    tp_dataset_close(data);
    tp_tokenizer_free(tokenizer);
    tp_cli_recipe_close(&recipe);
    return status;
}

static const tp_flag flags[] = {{"rows", "N", false, false, "so many rows (default 5)"}, TP_FLAG_JSON, TP_FLAG_END};

const tp_command tp_command_preview = {"preview",
                                       "RECIPE [key=value ...] [--rows N] [--json]",
                                       "rows as training sees them, what is learned in colour (or in brackets)",
                                       flags,
                                       1,
                                       1000,
                                       run};
