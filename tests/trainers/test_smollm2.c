/* The real model, SmolLM2-135M-Instruct as GGUF with Q4_1 weights, against transformers and PEFT on its dequantized weights:
 * log-probabilities of given text, greedy replies, a LoRA run.
 *
 *   TAPEFT_SMOLLM2         the .gguf file; else where scripts/fetch_model keeps it. Without either, everything here is left
 * out. TAPEFT_SMOLLM2_STEPS   how many of the curve's 30 steps are trained, in fp32 and in bf16 (default 8: half a minute on
 * two cores; `all` for every step and the comparison of the final adapter) */
#include "tests/support.h"

#include <math.h>
#include <strings.h>

#include "autograd/upload.h"
#include "base/mem.h"
#include "base/safetensors.h"
#include "data/source.h"
#include "inference/generate.h"
#include "tests/trainers/training.h"

/* The reference runs in float32 on the same weights, so what is left is the order of summation through 30 layers. */
#define LOGPROB_TOLERANCE 1e-3
#define CURVE_TOLERANCE   1e-3
/* bf16 keeps 8 bits of every activation: the loss may be this far from the fp32 curve. (PEFT's own bf16 run is off by 0.025 at
 * the worst step, ours by 0.011.) */
#define BF16_TOLERANCE 0.02

#define MOST_STEPS 30
/* The sanitizers make a step ten times slower; the code is the same in every step. */
#if defined(__SANITIZE_ADDRESS__)
#define DEFAULT_STEPS 1
#else
#define DEFAULT_STEPS 8
#endif

static bool find_model(char *out, size_t size)
{
    const char *given = getenv("TAPEFT_SMOLLM2"), *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    const char *name = "tapeft/SmolLM2-135M-Instruct.Q4_1.gguf";
    if (given != NULL && given[0] != '\0')
        snprintf(out, size, "%s", given);
    else if (cache != NULL && cache[0] != '\0')
        snprintf(out, size, "%s/%s", cache, name);
    else
        snprintf(out, size, "%s/.cache/%s", home != NULL ? home : "", name);
    return tp_path_exists(out);
}

/* Path of the model, and of golden/smollm2; skips the test, and says so, where one is missing. */
static void need_model(char *model, size_t size, char *golden, size_t golden_size)
{
    golden_path(golden, golden_size, "smollm2");
    bool there = find_model(model, size), data = tp_path_is_folder(golden);
    if (there && data) return;
    if (!there) print_message("*** NOT TESTED: %s is missing; scripts/fetch_model gets it ***\n", model);
    if (!data) print_message("*** NOT TESTED: %s is missing; set TAPEFT_GOLDEN to the full reference data ***\n", golden);
    skip();
}

/* ---- log-probabilities and greedy replies ---- */

struct prompts {
    tp_ctx ctx;
    char golden[1024];
    tp_model *model;
    tp_tokenizer *tokenizer;
    tp_safetensors *expect;
};

static void open_prompts(struct prompts *p)
{
    char model[1024], path[1200];
    tp_model_options options = {.precision = TP_F32};
    need_model(model, sizeof model, p->golden, sizeof p->golden);
    tp_ctx_init(&p->ctx);
    assert_ok(&p->ctx, tp_device_open(&p->ctx, "cpu", 0, &p->ctx.device));
    assert_ok(&p->ctx, tp_model_open(&p->ctx, model, &options, &p->model));
    assert_ok(&p->ctx, tp_tokenizer_for(&p->ctx, model, &p->tokenizer));
    snprintf(path, sizeof path, "%s/prompts.safetensors", p->golden);
    assert_ok(&p->ctx, tp_safetensors_open(&p->ctx, path, &p->expect));
}

static void close_prompts(struct prompts *p)
{
    tp_safetensors_close(p->expect);
    tp_tokenizer_free(p->tokenizer);
    tp_model_free(p->model);
    tp_device_close(p->ctx.device);
}

/* Logits of a whole prompt [n, V]. */
static float *logits_of(struct prompts *p, const int64_t *ids, int64_t n)
{
    tp_ctx *ctx = &p->ctx;
    tp_tape *tape;
    tp_owned_batch owned;
    assert_ok(ctx, tp_tape_new(ctx, (size_t)512 << 20, TP_F32, &tape));
    assert_ok(ctx, tp_batch_from_rows(ctx, ids, NULL, 1, n, p->model->config.vocab_size, &owned));
    tp_pass pass = {.tape = tape, .batch = &owned.batch};
    tp_tape_no_grad_begin(tape);
    tp_tensor *logits = tp_logits(tape, tp_model_forward(p->model, &pass), &p->model->head.weight, NULL, n);
    tp_tape_no_grad_end(tape);
    assert_ok(ctx, tp_tape_status(tape));
    size_t bytes = (size_t)(n * p->model->config.vocab_size) * sizeof(float);
    float *values = malloc(bytes);
    assert_ok(ctx, ctx->device->backend->copy_out(ctx, values, logits->data, bytes));
    tp_owned_batch_free(&owned);
    tp_tape_free(tape);
    return values;
}

static double log_probability(const float *row, int64_t vocab, int64_t id)
{
    double largest = -INFINITY, sum = 0;
    for (int64_t v = 0; v < vocab; v++) largest = fmax(largest, (double)row[v]);
    for (int64_t v = 0; v < vocab; v++) sum += exp((double)row[v] - largest);
    return (double)row[id] - largest - log(sum);
}

static float *read_floats(struct prompts *p, int prompt, const char *what, size_t n)
{
    char name[64];
    snprintf(name, sizeof name, "%d.%s", prompt, what);
    const tp_entry *e = tp_safetensors_find(p->expect, name);
    assert_non_null(e);
    assert_int_equal(e->bytes, n * sizeof(float));
    float *values = malloc(n * sizeof *values);
    assert_ok(&p->ctx, tp_safetensors_read_f32(&p->ctx, p->expect, e, 0, n, values));
    return values;
}

/* Largest differences of one prompt: of the log-probability of each next token, and of the logits behind the last one. */
static void compare_prompt(struct prompts *p, int prompt, const tp_entry *e, double worst[2])
{
    int64_t vocab = p->model->config.vocab_size, n = e->shape[0], *ids = malloc((size_t)n * sizeof *ids);
    assert_ok(&p->ctx, tp_safetensors_read_i64(&p->ctx, p->expect, e, 0, (size_t)n, ids));
    float *got = logits_of(p, ids, n), *next = read_floats(p, prompt, "next_logprob", (size_t)n - 1),
          *last = read_floats(p, prompt, "last_logits", (size_t)vocab);
    for (int64_t t = 0; t + 1 < n; t++) {
        double d = fabs(log_probability(got + t * vocab, vocab, ids[t + 1]) - (double)next[t]);
        if (!(d <= worst[0])) worst[0] = d; /* also a NaN */
    }
    for (int64_t v = 0; v < vocab; v++) {
        double d = fabs((double)got[(n - 1) * vocab + v] - (double)last[v]);
        if (!(d <= worst[1])) worst[1] = d;
    }
    free(got);
    free(next);
    free(last);
    free(ids);
}

static void log_probabilities(void **state)
{
    struct prompts p;
    double worst[2] = {0, 0};
    int n = 0;
    (void)state;
    open_prompts(&p);
    for (;; n++) {
        char name[64];
        snprintf(name, sizeof name, "%d.input_ids", n);
        const tp_entry *e = tp_safetensors_find(p.expect, name);
        if (e == NULL) break;
        compare_prompt(&p, n, e, worst);
    }
    print_message("%d prompts: log-probabilities %.1e, logits %.1e\n", n, worst[0], worst[1]);
    assert_true(n >= 5);
    if (!(worst[0] <= LOGPROB_TOLERANCE)) fail_msg("a log-probability is off by %.3g", worst[0]);
    if (!(worst[1] <= LOGPROB_TOLERANCE)) fail_msg("a logit is off by %.3g", worst[1]);
    close_prompts(&p);
}

static size_t read_ids(const tp_json *list, int32_t *out, size_t most)
{
    size_t n = tp_json_count(list);
    assert_true(n > 0 && n <= most);
    for (size_t i = 0; i < n; i++) {
        int64_t id;
        assert_true(tp_json_i64(tp_json_at(list, i), &id));
        out[i] = (int32_t)id;
    }
    return n;
}

/* Text to ids, ids to the same new ids, and those to the same text. */
static void check_reply(struct prompts *p, const tp_json *row, size_t i)
{
    tp_ctx *ctx = &p->ctx;
    int32_t prompt[512], wanted[64];
    size_t n = read_ids(tp_json_get(row, "input_ids"), prompt, 512),
           n_wanted = read_ids(tp_json_get(row, "new_ids"), wanted, 64);
    tp_tokens tokens = {0};
    tp_generator *generator;
    tp_generated reply;
    tp_buf text;
    int64_t end = tp_tokenizer_role(p->tokenizer, TP_TOKEN_EOS);
    assert_ok(ctx, tp_tokenizer_encode(ctx, p->tokenizer, tp_json_string(tp_json_get(row, "text")), TP_ENCODE_PLAIN, &tokens));
    assert_int_equal(tokens.count, n);
    for (size_t t = 0; t < n; t++) assert_int_equal(tokens.items[t].id, prompt[t]);
    tp_tokens_free(&tokens);

    tp_generate_options options = {.sampling = TP_SAMPLING_GREEDY, .max_tokens = 32, .eos_ids = &end, .n_eos = 1};
    assert_ok(ctx, tp_generator_open(ctx, p->model, (int64_t)n + 32, &generator));
    assert_ok(ctx, tp_generate(ctx, generator, p->tokenizer, prompt, n, &options, &reply));
    if (reply.n != n_wanted) fail_msg("prompt %zu: %zu new tokens, expected %zu", i, reply.n, n_wanted);
    for (size_t t = 0; t < n_wanted; t++)
        if (reply.ids[t] != wanted[t])
            fail_msg("prompt %zu: new token %zu is %d, expected %d", i, t, (int)reply.ids[t], (int)wanted[t]);
    tp_buf_init(&text, 0);
    assert_ok(ctx, tp_tokenizer_decode(ctx, p->tokenizer, reply.ids, reply.n, false, &text));
    tp_span expected = tp_json_string(tp_json_get(row, "new_text"));
    assert_int_equal(text.len, expected.len);
    assert_memory_equal(text.data, expected.data, expected.len);
    tp_buf_free(&text);
    tp_generated_free(&reply);
    tp_generator_close(generator);
}

static void greedy_replies(void **state)
{
    struct prompts p;
    char path[1200];
    tp_json_doc *doc;
    (void)state;
    open_prompts(&p);
    snprintf(path, sizeof path, "%s/generate.json", p.golden);
    assert_ok(&p.ctx, tp_json_read(&p.ctx, path, (size_t)1 << 20, &doc));
    const tp_json *rows = tp_json_root(doc);
    for (size_t i = 0; i < tp_json_count(rows); i++) check_reply(&p, tp_json_at(rows, i), i);
    print_message("%zu greedy replies are equal\n", tp_json_count(rows));
    assert_true(tp_json_count(rows) >= 5);
    tp_json_free(doc);
    close_prompts(&p);
}

/* ---- the curve ---- */

static double number_of(const tp_json *object, const char *key)
{
    double value = NAN;
    if (!tp_json_f64(tp_json_get(object, key), &value)) fail_msg("no number under %s", key);
    return value;
}

static void word_of(const tp_json *object, const char *key, char *out, size_t size)
{
    tp_span s = tp_json_string(tp_json_get(object, key));
    assert_true(s.len > 0 && s.len < size);
    snprintf(out, size, "%.*s", (int)s.len, s.data);
}

static int64_t steps_to_train(void)
{
    const char *text = getenv("TAPEFT_SMOLLM2_STEPS");
    int64_t n = DEFAULT_STEPS;
    if (text != NULL && strcasecmp(text, "all") == 0) return MOST_STEPS;
    if (text != NULL && text[0] != '\0' && (!tp_parse_i64(text, &n) || n < 1 || n > MOST_STEPS))
        fail_msg("TAPEFT_SMOLLM2_STEPS=%s: expected 1 to %d or all", text, MOST_STEPS);
    return n;
}

static void read_reference(tp_ctx *ctx, const char *golden, reference_run *run)
{
    char path[1200];
    tp_json_doc *doc;
    snprintf(path, sizeof path, "%s/recipe.json", golden);
    assert_ok(ctx, tp_json_read(ctx, path, (size_t)1 << 20, &doc));
    const tp_json *recipe = tp_json_root(doc);
    run->steps = (int64_t)number_of(recipe, "max_steps");
    run->accumulation = (int64_t)number_of(recipe, "gradient_accumulation_steps");
    run->warmup_steps = (int64_t)number_of(recipe, "warmup_steps");
    run->learning_rate = number_of(recipe, "learning_rate");
    run->weight_decay = number_of(recipe, "weight_decay");
    run->max_grad_norm = number_of(recipe, "max_grad_norm");
    word_of(recipe, "optimizer", run->optimizer, sizeof run->optimizer);
    word_of(recipe, "lr_scheduler", run->schedule, sizeof run->schedule);
    snprintf(run->batches, sizeof run->batches, "%s/batches.safetensors", golden);
    snprintf(run->adapter, sizeof run->adapter, "%s/lora-init", golden);
    assert_int_equal(run->steps, MOST_STEPS);
    tp_json_free(doc);
}

/* Largest difference of a loss, and at which step. */
static double compare_losses(tp_ctx *ctx, const char *golden, const char *output, int64_t steps, int64_t *worst_step)
{
    char path[1200];
    tp_json_doc *doc;
    double got[MOST_STEPS], worst = 0;
    snprintf(path, sizeof path, "%s/curve.json", golden);
    assert_ok(ctx, tp_json_read(ctx, path, (size_t)1 << 20, &doc));
    assert_int_equal(read_metrics(ctx, output, "loss", got, MOST_STEPS), steps);
    for (int64_t i = 0; i < steps; i++) {
        double d = fabs(got[i] - number_of(tp_json_at(tp_json_root(doc), (size_t)i), "loss"));
        if (d <= worst) continue;
        worst = d;
        *worst_step = i + 1;
    }
    tp_json_free(doc);
    return worst;
}

static void check_curve(const char *precision, double tolerance)
{
    char model[1024], golden[1024], output[1200], path[1200];
    reference_run run = {.precision = precision};
    int64_t steps = steps_to_train(), worst_step = 0;
    scratch s;
    tp_ctx ctx;
    tp_buf text;
    need_model(model, sizeof model, golden, sizeof golden);
    tp_ctx_init(&ctx);
    tp_buf_init(&text, 0);
    scratch_begin(&s);
    snprintf(run.base, sizeof run.base, "%s", model);
    read_reference(&ctx, golden, &run);
    snprintf(output, sizeof output, "%s", scratch_path(&s, "out"));
    write_recipe(&text, &run, output);
    tp_train_options options = {.resume = NULL};
    assert_ok(&ctx, train_recipe_steps(&ctx, &s, tp_buf_cstr(&text), &options, steps));
    tp_buf_free(&text);
    double loss = compare_losses(&ctx, golden, output, steps, &worst_step);
    print_message("%s: losses %.2g over %lld of %lld steps (worst: step %lld)\n", precision, loss, (long long)steps,
                  (long long)run.steps, (long long)worst_step);
    if (steps == run.steps) {
        snprintf(path, sizeof path, "%s/lora-final/adapter_model.safetensors", golden);
        snprintf(output, sizeof output, "%s", scratch_path(&s, "out/adapter/adapter_model.safetensors"));
        print_message("%s: final adapter %.2g\n", precision, relative_difference(&ctx, output, path));
    } else {
        print_message("*** the other %lld steps are left out; TAPEFT_SMOLLM2_STEPS=all trains them ***\n",
                      (long long)(run.steps - steps));
    }
    scratch_end(&s);
    if (!(loss <= tolerance))
        fail_msg("%s: the loss of step %lld is off by %.3g, allowed are %g", precision, (long long)worst_step, loss, tolerance);
}

static void curve_in_fp32(void **state)
{
    (void)state;
    check_curve("fp32", CURVE_TOLERANCE);
}

static void curve_in_bf16(void **state)
{
    (void)state;
    check_curve("bf16", BF16_TOLERANCE);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(log_probabilities),
        cmocka_unit_test(greedy_replies),
        cmocka_unit_test(curve_in_fp32),
        cmocka_unit_test(curve_in_bf16),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
