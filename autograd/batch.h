/* A batch of tokens as networks see it: N rows in one flat list, cut into segments that attend to themselves only.
 *
 * Padding does not exist here: rows of a padded batch that hold no token belong to no segment. Packed documents are segments
 * whose positions restart. Virtual tokens (prompt tuning) are rows like others. Arrays are device memory unless named host. */
#ifndef TP_AUTOGRAD_BATCH_H
#define TP_AUTOGRAD_BATCH_H

#include "backend/kernels.h"

typedef struct tp_batch {
    int64_t n;                  /* rows */
    const int32_t *ids;         /* [n] */
    const int32_t *positions;   /* [n], from 0 in each segment (or where the cache ends) */
    int64_t max_position;       /* largest position + 1 in the batch: dynamic RoPE scaling looks at it */
    const tp_segment *segments; /* host; k_start and k_len count rows of this batch, or of the KV cache */
    int64_t n_segments;
    const int32_t *label_rows; /* [n_labels] rows whose output predicts a label, ascending */
    const int32_t *labels;     /* [n_labels] */
    int64_t n_labels;
    int64_t n_tokens; /* rows that hold a token: what tokens/s counts */
} tp_batch;

/* A batch that owns its arrays. */
typedef struct tp_owned_batch {
    tp_batch batch;
    struct tp_device *device;
    void *memory; /* device: ids and positions */
    size_t bytes;
    tp_segment *segments;
} tp_owned_batch;

/* A batch of all rows of a padded table, row r * n_columns + c for column c of sequence r, so that results have the
 * table's shape.
 *   ids   [n_rows, n_columns]
 *   mask  the same, 1 where a token stands; NULL: everywhere
 * The ones of a sequence are one run, at any side; positions count from its first. Columns outside the runs hold no token:
 * their id is not looked at, and what is computed there means nothing. max_position covers the padding behind a run, as
 * the reference's does. No labels.
 * INVALID: a hole in a run, a mask value other than 0 and 1, an id outside 0..vocab_size-1, naming row and column. */
TP_API tp_status tp_batch_from_rows(tp_ctx *ctx, const int64_t *ids, const int64_t *mask, int64_t n_rows, int64_t n_columns,
                                    int64_t vocab_size, tp_owned_batch *owned) TP_MUST_CHECK;
TP_API void tp_owned_batch_free(tp_owned_batch *owned); /* what it owns, not the struct */

#endif
