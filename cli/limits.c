/* The limits, from the constants that the readers obey. */
#include "cli/limits.h"

#include "adapters/config.h"
#include "base/file.h"
#include "base/gguf.h"
#include "base/json.h"
#include "base/safetensors.h"
#include "cli/command.h"
#include "data/rows.h"
#include "data/template.h"
#include "data/template_parser.h"
#include "data/tokenizer.h"
#include "data/unpack.h"
#include "data/vocabulary.h"
#include "models/config.h"
#include "recipes/recipe.h"
#include "recipes/yaml.h"
#include "trainers/checkpoint.h"

static const struct {
    const char *name;
    uint64_t value;
} limits[] = {
    {"recipe_bytes", TP_YAML_BYTES},
    {"recipe_depth", TP_YAML_DEPTH},
    {"recipe_nodes", TP_YAML_NODES},
    {"recipe_include_depth", TP_RECIPE_INCLUDE_DEPTH},
    {"recipe_files", TP_RECIPE_FILES},
    {"recipe_problems", TP_PROBLEMS_MAX},
    {"adapter_rank", TP_LIMIT_RANK},
    {"adapter_patterns", TP_LIMIT_PATTERNS},
    {"adapter_config_bytes", TP_ADAPTER_CONFIG_BYTES},
    {"adapter_list_entries", TP_ADAPTER_LIST_MAX},
    {"checkpoint_state_bytes", TP_STATE_BYTES},
    {"manifest_bytes", TP_MANIFEST_BYTES},
    {"json_depth", TP_JSON_DEPTH},
    {"config_bytes", TP_CONFIG_BYTES},
    {"safetensors_header_bytes", TP_SAFETENSORS_HEADER_MAX},
    {"safetensors_name_bytes", TP_SAFETENSORS_NAME_MAX},
    {"safetensors_rank", TP_MAX_RANK},
    {"gguf_string_bytes", TP_GGUF_STRING_MAX},
    {"gguf_head_bytes", TP_GGUF_HEAD_MAX},
    {"gguf_name_bytes", TP_GGUF_NAME_MAX},
    {"gguf_values", TP_GGUF_MAX_VALUES},
    {"gguf_tensors", TP_GGUF_MAX_TENSORS},
    {"gguf_rank", TP_GGUF_RANK_MAX},
    {"gguf_alignment_min", TP_GGUF_ALIGN_MIN},
    {"gguf_alignment_max", TP_GGUF_ALIGN_MAX},
    {"layers", TP_LIMIT_LAYERS},
    {"width", TP_LIMIT_WIDTH},
    {"heads", TP_LIMIT_HEADS},
    {"positions", TP_LIMIT_POSITIONS},
    {"vocabulary", TP_VOCABULARY_MAX},
    {"tokenizer_json_bytes", TP_TOKENIZER_JSON_BYTES},
    {"tokenizer_config_bytes", TP_TOKENIZER_CONFIG_BYTES},
    {"added_token_bytes", TP_ADDED_TOKEN_MAX},
    {"jsonl_row_bytes", TP_ROW_MAX_BYTES},
    {"jsonl_row_values", TP_ROW_MAX_VALUES},
    {"csv_columns", TP_CSV_MAX_COLUMNS},
    {"gzip_ratio", TP_UNPACK_RATIO},
    {"template_bytes", TP_J_MAX_SOURCE},
    {"template_statement_depth", TP_J_MAX_STATEMENTS},
    {"template_parenthesis_depth", TP_J_MAX_PARENS},
    {"template_keywords", TP_J_MAX_KEYWORDS},
    {"template_expression_height", TP_J_MAX_HEIGHT},
    {"template_steps", TP_TEMPLATE_STEPS},
    {"template_output_bytes", TP_TEMPLATE_OUTPUT},
    {"template_memory_bytes", TP_TEMPLATE_MEMORY},
};

void tp_cli_write_limits(tp_buf *out)
{
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++)
        tp_buf_printf(out, "%s\"%s\": %llu", i > 0 ? ", " : "{", limits[i].name, (unsigned long long)limits[i].value);
    tp_buf_char(out, '}');
}

tp_status tp_cli_print_limits(tp_ctx *ctx)
{
    tp_buf text;
    tp_buf_init(&text, 0);
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++)
        tp_buf_printf(&text, "%s %llu\n", limits[i].name, (unsigned long long)limits[i].value);
    tp_status status = tp_buf_status(ctx, &text, "limits");
    if (status == TP_OK) status = tp_cli_print(ctx, text.data, text.len);
    tp_buf_free(&text);
    return status;
}
