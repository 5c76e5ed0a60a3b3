/* Dense formats: a row is its values, little endian, one after the other. */
#include "base/dtype.h"
#include "quant/decode.h"

void tp_decode_f32(const void *row, int64_t first, int64_t n, float *out)
{
    tp_convert_to_f32(TP_F32, (const unsigned char *)row + 4 * first, (size_t)n, out);
}

void tp_decode_bf16(const void *row, int64_t first, int64_t n, float *out)
{
    tp_convert_to_f32(TP_BF16, (const unsigned char *)row + 2 * first, (size_t)n, out);
}

void tp_decode_f16(const void *row, int64_t first, int64_t n, float *out)
{
    tp_convert_to_f32(TP_F16, (const unsigned char *)row + 2 * first, (size_t)n, out);
}
