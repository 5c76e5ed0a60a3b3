/* Packing and shuffling. */
#include "data/pack.h"

#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "base/rng.h"

#define OPEN_PACKS    64
#define GROUP_BATCHES 64

/* Separate streams, so that packing, rows and batches are shuffled independently. */
enum { STREAM_ROWS = TP_STREAM_SHUFFLE, STREAM_PACKING, STREAM_BATCHES };

/* ---- packs ---- */

struct packing {
    int64_t max_length;
    uint32_t *pack_of;                           /* [n] by place in the order */
    uint32_t open[OPEN_PACKS], used[OPEN_PACKS]; /* numbers and tokens of the open packs */
    size_t n_open;
    uint32_t n_packs;
};

/* The open pack with the least room that is enough for `length`, or SIZE_MAX. */
static size_t tightest(const struct packing *p, uint32_t length)
{
    size_t best = SIZE_MAX;
    for (size_t i = 0; i < p->n_open; i++)
        if ((int64_t)p->used[i] + length <= p->max_length && (best == SIZE_MAX || p->used[i] > p->used[best])) best = i;
    return best;
}

/* A slot for a new pack: that of the fullest if all are taken. */
static size_t new_slot(struct packing *p)
{
    size_t slot = p->n_open;
    if (p->n_open < OPEN_PACKS) {
        p->n_open++;
    } else {
        slot = 0;
        for (size_t i = 1; i < p->n_open; i++)
            if (p->used[i] > p->used[slot]) slot = i;
    }
    p->open[slot] = p->n_packs++;
    p->used[slot] = 0;
    return slot;
}

static size_t row_at(bool shuffle, uint64_t seed, size_t n, size_t place)
{
    return shuffle ? (size_t)tp_rng_permute((tp_rng_key){seed, STREAM_PACKING, 0}, n, place) : place;
}

/* Rows by their pack, in the order in which they came to it. */
static tp_status gather(tp_ctx *ctx, const struct packing *p, size_t n, bool shuffle, uint64_t seed, tp_packs *packs)
{
    packs->n = p->n_packs;
    packs->items = tp_alloc_raw(ctx, n, sizeof *packs->items);
    packs->starts = tp_alloc(ctx, packs->n + 1, sizeof *packs->starts);
    if (packs->items == NULL || packs->starts == NULL) return TP_NOMEM;
    for (size_t i = 0; i < n; i++) packs->starts[p->pack_of[i] + 1]++;
    for (size_t i = 0; i < packs->n; i++) packs->starts[i + 1] += packs->starts[i];
    for (size_t i = 0; i < n; i++) packs->items[packs->starts[p->pack_of[i]]++] = (uint32_t)row_at(shuffle, seed, n, i);
    memmove(packs->starts + 1, packs->starts, packs->n * sizeof *packs->starts); /* filling moved each start to the next one */
    packs->starts[0] = 0;
    return TP_OK;
}

tp_status tp_pack(tp_ctx *ctx, const uint32_t *lengths, size_t n, int64_t max_length, bool shuffle, uint64_t seed,
                  tp_packs *packs)
{
    struct packing p = {.max_length = max_length, .pack_of = tp_alloc_raw(ctx, n, sizeof *p.pack_of)};
    *packs = (tp_packs){0};
    if (p.pack_of == NULL) return TP_NOMEM;
    for (size_t i = 0; i < n; i++) {
        uint32_t length = lengths[row_at(shuffle, seed, n, i)];
        size_t slot = tightest(&p, length);
        if (slot == SIZE_MAX) slot = new_slot(&p);
        p.used[slot] += length;
        p.pack_of[i] = p.open[slot];
    }
    tp_status status = gather(ctx, &p, n, shuffle, seed, packs);
    tp_free(p.pack_of);
    if (status != TP_OK) tp_packs_free(packs);
    return status;
}

void tp_packs_free(tp_packs *packs)
{
    tp_free(packs->items);
    tp_free(packs->starts);
    *packs = (tp_packs){0};
}

/* ---- order ---- */

uint64_t tp_order_batches(const tp_order *o)
{
    return o->n / o->batch_size + (o->n % o->batch_size != 0);
}

static uint32_t shuffled(const tp_order *o, uint64_t epoch, uint64_t place)
{
    return (uint32_t)(o->shuffle ? tp_rng_permute((tp_rng_key){o->seed, STREAM_ROWS, epoch}, o->n, place) : place);
}

struct sized {
    uint32_t item, length, place;
};

static int longest_first(const void *left, const void *right)
{
    const struct sized *a = left, *b = right;
    if (a->length != b->length) return a->length < b->length ? 1 : -1;
    return (a->place > b->place) - (a->place < b->place);
}

/* Batch i of the epoch is batch `from` of its window, sorted. The batch with fewer rows stays the last. */
static tp_status grouped_batch(tp_ctx *ctx, const tp_order *o, uint64_t epoch, uint64_t i, uint32_t *batch, size_t n)
{
    uint64_t full = o->n / o->batch_size, from = i;
    if (o->shuffle && i < full) from = tp_rng_permute((tp_rng_key){o->seed, STREAM_BATCHES, epoch}, full, i);
    uint64_t first_batch = from / GROUP_BATCHES * GROUP_BATCHES, first = first_batch * o->batch_size, left = o->n - first;
    size_t window = left / GROUP_BATCHES >= o->batch_size ? (size_t)(GROUP_BATCHES * o->batch_size) : (size_t)left;
    struct sized *rows = tp_alloc_raw(ctx, window, sizeof *rows);
    if (rows == NULL) return TP_NOMEM;
    for (size_t k = 0; k < window; k++) {
        uint32_t item = shuffled(o, epoch, first + k);
        rows[k] = (struct sized){item, o->lengths[item], (uint32_t)k};
    }
    qsort(rows, window, sizeof *rows, longest_first);
    for (size_t k = 0; k < n; k++) batch[k] = rows[(from - first_batch) * o->batch_size + k].item;
    tp_free(rows);
    return TP_OK;
}

tp_status tp_order_batch(tp_ctx *ctx, const tp_order *o, uint64_t epoch, uint64_t i, uint32_t *batch, size_t *n)
{
    uint64_t first = i * o->batch_size, left = o->n - first;
    *n = (size_t)(left < o->batch_size ? left : o->batch_size);
    if (o->group) return grouped_batch(ctx, o, epoch, i, batch, *n);
    for (size_t k = 0; k < *n; k++) batch[k] = shuffled(o, epoch, first + k);
    return TP_OK;
}
