/* A folder with a small tokenizer, a template and files of rows, and the options to open them as a data set. */
#ifndef TP_TESTS_DATASET_SUPPORT_H
#define TP_TESTS_DATASET_SUPPORT_H

#include "tests/scratch.h"

#include "base/mem.h"
#include "data/dataset.h"

/* ChatML as published models write it, without marks. */
#define CHATML_TEMPLATE                                                                                                        \
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}"

typedef struct fixture {
    tp_ctx ctx;
    scratch dir;
    tp_tokenizer *tokenizer; /* of golden/chat, eos <|im_end|>, bos <s> */
    tp_dataset_config blocks[2], test_block;
    tp_data_config config;
    tp_dataset_options options;
    char path[1024], last_key[64];
} fixture;

static inline const char *fixture_where(void *state, const char *key)
{
    fixture *f = state;
    snprintf(f->last_key, sizeof f->last_key, "%s", key);
    return "recipe.yaml:1:1";
}

static inline void write_file(fixture *f, const char *name, const char *text, size_t n)
{
    assert_ok(&f->ctx, tp_file_write(&f->ctx, scratch_path(&f->dir, name), text, n));
}

static inline void open_tokenizer(fixture *f, const char *config)
{
    char path[4096], *json;
    size_t n;
    assert_ok(&f->ctx, tp_file_read(&f->ctx, golden_path(path, sizeof path, "chat/tokenizer.json"), 1 << 24, &json, &n));
    write_file(f, "tokenizer.json", json, n);
    tp_free(json);
    write_file(f, "tokenizer_config.json", config, strlen(config));
    tp_tokenizer_free(f->tokenizer);
    assert_ok(&f->ctx, tp_tokenizer_open(&f->ctx, f->dir.folder, &f->tokenizer));
    f->options.tokenizer = f->tokenizer;
    f->options.vocab_size = (int64_t)tp_tokenizer_size(f->tokenizer);
}

static inline void fixture_begin(fixture *f)
{
    *f = (fixture){.ctx = {0}};
    tp_ctx_init(&f->ctx);
    scratch_begin(&f->dir);
    snprintf(f->path, sizeof f->path, "%s/rows.jsonl", f->dir.folder);
    f->blocks[0] = f->blocks[1] = f->test_block =
        (tp_dataset_config){.path = f->path, .split = "train", .type = TP_DATASET_AUTO, .weight = 1, .limit = TP_UNSET};
    f->config = (tp_data_config){
        .datasets = {f->blocks, 1}, .chat_template = "tokenizer_default", .max_dropped = 0.05, .shuffle = true};
    f->options = (tp_dataset_options){.config = &f->config,
                                      .max_positions = 1 << 20,
                                      .micro_batch_size = 2,
                                      .max_length = 512,
                                      .seed = 7,
                                      .where = fixture_where,
                                      .where_state = f};
    open_tokenizer(f, "{\"eos_token\": \"<|im_end|>\", \"bos_token\": \"<s>\", \"chat_template\": \"" CHATML_TEMPLATE "\"}");
}

static inline void fixture_end(fixture *f)
{
    tp_tokenizer_free(f->tokenizer);
    scratch_end(&f->dir);
}

static inline void write_rows(fixture *f, const char *text)
{
    write_file(f, "rows.jsonl", text, strlen(text));
}

static inline tp_dataset *open_rows(fixture *f)
{
    tp_dataset *data;
    assert_ok(&f->ctx, tp_dataset_open(&f->ctx, &f->options, &data));
    assert_non_null(data);
    return data;
}

/* n prompts and completions of differing lengths. */
static inline void write_pairs(fixture *f, int n)
{
    tp_buf text;
    tp_buf_init(&text, 0);
    for (int i = 0; i < n; i++) {
        tp_buf_printf(&text, "{\"prompt\": \"row %d\", \"completion\": \"", i);
        for (int k = 0; k < i % 13; k++) tp_buf_printf(&text, " %d", i * 31 + k);
        tp_buf_text(&text, "\"}\n");
    }
    write_file(f, "rows.jsonl", text.data, text.len);
    tp_buf_free(&text);
}

#endif
