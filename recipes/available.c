/* What recipes may say but this version cannot do.
 *
 * Validation knows every key and value; this table names those whose feature is not built. A feature that
 * gets built deletes its line here and is done. */
#include <stdio.h>
#include <string.h>

#include "recipes/keys.h"
#include "recipes/parts.h"

/* A word that a key may not have; without a word, the key may not differ from its default; a block's name
 * stands for the whole block. */
static const struct missing {
    const char *key, *word;
} missing[] = {
    {"adapter", "qlora"},
    {"adapter", "dora"},
    {"adapter", "ia3"},
    {"adapter", "prompt"},
    {"adapter", "prefix"},
    {"adapter", "p_tuning"},
    {"adapter", "full"},
    {"objective", "dpo"},
    {"objective", "orpo"},
    {"objective", "kto"},
    {"objective", "distill"},
    {"objective", "classify"},
    {"devices", NULL},
    {"zero_stage", NULL},
    {"tensor_parallel_size", NULL},
    {"context_parallel_size", NULL},
    {"use_dora", NULL},
    {"loraplus_lr_ratio", NULL},
    {"init_lora_weights", "pissa"},
    {"init_lora_weights", "olora"},
    {"init_lora_weights", "loftq"},
    {"init_lora_weights", "eva"},
    {"bias", "all"},
    {"bias", "lora_only"},
    {"lora_bias", NULL},
    {"modules_to_save", NULL},
    {"trainable_token_indices", NULL},
    {"load_in_4bit", NULL},
    {"load_in_8bit", NULL},
    {"quant", NULL},
    {"datasets[].type", "preference"},
    {"datasets[].type", "kto"},
    {"datasets[].type", "classify"},
    {"test_datasets[].type", "preference"},
    {"test_datasets[].type", "kto"},
    {"test_datasets[].type", "classify"},
    {"neftune_noise_alpha", NULL},
    {"label_smoothing", NULL},
    {"optimizer", "adamw_8bit"},
    {"optimizer", "paged_adamw_32bit"},
    {"optimizer", "paged_adamw_8bit"},
    {"optimizer", "lion"},
    {"optimizer", "lion_8bit"},
    {"optimizer", "paged_lion_32bit"},
    {"optimizer", "paged_lion_8bit"},
    {"optimizer", "adafactor"},
    {"report_to", "tensorboard"},
    {"merge", NULL},
    {"serve", NULL},
};
#define N_MISSING (sizeof missing / sizeof *missing)

static bool is_missing(const char *key, const char *word)
{
    for (size_t i = 0; i < N_MISSING; i++)
        if (missing[i].word != NULL && strcmp(missing[i].key, key) == 0 && strcmp(missing[i].word, word) == 0) return true;
    return false;
}

/* ---- is it wanted? ---- */

static bool has_word(const tp_field *field, const void *at, const char *word)
{
    if (field->type == TP_FIELD_ENUM) return strcmp(field->words[*(const int *)at], word) == 0;
    const tp_ints *list = at; /* TP_FIELD_ENUMS */
    for (size_t i = 0; i < list->n; i++)
        if (strcmp(field->words[list->items[i]], word) == 0) return true;
    return false;
}

/* The blocks of "datasets[].type": true and their number in *index if one of them has the word. */
static bool block_has_word(const char *key, const tp_config *config, const char *word, size_t *index)
{
    char list_key[64];
    snprintf(list_key, sizeof list_key, "%.*s", (int)strcspn(key, "["), key);
    const tp_field *list = tp_schema_field(&tp_recipe_schema, list_key), *field = tp_schema_field(&tp_recipe_schema, key);
    tp_blocks blocks;
    memcpy(&blocks, tp_field_in(list, config), sizeof blocks);
    for (*index = 0; *index < blocks.n; ++*index) {
        const char *item = (const char *)blocks.items + *index * list->block->item_bytes;
        if (has_word(field, tp_field_in(field, item), word)) return true;
    }
    return false;
}

/* True if the recipe wants what row names; *key is then how a message calls it. */
static bool is_wanted(const struct missing *row, const tp_recipe *recipe, const tp_config *config, const tp_config *defaults,
                      char key[80])
{
    size_t index = 0;
    const tp_field *field = tp_schema_field(&tp_recipe_schema, row->key);
    const char *items = strstr(row->key, "[].");
    snprintf(key, 80, "%s", row->key);
    if (field == NULL) return tp_recipe_given(recipe, row->key);
    if (items != NULL) {
        if (!block_has_word(row->key, config, row->word, &index)) return false;
        snprintf(key, 80, "%.*s.%zu.%s", (int)(items - row->key), row->key, index, items + 3);
        return true;
    }
    const void *at = tp_field_in(field, config);
    if (row->word != NULL) return has_word(field, at, row->word);
    /* What another key implies (use_dora by adapter dora) is refused by that key. */
    return tp_recipe_given(recipe, row->key) && !tp_value_same(field, at, tp_field_in(field, defaults));
}

/* ---- saying so ---- */

/* "; available: lora, none", in out. */
static const char *list_available(const struct missing *row, char *out, size_t size)
{
    const tp_field *field = tp_schema_field(&tp_recipe_schema, row->key);
    size_t n = 0;
    out[0] = '\0';
    if (row->word == NULL) return out;
    for (size_t i = 0; field->words[i] != NULL && n < size; i++) {
        if (is_missing(row->key, field->words[i])) continue;
        int wrote = snprintf(out + n, size - n, "%s%s", n > 0 ? ", " : "; available: ", field->words[i]);
        n += wrote > 0 ? (size_t)wrote : 0;
    }
    return out;
}

static tp_status refuse(tp_ctx *ctx, const tp_recipe *recipe, const struct missing *row, const char *key, tp_problems *problems)
{
    char place[512], available[200];
    tp_recipe_where(recipe, key, place, sizeof place);
    return tp_problems_add(ctx, problems, TP_UNSUPPORTED, "%s: %s%s%s is not available in this version%s", place, key,
                           row->word != NULL ? ": " : "", row->word != NULL ? row->word : "",
                           list_available(row, available, sizeof available));
}

static tp_status set_defaults(tp_ctx *ctx, tp_recipe *scratch, tp_problems *problems, tp_config *defaults)
{
    tp_reading r = {.ctx = ctx, .recipe = scratch, .problems = problems};
    memset(defaults, 0, sizeof *defaults);
    for (size_t s = 0; s < tp_recipe_schema.n_sections; s++)
        for (size_t f = 0; f < tp_recipe_schema.sections[s]->n_fields; f++) {
            const tp_field *field = &tp_recipe_schema.sections[s]->fields[f];
            TP_TRY(tp_value_default(&r, field, tp_field_at(field, defaults)));
        }
    return TP_OK;
}

static tp_status refuse_all(tp_ctx *ctx, const tp_recipe *recipe, const tp_config *config, const tp_config *defaults,
                            tp_problems *problems)
{
    char key[80];
    for (size_t i = 0; i < N_MISSING; i++)
        if (is_wanted(&missing[i], recipe, config, defaults, key)) TP_TRY(refuse(ctx, recipe, &missing[i], key, problems));
    return tp_problems_status(ctx, problems);
}

tp_status tp_config_available(tp_ctx *ctx, const tp_recipe *recipe, const tp_config *config, tp_problems *problems)
{
    tp_recipe scratch = {.name = "defaults", .schema = &tp_recipe_schema};
    tp_config defaults;
    tp_yaml_tree_init(&scratch.tree);
    tp_status st = set_defaults(ctx, &scratch, problems, &defaults);
    if (st == TP_OK) st = refuse_all(ctx, recipe, config, &defaults, problems);
    tp_yaml_tree_free(&scratch.tree);
    return st;
}
