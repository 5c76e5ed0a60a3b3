/* Steps against passes: the same logits and tokens, for every family that steps run, with and without adapters, several
 * sequences of different lengths at once; and the sampler of a step against the host's. The CPU's kernels stand in for a GPU's.
 */
#include "tests/support.h"

#include <math.h>
#include <stdlib.h>

#include "base/rng.h"
#include "inference/generate.h"
#include "inference/step.h"
#include "peft/lora.h"
#include "tests/failing_malloc.h"

#define CONTEXT 64
#define SLOTS   3
#define STEPS   20

struct fixture {
    tp_ctx ctx;
    tp_model *model;
    tp_lora *lora;
    tp_generator *generator;
    tp_kv_cache cache;
    tp_step *step;
    float *host; /* logits [SLOTS, vocab] */
};

static void open_fixture(struct fixture *f, const char *name, tp_dtype precision, bool adapter)
{
    char path[1024], relative[64];
    tp_model_options options = {.precision = precision};
    tp_lora_spec spec = {.rank = 4, .alpha = 8, .targets = {.all_linear = true}};
    *f = (struct fixture){0};
    tp_ctx_init(&f->ctx);
    snprintf(relative, sizeof relative, "models/%s", name);
    assert_ok(&f->ctx, tp_device_open(&f->ctx, "cpu", 1, &f->ctx.device));
    assert_ok(&f->ctx, tp_model_open(&f->ctx, golden_path(path, sizeof path, relative), &options, &f->model));
    if (adapter) {
        assert_ok(&f->ctx, tp_lora_attach(&f->ctx, f->model, &spec, &f->lora));
        tp_rng_fill_uniform((tp_rng_key){1, TP_STREAM_INIT, 0}, 0, f->lora->params.elements, -0.2f, 0.2f,
                            f->lora->params.values);
    }
    assert_ok(&f->ctx, tp_generator_open(&f->ctx, f->model, CONTEXT, &f->generator));
    assert_ok(&f->ctx, tp_kv_cache_open(&f->ctx, f->model, SLOTS * CONTEXT, &f->cache));
    assert_ok(&f->ctx, tp_step_open(&f->ctx, f->model, &f->cache, SLOTS, CONTEXT, &f->step));
}

static void close_fixture(struct fixture *f)
{
    tp_step_close(f->step);
    tp_kv_cache_close(&f->cache);
    tp_generator_close(f->generator);
    tp_lora_free(f->lora);
    tp_model_free(f->model);
    tp_device_close(f->ctx.device);
}

static int32_t prompt_token(const struct fixture *f, int64_t slot, int i)
{
    return (int32_t)((7 + 13 * i + 5 * slot) % f->model->config.vocab_size);
}

/* Every slot has its own number of tokens before the steps: 1, 6, 11. They are fed one at a time, by steps as well. */
static int length_of(int64_t slot)
{
    return 1 + 5 * (int)slot;
}

static void compare_logits(const struct fixture *f, int64_t slot, const float *want, double limit, const char *name)
{
    int64_t vocab = f->model->config.vocab_size, ld = (vocab + 15) / 16 * 16;
    const float *got = tp_step_logits(f->step) + slot * ld;
    for (int64_t i = 0; i < vocab; i++)
        if (!(fabs((double)got[i] - (double)want[i]) <= limit * fmax(1, fabs((double)want[i]))))
            fail_msg("%s: slot %d, token %d: a step has %.8g, a pass %.8g", name, (int)slot, (int)i, (double)got[i],
                     (double)want[i]);
}

/* f32 sums in other orders; bf16: norms, products and angles are rounded at the same places, but now and then to a neighbour.
 */
static void try_model(const char *name, tp_dtype precision, bool adapter)
{
    struct fixture f;
    bool takes = false;
    double limit = precision == TP_BF16 ? 0.06 : 2e-5;
    tp_sampling greedy = TP_SAMPLING_GREEDY;
    open_fixture(&f, name, precision, adapter);
    int32_t token, ids[CONTEXT];
    for (int64_t slot = 0; slot < SLOTS; slot++) { /* a prefill sets up what steps read */
        float *logits;
        int32_t first = prompt_token(&f, slot, 0);
        tp_generator_reset(f.generator);
        assert_ok(&f.ctx, tp_generator_run(&f.ctx, f.generator, &first, 1, &logits));
    }
    assert_ok(&f.ctx, tp_step_begin(&f.ctx, f.step, &greedy, &takes));
    assert_true(takes);
    for (int i = 0; i < length_of(SLOTS - 1); i++) { /* prompts end together */
        for (int64_t slot = 0; slot < SLOTS; slot++) {
            int at = i - (length_of(SLOTS - 1) - length_of(slot));
            int32_t id = prompt_token(&f, slot, at < 0 ? 0 : at);
            assert_ok(&f.ctx, tp_step_set(&f.ctx, f.step, slot, at < 0 ? 0 : at, 0, &id, 1));
        }
        assert_ok(&f.ctx, tp_step_run(&f.ctx, f.step, 1));
    }
    for (int64_t slot = 0; slot < SLOTS; slot++) {
        float *logits;
        for (int i = 0; i < length_of(slot); i++) ids[i] = prompt_token(&f, slot, i);
        tp_generator_reset(f.generator);
        assert_ok(&f.ctx, tp_generator_run(&f.ctx, f.generator, ids, length_of(slot), &logits));
        compare_logits(&f, slot, logits, limit, name);
    }
    for (int done = 0; done < STEPS; done += 10) {
        assert_ok(&f.ctx, tp_step_run(&f.ctx, f.step, 10));
        assert_ok(&f.ctx, tp_step_read(&f.ctx, f.step));
    }
    for (int64_t slot = 0; slot < SLOTS; slot++) {
        float *logits;
        int n = length_of(slot);
        for (int i = 0; i < n; i++) ids[i] = prompt_token(&f, slot, i);
        for (int i = 0; i <= STEPS; i++, n++) {
            assert_ok(&f.ctx, tp_step_token(&f.ctx, f.step, slot, i, &token));
            ids[n] = token;
        }
        tp_generator_reset(f.generator);
        assert_ok(&f.ctx, tp_generator_run(&f.ctx, f.generator, ids, n - 1, &logits));
        compare_logits(&f, slot, logits, limit, name);
        int64_t best = 0;
        for (int64_t i = 0; i < f.model->config.vocab_size; i++)
            if (logits[i] > logits[best]) best = i;
        if (precision == TP_F32) assert_int_equal(best, token);
    }
    close_fixture(&f);
}

static void test_models(void **state)
{
    (void)state;
    static const char *const names[] = {"llama", "mistral", "qwen2", "qwen3"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        try_model(names[i], TP_F32, false);
        try_model(names[i], TP_F32, true);
        try_model(names[i], TP_BF16, i % 2 == 0);
    }
}

/* ---- sampling ---- */

#define VOCAB 5003

static void fill_logits(float *logits, uint64_t seed, int kind)
{
    tp_rng_fill_normal((tp_rng_key){seed, TP_STREAM_INIT, 0}, 0, VOCAB, 0, kind == 1 ? 8 : 2, logits);
    for (int i = 0; kind == 2 && i < VOCAB; i++) logits[i] = roundf(logits[i]); /* many ties */
    for (int i = 0; kind == 3 && i < VOCAB; i++) logits[i] = 1;
    if (kind == 4) logits[77] = INFINITY;
}

static void test_sample(void **state)
{
    (void)state;
    static const tp_sampling ways[] = {
        {0, 0, 1, 0, 1, 42},       {1, 0, 1, 0, 1, 42},         {0.7, 50, 1, 0, 1, 1}, {1.3, 0, 0.9, 0, 1, 2},
        {1, 0, 1, 0.05, 1, 3},     {0.8, 40, 0.95, 0.02, 1, 4}, {0, 0, 1, 0, 1.3, 42}, {0.9, 100, 0.8, 0, 1.2, 5},
        {2, 7000, 0.5, 0.5, 1, 6}, {1, 1, 1, 0, 1, 7},          {1, 0, 0, 0, 1, 8},    {0.01, 0, 0.99, 0, 1, 9},
    };
    tp_ctx ctx;
    tp_sampler *sampler;
    tp_ctx_init(&ctx);
    assert_ok(&ctx, tp_device_open(&ctx, "cpu", 1, &ctx.device));
    assert_ok(&ctx, tp_sampler_new(&ctx, VOCAB, &sampler));
    float *logits = malloc(VOCAB * sizeof *logits), *copy = malloc(VOCAB * sizeof *copy);
    unsigned char *flags = calloc(VOCAB, 1);
    uint64_t *scratch = malloc((VOCAB + TP_SAMPLE_EXTRA) * sizeof *scratch);
    assert_true(logits != NULL && copy != NULL && flags != NULL && scratch != NULL);
    for (size_t w = 0; w < sizeof ways / sizeof *ways; w++) {
        const tp_sampling *s = &ways[w];
        int32_t seen[64] = {3, 77, 3}, ids[1], positions[1] = {0}, counts[1] = {0}, history[8], bad[1] = {0};
        size_t n_seen = 3;
        memset(flags, 0, VOCAB);
        flags[3] = flags[77] = 1;
        tp_sample_args args = {
            .n = 1, .vocab = VOCAB, .logits = copy, .ld = VOCAB, .temperature = s->temperature, .top_k = s->top_k};
        args.top_p = s->top_p, args.min_p = s->min_p, args.repetition_penalty = s->repetition_penalty, args.seed = s->seed;
        args.seen = s->repetition_penalty != 1 ? flags : NULL, args.scratch = scratch;
        args.ids = ids, args.positions = positions, args.counts = counts, args.history = history, args.bad = bad;
        args.history_length = 8, args.position_limit = 5;
        for (int i = 0; i < 30; i++) {
            int32_t want;
            fill_logits(logits, (uint64_t)(100 * w) + (uint64_t)i, i % 5);
            memcpy(copy, logits, VOCAB * sizeof *copy);
            assert_ok(&ctx, tp_sampler_next(&ctx, sampler, s, logits, seen, n_seen, (uint64_t)i, &want));
            assert_ok(&ctx, tp_run_sample(&ctx, &args));
            if (ids[0] != want) fail_msg("way %zu, draw %d: %d instead of %d", w, i, (int)ids[0], (int)want);
            assert_int_equal(history[i % 8], want);
            assert_int_equal(counts[0], i + 1);
            assert_int_equal(positions[0], i + 1 < 5 ? i + 1 : 5);
            seen[n_seen++] = want;
        }
        fill_logits(copy, 1, 0);
        copy[4000] = copy[17] = NAN;
        assert_ok(&ctx, tp_run_sample(&ctx, &args));
        assert_int_equal(bad[0], 18);
    }
    free(logits), free(copy), free(flags), free(scratch);
    tp_sampler_free(sampler);
    tp_device_close(ctx.device);
}

/* ---- many prompts ---- */

/* The CPU as a device that records kernels: what is called while it records does not run, and there is never a recording to
 * launch, so steps call their kernels. */
static bool recording;

#define TP_KERNEL(name, args)                                                                                                  \
    static tp_status fake_##name(tp_ctx *ctx, const void *arguments)                                                           \
    {                                                                                                                          \
        return recording ? TP_OK : tp_cpu_backend.kernels[TP_KERNEL_##name](ctx, arguments);                                   \
    }
#include "backend/kernels.def"
#undef TP_KERNEL

static tp_status fake_begin(tp_ctx *ctx)
{
    (void)ctx;
    recording = true;
    return TP_OK;
}

static tp_status fake_end(tp_ctx *ctx, tp_graph **graph)
{
    (void)ctx;
    if (graph != NULL) *graph = NULL;
    recording = false;
    return TP_OK;
}

static tp_backend recorder(void)
{
    tp_backend fake = tp_cpu_backend;
    fake.capture_begin = fake_begin;
    fake.capture_end = fake_end;
#define TP_KERNEL(name, args) fake.kernels[TP_KERNEL_##name] = fake_##name;
#include "backend/kernels.def"
#undef TP_KERNEL
    return fake;
}

#define PROMPTS 11

struct replies {
    tp_generated all[PROMPTS];
    size_t n, most;
};

static bool take(void *state, size_t index, tp_generated *reply)
{
    struct replies *r = state;
    assert_true(index < PROMPTS);
    assert_null(r->all[index].ids);
    r->all[index] = *reply;
    return ++r->n < r->most;
}

/* Prompts of different lengths, some of which fill the context, some ending at their first token: by steps, several at once,
 * each is what it is alone by passes. */
static void try_many(const char *name, const tp_sampling *sampling, size_t most)
{
    struct fixture f;
    struct replies replies = {.most = most};
    tp_prompt_ids prompts[PROMPTS];
    int32_t ids[PROMPTS][CONTEXT];
    open_fixture(&f, name, TP_F32, true);
    for (int p = 0; p < PROMPTS; p++) {
        prompts[p] = (tp_prompt_ids){ids[p], (size_t)(p == 4 ? CONTEXT - 3 : p == 7 ? CONTEXT : 1 + 3 * p)};
        for (int i = 0; i < CONTEXT; i++) ids[p][i] = prompt_token(&f, p, i);
    }
    tp_generated alone[PROMPTS];
    tp_generate_options options = {.sampling = *sampling, .max_tokens = 37};
    int64_t end = -1;
    options.eos_ids = &end, options.n_eos = 1;
    for (int round = 0; round < 2; round++) { /* the second time with an end token that does come */
        for (int p = 0; p < PROMPTS; p++)
            assert_ok(&f.ctx, tp_generate(&f.ctx, f.generator, NULL, ids[p], prompts[p].n, &options, &alone[p]));
        tp_backend fake = recorder();
        const tp_backend *real = f.ctx.device->backend;
        tp_generator *many;
        f.ctx.device->backend = &fake;
        assert_ok(&f.ctx, tp_generator_open_many(&f.ctx, f.model, CONTEXT, PROMPTS, &many));
        replies = (struct replies){.most = most};
        assert_ok(&f.ctx, tp_generate_all(&f.ctx, many, NULL, prompts, PROMPTS, &options, take, &replies));
        tp_generator_close(many);
        f.ctx.device->backend = real;
        if (most == PROMPTS) assert_int_equal(replies.n, PROMPTS);
        for (int p = 0; p < PROMPTS; p++) {
            const tp_generated *got = &replies.all[p];
            if (got->ids == NULL) {
                assert_true(most < PROMPTS);
                continue;
            }
            if (got->n != alone[p].n || got->finish != alone[p].finish ||
                memcmp(got->ids, alone[p].ids, got->n * sizeof *got->ids) != 0)
                fail_msg("%s, prompt %d: %zu tokens, finish %d; alone %zu, %d", name, p, got->n, (int)got->finish, alone[p].n,
                         (int)alone[p].finish);
        }
        end = alone[2].ids[alone[2].n / 2];
        for (int p = 0; p < PROMPTS; p++) tp_generated_free(&replies.all[p]), tp_generated_free(&alone[p]);
    }
    close_fixture(&f);
}

static void test_many(void **state)
{
    (void)state;
    static const tp_sampling warm = {1, 50, 0.95, 0.01, 1.1, 7};
    tp_sampling greedy = TP_SAMPLING_GREEDY;
    try_many("llama", &greedy, PROMPTS);
    try_many("qwen3", &greedy, PROMPTS);
    try_many("llama", &warm, PROMPTS);
    try_many("mistral", &warm, PROMPTS);
    try_many("llama", &greedy, 2);
    try_many("gpt2", &greedy, PROMPTS); /* does not suit: one by one */
}

/* Each allocation of opening and running may fail, once or with all that follow: NOMEM, or as if nothing had happened, and
 * nothing is left behind. */
static void test_allocations(void **state)
{
    (void)state;
    struct fixture f;
    int32_t ids[3] = {5, 9, 2};
    tp_prompt_ids prompts[PROMPTS];
    tp_generate_options options = {.sampling = TP_SAMPLING_GREEDY, .max_tokens = 9};
    options.sampling.repetition_penalty = 1.5;
    open_fixture(&f, "llama", TP_BF16, true);
    for (int p = 0; p < PROMPTS; p++) prompts[p] = (tp_prompt_ids){ids, (size_t)(1 + p % 3)};
    tp_backend fake = recorder();
    const tp_backend *real = f.ctx.device->backend;
    f.ctx.device->backend = &fake;
    for (int all = 0; all < 2; all++) {
        bool failed = true;
        for (long n = 1; failed; n++) {
            struct replies replies = {.most = PROMPTS};
            tp_generator *many = NULL;
            long live = malloc_live();
            fail_malloc(n, all != 0);
            tp_status status = tp_generator_open_many(&f.ctx, f.model, CONTEXT, PROMPTS, &many);
            if (status == TP_OK) status = tp_generate_all(&f.ctx, many, NULL, prompts, PROMPTS, &options, take, &replies);
            failed = malloc_failed();
            fail_malloc(0, false);
            tp_generator_close(many);
            for (int p = 0; p < PROMPTS; p++) tp_generated_free(&replies.all[p]);
            if (status != TP_NOMEM) assert_ok(&f.ctx, status);
            if (status == TP_NOMEM) assert_true(failed);
            tp_ctx_clear(&f.ctx);
            assert_int_equal(malloc_live(), live);
        }
    }
    f.ctx.device->backend = real;
    close_fixture(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_models),
        cmocka_unit_test(test_sample),
        cmocka_unit_test(test_many),
        cmocka_unit_test(test_allocations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
