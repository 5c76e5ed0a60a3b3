/* Checkpoints: folders ckpt-<step>/ that a kill at any instant leaves whole or absent.
 *
 *   adapter_config.json, adapter_model.safetensors   usable as an adapter
 *   optimizer.safetensors                            by parameter name
 *   state.json                                       a few integers and statistics: all randomness is a function of them
 *   manifest.json                                    length and SHA-256 of every file; written last
 */
#ifndef TP_TRAINERS_CHECKPOINT_H
#define TP_TRAINERS_CHECKPOINT_H

#include "adapters/adapter.h"
#include "trainers/loss_scale.h"
#include "trainers/optim.h"

#define TP_STATE_BYTES ((size_t)1 << 20) /* longest state.json that is read */

/* What a run is besides its tensors. Strings are at most 64 hexadecimal digits. */
typedef struct tp_run_state {
    int64_t step;               /* optimizer steps done */
    int64_t updates;            /* of them with an update: t of AdamW */
    int64_t skipped_in_row;     /* non-finite steps just before */
    int64_t over_threshold;     /* loss_watchdog: steps in a row */
    double loss_mean, loss_var; /* spike_zscore: running statistics */
    int64_t loss_count;
    tp_loss_scale scale; /* fp16 */
    double best_metric;  /* lower is better; NaN: none yet */
    int64_t best_step, evals_without_gain;
    bool eval_pending; /* told to stop while evaluating at this step: it is done first on resume */
    char run_id[65];   /* of the run that wrote it: rotation touches no other */
    char recipe[65], data[65], base[65], tokenizer[65], version[32], device[32];
} tp_run_state;

/* Writes <folder>/ckpt-<step>/. On failure nothing new is there and the older ones are untouched. */
TP_API tp_status tp_checkpoint_save(tp_ctx *ctx, const char *folder, const tp_lora *lora, const tp_model *model,
                                    const tp_optim *optim, const tp_run_state *state) TP_MUST_CHECK;
/* Newest checkpoint in the folder that passes its manifest: *path, or NULL if there is none. Damaged ones are named in
 * warnings; CHECKPOINT if there are only damaged ones. */
TP_API tp_status tp_checkpoint_newest(tp_ctx *ctx, const char *folder, char **path) TP_MUST_CHECK;
/* state.json of a checkpoint whose manifest has been verified. */
TP_API tp_status tp_checkpoint_read_state(tp_ctx *ctx, const char *path, tp_run_state *state) TP_MUST_CHECK;
/* Parameters, and the optimizer's state unless optim is NULL. */
TP_API tp_status tp_checkpoint_load(tp_ctx *ctx, const char *path, tp_lora *lora, tp_optim *optim) TP_MUST_CHECK;
/* Keeps the newest `keep` of this run; warns if one cannot be removed. */
TP_API void tp_checkpoint_rotate(tp_ctx *ctx, const char *folder, const char *run_id, int64_t keep);
/* Removes what killed saves left. */
TP_API tp_status tp_checkpoint_sweep(tp_ctx *ctx, const char *folder) TP_MUST_CHECK;

#endif
