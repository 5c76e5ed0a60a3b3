/* The prompts of one call of generate: a single one, or those of a file of rows. */
#ifndef TP_CLI_PROMPTS_H
#define TP_CLI_PROMPTS_H

#include "data/tokenizer.h"
#include "inference/generate.h"

typedef struct tp_prompts {
    tp_prompt_ids *items; /* the ids of each are owned */
    size_t n, capacity, longest;
} tp_prompts;

/* How a text becomes tokens. */
typedef tp_status (*tp_prompt_encode)(tp_ctx *ctx, void *state, tp_span text, tp_tokens *out);

tp_status tp_prompts_add(tp_ctx *ctx, tp_prompts *prompts, const tp_tokens *tokens) TP_MUST_CHECK;
/* Adds a prompt per row of a file (data/rows.h): {"prompt": TEXT} or {"ids": [...]}. FORMAT naming file, line and column. */
tp_status tp_prompts_read(tp_ctx *ctx, tp_prompts *prompts, const char *path, tp_prompt_encode encode,
                          void *state) TP_MUST_CHECK;
void tp_prompts_free(tp_prompts *prompts);

#endif
