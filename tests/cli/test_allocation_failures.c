/* The n-th allocation failing, for every n, once and from then on, in every command: it ends with exit class 4 and a message,
 * or it gets through as if nothing had happened; it leaks nothing; outputs that were there stay, and nothing half-written has a
 * final name.
 *
 *   TAPEFT_MALLOC_EVERY   test every so many points (default: as many as fit into a minute; 1: all of them) */
#include "tests/support.h"

#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#include "backend/backend.h"
#include "base/file.h"
#include "base/mem.h"
#include "base/safetensors.h"
#include "cli/command.h"
#include "tests/failing_malloc.h"
#include "tests/scratch.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/lsan_interface.h>
#endif

#define POINTS_BY_DEFAULT 250 /* of each command, each way of failing */
#define MAX_WORDS         24

/* ---- calling a command ---- */

static const tp_flag *find_flag(const tp_command *command, const char *name)
{
    for (const tp_flag *f = command->flags; f->name != NULL; f++)
        if (strcmp(f->name, name) == 0) return f;
    fail_msg("%s has no flag --%s", command->name, name);
    return NULL;
}

/* Words as main.c splits them: "--flag", "--flag", "value", or positional. */
static void split(const tp_command *command, const char *const *words, const char **positional, tp_args *args)
{
    *args = (tp_args){.command = command, .positional = positional};
    for (; *words != NULL; words++) {
        if (strncmp(*words, "--", 2) != 0) {
            positional[args->n_positional++] = *words;
            continue;
        }
        const tp_flag *flag = find_flag(command, *words + 2);
        args->given[args->n_given].flag = flag;
        args->given[args->n_given++].value = flag->value != NULL && !flag->optional_value ? *++words : NULL;
    }
}

static tp_status call(tp_ctx *ctx, const tp_command *command, const char *const *words)
{
    const char *positional[MAX_WORDS];
    tp_args args;
    split(command, words, positional, &args);
    tp_ctx_init(ctx);
    tp_status status = command->run(ctx, &args);
    if (ctx->device != NULL) tp_device_close(ctx->device);
    ctx->device = NULL;
    return status;
}

/* ---- files ---- */

struct bench {
    scratch s;
    char model[1024], gguf[1024], recipe[1024], data[1024], out[1024], adapter[1100], ids[1024], texts[1024], result[1024];
    char *wanted; /* bytes of the result of a run without failures */
    size_t wanted_bytes;
};

static void put(struct bench *b, char *path, size_t size, const char *name, const char *text)
{
    snprintf(path, size, "%s", scratch_path(&b->s, name));
    if (text != NULL) assert_int_equal(tp_file_write(NULL, path, text, strlen(text)), TP_OK);
}

static const char rows[] =
    "{\"messages\": [{\"role\": \"user\", \"content\": \"the cat\"}, {\"role\": \"assistant\", \"content\": \"and the "
    "hat\"}]}\n"
    "{\"messages\": [{\"role\": \"user\", \"content\": \"in\"}, {\"role\": \"assistant\", \"content\": \"an inn\"}]}\n"
    "{\"messages\": [{\"role\": \"user\", \"content\": \"one\"}, {\"role\": \"assistant\", \"content\": \"two three\"}]}\n"
    "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b c d e f g\"}]}\n";

/* A model from a GGUF file with its own tokenizer and chat template; two steps, a save, an evaluation, the best adapter. */
static void bench_begin(struct bench *b)
{
    *b = (struct bench){.wanted = NULL};
    if (getenv("TMPDIR") == NULL && access("/dev/shm", W_OK) == 0) setenv("TMPDIR", "/dev/shm", 0);
    scratch_begin(&b->s);
    golden_path(b->gguf, sizeof b->gguf, "gguf/tiny_q4_0.gguf");
    golden_path(b->model, sizeof b->model, "models/llama");
    put(b, b->data, sizeof b->data, "rows.jsonl", rows);
    put(b, b->texts, sizeof b->texts, "texts.jsonl",
        "{\"text\": \"the cat\"}\n{\"messages\": [{\"role\": \"user\", \"content\": \"the cat\"}]}\n");
    put(b, b->out, sizeof b->out, "out", NULL);
    put(b, b->result, sizeof b->result, "result.safetensors", NULL);
    put(b, b->ids, sizeof b->ids, "ids.safetensors", NULL);
    snprintf(b->adapter, sizeof b->adapter, "%s/adapter", b->out);
    const int64_t ids[] = {1, 2, 3, 4};
    const tp_named_array array = {.name = "input_ids", .dtype = TP_I64, .rank = 2, .shape = {1, 4}, .data = ids};
    assert_int_equal(tp_safetensors_save(NULL, b->ids, &array, 1, NULL), TP_OK);
    tp_buf text;
    tp_buf_init(&text, 0);
    tp_buf_printf(&text,
                  "base_model: %s\nadapter: lora\nlora_r: 2\nlora_target_modules: '.*\\.(q|v)_proj'\nlora_dropout: 0.1\n",
                  b->gguf);
    tp_buf_printf(
        &text,
        "precision: fp32\nthreads: 1\ndatasets:\n  - {path: %s, type: chat}\ntest_datasets:\n  - {path: %s, type: chat}\n",
        b->data, b->data);
    tp_buf_printf(
        &text, "packing: true\nmax_seq_length: 64\nmax_steps: 2\nsave_steps: 1\neval_steps: 1\nload_best_model_at_end: true\n");
    tp_buf_printf(&text, "max_grad_norm: 1.0\noutput_dir: %s\noverwrite: true\n", b->out);
    put(b, b->recipe, sizeof b->recipe, "recipe.yaml", tp_buf_cstr(&text));
    tp_buf_free(&text);
}

static void bench_end(struct bench *b)
{
    tp_free(b->wanted);
    scratch_end(&b->s);
}

/* ---- the sweep ---- */

struct scenario {
    const char *name;
    const tp_command *command;
    const char *words[MAX_WORDS];
    const char *result;     /* file that a run leaves, NULL: none; its bytes are the same whenever it gets through */
    bool keeps_old;         /* the result of an earlier run stays, byte for byte, when this one fails */
    const char *checkpoint; /* folder whose manifest has to hold if it is there; NULL: none */
    const char *fresh;      /* folder that a run makes and must not find; NULL: none */
};

/* stdout and stderr away, so that what commands print is not mixed with the test's own. */
static int silence(int fd)
{
    int kept = dup(fd), nothing = open("/dev/null", O_WRONLY);
    assert_true(kept >= 0 && nothing >= 0 && dup2(nothing, fd) >= 0);
    close(nothing);
    return kept;
}

static void restore(int fd, int kept)
{
    fflush(NULL);
    dup2(kept, fd);
    close(kept);
}

static tp_status run_silently(tp_ctx *ctx, const struct scenario *s)
{
    fflush(NULL);
    int out = silence(1), err = silence(2);
    tp_status status = call(ctx, s->command, s->words);
    restore(2, err);
    restore(1, out);
    return status;
}

static void clear_fresh(const struct scenario *s)
{
    if (s->fresh != NULL && tp_path_exists(s->fresh)) assert_int_equal(tp_folder_remove(NULL, s->fresh), TP_OK);
}

static void check_result(struct bench *b, const struct scenario *s, const char *where)
{
    char *bytes;
    size_t n;
    if (s->result == NULL) return;
    if (tp_file_read(NULL, s->result, (size_t)1 << 26, &bytes, &n) != TP_OK) fail_msg("%s: %s is missing", where, s->result);
    if (n != b->wanted_bytes || memcmp(bytes, b->wanted, n) != 0) fail_msg("%s: %s has other bytes", where, s->result);
    tp_free(bytes);
}

/* One run with point n failing. Returns false if there is no such point. */
static bool try_point(struct bench *b, const struct scenario *s, long n, bool all, long *survived)
{
    char where[256];
    tp_ctx ctx;
    snprintf(where, sizeof where, "%s, allocation %ld%s", s->name, n, all ? " and all after" : "");
    int out = silence(1), err = silence(2);
    long live = malloc_live();
    fail_malloc(n, all);
    tp_status status = call(&ctx, s->command, s->words);
    bool failed = malloc_failed();
    fail_malloc(0, false);
    long leaked = malloc_live() - live;
    restore(2, err);
    restore(1, out);
    if (status != TP_OK && tp_status_exit_code(status) != 4) fail_msg("%s: %s: %s", where, tp_status_name(status), ctx.message);
    if (status != TP_OK && !failed) fail_msg("%s: fails by itself: %s", where, ctx.message);
    if (status != TP_OK && ctx.message[0] == '\0') fail_msg("%s: no message", where);
    if (leaked > 0) fail_msg("%s: %ld allocations are not freed (%s)", where, leaked, ctx.message);
    if (status == TP_OK || s->keeps_old)
        check_result(b, s, where);
    else if (s->result != NULL && tp_path_exists(s->result))
        check_result(b, s, where); /* whole, or not there */
    if (s->checkpoint != NULL && tp_path_exists(s->checkpoint) && tp_publish_verify(&ctx, s->checkpoint, NULL) != TP_OK)
        fail_msg("%s: a damaged checkpoint: %s", where, ctx.message);
    clear_fresh(s);
    *survived += status == TP_OK && failed;
    return failed;
}

static double seconds_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static long stride(long points)
{
    const char *text = getenv("TAPEFT_MALLOC_EVERY");
    int64_t every = points / POINTS_BY_DEFAULT + 1;
    if (text != NULL && text[0] != '\0' && (!tp_parse_i64(text, &every) || every < 1))
        fail_msg("TAPEFT_MALLOC_EVERY=%s: expected a number from 1", text);
    return (long)every;
}

static void sweep(struct bench *b, const struct scenario *s)
{
    tp_ctx ctx;
    /* Twice without failures: the first fills what the C library keeps for good, the second is counted. */
    for (int i = 0; i < 2; i++) {
        fail_malloc(0, false);
        clear_fresh(s);
        assert_ok(&ctx, run_silently(&ctx, s));
    }
    long points = malloc_count(), every = stride(points), tried = 0, survived = 0;
    double began = seconds_now();
    if (s->result != NULL) {
        tp_free(b->wanted);
        assert_int_equal(tp_file_read(NULL, s->result, (size_t)1 << 26, &b->wanted, &b->wanted_bytes), TP_OK);
    }
    clear_fresh(s);
    for (int all = 0; all < 2; all++)
        for (long n = 1; try_point(b, s, n, all != 0, &survived); n += every) tried++;
    print_message("%-12s %5ld allocations, every %ld: %ld failed, %ld of them made no difference, %.1f s\n", s->name, points,
                  every, tried, survived, seconds_now() - began);
    assert_true(tried > 0);
#if defined(__SANITIZE_ADDRESS__)
    assert_int_equal(__lsan_do_recoverable_leak_check(), 0);
#endif
}

/* ---- commands ---- */

static void training(void **state)
{
    struct bench b;
    char result[1200], checkpoint[1200];
    (void)state;
    bench_begin(&b);
    snprintf(result, sizeof result, "%s/adapter_model.safetensors", b.adapter);
    snprintf(checkpoint, sizeof checkpoint, "%s/ckpt-2", b.out);
    struct scenario train = {"train", &tp_command_train, {b.recipe, "--quiet"}, result, false, checkpoint, NULL};
    sweep(&b, &train);
    /* The first step's checkpoint is there, and nothing after it. */
    char adapter[1200];
    tp_ctx ctx;
    struct scenario once = {"train", &tp_command_train, {b.recipe, "--quiet"}, NULL, false, NULL, NULL};
    assert_ok(&ctx, run_silently(&ctx, &once));
    snprintf(adapter, sizeof adapter, "%s", b.adapter);
    assert_int_equal(tp_folder_remove(NULL, checkpoint), TP_OK);
    assert_int_equal(tp_folder_remove(NULL, adapter), TP_OK);
    struct scenario resume = {
        "resume", &tp_command_train, {b.recipe, "--quiet", "--resume", "overwrite=false"}, result, false, checkpoint, NULL};
    sweep(&b, &resume);
    bench_end(&b);
}

static void training_like_an_adapter(void **state)
{
    struct bench b;
    tp_ctx ctx;
    char again[1024], folder[1100], result[1200];
    (void)state;
    bench_begin(&b);
    struct scenario once = {.name = "train", .command = &tp_command_train, .words = {b.recipe, "--quiet"}};
    assert_ok(&ctx, run_silently(&ctx, &once));
    snprintf(again, sizeof again, "%s", scratch_path(&b.s, "again"));
    snprintf(folder, sizeof folder, "output_dir=%s", again);
    snprintf(result, sizeof result, "%s/adapter/adapter_model.safetensors", again);
    struct scenario like = {.name = "train --like",
                            .command = &tp_command_train,
                            .words = {"--like", b.adapter, folder, "--quiet", "max_steps=1"},
                            .result = result};
    sweep(&b, &like);
    bench_end(&b);
}

static void plan_and_preview(void **state)
{
    struct bench b;
    (void)state;
    bench_begin(&b);
    struct scenario plan = {"plan", &tp_command_plan, {b.recipe, "--json"}, NULL, false, NULL, NULL};
    struct scenario fit = {.name = "plan --fit",
                           .command = &tp_command_plan,
                           .words = {b.recipe, "--fit", "1GiB", "gradient_checkpointing=none", "micro_batch_size=2"}};
    struct scenario preview = {"preview", &tp_command_preview, {b.recipe, "--json"}, NULL, false, NULL, NULL};
    sweep(&b, &plan);
    sweep(&b, &fit);
    sweep(&b, &preview);
    bench_end(&b);
}

/* What makes a model, and what looks at the machine. */
static void init_and_doctor(void **state)
{
    struct bench b;
    char made[1024], weights[1100];
    (void)state;
    bench_begin(&b);
    snprintf(made, sizeof made, "%s", scratch_path(&b.s, "made"));
    snprintf(weights, sizeof weights, "%s/model.safetensors", made);
    struct scenario init = {.name = "init",
                            .command = &tp_command_init,
                            .words = {b.model, "--out", made, "--dtype", "bf16"},
                            .result = weights,
                            .fresh = made};
    struct scenario doctor = {.name = "doctor", .command = &tp_command_doctor, .words = {"--json"}};
    sweep(&b, &init);
    sweep(&b, &doctor);
    bench_end(&b);
}

static void use_of_an_adapter(void **state)
{
    struct bench b;
    tp_ctx ctx;
    (void)state;
    bench_begin(&b);
    struct scenario train = {"train", &tp_command_train, {b.recipe, "--quiet"}, NULL, false, NULL, NULL};
    assert_ok(&ctx, run_silently(&ctx, &train));
    struct scenario generate = {"generate",
                                &tp_command_generate,
                                {b.gguf, "--prompt", "the cat", "--chat", "--adapter", b.adapter, "--max-tokens", "4", "--json",
                                 "--threads", "1", "--temperature", "1"},
                                NULL,
                                false,
                                NULL,
                                NULL};
    struct scenario logits = {
        "logits",
        &tp_command_logits,
        {b.gguf, "--in", b.ids, "--out", b.result, "--adapter", b.adapter, "--hidden", "--threads", "1", "--precision", "fp32"},
        b.result,
        true,
        NULL,
        NULL};
    struct scenario folder = {"logits (HF)",
                              &tp_command_logits,
                              {b.model, "--in", b.ids, "--out", b.result, "--threads", "1", "--precision", "bf16"},
                              b.result,
                              true,
                              NULL,
                              NULL};
    struct scenario inspect = {"inspect", &tp_command_inspect, {b.adapter, "--json"}, NULL, false, NULL, NULL};
    struct scenario diff = {
        .name = "inspect --diff", .command = &tp_command_inspect, .words = {b.adapter, "--diff", b.gguf, "--tensors"}};
    struct scenario tokenize = {"tokenize", &tp_command_tokenize, {b.gguf, "--in", b.texts}, NULL, false, NULL, NULL};
    struct scenario eval = {
        "eval",
        &tp_command_eval,
        {b.gguf, "--data", b.data, "--type", "chat", "--adapter", b.adapter, "--threads", "1", "--precision", "fp32"},
        NULL,
        false,
        NULL,
        NULL};
    sweep(&b, &generate);
    sweep(&b, &logits);
    sweep(&b, &folder);
    sweep(&b, &inspect);
    sweep(&b, &diff);
    sweep(&b, &tokenize);
    sweep(&b, &eval);
    bench_end(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(plan_and_preview), cmocka_unit_test(init_and_doctor),          cmocka_unit_test(use_of_an_adapter),
        cmocka_unit_test(training),         cmocka_unit_test(training_like_an_adapter),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
