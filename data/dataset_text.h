/* Inside of text data sets: what the index knows of each row. For data/dataset_text.c, dataset_index.c and token_cache.c. */
#ifndef TP_DATA_DATASET_TEXT_H
#define TP_DATA_DATASET_TEXT_H

#include "data/dataset_kind.h"
#include "data/formats.h"
#include "data/pack.h"
#include "data/rows.h"

/* A row, or a part of one that was split; what is needed to make its tokens again. */
struct text_row {
    uint64_t offset;
    uint32_t bytes, line, file;
    uint32_t block;          /* byte of the text where the block that holds the part begins */
    uint32_t first;          /* token of that block where the part begins */
    uint32_t tokens, labels; /* labels 0: dropped */
};

/* Which rows of a file belong to this data set. */
enum side { SIDE_ALL, SIDE_TRAINING, SIDE_HELD_OUT };

struct text_file {
    tp_row_file *rows;
    const tp_dataset_config *block;
    const char *list; /* recipe key the block stands in */
    enum side side;
    tp_row_rules rules;
    bool chosen;           /* the rules, by the first row */
    tp_row_place chose_by; /* that row; its text is gone */
};

/* What the pass over the files found besides rows, draws and counts. */
struct text_findings {
    int64_t too_long, masked;
    bool learns_end;
};

/* Working memory of one row, kept for the next. One thread at a time. */
struct text_scratch {
    char *line;
    size_t line_capacity;
    tp_sample sample;
    tp_encoded encoded;
};

struct text_dataset {
    tp_dataset base;
    const tp_data_config *config;
    const tp_tokenizer *tokenizer;
    int64_t max_length, vocab_size;
    uint64_t seed, batch_size;
    bool held_out;
    struct text_file *files;
    size_t n_files;
    tp_prompt prompt;
    bool prompt_open;
    struct text_row *rows; /* all that were read, in file order, dropped ones too */
    size_t n_rows, rows_capacity;
    uint32_t *draws; /* row numbers, each as often as an epoch draws it */
    size_t n_draws, draws_capacity;
    struct text_findings findings;
    struct tp_token_cache *cache; /* NULL: none */
    uint32_t *lengths;            /* [order.n] tokens of each draw, or of each pack */
    tp_packs packs;
    tp_order order;
    struct text_scratch *scratch;
};

/* Reads every row once and fills rows, draws and counts, with the checks that data/dataset.h names. The files are open. */
tp_status tp_text_index(tp_ctx *ctx, struct text_dataset *d, const tp_dataset_options *options) TP_MUST_CHECK;

/* The sample of a row's bytes, into the scratch; FORMAT with the place. The rules must have been chosen unless the file is
 * plain. */
tp_status tp_text_sample(tp_ctx *ctx, struct text_dataset *d, const struct text_file *file, tp_json_doc *doc,
                         tp_span bytes) TP_MUST_CHECK;
/* Where the block of a text that begins at `begin` ends. Long texts that are split are encoded block by block, so that a part
 * can be made again without all the rest; blocks end behind a line or a blank where there is one. */
size_t tp_text_block_end(const struct text_dataset *d, tp_span text, size_t begin);
bool tp_text_splits(const struct text_dataset *d);

#endif
