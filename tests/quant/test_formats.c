/* Decoders of tp_formats against gguf-py's values, bit for bit, and dense formats against the conversions of base. */
#include "tests/support.h"

#include <math.h>

#include "backend/matrix.h"
#include "base/safetensors.h"

/* NaN has many bit patterns and no two programs agree on them: any equals any. */
static bool same(float a, float b)
{
    return tp_f32_bits(a) == tp_f32_bits(b) || (a != a && b != b);
}

static void check_blocks(tp_ctx *ctx, const tp_safetensors *file, tp_format_id id, const char *type)
{
    const tp_format *f = &tp_formats[id];
    char name[64];
    snprintf(name, sizeof name, "%s.bytes", type);
    const tp_entry *bytes = tp_safetensors_find(file, name);
    snprintf(name, sizeof name, "%s.values", type);
    const tp_entry *values = tp_safetensors_find(file, name);
    assert_non_null(bytes);
    assert_non_null(values);
    int64_t n = bytes->shape[0];
    assert_int_equal(bytes->shape[1], f->block_bytes);
    assert_int_equal(values->shape[1], f->block);
    assert_true(n > 0);
    unsigned char *raw = malloc((size_t)(n * f->block_bytes));
    size_t count = (size_t)(n * f->block);
    float *expected = malloc(count * sizeof *expected), *got = malloc(count * sizeof *got);
    assert_true(raw != NULL && expected != NULL && got != NULL);
    assert_ok(ctx, tp_safetensors_read(ctx, file, bytes, raw));
    assert_ok(ctx, tp_safetensors_read_f32(ctx, file, values, 0, count, expected));
    f->decode(raw, 0, n * f->block, got); /* as one row */
    for (size_t i = 0; i < count; i++) {
        if (!same(got[i], expected[i]))
            fail_msg("%s: value %zu is %.9g, expected %.9g", type, i, (double)got[i], (double)expected[i]);
    }
    for (int64_t block = 0; block < n; block++) { /* and from the middle */
        f->decode(raw, block * f->block, f->block, got);
        for (int64_t j = 0; j < f->block; j++) assert_true(same(got[j], expected[block * f->block + j]));
    }
    print_message("%s: %lld blocks\n", type, (long long)n);
    free(raw);
    free(expected);
    free(got);
}

static void test_blocks(void **unused)
{
    (void)unused;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    char path[512];
    tp_safetensors *file;
    assert_ok(&ctx, tp_safetensors_open(&ctx, golden_path(path, sizeof path, "gguf/blocks.safetensors"), &file));
    check_blocks(&ctx, file, TP_FORMAT_Q8_0, "Q8_0");
    check_blocks(&ctx, file, TP_FORMAT_Q4_0, "Q4_0");
    check_blocks(&ctx, file, TP_FORMAT_Q4_1, "Q4_1");
    tp_safetensors_close(file);
}

/* Every 16-bit pattern, at an odd address. */
static void test_dense(void **unused)
{
    (void)unused;
    static unsigned char raw[65536 * 2 + 1];
    static float got[65536];
    for (uint32_t h = 0; h < 65536; h++) {
        uint16_t bits = (uint16_t)h;
        memcpy(raw + 1 + 2 * h, &bits, 2);
    }
    tp_formats[TP_FORMAT_BF16].decode(raw + 1, 0, 65536, got);
    for (uint32_t h = 0; h < 65536; h++) assert_true(same(got[h], tp_f32_from_bits(h << 16)));
    tp_formats[TP_FORMAT_F16].decode(raw + 1, 0, 65536, got);
    for (uint32_t h = 0; h < 65536; h++) { /* by the definition of binary16 */
        int exponent = (int)(h >> 10 & 31), fraction = (int)(h & 1023);
        double x = exponent == 31  ? (fraction != 0 ? (double)NAN : (double)INFINITY)
                   : exponent == 0 ? ldexp(fraction, -24)
                                   : ldexp(1024 + fraction, exponent - 25);
        assert_true(same(got[h], (float)(h >> 15 != 0 ? -x : x)));
    }
    static const float values[3] = {1.5f, -0.0f, 3e38f};
    memcpy(raw + 1, values, sizeof values);
    tp_formats[TP_FORMAT_F32].decode(raw + 1, 1, 2, got);
    assert_true(same(got[0], -0.0f) && got[1] == 3e38f);
}

static void test_table(void **unused)
{
    (void)unused;
    static const char *const names[] = {"f32", "bf16", "f16", "q8_0", "q4_0", "q4_1"};
    static const int64_t bytes_of_64[] = {256, 128, 128, 68, 36, 40};
    assert_int_equal(TP_FORMAT_COUNT, 6);
    for (int i = 0; i < TP_FORMAT_COUNT; i++) {
        assert_string_equal(tp_formats[i].name, names[i]);
        assert_int_equal(tp_format_row_bytes((tp_format_id)i, 64), bytes_of_64[i]);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_blocks),
        cmocka_unit_test(test_dense),
        cmocka_unit_test(test_table),
    };
    return cmocka_run_group_tests_name("quant/formats", tests, NULL, NULL);
}
