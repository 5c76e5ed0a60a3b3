/* Datasets, and how rows become tokens and labels. */
#include <stdio.h>

#include "base/file.h"
#include "recipes/keys.h"

#define AT(member)   offsetof(tp_config, data.member)
#define IN(member)   offsetof(tp_dataset_config, member)
#define COUNT(array) (sizeof(array) / sizeof *(array))

static const char *const type_words[] = {"auto", "completion", "instruction", "chat", "preference",
                                         "kto",  "classify",   "tokens",      NULL};
static const char *const template_words[] = {"tokenizer_default", "chatml", "alpaca", "none", NULL};
static const char *const turn_words[] = {"all", "last", NULL};
static const char *const excess_words[] = {"drop", "truncate", "split", "raise", NULL};
static const char *const bad_row_words[] = {"error", "skip", NULL};

static bool learns_text(const void *config)
{
    int objective = ((const tp_config *)config)->run.objective;
    return objective == TP_OBJECTIVE_SFT || objective == TP_OBJECTIVE_DISTILL;
}
static const tp_when text = {"objective sft or distill", "objective", learns_text};

static const tp_field dataset_fields[] = {
    {.key = "path",
     .type = TP_FIELD_INPUT,
     .offset = IN(path),
     .required = true,
     .help =
         "`.jsonl`, `.csv`, these packed as `.gz`, `.txt`, `.safetensors`, or a folder with `<split>.jsonl` or `<split>.csv`"},
    {.key = "split", .type = TP_FIELD_STRING, .offset = IN(split), .otherwise = "train", .help = "the file of a folder"},
    {.key = "type",
     .type = TP_FIELD_ENUM,
     .offset = IN(type),
     .otherwise = "auto",
     .words = type_words,
     .help = "what a row holds; auto: by the first row, with which all must agree"},
    {.key = "columns",
     .type = TP_FIELD_STRING_MAP,
     .offset = IN(columns),
     .otherwise = "{}",
     .help = "renames columns, `{ours: theirs}`"},
    {.key = "system", .type = TP_FIELD_STRING, .offset = IN(system), .help = "system message of rows without one"},
    {.key = "weight",
     .type = TP_FIELD_FLOAT,
     .offset = IN(weight),
     .otherwise = "1",
     .range = TP_ABOVE(0),
     .help = "how often rows are drawn, against the other datasets"},
    {.key = "limit",
     .type = TP_FIELD_INT,
     .offset = IN(limit),
     .range = TP_FROM(1),
     .default_note = "all",
     .help = "takes the first rows"},
};

static const tp_section dataset_section = {
    .title = "Dataset",
    .fields = dataset_fields,
    .n_fields = COUNT(dataset_fields),
    .item_bytes = sizeof(tp_dataset_config),
};

static const tp_field fields[] = {
    {.key = "datasets",
     .type = TP_FIELD_BLOCKS,
     .offset = AT(datasets),
     .block = &dataset_section,
     .required = true,
     .help = "what to learn from"},
    {.key = "test_datasets",
     .type = TP_FIELD_BLOCKS,
     .offset = AT(test_datasets),
     .block = &dataset_section,
     .otherwise = "[]",
     .help = "held-out data"},
    {.key = "val_set_size",
     .type = TP_FIELD_SHARE,
     .offset = AT(val_set_size),
     .otherwise = "0",
     .range = TP_RANGE(0, 0.5),
     .help = "rows of `datasets` to hold out, chosen by their hash",
     .aliases = (const tp_alias[]){{.name = "val_size"}, {0}}},
    {.key = "chat_template",
     .type = TP_FIELD_INPUT,
     .offset = AT(chat_template),
     .otherwise = "tokenizer_default",
     .words = template_words,
     .help = "the model's own, a built-in one, or a file",
     .aliases = (const tp_alias[]){{.name = "template"}, {0}}},
    {.key = "max_seq_length",
     .type = TP_FIELD_INT,
     .offset = AT(max_seq_length),
     .range = TP_FROM(8),
     .default_note = "2048, or the model's if less",
     .help = "tokens per row, at most what the model takes",
     .aliases =
         (const tp_alias[]){
             {.name = "sequence_len"}, {.name = "cutoff_len"}, {.name = "max_length"}, {.name = "max_seq_len"}, {0}}},
    {.key = "packing",
     .type = TP_FIELD_BOOL,
     .offset = AT(packing),
     .otherwise = "false",
     .help = "fill rows to the length, attention kept apart",
     .aliases = (const tp_alias[]){{.name = "sample_packing"}, {.name = "neat_packing"}, {0}}},
    {.key = "train_on_inputs",
     .type = TP_FIELD_BOOL,
     .offset = AT(train_on_inputs),
     .otherwise = "false",
     .when = &text,
     .help = "loss on prompts too",
     .aliases = (const tp_alias[]){{.name = "train_on_prompt"},
                                   {.name = "train_on_input"},
                                   {.name = "mask_prompt", .from = "!"},
                                   {.name = "completion_only_loss", .from = "!"},
                                   {.name = "assistant_only_loss", .from = "!"},
                                   {0}}},
    {.key = "train_on_turns",
     .type = TP_FIELD_ENUM,
     .offset = AT(train_on_turns),
     .otherwise = "all",
     .words = turn_words,
     .when = &text,
     .help = "turns with loss",
     .aliases = (const tp_alias[]){{.name = "mask_history", .from = "true", .to = "last"},
                                   {.name = "mask_history", .from = "false", .to = "all"},
                                   {0}}},
    {.key = "excess_length_strategy",
     .type = TP_FIELD_ENUM,
     .offset = AT(excess_length),
     .otherwise = "drop",
     .words = excess_words,
     .help = "rows that are too long; `split` for plain text"},
    {.key = "max_dropped",
     .type = TP_FIELD_FLOAT,
     .offset = AT(max_dropped),
     .otherwise = "0.05",
     .range = TP_RANGE(0, 1),
     .help = "part of the rows that may be dropped"},
    {.key = "on_bad_row",
     .type = TP_FIELD_ENUM,
     .offset = AT(on_bad_row),
     .otherwise = "error",
     .words = bad_row_words,
     .help = "malformed rows"},
    {.key = "shuffle", .type = TP_FIELD_BOOL, .offset = AT(shuffle), .otherwise = "true", .help = "by a keyed permutation"},
    {.key = "group_by_length",
     .type = TP_FIELD_BOOL,
     .offset = AT(group_by_length),
     .otherwise = "false",
     .help = "rows of similar length together"},
    {.key = "cache_dir",
     .type = TP_FIELD_OUTPUT,
     .offset = AT(cache_dir),
     .help = "folder that keeps tokens for later runs; what is in it may be removed at any time",
     .aliases = (const tp_alias[]){{.name = "dataset_prepared_path"}, {0}}},
    {.key = "neftune_noise_alpha",
     .type = TP_FIELD_FLOAT,
     .offset = AT(neftune_noise_alpha),
     .otherwise = "0",
     .range = TP_FROM(0),
     .help = "noise on the embeddings while training"},
    {.key = "label_smoothing",
     .type = TP_FIELD_FLOAT,
     .offset = AT(label_smoothing),
     .otherwise = "0",
     .range = TP_FROM_BELOW(0, 1),
     .help = "probability given to the other tokens"},
};

/* True if an objective can learn from rows of this type. */
static bool fits(int objective, int type)
{
    switch (type) {
    case TP_DATASET_AUTO: return true;
    case TP_DATASET_PREFERENCE: return objective == TP_OBJECTIVE_DPO || objective == TP_OBJECTIVE_ORPO;
    case TP_DATASET_KTO: return objective == TP_OBJECTIVE_KTO;
    case TP_DATASET_CLASSIFY: return objective == TP_OBJECTIVE_CLASSIFY;
    default: return objective == TP_OBJECTIVE_SFT || objective == TP_OBJECTIVE_DISTILL;
    }
}

static tp_status check_list(tp_check *chk, const tp_config *c, const char *name, const tp_datasets *list)
{
    char key[64];
    for (size_t i = 0; i < list->n; i++) {
        if (fits(c->run.objective, list->items[i].type)) continue;
        snprintf(key, sizeof key, "%s.%zu.type", name, i);
        TP_TRY(tp_check_problem(chk, key, "objective %s cannot learn from rows of type %s",
                                tp_config_word("objective", c->run.objective), type_words[list->items[i].type]));
    }
    return TP_OK;
}

static tp_status check(tp_check *chk, const void *config)
{
    const tp_config *c = config;
    TP_TRY(check_list(chk, c, "datasets", &c->data.datasets));
    return check_list(chk, c, "test_datasets", &c->data.test_datasets);
}

static tp_status check_splits(tp_ctx *ctx, const tp_recipe *recipe, const char *name, const tp_datasets *list,
                              tp_problems *problems)
{
    char key[64], place[512];
    for (size_t i = 0; i < list->n; i++) {
        snprintf(key, sizeof key, "%s.%zu.split", name, i);
        bool is_default = strcmp(list->items[i].split, "train") == 0; /* as in the recipe that a run leaves */
        if (!tp_recipe_given(recipe, key) || is_default || tp_path_is_folder(list->items[i].path)) continue;
        TP_TRY(tp_problems_add(ctx, problems, TP_INVALID, "%s: %s: without effect, %s is a file and not a folder of splits",
                               tp_recipe_where(recipe, key, place, sizeof place), key, list->items[i].path));
    }
    return TP_OK;
}

tp_status tp_config_check_splits(tp_ctx *ctx, const tp_recipe *recipe, const tp_config *config, tp_problems *problems)
{
    TP_TRY(check_splits(ctx, recipe, "datasets", &config->data.datasets, problems));
    TP_TRY(check_splits(ctx, recipe, "test_datasets", &config->data.test_datasets, problems));
    return tp_problems_status(ctx, problems);
}

const tp_section tp_data_section = {
    .title = "Data",
    .fields = fields,
    .n_fields = COUNT(fields),
    .check = check,
};
