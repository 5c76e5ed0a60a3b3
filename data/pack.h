/* Which rows stand together, and in which order: pure functions of the seed and the epoch.
 *
 * Rows are packed once, in shuffled order, so that every epoch has the same number of micro-batches; each epoch then draws the
 * packs in an order of its own. */
#ifndef TP_DATA_PACK_H
#define TP_DATA_PACK_H

#include <stdbool.h>

#include "base/status.h"

/* ---- packs ---- */
/* Pack p holds items[starts[p]] ... items[starts[p + 1] - 1], numbers of rows. */
typedef struct tp_packs {
    uint32_t *items;
    uint32_t *starts; /* [n + 1] */
    size_t n;
} tp_packs;

/* Fills packs of at most max_length tokens: each row goes to the fullest of the 64 open packs that takes it, else to a new one,
 * for which the fullest is closed. Every length is at most max_length. */
TP_API tp_status tp_pack(tp_ctx *ctx, const uint32_t *lengths, size_t n, int64_t max_length, bool shuffle, uint64_t seed,
                         tp_packs *packs) TP_MUST_CHECK;
TP_API void tp_packs_free(tp_packs *packs);

/* ---- order ---- */
typedef struct tp_order {
    uint64_t seed;
    bool shuffle;           /* else as they come */
    bool group;             /* those of similar length together: sorted within windows of 64 batches, whose order is shuffled */
    uint64_t n, batch_size; /* rows or packs; so many in a batch, the last may hold fewer */
    const uint32_t *lengths; /* [n], tokens; only read if group */
} tp_order;

TP_API uint64_t tp_order_batches(const tp_order *order);
/* Numbers of the rows or packs of batch i into batch[0..batch_size); *n is how many. */
TP_API tp_status tp_order_batch(tp_ctx *ctx, const tp_order *order, uint64_t epoch, uint64_t i, uint32_t *batch,
                                size_t *n) TP_MUST_CHECK;

#endif
