/* IA3, and the methods that put virtual tokens in front of the text. */
#include <string.h>

#include "recipes/keys.h"

#define AT(member)   offsetof(tp_config, virtual_tokens.member)
#define COUNT(array) (sizeof(array) / sizeof *(array))

static const char *const init_words[] = {"random", "text", "sample_vocab", NULL};
static const char *const encoder_words[] = {"MLP", "LSTM", NULL};
static const char *const position_words[] = {"front", "marker", NULL};

static bool is_ia3(const void *c)
{
    return tp_config_has_adapter(c, TP_ADAPTER_IA3);
}
static bool is_prompt(const void *c)
{
    return tp_config_has_adapter(c, TP_ADAPTER_PROMPT);
}
static bool is_prefix(const void *c)
{
    return tp_config_has_adapter(c, TP_ADAPTER_PREFIX);
}
static bool is_p_tuning(const void *c)
{
    return tp_config_has_adapter(c, TP_ADAPTER_P_TUNING);
}
static bool has_encoder(const void *c)
{
    return is_p_tuning(c) || is_prefix(c);
}
static bool has_embeddings(const void *c)
{
    return is_prompt(c) || is_p_tuning(c);
}
static bool is_virtual(const void *c)
{
    return has_embeddings(c) || is_prefix(c);
}

static const tp_when ia3 = {"adapter ia3", "adapter", is_ia3};
static const tp_when prompt = {"adapter prompt", "adapter", is_prompt};
static const tp_when prefix = {"adapter prefix", "adapter", is_prefix};
static const tp_when p_tuning = {"adapter p_tuning", "adapter", is_p_tuning};
static const tp_when encoder = {"adapter p_tuning or prefix", "adapter", has_encoder};
static const tp_when embeddings = {"adapter prompt or p_tuning", "adapter", has_embeddings};
static const tp_when virtual_tokens = {"adapter prompt, prefix or p_tuning", "adapter", is_virtual};

static const tp_field fields[] = {
    {.key = "ia3_target_modules",
     .type = TP_FIELD_PATTERNS,
     .offset = AT(ia3_target_modules),
     .default_note = "the family's",
     .when = &ia3,
     .help = "modules that get a scaling vector",
     .aliases = (const tp_alias[]){{.name = "target_modules"}, {0}}},
    {.key = "ia3_feedforward_modules",
     .type = TP_FIELD_PATTERNS,
     .offset = AT(ia3_feedforward_modules),
     .default_note = "the family's",
     .when = &ia3,
     .help = "those of the targets whose input is scaled, not the output",
     .aliases = (const tp_alias[]){{.name = "feedforward_modules"}, {0}}},
    {.key = "num_virtual_tokens",
     .type = TP_FIELD_INT,
     .offset = AT(n_tokens),
     .otherwise = "20",
     .range = TP_RANGE(1, TP_LIMIT_VIRTUAL_TOKENS),
     .when = &virtual_tokens,
     .help = "trained tokens or key-value pairs"},
    {.key = "prompt_tuning_init",
     .type = TP_FIELD_ENUM,
     .offset = AT(prompt_init),
     .otherwise = "random",
     .words = init_words,
     .when = &prompt,
     .help = "where the vectors start"},
    {.key = "prompt_tuning_init_text",
     .type = TP_FIELD_STRING,
     .offset = AT(prompt_init_text),
     .when = &prompt,
     .help = "the text of `prompt_tuning_init: text`"},
    {.key = "prefix_projection",
     .type = TP_FIELD_BOOL,
     .offset = AT(prefix_projection),
     .otherwise = "false",
     .when = &prefix,
     .help = "a tanh bottleneck while training"},
    {.key = "encoder_reparameterization_type",
     .type = TP_FIELD_ENUM,
     .offset = AT(encoder_type),
     .otherwise = "MLP",
     .words = encoder_words,
     .when = &p_tuning,
     .help = "the network that makes the tokens while training"},
    {.key = "encoder_hidden_size",
     .type = TP_FIELD_INT,
     .offset = AT(encoder_hidden),
     .default_note = "the model's hidden size",
     .range = TP_RANGE(1, 1048576),
     .when = &encoder,
     .help = "its width"},
    {.key = "encoder_num_layers",
     .type = TP_FIELD_INT,
     .offset = AT(encoder_layers),
     .otherwise = "2",
     .range = TP_RANGE(1, 8),
     .when = &p_tuning,
     .help = "its depth, for LSTM"},
    {.key = "encoder_dropout",
     .type = TP_FIELD_FLOAT,
     .offset = AT(encoder_dropout),
     .otherwise = "0",
     .range = TP_FROM_BELOW(0, 1),
     .when = &p_tuning,
     .help = "between its layers, for LSTM"},
    {.key = "virtual_token_position",
     .type = TP_FIELD_ENUM,
     .offset = AT(position),
     .otherwise = "front",
     .words = position_words,
     .when = &embeddings,
     .help = "in front, or at each `<|v|>` of the text, shared evenly"},
};

static bool holds(const tp_strings *list, const char *name)
{
    for (size_t i = 0; i < list->n; i++)
        if (strcmp(list->items[i], name) == 0) return true;
    return false;
}

static tp_status check(tp_check *chk, const void *config)
{
    const tp_virtual_config *v = &((const tp_config *)config)->virtual_tokens;
    const tp_patterns *targets = &v->ia3_target_modules, *inner = &v->ia3_feedforward_modules;
    bool by_text = v->prompt_init == TP_PROMPT_INIT_TEXT;
    if (is_prompt(config) && by_text && v->prompt_init_text == NULL)
        TP_TRY(tp_check_problem(chk, "prompt_tuning_init", "text needs prompt_tuning_init_text"));
    if (is_prompt(config) && !by_text && v->prompt_init_text != NULL)
        TP_TRY(tp_check_problem(chk, "prompt_tuning_init_text", "has no effect without prompt_tuning_init: text"));
    if (targets->kind != TP_PATTERNS_LIST || inner->kind != TP_PATTERNS_LIST) return TP_OK;
    for (size_t i = 0; i < inner->list.n; i++)
        if (!holds(&targets->list, inner->list.items[i]))
            TP_TRY(tp_check_problem(chk, "ia3_feedforward_modules", "%.80s is not among ia3_target_modules",
                                    inner->list.items[i]));
    return TP_OK;
}

const tp_section tp_virtual_section = {
    .title = "IA3 and virtual tokens",
    .fields = fields,
    .n_fields = COUNT(fields),
    .check = check,
};
