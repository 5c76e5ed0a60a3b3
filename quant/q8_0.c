/* Q8_0: 32 values in 34 bytes, a scale d (f16) and 32 signed bytes; value j is q[j] * d. The product is exact in f32. */
#include "base/dtype.h"
#include "quant/decode.h"

enum { BLOCK = 32, BLOCK_BYTES = 34 };

void tp_decode_q8_0(const void *row, int64_t first, int64_t n, float *out)
{
    const unsigned char *block = (const unsigned char *)row + first / BLOCK * BLOCK_BYTES;
    for (int64_t i = 0; i < n; i += BLOCK, block += BLOCK_BYTES, out += BLOCK) {
        float d = tp_f16_to_f32((uint16_t)(block[0] | block[1] << 8));
        for (int j = 0; j < BLOCK; j++) out[j] = (float)(int8_t)block[2 + j] * d;
    }
}
