/* First fit over a sorted table of holes. A step has a few hundred live blocks and a handful of holes, so a scan is cheap. */
#include "backend/pool.h"

#include <string.h>

#include "base/mem.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size)   ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

struct tp_hole {
    size_t offset, size;
};

#define HOLES_INITIAL 64
#define TRACE_PRIME   0x100000001b3u /* of FNV */

#define HOST_SLACK_BYTES ((size_t)1 << 20)

static size_t rounded(size_t bytes)
{
    return (bytes + TP_POOL_ALIGN - 1) / TP_POOL_ALIGN * TP_POOL_ALIGN + (bytes == 0 ? TP_POOL_ALIGN : 0);
}

/* Freed memory is poisoned where the host can see it, so that a kernel reading a dead tensor is caught. */
static void poison(const tp_pool *pool, size_t offset, size_t size, bool dead)
{
    if (!pool->device->backend->host_memory) return;
    if (dead)
        ASAN_POISON_MEMORY_REGION(pool->base + offset, size);
    else
        ASAN_UNPOISON_MEMORY_REGION(pool->base + offset, size);
}

tp_status tp_pool_open(tp_ctx *ctx, tp_pool *pool, size_t capacity)
{
    *pool = (tp_pool){.device = ctx->device};
    if (capacity == 0 && !ctx->device->backend->computes) capacity = (size_t)1 << 50;
    /* Host memory costs nothing until it is touched, so there is room for batches that fall differently into the holes. */
    else if (ctx->device->backend->host_memory && !tp_add_size(capacity, capacity + HOST_SLACK_BYTES, &capacity))
        capacity = SIZE_MAX / 2;
    capacity = rounded(capacity);
    TP_TRY(tp_grow(ctx, &pool->holes, &pool->holes_capacity, HOLES_INITIAL, sizeof *pool->holes));
    pool->base = ctx->device->backend->alloc(ctx, ctx->device, capacity);
    if (pool->base == NULL) {
        tp_free(pool->holes);
        *pool = (tp_pool){0};
        return tp_fail(ctx, TP_NOMEM, "no memory for a step arena of %zu bytes", capacity);
    }
    pool->capacity = capacity;
    tp_pool_reset(pool);
    return TP_OK;
}

void tp_pool_close(tp_pool *pool)
{
    if (pool->base != NULL) {
        poison(pool, 0, pool->capacity, false);
        pool->device->backend->free(pool->device, pool->base, pool->capacity);
    }
    tp_free(pool->holes);
    tp_free(pool->noted);
    *pool = (tp_pool){0};
}

void tp_pool_reset(tp_pool *pool)
{
    if (pool->base == NULL) return;
    pool->holes[0] = (struct tp_hole){0, pool->capacity};
    pool->n_holes = 1;
    pool->used = pool->trace = pool->n_noted = 0;
    pool->places = NULL;
    poison(pool, 0, pool->capacity, true);
}

void tp_pool_follow(tp_pool *pool, const tp_place *places, size_t n)
{
    pool->places = places;
    pool->n_places = n;
    pool->next = 0;
}

static bool next_place(tp_pool *pool, size_t size, size_t *offset)
{
    if (pool->next == pool->n_places || pool->places[pool->next].size < size) return false;
    *offset = pool->places[pool->next++].offset;
    return true;
}

static bool first_fit(tp_pool *pool, size_t size, size_t *offset)
{
    for (size_t i = 0; i < pool->n_holes; i++) {
        struct tp_hole *hole = &pool->holes[i];
        if (hole->size < size) continue;
        *offset = hole->offset;
        hole->offset += size;
        hole->size -= size;
        if (hole->size == 0) {
            memmove(hole, hole + 1, (pool->n_holes - i - 1) * sizeof *hole);
            pool->n_holes--;
        }
        return true;
    }
    return false;
}

static tp_status note(tp_ctx *ctx, tp_pool *pool, size_t offset, size_t size)
{
    if (!pool->notes) return TP_OK;
    TP_TRY(tp_grow(ctx, &pool->noted, &pool->noted_capacity, pool->n_noted + 1, sizeof *pool->noted));
    pool->noted[pool->n_noted++] = (tp_place){offset, size};
    return TP_OK;
}

void *tp_pool_alloc(tp_ctx *ctx, tp_pool *pool, size_t bytes)
{
    if (bytes > pool->capacity) bytes = pool->capacity + 1;
    size_t size = rounded(bytes), offset;
    if (pool->places != NULL ? next_place(pool, size, &offset) : first_fit(pool, size, &offset)) {
        pool->used += size;
        if (offset + size > pool->peak) pool->peak = offset + size;
        pool->trace = ((pool->trace ^ offset) * TRACE_PRIME ^ size) * TRACE_PRIME;
        if (note(ctx, pool, offset, size) != TP_OK) return NULL;
        poison(pool, offset, bytes, false);
        return pool->base + offset;
    }
    tp_fail(ctx, TP_NOMEM, "the step arena is full: %zu of %zu bytes are in use, %zu more are needed", pool->used,
            pool->capacity, bytes);
    return NULL;
}

void tp_pool_free(tp_pool *pool, void *memory, size_t bytes)
{
    if (memory == NULL) return;
    size_t offset = (size_t)((char *)memory - pool->base), size = rounded(bytes), i = 0;
    poison(pool, offset, size, true);
    pool->used -= size;
    if (pool->places != NULL) return;
    while (i < pool->n_holes && pool->holes[i].offset < offset) i++;
    bool touches_left = i > 0 && pool->holes[i - 1].offset + pool->holes[i - 1].size == offset;
    bool touches_right = i < pool->n_holes && offset + size == pool->holes[i].offset;
    if (touches_left && touches_right) {
        pool->holes[i - 1].size += size + pool->holes[i].size;
        memmove(&pool->holes[i], &pool->holes[i + 1], (pool->n_holes - i - 1) * sizeof *pool->holes);
        pool->n_holes--;
    } else if (touches_left) {
        pool->holes[i - 1].size += size;
    } else if (touches_right) {
        pool->holes[i].offset = offset;
        pool->holes[i].size += size;
    } else if (pool->n_holes < pool->holes_capacity ||
               tp_grow(NULL, &pool->holes, &pool->holes_capacity, pool->n_holes + 1, sizeof *pool->holes) == TP_OK) {
        memmove(&pool->holes[i + 1], &pool->holes[i], (pool->n_holes - i) * sizeof *pool->holes);
        pool->holes[i] = (struct tp_hole){offset, size};
        pool->n_holes++;
    }
}
