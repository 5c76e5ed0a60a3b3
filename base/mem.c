/* Checked allocation. The only file that calls malloc and its kin. */
#define _POSIX_C_SOURCE 200809L
#include "base/mem.h"

#include <stdlib.h>
#include <string.h>

static void *failed(tp_ctx *ctx, size_t count, size_t size)
{
    tp_fail(ctx, TP_NOMEM, "out of memory: %zu x %zu bytes", count, size);
    return NULL;
}

void *tp_alloc(tp_ctx *ctx, size_t count, size_t size)
{
    if (count == 0 || size == 0) count = size = 1;
    void *memory = calloc(count, size); /* calloc checks the product */
    return memory != NULL ? memory : failed(ctx, count, size);
}

void *tp_alloc_raw(tp_ctx *ctx, size_t count, size_t size)
{
    size_t bytes;
    if (!tp_mul_size(count, size, &bytes)) return failed(ctx, count, size);
    void *memory = malloc(bytes > 0 ? bytes : 1);
    return memory != NULL ? memory : failed(ctx, count, size);
}

tp_status tp_grow(tp_ctx *ctx, void *array, size_t *capacity, size_t need, size_t size)
{
    if (need <= *capacity) return TP_OK;
    size_t count = *capacity < 8 ? 8 : *capacity, bytes;
    while (count < need) {
        if (!tp_mul_size(count, 2, &count)) return tp_fail(ctx, TP_NOMEM, "out of memory: %zu x %zu bytes", need, size);
    }
    if (!tp_mul_size(count, size, &bytes)) return tp_fail(ctx, TP_NOMEM, "out of memory: %zu x %zu bytes", need, size);
    void *old;
    memcpy(&old, array, sizeof old);
    void *grown = realloc(old, bytes);
    if (grown == NULL) return tp_fail(ctx, TP_NOMEM, "out of memory: %zu x %zu bytes", count, size);
    memcpy(array, &grown, sizeof grown);
    *capacity = count;
    return TP_OK;
}

void *tp_alloc_aligned(tp_ctx *ctx, size_t bytes)
{
    void *memory = NULL;
    if (bytes == 0) bytes = 1;
    if (posix_memalign(&memory, 64, bytes) != 0) return failed(ctx, bytes, 1);
    memset(memory, 0, bytes);
    return memory;
}

char *tp_strndup(tp_ctx *ctx, const char *text, size_t n)
{
    size_t bytes;
    if (!tp_add_size(n, 1, &bytes)) {
        failed(ctx, n, 1);
        return NULL;
    }
    char *copy = tp_alloc_raw(ctx, bytes, 1);
    if (copy == NULL) return NULL;
    if (n > 0) memcpy(copy, text, n);
    copy[n] = '\0';
    return copy;
}

char *tp_strdup(tp_ctx *ctx, const char *text)
{
    return tp_strndup(ctx, text, strlen(text));
}

void tp_free(void *memory)
{
    free(memory);
}
