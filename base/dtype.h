/* Element types and conversions between them. */
#ifndef TP_BASE_DTYPE_H
#define TP_BASE_DTYPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "base/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* In the order of safetensors' dtype list, lowest first: its writers sort by it. */
typedef enum tp_dtype {
    TP_BOOL,
    TP_F4,
    TP_F6_E2M3,
    TP_F6_E3M2,
    TP_U8,
    TP_I8,
    TP_F8_E5M2,
    TP_F8_E4M3,
    TP_F8_E8M0,
    TP_F8_E4M3FNUZ,
    TP_F8_E5M2FNUZ,
    TP_I16,
    TP_U16,
    TP_F16,
    TP_BF16,
    TP_I32,
    TP_U32,
    TP_F32,
    TP_C64,
    TP_F64,
    TP_I64,
    TP_U64,
    TP_DTYPE_COUNT
} tp_dtype;

TP_API int tp_dtype_bits(tp_dtype dtype);
/* Bytes of one element; 0 for types narrower than a byte. */
TP_API size_t tp_dtype_bytes(tp_dtype dtype);
/* "F32", "BF16", ... as safetensors spells them. */
TP_API const char *tp_dtype_name(tp_dtype dtype);
/* False if the name is unknown. */
TP_API bool tp_dtype_parse(const char *name, size_t n, tp_dtype *dtype);
/* F16, BF16, F32, F64: what tp_convert_to_f32 accepts. */
TP_API bool tp_dtype_is_float(tp_dtype dtype);

static inline float tp_f32_from_bits(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
static inline uint32_t tp_f32_bits(float f)
{
    uint32_t b;
    memcpy(&b, &f, 4);
    return b;
}
static inline float tp_bf16_to_f32(uint16_t h)
{
    return tp_f32_from_bits((uint32_t)h << 16);
}

/* Rounds to nearest even; a NaN keeps its upper bits and becomes quiet. */
static inline uint16_t tp_f32_to_bf16(float f)
{
    uint32_t b = tp_f32_bits(f);
    if ((b & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((b >> 16) | 64);
    return (uint16_t)((b + 0x7fffu + ((b >> 16) & 1)) >> 16);
}
TP_API float tp_f16_to_f32(uint16_t h);
TP_API uint16_t tp_f32_to_f16(float f); /* nearest even; overflow gives infinity */

/* n values at src (any alignment) of a float type to F32, and back with rounding to nearest even. */
TP_API void tp_convert_to_f32(tp_dtype from, const void *src, size_t n, float *dst);
TP_API void tp_convert_from_f32(tp_dtype to, const float *src, size_t n, void *dst);

#ifdef __cplusplus
}
#endif
#endif
