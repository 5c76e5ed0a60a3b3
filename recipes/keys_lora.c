/* LoRA and what is built on it. */
#include "recipes/keys.h"

#define AT(member)   offsetof(tp_config, lora.member)
#define COUNT(array) (sizeof(array) / sizeof *(array))

static const char *const target_words[] = {"all-linear", "default", NULL};
static const char *const init_words[] = {"true", "gaussian", "pissa", "olora", "loftq", "eva", NULL};
static const char *const bias_words[] = {"none", "all", "lora_only", NULL};

static bool is_lora(const void *config)
{
    return tp_config_has_adapter(config, TP_ADAPTER_LORA) || tp_config_has_adapter(config, TP_ADAPTER_QLORA) ||
           tp_config_has_adapter(config, TP_ADAPTER_DORA);
}
static bool is_lora_or_full(const void *config)
{
    return is_lora(config) || tp_config_has_adapter(config, TP_ADAPTER_FULL);
}
static bool is_lora_or_ia3(const void *config)
{
    return is_lora(config) || tp_config_has_adapter(config, TP_ADAPTER_IA3);
}

static const tp_when lora = {"adapter lora, qlora or dora", "adapter", is_lora};
static const tp_when lora_or_full = {"adapter lora, qlora, dora or full", "adapter", is_lora_or_full};
static const tp_when lora_or_ia3 = {"adapter lora, qlora, dora or ia3", "adapter", is_lora_or_ia3};

static const tp_field fields[] = {
    {.key = "lora_r",
     .type = TP_FIELD_INT,
     .offset = AT(rank),
     .otherwise = "16",
     .range = TP_RANGE(1, TP_LIMIT_RANK),
     .when = &lora,
     .help = "rank",
     .aliases = (const tp_alias[]){{.name = "r"}, {.name = "lora_rank"}, {0}}},
    {.key = "lora_alpha",
     .type = TP_FIELD_FLOAT,
     .offset = AT(alpha),
     .range = TP_ABOVE(0),
     .default_note = "2 × `lora_r`",
     .when = &lora,
     .help = "scaling = alpha / r"},
    {.key = "lora_dropout",
     .type = TP_FIELD_FLOAT,
     .offset = AT(dropout),
     .otherwise = "0",
     .range = TP_FROM_BELOW(0, 1),
     .when = &lora,
     .help = "on the LoRA input"},
    {.key = "lora_target_modules",
     .type = TP_FIELD_PATTERNS,
     .offset = AT(target_modules),
     .otherwise = "all-linear",
     .words = target_words,
     .when = &lora_or_full,
     .help = "dotted suffixes, or a string as regular expression for whole paths; `default`: the family's",
     .aliases = (const tp_alias[]){{.name = "lora_target", .from = "all", .to = "all-linear", .open = true},
                                   {.name = "target_modules"},
                                   {.name = "lora_target_linear", .from = "true", .to = "all-linear"},
                                   {0}}},
    {.key = "lora_exclude_modules",
     .type = TP_FIELD_PATTERNS,
     .offset = AT(exclude_modules),
     .otherwise = "[]",
     .when = &lora_or_full,
     .help = "modules to leave out of the targets",
     .aliases = (const tp_alias[]){{.name = "exclude_modules"}, {0}}},
    {.key = "layers_to_transform",
     .type = TP_FIELD_LAYERS,
     .offset = AT(layers),
     .default_note = "all",
     .when = &lora_or_full,
     .help = "layers whose modules are targets",
     .aliases = (const tp_alias[]){{.name = "peft_layers_to_transform"}, {0}}},
    {.key = "rank_pattern",
     .type = TP_FIELD_COUNT_MAP,
     .offset = AT(rank_pattern),
     .otherwise = "{}",
     .range = TP_RANGE(1, TP_LIMIT_RANK),
     .when = &lora,
     .help = "rank by module; every pattern must match"},
    {.key = "alpha_pattern",
     .type = TP_FIELD_NUMBER_MAP,
     .offset = AT(alpha_pattern),
     .otherwise = "{}",
     .range = TP_ABOVE(0),
     .when = &lora,
     .help = "alpha by module; every pattern must match"},
    {.key = "use_dora",
     .type = TP_FIELD_BOOL,
     .offset = AT(use_dora),
     .otherwise = "false",
     .when = &lora,
     .help = "learn magnitude and direction apart",
     .aliases = (const tp_alias[]){{.name = "peft_use_dora"}, {0}}},
    {.key = "use_rslora",
     .type = TP_FIELD_BOOL,
     .offset = AT(use_rslora),
     .otherwise = "false",
     .when = &lora,
     .help = "scaling = alpha / √r",
     .aliases = (const tp_alias[]){{.name = "peft_use_rslora"}, {0}}},
    {.key = "loraplus_lr_ratio",
     .type = TP_FIELD_FLOAT,
     .offset = AT(lr_ratio),
     .otherwise = "1",
     .range = TP_RANGE(1, 64),
     .when = &lora,
     .help = "learning rate of B ÷ that of A"},
    {.key = "init_lora_weights",
     .type = TP_FIELD_ENUM,
     .offset = AT(init),
     .otherwise = "true",
     .words = init_words,
     .when = &lora,
     .help = "how A and B start; saved as plain LoRA",
     .aliases = (const tp_alias[]){{.name = "peft_init_lora_weights"}, {0}}},
    {.key = "bias",
     .type = TP_FIELD_ENUM,
     .offset = AT(bias),
     .otherwise = "none",
     .words = bias_words,
     .when = &lora,
     .help = "biases of the base to train"},
    {.key = "lora_bias",
     .type = TP_FIELD_BOOL,
     .offset = AT(lora_bias),
     .otherwise = "false",
     .when = &lora,
     .help = "a bias on B"},
    {.key = "modules_to_save",
     .type = TP_FIELD_STRINGS,
     .offset = AT(modules_to_save),
     .otherwise = "[]",
     .when = &lora_or_ia3,
     .help = "modules trained as full copies",
     .aliases = (const tp_alias[]){{.name = "lora_modules_to_save"}, {.name = "additional_target"}, {0}}},
    {.key = "trainable_token_indices",
     .type = TP_FIELD_TOKENS,
     .offset = AT(trainable_tokens),
     .otherwise = "[]",
     .range = TP_RANGE(0, 4194303),
     .when = &lora,
     .help = "trained rows of the embedding"},
};

static void settle(const tp_recipe *recipe, void *config)
{
    tp_config *c = config;
    if (!(c->lora.alpha > 0)) c->lora.alpha = 2 * (double)c->lora.rank;
    if (tp_config_has_adapter(c, TP_ADAPTER_DORA) && !tp_recipe_given(recipe, "use_dora")) c->lora.use_dora = true;
}

static tp_status check(tp_check *chk, const void *config)
{
    const tp_config *c = config;
    if (c->lora.layers.n > 0 && c->lora.target_modules.kind == TP_PATTERNS_REGEX)
        TP_TRY(tp_check_problem(chk, "layers_to_transform",
                                "without effect, since lora_target_modules is a regular expression for whole paths: name the "
                                "layers there"));
    if (tp_config_has_adapter(c, TP_ADAPTER_DORA) && !c->lora.use_dora)
        return tp_check_problem(chk, "use_dora", "false contradicts adapter dora");
    return TP_OK;
}

const tp_section tp_lora_section = {
    .title = "LoRA",
    .fields = fields,
    .n_fields = COUNT(fields),
    .settle = settle,
    .check = check,
};
