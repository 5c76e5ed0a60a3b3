/* Byte-pair encoding: the model that joins characters, or bytes, into tokens.
 *
 *   1. Every character of a piece becomes the symbol of its token. One that has none becomes its bytes ("<0xE2>"), or
 *      the unknown token, or nothing, as the options say.
 *   2. The neighbours with the lowest rank become one symbol, the leftmost ones first among equals, until no pair has a
 *      rank.
 *
 * Short pieces are scanned for their best pair again and again; long ones keep a heap, so that ten million equal
 * characters take n log n steps. Words that were met before come from a cache of fixed size.
 * Sennrich et al. 2016, "Neural machine translation of rare words with subword units", arXiv:1508.07909. */
#ifndef TP_DATA_BPE_H
#define TP_DATA_BPE_H

#include "data/tokens.h"
#include "data/vocabulary.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tp_bpe_options {
    bool bytes;             /* pieces are raw bytes; token texts are written in the byte alphabet (data/byte_level.h) */
    bool byte_fallback;     /* unknown characters become <0x00> to <0xFF> where those exist */
    bool fuse_unk;          /* neighbouring unknown characters become one unknown token */
    bool ignore_merges;     /* a piece that is a token is that token, whether or not merges lead to it */
    bool late_fallback;     /* characters fall back to bytes only after merging, as SentencePiece does */
    bool cut_words;         /* set by tp_bpe_finish: pieces may be cut in front of U+2581 without changing the result */
    int32_t unk_id;         /* -1: none */
    tp_span missing_unk;    /* an unk_token that the vocabulary lacks: needing it is an error; data is NULL for none */
    tp_span prefix, suffix; /* continuing_subword_prefix, end_of_word_suffix; empty for most */
} tp_bpe_options;

typedef struct tp_bpe tp_bpe; /* immutable once finished; borrows the vocabulary */

/* Copies what the options point to. */
TP_API tp_status tp_bpe_new(tp_ctx *ctx, const tp_vocabulary *vocabulary, const tp_bpe_options *options, size_t max_merges,
                            tp_bpe **bpe) TP_MUST_CHECK;
TP_API void tp_bpe_free(tp_bpe *bpe);
/* The merge of two tokens, by text, with the next rank; the joined text must be a token. */
TP_API tp_status tp_bpe_add_merge(tp_ctx *ctx, tp_bpe *bpe, const char *where, tp_span left, tp_span right) TP_MUST_CHECK;
/* Every way to make token `id` from two others, all with the same rank: for vocabularies with scores. Characters that
 * are no tokens take part too. */
TP_API tp_status tp_bpe_add_token_merges(tp_ctx *ctx, tp_bpe *bpe, int32_t id, uint32_t rank) TP_MUST_CHECK;
/* Call once, after the merges. */
TP_API void tp_bpe_finish(tp_bpe *bpe);

/* Equal for models that cut every text alike: caches of words are valid for one. */
TP_API uint64_t tp_bpe_fingerprint(const tp_bpe *bpe);

/* Symbols, heap and word cache; zero-initialised is empty. Used with one model at a time: clear it for another. */
typedef struct tp_bpe_scratch {
    struct tp_bpe_symbol *symbols;
    size_t n_symbols, symbols_capacity;
    uint64_t *heap;
    size_t n_heap, heap_capacity;
    struct tp_bpe_word *cache;
    tp_buf text;
} tp_bpe_scratch;
TP_API void tp_bpe_scratch_free(tp_bpe_scratch *scratch);
TP_API void tp_bpe_scratch_clear(tp_bpe_scratch *scratch);

/* Appends the tokens of the piece text[begin, end); their places are bytes of `text`. */
TP_API tp_status tp_bpe_encode(tp_ctx *ctx, const tp_bpe *bpe, tp_bpe_scratch *scratch, const char *text, size_t begin,
                               size_t end, tp_tokens *out) TP_MUST_CHECK;

#ifdef __cplusplus
}
#endif
#endif
