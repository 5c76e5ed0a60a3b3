/* Loads and transpositions that the AVX-512 products share. Included only by files that are compiled for x86-64. */
#ifndef TP_BACKEND_CPU_AVX512_H
#define TP_BACKEND_CPU_AVX512_H

#include <immintrin.h>

#include "backend/cpu/matmul.h"

#define TP_INLINE_AVX512 static inline __attribute__((always_inline)) TP_TARGET_AVX512

/* Lanes below n, for any n. */
static inline uint32_t tp_lanes(int64_t n)
{
    return n >= 32 ? 0xffffffffu : n <= 0 ? 0 : (1u << n) - 1;
}

TP_INLINE_AVX512 __m512 tp_widen_bf16(__m256i h)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

/* Bits of x rounded to bf16 (nearest even; a NaN becomes quiet) in the upper halves, zeros below. */
TP_INLINE_AVX512 __m512i tp_round_bf16(__m512 x)
{
    __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_and_si512(rounded, _mm512_set1_epi32((int)0xffff0000));
}

TP_INLINE_AVX512 __m256i tp_narrow_bf16(__m512 x)
{
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(tp_round_bf16(x), 16));
}

TP_INLINE_AVX512 float tp_f16_at(const unsigned char *p)
{
    uint16_t h;
    memcpy(&h, p, 2);
    return _cvtsh_ss(h);
}

/* Values k .. k+16 of a stored row, k a multiple of 16; lanes outside of `mask` are zero and, in dense formats, not read. */
TP_INLINE_AVX512 __m512 tp_load16(tp_format_id format, const unsigned char *row, int64_t k, __mmask16 mask)
{
    switch (format) {
    case TP_FORMAT_F32: return _mm512_maskz_loadu_ps(mask, row + 4 * k);
    case TP_FORMAT_BF16: return tp_widen_bf16(_mm256_maskz_loadu_epi16(mask, row + 2 * k));
    case TP_FORMAT_F16: return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, row + 2 * k));
    case TP_FORMAT_Q8_0: {
        const unsigned char *block = row + k / 32 * 34;
        __m128i q = _mm_loadu_si128((const __m128i *)(const void *)(block + 2 + k % 32));
        return _mm512_maskz_mul_ps(mask, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q)), _mm512_set1_ps(tp_f16_at(block)));
    }
    case TP_FORMAT_Q4_0: {
        const unsigned char *block = row + k / 32 * 18;
        __m512i q = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)(block + 2)));
        q = k % 32 != 0 ? _mm512_srli_epi32(q, 4) : _mm512_and_si512(q, _mm512_set1_epi32(15));
        q = _mm512_sub_epi32(q, _mm512_set1_epi32(8));
        return _mm512_maskz_mul_ps(mask, _mm512_cvtepi32_ps(q), _mm512_set1_ps(tp_f16_at(block)));
    }
    case TP_FORMAT_Q4_1: {
        const unsigned char *block = row + k / 32 * 20;
        __m512i q = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)(block + 4)));
        q = k % 32 != 0 ? _mm512_srli_epi32(q, 4) : _mm512_and_si512(q, _mm512_set1_epi32(15));
        __m512 d = _mm512_set1_ps(tp_f16_at(block)), m = _mm512_set1_ps(tp_f16_at(block + 2));
        return _mm512_maskz_fmadd_ps(mask, _mm512_cvtepi32_ps(q), d, m);
    }
    default: return _mm512_setzero_ps();
    }
}

/* The same, rounded to bf16 if `round` is set. */
TP_INLINE_AVX512 __m512 tp_load16_rounded(tp_format_id format, bool round, const unsigned char *row, int64_t k, __mmask16 mask)
{
    __m512 x = tp_load16(format, row, k, mask);
    return round ? _mm512_castsi512_ps(tp_round_bf16(x)) : x;
}

/* 16 values of an activation row. */
TP_INLINE_AVX512 __m512 tp_load16_rows(tp_dtype dtype, const void *data, int64_t i, __mmask16 mask)
{
    if (dtype == TP_BF16) return tp_widen_bf16(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)data + i));
    return _mm512_maskz_loadu_ps(mask, (const float *)data + i);
}

/* 16 x 16 words: r[i] lane j becomes r[j] lane i. Pairs, quads, then 128-bit lanes twice. */
TP_INLINE_AVX512 void tp_transpose16(__m512i r[16])
{
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    /* r[4q + c], lane group l: column 4l + c of rows 4q .. 4q+3 */
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        t[c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
        t[4 + c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
        t[8 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        t[12 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        r[c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0x88);
        r[8 + c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0xdd);
        r[4 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0x88);
        r[12 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0xdd);
    }
}

/* Stored rows in logical order, one after the other, without a division per row. */
typedef struct tp_row_walk {
    const unsigned char *head;
    int64_t row_bytes, head_dim, in;
} tp_row_walk;

static inline tp_row_walk tp_walk_from(const tp_mm_right *b, int64_t index)
{
    int64_t hd = b->rope_pairs > 0 ? b->rope_pairs : INT64_MAX;
    return (tp_row_walk){b->data + index / hd * hd * b->row_bytes, b->row_bytes, hd, index % hd};
}

static inline const unsigned char *tp_walk_next(tp_row_walk *w)
{
    int64_t half = w->head_dim / 2, in = w->in++;
    if (w->head_dim == INT64_MAX) return w->head + in * w->row_bytes;
    const unsigned char *row = w->head + (in < half ? 2 * in : 2 * (in - half) + 1) * w->row_bytes;
    if (w->in == w->head_dim) {
        w->head += w->head_dim * w->row_bytes;
        w->in = 0;
    }
    return row;
}

#endif
