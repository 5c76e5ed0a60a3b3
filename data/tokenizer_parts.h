/* What a tokenizer is made of. For the files that build one (tokenizer_json.c, tokenizer_config.c, tokenizer_gguf.c) and the
 * one that runs it (tokenizer.c). */
#ifndef TP_DATA_TOKENIZER_PARTS_H
#define TP_DATA_TOKENIZER_PARTS_H

#include "base/json.h"
#include "data/added_tokens.h"
#include "data/bpe.h"
#include "data/decode.h"
#include "data/normalize.h"
#include "data/postprocess.h"
#include "data/pretokenize.h"
#include "data/tokenizer.h"
#include "data/vocabulary.h"

/* A kind of model: how it is read from tokenizer.json and how it works. A new kind is a new row of tp_token_models. */
typedef struct tp_token_model {
    const char *type; /* model.type */
    /* How many tokens load will put into the vocabulary, and the bytes of their texts. */
    tp_status (*measure)(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *model, size_t *count, size_t *bytes);
    /* Fills vocabulary, model_state and fingerprint; the pre-tokenizer is complete. */
    tp_status (*load)(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *model, tp_tokenizer *tokenizer);
    /* Appends the tokens of the piece text[begin, end). */
    tp_status (*encode)(tp_ctx *ctx, const void *state, struct tp_encode_scratch *scratch, const char *text, size_t begin,
                        size_t end, tp_tokens *out);
    void (*free)(void *state);
} tp_token_model;

extern const tp_token_model tp_bpe_model;

typedef struct tp_named_text {
    char *name, *text;
    size_t n; /* bytes of text */
} tp_named_text;

typedef struct tp_named_texts {
    tp_named_text *items;
    size_t count, capacity;
} tp_named_texts;

#define TP_ROLES 4

struct tp_tokenizer {
    char *name;                   /* file, for messages */
    tp_vocabulary vocabulary;     /* the model's tokens and the added ones */
    uint8_t *special;             /* by id: dropped with skip_special */
    tp_added_set raw, normalized; /* added tokens, by the text they are looked for in */
    tp_normalizer normalizer;
    tp_pretokenizer pretokenizer;
    const tp_token_model *model;
    void *model_state;
    tp_postprocessor post;
    tp_decoder decoder;
    int32_t roles[TP_ROLES]; /* by tp_token_role */
    tp_named_texts named, templates;
    uint64_t fingerprint; /* of the vocabulary and merges: caches of words are valid for one */
    char identity[65];    /* of everything that was read */
};

/* Memory of one encoding thread, kept in its tp_tokens. */
struct tp_encode_scratch {
    uint64_t fingerprint; /* of the tokenizer that filled the caches */
    tp_layers layers;
    tp_segments raw, normalized;
    tp_pieces pieces;
    tp_normalize_scratch normalize;
    tp_bpe_scratch bpe;
};

/* A tokenizer without parts: roles are -1. */
tp_status tp_tokenizer_new(tp_ctx *ctx, const char *name, tp_tokenizer **tokenizer) TP_MUST_CHECK;
/* Folds what was read from a file (or metadata value) of this name into the identity. */
void tp_tokenizer_identify(tp_tokenizer *tokenizer, const char *name, const void *bytes, size_t n);
/* Registers an added token whose id is in the vocabulary already. Its content is normalized if the flag says so, hence
 * after the normalizer is complete. */
tp_status tp_tokenizer_add_token(tp_ctx *ctx, tp_tokenizer *tokenizer, const tp_added_token *token) TP_MUST_CHECK;
/* Completes a tokenizer whose parts are set. */
tp_status tp_tokenizer_finish(tp_ctx *ctx, tp_tokenizer *tokenizer) TP_MUST_CHECK;
tp_status tp_named_texts_add(tp_ctx *ctx, tp_named_texts *list, tp_span name, tp_span text) TP_MUST_CHECK;

/* The four pipelines of tokenizer.json; a NULL or null value adds nothing. */
tp_status tp_read_normalizer(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *value, tp_normalizer *out) TP_MUST_CHECK;
tp_status tp_read_pretokenizer(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *value, tp_pretokenizer *out) TP_MUST_CHECK;
tp_status tp_read_decoder(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *value, tp_decoder *out) TP_MUST_CHECK;
tp_status tp_read_postprocessor(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *value, const tp_vocabulary *vocabulary,
                                tp_postprocessor *out) TP_MUST_CHECK;

/* Reads tokenizer_config.json, special_tokens_map.json and chat_template.jinja of a folder into an otherwise complete
 * tokenizer. */
tp_status tp_read_tokenizer_config(tp_ctx *ctx, const char *folder, tp_tokenizer *tokenizer) TP_MUST_CHECK;

#endif
