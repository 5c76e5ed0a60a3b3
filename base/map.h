/* Hash map from byte strings to 64-bit integers (often an index into the caller's array).
 * Keyed SipHash-1-3 with a random key per process, so that hostile names cannot collide at will.
 * Iteration order is insertion order. */
#ifndef TP_BASE_MAP_H
#define TP_BASE_MAP_H

#include "base/status.h"
#include "base/text.h"

typedef struct tp_map tp_map;

/* SipHash-1-3 (Aumasson and Bernstein 2012, with 1 and 3 rounds) under the key of this process, and under a given key. */
TP_API uint64_t tp_hash(const void *bytes, size_t n);
TP_API uint64_t tp_siphash13(uint64_t key0, uint64_t key1, const void *bytes, size_t n);

/* keys_borrowed: keys stay where the caller has them and must outlive the map; else they are copied. */
TP_API tp_map *tp_map_new(tp_ctx *ctx, bool keys_borrowed) TP_MUST_CHECK;
TP_API void tp_map_free(tp_map *map);
TP_API size_t tp_map_count(const tp_map *map);
/* Room for `count` entries, so that the following puts do not grow step by step. */
TP_API tp_status tp_map_reserve(tp_ctx *ctx, tp_map *map, size_t count) TP_MUST_CHECK;
/* Sets key -> value; *replaced (may be NULL) says whether the key was there. */
TP_API tp_status tp_map_put(tp_ctx *ctx, tp_map *map, tp_span key, int64_t value, bool *replaced) TP_MUST_CHECK;
/* False if the key is absent; *value is then untouched. */
TP_API bool tp_map_get(const tp_map *map, tp_span key, int64_t *value);
/* Entry number i in insertion order. */
TP_API void tp_map_at(const tp_map *map, size_t i, tp_span *key, int64_t *value);

#endif
