/* A table of successors, and the hint made of it. Threads read the hint while it changes: its parts may then belong to two
 * stretches, and what is fetched is of no use, no more. */
#include "backend/cpu/ahead.h"

#include <stdatomic.h>
#include <stdbool.h>

#include "base/mem.h"

#define TABLE 1024 /* stretches that are told apart, more or less: a place holds the last one that hashed to it */
/* What a thread fetches at most: a part of its L2. And of one step, which must be over soon. */
#define MOST_BYTES ((int64_t)256 << 10)
#define STEP_BYTES ((int64_t)512)

struct successor {
    const unsigned char *of;
    tp_cpu_stretch stretch;
};

struct tp_cpu_ahead {
    struct successor table[TABLE];
    const unsigned char *last;
    /* the hint */
    _Atomic(const unsigned char *) data;
    _Atomic int64_t chunk_bytes, chunks, lanes; /* lanes 0: nothing to fetch */
    _Atomic(const unsigned char *) first;
    _Atomic int64_t first_bytes, first_pieces;
};

tp_cpu_ahead *tp_cpu_ahead_new(tp_ctx *ctx)
{
    return tp_alloc(ctx, 1, sizeof(tp_cpu_ahead));
}

void tp_cpu_ahead_free(tp_cpu_ahead *ahead)
{
    tp_free(ahead);
}

static struct successor *place_of(tp_cpu_ahead *ahead, const unsigned char *data)
{
    uint64_t hash = (uint64_t)(uintptr_t)data * 0x9e3779b97f4a7c15u;
    return &ahead->table[hash >> 54];
}
_Static_assert(TABLE == 1 << 10, "place_of takes 10 bits");

static void fetch_step(const unsigned char *p)
{
    for (int64_t i = 0; i < STEP_BYTES; i += 64) __builtin_prefetch(p + i, 0, 2);
}

/* Step number `step` of one thread; false at the end of what it should fetch. */
static bool fetch(void *arg, int thread, int64_t step)
{
    tp_cpu_ahead *ahead = arg;
    int64_t lanes = atomic_load(&ahead->lanes), chunks = atomic_load(&ahead->chunks), bytes = atomic_load(&ahead->chunk_bytes);
    if (thread >= lanes) return false;
    int64_t piece = thread < atomic_load(&ahead->first_pieces) ? atomic_load(&ahead->first_bytes) : 0;
    int64_t first_steps = (piece + STEP_BYTES - 1) / STEP_BYTES;
    if (step < first_steps) {
        fetch_step(atomic_load(&ahead->first) + thread * piece + step * STEP_BYTES);
        return true;
    }
    int64_t first = thread * chunks / lanes, end = (thread + 1) * chunks / lanes, at = (step - first_steps) * STEP_BYTES;
    if (at >= MOST_BYTES || at >= (end - first) * bytes) return false;
    fetch_step(atomic_load(&ahead->data) + first * bytes + at);
    return true;
}

void tp_cpu_ahead_begins(tp_cpu_ahead *ahead, tp_threads *pool, const tp_cpu_stretch *now)
{
    *place_of(ahead, ahead->last) = (struct successor){ahead->last, *now};
    ahead->last = now->data;
    const struct successor *next = place_of(ahead, now->data);
    bool known = next->of == now->data;
    atomic_store(&ahead->data, next->stretch.data);
    atomic_store(&ahead->chunk_bytes, next->stretch.chunk_bytes);
    atomic_store(&ahead->chunks, next->stretch.chunks);
    atomic_store(&ahead->first, next->stretch.first);
    atomic_store(&ahead->first_bytes, next->stretch.first_bytes);
    atomic_store(&ahead->first_pieces, next->stretch.first_pieces);
    atomic_store(&ahead->lanes, known ? next->stretch.lanes : 0);
    tp_threads_while_idle(pool, fetch, ahead);
}
