/* The loops run over chunks of fixed length, which compilers turn into vector code; the place of a hit is looked for afterwards. */
#include "models/scan.h"

#include <string.h>

#define CHUNK 512

/* ---- NaN and infinities ---- */

/* All bits of the exponent set. */
static bool bad32(uint32_t bits) { return (bits & 0x7f800000u) == 0x7f800000u; }
static bool bad_bf16(uint16_t bits) { return (bits & 0x7f80u) == 0x7f80u; }
static bool bad_f16(uint16_t bits) { return (bits & 0x7c00u) == 0x7c00u; }

static bool chunk_has_bad32(const unsigned char *p)
{
    uint32_t values[CHUNK], bad = 0;
    memcpy(values, p, sizeof values);
    for (int i = 0; i < CHUNK; i++) bad |= (uint32_t)((values[i] & 0x7f800000u) == 0x7f800000u);
    return bad != 0;
}

static bool chunk_has_bad16(const unsigned char *p, uint16_t exponent)
{
    uint16_t values[CHUNK], bad = 0;
    memcpy(values, p, sizeof values);
    for (int i = 0; i < CHUNK; i++) bad |= (uint16_t)((values[i] & exponent) == exponent);
    return bad != 0;
}

static int64_t scan32(const unsigned char *p, size_t n)
{
    size_t i = 0;
    while (n - i >= CHUNK && !chunk_has_bad32(p + 4 * i)) i += CHUNK;
    for (; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, p + 4 * i, 4);
        if (bad32(bits)) return (int64_t)i;
    }
    return -1;
}

static int64_t scan16(const unsigned char *p, size_t n, uint16_t exponent)
{
    size_t i = 0;
    while (n - i >= CHUNK && !chunk_has_bad16(p + 2 * i, exponent)) i += CHUNK;
    for (; i < n; i++) {
        uint16_t bits;
        memcpy(&bits, p + 2 * i, 2);
        if (exponent == 0x7c00u ? bad_f16(bits) : bad_bf16(bits)) return (int64_t)i;
    }
    return -1;
}

/* Codes are always finite: only the f16 factors at the head of a block can be bad. */
static int64_t scan_blocks(const unsigned char *p, size_t n, size_t block_bytes, int factors)
{
    for (size_t i = 0; i < n; i++) {
        uint16_t bits[2] = {0, 0};
        memcpy(bits, p + i * block_bytes, (size_t)factors * 2);
        if (bad_f16(bits[0]) || bad_f16(bits[1])) return (int64_t)i;
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
static uint16_t narrow(uint32_t bits)
{
    uint32_t nan = (uint32_t)0 - (uint32_t)((bits & 0x7fffffffu) > 0x7f800000u);
    uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1);
    return (uint16_t)(((rounded & ~nan) | ((bits | 0x400000u) & nan)) >> 16);
}

/* Exact: f16's exponent is moved by a product with 2^112, which also normalises subnormals. */
static uint32_t widen_f16(uint16_t h)
{
    uint32_t magnitude = (uint32_t)(h & 0x7fffu) << 13, special = (uint32_t)0 - (uint32_t)((h & 0x7c00u) == 0x7c00u);
    uint32_t bits = tp_f32_bits(tp_f32_from_bits(magnitude) * 0x1p112f);
    return bits | (special & 0x7f800000u) | (uint32_t)(h & 0x8000u) << 16;
}

static void narrow_f32_chunk(const unsigned char *p, uint16_t *out)
{
    uint32_t in[CHUNK];
    uint16_t values[CHUNK];
    memcpy(in, p, sizeof in);
    for (int i = 0; i < CHUNK; i++) values[i] = narrow(in[i]);
    memcpy(out, values, sizeof values);
}

static void narrow_f16_chunk(const unsigned char *p, uint16_t *out)
{
    uint16_t in[CHUNK], values[CHUNK];
    memcpy(in, p, sizeof in);
    for (int i = 0; i < CHUNK; i++) values[i] = narrow(widen_f16(in[i]));
    memcpy(out, values, sizeof values);
}

void tp_narrow_to_bf16(tp_format_id from, const void *data, size_t n, uint16_t *out)
{
    const unsigned char *p = data;
    size_t i = 0, size = from == TP_FORMAT_F32 ? 4 : 2;
    for (; n - i >= CHUNK; i += CHUNK) {
        if (from == TP_FORMAT_F32) narrow_f32_chunk(p + size * i, out + i);
        else narrow_f16_chunk(p + size * i, out + i);
    }
    for (; i < n; i++) {
        uint32_t bits = 0;
        memcpy(&bits, p + size * i, size);
        out[i] = narrow(from == TP_FORMAT_F32 ? bits : widen_f16((uint16_t)bits));
    }
}
