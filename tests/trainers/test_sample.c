/* Samples: they are what greedy decoding makes of the saved adapter, they change nothing else, and a run that was killed and
 * resumed has each of them once.
 *
 *   TAPEFT_KILLS      how often a run is killed at a random instant (default 12; with sanitizers 6)
 *   TAPEFT_KILL_SEED  of those instants (default 1) */
#include "tests/support.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include "adapters/adapter.h"
#include "base/mem.h"
#include "base/safetensors.h"
#include "data/source.h"
#include "inference/generate.h"
#include "tests/cli/process.h"
#include "tests/failing_malloc.h"
#include "tests/trainers/training.h"
#include "trainers/sample.h"

#if defined(__SANITIZE_ADDRESS__)
#define DEFAULT_KILLS 6
#define MALLOC_TRIES  20 /* each way of failing */
#else
#define DEFAULT_KILLS 12
#define MALLOC_TRIES  120
#endif

#define STEPS    12
#define EVERY    4
#define MAX_ROWS 256
#define MAX_TEXT 1024

static const char *const texts[] = {"the cat", "one", "a \"b\"\n"};
#define PROMPTS_KEY "sample_prompts: ['the cat', one, \"a \\\"b\\\"\\n\"]\n"
#define N_PROMPTS   (sizeof texts / sizeof *texts)

static const char chat_rows[] =
    "{\"messages\": [{\"role\": \"user\", \"content\": \"the cat\"}, {\"role\": \"assistant\", \"content\": \"and the "
    "hat\"}]}\n"
    "{\"messages\": [{\"role\": \"user\", \"content\": \"one\"}, {\"role\": \"assistant\", \"content\": \"two three\"}]}\n"
    "{\"messages\": [{\"role\": \"user\", \"content\": \"a \\\"b\\\"\\n\"}, {\"role\": \"assistant\", \"content\": \"b c "
    "d\"}]}\n";
static const char plain_rows[] =
    "{\"text\": \"the cat and the hat\"}\n{\"text\": \"one two three\"}\n{\"text\": \"a b c d\"}\n";

struct bench {
    tp_ctx ctx;
    scratch s;
    char base[1024], data[1024], out[1024], reference[1024], log[1024], recipe[1024];
};

static void bench_begin(struct bench *b)
{
    if (getenv("TMPDIR") == NULL && access("/dev/shm", W_OK) == 0) setenv("TMPDIR", "/dev/shm", 0);
    tp_ctx_init(&b->ctx);
    scratch_begin(&b->s);
    golden_path(b->base, sizeof b->base, "gguf/tiny_q4_0.gguf");
    snprintf(b->data, sizeof b->data, "%s", scratch_path(&b->s, "rows.jsonl"));
    snprintf(b->out, sizeof b->out, "%s", scratch_path(&b->s, "out"));
    snprintf(b->reference, sizeof b->reference, "%s", scratch_path(&b->s, "reference"));
    snprintf(b->log, sizeof b->log, "%s", scratch_path(&b->s, "log"));
    snprintf(b->recipe, sizeof b->recipe, "%s", scratch_path(&b->s, "recipe.yaml"));
}

static void bench_end(struct bench *b)
{
    if (b->ctx.device != NULL) tp_device_close(b->ctx.device);
    scratch_end(&b->s);
}

/* A run of STEPS steps with dropout, a shuffle and a checkpoint every EVERY steps, on rows of this type. */
static void recipe_text(struct bench *b, tp_buf *out, const char *type, const char *precision, const char *output,
                        const char *more)
{
    const char *rows = strcmp(type, "chat") == 0 ? chat_rows : plain_rows;
    if (strcmp(type, "tokens") != 0) assert_ok(&b->ctx, tp_file_write(&b->ctx, b->data, rows, strlen(rows)));
    tp_buf_clear(out);
    tp_buf_printf(out, "base_model: %s\nadapter: lora\nlora_r: 8\nlora_dropout: 0.1\nprecision: %s\nthreads: 1\n", b->base,
                  precision);
    tp_buf_printf(out, "device: cpu\ndatasets:\n  - {path: %s, type: %s}\n", b->data, type);
    tp_buf_printf(out, "max_steps: %d\nlearning_rate: 0.02\nsave_steps: %d\nsave_total_limit: 9\nsave_minutes: 0\n", STEPS,
                  EVERY);
    if (strcmp(type, "tokens") != 0) tp_buf_text(out, "max_seq_length: 64\n");
    tp_buf_printf(out, "output_dir: %s\noverwrite: true\n%s", output, more);
}

static void train_as(struct bench *b, const char *type, const char *precision, const char *output, const char *more)
{
    tp_buf text;
    tp_train_options options = {0};
    tp_buf_init(&text, 0);
    recipe_text(b, &text, type, precision, output, more);
    assert_ok(&b->ctx, train_recipe(&b->ctx, &b->s, tp_buf_cstr(&text), &options));
    tp_buf_free(&text);
}

/* ---- rows of samples.jsonl ---- */

struct row {
    int64_t step;
    char prompt[64], text[MAX_TEXT];
};

static void copy_string(char *out, size_t size, tp_span text)
{
    assert_true(text.data != NULL && text.len < size);
    memcpy(out, text.data, text.len);
    out[text.len] = '\0';
}

static size_t read_rows(struct bench *b, const char *folder, struct row *rows)
{
    char path[1200], *text;
    size_t length, n = 0;
    snprintf(path, sizeof path, "%s/samples.jsonl", folder);
    assert_ok(&b->ctx, tp_file_read(&b->ctx, path, (size_t)1 << 22, &text, &length));
    for (char *line = text, *end; (end = strchr(line, '\n')) != NULL; line = end + 1) {
        tp_json_doc *doc;
        tp_json_options options = {.name = path};
        assert_true(n < MAX_ROWS);
        assert_ok(&b->ctx, tp_json_parse(&b->ctx, line, (size_t)(end - line), &options, &doc));
        const tp_json *root = tp_json_root(doc);
        assert_int_equal(tp_json_count(root), 3);
        assert_true(tp_json_i64(tp_json_get(root, "step"), &rows[n].step));
        copy_string(rows[n].prompt, sizeof rows[n].prompt, tp_json_string(tp_json_get(root, "prompt")));
        copy_string(rows[n].text, sizeof rows[n].text, tp_json_string(tp_json_get(root, "text")));
        tp_json_free(doc);
        n++;
    }
    assert_true(length == 0 || text[length - 1] == '\n');
    tp_free(text);
    return n;
}

/* ---- the same by hand ---- */

static bool ends_reply(const tp_model *model, const tp_tokenizer *tokenizer, int32_t id)
{
    for (int i = 0; i < model->config.n_eos; i++)
        if (model->config.eos_ids[i] == id) return true;
    return id == tp_tokenizer_role(tokenizer, TP_TOKEN_EOS);
}

/* Every token from a pass over all tokens before it, without what a KV cache holds. */
static void decode_by_hand(struct bench *b, tp_model *model, const tp_tokenizer *tokenizer, const tp_tokens *prompt, char *out)
{
    int32_t ids[512];
    int64_t n = (int64_t)prompt->count, first = n;
    tp_generator *generator;
    tp_buf text;
    assert_ok(&b->ctx, tp_generator_open(&b->ctx, model, n + 64, &generator));
    for (int64_t i = 0; i < n; i++) ids[i] = prompt->items[i].id;
    for (; n < first + 64; n++) {
        float *logits;
        int32_t best = 0;
        tp_generator_reset(generator);
        assert_ok(&b->ctx, tp_generator_run(&b->ctx, generator, ids, n, &logits));
        for (int32_t i = 1; i < model->config.vocab_size; i++)
            if (logits[i] > logits[best]) best = i;
        ids[n] = best;
        if (ends_reply(model, tokenizer, best)) break;
    }
    tp_generator_close(generator);
    tp_buf_init(&text, 0);
    assert_ok(&b->ctx, tp_tokenizer_decode(&b->ctx, tokenizer, ids + first, (size_t)(n - first), true, &text));
    copy_string(out, MAX_TEXT, (tp_span){tp_buf_cstr(&text), text.len});
    tp_buf_free(&text);
}

/* The decode loop on a model and an adapter that were opened just now: nothing of an earlier step is left in them. */
static void decode_afresh(struct bench *b, tp_model *model, const tp_tokenizer *tokenizer, const tp_tokens *prompt, char *out)
{
    int32_t ids[512];
    int64_t ends[TP_MAX_ENDS];
    tp_generator *generator;
    tp_generated reply;
    tp_generate_options options = {.sampling = TP_SAMPLING_GREEDY, .max_tokens = 64, .eos_ids = ends};
    options.n_eos = tp_end_tokens(model, tokenizer, ends);
    for (size_t i = 0; i < prompt->count; i++) ids[i] = prompt->items[i].id;
    assert_ok(&b->ctx, tp_generator_open(&b->ctx, model, (int64_t)prompt->count + 64, &generator));
    assert_ok(&b->ctx, tp_generate(&b->ctx, generator, tokenizer, ids, prompt->count, &options, &reply));
    copy_string(out, MAX_TEXT, (tp_span){tp_buf_cstr(&reply.text), reply.text.len});
    tp_generated_free(&reply);
    tp_generator_close(generator);
}

/* What a row of the data has before its first label is the prompt: the rows of the chat data ask what the prompts ask. */
static void prompts_of_chat(struct bench *b, const tp_tokenizer *tokenizer, tp_tokens out[N_PROMPTS])
{
    tp_dataset *data;
    tp_dataset_config block = {.path = b->data, .split = "train", .type = TP_DATASET_CHAT, .weight = 1, .limit = TP_UNSET};
    tp_data_config config = {.datasets = {&block, 1}, .chat_template = "tokenizer_default", .max_dropped = 0.05};
    tp_dataset_options options = {.config = &config,
                                  .tokenizer = tokenizer,
                                  .max_positions = 64,
                                  .vocab_size = (int64_t)tp_tokenizer_size(tokenizer),
                                  .micro_batch_size = 1,
                                  .max_length = 64};
    assert_ok(&b->ctx, tp_dataset_open(&b->ctx, &options, &data));
    for (size_t p = 0; p < N_PROMPTS; p++) {
        tp_preview preview;
        assert_ok(&b->ctx, tp_dataset_preview(&b->ctx, data, (int64_t)p, &preview));
        for (size_t i = 0; i < preview.tokens.count && preview.labels[i] < 0; i++)
            assert_ok(&b->ctx, tp_tokens_push(&b->ctx, &out[p], preview.tokens.items[i]));
        assert_true(out[p].count > 0 && out[p].count < preview.tokens.count);
        tp_preview_free(&preview);
    }
    tp_dataset_close(data);
}

static void prompts_of_text(struct bench *b, const tp_tokenizer *tokenizer, tp_tokens out[N_PROMPTS])
{
    for (size_t p = 0; p < N_PROMPTS; p++)
        assert_ok(&b->ctx, tp_tokenizer_encode(&b->ctx, tokenizer, tp_span_of(texts[p]), TP_ENCODE_ADD_SPECIAL, &out[p]));
}

/* Rows of every EVERY steps are what the checkpoint of that step says: by hand in f32, where a pass over many rows and one over
 * a single row differ by rounding alone; in bf16, where they differ by more, by the same loop begun afresh. */
static void check_by_hand(const char *type, const char *precision)
{
    struct bench b;
    struct row rows[MAX_ROWS];
    tp_tokenizer *tokenizer;
    tp_tokens tokens[N_PROMPTS] = {{0}};
    char key[64], folder[1200], wanted[MAX_TEXT];
    size_t different = 0;
    bench_begin(&b);
    snprintf(key, sizeof key, PROMPTS_KEY "sample_steps: %d\n", EVERY);
    train_as(&b, type, precision, b.out, key);
    assert_int_equal(read_rows(&b, b.out, rows), N_PROMPTS * (STEPS / EVERY));
    assert_ok(&b.ctx, tp_device_open(&b.ctx, "cpu", 1, &b.ctx.device));
    assert_ok(&b.ctx, tp_tokenizer_for(&b.ctx, b.base, &tokenizer));
    if (strcmp(type, "chat") == 0)
        prompts_of_chat(&b, tokenizer, tokens);
    else
        prompts_of_text(&b, tokenizer, tokens);
    for (size_t i = 0; i < N_PROMPTS * (STEPS / EVERY); i++) {
        tp_model *model;
        tp_adapter *adapter;
        tp_model_options options = {.precision = strcmp(precision, "bf16") == 0 ? TP_BF16 : TP_F32};
        int64_t step = (int64_t)(i / N_PROMPTS + 1) * EVERY;
        assert_int_equal(rows[i].step, step);
        assert_string_equal(rows[i].prompt, texts[i % N_PROMPTS]);
        snprintf(folder, sizeof folder, "%s/ckpt-%lld", b.out, (long long)step);
        assert_ok(&b.ctx, tp_model_open(&b.ctx, b.base, &options, &model));
        assert_ok(&b.ctx, tp_adapter_open(&b.ctx, model, folder, false, &adapter));
        (options.precision == TP_F32 ? decode_by_hand : decode_afresh)(&b, model, tokenizer, &tokens[i % N_PROMPTS], wanted);
        assert_string_equal(rows[i].text, wanted);
        different += strcmp(rows[i].text, rows[0].text) != 0;
        tp_adapter_close(adapter);
        tp_model_free(model);
    }
    assert_true(different > 0); /* else a run that never samples again would pass */
    for (size_t p = 0; p < N_PROMPTS; p++) tp_tokens_free(&tokens[p]);
    tp_tokenizer_free(tokenizer);
    bench_end(&b);
}

static void chat_is_decoded_through_the_template(void **state)
{
    (void)state;
    check_by_hand("chat", "fp32");
}

static void text_is_continued_as_it_is(void **state)
{
    (void)state;
    check_by_hand("completion", "fp32");
}

static void bf16_sees_the_factors_of_the_step(void **state)
{
    (void)state;
    check_by_hand("chat", "bf16");
}

/* ---- when ---- */

/* The steps of the rows, each with all prompts in order. */
static void check_steps(struct bench *b, const char *more, const int64_t *steps, size_t n)
{
    struct row rows[MAX_ROWS];
    train_as(b, "chat", "fp32", b->out, more);
    assert_int_equal(read_rows(b, b->out, rows), n * N_PROMPTS);
    for (size_t i = 0; i < n * N_PROMPTS; i++) {
        assert_int_equal(rows[i].step, steps[i / N_PROMPTS]);
        assert_string_equal(rows[i].prompt, texts[i % N_PROMPTS]);
    }
}

static void every_so_many_steps_and_at_the_end(void **state)
{
    struct bench b;
    char path[1200], early[1300];
    (void)state;
    bench_begin(&b);
    check_steps(&b, PROMPTS_KEY "sample_steps: 5\n", (const int64_t[]){5, 10, 12}, 3);
    check_steps(&b, PROMPTS_KEY "sample_steps: 6\n", (const int64_t[]){6, 12}, 2);
    check_steps(&b, PROMPTS_KEY, (const int64_t[]){12}, 1);
    /* A rate at which nothing gets better: the run ends early, and that is its end. */
    snprintf(early, sizeof early,
             PROMPTS_KEY "learning_rate: 1e-30\neval_steps: 2\nearly_stopping_patience: 2\ntest_datasets:\n"
                         "  - {path: %s, type: chat}\n",
             b.data);
    tp_buf text;
    tp_train_options options = {0};
    tp_buf_init(&text, 0);
    recipe_text(&b, &text, "chat", "fp32", b.out, "");
    char *rate = strstr(text.data, "learning_rate: 0.02\n");
    assert_non_null(rate);
    *rate = '#'; /* a comment: the key is given once */
    tp_buf_text(&text, early);
    assert_ok(&b.ctx, train_recipe(&b.ctx, &b.s, tp_buf_cstr(&text), &options));
    tp_buf_free(&text);
    struct row rows[MAX_ROWS];
    assert_int_equal(read_rows(&b, b.out, rows), N_PROMPTS);
    assert_int_equal(rows[0].step, 6); /* the first evaluation is the best, two more do not beat it */
    /* No prompts: no file, and an old one goes with what it belongs to. */
    train_as(&b, "chat", "fp32", b.out, "");
    snprintf(path, sizeof path, "%s/samples.jsonl", b.out);
    assert_false(tp_path_exists(path));
    bench_end(&b);
}

/* ---- nothing else changes ---- */

/* Every file below `a` is in `b` with the same bytes, but for those that name what samples are or what time it is. */
static int count_same_files(const char *a, const char *b)
{
    static const char *const own[] = {"samples.jsonl", "timing.jsonl", "recipe.yaml", "plan.json", ".lock"};
    DIR *dir = opendir(a);
    int n = 0;
    assert_non_null(dir);
    for (struct dirent *entry; (entry = readdir(dir)) != NULL;) {
        char ours[1600], theirs[1600];
        bool skipped = entry->d_name[0] == '.' && (entry->d_name[1] == '\0' || entry->d_name[1] == '.');
        for (size_t i = 0; i < sizeof own / sizeof *own; i++) skipped = skipped || strcmp(entry->d_name, own[i]) == 0;
        if (skipped) continue;
        snprintf(ours, sizeof ours, "%.1300s/%.255s", a, entry->d_name);
        snprintf(theirs, sizeof theirs, "%.1300s/%.255s", b, entry->d_name);
        if (tp_path_is_folder(ours)) {
            n += count_same_files(ours, theirs);
            continue;
        }
        check_same_file(ours, theirs);
        n++;
    }
    closedir(dir);
    return n;
}

static void check_same_run(const char *a, const char *b)
{
    int n = count_same_files(a, b);
    assert_int_equal(n, count_same_files(b, a));
    assert_true(n > 4 * STEPS / EVERY); /* of each checkpoint: configuration, values, optimizer, state, manifest */
}

/* Four micro-batches of one row. */
static void write_tokens(struct bench *b)
{
    int64_t ids[4][1][8], labels[4][1][8];
    for (int i = 0; i < 32; i++) ids[i / 8][0][i % 8] = labels[i / 8][0][i % 8] = 3 + 7 * i % 90;
    const tp_named_array arrays[] = {
        {.name = "input_ids", .dtype = TP_I64, .rank = 3, .shape = {4, 1, 8}, .data = ids},
        {.name = "labels", .dtype = TP_I64, .rank = 3, .shape = {4, 1, 8}, .data = labels},
    };
    snprintf(b->data, sizeof b->data, "%s", scratch_path(&b->s, "batches.safetensors"));
    assert_ok(&b->ctx, tp_safetensors_save(&b->ctx, b->data, arrays, 2, NULL));
}

static void training_is_the_same_with_samples(void **state)
{
    static const char *const types[] = {"chat", "completion", "tokens"}, *const precisions[] = {"fp32", "bf16"};
    (void)state;
    for (size_t t = 0; t < 3; t++)
        for (size_t p = 0; p < 2; p++) {
            struct bench b;
            struct row rows[MAX_ROWS];
            bench_begin(&b);
            if (strcmp(types[t], "tokens") == 0) write_tokens(&b);
            train_as(&b, types[t], precisions[p], b.reference, "");
            train_as(&b, types[t], precisions[p], b.out, PROMPTS_KEY "sample_steps: 1\n");
            assert_int_equal(read_rows(&b, b.out, rows), N_PROMPTS * STEPS);
            check_same_run(b.out, b.reference);
            bench_end(&b);
        }
}

/* ---- what it needs ---- */

static void plan_of(struct bench *b, const char *more, tp_plan *plan)
{
    tp_buf text;
    tp_config config;
    tp_problems problems = {0};
    tp_recipe *recipe;
    tp_run *run;
    tp_recipe_options how = {.schema = &tp_recipe_schema};
    tp_train_options options = {.dry_run = true};
    tp_buf_init(&text, 0);
    recipe_text(b, &text, "chat", "bf16", b->out, more);
    assert_ok(&b->ctx, tp_recipe_parse(&b->ctx, "r.yaml", tp_buf_cstr(&text), text.len, &how, &config, &problems, &recipe));
    assert_ok(&b->ctx, tp_run_open(&b->ctx, recipe, &config, &options, &run));
    *plan = *tp_run_plan(run);
    assert_ok(&b->ctx, tp_run_close(run, TP_OK));
    tp_recipe_free(recipe);
    tp_problems_free(&problems);
    tp_buf_free(&text);
}

static void plan_counts_the_cache(void **state)
{
    struct bench b;
    tp_model *model;
    tp_model_options options = {.precision = TP_BF16};
    tp_plan without, with;
    (void)state;
    bench_begin(&b);
    plan_of(&b, "", &without);
    plan_of(&b, PROMPTS_KEY, &with);
    assert_int_equal(without.samples, 0);
    assert_int_equal(with.peak, without.peak + with.samples);
    assert_ok(&b.ctx, tp_device_open(&b.ctx, "cpu", 1, &b.ctx.device));
    assert_ok(&b.ctx, tp_model_open(&b.ctx, b.base, &options, &model));
    const tp_model_config *c = &model->config;
    /* Keys and values of 64 new tokens and the prompt in every layer, the logits, every factor once more: all in 2 bytes but
     * the logits. */
    int64_t context = with.shape.sample_context;
    assert_true(context > 64 && context <= c->max_positions);
    uint64_t least =
        (uint64_t)(2 * c->n_layers * context * c->n_kv_heads * c->head_dim * 2 + c->vocab_size * 4) + with.adapter / 2;
    assert_true(with.samples >= least);
    assert_true(with.samples <= least + ((uint64_t)8 << 20)); /* the arena of a pass and its slack: some MB for a tiny model */
    tp_model_free(model);
    bench_end(&b);
}

static void refused(struct bench *b, const char *more, tp_status status, const char *text)
{
    tp_buf recipe;
    tp_train_options options = {0};
    tp_buf_init(&recipe, 0);
    recipe_text(b, &recipe, tp_ends_with(b->data, ".safetensors") ? "tokens" : "completion", "fp32", b->out, more);
    tp_status got = train_recipe(&b->ctx, &b->s, tp_buf_cstr(&recipe), &options);
    if (got != status || strstr(b->ctx.message, text) == NULL)
        fail_msg("got %s (%s), expected %s (%s)", tp_status_name(got), b->ctx.message, tp_status_name(status), text);
    if (b->ctx.device != NULL) tp_device_close(b->ctx.device);
    tp_ctx_init(&b->ctx);
    tp_buf_free(&recipe);
}

static void prompts_that_cannot_be_run(void **state)
{
    struct bench b;
    char golden[1024];
    (void)state;
    bench_begin(&b);
    tp_buf text;
    tp_buf_init(&text, 0);
    tp_buf_text(&text, "sample_prompts: [one, '");
    for (int i = 0; i < 3000; i++) tp_buf_printf(&text, "%d ", i);
    tp_buf_text(&text, "']\n");
    refused(&b, tp_buf_cstr(&text), TP_SHAPE, "sample_prompts: prompt 2: the prompt has ");
    tp_buf_free(&text);
    /* Ready tokens for a model without a tokenizer. */
    snprintf(b.base, sizeof b.base, "%s", golden_path(golden, sizeof golden, "models/llama"));
    write_tokens(&b);
    refused(&b, "sample_prompts: [one]\n", TP_IO_READ, "sample_prompts: ");
    bench_end(&b);
}

/* ---- resuming ---- */

static void resume_in_place(struct bench *b, const char *more)
{
    tp_buf text;
    tp_train_options options = {.resume = "auto"};
    tp_buf_init(&text, 0);
    recipe_text(b, &text, "chat", "fp32", b->out, more);
    assert_ok(&b->ctx, train_recipe(&b->ctx, &b->s, tp_buf_cstr(&text), &options));
    tp_buf_free(&text);
}

static void remove_below(struct bench *b, const char *name)
{
    char path[1200];
    snprintf(path, sizeof path, "%s/%s", b->out, name);
    assert_ok(&b->ctx, tp_folder_remove(&b->ctx, path));
}

/* Whatever samples.jsonl holds when a run goes on from step 8, it ends as that of the run that was left alone. */
static void rows_are_cut_and_made_again(void **state)
{
    struct bench b;
    char ours[1200], theirs[1200], *rows;
    size_t n;
    const char *more = PROMPTS_KEY "sample_steps: 2\n";
    (void)state;
    bench_begin(&b);
    train_as(&b, "chat", "fp32", b.reference, more);
    train_as(&b, "chat", "fp32", b.out, more);
    snprintf(ours, sizeof ours, "%s/samples.jsonl", b.out);
    snprintf(theirs, sizeof theirs, "%s/samples.jsonl", b.reference);
    check_same_file(ours, theirs);
    assert_ok(&b.ctx, tp_file_read(&b.ctx, theirs, (size_t)1 << 22, &rows, &n));
    const char *first_of_8 = strstr(rows, "{\"step\": 8, "), *first_of_10 = strstr(rows, "{\"step\": 10, ");
    assert_true(first_of_8 != NULL && first_of_10 != NULL);
    const size_t lengths[] = {
        n,                                 /* rows of steps that are done again */
        (size_t)(first_of_10 - rows),      /* exactly what belongs there */
        (size_t)(first_of_10 - rows) + 20, /* a torn row behind that */
        (size_t)(first_of_10 - rows) - 1,  /* the last row of step 8 without its line end */
        (size_t)(first_of_8 - rows) + 30,  /* stopped inside the first prompt of step 8 */
        (size_t)(first_of_8 - rows),       /* before it */
    };
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        remove_below(&b, "ckpt-12");
        remove_below(&b, "adapter");
        assert_ok(&b.ctx, tp_file_write(&b.ctx, ours, rows, lengths[i]));
        resume_in_place(&b, more);
        check_same_file(ours, theirs);
        check_same_run(b.out, b.reference);
    }
    /* A finished run gains nothing. */
    resume_in_place(&b, more);
    check_same_file(ours, theirs);
    tp_free(rows);
    bench_end(&b);
}

/* xorshift64* */
static double uniform(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (double)((*state * UINT64_C(2685821657736338717)) >> 11) / 9007199254740992.0;
}

static double seconds_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int setting(const char *name, int otherwise)
{
    const char *text = getenv(name);
    int64_t value = otherwise;
    if (text != NULL && text[0] != '\0' && (!tp_parse_i64(text, &value) || value < 0 || value > 1000000))
        fail_msg("%s=%s: expected a number", name, text);
    return (int)value;
}

/* By turns killed and told to stop, most often in the middle of a sample: they take most of this run's time. */
static void killed_and_stopped_at_random_instants(void **state)
{
    struct bench b;
    char key[1100], ours[1200], theirs[1200];
    tp_buf text;
    int kills = setting("TAPEFT_KILLS", DEFAULT_KILLS), interrupted = 0;
    uint64_t random = (uint64_t)setting("TAPEFT_KILL_SEED", 1) * UINT64_C(0x9E3779B97F4A7C15) + 1;
    (void)state;
    bench_begin(&b);
    tp_buf_init(&text, 0);
    recipe_text(&b, &text, "chat", "fp32", "unset", PROMPTS_KEY "sample_steps: 1\n");
    char *overwrite = strstr(text.data, "overwrite: true\n");
    assert_non_null(overwrite);
    *overwrite = '#';
    assert_ok(&b.ctx, tp_file_write(&b.ctx, b.recipe, text.data, text.len));
    tp_buf_free(&text);
    snprintf(key, sizeof key, "output_dir=%s", b.reference);
    double began = seconds_now();
    check_exit(b.log, run_tapeft(b.log, "train", b.recipe, key, "save_steps=1"), 0);
    double whole = seconds_now() - began;
    check_log_has(b.log, "\nstep 7, \"a \\\"b\\\"\\n\": \"");
    snprintf(key, sizeof key, "output_dir=%s", b.out);
    snprintf(ours, sizeof ours, "%s/samples.jsonl", b.out);
    snprintf(theirs, sizeof theirs, "%s/samples.jsonl", b.reference);
    for (int i = 0; i < kills; i++) {
        pid_t process = start_tapeft(b.log, "train", b.recipe, key, "save_steps=1", "--resume", "--quiet");
        sleep_seconds(uniform(&random) * whole * 0.6);
        kill(process, i % 2 == 0 ? SIGTERM : SIGKILL);
        int status = command_wait(process);
        if (status != 0 && status != 75 && status != 128 + SIGTERM && status != 128 + SIGKILL) check_exit(b.log, status, 75);
        interrupted += status != 0;
        if (status != 0) continue;
        check_same_file(ours, theirs);
        check_same_run(b.out, b.reference);
        assert_ok(&b.ctx, tp_folder_remove(&b.ctx, b.out));
    }
    check_exit(b.log, run_tapeft(b.log, "train", b.recipe, key, "save_steps=1", "--resume", "--quiet"), 0);
    check_same_file(ours, theirs);
    check_same_run(b.out, b.reference);
    print_message("interrupted %d times\n", interrupted);
    assert_true(interrupted > 0 || kills == 0);
    bench_end(&b);
}

/* ---- no memory ---- */

static int silence(int fd)
{
    int kept = dup(fd), nothing = open("/dev/null", O_WRONLY);
    assert_true(kept >= 0 && nothing >= 0 && dup2(nothing, fd) >= 0);
    close(nothing);
    return kept;
}

/* The n-th allocation fails, once or with all after it: the run ends with a message, or with the adapter that it always makes,
 * and nothing leaks. */
static void any_allocation_may_fail(void **state)
{
    struct bench b;
    char ours[1200], theirs[1200];
    tp_buf text;
    tp_train_options options = {0};
    long points = 0;
    (void)state;
    bench_begin(&b);
    train_as(&b, "chat", "bf16", b.reference, "");
    tp_buf_init(&text, 0);
    recipe_text(&b, &text, "chat", "bf16", b.out, PROMPTS_KEY "sample_steps: 6\n");
    snprintf(ours, sizeof ours, "%s/adapter/adapter_model.safetensors", b.out);
    snprintf(theirs, sizeof theirs, "%s/adapter/adapter_model.safetensors", b.reference);
    for (int i = 0; i < 2; i++) { /* the first fills what the C library keeps for good */
        fail_malloc(0, false);
        assert_ok(&b.ctx, train_recipe(&b.ctx, &b.s, tp_buf_cstr(&text), &options));
        points = malloc_count();
    }
    for (int all = 0; all < 2; all++)
        for (long n = 1; n <= points; n += points / MALLOC_TRIES + 1) {
            tp_ctx ctx;
            tp_ctx_init(&ctx);
            int err = silence(2);
            long live = malloc_live();
            fail_malloc(n, all != 0);
            tp_status status = train_recipe(&ctx, &b.s, tp_buf_cstr(&text), &options);
            fail_malloc(0, false);
            long leaked = malloc_live() - live;
            dup2(err, 2);
            close(err);
            if (leaked > 0) fail_msg("allocation %ld: %ld are not freed (%s)", n, leaked, ctx.message);
            if (status != TP_OK && tp_status_exit_code(status) != 4)
                fail_msg("allocation %ld: %s: %s", n, tp_status_name(status), ctx.message);
            if (status == TP_OK) check_same_file(ours, theirs);
        }
    fail_malloc(0, false);
    tp_buf_free(&text);
    bench_end(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(chat_is_decoded_through_the_template),
        cmocka_unit_test(text_is_continued_as_it_is),
        cmocka_unit_test(bf16_sees_the_factors_of_the_step),
        cmocka_unit_test(every_so_many_steps_and_at_the_end),
        cmocka_unit_test(training_is_the_same_with_samples),
        cmocka_unit_test(plan_counts_the_cache),
        cmocka_unit_test(prompts_that_cannot_be_run),
        cmocka_unit_test(rows_are_cut_and_made_again),
        cmocka_unit_test(killed_and_stopped_at_random_instants),
        cmocka_unit_test(any_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
