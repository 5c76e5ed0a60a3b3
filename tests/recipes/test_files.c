/* What touches the file system: includes, input paths, the output folder, and what this version offers. */
#include "tests/support.h"

#include <sys/stat.h>
#include <unistd.h>

#include "base/file.h"
#include "recipes/keys.h"

#define TAIL "datasets: [{path: d.jsonl}]\noutput_dir: out\n"

/* A folder of its own, which is the working directory while a test runs. */
struct place {
    tp_ctx ctx;
    tp_config config;
    tp_problems problems;
    tp_recipe *recipe;
    char folder[64], back[1024];
};

static int enter(void **state)
{
    struct place *p = calloc(1, sizeof *p);
    tp_ctx_init(&p->ctx);
    snprintf(p->folder, sizeof p->folder, "/tmp/tapeft-test-XXXXXX");
    assert_non_null(getcwd(p->back, sizeof p->back));
    assert_non_null(mkdtemp(p->folder));
    assert_int_equal(chdir(p->folder), 0);
    *state = p;
    return 0;
}

static int leave(void **state)
{
    struct place *p = *state;
    tp_recipe_free(p->recipe);
    tp_problems_free(&p->problems);
    assert_int_equal(chdir(p->back), 0);
    tp_status st = tp_folder_remove(&p->ctx, p->folder);
    free(p);
    return st == TP_OK ? 0 : -1;
}

static void put(const char *path, const char *text)
{
    FILE *f = fopen(path, "w");
    if (f == NULL) fail_msg("cannot make %s", path);
    fputs(text, f);
    fclose(f);
}

/* Loads r.yaml afresh. */
static tp_status load(struct place *p)
{
    tp_recipe_options options = {.schema = &tp_recipe_schema};
    tp_recipe_free(p->recipe);
    tp_problems_free(&p->problems);
    tp_ctx_clear(&p->ctx);
    return tp_recipe_load(&p->ctx, "r.yaml", &options, &p->config, &p->problems, &p->recipe);
}

static void expect(const struct place *p, const char *message)
{
    for (size_t i = 0; i < p->problems.n; i++)
        if (strcmp(p->problems.items[i].text, message) == 0) return;
    for (size_t i = 0; i < p->problems.n; i++) print_message("  %s\n", p->problems.items[i].text);
    fail_msg("no problem reads: %s", message);
}

/* ---- include ---- */

static void test_include_order(void **state)
{
    struct place *p = *state;
    assert_int_equal(mkdir("sub", 0777), 0);
    put("sub/base.yaml", "include: deeper.yaml\nlora_rank: 4\nseed: 1\nquant: {type: fp4, block: 128}\n" TAIL);
    put("sub/deeper.yaml", "seed: 9\nthreads: 3\nbase_model: deep\n");
    put("other.yaml", "seed: 2\nsample_prompts: [c]\nquant: {block: 32}\n");
    put("r.yaml", "lora_r: 8\ninclude: [sub/base.yaml, other.yaml]\nbase_model: m\nsample_prompts: [a]\n");
    assert_ok(&p->ctx, load(p));
    assert_int_equal(p->config.lora.rank, 8);                  /* ours, over another name of it */
    assert_int_equal(p->config.run.seed, 2);                   /* the later file */
    assert_int_equal(p->config.run.threads, 3);                /* two levels down */
    assert_string_equal(p->config.run.base_model, "m");        /* the file itself */
    assert_int_equal(p->config.quant.type, TP_QUANT_TYPE_FP4); /* blocks merge */
    assert_int_equal(p->config.quant.block, 32);
    assert_int_equal(p->config.output.sample_prompts.n, 1); /* lists are replaced */
    char out[100];
    assert_string_equal(tp_recipe_where(p->recipe, "threads", out, sizeof out), "sub/deeper.yaml:2:10");
}

static void test_include_refusals(void **state)
{
    struct place *p = *state;
    put("r.yaml", "include: r.yaml\nbase_model: m\n" TAIL);
    assert_status(&p->ctx, TP_INVALID, load(p));
    expect(p, "r.yaml:1:10: include: r.yaml: includes itself");
    put("r.yaml", "include: ./a.yaml\nbase_model: m\n" TAIL);
    put("a.yaml", "include: ./r.yaml\n"); /* the same file by another path */
    assert_status(&p->ctx, TP_INVALID, load(p));
    expect(p, "./a.yaml:1:10: include: ././r.yaml: includes itself");
}

static void test_include_cycle_of_two(void **state)
{
    struct place *p = *state;
    put("r.yaml", "include: a.yaml\nbase_model: m\n" TAIL);
    put("a.yaml", "include: r.yaml\n");
    assert_status(&p->ctx, TP_INVALID, load(p));
    expect(p, "a.yaml:1:10: include: r.yaml: includes itself");
    assert_int_equal(p->problems.n_errors, 1);
}

static void test_include_of_nothing(void **state)
{
    struct place *p = *state;
    put("r.yaml", "include: none.yaml\nbase_model: m\n" TAIL);
    assert_status(&p->ctx, TP_IO_READ, load(p));
    assert_int_equal(p->problems.n_errors, 1);
    assert_non_null(strstr(p->problems.items[0].text, "r.yaml:1:10: include: "));
    assert_non_null(strstr(p->problems.items[0].text, "none.yaml"));
    put("r.yaml", "include: ''\nbase_model: m\n" TAIL);
    assert_status(&p->ctx, TP_INVALID, load(p));
    put("r.yaml", "include: '${x}'\nbase_model: m\n" TAIL);
    assert_status(&p->ctx, TP_INVALID, load(p));
    put("r.yaml", "include: [[a]]\nbase_model: m\n" TAIL);
    assert_status(&p->ctx, TP_INVALID, load(p));
    expect(p, "r.yaml:1:11: include: expected a path or a list of paths, got a list");
    put("r.yaml", "include: e.yaml\nbase_model: m\n" TAIL);
    put("e.yaml", "");
    assert_status(&p->ctx, TP_INVALID, load(p));
    expect(p, "e.yaml: empty; a recipe is lines of key: value");
}

/* r includes 1 includes 2 ... : `depth` files below the recipe. */
static tp_status load_chain(struct place *p, int depth)
{
    char path[40], text[100];
    put("r.yaml", "include: 1.yaml\nbase_model: m\n" TAIL);
    for (int i = 1; i <= depth; i++) {
        snprintf(path, sizeof path, "%d.yaml", i);
        if (i < depth)
            snprintf(text, sizeof text, "include: %d.yaml\n", i + 1);
        else
            snprintf(text, sizeof text, "seed: 5\n");
        put(path, text);
    }
    return load(p);
}

static void test_include_depth(void **state)
{
    struct place *p = *state;
    assert_ok(&p->ctx, load_chain(p, TP_RECIPE_INCLUDE_DEPTH - 1));
    assert_ok(&p->ctx, load_chain(p, TP_RECIPE_INCLUDE_DEPTH));
    assert_int_equal(p->config.run.seed, 5);
    assert_status(&p->ctx, TP_INVALID, load_chain(p, TP_RECIPE_INCLUDE_DEPTH + 1));
    expect(p, "8.yaml:1:10: include: 9.yaml: included more than 8 levels deep");
}

/* Each file names the next twice: 2^n readings without a limit on files. */
static void test_include_count(void **state)
{
    struct place *p = *state;
    char path[40], text[100];
    put("r.yaml", "include: [1.yaml, 1.yaml]\nbase_model: m\n" TAIL);
    for (int i = 1; i < 8; i++) {
        snprintf(path, sizeof path, "%d.yaml", i);
        snprintf(text, sizeof text, "include: [%d.yaml, %d.yaml]\n", i + 1, i + 1);
        put(path, text);
    }
    put("8.yaml", "seed: 5\n");
    assert_status(&p->ctx, TP_INVALID, load(p));
    assert_int_equal(p->problems.n_errors, 1);
    assert_non_null(strstr(p->problems.items[0].text, "more than 64 files in one recipe"));
}

/* ---- the recipe file itself ---- */

static void test_unreadable_recipes(void **state)
{
    struct place *p = *state;
    assert_status(&p->ctx, TP_IO_READ, load(p));
    assert_int_equal(p->problems.n_errors, 1);
    char *text = malloc((5u << 20) + 1);
    memset(text, '#', 5u << 20);
    text[5u << 20] = '\0';
    put("r.yaml", text);
    free(text);
    assert_status(&p->ctx, TP_INVALID, load(p)); /* R10: class 2, as everything about the text */
    assert_non_null(strstr(p->problems.items[0].text, "r.yaml"));
}

/* ---- inputs ---- */

static void test_inputs(void **state)
{
    struct place *p = *state;
    put("r.yaml", "base_model: m\n" TAIL "test_datasets: [{path: d.jsonl}, {path: e.jsonl}]\nchat_template: chatml\n"
                  "resume_from_checkpoint: auto\ncache_dir: c\n");
    assert_ok(&p->ctx, load(p));
    assert_status(&p->ctx, TP_IO_READ, tp_recipe_check_inputs(&p->ctx, p->recipe, &p->problems));
    expect(p, "r.yaml:1:13: base_model: m does not exist");
    expect(p, "r.yaml:2:19: datasets.0.path: d.jsonl does not exist");
    expect(p, "r.yaml:4:24: test_datasets.0.path: d.jsonl does not exist");
    expect(p, "r.yaml:4:41: test_datasets.1.path: e.jsonl does not exist");
    assert_int_equal(p->problems.n_errors, 4);
    put("d.jsonl", "");
    put("e.jsonl", "");
    assert_int_equal(mkdir("m", 0777), 0);
    assert_ok(&p->ctx, load(p));
    assert_ok(&p->ctx, tp_recipe_check_inputs(&p->ctx, p->recipe, &p->problems));
    put("r.yaml", "base_model: m\n" TAIL "chat_template: chat_ml\n");
    assert_ok(&p->ctx, load(p));
    assert_status(&p->ctx, TP_IO_READ, tp_recipe_check_inputs(&p->ctx, p->recipe, &p->problems));
    expect(p, "r.yaml:4:16: chat_template: chat_ml does not exist");
}

/* ---- R11: the output folder ---- */

static tp_status check_output(struct place *p, const char *output, const char *more)
{
    char text[400];
    snprintf(text, sizeof text, "base_model: m\ndatasets: [{path: d.jsonl}]\noutput_dir: %s\n%s\n", output, more);
    put("r.yaml", text);
    assert_ok(&p->ctx, load(p));
    return tp_config_check_output(&p->ctx, p->recipe, &p->config, &p->problems);
}

static void test_R11_output(void **state)
{
    struct place *p = *state;
    char text[200];
    assert_int_equal(mkdir("m", 0777), 0);
    assert_int_equal(mkdir("old", 0777), 0);
    put("file", "");
    assert_ok(&p->ctx, check_output(p, "new", ""));
    assert_ok(&p->ctx, check_output(p, "a/b/c", ""));
    snprintf(text, sizeof text, "%s/x/y", p->folder);
    assert_ok(&p->ctx, check_output(p, text, ""));
    assert_status(&p->ctx, TP_INVALID, check_output(p, "old", ""));
    expect(p, "r.yaml:3:13: output_dir: old exists; set overwrite: true or resume_from_checkpoint: auto, or choose another");
    assert_ok(&p->ctx, check_output(p, "old", "overwrite: true"));
    assert_ok(&p->ctx, check_output(p, "old", "resume_from_checkpoint: auto"));
    assert_status(&p->ctx, TP_INVALID, check_output(p, "file", "overwrite: true"));
    expect(p, "r.yaml:3:13: output_dir: file is a file, expected a folder");
    assert_status(&p->ctx, TP_INVALID, check_output(p, "file/x", ""));
    expect(p, "r.yaml:3:13: output_dir: file/x stands below a file, not a folder");
    assert_status(&p->ctx, TP_INVALID, check_output(p, "./m", "overwrite: true"));
    expect(p, "r.yaml:3:13: output_dir: ./m is the model's folder");
}

/* Permission bits do not stop root, so the test steps down from it. */
static void test_R11_read_only(void **state)
{
    struct place *p = *state;
    bool root = geteuid() == 0;
    assert_int_equal(mkdir("ro", 0555), 0);
    assert_int_equal(chmod(".", 0755), 0);
    put("r.yaml", "base_model: m\ndatasets: [{path: d.jsonl}]\noutput_dir: ro/x\n");
    assert_ok(&p->ctx, load(p));
    if (root) assert_int_equal(seteuid(65534), 0);
    tp_status st = tp_config_check_output(&p->ctx, p->recipe, &p->config, &p->problems);
    if (root) assert_int_equal(seteuid(0), 0);
    assert_int_equal(st, TP_INVALID);
    expect(p, "r.yaml:3:13: output_dir: ro/x cannot be written (read-only, or no permission)");
}

/* ---- what this version offers ---- */

static void refuse_feature(struct place *p, const char *line, const char *message)
{
    char text[400];
    snprintf(text, sizeof text, "base_model: m\n" TAIL "%s\n", line);
    put("r.yaml", text);
    assert_ok(&p->ctx, load(p));
    assert_status(&p->ctx, TP_UNSUPPORTED, tp_config_available(&p->ctx, p->recipe, &p->config, &p->problems));
    expect(p, message);
    assert_int_equal(p->problems.n_errors, 1);
}

static void test_unavailable_features(void **state)
{
    struct place *p = *state;
    refuse_feature(p, "adapter: dora", "r.yaml:4:10: adapter: dora is not available in this version; available: lora, none");
    refuse_feature(p, "use_dora: true", "r.yaml:4:11: use_dora is not available in this version");
    refuse_feature(p, "objective: classify",
                   "r.yaml:4:12: objective: classify is not available in this version; available: sft");
    refuse_feature(p, "optimizer: lion",
                   "r.yaml:4:12: optimizer: lion is not available in this version; available: adamw, sgd");
    refuse_feature(p, "report_to: [jsonl, tensorboard]",
                   "r.yaml:4:12: report_to: tensorboard is not available in this version; available: jsonl");
    refuse_feature(p, "serve: {port: 1}", "r.yaml:4:8: serve is not available in this version");
    refuse_feature(p, "quant: {type: nf4}", "r.yaml:4:8: quant is not available in this version");
    refuse_feature(p, "modules_to_save: [x]", "r.yaml:4:18: modules_to_save is not available in this version");
    refuse_feature(p, "loraplus_lr_ratio: 2", "r.yaml:4:20: loraplus_lr_ratio is not available in this version");
}

static void test_available_features(void **state)
{
    struct place *p = *state;
    put("r.yaml",
        "base_model: m\n" TAIL "adapter: lora\nuse_dora: false\ndevice: cuda\nrank_pattern: {a: 3}\nuse_rslora: true\n"
        "modules_to_save: []\ngradient_checkpointing: every_k\noptimizer: sgd\nmomentum: 0.9\nprecision: bf16\n"
        "init_lora_weights: gaussian\ndevices: 1\npacking: true\nexcess_length_strategy: split\n");
    assert_ok(&p->ctx, load(p));
    assert_ok(&p->ctx, tp_config_available(&p->ctx, p->recipe, &p->config, &p->problems));
    assert_int_equal(p->problems.n, 0);
}

#define IN_PLACE(test) cmocka_unit_test_setup_teardown(test, enter, leave)

int main(void)
{
    const struct CMUnitTest tests[] = {
        IN_PLACE(test_include_order),        IN_PLACE(test_include_refusals),
        IN_PLACE(test_include_cycle_of_two), IN_PLACE(test_include_of_nothing),
        IN_PLACE(test_include_depth),        IN_PLACE(test_include_count),
        IN_PLACE(test_unreadable_recipes),   IN_PLACE(test_inputs),
        IN_PLACE(test_R11_output),           IN_PLACE(test_R11_read_only),
        IN_PLACE(test_unavailable_features), IN_PLACE(test_available_features),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
