/* Bump allocator: a list of chunks, newest first. Under AddressSanitizer every object is followed by a poisoned red zone. */
#include "base/arena.h"

#include <stdint.h>
#include <string.h>

#include "base/mem.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define RED_ZONE 16
#else
#define RED_ZONE                                   0
#define ASAN_POISON_MEMORY_REGION(address, size)   ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

struct tp_arena_chunk {
    struct tp_arena_chunk *older;
    size_t used, size;
    _Alignas(16) unsigned char bytes[];
};

void tp_arena_init(tp_arena *arena, size_t chunk_bytes)
{
    *arena = (tp_arena){.chunk_bytes = chunk_bytes};
}

static struct tp_arena_chunk *new_chunk(tp_ctx *ctx, tp_arena *arena, size_t need)
{
    size_t size = arena->chunk_bytes > need ? arena->chunk_bytes : need, bytes;
    if (!tp_add_size(size, sizeof(struct tp_arena_chunk), &bytes)) {
        tp_fail(ctx, TP_NOMEM, "out of memory: %zu bytes", need);
        return NULL;
    }
    struct tp_arena_chunk *chunk = tp_alloc_raw(ctx, 1, bytes);
    if (chunk == NULL) return NULL;
    *chunk = (struct tp_arena_chunk){.older = arena->chunk, .size = size};
    ASAN_POISON_MEMORY_REGION(chunk->bytes, size);
    arena->chunk = chunk;
    return chunk;
}

void *tp_arena_alloc(tp_ctx *ctx, tp_arena *arena, size_t count, size_t size)
{
    size_t bytes, need;
    if (!tp_mul_size(count, size, &bytes) || !tp_add_size(bytes, 15 + RED_ZONE, &need)) {
        tp_fail(ctx, TP_NOMEM, "out of memory: %zu x %zu bytes", count, size);
        return NULL;
    }
    need &= ~(size_t)15;
    struct tp_arena_chunk *chunk = arena->chunk;
    if (chunk == NULL || chunk->size - chunk->used < need) chunk = new_chunk(ctx, arena, need);
    if (chunk == NULL) return NULL;
    unsigned char *object = chunk->bytes + chunk->used;
    chunk->used += need;
    ASAN_UNPOISON_MEMORY_REGION(object, bytes);
    return memset(object, 0, bytes);
}

char *tp_arena_strndup(tp_ctx *ctx, tp_arena *arena, const char *text, size_t n)
{
    size_t bytes;
    if (!tp_add_size(n, 1, &bytes)) return NULL;
    char *copy = tp_arena_alloc(ctx, arena, bytes, 1);
    if (copy != NULL && n > 0) memcpy(copy, text, n);
    return copy;
}

static void free_chunks(struct tp_arena_chunk *chunk)
{
    while (chunk != NULL) {
        struct tp_arena_chunk *older = chunk->older;
        ASAN_UNPOISON_MEMORY_REGION(chunk->bytes, chunk->size);
        tp_free(chunk);
        chunk = older;
    }
}

void tp_arena_reset(tp_arena *arena)
{
    if (arena->chunk == NULL) return;
    free_chunks(arena->chunk->older);
    arena->chunk->older = NULL;
    arena->chunk->used = 0;
    ASAN_POISON_MEMORY_REGION(arena->chunk->bytes, arena->chunk->size);
}

void tp_arena_free(tp_arena *arena)
{
    free_chunks(arena->chunk);
    arena->chunk = NULL;
}
