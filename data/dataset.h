/* Data sets: files of rows in, micro-batches of tokens out, any of them at any time.
 *
 * A data set is opened once: its rows are indexed (offset, length in tokens, labels), malformed or over-long rows are dealt
 * with as the recipe says, and from then on micro-batch i of epoch e is a pure function of (seed, e, i). A run therefore
 * resumes exactly from two integers, files may be larger than memory, and nothing depends on time or threads.
 *
 *   completion, instruction, chat   JSONL, CSV (or .txt): rendered, encoded, masked as recipes.md section 4 says
 *   tokens                          safetensors of ready micro-batches, in order unless shuffled
 *
 * With config->cache_dir the tokens of text are kept on disk (data/token_cache.h): the next run neither renders nor encodes.
 */
#ifndef TP_DATA_DATASET_H
#define TP_DATA_DATASET_H

#include "base/status.h"
#include "base/text.h"
#include "data/prompt.h"
#include "data/template.h"
#include "data/tokenizer.h"
#include "recipes/keys.h"

#include "autograd/batch.h"

/* One micro-batch in host memory, rows concatenated without padding (a tp_batch once copied to the device). */
typedef struct tp_host_batch {
    int64_t n, n_segments, n_labels, n_tokens, max_position;
    int32_t *ids, *positions;     /* [n] */
    tp_segment *segments;         /* [n_segments] */
    int32_t *label_rows, *labels; /* [n_labels]: row whose output predicts the label */
    bool any_segments;            /* filled up to a size that batches of other segments share (trainers/replay.h) */
    size_t capacity;              /* rows the arrays hold; they grow as needed */
} tp_host_batch;
TP_API void tp_host_batch_free(tp_host_batch *batch);
/* Rows without a token and labels without a value behind the others, until there are so many. */
TP_API tp_status tp_host_batch_fill(tp_ctx *ctx, tp_host_batch *batch, int64_t rows, int64_t labels) TP_MUST_CHECK;
/* The same as tp_batch_upload takes it: borrowed host memory. */
TP_API tp_batch tp_host_batch_view(const tp_host_batch *batch);

typedef struct tp_dataset_options {
    const tp_data_config *config;
    bool held_out;                 /* test_datasets and the val_set_size share instead of the training rows */
    const tp_tokenizer *tokenizer; /* NULL if every data set is of type tokens */
    int64_t max_positions;         /* the model's */
    int64_t vocab_size;            /* rows of the embedding: every id is checked against it */
    int64_t micro_batch_size;
    bool micro_batch_size_given; /* the recipe sets it: then ready tokens must agree */
    int64_t max_length;          /* effective max_seq_length */
    bool shows;                  /* for tp_dataset_preview alone: what speaks against the rows as a whole is a warning */
    bool keeps_tokens;           /* config->cache_dir is written where it lacks the tokens; otherwise it is only read */
    uint64_t seed;
    const char *(*where)(void *state, const char *key); /* file:line:column of a recipe key for messages; may be NULL */
    void *where_state;
} tp_dataset_options;

typedef struct tp_dataset_counts {
    int64_t rows_read, rows_used, rows_dropped, rows_bad, tokens, labels, longest_row;
} tp_dataset_counts;

typedef struct tp_dataset tp_dataset;
/* FORMAT with file:line:column for malformed rows (on_bad_row: error), for too many dropped rows, and for what the preflight
 * refuses: BOS twice, an end token never trained, all rows masked, ids beyond the embedding. *dataset is NULL where
 * `held_out` and the recipe names no held-out data. */
TP_API tp_status tp_dataset_open(tp_ctx *ctx, const tp_dataset_options *options, tp_dataset **dataset) TP_MUST_CHECK;
TP_API void tp_dataset_close(tp_dataset *dataset);
TP_API void tp_dataset_count(const tp_dataset *dataset, tp_dataset_counts *counts);
TP_API int64_t tp_dataset_micro_batches(const tp_dataset *dataset); /* per epoch */
/* Most rows of any micro-batch, and most labels: what buffers and the plan must hold. */
TP_API void tp_dataset_largest(const tp_dataset *dataset, int64_t *rows, int64_t *labels, int64_t *segments,
                               int64_t *longest_segment);
TP_API tp_status tp_dataset_get(tp_ctx *ctx, const tp_dataset *dataset, int64_t epoch, int64_t i,
                                tp_host_batch *batch) TP_MUST_CHECK;
/* SHA-256 over sizes and block hashes of the files, types and options that shape the batches: hex. */
TP_API const char *tp_dataset_fingerprint(const tp_dataset *dataset);
/* What the rows are rendered by; NULL where none is (completion, tokens). Borrowed. */
TP_API const tp_prompt *tp_dataset_prompt(const tp_dataset *dataset);
/* CHECKPOINT (exit 6) if a file is not what it was at open. */
TP_API tp_status tp_dataset_check(tp_ctx *ctx, const tp_dataset *dataset) TP_MUST_CHECK;

/* What training will see of row i in file order (preview). */
typedef struct tp_preview {
    const char *file;
    size_t line;
    tp_buf text;      /* rendered */
    tp_tokens tokens; /* ids and byte offsets */
    int32_t *labels;  /* [tokens.n], -100: no loss */
    bool dropped;
} tp_preview;
TP_API tp_status tp_dataset_preview(tp_ctx *ctx, const tp_dataset *dataset, int64_t row, tp_preview *preview) TP_MUST_CHECK;
TP_API void tp_preview_free(tp_preview *preview);

#endif
