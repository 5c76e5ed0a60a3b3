/* Tokens of a text data set, kept on disk for the next run (cache_dir): that run neither renders nor encodes nor masks, it
 * reads ids and labels.
 *
 *   <cache_dir>/tokens-<key>/
 *     rows.bin       where the rules of each file came from, the rows, the draws: what the index holds, as it lies in memory
 *     tokens.bin     u32 little-endian: ids of the rows that are learned from, one row behind the other; bit 31: a label
 *     manifest.json  counts, and length and SHA-256 of both
 *
 * The key is a SHA-256 over everything that tokens, labels and draws depend on: the version of tapeft and its code in
 * data/, the tokenizer's identity, the template, every byte of every file, and the options of the recipe that shape rows. Seed,
 * batch size, order and packing are not among them. A folder appears all at once (base/file.h, publish), so runs may share
 * cache_dir. One whose files are not what its manifest says, or that cannot be what it claims, is made again with a note.
 * Whatever goes wrong with the cache is a warning, and the run goes on from the text: only lack of memory is a failure. Folders
 * may be removed at any time.
 *
 * For data/ only. */
#ifndef TP_DATA_TOKEN_CACHE_H
#define TP_DATA_TOKEN_CACHE_H

#include "data/dataset_text.h"

typedef struct tp_token_cache tp_token_cache;

/* The files of `d` are open. *remembered: rows, draws, counts, findings and what chose the rules are filled in from the cache.
 * Otherwise d->cache collects what is added, if `keep`, or is NULL. */
tp_status tp_token_cache_open(tp_ctx *ctx, struct text_dataset *d, bool keep, bool *remembered) TP_MUST_CHECK;

/* ---- collecting; a NULL cache is fine ---- */
/* Tokens [first, first + n) of `encoded`: a row that is learned from. They count once accepted. */
tp_status tp_token_cache_add(tp_ctx *ctx, tp_token_cache *cache, const tp_encoded *encoded, size_t first,
                             size_t n) TP_MUST_CHECK;
void tp_token_cache_accept(tp_ctx *ctx, tp_token_cache *cache);
void tp_token_cache_reject(tp_token_cache *cache);
/* After the last row. */
tp_status tp_token_cache_publish(tp_ctx *ctx, struct text_dataset *d) TP_MUST_CHECK;

/* ---- reading; a NULL cache is fine ---- */
/* ids and labels [row->tokens] of a row, until the next call; *ids is NULL where they have to come from the text. */
tp_status tp_token_cache_read(tp_ctx *ctx, tp_token_cache *cache, const struct text_dataset *d, uint32_t row,
                              const int32_t **ids, const int32_t **labels) TP_MUST_CHECK;
void tp_token_cache_close(tp_token_cache *cache);

#endif
