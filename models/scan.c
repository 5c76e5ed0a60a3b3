/* The loops run over chunks of fixed length, which compilers turn into vector code; the place of a hit is looked for
 * afterwards. */
#include "models/scan.h"

#include "models/twice.h"

#define CHUNK 512

/* Files put tensors at any address. */
typedef uint32_t unaligned32 __attribute__((aligned(1), may_alias));
typedef uint16_t unaligned16 __attribute__((aligned(1), may_alias));

/* ---- NaN and infinities: all bits of the exponent are set ---- */

TP_INLINE size_t finite_chunks32_body(const unaligned32 *p, size_t n)
{
    size_t i = 0;
    for (; n - i >= CHUNK; i += CHUNK) {
        uint32_t bad = 0;
        for (size_t k = 0; k < CHUNK; k++) bad |= (uint32_t)((p[i + k] & 0x7f800000u) == 0x7f800000u);
        if (bad != 0) break;
    }
    return i;
}

TP_INLINE size_t finite_chunks16_body(const unaligned16 *p, size_t n, uint16_t exponent)
{
    size_t i = 0;
    for (; n - i >= CHUNK; i += CHUNK) {
        uint16_t bad = 0;
        for (size_t k = 0; k < CHUNK; k++) bad |= (uint16_t)((p[i + k] & exponent) == exponent);
        if (bad != 0) break;
    }
    return i;
}

/* Values at the front that are finite, in whole chunks. */
TP_TWICE(size_t, finite_chunks32, (const unaligned32 *p, size_t n), (p, n))
TP_TWICE(size_t, finite_chunks16, (const unaligned16 *p, size_t n, uint16_t exponent), (p, n, exponent))

static int64_t scan32(const unaligned32 *p, size_t n)
{
    for (size_t i = finite_chunks32(p, n); i < n; i++)
        if ((p[i] & 0x7f800000u) == 0x7f800000u) return (int64_t)i;
    return -1;
}

static int64_t scan16(const unaligned16 *p, size_t n, uint16_t exponent)
{
    for (size_t i = finite_chunks16(p, n, exponent); i < n; i++)
        if ((p[i] & exponent) == exponent) return (int64_t)i;
    return -1;
}

/* Codes are always finite: only the f16 factors at the head of a block can be bad. */
static int64_t scan_blocks(const unsigned char *p, size_t n, size_t block_bytes, int factors)
{
    for (size_t i = 0; i < n; i++) {
        const unaligned16 *factor = (const void *)(p + i * block_bytes);
        if ((factor[0] & 0x7c00u) == 0x7c00u || (factors == 2 && (factor[1] & 0x7c00u) == 0x7c00u)) return (int64_t)i;
    }
    return -1;
}

int64_t tp_scan_finite(tp_format_id format, const void *data, size_t bytes)
{
    size_t block = (size_t)tp_formats[format].block_bytes, n = bytes / block;
    switch (format) {
    case TP_FORMAT_F32: return scan32(data, n);
    case TP_FORMAT_BF16: return scan16(data, n, 0x7f80u);
    case TP_FORMAT_F16: return scan16(data, n, 0x7c00u);
    case TP_FORMAT_Q8_0:
    case TP_FORMAT_Q4_0: return scan_blocks(data, n, block, 1);
    case TP_FORMAT_Q4_1: return scan_blocks(data, n, block, 2);
    case TP_FORMAT_COUNT: break;
    }
    return -1;
}

/* ---- to bf16 ---- */

/* tp_f32_to_bf16 without a branch. */
TP_INLINE uint16_t narrow(uint32_t bits)
{
    uint32_t nan = (uint32_t)0 - (uint32_t)((bits & 0x7fffffffu) > 0x7f800000u);
    uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1);
    return (uint16_t)(((rounded & ~nan) | ((bits | 0x400000u) & nan)) >> 16);
}

/* Exact: f16's exponent is moved by a product with 2^112, which also normalises subnormals. */
TP_INLINE uint32_t widen_f16(uint16_t h)
{
    uint32_t magnitude = (uint32_t)(h & 0x7fffu) << 13, special = (uint32_t)0 - (uint32_t)((h & 0x7c00u) == 0x7c00u);
    uint32_t bits = tp_f32_bits(tp_f32_from_bits(magnitude) * 0x1p112f);
    return bits | (special & 0x7f800000u) | (uint32_t)(h & 0x8000u) << 16;
}

TP_INLINE uint16_t narrow_half(uint16_t h)
{
    return narrow(widen_f16(h));
}

/* name converts in whole chunks, each value by turn, and returns how many values that were. */
#define NARROW_CHUNKS(name, type, turn)                                                                                        \
    TP_INLINE size_t name##_body(const type *restrict p, size_t n, uint16_t *restrict out)                                     \
    {                                                                                                                          \
        size_t i = 0;                                                                                                          \
        for (; n - i >= CHUNK; i += CHUNK)                                                                                     \
            for (size_t k = 0; k < CHUNK; k++) out[i + k] = turn(p[i + k]);                                                    \
        return i;                                                                                                              \
    }                                                                                                                          \
    TP_TWICE(size_t, name, (const type *restrict p, size_t n, uint16_t *restrict out), (p, n, out))

NARROW_CHUNKS(narrow_f32_chunks, unaligned32, narrow)
NARROW_CHUNKS(narrow_f16_chunks, unaligned16, narrow_half)

void tp_narrow_to_bf16(tp_format_id from, const void *data, size_t n, uint16_t *out)
{
    const unaligned32 *wide = data;
    const unaligned16 *half = data;
    if (from == TP_FORMAT_F32)
        for (size_t i = narrow_f32_chunks(wide, n, out); i < n; i++) out[i] = narrow(wide[i]);
    else
        for (size_t i = narrow_f16_chunks(half, n, out); i < n; i++) out[i] = narrow_half(half[i]);
}

/* ---- to f16 ---- */

/* tp_f32_to_f16 without a branch: of the three ways to look at the bits, masks take the one that is right. */
TP_INLINE uint16_t narrow_f16(uint32_t bits)
{
    uint32_t a = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
    uint32_t normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1)) >> 13;
    uint32_t tiny = tp_f32_bits(tp_f32_from_bits(a) + 0.5f) - 0x3f000000u; /* the sum's last bit is that of f16's subnormals */
    uint32_t nan = (uint32_t)0 - (uint32_t)(a > 0x7f800000u), special = 0x7c00u | (nan & (0x200u | (a >> 13 & 0x3ffu)));
    uint32_t is_tiny = (uint32_t)0 - (uint32_t)(a < 0x38800000u), is_special = (uint32_t)0 - (uint32_t)(a >= 0x477ff000u);
    return (uint16_t)(sign | (special & is_special) | (tiny & is_tiny) | (normal & ~is_special & ~is_tiny));
}

TP_INLINE uint16_t f16_of_bf16(uint16_t h)
{
    return narrow_f16((uint32_t)h << 16);
}

NARROW_CHUNKS(f16_of_f32_chunks, unaligned32, narrow_f16)
NARROW_CHUNKS(f16_of_bf16_chunks, unaligned16, f16_of_bf16)

void tp_narrow_to_f16(tp_format_id from, const void *data, size_t n, uint16_t *out)
{
    const unaligned32 *wide = data;
    const unaligned16 *half = data;
    if (from == TP_FORMAT_F32)
        for (size_t i = f16_of_f32_chunks(wide, n, out); i < n; i++) out[i] = narrow_f16(wide[i]);
    else
        for (size_t i = f16_of_bf16_chunks(half, n, out); i < n; i++) out[i] = f16_of_bf16(half[i]);
}
