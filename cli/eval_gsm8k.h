/* The gsm8k metric: does the model's own answer end in the right number? */
#ifndef TP_CLI_EVAL_GSM8K_H
#define TP_CLI_EVAL_GSM8K_H

#include <signal.h>

#include "data/dataset.h"
#include "models/model.h"

typedef struct tp_gsm8k_score {
    int64_t problems, answered, correct; /* answered: the reply has a number behind #### */
} tp_gsm8k_score;

/* Each row of `data` is a problem: what stands before its last trained stretch is the prompt, exactly as training saw it, and
 * that stretch is the reference, which has its number behind "####". Rows that the data set drops, as too long, are left out.
 * Replies are greedy, 256 new tokens at most. FORMAT naming file and line if a reference has no number. Progress goes to
 * stderr. *stop (set by signal handlers) ends it with PREEMPTED. */
tp_status tp_gsm8k_run(tp_ctx *ctx, tp_model *model, const tp_tokenizer *tokenizer, const tp_dataset *data,
                       const volatile sig_atomic_t *stop, tp_gsm8k_score *score) TP_MUST_CHECK;

#endif
