/* Two directions: an array by id, a hash map by text. No array is sized by an id before the id is checked. */
#include "data/vocabulary.h"

#include "base/mem.h"

tp_status tp_vocabulary_init(tp_ctx *ctx, tp_vocabulary *v, size_t max_count, size_t max_bytes)
{
    *v = (tp_vocabulary){0};
    if (max_count > TP_VOCABULARY_MAX)
        return tp_fail(ctx, TP_FORMAT, "the vocabulary has %zu tokens, at most %d are supported", max_count, TP_VOCABULARY_MAX);
    if (!tp_add_size(max_bytes, max_count, &v->max_bytes)) return tp_fail(ctx, TP_FORMAT, "the vocabulary is too long");
    v->limit = 4 * max_count < TP_VOCABULARY_MAX ? 4 * max_count : TP_VOCABULARY_MAX;
    v->bytes = tp_alloc_raw(ctx, v->max_bytes, 1);
    v->ids = v->bytes != NULL ? tp_map_new(ctx, true) : NULL;
    v->added = v->ids != NULL ? tp_map_new(ctx, true) : NULL;
    tp_status status = v->added != NULL ? tp_map_reserve(ctx, v->ids, max_count) : TP_NOMEM;
    if (status != TP_OK) tp_vocabulary_free(v);
    return status;
}

void tp_vocabulary_free(tp_vocabulary *v)
{
    tp_map_free(v->ids);
    tp_map_free(v->added);
    tp_free(v->bytes);
    tp_free(v->tokens);
    *v = (tp_vocabulary){0};
}

static tp_status make_room(tp_ctx *ctx, tp_vocabulary *v, size_t size)
{
    if (size <= v->size) return TP_OK;
    TP_TRY(tp_grow(ctx, &v->tokens, &v->capacity, size, sizeof *v->tokens));
    memset(v->tokens + v->size, 0, (size - v->size) * sizeof *v->tokens);
    v->size = size;
    return TP_OK;
}

tp_status tp_vocabulary_add(tp_ctx *ctx, tp_vocabulary *v, const char *where, tp_span text, int64_t id, bool added)
{
    bool known;
    int shown = (int)(text.len < 100 ? text.len : 100);
    if (id < 0 || (uint64_t)id >= v->limit)
        return tp_fail(ctx, TP_FORMAT, "%s: token \"%.*s\" has id %lld, expected 0 to %zu (four times the number of tokens)",
                       where, shown, text.data, (long long)id, v->limit == 0 ? 0 : v->limit - 1);
    TP_TRY(make_room(ctx, v, (size_t)id + 1));
    if (v->tokens[id].data != NULL)
        return tp_fail(ctx, TP_FORMAT, "%s: tokens \"%.*s\" and \"%.*s\" both have id %lld", where,
                       (int)(v->tokens[id].len < 100 ? v->tokens[id].len : 100), v->tokens[id].data, shown, text.data,
                       (long long)id);
    if (text.len >= v->max_bytes - v->n_bytes) return tp_fail(ctx, TP_INTERNAL, "%s: vocabulary larger than announced", where);
    char *own = v->bytes + v->n_bytes;
    if (text.len > 0) memcpy(own, text.data, text.len);
    own[text.len] = '\0';
    TP_TRY(tp_map_put(ctx, added ? v->added : v->ids, (tp_span){own, text.len}, id, &known));
    if (known) return tp_fail(ctx, TP_FORMAT, "%s: token \"%.*s\" appears twice", where, shown, text.data);
    v->n_bytes += text.len + 1;
    v->tokens[id] = (tp_span){own, text.len};
    v->count++;
    if (text.len > v->longest) v->longest = text.len;
    return TP_OK;
}

int32_t tp_vocabulary_find(const tp_vocabulary *v, tp_span text)
{
    int64_t id;
    if (text.len > v->longest || !tp_map_get(v->ids, text, &id)) return -1;
    return (int32_t)id;
}

int32_t tp_vocabulary_find_any(const tp_vocabulary *v, tp_span text)
{
    int64_t id;
    return tp_map_get(v->added, text, &id) ? (int32_t)id : tp_vocabulary_find(v, text);
}
