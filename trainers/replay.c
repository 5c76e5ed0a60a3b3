/* The shapes of the last micro-batches, some with a recording. */
#include "trainers/replay.h"

#include <string.h>

#include "base/log.h"
#include "base/mem.h"

/* A recording costs about as much as a few passes. Those that take another's place come only while so many replays of each
 * have paid for it: data whose shapes hardly ever repeat is not recorded over and over. */
#define REPLAYS_EACH 8

struct shape {
    tp_batch batch; /* segments: the copy below */
    tp_segment *segments;
    size_t capacity;
    uint64_t trace, used; /* used: when; 0: an empty place */
    tp_graph *graph;
    bool plain; /* is not recorded */
};

struct tp_replay {
    tp_device *device;
    bool off;
    uint64_t now, recorded, replayed;
    struct shape shapes[TP_REPLAY_SHAPES];
};

tp_status tp_replay_open(tp_ctx *ctx, bool allowed, tp_replay **result)
{
    tp_replay *replay = tp_alloc(ctx, 1, sizeof *replay);
    if (replay == NULL) return TP_NOMEM;
    replay->device = ctx->device;
    replay->off = !allowed || ctx->device->backend->capture_begin == NULL;
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

/* ---- shapes ---- */

/* Nothing but integers and pointers of one size, so that whatever is added to a batch is compared. */
_Static_assert(sizeof(tp_batch) == 10 * sizeof(int64_t) && sizeof(tp_segment) == 4 * sizeof(int64_t), "padding is compared");

static bool same(const struct shape *shape, const tp_batch *batch)
{
    tp_batch key = *batch;
    key.segments = shape->segments;
    return shape->used > 0 && memcmp(&shape->batch, &key, sizeof key) == 0 &&
           memcmp(shape->segments, batch->segments, (size_t)batch->n_segments * sizeof *batch->segments) == 0;
}

static struct shape *find(tp_replay *replay, const tp_batch *batch)
{
    for (int i = 0; i < TP_REPLAY_SHAPES; i++)
        if (same(&replay->shapes[i], batch)) return &replay->shapes[i];
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

static tp_status remember(tp_ctx *ctx, tp_replay *replay, const tp_batch *batch, struct shape **result)
{
    struct shape *shape = oldest(replay, false);
    shape->used = 0;
    TP_TRY(tp_grow(ctx, &shape->segments, &shape->capacity, (size_t)batch->n_segments + 1, sizeof *shape->segments));
    memcpy(shape->segments, batch->segments, (size_t)batch->n_segments * sizeof *shape->segments);
    shape->batch = *batch;
    shape->batch.segments = shape->segments;
    shape->plain = false;
    *result = shape;
    return TP_OK;
}

/* ---- recordings ---- */

/* Whether one more may be made; the one that it replaces goes. */
static bool has_room(tp_replay *replay)
{
    int n = 0;
    for (int i = 0; i < TP_REPLAY_SHAPES; i++) n += replay->shapes[i].graph != NULL;
    if (n < TP_REPLAY_GRAPHS) return true;
    if (replay->replayed < REPLAYS_EACH * replay->recorded) return false;
    drop(replay, oldest(replay, true));
    return true;
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
    if (status == TP_OK) return;
    tp_note(ctx, "micro-batches are not recorded: %s", ctx->message);
    tp_ctx_clear(ctx);
    replay->off = true;
}

tp_status tp_replay_run(tp_ctx *ctx, tp_replay *replay, const tp_batch *batch, tp_replay_pass pass, void *state)
{
    uint64_t ignored;
    if (replay->off) return pass(state, batch, &ignored);
    struct shape *shape = find(replay, batch);
    bool is_new = shape == NULL;
    if (is_new) TP_TRY(remember(ctx, replay, batch, &shape));
    shape->used = ++replay->now;
    if (is_new) return pass(state, batch, &shape->trace);
    if (shape->graph == NULL && !shape->plain && has_room(replay)) record(ctx, replay, shape, batch, pass, state);
    if (shape->graph == NULL) return pass(state, batch, &ignored);
    replay->replayed++;
    return ctx->device->backend->graph_launch(ctx, shape->graph);
}
