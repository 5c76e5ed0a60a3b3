/* The two kinds of data sets behind data/dataset.h. For data/ only. */
#ifndef TP_DATA_DATASET_KIND_H
#define TP_DATA_DATASET_KIND_H

#include "data/dataset.h"

typedef struct tp_dataset_largest_batch {
    int64_t rows, labels, segments, longest_segment;
} tp_dataset_largest_batch;

/* First member of each kind's own struct. */
struct tp_dataset {
    const struct tp_dataset_kind *kind;
    tp_dataset_counts counts;
    int64_t micro_batches; /* per epoch */
    tp_dataset_largest_batch largest;
    const tp_prompt *prompt; /* what rows are rendered by; NULL: nothing */
    char fingerprint[65];
};

typedef struct tp_dataset_kind {
    void (*close)(tp_dataset *dataset);
    tp_status (*get)(tp_ctx *ctx, const tp_dataset *dataset, int64_t epoch, int64_t i, tp_host_batch *batch);
    tp_status (*check)(tp_ctx *ctx, const tp_dataset *dataset);
    tp_status (*preview)(tp_ctx *ctx, const tp_dataset *dataset, int64_t row, tp_preview *preview);
} tp_dataset_kind;

/* The blocks that options choose: training or held-out. */
tp_status tp_token_dataset_open(tp_ctx *ctx, const tp_dataset_options *options, const tp_datasets *blocks,
                                tp_dataset **dataset) TP_MUST_CHECK;
tp_status tp_text_dataset_open(tp_ctx *ctx, const tp_dataset_options *options, const tp_datasets *blocks,
                               tp_dataset **dataset) TP_MUST_CHECK;

/* ---- filling a batch ---- */
void tp_host_batch_clear(tp_host_batch *batch);
/* Room for `rows` more rows and as many labels and one more segment. */
tp_status tp_host_batch_reserve(tp_ctx *ctx, tp_host_batch *batch, int64_t rows) TP_MUST_CHECK;
/* Appends one sequence that attends to itself alone, positions from 0. labels[t] (may be NULL) belongs to ids[t] and is
 * predicted by row t - 1; values below 0 are none. Room must have been reserved. */
void tp_host_batch_append(tp_host_batch *batch, const int32_t *ids, const int32_t *labels, int64_t n);

#endif
