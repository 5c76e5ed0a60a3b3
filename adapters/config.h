/* adapter_config.json: PEFT's LoraConfig, read and written. */
#ifndef TP_ADAPTERS_CONFIG_H
#define TP_ADAPTERS_CONFIG_H

#include "base/json.h"
#include "peft/lora.h"

#define TP_ADAPTER_CONFIG_BYTES ((size_t)4 << 20)
#define TP_ADAPTER_LIST_MAX     65536 /* entries of one of its lists */

typedef struct tp_adapter_config {
    tp_lora_spec spec; /* its strings live in this struct */
    char *base_model;  /* base_model_name_or_path; may be "" */
    /* storage behind spec */
    const char **strings;
    size_t n_strings, strings_capacity;
    const char *const *default_targets; /* the family's list, where the file names none; not owned */
    int64_t *layers;
    tp_pattern *rank_pattern, *alpha_pattern;
} tp_adapter_config;

/* Reads folder/adapter_config.json. Unknown keys get a note; a method other than LoRA or an option that changes the maths is
 * UNSUPPORTED by name; wrong values are FORMAT with line and column. */
TP_API tp_status tp_adapter_config_read(tp_ctx *ctx, const char *folder, tp_adapter_config *config) TP_MUST_CHECK;
TP_API void tp_adapter_config_free(tp_adapter_config *config);
/* The file's text: keys sorted, indented by two, as PEFT writes it. all_linear is written as the names that were adapted. */
TP_API tp_status tp_adapter_config_write(tp_ctx *ctx, const tp_lora *lora, const char *base_model, tp_buf *out) TP_MUST_CHECK;

#endif
