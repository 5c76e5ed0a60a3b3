/* Q4_0 and Q4_1: 32 values as 4-bit codes in 16 bytes; byte j holds value j in its low half and value j + 16 in its high
 * half. Q4_0 has a scale d (f16) and value (q - 8) * d; Q4_1 has d and a minimum m and value q * d + m. The product is
 * exact in f32, so the sum is rounded once, with or without a fused multiply-add. */
#include "base/dtype.h"
#include "quant/decode.h"

enum { BLOCK = 32, HALF = 16 };

static float f16_at(const unsigned char *p)
{
    return tp_f16_to_f32((uint16_t)(p[0] | p[1] << 8));
}

void tp_decode_q4_0(const void *row, int64_t first, int64_t n, float *out)
{
    enum { BLOCK_BYTES = 18 };
    const unsigned char *block = (const unsigned char *)row + first / BLOCK * BLOCK_BYTES;
    for (int64_t i = 0; i < n; i += BLOCK, block += BLOCK_BYTES, out += BLOCK) {
        float d = f16_at(block);
        for (int j = 0; j < HALF; j++) {
            out[j] = (float)((block[2 + j] & 15) - 8) * d;
            out[HALF + j] = (float)((block[2 + j] >> 4) - 8) * d;
        }
    }
}

void tp_decode_q4_1(const void *row, int64_t first, int64_t n, float *out)
{
    enum { BLOCK_BYTES = 20 };
    const unsigned char *block = (const unsigned char *)row + first / BLOCK * BLOCK_BYTES;
    for (int64_t i = 0; i < n; i += BLOCK, block += BLOCK_BYTES, out += BLOCK) {
        float d = f16_at(block), m = f16_at(block + 2);
        for (int j = 0; j < HALF; j++) {
            out[j] = (float)(block[4 + j] & 15) * d + m;
            out[HALF + j] = (float)(block[4 + j] >> 4) * d + m;
        }
    }
}
