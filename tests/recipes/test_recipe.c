/* Loading: every problem in one pass, aliases, includes, variables, overrides, conditions, rules, writing back. */
#include "tests/support.h"

#include <sys/stat.h>
#include <unistd.h>

#include "recipes/keys.h"

#define HEAD "base_model: m\n"
#define TAIL "datasets: [{path: d.jsonl}]\noutput_dir: out\n"

struct run {
    tp_ctx ctx;
    tp_config config;
    tp_problems problems;
    tp_recipe *recipe;
    tp_status status;
};

static void close_run(struct run *r)
{
    tp_recipe_free(r->recipe);
    tp_problems_free(&r->problems);
}

static void parse_with(struct run *r, const char *text, const char *const *overrides, size_t n)
{
    memset(r, 0, sizeof *r);
    tp_ctx_init(&r->ctx);
    tp_recipe_options options = {.schema = &tp_recipe_schema, .overrides = overrides, .n_overrides = n};
    r->status = tp_recipe_parse(&r->ctx, "r.yaml", text, strlen(text), &options, &r->config, &r->problems, &r->recipe);
}

/* Parses; fails the test unless the recipe is accepted. */
static void accept(struct run *r, const char *text)
{
    parse_with(r, text, NULL, 0);
    if (r->status != TP_OK) fail_msg("%s\n%s", r->ctx.message, text);
}

static void accept_with(struct run *r, const char *text, const char *override)
{
    parse_with(r, text, &override, 1);
    if (r->status != TP_OK) fail_msg("%s\n%s: %s", text, override, r->ctx.message);
}

static void expect_message(const struct run *r, const char *message)
{
    for (size_t i = 0; i < r->problems.n; i++)
        if (strcmp(r->problems.items[i].text, message) == 0) return;
    for (size_t i = 0; i < r->problems.n; i++) print_message("  %s\n", r->problems.items[i].text);
    fail_msg("no problem reads: %s", message);
}

/* One problem, and it reads exactly so. */
static void refuse(const char *text, const char *message)
{
    struct run r;
    parse_with(&r, text, NULL, 0);
    assert_int_equal(r.status, TP_INVALID);
    expect_message(&r, message);
    assert_int_equal(r.problems.n_errors, 1);
    close_run(&r);
}

static void refuse_override(const char *text, const char *override, const char *message)
{
    struct run r;
    parse_with(&r, text, &override, 1);
    assert_int_equal(r.status, TP_INVALID);
    expect_message(&r, message);
    assert_int_equal(r.problems.n_errors, 1);
    close_run(&r);
}

/* ---- values ---- */

static void test_defaults(void **state)
{
    struct run r;
    (void)state;
    accept(&r, HEAD TAIL);
    const tp_config *c = &r.config;
    assert_string_equal(c->run.tokenizer, "m");
    assert_true(c->run.deterministic);
    assert_int_equal(c->run.adapters.n, 1);
    assert_true(tp_config_has_adapter(c, TP_ADAPTER_LORA));
    assert_int_equal(c->lora.rank, 16);
    assert_true(c->lora.alpha == 32);
    assert_int_equal(c->lora.target_modules.kind, TP_PATTERNS_WORD);
    assert_string_equal(c->lora.target_modules.text, "all-linear");
    assert_int_equal(c->quant.bits, 0);
    assert_int_equal(c->quant.skip_modules.n, 1);
    assert_string_equal(c->quant.skip_modules.items[0], "lm_head");
    assert_int_equal(c->data.datasets.n, 1);
    assert_string_equal(c->data.datasets.items[0].split, "train");
    assert_int_equal(c->data.datasets.items[0].limit, TP_UNSET);
    assert_true(c->data.datasets.items[0].weight == 1);
    assert_int_equal(c->data.max_seq_length, TP_UNSET);
    assert_true(c->train.learning_rate == 2e-4);
    assert_int_equal(c->train.warmup_steps, TP_UNSET);
    assert_true(c->train.warmup_ratio == 0.03);
    assert_true(c->output.save_minutes == 15);
    assert_int_equal(c->output.report_to.n, 1);
    assert_string_equal(c->output.resume_from_checkpoint, "none");
    assert_int_equal(r.problems.n, 0);
    close_run(&r);
}

static void test_every_type(void **state)
{
    struct run r;
    (void)state;
    accept(&r, HEAD TAIL "device: cuda:1\nmemory_limit: 1.5GiB\nadapter: [lora, ia3]\n"
                         "lora_target_modules: [q_proj, 7]\nlora_exclude_modules: .*\\.0\\..*\n"
                         "layers_to_transform: [3, '1-2', 2]\nrank_pattern: {a.b: 4, c: 8}\nalpha_pattern: {a.b: 0.5}\n"
                         "trainable_token_indices: [5, '5', <x>]\nval_set_size: 0.25\n"
                         "init_lora_weights: gaussian\nsample_prompts: ['a b', no]\nlora_alpha: 12\nuse_rslora: TRUE\n"
                         "deterministic: false\n");
    const tp_config *c = &r.config;
    assert_string_equal(c->run.device, "cuda:1");
    assert_false(c->run.deterministic);
    assert_true(c->run.memory_limit == 3ull << 29);
    assert_int_equal(c->run.adapters.n, 2);
    assert_int_equal(c->run.adapters.items[1], TP_ADAPTER_IA3);
    assert_int_equal(c->lora.target_modules.kind, TP_PATTERNS_LIST);
    assert_string_equal(c->lora.target_modules.list.items[1], "7");
    assert_int_equal(c->lora.exclude_modules.kind, TP_PATTERNS_REGEX);
    assert_int_equal(c->lora.layers.n, 3);
    for (int64_t i = 0; i < 3; i++) assert_int_equal(c->lora.layers.items[i], i + 1);
    assert_int_equal(c->lora.rank_pattern.n, 2);
    assert_string_equal(c->lora.rank_pattern.items[0].name, "a.b");
    assert_true(c->lora.rank_pattern.items[1].value == 8);
    assert_true(c->lora.alpha_pattern.items[0].value == 0.5);
    assert_null(c->lora.trainable_tokens.items[0].text);
    assert_int_equal(c->lora.trainable_tokens.items[0].id, 5);
    assert_string_equal(c->lora.trainable_tokens.items[1].text, "5");
    assert_true(c->data.val_set_size.fraction == 0.25 && c->data.val_set_size.rows == 0);
    assert_int_equal(c->lora.init, TP_LORA_INIT_GAUSSIAN);
    assert_string_equal(c->output.sample_prompts.items[1], "no");
    assert_true(c->lora.alpha == 12);
    assert_true(c->lora.use_rslora);
    close_run(&r);
}

static void test_wrong_values(void **state)
{
    (void)state;
    refuse(HEAD TAIL "lora_r: eight\n", "r.yaml:4:9: lora_r: expected an integer from 1 to 1024, got \"eight\"");
    refuse(HEAD TAIL "seed: -1\n", "r.yaml:4:7: seed: expected an integer >= 0, got -1");
    refuse(HEAD TAIL "memory_limit: 8Gib\n", "r.yaml:4:15: memory_limit: expected a size such as 8GiB, or auto, got \"8Gib\"");
    refuse(HEAD TAIL "memory_limit: 0\n", "r.yaml:4:15: memory_limit: expected a size such as 8GiB, or auto, got 0");
    refuse(HEAD TAIL "device: tpu\n", "r.yaml:4:9: device: expected auto, cpu, cuda or cuda:N, got \"tpu\"");
    refuse(HEAD TAIL "precision: half\n", "r.yaml:4:12: precision: expected one of auto, bf16, fp16, fp32, tf32, got \"half\"");
    refuse(HEAD TAIL "lora_target_modules: [a, [b]]\n", "r.yaml:4:26: lora_target_modules.1: expected a string, got a list");
    refuse(HEAD TAIL "rank_pattern: {a: 1.5}\n", "r.yaml:4:19: rank_pattern.a: expected an integer from 1 to 1024, got 1.5");
    refuse(HEAD TAIL "layers_to_transform: 9-3\n",
           "r.yaml:4:22: layers_to_transform: expected layer numbers below 4096 or a range such as \"8-15\", got \"9-3\"");
    refuse(HEAD TAIL "layers_to_transform: [4096]\n",
           "r.yaml:4:23: layers_to_transform.0: expected a layer number below 4096 or a range such as \"8-15\", got 4096");
    refuse(
        HEAD TAIL "lora_target_modules: .*q_proj\nlayers_to_transform: [1]\n",
        "r.yaml:5:22: layers_to_transform: without effect, since lora_target_modules is a regular expression for whole paths: "
        "name the layers there");
    refuse(HEAD TAIL "val_set_size: 0.6\n",
           "r.yaml:4:15: val_set_size: expected a number of rows, or a fraction from 0 to 0.5, got 0.6");
    refuse(HEAD TAIL "tokenizer: ~\n", "r.yaml:4:12: tokenizer: expected a path, got no value (null)");
    refuse(
        HEAD "datasets: [{path: a, type: what}]\noutput_dir: o\n",
        "r.yaml:2:28: datasets.0.type: expected one of auto, completion, instruction, chat, preference, kto, classify, tokens, "
        "got \"what\"");
    refuse(HEAD "datasets: [{type: chat}]\noutput_dir: o\n", "r.yaml:2:12: datasets.0.path: missing; expected a path");
    refuse(HEAD "datasets: []\noutput_dir: o\n", "r.yaml:2:11: datasets: expected at least one block, got an empty list");
    refuse(HEAD TAIL "quant: nf4\n", "r.yaml:4:8: quant: expected a block of key: value");
}

/* Numbers at limit - 1, limit, limit + 1, the ends of open ranges left out. */
static void test_R8_ranges(void **state)
{
    static const struct {
        const char *line;
        bool good;
    } cases[] = {
        {"lora_r: 0", false},
        {"lora_r: 1", true},
        {"lora_r: 1024", true},
        {"lora_r: 1025", false},
        {"learning_rate: 0", false},
        {"learning_rate: 1", true},
        {"learning_rate: 1.1", false},
        {"learning_rate: 1e-30", true},
        {"lora_dropout: 1", false},
        {"lora_dropout: 0.999", true},
        {"lora_dropout: 0", true},
        {"lora_dropout: -0.1", false},
        {"max_steps: 0", true},
        {"max_steps: -1", false},
        {"num_epochs: 0", false},
        {"num_epochs: 0.5", true},
        {"max_dropped: 1", true},
        {"max_dropped: 1.01", false},
        {"seed: 9223372036854775807", true},
        {"seed: 9223372036854775808", false},
        {"learning_rate: .nan", false},
        {"max_grad_norm: .inf", false},
        {"max_seq_length: 7", false},
        {"max_seq_length: 8", true},
        {"lora_alpha: 0", false},
        {"val_set_size: 0.5", true},
        {"warmup_steps: 9\nmax_steps: 10", true},
        {"warmup_steps: 10\nmax_steps: 10", false},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct run r;
        char text[200];
        snprintf(text, sizeof text, HEAD TAIL "%s\n", cases[i].line);
        parse_with(&r, text, NULL, 0);
        if ((r.status == TP_OK) != cases[i].good) fail_msg("%s: %s", cases[i].line, r.ctx.message);
        close_run(&r);
    }
}

static void test_all_problems_in_one_pass(void **state)
{
    struct run r;
    (void)state;
    parse_with(&r, "adapter: lora\nlora_r: 0\nlorar: 1\nlora_r: 2\nquant: {blok: 64}\ndatasets: [{pat: x}, 5]\nbatch_size: 4\n",
               NULL, 0);
    assert_int_equal(r.status, TP_INVALID);
    expect_message(&r, "r.yaml:4:1: lora_r: given twice, first at r.yaml:2:1");
    expect_message(&r, "r.yaml:2:9: lora_r: expected an integer from 1 to 1024, got 0");
    expect_message(&r, "r.yaml:3:1: lorar: unknown key; did you mean lora_r?");
    expect_message(&r, "r.yaml:5:9: quant.blok: unknown key; did you mean block?");
    expect_message(&r, "r.yaml:6:13: datasets.0.pat: unknown key; did you mean path?");
    expect_message(&r, "r.yaml:6:12: datasets.0.path: missing; expected a path");
    expect_message(&r, "r.yaml:6:22: datasets.1: expected a block, got 5");
    expect_message(&r, "r.yaml: base_model: missing; expected a path");
    expect_message(&r, "r.yaml: output_dir: missing; expected a path");
    assert_int_equal(r.problems.n_errors, 10);
    assert_non_null(strstr(r.ctx.message, "(and 9 more)"));
    close_run(&r);
}

static void test_R2_unknown_keys(void **state)
{
    (void)state;
    refuse(HEAD TAIL "num-epochs: 3\n", "r.yaml:4:1: num-epochs: unknown key; did you mean num_epochs?");
    refuse(HEAD TAIL "Lora_R: 3\n", "r.yaml:4:1: Lora_R: unknown key; did you mean lora_r?");
    refuse(HEAD TAIL "block: 64\n", "r.yaml:4:1: block: unknown key; did you mean quant.block?");
    refuse(HEAD TAIL "cutof_len: 64\n",
           "r.yaml:4:1: cutof_len: unknown key; did you mean cutoff_len, here called max_seq_length?");
    refuse(HEAD TAIL "xyzzy: 64\n", "r.yaml:4:1: xyzzy: unknown key");
    refuse(HEAD TAIL "\"a\\x1b[31m\": 1\n", "r.yaml:4:1: a\\x1b[31m: unknown key");
    refuse(HEAD TAIL "quant.block: 64\n", "r.yaml:4:1: quant.block: unknown key; in a file it is a block, quant: {block: ...}");
}

static void test_required_keys_may_be_optional(void **state)
{
    struct run r = {.status = TP_OK};
    const char *const optional[] = {"output_dir", "datasets", NULL};
    tp_recipe_options options = {.schema = &tp_recipe_schema, .optional = optional};
    (void)state;
    tp_ctx_init(&r.ctx);
    assert_ok(&r.ctx, tp_recipe_parse(&r.ctx, "r.yaml", HEAD, strlen(HEAD), &options, &r.config, &r.problems, &r.recipe));
    assert_null(r.config.output.output_dir);
    assert_int_equal(r.config.data.datasets.n, 0);
    assert_ok(&r.ctx, tp_config_check_output(&r.ctx, r.recipe, &r.config, &r.problems));
    close_run(&r);
}

/* ---- names of other tools ---- */

static void test_R3_aliases(void **state)
{
    struct run r;
    (void)state;
    accept(&r, "model: m\n" TAIL "cutoff_len: 512\nmask_prompt: true\nbf16: true\nquantization: fp4\nsave_only_model: true\n"
               "mask_history: true\nlora_target: all\niters: 7\n");
    assert_int_equal(r.problems.n, 9);
    assert_int_equal(r.problems.n_errors, 0);
    expect_message(&r, "r.yaml:4:1: read `cutoff_len` as `max_seq_length`");
    expect_message(&r, "r.yaml:5:1: read `mask_prompt: true` as `train_on_inputs: false`");
    expect_message(&r, "r.yaml:6:1: read `bf16: true` as `precision: bf16`");
    expect_message(&r, "r.yaml:7:1: read `quantization` as `quant.type`");
    assert_int_equal(r.config.data.max_seq_length, 512);
    assert_false(r.config.data.train_on_inputs);
    assert_int_equal(r.config.run.precision, TP_PRECISION_BF16);
    assert_int_equal(r.config.quant.type, TP_QUANT_TYPE_FP4);
    assert_int_equal(r.config.quant.bits, 4);
    assert_false(r.config.output.save_optimizer);
    assert_int_equal(r.config.data.train_on_turns, TP_TURNS_LAST);
    assert_int_equal(r.config.lora.target_modules.kind, TP_PATTERNS_WORD);
    assert_int_equal(r.config.train.max_steps, 7);
    close_run(&r);
    refuse(HEAD TAIL "lora_rank: 4\nr: 4\n",
           "r.yaml:5:1: r: another name for lora_r, which is set at r.yaml:4:1; keep one of them");
    refuse(HEAD TAIL "bf16: 5\n", "r.yaml:4:7: bf16: another name for precision; expected one of true, auto, got 5");
    refuse(HEAD TAIL "quantization_bit: 3\n",
           "r.yaml:4:19: quantization_bit: another name for load_in_4bit; expected one of 4, 8, got 3");
    refuse(HEAD TAIL "mask_prompt: 1\n",
           "r.yaml:4:14: mask_prompt: another name for train_on_inputs; expected one of true, false, got 1");
    refuse(HEAD TAIL "cutoff_len: 1\n", "r.yaml:4:13: max_seq_length: expected an integer >= 8, got 1");
}

/* `target_modules` is LoRA's or IA3's, by the adapter, wherever that stands. */
static void test_alias_by_adapter(void **state)
{
    struct run r;
    (void)state;
    accept(&r, "target_modules: [a]\n" HEAD TAIL);
    assert_string_equal(r.config.lora.target_modules.list.items[0], "a");
    close_run(&r);
    accept(&r, "target_modules: [a]\nadapter: ia3\n" HEAD TAIL);
    assert_string_equal(r.config.virtual_tokens.ia3_target_modules.list.items[0], "a");
    assert_true(r.config.train.learning_rate == 3e-3);
    close_run(&r);
    refuse(HEAD TAIL "adapter: [lora, ia3]\ntarget_modules: [a]\n",
           "r.yaml:5:1: target_modules: several keys go by this name; say which, as lora_target_modules does");
}

/* No alias is a key of ours, refused, or known to the same field twice with one meaning. */
static void test_alias_tables(void **state)
{
    (void)state;
    for (size_t s = 0; s < tp_recipe_schema.n_sections; s++)
        for (size_t f = 0; f < tp_recipe_schema.sections[s]->n_fields; f++) {
            const tp_field *field = &tp_recipe_schema.sections[s]->fields[f];
            assert_ptr_equal(tp_schema_field(&tp_recipe_schema, field->key), field);
            assert_non_null(field->help);
            for (const tp_alias *a = field->aliases; a != NULL && a->name != NULL; a++) {
                if (tp_schema_field(&tp_recipe_schema, a->name) != NULL) fail_msg("%s is a key", a->name);
                for (const tp_refused_key *k = tp_recipe_schema.refused; k->name != NULL; k++)
                    if (strcmp(k->name, a->name) == 0) fail_msg("%s is refused", a->name);
            }
        }
}

static void test_refused_keys(void **state)
{
    (void)state;
    for (const tp_refused_key *k = tp_recipe_schema.refused; k->name != NULL; k++) {
        char text[200], message[300];
        snprintf(text, sizeof text, HEAD TAIL "%s: 4\n", k->name);
        snprintf(message, sizeof message, "r.yaml:4:1: %s: refused, tools disagree about it: %s", k->name, k->why);
        refuse(text, message);
    }
}

/* ---- variables ---- */

static void test_variables(void **state)
{
    struct run r;
    (void)state;
    accept(&r, "vars: {name: x-1, r: 4}\nbase_model: models/${name}\nlora_r: ${r}\n"
               "datasets: [{path: '${name}/${name}.jsonl', system: '$${name} $x'}]\noutput_dir: out\n");
    assert_string_equal(r.config.run.base_model, "models/x-1");
    assert_int_equal(r.config.lora.rank, 4);
    assert_string_equal(r.config.data.datasets.items[0].path, "x-1/x-1.jsonl");
    assert_string_equal(r.config.data.datasets.items[0].system, "${name} $x");
    close_run(&r);
    accept_with(&r, "vars: {name: x}\nbase_model: ${name}\n" TAIL, "vars.name=y");
    assert_string_equal(r.config.run.base_model, "y");
    close_run(&r);
    refuse(HEAD TAIL "tokenizer: ${HOME}\n", "r.yaml:4:12: tokenizer: unknown variable ${HOME}; vars does not define it");
    refuse(HEAD TAIL "tokenizer: ${HOME\n", "r.yaml:4:12: tokenizer: \"${\" without its \"}\"; write $${ for the text itself");
    refuse(HEAD TAIL "vars: {a: [1]}\n", "r.yaml:4:11: vars.a: expected a string, got a list");
    refuse(HEAD TAIL "vars: {a-b: 1}\n", "r.yaml:4:8: vars: \"a-b\" is no name: letters, digits and _");
    refuse(HEAD TAIL "vars: 5\n", "r.yaml:4:7: vars: expected a block of name: value, got 5");
}

/* 100 bytes a reference, 2000 values of 1000 bytes: 2 MB from a file of 60 KB. */
static void test_variables_cannot_explode(void **state)
{
    struct run r;
    char *text = malloc(200000);
    (void)state;
    size_t n = (size_t)snprintf(text, 100000, HEAD TAIL "vars: {x: ");
    memset(text + n, 'v', 1000);
    n += 1000;
    n += (size_t)snprintf(text + n, 100000 - n, "}\nsample_prompts:\n");
    for (int i = 0; i < 2000; i++) n += (size_t)snprintf(text + n, 100000 - n, "- ${x}\n");
    parse_with(&r, text, NULL, 0);
    free(text);
    assert_int_equal(r.status, TP_INVALID);
    assert_int_equal(r.problems.n_errors, 1);
    assert_non_null(strstr(r.ctx.message, "longer than 1048576 bytes"));
    close_run(&r);
}

/* ---- overrides ---- */

static void test_R13_overrides(void **state)
{
    struct run r;
    (void)state;
    accept_with(&r, HEAD TAIL "lora_r: 4\n", "lora_r=8");
    assert_int_equal(r.config.lora.rank, 8);
    close_run(&r);
    accept_with(&r, HEAD TAIL, "datasets.0.limit=100");
    assert_int_equal(r.config.data.datasets.items[0].limit, 100);
    close_run(&r);
    accept_with(&r, HEAD TAIL "quant: {type: nf4, block: 64}\n", "quant.block=128");
    assert_int_equal(r.config.quant.block, 128);
    assert_int_equal(r.config.quant.bits, 4);
    close_run(&r);
    accept_with(&r, HEAD TAIL, "quant.type=int8");
    assert_int_equal(r.config.quant.bits, 8);
    close_run(&r);
    accept_with(&r, HEAD TAIL "lora_r: 4\n", "lora_rank=8"); /* another name, over ours */
    assert_int_equal(r.config.lora.rank, 8);
    close_run(&r);
    accept_with(&r, HEAD TAIL "lora_target_modules: [a]\n", "target_modules=[b, c]"); /* one that two methods have */
    assert_int_equal(r.config.lora.target_modules.list.n, 2);
    assert_string_equal(r.config.lora.target_modules.list.items[0], "b");
    close_run(&r);
    accept_with(&r, HEAD TAIL, "base_model=010");
    assert_string_equal(r.config.run.base_model, "010");
    close_run(&r);
    accept_with(&r, HEAD TAIL, "lora_target_modules=[q_proj, v_proj]");
    assert_int_equal(r.config.lora.target_modules.list.n, 2);
    close_run(&r);
    accept_with(&r, HEAD TAIL "lora_r: 4\n", "~lora_r");
    assert_int_equal(r.config.lora.rank, 16);
    close_run(&r);
    accept_with(&r, HEAD TAIL "lora_r: 4\n", "~lora_rank");
    assert_int_equal(r.config.lora.rank, 16);
    close_run(&r);
    accept_with(&r, HEAD "datasets: [{path: a}, {path: b}]\noutput_dir: o\n", "~datasets.0");
    assert_int_equal(r.config.data.datasets.n, 1);
    assert_string_equal(r.config.data.datasets.items[0].path, "b");
    close_run(&r);
    const char *const several[] = {"lora_r=8", "lora_r=32", "datasets.0={path: z}", "datasets.0.columns.a=b"};
    parse_with(&r, HEAD TAIL, several, 4);
    assert_int_equal(r.status, TP_OK);
    assert_int_equal(r.config.lora.rank, 32);
    assert_string_equal(r.config.data.datasets.items[0].path, "z");
    assert_string_equal(r.config.data.datasets.items[0].columns.items[0].value, "b");
    close_run(&r);
}

static void test_R13_bad_overrides(void **state)
{
    (void)state;
    refuse_override(HEAD TAIL, "lora_r=eight", "override 1: lora_r: expected an integer from 1 to 1024, got \"eight\"");
    refuse_override(HEAD TAIL, "lora_rr=8", "override 1: lora_rr: unknown key; did you mean lora_r?");
    refuse_override(HEAD TAIL, "lora_r.x=8", "override 1: lora_r: expected an integer from 1 to 1024, got a block");
    refuse_override(HEAD TAIL, "lora_r=", "override 1: lora_r: expected an integer from 1 to 1024, got no value (null)");
    refuse_override(HEAD TAIL, "lora_r", "override 1: expected key=value or ~key, got \"lora_r\"");
    refuse_override(HEAD TAIL, "=8", "override 1: expected a key such as quant.block or datasets.0.limit before the =");
    refuse_override(HEAD TAIL, "a..b=8", "override 1: expected a key such as quant.block or datasets.0.limit before the =");
    refuse_override(HEAD TAIL, "~lora_r", "override 1: lora_r: nothing to delete, the recipe does not set it");
    refuse_override(HEAD TAIL, "datasets.1.limit=5",
                    "override 1: datasets: the list has 1 entries, counted from 0; there is no 1");
    refuse_override(HEAD TAIL, "datasets.0.path.x=5", "override 1: datasets.0.path: not a block, so it has no x");
    refuse_override(HEAD TAIL, "include=x.yaml", "override 1: include: only a file can include others");
    refuse_override(HEAD TAIL, "lora_r=&a 8", "override 1: anchor &a: refused, write the value out");
    refuse_override(HEAD TAIL, "datasets.0.limit=[",
                    "override 1: while parsing a flow node: did not find expected node content");
    refuse_override(HEAD TAIL "r: 4\n", "lora_r.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0=8",
                    "override 1: expected a key such as quant.block or datasets.0.limit before the =");
}

/* ---- conditions and rules ---- */

static void test_keys_without_effect(void **state)
{
    (void)state;
    refuse(HEAD TAIL "momentum: 0.9\n", "r.yaml:4:1: momentum: has no effect here; it is for optimizer sgd");
    refuse(HEAD TAIL "adapter: ia3\nlora_r: 4\n",
           "r.yaml:5:1: lora_r: has no effect here; it is for adapter lora, qlora or dora");
    refuse(HEAD TAIL "beta: 0.2\n", "r.yaml:4:1: beta: has no effect here; it is for objective dpo, orpo or kto");
    refuse(HEAD TAIL "num_virtual_tokens: 4\n",
           "r.yaml:4:1: num_virtual_tokens: has no effect here; it is for adapter prompt, prefix or p_tuning");
    refuse(HEAD TAIL "warmup_steps: 0\nwarmup_ratio: 0.1\n",
           "r.yaml:5:1: warmup_ratio: has no effect here; it is for recipes without warmup_steps");
    refuse(HEAD TAIL "objective: distill\nteacher: {logits: l, adapter: a}\n",
           "r.yaml:5:22: teacher.adapter: has no effect here; it is for objective distill with teacher.model");
    /* A wrong adapter is one problem, not one for every key that depends on it. */
    refuse(HEAD TAIL "adapter: ia33\nia3_target_modules: [a]\n",
           "r.yaml:4:10: adapter: expected one of lora, qlora, dora, ia3, prompt, prefix, p_tuning, full, none, or a list of "
           "them, got \"ia33\"");
}

static void test_rules(void **state)
{
    (void)state;
    refuse(HEAD TAIL "adapter: [lora, lora]\n", "r.yaml:4:10: adapter: lora stands in the list twice");
    refuse(HEAD TAIL "adapter: [lora, none]\n", "r.yaml:4:10: adapter: none stands alone");
    refuse(HEAD TAIL "adapter: dora\nuse_dora: false\n", "r.yaml:5:11: use_dora: false contradicts adapter dora");
    refuse(HEAD TAIL "adapter: qlora\nload_in_4bit: false\n", "r.yaml:5:15: load_in_4bit: adapter qlora loads in 4 bits");
    refuse(HEAD TAIL "load_in_4bit: true\nload_in_8bit: true\n",
           "r.yaml:5:15: load_in_8bit: load_in_4bit is set too; choose one");
    refuse(HEAD TAIL "quant: {type: nf4, block: 96}\n", "r.yaml:4:27: quant.block: 96 is no power of two");
    refuse(HEAD TAIL "objective: distill\n", "r.yaml:4:12: objective: distill needs teacher.model or teacher.logits");
    refuse(HEAD TAIL "objective: distill\nteacher: {logits: l, model: m}\n",
           "r.yaml:5:19: teacher.logits: teacher.model is set too; choose one");
    refuse(HEAD "datasets: [{path: a, type: kto}]\noutput_dir: o\n",
           "r.yaml:2:28: datasets.0.type: objective sft cannot learn from rows of type kto");
    refuse(HEAD TAIL "adapter: prompt\nprompt_tuning_init: text\n",
           "r.yaml:5:21: prompt_tuning_init: text needs prompt_tuning_init_text");
    refuse(HEAD TAIL "adapter: ia3\nia3_target_modules: [a]\nia3_feedforward_modules: [b]\n",
           "r.yaml:6:26: ia3_feedforward_modules: b is not among ia3_target_modules");
    refuse(HEAD TAIL "merge: {dtype: bf16}\n", "r.yaml:4:8: merge.out: missing; expected a path");
    refuse(HEAD TAIL "load_best_model_at_end: true\n",
           "r.yaml:4:25: load_best_model_at_end: needs held-out data: test_datasets or val_set_size");
}

static void test_R12_resume_needs_optimizer(void **state)
{
    (void)state;
    refuse(HEAD TAIL "resume_from_checkpoint: auto\nsave_optimizer: false\n",
           "r.yaml:5:17: save_optimizer: false leaves nothing that resume_from_checkpoint: auto could resume from");
}

/* ---- writing back ---- */

/* What is written reads back to the same config and is then written in the same bytes. */
static void check_round_trip(const char *text)
{
    struct run first, second;
    tp_buf a, b;
    size_t from = 0;
    accept(&first, text);
    tp_buf_init(&a, 0);
    tp_buf_init(&b, 0);
    tp_schema_write(&tp_recipe_schema, &first.config, &a);
    accept(&second, tp_buf_cstr(&a));
    assert_int_equal(second.problems.n, 0);
    const char *key = tp_schema_difference(&tp_recipe_schema, &first.config, &second.config, &from);
    if (key != NULL) fail_msg("%s differs after\n%s", key, tp_buf_cstr(&a));
    tp_schema_write(&tp_recipe_schema, &second.config, &b);
    assert_string_equal(tp_buf_cstr(&a), tp_buf_cstr(&b));
    tp_buf_free(&a);
    tp_buf_free(&b);
    close_run(&first);
    close_run(&second);
}

static void test_round_trips(void **state)
{
    (void)state;
    check_round_trip(HEAD TAIL);
    check_round_trip(HEAD TAIL "adapter: qlora\nquant: {block: 128, double: false, skip_modules: []}\nmemory_limit: 24GiB\n"
                               "optimizer: paged_adamw_8bit\nwarmup_steps: 0\nlearning_rate: 1.2345678901234567e-5\n");
    check_round_trip(HEAD TAIL "adapter: dora\nlora_target_modules: '.*\"\\ q: [x]'\n"
                               "rank_pattern: {'a b.\"c': 3, '${x}': 4}\nalpha_pattern: {x: 1e-30}\n"
                               "trainable_token_indices: [1, '1', 'true', 'null', <s>, \"\\u2028\\x7f\\ufeff\"]\n");
    check_round_trip(HEAD TAIL "lora_target_modules: [' a', '*']\nlayers_to_transform: 3-9\n");
    check_round_trip(HEAD
                     "datasets: [{path: no, system: \"a\\n\\tb: $${x} # c\", columns: {\"k: y\": 'on'}, limit: 3, weight: 0.1},"
                     " {path: ' lead', type: chat}]\noutput_dir: '~'\ntest_datasets: [{path: x}]\nval_set_size: 0.02\n"
                     "early_stopping_patience: 2\nsample_prompts: ['a,b', '- x', '...', 1.5]\n");
    check_round_trip(HEAD TAIL "adapter: [prompt, p_tuning]\nprompt_tuning_init: text\nprompt_tuning_init_text: 'a b'\n"
                               "encoder_reparameterization_type: LSTM\nencoder_hidden_size: 12\n");
    check_round_trip(HEAD TAIL "adapter: ia3\nia3_feedforward_modules: []\noptimizer: sgd\nmomentum: 0.9\n");
    check_round_trip(HEAD TAIL "objective: distill\nteacher: {model: base, top_k: 0}\nkd_on_policy: 0.5\n"
                               "kd_features: [{student_layer: 1, teacher_layer: 2, loss: cosine}]\n");
    check_round_trip(HEAD TAIL "merge: {out: x, proof: y}\nserve: {adapters: [{name: a, path: b}], kv_memory: 1GB, port: 0}\n");
}

/* Defaults of list elements are no nodes of the file: as many blocks as the limit on nodes allows are read. */
static void test_many_blocks(void **state)
{
    struct run r;
    char *text = malloc(100000);
    size_t n = (size_t)snprintf(text, 100000, HEAD "output_dir: o\ndatasets:\n");
    (void)state;
    for (int i = 0; i < 3000; i++) n += (size_t)snprintf(text + n, 100000 - n, "- {path: a}\n");
    accept(&r, text);
    assert_int_equal(r.config.data.datasets.n, 3000);
    assert_string_equal(r.config.data.datasets.items[2999].path, "a");
    close_run(&r);
    free(text);
}

static void test_difference(void **state)
{
    struct run a, b;
    size_t from = 0;
    (void)state;
    accept(&a, HEAD TAIL);
    accept(&b, HEAD TAIL "seed: 7\nlora_r: 8\nlora_alpha: 32\n");
    assert_string_equal(tp_schema_difference(&tp_recipe_schema, &a.config, &b.config, &from), "seed");
    assert_string_equal(tp_schema_difference(&tp_recipe_schema, &a.config, &b.config, &from), "lora_r");
    assert_null(tp_schema_difference(&tp_recipe_schema, &a.config, &b.config, &from));
    assert_null(tp_schema_difference(&tp_recipe_schema, &a.config, &b.config, &from));
    close_run(&a);
    close_run(&b);
}

static void test_where(void **state)
{
    struct run r;
    char out[100];
    (void)state;
    accept(&r, HEAD TAIL "cutoff_len: 512\nrank_pattern: {a.b: 4}\n");
    assert_string_equal(tp_recipe_where(r.recipe, "datasets.0.path", out, sizeof out), "r.yaml:2:19");
    assert_string_equal(tp_recipe_where(r.recipe, "max_seq_length", out, sizeof out), "r.yaml:4:13");
    assert_string_equal(tp_recipe_where(r.recipe, "lora_r", out, sizeof out), "r.yaml");
    assert_string_equal(tp_recipe_where_member(r.recipe, "rank_pattern", "a.b", out, sizeof out), "r.yaml:5:21");
    assert_string_equal(tp_recipe_where_member(r.recipe, "rank_pattern", "b", out, sizeof out), "r.yaml:5:15");
    assert_string_equal(tp_recipe_where_member(r.recipe, "alpha_pattern", "b", out, sizeof out), "r.yaml");
    assert_true(tp_recipe_given(r.recipe, "max_seq_length"));
    assert_false(tp_recipe_given(r.recipe, "lora_r"));
    close_run(&r);
}

/* The reference names every key, and has a row for each. */
static void test_reference(void **state)
{
    tp_buf out;
    char row[120];
    (void)state;
    tp_buf_init(&out, 0);
    tp_schema_write_reference(&tp_recipe_schema, &out);
    for (size_t s = 0; s < tp_recipe_schema.n_sections; s++)
        for (size_t f = 0; f < tp_recipe_schema.sections[s]->n_fields; f++) {
            snprintf(row, sizeof row, "\n| `%s` | ", tp_recipe_schema.sections[s]->fields[f].key);
            if (strstr(tp_buf_cstr(&out), row) == NULL) fail_msg("no row for %s", row);
        }
    assert_non_null(strstr(tp_buf_cstr(&out), "### Each block of `datasets`"));
    assert_null(strstr(tp_buf_cstr(&out), "### Each block of `test_datasets`"));
    assert_string_equal(tp_config_word("optimizer", TP_OPTIMIZER_SGD), "sgd");
    assert_string_equal(tp_config_word("optimizer", 99), "");
    tp_buf_free(&out);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_defaults),
        cmocka_unit_test(test_every_type),
        cmocka_unit_test(test_wrong_values),
        cmocka_unit_test(test_R8_ranges),
        cmocka_unit_test(test_all_problems_in_one_pass),
        cmocka_unit_test(test_R2_unknown_keys),
        cmocka_unit_test(test_required_keys_may_be_optional),
        cmocka_unit_test(test_R3_aliases),
        cmocka_unit_test(test_alias_by_adapter),
        cmocka_unit_test(test_alias_tables),
        cmocka_unit_test(test_refused_keys),
        cmocka_unit_test(test_variables),
        cmocka_unit_test(test_variables_cannot_explode),
        cmocka_unit_test(test_R13_overrides),
        cmocka_unit_test(test_R13_bad_overrides),
        cmocka_unit_test(test_keys_without_effect),
        cmocka_unit_test(test_rules),
        cmocka_unit_test(test_R12_resume_needs_optimizer),
        cmocka_unit_test(test_round_trips),
        cmocka_unit_test(test_many_blocks),
        cmocka_unit_test(test_difference),
        cmocka_unit_test(test_where),
        cmocka_unit_test(test_reference),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
