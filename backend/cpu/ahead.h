/* What will be read next. Decoding runs through the same matrices in the same order for every token; between two products,
 * while one thread does what little lies between them, the others have nothing to do. They fetch the beginning of what was
 * read next the last time. That is a guess and a hint: right or wrong, results do not change. */
#ifndef TP_BACKEND_CPU_AHEAD_H
#define TP_BACKEND_CPU_AHEAD_H

#include "backend/cpu/threads.h"

typedef struct tp_cpu_ahead tp_cpu_ahead;

/* Memory that is read in chunks, of which thread i of `lanes` takes those from i * chunks / lanes on; before them, piece i
 * of `first`. */
typedef struct tp_cpu_stretch {
    const unsigned char *data;
    int64_t chunk_bytes, chunks, lanes;
    const unsigned char *first;
    int64_t first_bytes, first_pieces; /* bytes of a piece; the last may be shorter. 0 pieces: none */
} tp_cpu_stretch;

tp_cpu_ahead *tp_cpu_ahead_new(tp_ctx *ctx) TP_MUST_CHECK; /* NULL with NOMEM recorded */
/* Accepts NULL. Free the pool first: its threads may be fetching. */
void tp_cpu_ahead_free(tp_cpu_ahead *ahead);
/* `now` will be read: threads of the pool that are done with it may fetch what followed it. */
void tp_cpu_ahead_begins(tp_cpu_ahead *ahead, tp_threads *pool, const tp_cpu_stretch *now);

#endif
