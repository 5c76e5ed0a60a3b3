/* The sections in the order of the reference, and the names that no tool should have given. */
#include "recipes/keys.h"

static const tp_section *const sections[] = {
    &tp_run_section,  &tp_lora_section,      &tp_virtual_section, &tp_quant_section,
    &tp_data_section, &tp_objective_section, &tp_train_section,   &tp_output_section,
};

static const tp_refused_key refused[] = {
    {"batch_size", "rows per pass or per step; write micro_batch_size and gradient_accumulation_steps"},
    {"alpha", "of LoRA or of distillation; write lora_alpha or kd_alpha"},
    {"rank", "of the adapter or of the process; write lora_r"},
    {"scale", "alpha or alpha / r; write lora_alpha"},
    {"temperature", "of sampling or of distillation; write kd_temperature"},
    {NULL, NULL},
};

const tp_schema tp_recipe_schema = {
    .sections = sections,
    .n_sections = sizeof sections / sizeof *sections,
    .config_bytes = sizeof(tp_config),
    .refused = refused,
};

bool tp_config_has_adapter(const tp_config *config, tp_adapter_kind kind)
{
    for (size_t i = 0; i < config->run.adapters.n; i++)
        if (config->run.adapters.items[i] == (int64_t)kind) return true;
    return false;
}

const char *tp_config_word(const char *key, int value)
{
    const tp_field *field = tp_schema_field(&tp_recipe_schema, key);
    int n = 0;
    while (field != NULL && field->words != NULL && field->words[n] != NULL) n++;
    return value >= 0 && value < n ? field->words[value] : "";
}
