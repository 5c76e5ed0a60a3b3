/* Random models: the folder opens again, its numbers have the stated distribution, threads and repeats change nothing. */
#include "tests/support.h"

#include <math.h>
#include <unistd.h>

#include "backend/backend.h"
#include "base/mem.h"
#include "base/rng.h"
#include "base/safetensors.h"
#include "models/init.h"
#include "models/model.h"
#include "tests/failing_memory.h"
#include "tests/scratch.h"

static const char llama_text[] =
    "{\"model_type\": \"llama\", \"hidden_size\": 128, \"intermediate_size\": 200, \"num_hidden_layers\": 2, "
    "\"num_attention_heads\": 8, \"num_key_value_heads\": 2, \"vocab_size\": 3000, \"initializer_range\": 0.05, "
    "\"attention_bias\": true%s}";
static const char gpt2_text[] =
    "{\"model_type\": \"gpt2\", \"n_embd\": 48, \"n_layer\": 2, \"n_head\": 4, \"n_positions\": 32, \"vocab_size\": 300}";

static void write_config(tp_ctx *ctx, scratch *files, const char *text)
{
    assert_ok(ctx, tp_file_write(ctx, scratch_path(files, "config.json"), text, strlen(text)));
}

static void init_model(tp_ctx *ctx, scratch *files, const char *name, uint64_t seed, tp_dtype dtype, char out[600])
{
    char config[600];
    snprintf(config, sizeof config, "%s/config.json", files->folder);
    snprintf(out, 600, "%s/%s", files->folder, name);
    assert_ok(ctx, tp_model_init(ctx, config, out, seed, dtype));
}

static void open_file(tp_ctx *ctx, const char *folder, tp_safetensors **file)
{
    char path[700];
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    assert_ok(ctx, tp_safetensors_open(ctx, path, file));
}

static float *read_tensor(tp_ctx *ctx, const tp_safetensors *file, const tp_entry *e, size_t *n)
{
    *n = (size_t)e->bytes / tp_dtype_bytes(e->dtype);
    float *values = malloc(*n * sizeof *values);
    assert_ok(ctx, tp_safetensors_read_f32(ctx, file, e, 0, *n, values));
    return values;
}

/* Mean and standard deviation of n normal numbers lie within 5 deviations of their own; so does the share beyond one sigma. */
static void check_normal(const char *name, const float *x, size_t n, double sigma)
{
    double sum = 0, squares = 0, beyond = 0;
    for (size_t i = 0; i < n; i++) {
        sum += (double)x[i];
        squares += (double)x[i] * (double)x[i];
        beyond += fabs((double)x[i]) > sigma;
    }
    double root = sqrt((double)n), share = 2 * (1 - 0.8413447460685429);
    if (!(fabs(sum / (double)n) <= 5 * sigma / root)) fail_msg("%s: mean %g", name, sum / (double)n);
    /* 0.3 percent more: bf16 keeps 8 bits */
    if (!(fabs(sqrt(squares / (double)n) / sigma - 1) <= 5 / root / M_SQRT2 + 0.003))
        fail_msg("%s: deviation %g", name, sqrt(squares / (double)n));
    if (!(fabs(beyond / (double)n - share) <= 5 * sqrt(share * (1 - share)) / root + 0.003))
        fail_msg("%s: %g beyond one sigma", name, beyond / (double)n);
}

static void numbers_are_normal(void **state)
{
    static const tp_dtype dtypes[] = {TP_F32, TP_BF16, TP_F16};
    tp_ctx ctx;
    scratch files;
    char folder[600], text[512];
    (void)state;
    for (int d = 0; d < 3; d++) {
        tp_ctx_init(&ctx);
        scratch_begin(&files);
        snprintf(text, sizeof text, llama_text, "");
        write_config(&ctx, &files, text);
        init_model(&ctx, &files, "m", 42, dtypes[d], folder);
        tp_safetensors *file;
        open_file(&ctx, folder, &file);
        assert_int_equal(tp_safetensors_count(file), 3 + 2 * (7 + 4 + 2));
        for (size_t i = 0; i < tp_safetensors_count(file); i++) {
            const tp_entry *e = tp_safetensors_at(file, i);
            size_t n;
            float *x = read_tensor(&ctx, file, e, &n);
            assert_int_equal(e->dtype, dtypes[d]);
            if (e->rank == 2)
                check_normal(e->name, x, n, 0.05);
            else
                for (size_t k = 0; k < n; k++) assert_true(x[k] == (tp_ends_with(e->name, ".bias") ? 0.0f : 1.0f));
            free(x);
        }
        tp_safetensors_close(file);
        scratch_end(&files);
    }
}

/* Two tensors of one shape, and two seeds, are uncorrelated: |r| of n pairs stays below 5 / sqrt(n). */
static double correlation(const float *x, const float *y, size_t n)
{
    double xy = 0, xx = 0, yy = 0;
    for (size_t i = 0; i < n; i++) {
        xy += (double)x[i] * (double)y[i];
        xx += (double)x[i] * (double)x[i];
        yy += (double)y[i] * (double)y[i];
    }
    return fabs(xy) / sqrt(xx * yy);
}

static void tensors_and_seeds_differ(void **state)
{
    tp_ctx ctx;
    scratch files;
    char a[600], b[600], text[512];
    tp_safetensors *fa, *fb;
    size_t n;
    (void)state;
    tp_ctx_init(&ctx);
    scratch_begin(&files);
    snprintf(text, sizeof text, llama_text, "");
    write_config(&ctx, &files, text);
    init_model(&ctx, &files, "a", 1, TP_F32, a);
    init_model(&ctx, &files, "b", 2, TP_F32, b);
    open_file(&ctx, a, &fa);
    open_file(&ctx, b, &fb);
    float *gate = read_tensor(&ctx, fa, tp_safetensors_find(fa, "model.layers.0.mlp.gate_proj.weight"), &n);
    float *up = read_tensor(&ctx, fa, tp_safetensors_find(fa, "model.layers.0.mlp.up_proj.weight"), &n);
    float *other = read_tensor(&ctx, fb, tp_safetensors_find(fb, "model.layers.0.mlp.gate_proj.weight"), &n);
    assert_true(correlation(gate, up, n) < 5 / sqrt((double)n));
    assert_true(correlation(gate, other, n) < 5 / sqrt((double)n));
    assert_true(correlation(gate, gate + 8, n - 8) < 5 / sqrt((double)n));
    free(gate);
    free(up);
    free(other);
    tp_safetensors_close(fa);
    tp_safetensors_close(fb);
    scratch_end(&files);
}

/* Weight i of tensor t is the quantile that 16 bits of block i / 8 of stream t name: Phi(x / sigma) = (bits + 1/2) / 65536.
 * The table's exact deviation in spite of its cut tails moves values by 2e-5. */
static void weights_are_quantiles_of_the_generator(void **state)
{
    tp_ctx ctx;
    scratch files;
    char folder[600], text[512];
    tp_safetensors *file;
    size_t n;
    (void)state;
    tp_ctx_init(&ctx);
    scratch_begin(&files);
    snprintf(text, sizeof text, llama_text, "");
    write_config(&ctx, &files, text);
    init_model(&ctx, &files, "m", 0x123456789abcdef, TP_F32, folder);
    open_file(&ctx, folder, &file);
    float *x = read_tensor(&ctx, file, tp_safetensors_find(file, "model.embed_tokens.weight"), &n);
    assert_int_equal(n, 3000 * 128);
    for (size_t i = 0; i < n; i += 37) {
        uint32_t word = tp_rng_u32((tp_rng_key){0x123456789abcdef, TP_STREAM_INIT, 0}, i / 2);
        double wanted = ((word >> 16 * (i % 2) & 0xffff) + 0.5) / 65536, got = 0.5 * erfc(-(double)x[i] / 0.05 * M_SQRT1_2);
        if (!(fabs(got - wanted) <= 2e-5)) fail_msg("weight %zu: Phi = %.7f, expected %.7f", i, got, wanted);
    }
    free(x);
    tp_safetensors_close(file);
    scratch_end(&files);
}

static void same_file(tp_ctx *ctx, const char *a, const char *b, const char *name)
{
    char path[700], first[65], second[65];
    snprintf(path, sizeof path, "%s/%s", a, name);
    assert_ok(ctx, tp_sha256_file(ctx, path, first));
    snprintf(path, sizeof path, "%s/%s", b, name);
    assert_ok(ctx, tp_sha256_file(ctx, path, second));
    assert_string_equal(first, second);
}

/* More tensors than a buffer holds values would take too long here; the pieces of one buffer are what threads share. */
static void threads_change_nothing(void **state)
{
    tp_ctx ctx;
    scratch files;
    char a[600], b[600];
    (void)state;
    tp_ctx_init(&ctx);
    scratch_begin(&files);
    write_config(&ctx, &files,
                 "{\"model_type\": \"llama\", \"hidden_size\": 128, \"intermediate_size\": 130, \"num_hidden_layers\": 1, "
                 "\"num_attention_heads\": 8, \"vocab_size\": 70001, \"tie_word_embeddings\": true}");
    for (int threads = 1; threads <= 3; threads += 2) {
        assert_ok(&ctx, tp_device_open(&ctx, "dry", threads, &ctx.device));
        ctx.device->threads = threads;
        init_model(&ctx, &files, threads == 1 ? "a" : "b", 7, TP_BF16, threads == 1 ? a : b);
        tp_device_close(ctx.device);
        ctx.device = NULL;
    }
    same_file(&ctx, a, b, "model.safetensors");
    same_file(&ctx, a, b, "config.json");
    scratch_end(&files);
}

static void folders_open_again(void **state)
{
    tp_ctx ctx;
    scratch files;
    tp_model *m;
    char folder[600], text[512];
    tp_model_options options = {.precision = TP_F32, .check_weights = true};
    (void)state;
    for (int kind = 0; kind < 3; kind++) {
        tp_ctx_init(&ctx);
        assert_ok(&ctx, tp_device_open(&ctx, "cpu", 2, &ctx.device));
        scratch_begin(&files);
        snprintf(text, sizeof text, llama_text, kind == 1 ? ", \"tie_word_embeddings\": true, \"mlp_bias\": true" : "");
        write_config(&ctx, &files, kind == 2 ? gpt2_text : text);
        init_model(&ctx, &files, "m", 42, TP_BF16, folder);
        assert_ok(&ctx, tp_model_open(&ctx, folder, &options, &m));
        assert_int_equal(m->config.dtype, TP_BF16);
        assert_int_equal(m->config.tied, kind != 0);
        assert_true(m->config.initializer_range == (kind == 2 ? 0.02 : 0.05));
        if (kind == 2) assert_true(m->blocks[0].qkv.weight.transposed && m->blocks[0].qkv.conv1d);
        tp_model_free(m);
        scratch_end(&files);
        tp_device_close(ctx.device);
    }
}

static void refusals(void **state)
{
    tp_ctx ctx;
    scratch files;
    char config[600], out[600];
    (void)state;
    tp_ctx_init(&ctx);
    scratch_begin(&files);
    write_config(&ctx, &files, gpt2_text);
    snprintf(config, sizeof config, "%s/config.json", files.folder);
    snprintf(out, sizeof out, "%s/out", files.folder);
    assert_status(&ctx, TP_INVALID, tp_model_init(&ctx, config, out, 42, TP_I32));
    assert_status(&ctx, TP_INVALID, tp_model_init(&ctx, config, files.folder, 42, TP_F32));
    write_config(&ctx, &files, "{\"model_type\": \"llama\"}");
    assert_status(&ctx, TP_FORMAT, tp_model_init(&ctx, files.folder, out, 42, TP_F32));
    assert_false(tp_path_exists(out));
    write_config(&ctx, &files, gpt2_text);
    snprintf(out, sizeof out, "%s/config.json/below", files.folder);
    assert_int_equal(tp_status_exit_code(tp_model_init(&ctx, files.folder, out, 42, TP_F32)), 4);
    scratch_end(&files);
}

/* A new name each time: removing the folder would take memory too. */
static tp_status init_again(tp_ctx *ctx, scratch *files, int *run)
{
    char out[600];
    snprintf(out, sizeof out, "%s/out-%d", files->folder, ++*run);
    tp_status status = tp_model_init(ctx, files->folder, out, 42, TP_BF16);
    if (tp_path_exists(out) != (status == TP_OK))
        fail_msg("%s: %s", out, status == TP_OK ? "missing" : "left behind after a failure");
    return status;
}

static void every_allocation_may_fail(void **state)
{
    tp_ctx ctx;
    scratch files;
    int run = 0;
    (void)state;
    tp_ctx_init(&ctx);
    scratch_begin(&files);
    write_config(&ctx, &files, gpt2_text);
    assert_survives_failing_memory(&ctx, init_again(&ctx, &files, &run));
    scratch_end(&files);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(numbers_are_normal),
        cmocka_unit_test(tensors_and_seeds_differ),
        cmocka_unit_test(weights_are_quantiles_of_the_generator),
        cmocka_unit_test(threads_change_nothing),
        cmocka_unit_test(folders_open_again),
        cmocka_unit_test(refusals),
        cmocka_unit_test(every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
