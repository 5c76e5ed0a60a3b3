/* Runs that are killed, stopped, disturbed and resumed end in the same bytes as the run that was left alone.
 *
 *   TAPEFT_KILLS      how often a run is killed at a random instant (default 50; with sanitizers 10)
 *   TAPEFT_KILL_SEED  of those instants (default 1) */
#include "tests/support.h"

#include <errno.h>
#include <ftw.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/mem.h"
#include "base/text.h"
#include "tests/cli/process.h"
#include "tests/scratch.h"

#if defined(__SANITIZE_ADDRESS__)
#define DEFAULT_KILLS 10
#else
#define DEFAULT_KILLS 50
#endif

#define STEPS 40

/* One folder of scratch space: the recipe, the log, the run that nothing disturbs, the one under test. */
struct bench {
    scratch s;
    char recipe[1024], log[1024], reference[1024], out[1024], output_key[1100];
};

/* Dropout, a shuffle, accumulation, evaluation, the best adapter: everything that a resumed run has to find again. */
static void write_recipe_file(const char *path, const char *more)
{
    char base[1024], train[1024], held_out[1024];
    tp_buf text;
    tp_buf_init(&text, 0);
    golden_path(base, sizeof base, "models/llama");
    golden_path(train, sizeof train, "curves/llama-lora/batches.safetensors");
    golden_path(held_out, sizeof held_out, "curves/llama-lora-sgd/batches.safetensors");
    tp_buf_printf(&text, "base_model: %s\nadapter: lora\nlora_r: 16\nlora_dropout: 0.1\nprecision: fp32\nthreads: 1\n", base);
    tp_buf_printf(&text, "datasets:\n  - {path: %s, type: tokens}\n", train);
    tp_buf_printf(&text, "test_datasets:\n  - {path: %s, type: tokens}\n", held_out);
    tp_buf_printf(&text, "gradient_accumulation_steps: 2\nmax_steps: %d\nlearning_rate: 0.01\n", STEPS);
    tp_buf_printf(&text, "eval_steps: 15\nload_best_model_at_end: true\nsave_total_limit: 3\noutput_dir: unset\n%s", more);
    assert_int_equal(tp_file_write(NULL, path, text.data, text.len), TP_OK);
    tp_buf_free(&text);
}

static void use_output(struct bench *b, const char *name)
{
    snprintf(b->out, sizeof b->out, "%.400s/%.64s", b->s.folder, name);
    snprintf(b->output_key, sizeof b->output_key, "output_dir=%s", b->out);
}

/* /dev/shm, where there is one, so that thousands of fsyncs do not wait for a disk. */
static void bench_begin(struct bench *b)
{
    if (getenv("TMPDIR") == NULL && access("/dev/shm", W_OK) == 0) setenv("TMPDIR", "/dev/shm", 0);
    scratch_begin(&b->s);
    snprintf(b->recipe, sizeof b->recipe, "%s", scratch_path(&b->s, "recipe.yaml"));
    snprintf(b->log, sizeof b->log, "%s", scratch_path(&b->s, "log"));
    snprintf(b->reference, sizeof b->reference, "%s", scratch_path(&b->s, "reference"));
    write_recipe_file(b->recipe, "");
    use_output(b, "reference");
    check_exit(b->log, run_tapeft(b->log, "train", b->recipe, b->output_key), 0);
    use_output(b, "out");
}

static void bench_end(struct bench *b)
{
    scratch_end(&b->s);
}

/* A path inside the run under test; overwritten by the next call. */
static const char *in_out(struct bench *b, const char *name)
{
    return scratch_path(&b->s, strcmp(name, "") == 0 ? "out" : name);
}

static void check_same(struct bench *b, const char *name)
{
    char ours[1200], theirs[1200];
    snprintf(ours, sizeof ours, "%s/%s", b->out, name);
    snprintf(theirs, sizeof theirs, "%s/%s", b->reference, name);
    check_same_file(ours, theirs);
}

static int count_leftover(const char *path, const struct stat *s, int type, struct FTW *where)
{
    (void)s, (void)type;
    return strstr(path + where->base, ".tmp-") != NULL ? 1 : 0;
}

/* What a finished run leaves: the adapter, the best one, the last checkpoint with everything in it, the metrics, no debris. */
static void check_equal_run(struct bench *b)
{
    static const char *const files[] = {"adapter_config.json", "adapter_model.safetensors", "tapeft.json"};
    char name[128];
    for (size_t i = 0; i < 3; i++) {
        snprintf(name, sizeof name, "adapter/%s", files[i]);
        check_same(b, name);
        snprintf(name, sizeof name, "best/%s", files[i]);
        check_same(b, name);
        snprintf(name, sizeof name, "ckpt-%d/%s", STEPS, files[i]);
        check_same(b, name);
    }
    snprintf(name, sizeof name, "ckpt-%d/optimizer.safetensors", STEPS);
    check_same(b, name);
    snprintf(name, sizeof name, "ckpt-%d/state.json", STEPS);
    check_same(b, name);
    snprintf(name, sizeof name, "ckpt-%d/manifest.json", STEPS);
    check_same(b, name);
    check_same(b, "metrics.jsonl");
    if (nftw(b->out, count_leftover, 16, FTW_PHYS) != 0) fail_msg("%s: a temporary file is left", b->out);
}

static void forget_output(struct bench *b)
{
    assert_int_equal(tp_folder_remove(NULL, b->out), TP_OK);
}

static int setting(const char *name, int otherwise)
{
    const char *text = getenv(name);
    int64_t value = otherwise;
    if (text != NULL && text[0] != '\0' && (!tp_parse_i64(text, &value) || value < 0 || value > 1000000))
        fail_msg("%s=%s: expected a number", name, text);
    return (int)value;
}

/* ---- kills ---- */

/* xorshift64*: the instants of a seed are the same everywhere, as far as clocks allow. */
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

/* Runs are killed, resumed, killed again until one gets through; it is compared and the next begins, until all kills are used.
 */
static void killed_at_random_instants(void **state)
{
    struct bench b;
    int kills = setting("TAPEFT_KILLS", DEFAULT_KILLS), done = 0, runs = 0, resumed = 0;
    uint64_t random = (uint64_t)setting("TAPEFT_KILL_SEED", 1) * UINT64_C(0x9E3779B97F4A7C15) + 1;
    (void)state;
    bench_begin(&b);
    double began = seconds_now();
    check_exit(b.log, run_tapeft(b.log, "train", b.recipe, b.output_key, "save_steps=1", "--quiet"), 0);
    double whole = seconds_now() - began;
    check_equal_run(&b);
    for (int left = kills; left > 0 || done > 0;) {
        char every[32];
        if (done == 0) {
            forget_output(&b);
            runs++;
        }
        snprintf(every, sizeof every, "save_steps=%d", 1 + runs % 3);
        pid_t process = start_tapeft(b.log, "train", b.recipe, b.output_key, every, "resume_from_checkpoint=auto", "--quiet");
        if (left > 0) {
            sleep_seconds(uniform(&random) * whole * 0.7);
            kill(process, SIGKILL);
        }
        int status = command_wait(process);
        if (status == 128 + SIGKILL) {
            left--;
            done++;
            continue;
        }
        check_exit(b.log, status, 0);
        check_equal_run(&b);
        resumed += done;
        done = 0;
    }
    print_message("%d kills in %d runs; all ended in the bytes of the run that was left alone\n", resumed, runs);
    assert_int_equal(resumed, kills);
    bench_end(&b);
}

/* ---- signals ---- */

/* Stopped by each signal once it trains: exit 75, and resumed to the same end. */
static void stopped_by_signals(void **state)
{
    static const int numbers[] = {SIGTERM, SIGINT, SIGHUP};
    struct bench b;
    (void)state;
    bench_begin(&b);
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        pid_t process = start_tapeft(b.log, "train", b.recipe, b.output_key, "--quiet");
        wait_for_lines(process, in_out(&b, "out/metrics.jsonl"), 3 + (int)i);
        kill(process, numbers[i]);
        check_exit(b.log, command_wait(process), 75);
        check_exit(b.log, run_tapeft(b.log, "train", b.recipe, b.output_key, "--resume", "--quiet"), 0);
        check_log_has(b.log, "resuming from");
        check_equal_run(&b);
        forget_output(&b);
    }
    bench_end(&b);
}

/* SIGTERM at any instant from exec on: before the handlers are there it ends the process, later it is a preemption. */
static void stopped_at_random_instants(void **state)
{
    struct bench b;
    uint64_t random = (uint64_t)setting("TAPEFT_KILL_SEED", 1) + 77;
    int stops = 0;
    (void)state;
    bench_begin(&b);
    for (int i = 0; i < 12; i++) {
        pid_t process =
            start_tapeft(b.log, "train", b.recipe, b.output_key, "save_steps=2", "resume_from_checkpoint=auto", "--quiet");
        sleep_seconds(uniform(&random) * 0.3);
        kill(process, SIGTERM);
        int status = command_wait(process);
        if (status != 0 && status != 75 && status != 128 + SIGTERM) check_exit(b.log, status, 75);
        stops += status == 75;
    }
    check_exit(b.log, run_tapeft(b.log, "train", b.recipe, b.output_key, "--resume", "--quiet"), 0);
    check_equal_run(&b);
    print_message("stopped %d times\n", stops);
    bench_end(&b);
}

static void saves_on_sigusr1(void **state)
{
    struct bench b;
    (void)state;
    bench_begin(&b);
    pid_t process = start_tapeft(b.log, "train", b.recipe, b.output_key, "--quiet");
    wait_for_lines(process, in_out(&b, "out/metrics.jsonl"), 2);
    kill(process, SIGUSR1);
    check_exit(b.log, command_wait(process), 0);
    check_equal_run(&b); /* it went on */
    bool saved = false;
    for (int step = 2; step < STEPS && !saved; step++) {
        char name[64];
        snprintf(name, sizeof name, "out/ckpt-%d/manifest.json", step);
        saved = tp_path_exists(in_out(&b, name));
    }
    if (!saved) fail_msg("no checkpoint but the last one");
    bench_end(&b);
}

/* A step of some seconds: thousands of micro-batches. */
static void write_slow_recipe(struct bench *b)
{
    char train[1024];
    tp_buf text;
    tp_buf_init(&text, 0);
    golden_path(train, sizeof train, "curves/llama-lora/batches.safetensors");
    tp_buf_text(&text, "datasets:\n");
    for (int i = 0; i < 100; i++) tp_buf_printf(&text, "  - {path: %s, type: tokens}\n", train);
    tp_buf_text(&text, "max_steps: 1\ngradient_accumulation_steps: 5000\n");
    char base[1024];
    tp_buf_printf(&text, "base_model: %s\nadapter: lora\nlora_r: 16\nprecision: fp32\nthreads: 1\noutput_dir: unset\n",
                  golden_path(base, sizeof base, "models/llama"));
    assert_int_equal(tp_file_write(NULL, b->recipe, text.data, text.len), TP_OK);
    tp_buf_free(&text);
}

static void second_interrupt_ends_at_once(void **state)
{
    struct bench b;
    (void)state;
    bench_begin(&b);
    write_slow_recipe(&b);
    pid_t process = start_tapeft(b.log, "train", b.recipe, b.output_key, "--quiet");
    wait_for_lines(process, in_out(&b, "out/timing.jsonl"), 1); /* its first step is under way, or about to be */
    sleep_seconds(0.2);
    kill(process, SIGINT);
    sleep_seconds(0.05);
    if (!command_runs(process)) fail_msg("ended by the first SIGINT in the middle of a step");
    /* On a busy machine the first one may not have been taken yet, and two that wait are one: more come until it ends. */
    while (command_runs(process)) {
        kill(process, SIGINT);
        sleep_seconds(0.05);
    }
    check_exit(b.log, command_wait(process), 128 + SIGINT);
    assert_false(tp_path_exists(in_out(&b, "out/adapter")));
    bench_end(&b);
}

static void one_writer(void **state)
{
    struct bench b;
    (void)state;
    bench_begin(&b);
    write_slow_recipe(&b);
    pid_t process = start_tapeft(b.log, "train", b.recipe, b.output_key, "--quiet");
    wait_for_lines(process, in_out(&b, "out/timing.jsonl"), 1); /* the last that it writes before its first step ends */
    char *before = describe_folder(b.out);
    check_exit(b.log, run_tapeft(b.log, "train", b.recipe, b.output_key, "--resume", "--quiet"), 4);
    check_log_has(b.log, "another process is training into this folder");
    char *after = describe_folder(b.out);
    assert_string_equal(before, after);
    free(before);
    free(after);
    assert_true(command_runs(process));
    kill(process, SIGKILL);
    assert_int_equal(command_wait(process), 128 + SIGKILL);
    bench_end(&b);
}

/* ---- finished, damaged, changed ---- */

static void finished_run_stays_as_it_is(void **state)
{
    struct bench b;
    (void)state;
    bench_begin(&b);
    char *before = describe_folder(b.reference);
    use_output(&b, "reference");
    check_exit(b.log, run_tapeft(b.log, "train", b.recipe, b.output_key, "--resume", "--quiet"), 0);
    check_exit(b.log, run_tapeft(b.log, "train", b.recipe, b.output_key, "resume_from_checkpoint=auto"), 0);
    check_log_has(b.log, "nothing to do");
    check_exit(b.log, run_tapeft(b.log, "train", b.recipe, b.output_key),
               2); /* it exists, and nothing says what to do with it */
    char *after = describe_folder(b.reference);
    assert_string_equal(before, after);
    free(before);
    free(after);
    bench_end(&b);
}

/* Stopped in the middle with three checkpoints. */
static void begin_stopped_run(struct bench *b)
{
    pid_t process = start_tapeft(b->log, "train", b->recipe, b->output_key, "save_steps=4", "--quiet");
    wait_for_lines(process, in_out(b, "out/metrics.jsonl"), 14);
    kill(process, SIGTERM);
    check_exit(b->log, command_wait(process), 75);
}

static int newest_step(struct bench *b, int below)
{
    for (int step = below - 1; step > 0; step--) {
        char name[64];
        snprintf(name, sizeof name, "out/ckpt-%d", step);
        if (tp_path_exists(in_out(b, name))) return step;
    }
    fail_msg("no checkpoint");
    return 0;
}

/* Flips one bit of ckpt-<step>/name. */
static void damage(struct bench *b, int step, const char *name)
{
    char path[128], *bytes;
    size_t n;
    snprintf(path, sizeof path, "out/ckpt-%d/%s", step, name);
    in_out(b, path);
    assert_int_equal(tp_file_read(NULL, b->s.path, (size_t)64 << 20, &bytes, &n), TP_OK);
    bytes[n / 2] = (char)(bytes[n / 2] ^ 4);
    assert_int_equal(tp_file_write(NULL, b->s.path, bytes, n), TP_OK);
    tp_free(bytes);
}

static void damaged_checkpoints_fall_back(void **state)
{
    static const char *const files[] = {"optimizer.safetensors", "adapter_model.safetensors", "state.json", "manifest.json",
                                        "adapter_config.json"};
    struct bench b;
    (void)state;
    bench_begin(&b);
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        char text[64];
        begin_stopped_run(&b);
        int newest = newest_step(&b, STEPS), older = newest_step(&b, newest);
        damage(&b, newest, files[i]);
        assert_int_equal(truncate(b.log, 0), 0);
        check_exit(b.log, run_tapeft(b.log, "train", b.recipe, b.output_key, "--resume"), 0);
        check_log_has(b.log, "warning: ");
        check_log_has(b.log, "falling back");
        snprintf(text, sizeof text, "ckpt-%d: step %d", older, older);
        check_log_has(b.log, text); /* resuming from .../ckpt-N: step N of ... */
        check_equal_run(&b);
        forget_output(&b);
    }
    /* Every one damaged: refused, and nothing is touched. */
    begin_stopped_run(&b);
    int first = newest_step(&b, STEPS), second = newest_step(&b, first), third = newest_step(&b, second);
    damage(&b, first, "state.json");
    damage(&b, second, "optimizer.safetensors");
    char cut[1200];
    snprintf(cut, sizeof cut, "%s/ckpt-%d/adapter_model.safetensors", b.out, third);
    assert_int_equal(truncate(cut, 100), 0);
    char *before = describe_folder(b.out);
    check_exit(b.log, run_tapeft(b.log, "train", b.recipe, b.output_key, "--resume"), 6);
    char *after = describe_folder(b.out);
    assert_string_equal(before, after);
    free(before);
    free(after);
    bench_end(&b);
}

static void copy_file(const char *from, const char *to, size_t flip)
{
    char *bytes;
    size_t n;
    assert_int_equal(tp_file_read(NULL, from, (size_t)64 << 20, &bytes, &n), TP_OK);
    if (flip > 0) bytes[n - flip] = (char)(bytes[n - flip] ^ 1);
    assert_int_equal(tp_file_write(NULL, to, bytes, n), TP_OK);
    tp_free(bytes);
}

/* Refused with the name of what changed; accepted by that name. */
static void check_changed(struct bench *b, const char *what, const char *change)
{
    char accept[64], text[64];
    snprintf(accept, sizeof accept, "--accept=%s", what);
    snprintf(text, sizeof text, "%s changed", what);
    begin_stopped_run(b);
    char *before = describe_folder(b->out);
    assert_int_equal(truncate(b->log, 0), 0);
    check_exit(b->log, run_tapeft(b->log, "train", b->recipe, b->output_key, "--resume", change), 6);
    check_log_has(b->log, text);
    char *after = describe_folder(b->out);
    assert_string_equal(before, after);
    free(before);
    free(after);
    check_exit(b->log, run_tapeft(b->log, "train", b->recipe, b->output_key, "--resume", change, "--accept=version"), 6);
    check_exit(b->log, run_tapeft(b->log, "train", b->recipe, b->output_key, "--resume", change, accept), 0);
    assert_true(tp_path_exists(in_out(b, "out/adapter/adapter_model.safetensors")));
    forget_output(b);
}

static void changes_are_named(void **state)
{
    struct bench b;
    char from[1024], to[1024], change[1100];
    (void)state;
    bench_begin(&b);
    check_changed(&b, "recipe", "learning_rate=0.02");
    check_changed(&b, "recipe", "lora_alpha=7");

    snprintf(to, sizeof to, "%s", scratch_path(&b.s, "batches.safetensors"));
    copy_file(golden_path(from, sizeof from, "curves/llama-lora-all-linear-accum/batches.safetensors"), to, 0);
    snprintf(change, sizeof change, "datasets.0.path=%.1000s", to);
    /* The recipe names another path, so both differ; a file changed in place is the next case. */
    begin_stopped_run(&b);
    assert_int_equal(truncate(b.log, 0), 0);
    check_exit(b.log, run_tapeft(b.log, "train", b.recipe, b.output_key, "--resume", change), 6);
    check_log_has(b.log, "recipe,data changed");
    forget_output(&b);

    /* Models and data of our own, changed in place between the two runs. */
    tp_buf text;
    tp_buf_init(&text, 0);
    char model[1024], weights[1100];
    snprintf(model, sizeof model, "%s", scratch_path(&b.s, "model"));
    snprintf(weights, sizeof weights, "%s/model.safetensors", model);
    assert_int_equal(tp_folder_make(NULL, model), TP_OK);
    copy_file(golden_path(from, sizeof from, "models/llama/config.json"), scratch_path(&b.s, "model/config.json"), 0);
    copy_file(golden_path(from, sizeof from, "models/llama/model.safetensors"), weights, 0);
    copy_file(golden_path(from, sizeof from, "curves/llama-lora/batches.safetensors"), to, 0);
    tp_buf_printf(
        &text,
        "base_model: %s\ndatasets:\n  - {path: %s, type: tokens}\nadapter: lora\nlora_r: 16\nprecision: fp32\nthreads: 1\n",
        model, to);
    tp_buf_printf(
        &text, "gradient_accumulation_steps: 2\nmax_steps: %d\nlearning_rate: 0.01\nsave_total_limit: 3\noutput_dir: unset\n",
        STEPS);
    assert_int_equal(tp_file_write(NULL, b.recipe, text.data, text.len), TP_OK);
    tp_buf_free(&text);
    static const char *const parts[] = {"data", "base"};
    for (int i = 0; i < 2; i++) {
        char accept[64], named[64];
        snprintf(accept, sizeof accept, "--accept=%s", parts[i]);
        snprintf(named, sizeof named, "%s changed", parts[i]);
        begin_stopped_run(&b);
        copy_file(
            golden_path(from, sizeof from, i == 0 ? "curves/llama-lora/batches.safetensors" : "models/llama/model.safetensors"),
            i == 0 ? to : weights, 40);
        assert_int_equal(truncate(b.log, 0), 0);
        check_exit(b.log, run_tapeft(b.log, "train", b.recipe, b.output_key, "--resume"), 6);
        check_log_has(b.log, named);
        check_exit(b.log, run_tapeft(b.log, "train", b.recipe, b.output_key, "--resume", accept), 0);
        forget_output(&b);
    }
    bench_end(&b);
}

static void optimizer_state_is_needed(void **state)
{
    struct bench b;
    char name[64];
    (void)state;
    bench_begin(&b);
    pid_t process = start_tapeft(b.log, "train", b.recipe, b.output_key, "save_optimizer=false", "save_steps=4", "--quiet");
    wait_for_lines(process, in_out(&b, "out/metrics.jsonl"), 14);
    kill(process, SIGTERM);
    check_exit(b.log, command_wait(process), 75);
    snprintf(name, sizeof name, "out/ckpt-%d/optimizer.safetensors", newest_step(&b, STEPS));
    assert_false(tp_path_exists(in_out(&b, name)));
    check_exit(b.log, run_tapeft(b.log, "train", b.recipe, b.output_key, "--resume", "--quiet"), 6);
    check_log_has(b.log, "--fresh-optimizer");
    check_exit(b.log, run_tapeft(b.log, "train", b.recipe, b.output_key, "--resume", "--fresh-optimizer", "--quiet"), 0);
    bench_end(&b);
}

/* ---- no room ---- */

/* While a process may not write files of more than some kilobytes, a save fails; the run goes on, warns, and saves again later.
 */
static void file_size_limit_during_saves(void **state)
{
    struct bench b;
    char first[64];
    (void)state;
    bench_begin(&b);
    pid_t process = start_tapeft(b.log, "train", b.recipe, b.output_key, "save_steps=1", "save_total_limit=50", "--quiet");
    wait_for_lines(process, in_out(&b, "out/metrics.jsonl"), 4);
    struct rlimit limit = {.rlim_cur = 30000, .rlim_max = RLIM_INFINITY}, none = {RLIM_INFINITY, RLIM_INFINITY};
    assert_int_equal(prlimit(process, RLIMIT_FSIZE, &limit, NULL), 0);
    for (double waited = 0; !log_has(b.log, "the run goes on and tries again"); waited += 0.001) {
        if (waited > 60 || !command_runs(process)) fail_msg("no warning about a failed save");
        sleep_seconds(0.001);
    }
    assert_int_equal(prlimit(process, RLIMIT_FSIZE, &none, NULL), 0);
    check_exit(b.log, command_wait(process), 0);
    check_log_has(b.log, "warning: no checkpoint at step");
    check_equal_run(&b);
    snprintf(first, sizeof first, "out/ckpt-%d/manifest.json", 2);
    assert_true(tp_path_exists(in_out(&b, first)));
    check_exit(b.log, run_tapeft(b.log, "inspect", in_out(&b, "out/ckpt-2")), 0);
    bench_end(&b);
}

/* A full disk: tmpfs with room for two checkpoints or so. */
static void disk_full_during_saves(void **state)
{
    struct bench b;
    char disk[1024], ballast[1100];
    (void)state;
    bench_begin(&b);
    snprintf(disk, sizeof disk, "%s", scratch_path(&b.s, "disk"));
    snprintf(ballast, sizeof ballast, "%s/ballast", disk);
    assert_int_equal(tp_folder_make(NULL, disk), TP_OK);
    if (mount("tmpfs", disk, "tmpfs", 0, "size=4m") != 0) {
        print_message("*** NOT TESTED: cannot mount a small tmpfs: %s ***\n", strerror(errno));
        bench_end(&b);
        skip();
    }
    use_output(&b, "disk/out");
    pid_t process = start_tapeft(b.log, "train", b.recipe, b.output_key, "save_steps=2", "logging_steps=1", "--quiet");
    char metrics[1200];
    snprintf(metrics, sizeof metrics, "%s/metrics.jsonl", b.out);
    wait_for_lines(process, metrics, 6);
    FILE *fill = fopen(ballast, "wb");
    assert_non_null(fill);
    setvbuf(fill, NULL, _IONBF, 0);
    while (fwrite(metrics, 1, 1024, fill) == 1024) continue;
    fclose(fill);
    bool warned = false;
    for (double waited = 0; !warned && command_runs(process) && waited < 60; waited += 0.001) {
        sleep_seconds(0.001);
        warned = log_has(b.log, "the run goes on and tries again");
    }
    assert_int_equal(unlink(ballast), 0);
    int status = command_wait(process);
    if (warned) check_exit(b.log, status, 0);
    int ended = umount2(disk, 0) == 0 ? 0 : errno;
    (void)ended;
    if (!warned) fail_msg("no warning about a failed save");
    bench_end(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(killed_at_random_instants),
        cmocka_unit_test(stopped_by_signals),
        cmocka_unit_test(stopped_at_random_instants),
        cmocka_unit_test(saves_on_sigusr1),
        cmocka_unit_test(second_interrupt_ends_at_once),
        cmocka_unit_test(one_writer),
        cmocka_unit_test(finished_run_stays_as_it_is),
        cmocka_unit_test(damaged_checkpoints_fall_back),
        cmocka_unit_test(changes_are_named),
        cmocka_unit_test(optimizer_state_is_needed),
        cmocka_unit_test(file_size_limit_during_saves),
        cmocka_unit_test(disk_full_during_saves),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
