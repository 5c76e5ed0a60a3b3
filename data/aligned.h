/* Text that remembers where it came from.
 *
 * Normalizers and pre-tokenizers rewrite text (drop marks, put a blank in front, replace blanks by U+2581), while the
 * caller wants to know which bytes of the original a token stands for. Each rewriting is a layer: its new bytes, and
 * runs that say from which bytes of the layer below they were made. A run either copies byte for byte or stands as a
 * whole for what it replaced.
 *
 * Steps that replace come from a file and may each make text longer: all layers of a stretch together may be written
 * with no more than a multiple of its bytes. */
#ifndef TP_DATA_ALIGNED_H
#define TP_DATA_ALIGNED_H

#include "base/status.h"
#include "base/text.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tp_run {
    size_t at;   /* first byte in this layer */
    size_t from; /* first byte in the layer below; the run ends where the next one begins */
} tp_run;

typedef struct tp_layer {
    tp_buf text;
    tp_run *runs; /* closed by one that marks the end */
    size_t n_runs, capacity;
    size_t from_end; /* end of what has been consumed below */
    size_t near;     /* the run that was looked up last: places are mostly asked for in order */
    size_t room;     /* bytes that may still be written */
    bool copying;    /* the last run copies byte for byte */
    bool overfull;   /* more was to be written; reported by tp_layers_close */
    bool failed;     /* an allocation failed; likewise */
} tp_layer;

#define TP_LAYERS_GROWTH 64   /* bytes that layers may have for each byte of the stretch */
#define TP_LAYERS_BASE   4096 /* and for the stretch as such */

/* A stretch of the original and the layers above it. Zero-initialised is empty; memory is kept until tp_layers_free. */
typedef struct tp_layers {
    const char *text; /* borrowed */
    size_t n;
    size_t base;     /* offset of text in the original */
    size_t room;     /* bytes that layers may still be written with */
    uint64_t budget; /* of the regexes (data/regex.h), for the caller to set; only he knows the whole text */
    tp_layer *items;
    size_t count, capacity, ready; /* layers in use; allocated; initialised */
} tp_layers;

TP_API void tp_layers_free(tp_layers *layers);
/* Drops all layers and starts over with text[0..n), which begins at byte `base` of the original. */
TP_API void tp_layers_start(tp_layers *layers, const char *text, size_t n, size_t base);
/* The text of the uppermost layer. */
TP_API tp_span tp_layers_top(const tp_layers *layers);
/* Drops the layers above `count`. */
TP_API void tp_layers_cut(tp_layers *layers, size_t count);

/* Opens a layer that will be written from byte `from` of tp_layers_top on. Until tp_layers_close the top is still the
 * text below. *layer is valid until the next tp_layers_open. */
TP_API tp_status tp_layers_open(tp_ctx *ctx, tp_layers *layers, size_t from, tp_layer **layer) TP_MUST_CHECK;
/* Appends `n` bytes that are equal to those at `from` below. */
TP_API void tp_layer_keep(tp_layer *layer, const char *bytes, size_t n, size_t from);
/* Appends `n` bytes that stand for the `from_n` bytes at `from` below; either may be 0. */
TP_API void tp_layer_replace(tp_layer *layer, const char *bytes, size_t n, size_t from, size_t from_n);
/* Makes the open layer the top. */
TP_API tp_status tp_layers_close(tp_ctx *ctx, tp_layers *layers, size_t from_end) TP_MUST_CHECK;

/* Bytes of the original that top[*begin, *end) stands for. */
TP_API void tp_layers_origin(tp_layers *layers, size_t *begin, size_t *end);

#ifdef __cplusplus
}
#endif
#endif
