/* Checkpoints: what is saved comes back, damage of any file is noticed and an older one taken, and only our own are cleared
 * away. */
#include "tests/support.h"

#include <dirent.h>
#include <math.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/log.h"
#include "base/mem.h"
#include "tests/scratch.h"
#include "trainers/checkpoint.h"

struct fixture {
    tp_ctx ctx;
    tp_log log;
    int warnings;
    char last[1024]; /* warning */
    scratch s;
    tp_model *model;
    tp_adapter *adapter;
    tp_optim *optim;
    tp_run_state state;
};

static void count_warning(tp_log_level level, const char *text, void *user)
{
    struct fixture *f = user;
    if (level < TP_LOG_WARN) return;
    f->warnings++;
    snprintf(f->last, sizeof f->last, "%s", text);
}

static void begin(struct fixture *f)
{
    char path[1024];
    tp_model_options options = {.precision = TP_F32};
    tp_optim_options adamw = {.beta1 = 0.9, .beta2 = 0.999, .epsilon = 1e-8};
    memset(f, 0, sizeof *f);
    tp_ctx_init(&f->ctx);
    f->log = (tp_log){TP_LOG_INFO, count_warning, f};
    f->ctx.log = &f->log;
    scratch_begin(&f->s);
    assert_ok(&f->ctx, tp_device_open(&f->ctx, "cpu", 1, &f->ctx.device));
    assert_ok(&f->ctx, tp_model_open(&f->ctx, golden_path(path, sizeof path, "bad/adapter/base"), &options, &f->model));
    assert_ok(&f->ctx,
              tp_adapter_open(&f->ctx, f->model, golden_path(path, sizeof path, "bad/adapter/ok"), false, &f->adapter));
    assert_ok(&f->ctx, tp_params_train(&f->ctx, &f->adapter->lora->params));
    assert_ok(&f->ctx, tp_optim_open(&f->ctx, "adamw", &adamw, &f->adapter->lora->params, &f->optim));
    f->state = (tp_run_state){.loss_mean = 1.0 / 3,
                              .loss_var = 1e-9,
                              .loss_count = 17,
                              .best_metric = NAN,
                              .run_id = "aa",
                              .recipe = "bb",
                              .data = "cc",
                              .base = "dd",
                              .version = "1",
                              .device = "cpu"};
}

static void end(struct fixture *f)
{
    tp_optim_close(f->optim);
    tp_adapter_close(f->adapter);
    tp_model_free(f->model);
    tp_device_close(f->ctx.device);
    scratch_end(&f->s);
}

/* Values and moments that tell which step they belong to. */
static void fill(struct fixture *f, int64_t step)
{
    tp_params *p = &f->adapter->lora->params;
    for (size_t i = 0; i < p->n; i++)
        for (int64_t k = 0; k < p->list[i].count; k++) {
            int64_t at = p->list[i].offset + k;
            p->values[at] = (float)step + 0.001f * (float)k;
            f->optim->state[0][at] = -(float)step - 0.002f * (float)k;
            f->optim->state[1][at] = (float)step * 0.5f + 0.003f * (float)k;
        }
}

static void save(struct fixture *f, int64_t step)
{
    fill(f, step);
    f->state.step = f->state.updates = step;
    assert_ok(&f->ctx, tp_checkpoint_save(&f->ctx, f->s.folder, f->adapter->lora, f->model, f->optim, &f->state));
}

static bool is_filled(struct fixture *f, int64_t step)
{
    tp_params *p = &f->adapter->lora->params;
    bool same = true;
    for (size_t i = 0; i < p->n; i++)
        for (int64_t k = 0; k < p->list[i].count; k++) {
            int64_t at = p->list[i].offset + k;
            same = same && p->values[at] == (float)step + 0.001f * (float)k &&
                   f->optim->state[0][at] == -(float)step - 0.002f * (float)k &&
                   f->optim->state[1][at] == (float)step * 0.5f + 0.003f * (float)k;
        }
    return same;
}

/* The newest good one ends in this name; "": there is none. */
static void assert_newest(struct fixture *f, const char *name)
{
    char *path;
    assert_ok(&f->ctx, tp_checkpoint_newest(&f->ctx, f->s.folder, &path));
    if (path == NULL && name[0] != '\0') fail_msg("no checkpoint, expected %s", name);
    if (path != NULL && (name[0] == '\0' || !tp_ends_with(path, name))) fail_msg("%s, expected %s", path, name);
    tp_free(path);
}

/* ---- saving and loading ---- */

static void test_round_trip(void **state)
{
    struct fixture f;
    tp_run_state back;
    (void)state;
    begin(&f);
    assert_newest(&f, "");
    save(&f, 7);
    f.state.best_metric = 0.1; /* another time with a best value */
    f.state.best_step = 5;
    f.state.evals_without_gain = 2;
    f.state.skipped_in_row = 1;
    f.state.over_threshold = 3;
    f.state.scale = (tp_loss_scale){0x1p-3 * 65536, 1999};
    save(&f, 12);
    assert_newest(&f, "/ckpt-12");
    fill(&f, 99);
    assert_ok(&f.ctx, tp_checkpoint_load(&f.ctx, scratch_path(&f.s, "ckpt-12"), f.adapter->lora, f.optim));
    assert_true(is_filled(&f, 12));
    assert_ok(&f.ctx, tp_checkpoint_read_state(&f.ctx, f.s.path, &back));
    assert_int_equal(back.step, 12);
    assert_int_equal(back.updates, 12);
    assert_int_equal(back.loss_count, 17);
    assert_int_equal(back.best_step, 5);
    assert_int_equal(back.evals_without_gain, 2);
    assert_int_equal(back.skipped_in_row, 1);
    assert_int_equal(back.over_threshold, 3);
    assert_true(back.scale.value == 8192 && back.scale.streak == 1999);
    assert_true(back.loss_mean == 1.0 / 3 && back.loss_var == 1e-9 && back.best_metric == 0.1);
    assert_string_equal(back.run_id, "aa");
    assert_string_equal(back.recipe, "bb");
    assert_string_equal(back.data, "cc");
    assert_string_equal(back.base, "dd");
    assert_string_equal(back.device, "cpu");
    assert_ok(&f.ctx, tp_checkpoint_load(&f.ctx, scratch_path(&f.s, "ckpt-7"), f.adapter->lora, f.optim));
    assert_true(is_filled(&f, 7));
    assert_ok(&f.ctx, tp_checkpoint_read_state(&f.ctx, f.s.path, &back));
    assert_true(isnan(back.best_metric));                         /* there was none yet */
    assert_true(back.scale.value == 0 && back.scale.streak == 0); /* as in what was written before there was fp16 */
    end(&f);
}

/* A checkpoint is an adapter too. */
static void test_is_an_adapter(void **state)
{
    struct fixture f;
    tp_adapter *again;
    (void)state;
    begin(&f);
    save(&f, 3);
    size_t bytes = (size_t)f.adapter->lora->params.elements * sizeof(float);
    float *values = malloc(bytes);
    memcpy(values, f.adapter->lora->params.values, bytes);
    tp_optim_close(f.optim);
    f.optim = NULL;
    tp_adapter_close(f.adapter);
    f.adapter = NULL;
    assert_ok(&f.ctx, tp_adapter_open(&f.ctx, f.model, scratch_path(&f.s, "ckpt-3"), false, &again));
    assert_memory_equal(again->lora->params.values, values, bytes);
    tp_adapter_close(again);
    free(values);
    end(&f);
}

static void test_without_optimizer(void **state)
{
    struct fixture f;
    (void)state;
    begin(&f);
    fill(&f, 4);
    f.state.step = 4;
    assert_ok(&f.ctx, tp_checkpoint_save(&f.ctx, f.s.folder, f.adapter->lora, f.model, NULL, &f.state));
    assert_newest(&f, "/ckpt-4");
    assert_int_equal(tp_checkpoint_load(&f.ctx, scratch_path(&f.s, "ckpt-4"), f.adapter->lora, f.optim), TP_CHECKPOINT);
    assert_non_null(strstr(f.ctx.message, "--fresh-optimizer"));
    tp_ctx_clear(&f.ctx);
    fill(&f, 9);
    assert_ok(&f.ctx, tp_checkpoint_load(&f.ctx, f.s.path, f.adapter->lora, NULL));
    assert_true(f.adapter->lora->params.values[0] == 4);
    end(&f);
}

/* ---- damage ---- */

static void rewrite(struct fixture *f, const char *path, char *bytes, size_t n)
{
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, n, file), n);
    assert_int_equal(fclose(file), 0);
    (void)f;
}

/* Kinds of damage: a flipped bit at the front, in the middle, at the end; cut off; grown; gone. */
#define N_DAMAGES 6
static void damage(struct fixture *f, const char *path, int kind)
{
    char *bytes;
    size_t n;
    assert_ok(&f->ctx, tp_file_read(&f->ctx, path, (size_t)1 << 26, &bytes, &n));
    char *grown = malloc(n + 1);
    memcpy(grown, bytes, n);
    grown[n] = ' ';
    if (kind < 3) {
        grown[kind == 0 ? 0 : kind == 1 ? n / 2 : n - 1] ^= 4;
        rewrite(f, path, grown, n);
    } else if (kind == 5) {
        assert_int_equal(unlink(path), 0);
    } else {
        rewrite(f, path, grown, kind == 3 ? n - 1 : n + 1);
    }
    free(grown);
    tp_free(bytes);
}

static void test_falls_back(void **state)
{
    static const char *const files[] = {"adapter_config.json",   "adapter_model.safetensors",
                                        "optimizer.safetensors", "state.json",
                                        "manifest.json",         "tapeft.json"};
    struct fixture f;
    int unnoticed = 0;
    (void)state;
    begin(&f);
    save(&f, 5);
    for (size_t i = 0; i < sizeof files / sizeof *files; i++)
        for (int kind = 0; kind < N_DAMAGES; kind++) {
            char name[64], path[1024];
            save(&f, 10); /* in place of the damaged one */
            f.warnings = 0;
            snprintf(name, sizeof name, "ckpt-10/%s", files[i]);
            snprintf(path, sizeof path, "%s", scratch_path(&f.s, name));
            damage(&f, path, kind);
            if (strcmp(files[i], "manifest.json") == 0 && (kind == 3 || kind == 4)) { /* white space at its end says nothing */
                assert_newest(&f, "/ckpt-10");
                unnoticed++;
                continue;
            }
            assert_newest(&f, "/ckpt-5");
            if (f.warnings != 1 || strstr(f.last, "ckpt-10") == NULL)
                fail_msg("%s, damage %d: %d warnings, \"%s\"", files[i], kind, f.warnings, f.last);
        }
    assert_int_equal(unnoticed, 2);
    save(&f, 10);
    assert_newest(&f, "/ckpt-10");
    end(&f);
}

static void test_all_damaged(void **state)
{
    struct fixture f;
    char *path;
    (void)state;
    begin(&f);
    save(&f, 1);
    save(&f, 2);
    damage(&f, scratch_path(&f.s, "ckpt-1/state.json"), 1);
    damage(&f, scratch_path(&f.s, "ckpt-2/adapter_model.safetensors"), 2);
    assert_status(&f.ctx, TP_CHECKPOINT, tp_checkpoint_newest(&f.ctx, f.s.folder, &path));
    assert_null(path);
    assert_int_equal(f.warnings, 2);
    end(&f);
}

/* The newest is the one with the highest step, not the last name of a listing; what only looks like one does not count. */
static void test_order_and_strangers(void **state)
{
    struct fixture f;
    (void)state;
    begin(&f);
    assert_ok(&f.ctx, tp_file_write(&f.ctx, scratch_path(&f.s, "ckpt-"), "", 0));
    assert_ok(&f.ctx, tp_folder_make(&f.ctx, scratch_path(&f.s, "ckpt-x")));
    assert_ok(&f.ctx, tp_folder_make(&f.ctx, scratch_path(&f.s, "ckpt--3")));
    assert_ok(&f.ctx, tp_folder_make(&f.ctx, scratch_path(&f.s, "ckpt-7.tmp-1-ab")));
    assert_newest(&f, "");
    save(&f, 9);
    save(&f, 100);
    save(&f, 20);
    assert_newest(&f, "/ckpt-100");
    assert_int_equal(f.warnings, 0);
    end(&f);
}

/* state.json with other contents under a manifest that fits: as if a bug or another version had written it. */
static void test_bad_state(void **state)
{
    static const char *const texts[] = {
        "", "{}", "[]", "{\"format\": 2}", "{\"format\": 1, \"step\": -1}", "{\"format\": 1, \"step\": 1.5}", "null"};
    struct fixture f;
    tp_run_state back;
    (void)state;
    begin(&f);
    save(&f, 1);
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        assert_ok(&f.ctx, tp_file_write(&f.ctx, scratch_path(&f.s, "ckpt-1/state.json"), texts[i], strlen(texts[i])));
        assert_status(&f.ctx, TP_CHECKPOINT, tp_checkpoint_read_state(&f.ctx, scratch_path(&f.s, "ckpt-1"), &back));
    }
    assert_status(&f.ctx, TP_CHECKPOINT, tp_checkpoint_read_state(&f.ctx, scratch_path(&f.s, "ckpt-2"), &back));
    f.state.scale.value = 3; /* no power of two */
    save(&f, 3);
    assert_status(&f.ctx, TP_CHECKPOINT, tp_checkpoint_read_state(&f.ctx, scratch_path(&f.s, "ckpt-3"), &back));
    end(&f);
}

/* ---- a save that fails ---- */

static void test_not_finite(void **state)
{
    struct fixture f;
    (void)state;
    begin(&f);
    save(&f, 5);
    fill(&f, 6);
    f.adapter->lora->params.values[1] = NAN;
    f.state.step = 6;
    assert_status(&f.ctx, TP_NUMERIC, tp_checkpoint_save(&f.ctx, f.s.folder, f.adapter->lora, f.model, f.optim, &f.state));
    assert_false(tp_path_exists(scratch_path(&f.s, "ckpt-6")));
    assert_newest(&f, "/ckpt-5");
    assert_int_equal(f.warnings, 0);
    end(&f);
}

/* ---- housekeeping ---- */

static bool there(struct fixture *f, const char *name)
{
    return tp_path_exists(scratch_path(&f->s, name));
}

static void test_rotate(void **state)
{
    struct fixture f;
    (void)state;
    begin(&f);
    snprintf(f.state.run_id, sizeof f.state.run_id, "another");
    save(&f, 1);
    save(&f, 6);
    snprintf(f.state.run_id, sizeof f.state.run_id, "aa");
    for (int64_t step = 2; step <= 10; step += 2)
        if (step != 6) save(&f, step);
    assert_ok(&f.ctx, tp_folder_make(&f.ctx, scratch_path(&f.s, "ckpt-3"))); /* not even a checkpoint */
    assert_ok(&f.ctx, tp_file_write(&f.ctx, scratch_path(&f.s, "notes.txt"), "mine", 4));
    tp_checkpoint_rotate(&f.ctx, f.s.folder, "aa", 2);
    assert_true(there(&f, "ckpt-10") && there(&f, "ckpt-8"));
    assert_false(there(&f, "ckpt-4") || there(&f, "ckpt-2"));
    assert_true(there(&f, "ckpt-1") && there(&f, "ckpt-6") && there(&f, "ckpt-3") && there(&f, "notes.txt"));
    tp_checkpoint_rotate(&f.ctx, f.s.folder, "aa", 2);
    assert_true(there(&f, "ckpt-10") && there(&f, "ckpt-8"));
    tp_checkpoint_rotate(&f.ctx, f.s.folder, "another", 1);
    assert_true(there(&f, "ckpt-6") && !there(&f, "ckpt-1"));
    assert_int_equal(f.warnings, 0);
    assert_int_equal(f.ctx.status, TP_OK);
    end(&f);
}

/* A process id that no longer runs. */
static pid_t dead_process(void)
{
    pid_t child = fork();
    if (child == 0) _exit(0);
    assert_int_equal(waitpid(child, NULL, 0), child);
    return child;
}

static void test_sweep(void **state)
{
    static const char *const prefixes[] = {"ckpt-8", "adapter", "best"};
    struct fixture f;
    char name[128];
    (void)state;
    begin(&f);
    save(&f, 4);
    for (int dead = 0; dead < 2; dead++)
        for (size_t i = 0; i < 3; i++) {
            snprintf(name, sizeof name, "%s.tmp-%lld-0123abcd", prefixes[i], (long long)(dead ? dead_process() : getppid()));
            assert_ok(&f.ctx, tp_folder_make(&f.ctx, scratch_path(&f.s, name)));
            snprintf(name + strlen(name), sizeof name - strlen(name), "/state.json");
            assert_ok(&f.ctx, tp_file_write(&f.ctx, scratch_path(&f.s, name), "{}", 2));
        }
    assert_ok(&f.ctx, tp_folder_make(&f.ctx, scratch_path(&f.s, "mine.tmp-1-0123abcd")));
    assert_ok(&f.ctx, tp_checkpoint_sweep(&f.ctx, f.s.folder));
    size_t left = 0;
    DIR *dir = opendir(f.s.folder);
    assert_non_null(dir);
    for (struct dirent *entry; (entry = readdir(dir)) != NULL;) left += strstr(entry->d_name, ".tmp-") != NULL;
    closedir(dir);
    assert_int_equal(left, 4); /* those of a process that runs, and the stranger */
    assert_true(there(&f, "mine.tmp-1-0123abcd"));
    assert_newest(&f, "/ckpt-4");
    end(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip), cmocka_unit_test(test_is_an_adapter), cmocka_unit_test(test_without_optimizer),
        cmocka_unit_test(test_falls_back), cmocka_unit_test(test_all_damaged),   cmocka_unit_test(test_order_and_strangers),
        cmocka_unit_test(test_bad_state),  cmocka_unit_test(test_not_finite),    cmocka_unit_test(test_rotate),
        cmocka_unit_test(test_sweep),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
