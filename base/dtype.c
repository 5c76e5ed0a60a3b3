/* Element types: sizes, names, conversions. */
#include "base/dtype.h"

static const struct {
    const char *name;
    int bits;
} dtypes[TP_DTYPE_COUNT] = {
    [TP_BOOL] = {"BOOL", 8},
    [TP_F4] = {"F4", 4},
    [TP_F6_E2M3] = {"F6_E2M3", 6},
    [TP_F6_E3M2] = {"F6_E3M2", 6},
    [TP_U8] = {"U8", 8},
    [TP_I8] = {"I8", 8},
    [TP_F8_E5M2] = {"F8_E5M2", 8},
    [TP_F8_E4M3] = {"F8_E4M3", 8},
    [TP_F8_E8M0] = {"F8_E8M0", 8},
    [TP_F8_E4M3FNUZ] = {"F8_E4M3FNUZ", 8},
    [TP_F8_E5M2FNUZ] = {"F8_E5M2FNUZ", 8},
    [TP_I16] = {"I16", 16},
    [TP_U16] = {"U16", 16},
    [TP_F16] = {"F16", 16},
    [TP_BF16] = {"BF16", 16},
    [TP_I32] = {"I32", 32},
    [TP_U32] = {"U32", 32},
    [TP_F32] = {"F32", 32},
    [TP_C64] = {"C64", 64},
    [TP_F64] = {"F64", 64},
    [TP_I64] = {"I64", 64},
    [TP_U64] = {"U64", 64},
};

int tp_dtype_bits(tp_dtype dtype)
{
    return (unsigned)dtype < TP_DTYPE_COUNT ? dtypes[dtype].bits : 0;
}
size_t tp_dtype_bytes(tp_dtype dtype)
{
    return (size_t)tp_dtype_bits(dtype) / 8;
}
const char *tp_dtype_name(tp_dtype dtype)
{
    return (unsigned)dtype < TP_DTYPE_COUNT ? dtypes[dtype].name : "unknown";
}

bool tp_dtype_parse(const char *name, size_t n, tp_dtype *dtype)
{
    for (int i = 0; i < TP_DTYPE_COUNT; i++) {
        if (strlen(dtypes[i].name) == n && memcmp(dtypes[i].name, name, n) == 0) {
            *dtype = (tp_dtype)i;
            return true;
        }
    }
    return false;
}

bool tp_dtype_is_float(tp_dtype dtype)
{
    return dtype == TP_F16 || dtype == TP_BF16 || dtype == TP_F32 || dtype == TP_F64;
}

float tp_f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
    if (exponent == 31) return tp_f32_from_bits(sign | 0x7f800000u | mantissa << 13);
    if (exponent > 0) return tp_f32_from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
    float subnormal = (float)mantissa * 0x1p-24f;
    return sign ? -subnormal : subnormal;
}

uint16_t tp_f32_to_f16(float f)
{
    uint32_t b = tp_f32_bits(f), sign = b >> 16 & 0x8000, magnitude = b & 0x7fffffff;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
    if (magnitude >= 0x47800000u) return (uint16_t)(sign | 0x7c00); /* 65536 and above */
    if (magnitude < 0x38800000u) { /* below 2^-14: the addition rounds to a multiple of 2^-24 */
        float shifted = tp_f32_from_bits(magnitude) + 0.5f;
        return (uint16_t)(sign | (tp_f32_bits(shifted) - 0x3f000000u));
    }
    uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000u;
    return (uint16_t)(sign | rounded >> 13);
}

void tp_convert_to_f32(tp_dtype from, const void *src, size_t n, float *dst)
{
    const unsigned char *bytes = src;
    if (from == TP_F32) {
        if (n > 0) memcpy(dst, src, n * sizeof *dst);
        return;
    }
    for (size_t i = 0; i < n; i++) {
        uint16_t half;
        double wide;
        switch (from) {
        case TP_BF16:
            memcpy(&half, bytes + 2 * i, 2);
            dst[i] = tp_bf16_to_f32(half);
            break;
        case TP_F16:
            memcpy(&half, bytes + 2 * i, 2);
            dst[i] = tp_f16_to_f32(half);
            break;
        case TP_F64:
            memcpy(&wide, bytes + 8 * i, 8);
            dst[i] = (float)wide;
            break;
        default: dst[i] = 0; break;
        }
    }
}

void tp_convert_from_f32(tp_dtype to, const float *src, size_t n, void *dst)
{
    unsigned char *bytes = dst;
    if (to == TP_F32) {
        if (n > 0) memcpy(dst, src, n * sizeof *src);
        return;
    }
    for (size_t i = 0; i < n; i++) {
        uint16_t half;
        double wide;
        switch (to) {
        case TP_BF16:
            half = tp_f32_to_bf16(src[i]);
            memcpy(bytes + 2 * i, &half, 2);
            break;
        case TP_F16:
            half = tp_f32_to_f16(src[i]);
            memcpy(bytes + 2 * i, &half, 2);
            break;
        case TP_F64:
            wide = src[i];
            memcpy(bytes + 8 * i, &wide, 8);
            break;
        default: break;
        }
    }
}
