/* The growing list of tokens that an encoding fills. */
#ifndef TP_DATA_TOKENS_H
#define TP_DATA_TOKENS_H

#include "base/status.h"

#ifdef __cplusplus
extern "C" {
#endif

#define TP_ADDED_TOKEN_MAX 1024 /* bytes an added token may have: bounds the time per place */

typedef struct tp_token {
    int32_t id;
    int32_t type_id;   /* 0; for pairs what the tokenizer says, usually 1 for the second text */
    size_t begin, end; /* bytes of the original text it stands for; equal for what was inserted */
} tp_token;

struct tp_encode_scratch; /* working memory and word cache, kept for the next text */

/* Zero-initialised is empty. Reuse one for many texts: its memory and its cache of words make that faster. Belongs to
 * one thread at a time. */
typedef struct tp_tokens {
    tp_token *items;
    size_t count, capacity;
    struct tp_encode_scratch *scratch;
} tp_tokens;

TP_API void tp_tokens_free(tp_tokens *tokens);
TP_API tp_status tp_tokens_push(tp_ctx *ctx, tp_tokens *tokens, tp_token token) TP_MUST_CHECK;

#ifdef __cplusplus
}
#endif
#endif
