/* The shapes of the last micro-batches, some with a recording. */
#include "trainers/replay.h"

#include <string.h>

#include "base/log.h"
#include "base/mem.h"

/* A recording costs about as much as a few passes. Those that take another's place come only while so many replays of each
 * have paid for it: data whose shapes hardly ever repeat is not recorded over and over. */
#define REPLAYS_EACH 8

struct shape {
    tp_batch key; /* without pointers to segments, and without what any_segments leaves open */
    bool any_segments;
    tp_segment *segments; /* those of the key, or those that the recording works on */
    int64_t n_segments;
    size_t capacity;
    uint64_t trace, used; /* used: when; 0: an empty place */
    tp_graph *graph;
    bool plain; /* is not recorded */
};

struct tp_replay {
    tp_device *device;
    int64_t most; /* 0: nothing is recorded */
    uint64_t now, recorded, replayed;
    struct shape shapes[TP_REPLAY_SHAPES];
};

tp_status tp_replay_open(tp_ctx *ctx, int64_t most, tp_replay **result)
{
    tp_replay *replay = tp_alloc(ctx, 1, sizeof *replay);
    if (replay == NULL) return TP_NOMEM;
    replay->device = ctx->device;
    replay->most = ctx->device->backend->capture_begin != NULL ? most : 0;
    *result = replay;
    return TP_OK;
}

static void drop(tp_replay *replay, struct shape *shape)
{
    if (shape->graph != NULL) replay->device->backend->graph_free(replay->device, shape->graph);
    shape->graph = NULL;
}

void tp_replay_close(tp_replay *replay)
{
    if (replay == NULL) return;
    for (int i = 0; i < TP_REPLAY_SHAPES; i++) {
        drop(replay, &replay->shapes[i]);
        tp_free(replay->shapes[i].segments);
    }
    tp_free(replay);
}

int64_t tp_replay_count(const tp_replay *replay)
{
    return replay->most > 0 || replay->replayed > 0 ? (int64_t)replay->replayed : -1;
}

/* ---- shapes ---- */

/* Nothing but integers and pointers of one size, so that whatever is added to a batch is compared. */
_Static_assert(sizeof(tp_batch) == 10 * sizeof(int64_t) && sizeof(tp_segment) == 4 * sizeof(int64_t), "padding is compared");

static tp_batch key_of(const tp_batch *batch, bool any_segments)
{
    tp_batch key = *batch;
    key.segments = NULL;
    if (any_segments) key.n_segments = key.max_position = key.n_tokens = 0;
    return key;
}

static bool same_segments(const struct shape *shape, const tp_batch *batch)
{
    return shape->n_segments == batch->n_segments &&
           memcmp(shape->segments, batch->segments, (size_t)batch->n_segments * sizeof *batch->segments) == 0;
}

static bool same(const struct shape *shape, const tp_batch *batch, const tp_batch *key, bool any_segments)
{
    return shape->used > 0 && shape->any_segments == any_segments && memcmp(&shape->key, key, sizeof *key) == 0 &&
           (any_segments || same_segments(shape, batch));
}

static struct shape *find(tp_replay *replay, const tp_batch *batch, bool any_segments)
{
    const tp_batch key = key_of(batch, any_segments);
    for (int i = 0; i < TP_REPLAY_SHAPES; i++)
        if (same(&replay->shapes[i], batch, &key, any_segments)) return &replay->shapes[i];
    return NULL;
}

/* The one that was used longest ago, among those with or without a recording; NULL: there is none. */
static struct shape *oldest(tp_replay *replay, bool with_graph)
{
    struct shape *found = NULL;
    for (int i = 0; i < TP_REPLAY_SHAPES; i++) {
        struct shape *shape = &replay->shapes[i];
        if ((shape->graph != NULL) == with_graph && (found == NULL || shape->used < found->used)) found = shape;
    }
    return found;
}

static tp_status keep_segments(tp_ctx *ctx, struct shape *shape, const tp_batch *batch)
{
    TP_TRY(tp_grow(ctx, &shape->segments, &shape->capacity, (size_t)batch->n_segments + 1, sizeof *shape->segments));
    memcpy(shape->segments, batch->segments, (size_t)batch->n_segments * sizeof *shape->segments);
    shape->n_segments = batch->n_segments;
    return TP_OK;
}

static tp_status remember(tp_ctx *ctx, tp_replay *replay, const tp_batch *batch, bool any_segments, struct shape **result)
{
    struct shape *shape = oldest(replay, false);
    shape->used = 0;
    TP_TRY(keep_segments(ctx, shape, batch));
    shape->key = key_of(batch, any_segments);
    shape->any_segments = any_segments;
    shape->plain = false;
    *result = shape;
    return TP_OK;
}

/* ---- recordings ---- */

/* Whether one more may be made; the one that it replaces goes. */
static bool has_room(tp_replay *replay)
{
    int64_t n = 0;
    for (int i = 0; i < TP_REPLAY_SHAPES; i++) n += replay->shapes[i].graph != NULL;
    if (n < replay->most) return true;
    if (replay->replayed < REPLAYS_EACH * replay->recorded) return false;
    drop(replay, oldest(replay, true));
    return true;
}

/* Recordings are for speed: without them, the run goes on. */
static void give_up(tp_ctx *ctx, tp_replay *replay, struct shape *shape)
{
    tp_note(ctx, "micro-batches are not recorded: %s", ctx->message);
    tp_ctx_clear(ctx);
    drop(replay, shape);
    replay->most = 0;
}

static void record(tp_ctx *ctx, tp_replay *replay, struct shape *shape, const tp_batch *batch, tp_replay_pass pass, void *state)
{
    const tp_backend *backend = ctx->device->backend;
    uint64_t trace = 0;
    tp_status status = backend->capture_begin(ctx);
    if (status == TP_OK) {
        status = pass(state, batch, &trace);
        shape->plain = trace != shape->trace;
        tp_status end = backend->capture_end(ctx, status == TP_OK && !shape->plain ? &shape->graph : NULL);
        if (status == TP_OK) status = end;
    }
    replay->recorded++;
    if (shape->plain)
        tp_note(ctx, "micro-batches of %lld rows are not recorded: they take other places in the arena each time",
                (long long)batch->n);
    if (status == TP_OK && shape->any_segments) status = keep_segments(ctx, shape, batch);
    if (status != TP_OK) give_up(ctx, replay, shape);
}

/* Points the recording to these segments. *fits false: it is none for them. */
static tp_status turn_to(tp_ctx *ctx, tp_replay *replay, struct shape *shape, const tp_batch *batch, bool *fits)
{
    *fits = true;
    if (!shape->any_segments || same_segments(shape, batch)) return TP_OK;
    TP_TRY(replay->device->backend->graph_segments(ctx, shape->graph, batch->segments, batch->n_segments, fits));
    return *fits ? keep_segments(ctx, shape, batch) : TP_OK;
}

tp_status tp_replay_run(tp_ctx *ctx, tp_replay *replay, const tp_batch *batch, bool any_segments, tp_replay_pass pass,
                        void *state)
{
    uint64_t ignored;
    bool fits = false;
    replay->now++;
    if (replay->most == 0) return pass(state, batch, &ignored);
    struct shape *shape = find(replay, batch, any_segments);
    bool is_new = shape == NULL;
    if (is_new) TP_TRY(remember(ctx, replay, batch, any_segments, &shape));
    shape->used = replay->now;
    if (is_new) return pass(state, batch, &shape->trace);
    if (shape->graph == NULL && !shape->plain && has_room(replay)) record(ctx, replay, shape, batch, pass, state);
    if (shape->graph != NULL && turn_to(ctx, replay, shape, batch, &fits) != TP_OK) give_up(ctx, replay, shape);
    if (!fits || shape->graph == NULL) return pass(state, batch, &ignored);
    replay->replayed++;
    return ctx->device->backend->graph_launch(ctx, shape->graph);
}

void tp_replay_prepare(tp_ctx *ctx, tp_replay *replay, const tp_batch *batch, bool any_segments)
{
    bool ignored;
    struct shape *shape = replay->most > 0 ? find(replay, batch, any_segments) : NULL;
    if (shape != NULL && shape->graph != NULL && turn_to(ctx, replay, shape, batch, &ignored) != TP_OK)
        give_up(ctx, replay, shape);
}
