/* Layers of rewritten text with runs back to the layer below. */
#include "data/aligned.h"

#include "base/mem.h"

void tp_layers_free(tp_layers *layers)
{
    for (size_t i = 0; i < layers->ready; i++) {
        tp_buf_free(&layers->items[i].text);
        tp_free(layers->items[i].runs);
    }
    tp_free(layers->items);
    *layers = (tp_layers){0};
}

void tp_layers_start(tp_layers *layers, const char *text, size_t n, size_t base)
{
    layers->text = text;
    layers->n = n;
    layers->base = base;
    layers->room = n < SIZE_MAX / (2 * TP_LAYERS_GROWTH) ? TP_LAYERS_GROWTH * n + TP_LAYERS_BASE : SIZE_MAX;
    layers->count = 0;
}

tp_span tp_layers_top(const tp_layers *layers)
{
    if (layers->count == 0) return (tp_span){layers->text, layers->n};
    const tp_buf *text = &layers->items[layers->count - 1].text;
    return (tp_span){tp_buf_cstr(text), text->len};
}

void tp_layers_cut(tp_layers *layers, size_t count)
{
    layers->count = count;
}

tp_status tp_layers_open(tp_ctx *ctx, tp_layers *layers, size_t from, tp_layer **layer)
{
    TP_TRY(tp_grow(ctx, &layers->items, &layers->capacity, layers->count + 1, sizeof *layers->items));
    *layer = &layers->items[layers->count];
    if (layers->count == layers->ready) {
        **layer = (tp_layer){0};
        layers->ready++;
    }
    tp_buf_clear(&(*layer)->text);
    (*layer)->n_runs = (*layer)->near = 0;
    (*layer)->from_end = from;
    (*layer)->room = layers->room;
    (*layer)->copying = (*layer)->overfull = (*layer)->failed = false;
    return TP_OK;
}

static void add_run(tp_layer *layer, size_t from)
{
    if (layer->failed || tp_grow(NULL, &layer->runs, &layer->capacity, layer->n_runs + 1, sizeof *layer->runs) != TP_OK) {
        layer->failed = true;
        return;
    }
    layer->runs[layer->n_runs++] = (tp_run){layer->text.len, from};
}

/* Begins a run at `from`. What was skipped below since the last run becomes an empty run of its own, so that the
 * lengths of both neighbours stay true. */
static void begin_run(tp_layer *layer, size_t from)
{
    if (layer->from_end != from) add_run(layer, layer->from_end);
    add_run(layer, from);
}

static bool take_room(tp_layer *layer, size_t n)
{
    layer->overfull = layer->overfull || n > layer->room;
    if (layer->overfull) return false;
    layer->room -= n;
    return true;
}

void tp_layer_keep(tp_layer *layer, const char *bytes, size_t n, size_t from)
{
    if (n == 0 || !take_room(layer, n)) return;
    if (!layer->copying || layer->from_end != from) begin_run(layer, from);
    tp_buf_append(&layer->text, bytes, n);
    layer->from_end = from + n;
    layer->copying = true;
}

void tp_layer_replace(tp_layer *layer, const char *bytes, size_t n, size_t from, size_t from_n)
{
    if (n == from_n) {
        tp_layer_keep(layer, bytes, n, from);
        return;
    }
    if (!take_room(layer, n)) return;
    begin_run(layer, from);
    tp_buf_append(&layer->text, bytes, n);
    layer->from_end = from + from_n;
    layer->copying = false;
}

tp_status tp_layers_close(tp_ctx *ctx, tp_layers *layers, size_t from_end)
{
    tp_layer *layer = &layers->items[layers->count];
    begin_run(layer, from_end);
    TP_TRY(tp_buf_status(ctx, &layer->text, "normalized text"));
    if (layer->failed) return tp_fail(ctx, TP_NOMEM, "normalized text: out of memory");
    if (layer->overfull)
        return tp_fail(ctx, TP_UNSUPPORTED, "normalized text: the tokenizer's steps make more than %d bytes of each one",
                       TP_LAYERS_GROWTH);
    layers->room = layer->room;
    layers->count++;
    return TP_OK;
}

/* The last run that begins at or before `at`; never the closing one. */
static const tp_run *run_of(tp_layer *layer, size_t at)
{
    size_t low = 0, high = layer->n_runs - 1;
    if (layer->runs[layer->near].at <= at) {
        low = layer->near;
        for (int i = 0; i < 8 && low + 1 < high && layer->runs[low + 1].at <= at; i++) low++;
        if (low + 1 < high && layer->runs[low + 1].at > at) high = low + 1;
    }
    while (low + 1 < high) {
        size_t middle = low + (high - low) / 2;
        if (layer->runs[middle].at <= at)
            low = middle;
        else
            high = middle;
    }
    layer->near = low;
    return &layer->runs[low];
}

static bool copies(const tp_run *run)
{
    return run[1].at - run[0].at == run[1].from - run[0].from;
}

static size_t begin_below(tp_layer *layer, size_t at)
{
    if (layer->n_runs < 2) return layer->from_end;
    const tp_run *run = run_of(layer, at);
    if (at >= run[1].at && at > run[0].at) return run[1].from; /* the very end of the layer */
    return copies(run) ? run->from + (at - run->at) : run->from;
}

static size_t end_below(tp_layer *layer, size_t end)
{
    if (layer->n_runs < 2) return layer->from_end;
    const tp_run *run = run_of(layer, end - 1);
    return copies(run) ? run->from + (end - run->at) : run[1].from;
}

void tp_layers_origin(tp_layers *layers, size_t *begin, size_t *end)
{
    for (size_t i = layers->count; i-- > 0;) {
        tp_layer *layer = &layers->items[i];
        bool empty = *begin >= *end;
        *begin = begin_below(layer, *begin);
        *end = empty ? *begin : end_below(layer, *end);
    }
    *begin += layers->base;
    *end += layers->base;
}
