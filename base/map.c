/* Hash map in insertion order: entries stand in one array as they came, and an open-addressing table of entry
 * numbers finds them (linear probing, at most three quarters full). Nothing is ever removed, so a probe may stop at
 * the first empty slot. */
#include "base/map.h"

#include <sys/auxv.h>

#include "base/mem.h"

#define MAX_ENTRIES   0x7fffffffu
#define KEY_POOL_SIZE 65536u

typedef struct entry {
    const char *key;
    size_t key_bytes;
    int64_t value;
    uint64_t hash;
} entry;

typedef struct key_pool {
    struct key_pool *next;
    size_t used, size;
    char bytes[];
} key_pool;

struct tp_map {
    entry *entries;
    size_t count, capacity;
    uint32_t *slots; /* entry number + 1, or 0 */
    size_t n_slots;  /* a power of two, or 0 */
    bool keys_borrowed;
    key_pool *pool; /* copies of keys, newest first */
};

/* ---- hash ---- */

static uint64_t rotate(uint64_t x, int bits)
{
    return x << bits | x >> (64 - bits);
}

#define SIP_ROUND                                                                                                              \
    do {                                                                                                                       \
        a += b, b = rotate(b, 13) ^ a, a = rotate(a, 32);                                                                      \
        c += d, d = rotate(d, 16) ^ c;                                                                                         \
        a += d, d = rotate(d, 21) ^ a;                                                                                         \
        c += b, b = rotate(b, 17) ^ c, c = rotate(c, 32);                                                                      \
    } while (0)

uint64_t tp_siphash13(uint64_t key0, uint64_t key1, const void *bytes, size_t n)
{
    const unsigned char *p = bytes;
    uint64_t a = key0 ^ 0x736f6d6570736575u, b = key1 ^ 0x646f72616e646f6du; /* the constants of the paper */
    uint64_t c = key0 ^ 0x6c7967656e657261u, d = key1 ^ 0x7465646279746573u;
    uint64_t word;
    size_t left = n;
    for (; left >= 8; left -= 8, p += 8) {
        memcpy(&word, p, 8);
        d ^= word;
        SIP_ROUND;
        a ^= word;
    }
    word = (uint64_t)n << 56;
    for (size_t i = 0; i < left; i++) word |= (uint64_t)p[i] << (8 * i);
    d ^= word;
    SIP_ROUND;
    a ^= word;
    c ^= 0xff;
    SIP_ROUND;
    SIP_ROUND;
    SIP_ROUND;
    return a ^ b ^ c ^ d;
}

/* The kernel hands every process 16 random bytes; a key from there needs no state of ours and no call that can fail. */
uint64_t tp_hash(const void *bytes, size_t n)
{
    uint64_t key[2] = {0, 0};
    uintptr_t random = getauxval(AT_RANDOM);
    if (random != 0) memcpy(key, (const void *)random, sizeof key);
    return tp_siphash13(key[0], key[1], bytes, n);
}

/* ---- table ---- */

/* The slot of the key, or the empty slot where it belongs. */
static size_t find_slot(const tp_map *map, tp_span key, uint64_t hash)
{
    size_t mask = map->n_slots - 1, i = (size_t)hash & mask;
    for (; map->slots[i] != 0; i = (i + 1) & mask) {
        const entry *e = &map->entries[map->slots[i] - 1];
        if (e->hash == hash && tp_span_equal((tp_span){e->key, e->key_bytes}, key)) break;
    }
    return i;
}

static bool fits(size_t count, size_t n_slots)
{
    return count <= n_slots / 4 * 3;
}

tp_status tp_map_reserve(tp_ctx *ctx, tp_map *map, size_t count)
{
    if (count > MAX_ENTRIES) return tp_fail(ctx, TP_NOMEM, "map of %zu entries: at most %u are possible", count, MAX_ENTRIES);
    TP_TRY(tp_grow(ctx, &map->entries, &map->capacity, count, sizeof *map->entries));
    if (fits(count, map->n_slots)) return TP_OK;
    size_t n_slots = map->n_slots > 0 ? map->n_slots : 16;
    while (!fits(count, n_slots)) n_slots *= 2; /* at most 2^32, since count < 2^31 */
    uint32_t *slots = tp_alloc(ctx, n_slots, sizeof *slots);
    if (slots == NULL) return TP_NOMEM;
    for (size_t e = 0; e < map->count; e++) {
        size_t i = (size_t)map->entries[e].hash & (n_slots - 1);
        while (slots[i] != 0) i = (i + 1) & (n_slots - 1);
        slots[i] = (uint32_t)e + 1;
    }
    tp_free(map->slots);
    map->slots = slots;
    map->n_slots = n_slots;
    return TP_OK;
}

/* A copy of the key that lives as long as the map, or NULL. */
static const char *keep_key(tp_ctx *ctx, tp_map *map, tp_span key)
{
    if (map->keys_borrowed || key.len == 0) return key.len == 0 ? "" : key.data;
    key_pool *pool = map->pool;
    if (pool == NULL || pool->size - pool->used < key.len) {
        size_t size = key.len > KEY_POOL_SIZE ? key.len
                      : map->count < 64       ? (key.len > 1024 ? key.len : 1024)
                                              : KEY_POOL_SIZE,
               bytes;
        if (!tp_add_size(sizeof *pool, size, &bytes)) {
            tp_fail(ctx, TP_NOMEM, "out of memory: key of %zu bytes", key.len);
            return NULL;
        }
        pool = tp_alloc_raw(ctx, bytes, 1);
        if (pool == NULL) return NULL;
        *pool = (key_pool){.next = map->pool, .size = size};
        map->pool = pool;
    }
    char *copy = pool->bytes + pool->used;
    memcpy(copy, key.data, key.len);
    pool->used += key.len;
    return copy;
}

/* ---- public ---- */

tp_map *tp_map_new(tp_ctx *ctx, bool keys_borrowed)
{
    tp_map *map = tp_alloc(ctx, 1, sizeof *map);
    if (map != NULL) map->keys_borrowed = keys_borrowed;
    return map;
}

void tp_map_free(tp_map *map)
{
    if (map == NULL) return;
    while (map->pool != NULL) {
        key_pool *next = map->pool->next;
        tp_free(map->pool);
        map->pool = next;
    }
    tp_free(map->entries);
    tp_free(map->slots);
    tp_free(map);
}

size_t tp_map_count(const tp_map *map)
{
    return map->count;
}

tp_status tp_map_put(tp_ctx *ctx, tp_map *map, tp_span key, int64_t value, bool *replaced)
{
    TP_TRY(tp_map_reserve(ctx, map, map->count + 1));
    uint64_t hash = tp_hash(key.data, key.len);
    size_t slot = find_slot(map, key, hash);
    bool present = map->slots[slot] != 0;
    if (replaced != NULL) *replaced = present;
    if (present) {
        map->entries[map->slots[slot] - 1].value = value;
        return TP_OK;
    }
    const char *kept = keep_key(ctx, map, key);
    if (kept == NULL) return TP_NOMEM;
    map->entries[map->count++] = (entry){.key = kept, .key_bytes = key.len, .value = value, .hash = hash};
    map->slots[slot] = (uint32_t)map->count;
    return TP_OK;
}

bool tp_map_get(const tp_map *map, tp_span key, int64_t *value)
{
    if (map->count == 0) return false;
    size_t slot = find_slot(map, key, tp_hash(key.data, key.len));
    if (map->slots[slot] == 0) return false;
    *value = map->entries[map->slots[slot] - 1].value;
    return true;
}

void tp_map_at(const tp_map *map, size_t i, tp_span *key, int64_t *value)
{
    const entry *e = &map->entries[i];
    *key = (tp_span){e->key, e->key_bytes};
    *value = e->value;
}
