/* Decoders of the formats in tp_formats, for that table: values first .. first+n of one stored row become floats. first and
 * n are multiples of the format's block. Rows may lie at any address; every bit pattern is defined. */
#ifndef TP_QUANT_DECODE_H
#define TP_QUANT_DECODE_H

#include <stdint.h>

void tp_decode_f32(const void *row, int64_t first, int64_t n, float *out);
void tp_decode_bf16(const void *row, int64_t first, int64_t n, float *out);
void tp_decode_f16(const void *row, int64_t first, int64_t n, float *out);
void tp_decode_q8_0(const void *row, int64_t first, int64_t n, float *out);
void tp_decode_q4_0(const void *row, int64_t first, int64_t n, float *out);
void tp_decode_q4_1(const void *row, int64_t first, int64_t n, float *out);

#endif
