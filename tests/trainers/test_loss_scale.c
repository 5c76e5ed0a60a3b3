/* Loss scaling: the trajectory that torch.amp.GradScaler documents, and whole runs. A power of two neither rounds nor hides
 * anything in fp32, so that a scaled run has to write the bytes of one that is not; and a scale that is too large for fp32 is
 * found by halving, as one that is too large for fp16 is. Under fp16 itself the same runs need a GPU. */
#include "tests/support.h"

#include <math.h>

#include "base/mem.h"
#include "tests/trainers/training.h"
#include "trainers/loss_scale.h"

/* GradScaler(init_scale=65536, growth_factor=2, backoff_factor=0.5, growth_interval=2000). */
static void test_trajectory(void **state)
{
    (void)state;
    tp_loss_scale s = {.value = TP_LOSS_SCALE_FIRST};
    for (int i = 0; i < 1999; i++) assert_false(tp_loss_scale_update(&s, true));
    assert_true(s.value == 65536 && s.streak == 1999);
    assert_false(tp_loss_scale_update(&s, true)); /* the 2000th in a row */
    assert_true(s.value == 131072 && s.streak == 0);
    for (int i = 0; i < 1500; i++) assert_false(tp_loss_scale_update(&s, true));
    assert_true(tp_loss_scale_update(&s, false)); /* counts from the beginning again */
    assert_true(s.value == 65536 && s.streak == 0);
    assert_true(tp_loss_scale_update(&s, false));
    assert_true(s.value == 32768 && s.streak == 0);
    for (int i = 0; i < 1999; i++) assert_false(tp_loss_scale_update(&s, true));
    assert_true(s.value == 32768);
    assert_false(tp_loss_scale_update(&s, true));
    assert_true(s.value == 65536);
}

static void test_ends(void **state)
{
    (void)state;
    tp_loss_scale s = {.value = TP_LOSS_SCALE_FIRST}, none = {0};
    for (int i = 0; i < 16; i++) assert_true(tp_loss_scale_update(&s, false));
    assert_true(s.value == 1);
    assert_false(tp_loss_scale_update(&s, false)); /* falls no lower: the run has to fail */
    assert_true(s.value == 1);
    s = (tp_loss_scale){TP_LOSS_SCALE_MOST, TP_LOSS_SCALE_INTERVAL - 1};
    assert_false(tp_loss_scale_update(&s, true));
    assert_true(s.value == TP_LOSS_SCALE_MOST && s.streak == 0);
    assert_false(tp_loss_scale_update(&none, false));
    assert_true(none.value == 0 && none.streak == 0);
}

static void test_valid(void **state)
{
    (void)state;
    static const struct {
        tp_loss_scale scale;
        bool valid;
    } cases[] = {{{0, 0}, true},    {{0, 1}, false},   {{1, 0}, true},        {{65536, 1999}, true}, {{65536, 2000}, false},
                 {{0.5, 0}, false}, {{3, 0}, false},   {{0x1p126, 0}, true},  {{0x1p127, 0}, false}, {{65536, -1}, false},
                 {{-2, 0}, false},  {{NAN, 0}, false}, {{INFINITY, 0}, false}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_int_equal(tp_loss_scale_valid(&cases[i].scale), cases[i].valid);
}

/* ---- runs ---- */

#define STEPS 12

struct bench {
    tp_ctx ctx;
    scratch s;
    char base[1024], data[1024];
    double alpha;
};

static void begin(struct bench *b)
{
    tp_ctx_init(&b->ctx);
    b->alpha = 16;
    scratch_begin(&b->s);
    golden_path(b->base, sizeof b->base, "models/llama");
    golden_path(b->data, sizeof b->data, "curves/llama-lora/batches.safetensors");
}

/* Into out/<name>; the first `steps` of STEPS, or on from the checkpoint that is there. */
static tp_status train(struct bench *b, const char *name, const char *device, const char *precision, double scale,
                       int64_t steps)
{
    tp_train_options options = {.loss_scale = scale, .resume = steps < 0 ? "auto" : NULL};
    tp_buf text;
    tp_buf_init(&text, 0);
    tp_buf_printf(
        &text,
        "base_model: %s\nadapter: lora\nlora_dropout: 0.1\nlora_alpha: %g\nseed: 7\nlearning_rate: 1e-6\nlr_scheduler: cosine\n"
        "datasets:\n  - {path: %s, type: tokens}\ngradient_accumulation_steps: 2\nsave_steps: 1\nmax_steps: %d\n"
        "max_skipped_steps: 3\ndevice: %s\nprecision: %s\noutput_dir: %s/%s\n",
        b->base, b->alpha, b->data, STEPS, device, precision, b->s.folder, name);
    tp_status status = train_recipe_steps(&b->ctx, &b->s, tp_buf_cstr(&text), &options, steps > 0 ? steps : INT64_MAX);
    tp_buf_free(&text);
    return status;
}

static void assert_same(struct bench *b, const char *file, const char *one, const char *other)
{
    char relative[256], *bytes[2];
    size_t n[2];
    for (int i = 0; i < 2; i++) {
        snprintf(relative, sizeof relative, "%s/%s", i == 0 ? one : other, file);
        assert_ok(&b->ctx, tp_file_read(&b->ctx, scratch_path(&b->s, relative), (size_t)1 << 26, &bytes[i], &n[i]));
    }
    assert_int_equal(n[0], n[1]);
    assert_memory_equal(bytes[0], bytes[1], n[0]);
    tp_free(bytes[0]), tp_free(bytes[1]);
}

static void scaled_is_unscaled(void **state)
{
    (void)state;
    struct bench b;
    double plain[STEPS], scaled[STEPS], scales[STEPS];
    begin(&b);
    assert_ok(&b.ctx, train(&b, "plain", "cpu", "fp32", 0, STEPS));
    assert_ok(&b.ctx, train(&b, "scaled", "cpu", "fp32", 0x1p20, STEPS));
    assert_same(&b, "adapter/adapter_model.safetensors", "plain", "scaled");
    assert_same(&b, "ckpt-12/optimizer.safetensors", "plain", "scaled");
    char one[1100], other[1100];
    snprintf(one, sizeof one, "%s/plain", b.s.folder), snprintf(other, sizeof other, "%s/scaled", b.s.folder);
    static const char *const keys[] = {"loss", "grad_norm"}; /* the true norm */
    for (int k = 0; k < 2; k++) {
        assert_int_equal(read_metrics(&b.ctx, one, keys[k], plain, STEPS), STEPS);
        assert_int_equal(read_metrics(&b.ctx, other, keys[k], scaled, STEPS), STEPS);
        for (int i = 0; i < STEPS; i++) assert_true(plain[i] == scaled[i]);
    }
    assert_int_equal(read_metrics(&b.ctx, one, "loss_scale", scales, STEPS), 0);
    assert_int_equal(read_metrics(&b.ctx, other, "loss_scale", scales, STEPS), STEPS);
    for (int i = 0; i < STEPS; i++) assert_true(scales[i] == 0x1p20);
    scratch_end(&b.s);
}

/* More steps are skipped in a row than max_skipped_steps allows failures, since the scale falls in each; a run that ends in
 * between and resumes writes what one writes that does not. */
static void search(struct bench *b, const char *device, const char *precision, double first, int least)
{
    double scales[STEPS], norms[STEPS], losses[STEPS];
    char out[1100];
    assert_ok(&b->ctx, train(b, "whole", device, precision, first, STEPS));
    assert_ok(&b->ctx, train(b, "parts", device, precision, first, 3));
    assert_ok(&b->ctx, train(b, "parts", device, precision, first, -1));
    assert_same(b, "metrics.jsonl", "whole", "parts");
    assert_same(b, "adapter/adapter_model.safetensors", "whole", "parts");
    assert_same(b, "ckpt-12/optimizer.safetensors", "whole", "parts");
    assert_same(b, "ckpt-12/state.json", "whole", "parts");
    snprintf(out, sizeof out, "%s/whole", b->s.folder);
    assert_int_equal(read_metrics(&b->ctx, out, "loss_scale", scales, STEPS), STEPS);
    assert_int_equal(read_metrics(&b->ctx, out, "grad_norm", norms, STEPS), STEPS);
    assert_int_equal(read_metrics(&b->ctx, out, "loss", losses, STEPS), STEPS);
    int skipped = 0;
    double scale = first;
    for (int i = 0; i < STEPS; i++) {
        assert_true(fabs(scales[i] / scale - 1) < 1e-8); /* nine digits */
        assert_true(isfinite(losses[i]));
        if (isfinite(norms[i])) continue;
        scale /= 2, skipped++;
    }
    print_message("%s on %s: %d of %d steps searched for a scale, %g was found\n", precision, device, skipped, STEPS, scale);
    assert_true(skipped >= least && skipped < STEPS);
}

static void too_large_a_scale(void **state)
{
    (void)state;
    struct bench b;
    begin(&b);
    b.alpha = 1e6; /* gradients of B are large by that much */
    search(&b, "cpu", "fp32", 0x1p126, 4);
    scratch_end(&b.s);
}

/* No scale helps against a loss that overflows: those steps count, though the scale falls in them as well. */
static void loss_that_overflows(void **state)
{
    (void)state;
    struct bench b;
    begin(&b);
    b.alpha = 5e39;
    assert_int_equal(train(&b, "lost", "cpu", "fp32", TP_LOSS_SCALE_FIRST, STEPS), TP_NUMERIC);
    assert_non_null(strstr(b.ctx.message, "step 3: 3 steps in a row"));
    scratch_end(&b.s);
}

static void fp16_on_a_gpu(void **state)
{
    (void)state;
    struct bench b;
    tp_device *device;
    begin(&b);
    if (tp_device_open(&b.ctx, "cuda", 0, &device) != TP_OK) {
        print_message("not run, no GPU: %s\n", b.ctx.message);
        scratch_end(&b.s);
        skip();
    }
    tp_device_close(device);
    search(&b, "cuda", "fp16", 0x1p30, 4);
    scratch_end(&b.s);
}

static void fp16_needs_a_gpu(void **state)
{
    (void)state;
    struct bench b;
    begin(&b);
    assert_int_equal(train(&b, "none", "cpu", "fp16", 0, STEPS), TP_UNSUPPORTED);
    assert_non_null(strstr(b.ctx.message, "recipe.yaml:15:"));
    assert_non_null(strstr(b.ctx.message, "precision: fp16 needs a CUDA GPU; this is device cpu"));
    scratch_end(&b.s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_trajectory),    cmocka_unit_test(test_ends),         cmocka_unit_test(test_valid),
        cmocka_unit_test(scaled_is_unscaled), cmocka_unit_test(too_large_a_scale), cmocka_unit_test(loss_that_overflows),
        cmocka_unit_test(fp16_on_a_gpu),      cmocka_unit_test(fp16_needs_a_gpu),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
