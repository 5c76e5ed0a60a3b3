/* One block of device memory for a training step, handed out by first fit and taken back in any order.
 *
 * A step allocates from here alone: activations while going forward, gradients while going back, released as soon as the
 * reverse sweep has passed them. Placement depends only on the sequence of sizes, so the dry backend, running the same
 * step on a pool without memory, learns the exact peak beforehand. A smaller step would fall differently into the holes, and
 * perhaps not fit: it follows the places of the planned one, allocation by allocation. */
#ifndef TP_BACKEND_POOL_H
#define TP_BACKEND_POOL_H

#include "backend/backend.h"

typedef struct tp_place {
    size_t offset, size;
} tp_place;

typedef struct tp_pool {
    tp_device *device;
    char *base;
    size_t capacity;
    size_t used, peak;     /* bytes handed out now, and the highest address ever used */
    uint64_t trace;        /* of the places and sizes handed out since the reset: other ones give another number */
    struct tp_hole *holes; /* free ranges, ascending, not touching */
    size_t n_holes, holes_capacity;
    tp_place *noted; /* places since the reset, if `notes`; NULL: none yet */
    size_t n_noted, noted_capacity;
    bool notes;
    const tp_place *places; /* to be followed until the reset; NULL: first fit */
    size_t n_places, next;
} tp_pool;

#define TP_POOL_ALIGN 256

/* capacity 0 on the dry backend: without limit. */
TP_API tp_status tp_pool_open(tp_ctx *ctx, tp_pool *pool, size_t capacity) TP_MUST_CHECK;
TP_API void tp_pool_close(tp_pool *pool);
/* Memory of undefined content; NULL with NOMEM naming used, wanted and capacity. */
TP_API void *tp_pool_alloc(tp_ctx *ctx, tp_pool *pool, size_t bytes) TP_MUST_CHECK;
/* `bytes` as given to tp_pool_alloc. Cannot fail: a range that finds no slot in the hole table is lost until reset. */
TP_API void tp_pool_free(tp_pool *pool, void *memory, size_t bytes);
TP_API void tp_pool_reset(tp_pool *pool);
/* Until the reset: allocation i gets place i, which must be large enough. Borrowed; right after a reset. */
TP_API void tp_pool_follow(tp_pool *pool, const tp_place *places, size_t n);

#endif
