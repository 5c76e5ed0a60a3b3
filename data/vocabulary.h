/* Token texts and their ids. */
#ifndef TP_DATA_VOCABULARY_H
#define TP_DATA_VOCABULARY_H

#include "base/map.h"
#include "base/status.h"
#include "base/text.h"

#ifdef __cplusplus
extern "C" {
#endif

#define TP_VOCABULARY_MAX (INT32_C(1) << 22) /* ids stay below */

typedef struct tp_vocabulary {
    tp_span *tokens; /* by id; data is NULL where no token has the id */
    size_t size;     /* highest id + 1 */
    size_t count;    /* ids in use */
    size_t capacity; /* of tokens */
    size_t limit;    /* ids must be smaller */
    size_t longest;  /* bytes of the longest text */
    tp_map *ids;     /* text -> id of the model's tokens; keys borrowed from `bytes` */
    tp_map *added;   /* the same for tokens that the model does not know */
    char *bytes;     /* all texts, a NUL behind each */
    size_t n_bytes, max_bytes;
} tp_vocabulary;

/* Room for at most max_count tokens of max_bytes together (without their NULs): texts never move. */
TP_API tp_status tp_vocabulary_init(tp_ctx *ctx, tp_vocabulary *vocabulary, size_t max_count, size_t max_bytes) TP_MUST_CHECK;
TP_API void tp_vocabulary_free(tp_vocabulary *vocabulary);

/* A token of the model, or with `added` one beyond it. Refuses (FORMAT) an id that is negative, TP_VOCABULARY_MAX or more, four
 * times the announced count or more, or taken, and a text that is there already. `where` goes in front of messages. */
TP_API tp_status tp_vocabulary_add(tp_ctx *ctx, tp_vocabulary *vocabulary, const char *where, tp_span text, int64_t id,
                                   bool added) TP_MUST_CHECK;

/* Id of a text among the model's tokens, or among all; -1 if there is none. */
TP_API int32_t tp_vocabulary_find(const tp_vocabulary *vocabulary, tp_span text);
TP_API int32_t tp_vocabulary_find_any(const tp_vocabulary *vocabulary, tp_span text);
/* Text of an id; data is NULL if there is none. */
static inline tp_span tp_vocabulary_text(const tp_vocabulary *vocabulary, int64_t id)
{
    return id >= 0 && (uint64_t)id < vocabulary->size ? vocabulary->tokens[id] : (tp_span){NULL, 0};
}

#ifdef __cplusplus
}
#endif
#endif
