/* Host memory: checked allocation and checked size arithmetic.
 *
 * All library code allocates through here: sizes are products of untrusted numbers, so every
 * product is checked, and a failure is a status with a message, never a crash. Memory from
 * these functions is released with tp_free (which accepts NULL). */
#ifndef TP_BASE_MEM_H
#define TP_BASE_MEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* `count` zeroed objects of `size` bytes, or NULL with NOMEM recorded in ctx (which may be
 * NULL). A count of 0 gives a valid pointer. */
TP_API void *tp_alloc(tp_ctx *ctx, size_t count, size_t size) TP_MUST_CHECK;

/* Like tp_alloc without the zeroing. */
TP_API void *tp_alloc_raw(tp_ctx *ctx, size_t count, size_t size) TP_MUST_CHECK;

/* Grows *array (may be NULL) so that it holds at least `need` objects of `size` bytes, doubling
 * *capacity. On failure *array stays as it was and is still owned by the caller. New objects
 * are not initialised. */
TP_API tp_status tp_grow(tp_ctx *ctx, void *array, size_t *capacity, size_t need, size_t size) TP_MUST_CHECK;

/* Zeroed memory aligned to 64 bytes, for vectors; released with tp_free. */
TP_API void *tp_alloc_aligned(tp_ctx *ctx, size_t bytes) TP_MUST_CHECK;

/* Copy of n bytes with a NUL behind them. */
TP_API char *tp_strndup(tp_ctx *ctx, const char *text, size_t n) TP_MUST_CHECK;
TP_API char *tp_strdup(tp_ctx *ctx, const char *text) TP_MUST_CHECK;

TP_API void tp_free(void *memory);

/* *result = a * b and a + b; false if it does not fit. */
static inline bool tp_mul_size(size_t a, size_t b, size_t *result)
{
    return !__builtin_mul_overflow(a, b, result);
}
static inline bool tp_add_size(size_t a, size_t b, size_t *result)
{
    return !__builtin_add_overflow(a, b, result);
}
static inline bool tp_mul_i64(int64_t a, int64_t b, int64_t *result)
{
    return !__builtin_mul_overflow(a, b, result);
}
static inline bool tp_add_i64(int64_t a, int64_t b, int64_t *result)
{
    return !__builtin_add_overflow(a, b, result);
}

#ifdef __cplusplus
}
#endif
#endif
