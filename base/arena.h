/* Bump allocator for small host objects that die together (tape records, parse results). */
#ifndef TP_BASE_ARENA_H
#define TP_BASE_ARENA_H

#include "base/status.h"

typedef struct tp_arena {
    struct tp_arena_chunk *chunk; /* newest; NULL until the first allocation */
    size_t chunk_bytes;
} tp_arena;

TP_API void tp_arena_init(tp_arena *arena, size_t chunk_bytes);
/* Zeroed memory aligned to 16 bytes, valid until reset or free; NULL with NOMEM recorded. */
TP_API void *tp_arena_alloc(tp_ctx *ctx, tp_arena *arena, size_t count, size_t size) TP_MUST_CHECK;
TP_API char *tp_arena_strndup(tp_ctx *ctx, tp_arena *arena, const char *text, size_t n) TP_MUST_CHECK;
/* Forgets everything; keeps one chunk for the next round. */
TP_API void tp_arena_reset(tp_arena *arena);
TP_API void tp_arena_free(tp_arena *arena);

#endif
