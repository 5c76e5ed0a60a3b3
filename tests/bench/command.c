/* Models, tokens and recipes for the command, and the command as a child process. */
#include "tests/bench/command.h"

#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"
#include "base/rng.h"
#include "base/safetensors.h"
#include "tests/bench/ceilings.h"

extern char **environ;

#define FOLDER "build/bench"
#define VOCAB  49152
#define ROWS   8 /* micro-batches in the token file */

static const char config[] = "{\"architectures\": [\"LlamaForCausalLM\"], \"model_type\": \"llama\", \"hidden_size\": 576, "
                             "\"intermediate_size\": 1536, \"num_hidden_layers\": 30, \"num_attention_heads\": 9, "
                             "\"num_key_value_heads\": 3, \"vocab_size\": 49152, \"max_position_embeddings\": 8192, "
                             "\"rms_norm_eps\": 1e-05, \"rope_theta\": 100000, \"hidden_act\": \"silu\", "
                             "\"tie_word_embeddings\": true, \"initializer_range\": 0.041666666666666664, "
                             "\"bos_token_id\": 1, \"eos_token_id\": 2, \"torch_dtype\": \"float32\"}\n";

static const char *command_path(void)
{
    const char *path = getenv("TAPEFT");
    return path != NULL && path[0] != '\0' ? path : "build/tapeft";
}

/* Runs the command and waits; its output is kept in a file that is shown if it fails. */
static void run_command(char *const argv[])
{
    posix_spawn_file_actions_t actions;
    pid_t child;
    int status, error;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 1, FOLDER "/output", O_WRONLY | O_CREAT | O_TRUNC, 0666);
    posix_spawn_file_actions_adddup2(&actions, 1, 2);
    error = posix_spawn(&child, argv[0], &actions, NULL, argv, environ);
    posix_spawn_file_actions_destroy(&actions);
    if (error != 0) {
        fprintf(stderr, "%s: %s\n", argv[0], strerror(error));
        exit(1);
    }
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) continue;
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return;
    fprintf(stderr, "%s %s failed; " FOLDER "/output:\n", argv[0], argv[1]);
    FILE *output = fopen(FOLDER "/output", "r");
    for (int c; output != NULL && (c = getc(output)) != EOF;) putc(c, stderr);
    exit(1);
}

double bench_process_seconds(tp_ctx *ctx)
{
    char path[1024], flag[] = "--version";
    char *argv[] = {path, flag, NULL};
    bench_need(ctx, tp_folder_make(ctx, FOLDER));
    snprintf(path, sizeof path, "%s", command_path());
    double began = bench_now();
    run_command(argv);
    return bench_now() - began;
}

/* ---- what it is given ---- */

static void make_model(tp_ctx *ctx, const char *path, const char *dtype)
{
    char binary[1024], folder[1024], word[] = "init", from[] = FOLDER "/config.json", out[] = "--out", flag[] = "--dtype",
                                     type[8];
    char *argv[] = {binary, word, from, out, folder, flag, type, NULL};
    if (tp_path_exists(path)) return;
    bench_need(ctx, tp_file_write(ctx, from, config, sizeof config - 1));
    snprintf(binary, sizeof binary, "%s", command_path());
    snprintf(folder, sizeof folder, "%s", path);
    snprintf(type, sizeof type, "%s", dtype);
    run_command(argv);
}

bench_model bench_model_of(tp_ctx *ctx, const char *name)
{
    bench_model m = {.precision = strcmp(name, "bf16") == 0 ? TP_BF16 : TP_F32, .there = true};
    bench_need(ctx, tp_folder_make(ctx, FOLDER));
    if (strcmp(name, "gguf") == 0) {
        const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
        if (cache != NULL && cache[0] != '\0')
            snprintf(m.path, sizeof m.path, "%s/tapeft/SmolLM2-135M-Instruct.Q4_1.gguf", cache);
        else
            snprintf(m.path, sizeof m.path, "%s/.cache/tapeft/SmolLM2-135M-Instruct.Q4_1.gguf", home != NULL ? home : "");
        m.there = tp_path_exists(m.path);
        m.label = "fp32, Q4_1 file in place";
        return m;
    }
    snprintf(m.path, sizeof m.path, FOLDER "/model-%s", name);
    make_model(ctx, m.path, m.precision == TP_BF16 ? "bf16" : "fp32");
    m.label = m.precision == TP_BF16 ? "bf16" : "fp32";
    return m;
}

static void make_tokens(tp_ctx *ctx, const char *path)
{
    if (tp_path_exists(path)) return;
    size_t n = (size_t)ROWS * BENCH_SEQUENCE;
    int32_t *ids = tp_alloc(ctx, n, sizeof *ids);
    if (ids == NULL) bench_need(ctx, TP_NOMEM);
    tp_rng_key key = {1, TP_STREAM_SAMPLE, 0};
    for (size_t i = 0; i < n; i++) ids[i] = (int32_t)(tp_rng_uniform(key, i) * (float)(VOCAB - 1));
    tp_named_array arrays[] = {
        {.name = "input_ids", .dtype = TP_I32, .rank = 3, .shape = {ROWS, 1, BENCH_SEQUENCE}, .data = ids},
        {.name = "labels", .dtype = TP_I32, .rank = 3, .shape = {ROWS, 1, BENCH_SEQUENCE}, .data = ids}};
    bench_need(ctx, tp_safetensors_save(ctx, path, arrays, 2, NULL));
    tp_free(ids);
}

static void make_recipe(tp_ctx *ctx, const bench_model *model, int steps, const char *path)
{
    tp_buf text;
    tp_buf_init(&text, 0);
    tp_buf_printf(&text,
                  "base_model: %s\nadapter: lora\nlora_r: 16\nlora_target_modules: all-linear\nprecision: %s\nthreads: %d\n"
                  "datasets:\n  - {path: " FOLDER "/tokens.safetensors, type: tokens}\nshuffle: false\nmicro_batch_size: 1\n"
                  "max_seq_length: %d\ngradient_checkpointing: none\nmax_steps: %d\nlearning_rate: 1e-4\nplot_loss: false\n"
                  "output_dir: " FOLDER "/run\noverwrite: true\n",
                  model->path, model->precision == TP_BF16 ? "bf16" : "fp32", ctx->device->threads, BENCH_SEQUENCE, steps);
    bench_need(ctx, tp_buf_status(ctx, &text, path));
    bench_need(ctx, tp_file_write(ctx, path, text.data, text.len));
    tp_buf_free(&text);
}

/* ---- what it wrote ---- */

static bool number_of(const tp_json *object, const char *key, double *value)
{
    return tp_json_f64(tp_json_get(object, key), value);
}

static void read_row(tp_ctx *ctx, const char *text, size_t n, bench_run *run)
{
    tp_json_doc *doc;
    tp_json_options options = {.name = "timing.jsonl"};
    bench_need(ctx, tp_json_parse(ctx, text, n, &options, &doc));
    const tp_json *row = tp_json_root(doc);
    (void)number_of(row, "start_seconds", &run->start_seconds);
    if (run->n_steps < BENCH_STEPS_MAX && number_of(row, "seconds", &run->seconds[run->n_steps]) &&
        number_of(row, "cpu_seconds", &run->cpu_seconds[run->n_steps])) {
        (void)number_of(row, "peak_bytes", &run->peak_bytes);
        run->n_steps++;
    }
    tp_json_free(doc);
}

static void read_results(tp_ctx *ctx, bench_run *run)
{
    char *text;
    size_t n;
    tp_json_doc *plan;
    *run = (bench_run){0};
    bench_need(ctx, tp_file_read(ctx, FOLDER "/run/timing.jsonl", (size_t)1 << 20, &text, &n));
    for (size_t at = 0; at < n;) {
        const char *end = memchr(text + at, '\n', n - at);
        size_t length = end != NULL ? (size_t)(end - text) - at : n - at;
        read_row(ctx, text + at, length, run);
        at += length + 1;
    }
    tp_free(text);
    bench_need(ctx, tp_json_read(ctx, FOLDER "/run/plan.json", (size_t)1 << 20, &plan));
    (void)number_of(tp_json_root(plan), "peak_bytes", &run->planned_bytes);
    tp_json_free(plan);
}

void bench_train(tp_ctx *ctx, const bench_model *model, int steps, bench_run *run)
{
    char binary[1024], word[] = "train", recipe[] = FOLDER "/recipe.yaml", quiet[] = "--quiet";
    char *argv[] = {binary, word, recipe, quiet, NULL};
    make_tokens(ctx, FOLDER "/tokens.safetensors");
    make_recipe(ctx, model, steps, recipe);
    snprintf(binary, sizeof binary, "%s", command_path());
    run_command(argv);
    read_results(ctx, run);
    if (run->n_steps == steps) return;
    fprintf(stderr, "timing.jsonl has %d of %d steps\n", run->n_steps, steps);
    exit(1);
}
