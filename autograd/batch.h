/* A batch of tokens as networks see it: N rows in one flat list, cut into segments that attend to themselves only.
 *
 * Padding does not exist here: rows of a padded batch that hold no token belong to no segment. Packed documents are segments
 * whose positions restart. Virtual tokens (prompt tuning) are rows like others. Arrays are device memory unless named host. */
#ifndef TP_AUTOGRAD_BATCH_H
#define TP_AUTOGRAD_BATCH_H

#include "backend/kernels.h"

typedef struct tp_batch {
    int64_t n;                   /* rows */
    const int32_t *ids;          /* [n] */
    const int32_t *positions;    /* [n], from 0 in each segment (or where the cache ends) */
    int64_t max_position;        /* largest position + 1 in the batch: dynamic RoPE scaling looks at it */
    const tp_segment *segments;  /* host; k_start and k_len count rows of this batch, or of the KV cache */
    int64_t n_segments;
    const int32_t *label_rows;   /* [n_labels] rows whose output predicts a label, ascending */
    const int32_t *labels;       /* [n_labels] */
    int64_t n_labels;
    int64_t n_tokens;            /* rows that hold a token: what tokens/s counts */
} tp_batch;

#endif
