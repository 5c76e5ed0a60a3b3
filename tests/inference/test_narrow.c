/* Adapters held in bf16 while decoding: the logits are those of factors rounded by hand, the slots come back as they were, and
 * what changes in them is noticed. */
#include "tests/support.h"

#include <math.h>

#include "base/rng.h"
#include "inference/generate.h"
#include "inference/narrow.h"
#include "peft/lora.h"

#define TOKENS    12
#define ARENA     ((size_t)64 << 20)
#define VOCAB_MAX 4096

static const int32_t ids[TOKENS] = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8};

struct fixture {
    tp_ctx ctx;
    tp_model *model;
    tp_lora *lora;
    tp_narrow *narrow;
};

static void fill(tp_lora *lora, uint64_t seed)
{
    tp_rng_key key = {seed, TP_STREAM_INIT, 0};
    tp_rng_fill_uniform(key, 0, lora->params.elements, -0.5f, 0.5f, lora->params.values);
}

static void open_fixture(struct fixture *f)
{
    char path[1024];
    tp_model_options options = {.precision = TP_BF16};
    tp_lora_spec spec = {.rank = 4, .alpha = 8, .targets = {.all_linear = true}};
    tp_ctx_init(&f->ctx);
    assert_ok(&f->ctx, tp_device_open(&f->ctx, "cpu", 1, &f->ctx.device));
    assert_ok(&f->ctx, tp_model_open(&f->ctx, golden_path(path, sizeof path, "models/llama"), &options, &f->model));
    assert_ok(&f->ctx, tp_lora_attach(&f->ctx, f->model, &spec, &f->lora));
    assert_ok(&f->ctx, tp_narrow_open(&f->ctx, f->model, &f->narrow));
    assert_true(f->model->config.vocab_size <= VOCAB_MAX);
    fill(f->lora, 1);
}

static void close_fixture(struct fixture *f)
{
    tp_narrow_close(f->narrow);
    tp_lora_free(f->lora);
    tp_model_free(f->model);
    tp_device_close(f->ctx.device);
}

/* Logits after the last token, with whatever sits in the slots. */
static void run(struct fixture *f, float *logits)
{
    int32_t positions[TOKENS], last = TOKENS - 1;
    tp_segment segment = {.q_len = TOKENS, .k_len = TOKENS};
    tp_batch batch = {.n = TOKENS,
                      .ids = ids,
                      .positions = positions,
                      .max_position = TOKENS,
                      .segments = &segment,
                      .n_segments = 1,
                      .n_tokens = TOKENS};
    tp_tape *tape;
    for (int i = 0; i < TOKENS; i++) positions[i] = i;
    assert_ok(&f->ctx, tp_tape_new(&f->ctx, ARENA, TP_BF16, &tape));
    tp_pass pass = {.tape = tape, .batch = &batch};
    tp_tape_no_grad_begin(tape);
    tp_tensor *out = tp_logits(tape, tp_model_forward(f->model, &pass), &f->model->head.weight, &last, 1);
    assert_ok(&f->ctx, tp_tape_status(tape));
    memcpy(logits, out->data, (size_t)out->cols * sizeof *logits);
    tp_tape_free(tape);
}

static void run_narrow(struct fixture *f, float *logits)
{
    assert_ok(&f->ctx, tp_narrow_begin(&f->ctx, f->narrow));
    run(f, logits);
    tp_narrow_end(f->narrow);
}

static double distance(const struct fixture *f, const float *a, const float *b)
{
    double most = 0;
    for (int64_t i = 0; i < f->model->config.vocab_size; i++) most = fmax(most, fabs((double)a[i] - (double)b[i]));
    return most;
}

static void round_by_hand(tp_lora *lora)
{
    for (int64_t i = 0; i < lora->params.elements; i++)
        lora->params.values[i] = tp_bf16_to_f32(tp_f32_to_bf16(lora->params.values[i]));
}

/* Equal values give equal bits: both formats are widened to f32, or both rounded to bf16, before they are multiplied. */
static void test_logits_of_rounded_factors(void **state)
{
    struct fixture f;
    float exact[VOCAB_MAX], narrow[VOCAB_MAX], rounded[VOCAB_MAX];
    (void)state;
    open_fixture(&f);
    run(&f, exact);
    run_narrow(&f, narrow);
    round_by_hand(f.lora);
    run(&f, rounded);
    assert_true(distance(&f, narrow, rounded) == 0);
    if (f.ctx.device->auto_precision == TP_F32) assert_true(distance(&f, narrow, exact) > 0); /* dot products round both */
    close_fixture(&f);
}

static void test_slots_come_back(void **state)
{
    struct fixture f;
    (void)state;
    open_fixture(&f);
    assert_ok(&f.ctx, tp_narrow_begin(&f.ctx, f.narrow));
    for (size_t i = 0; i < f.lora->n_modules; i++) {
        const tp_lora_module *m = &f.lora->modules[i];
        assert_ptr_not_equal(m->module->slot.terms, &m->term);
        assert_int_equal(m->module->slot.terms[0].a->dtype, TP_BF16);
        assert_true(m->module->slot.terms[0].scaling == m->term.scaling);
    }
    tp_narrow_end(f.narrow);
    for (size_t i = 0; i < f.lora->n_modules; i++) {
        const tp_lora_module *m = &f.lora->modules[i];
        assert_ptr_equal(m->module->slot.terms, &m->term);
        assert_int_equal(m->module->slot.n_terms, 1);
    }
    close_fixture(&f);
}

static void test_changes_are_noticed(void **state)
{
    struct fixture f;
    float before[VOCAB_MAX], base[VOCAB_MAX], got[VOCAB_MAX], expected[VOCAB_MAX];
    (void)state;
    open_fixture(&f);
    run_narrow(&f, before);

    /* the slots are emptied */
    for (size_t i = 0; i < f.lora->n_modules; i++) f.lora->modules[i].module->slot.n_terms = 0;
    run(&f, base);
    run_narrow(&f, got);
    assert_true(distance(&f, got, base) == 0);
    assert_true(distance(&f, before, base) > 0);

    /* and filled again */
    for (size_t i = 0; i < f.lora->n_modules; i++) f.lora->modules[i].module->slot.n_terms = 1;
    run_narrow(&f, got);
    assert_true(distance(&f, got, before) == 0);

    /* the scaling changes without a word, the values need one */
    for (size_t i = 0; i < f.lora->n_modules; i++) f.lora->modules[i].term.scaling = 0;
    run_narrow(&f, got);
    assert_true(distance(&f, got, base) == 0);
    for (size_t i = 0; i < f.lora->n_modules; i++) f.lora->modules[i].term.scaling = 1;
    fill(f.lora, 2);
    round_by_hand(f.lora);
    run(&f, expected);
    tp_narrow_forget(f.narrow);
    run_narrow(&f, got);
    assert_true(distance(&f, got, expected) == 0);
    close_fixture(&f);
}

/* Through the generator, whose cache and chunking may cost an order of summation: bf16 activations, so some ulps of them. */
static void test_generator_holds_bf16(void **state)
{
    struct fixture f;
    tp_generator *generator;
    float expected[VOCAB_MAX], base[VOCAB_MAX], *logits;
    (void)state;
    open_fixture(&f);
    for (size_t i = 0; i < f.lora->n_modules; i++) f.lora->modules[i].module->slot.n_terms = 0;
    run(&f, base);
    for (size_t i = 0; i < f.lora->n_modules; i++) f.lora->modules[i].module->slot.n_terms = 1;
    run_narrow(&f, expected);
    assert_ok(&f.ctx, tp_generator_open(&f.ctx, f.model, 32, &generator));
    assert_ok(&f.ctx, tp_generator_run(&f.ctx, generator, ids, TOKENS, &logits));
    assert_true(distance(&f, logits, expected) <= 0.02 * distance(&f, expected, base));
    tp_generator_close(generator);
    close_fixture(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_logits_of_rounded_factors),
        cmocka_unit_test(test_slots_come_back),
        cmocka_unit_test(test_changes_are_noticed),
        cmocka_unit_test(test_generator_holds_bf16),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
