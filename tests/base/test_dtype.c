/* Element types: the safetensors table, and half-precision conversions against the compiler's own. */
#include "tests/support.h"

#include <math.h>

#include "base/dtype.h"

static uint16_t compiler_f32_to_f16(float f)
{
#ifdef __FLT16_MAX__
    _Float16 h = (_Float16)f;
    uint16_t bits;
    memcpy(&bits, &h, 2);
    return bits;
#else
    /* Without _Float16: scaled to an integer multiple of the spacing there, which rint rounds to nearest even. */
    double magnitude = fabs((double)f), spacing = 0x1p-24;
    uint16_t sign = signbit(f) ? 0x8000 : 0;
    if (magnitude >= 65520) return (uint16_t)(sign | 0x7c00);
    int exponent;
    frexp(magnitude, &exponent);
    if (magnitude >= 0x1p-14) spacing = ldexp(1, exponent - 11);
    double units = rint(magnitude / spacing);
    if (magnitude < 0x1p-14) return (uint16_t)(sign | (uint16_t)units);
    return (uint16_t)(sign + (uint16_t)((exponent + 14) << 10) + (uint16_t)(units - 1024));
#endif
}

static void table_is_that_of_safetensors(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        int bits;
    } expected[] = {{"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6},     {"U8", 8},          {"I8", 8},
                    {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},
                    {"U16", 16},    {"F16", 16},    {"BF16", 16},   {"I32", 32},        {"U32", 32},        {"F32", 32},
                    {"C64", 64},    {"F64", 64},    {"I64", 64},    {"U64", 64}};
    assert_int_equal(sizeof expected / sizeof expected[0], TP_DTYPE_COUNT);
    for (int i = 0; i < TP_DTYPE_COUNT; i++) {
        tp_dtype dtype = TP_DTYPE_COUNT;
        assert_string_equal(tp_dtype_name((tp_dtype)i), expected[i].name);
        assert_int_equal(tp_dtype_bits((tp_dtype)i), expected[i].bits);
        assert_int_equal(tp_dtype_bytes((tp_dtype)i), expected[i].bits / 8);
        assert_true(tp_dtype_parse(expected[i].name, strlen(expected[i].name), &dtype));
        assert_int_equal(dtype, i);
    }
    tp_dtype dtype;
    assert_false(tp_dtype_parse("f32", 3, &dtype));
    assert_false(tp_dtype_parse("F3", 2, &dtype));
    assert_false(tp_dtype_parse("", 0, &dtype));
    assert_true(tp_dtype_parse("F32xyz", 3, &dtype));
    assert_int_equal(tp_dtype_bits((tp_dtype)99), 0);
}

static void every_f16_is_read_right(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        float f = tp_f16_to_f32((uint16_t)h);
        uint32_t exponent = h >> 10 & 31, mantissa = h & 1023;
        double sign = h & 0x8000 ? -1 : 1;
        if (exponent == 31 && mantissa != 0) {
            assert_true(isnan(f));
        } else {
            double expected = exponent == 31  ? INFINITY
                              : exponent == 0 ? ldexp(mantissa, -24)
                                              : ldexp(1024 + mantissa, (int)exponent - 25);
            assert_true((double)f == sign * expected);
            assert_int_equal(signbit(f) != 0, h >> 15);
            assert_int_equal(tp_f32_to_f16(f), h); /* and back */
        }
    }
}

static void every_bf16_survives(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        float f = tp_bf16_to_f32((uint16_t)h);
        assert_int_equal(tp_f32_bits(f), h << 16);
        uint16_t quiet = (h & 0x7fff) > 0x7f80 ? 64 : 0; /* a signalling NaN becomes quiet */
        assert_int_equal(tp_f32_to_bf16(f), h | quiet);
    }
}

/* Every 16-bit upper half with lower halves around the ties, and a walk over the whole range. */
static void f32_rounds_to_f16_like_the_compiler(void **state)
{
    (void)state;
    static const uint32_t low[] = {0,      1,      0x0fff, 0x1000, 0x1001, 0x1fff, 0x2000, 0x2fff,
                                   0x3000, 0x3001, 0x7fff, 0x8000, 0xefff, 0xf000, 0xf001, 0xffff};
    for (uint32_t high = 0; high < 65536; high++) {
        for (size_t i = 0; i < sizeof low / sizeof low[0]; i++) {
            float f = tp_f32_from_bits(high << 16 | low[i]);
            uint16_t got = tp_f32_to_f16(f);
            if (isnan(f))
                assert_true((got & 0x7c00) == 0x7c00 && (got & 0x200) != 0);
            else
                assert_int_equal(got, compiler_f32_to_f16(f));
        }
    }
    for (uint64_t bits = 0; bits < UINT64_C(1) << 32; bits += 4099) {
        float f = tp_f32_from_bits((uint32_t)bits);
        if (!isnan(f)) assert_int_equal(tp_f32_to_f16(f), compiler_f32_to_f16(f));
    }
}

/* The nearer of the two bf16 neighbours, the even one on a tie, from the definition in double precision. */
static void f32_rounds_to_bf16_nearest_even(void **state)
{
    (void)state;
    for (uint64_t bits = 0; bits < UINT64_C(1) << 32; bits += 1021) {
        float f = tp_f32_from_bits((uint32_t)bits);
        uint16_t got = tp_f32_to_bf16(f), below = (uint16_t)(bits >> 16);
        if (isnan(f) || isinf(f)) continue;
        uint32_t rest = (uint32_t)bits & 0xffff;
        bool up = rest > 0x8000 || (rest == 0x8000 && (below & 1) != 0);
        assert_int_equal(got, below + up);
    }
    assert_int_equal(tp_f32_to_bf16(3.4028235e38f), 0x7f80); /* past the largest: infinity */
    assert_int_equal(tp_f32_to_bf16(INFINITY), 0x7f80);
    assert_int_equal(tp_f32_to_bf16(tp_f32_from_bits(0x7f800001)), 0x7fc0);
}

static void arrays_convert_at_any_alignment(void **state)
{
    (void)state;
    static const tp_dtype dtypes[] = {TP_F16, TP_BF16, TP_F32, TP_F64};
    const float values[5] = {1, -2.5f, 0, 65504, -0.0f}, exact[5] = {1, -2.5f, 0, 65504, -0.0f};
    char bytes[64];
    for (size_t d = 0; d < 4; d++) {
        for (size_t offset = 0; offset < 3; offset++) {
            float back[5] = {9, 9, 9, 9, 9};
            assert_true(tp_dtype_is_float(dtypes[d]));
            tp_convert_from_f32(dtypes[d], values, 5, bytes + offset);
            tp_convert_to_f32(dtypes[d], bytes + offset, 5, back);
            for (int i = 0; i < 5; i++) {
                float expected = dtypes[d] == TP_BF16 && i == 3 ? 65536 : exact[i]; /* bf16 has no 65504 */
                assert_true(back[i] == expected && signbit(back[i]) == signbit(expected));
            }
        }
    }
    assert_false(tp_dtype_is_float(TP_I32));
    tp_convert_to_f32(TP_F32, NULL, 0, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(table_is_that_of_safetensors),
        cmocka_unit_test(every_f16_is_read_right),
        cmocka_unit_test(every_bf16_survives),
        cmocka_unit_test(f32_rounds_to_f16_like_the_compiler),
        cmocka_unit_test(f32_rounds_to_bf16_nearest_even),
        cmocka_unit_test(arrays_convert_at_any_alignment),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
