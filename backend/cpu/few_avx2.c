/* Few rows on AVX2: few_avx512.c's twin at half the width. 4 stored rows, in the order in which they lie, against one row of x
 * after the other; what is ahead of them is asked for while the first one is multiplied. */
#if defined(__x86_64__)

#include <immintrin.h>
#include <string.h>

#include "backend/cpu/matmul.h"

#define INLINE_AVX2 static inline __attribute__((always_inline)) TP_TARGET_AVX2

/* How far ahead, at least; and at least as far as the rows that are multiplied together reach. */
#define AHEAD_BYTES ((int64_t)4096)

/* What has been asked for, and where there is nothing more to ask for. */
typedef struct ahead {
    const unsigned char *at, *end;
} ahead;

INLINE_AVX2 void fetch(ahead *a, int64_t bytes)
{
    const unsigned char *to = a->end - a->at < bytes ? a->end : a->at + bytes;
    for (; a->at < to; a->at += 64) _mm_prefetch((const char *)a->at, _MM_HINT_T0);
}

INLINE_AVX2 __m256 load8(tp_format_id format, const unsigned char *p)
{
    if (format == TP_FORMAT_F32) return _mm256_loadu_ps((const float *)(const void *)p);
    __m128i h = _mm_loadu_si128((const __m128i *)(const void *)p);
    if (format == TP_FORMAT_F16) return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

INLINE_AVX2 float sum8(__m256 v)
{
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}

INLINE_AVX2 void dot_values(tp_format_id format, int nw, const tp_mm_right *b, const unsigned char *row, ahead *next,
                            const float *x, __m256 *s)
{
    const int64_t size = format == TP_FORMAT_F32 ? 4 : 2, whole = b->k / 16 * 16;
    __m256 t[4];
#pragma GCC unroll 4
    for (int w = 0; w < nw; w++) s[w] = t[w] = _mm256_setzero_ps();
    for (int64_t k = 0; k < whole; k += 16) {
        __m256 x0 = _mm256_loadu_ps(x + k), x1 = _mm256_loadu_ps(x + k + 8);
        fetch(next, nw * 16 * size);
#pragma GCC unroll 4
        for (int w = 0; w < nw; w++) {
            const unsigned char *p = row + w * b->row_bytes + k * size;
            s[w] = _mm256_fmadd_ps(load8(format, p), x0, s[w]);
            t[w] = _mm256_fmadd_ps(load8(format, p + 8 * size), x1, t[w]);
        }
    }
#pragma GCC unroll 4
    for (int w = 0; w < nw; w++) {
        s[w] = _mm256_add_ps(s[w], t[w]);
        if (whole == b->k) continue;
        float rest[16] = {0};
        tp_mm_decode(b, row + w * b->row_bytes, whole, b->k - whole, rest);
        s[w] = _mm256_fmadd_ps(_mm256_loadu_ps(rest), _mm256_loadu_ps(x + whole), s[w]);
        s[w] = _mm256_fmadd_ps(_mm256_loadu_ps(rest + 8), _mm256_loadu_ps(x + whole + 8), s[w]);
    }
}

/* 8 signed bytes as floats. */
INLINE_AVX2 __m256 codes8(const unsigned char *p)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p)));
}

INLINE_AVX2 float f16_at(const unsigned char *p)
{
    uint16_t h;
    memcpy(&h, p, 2);
    return _cvtsh_ss(h);
}

/* A block's scale leaves the sum: d * sum(q x), and for Q4_1 m * sum(x), whose sum stands behind x. */
INLINE_AVX2 void dot_blocks(tp_format_id format, int nw, const tp_mm_right *b, const unsigned char *row, ahead *next,
                            const float *x, __m256 *s)
{
    const int64_t bytes = format == TP_FORMAT_Q8_0 ? 34 : format == TP_FORMAT_Q4_0 ? 18 : 20, blocks = tp_mm_ceil(b->k, 32);
    const __m128i low = _mm_set1_epi8(15), eight = _mm_set1_epi8(format == TP_FORMAT_Q4_0 ? 8 : 0);
    const float *block_sums = x + blocks * 32;
#pragma GCC unroll 4
    for (int w = 0; w < nw; w++) s[w] = _mm256_setzero_ps();
    for (int64_t j = 0; j < blocks; j++) {
        const float *xj = x + j * 32;
        __m256 x0 = _mm256_loadu_ps(xj), x1 = _mm256_loadu_ps(xj + 8), x2 = _mm256_loadu_ps(xj + 16);
        __m256 x3 = _mm256_loadu_ps(xj + 24);
        fetch(next, nw * bytes);
#pragma GCC unroll 4
        for (int w = 0; w < nw; w++) {
            const unsigned char *p = row + w * b->row_bytes + j * bytes, *q = p + (format == TP_FORMAT_Q4_1 ? 4 : 2);
            unsigned char codes[32];
            if (format != TP_FORMAT_Q8_0) {
                __m128i pairs = _mm_loadu_si128((const __m128i *)(const void *)q);
                __m128i first = _mm_and_si128(pairs, low), second = _mm_and_si128(_mm_srli_epi16(pairs, 4), low);
                _mm_storeu_si128((__m128i *)(void *)codes, _mm_sub_epi8(first, eight));
                _mm_storeu_si128((__m128i *)(void *)(codes + 16), _mm_sub_epi8(second, eight));
                q = codes;
            }
            __m256 even = _mm256_mul_ps(codes8(q), x0), odd = _mm256_mul_ps(codes8(q + 8), x1);
            even = _mm256_fmadd_ps(codes8(q + 16), x2, even);
            odd = _mm256_fmadd_ps(codes8(q + 24), x3, odd);
            s[w] = _mm256_fmadd_ps(_mm256_set1_ps(f16_at(p)), _mm256_add_ps(even, odd), s[w]);
            if (format == TP_FORMAT_Q4_1) {
                __m256 offset = _mm256_castps128_ps256(_mm_set_ss(f16_at(p + 2) * block_sums[j]));
                s[w] = _mm256_add_ps(s[w], _mm256_insertf128_ps(offset, _mm_setzero_ps(), 1));
            }
        }
    }
}

INLINE_AVX2 void dot_rows(tp_format_id format, int nw, const tp_mm_right *b, const unsigned char *row, ahead *next,
                          const float *x, const int64_t *to, float *sums)
{
    __m256 s[4];
    if (format == TP_FORMAT_Q8_0 || format == TP_FORMAT_Q4_0 || format == TP_FORMAT_Q4_1)
        dot_blocks(format, nw, b, row, next, x, s);
    else
        dot_values(format, nw, b, row, next, x, s);
#pragma GCC unroll 4
    for (int w = 0; w < nw; w++) sums[to[w]] = sum8(s[w]);
}

/* The column, from `col` on, of the stored row `index` rows behind that of column `col`. */
INLINE_AVX2 int64_t column_of(const tp_mm_right *b, int64_t col, int64_t index)
{
    if (b->rope_pairs == 0) return index;
    int64_t hd = b->rope_pairs, head = (col + index) / hd * hd, in = col + index - head;
    return head + in / 2 + in % 2 * (hd / 2) - col;
}

INLINE_AVX2 void dot_of(tp_format_id format, const tp_mm_right *b, int64_t col, int64_t cols, int n, const float *x, int64_t ld,
                        float *sums, int64_t ld_sums)
{
    const unsigned char *row = b->data + col * b->row_bytes;
    ahead next = {row, b->data + b->m * b->row_bytes}, nothing = {NULL, NULL};
    int64_t to[4], c = 0, group = 4 * b->row_bytes;
    fetch(&next, group > AHEAD_BYTES ? group : AHEAD_BYTES);
    for (; c + 4 <= cols; c += 4, row += group) {
        for (int w = 0; w < 4; w++) to[w] = column_of(b, col, c + w);
        for (int i = 0; i < n; i++) dot_rows(format, 4, b, row, i == 0 ? &next : &nothing, x + i * ld, to, sums + i * ld_sums);
    }
    for (; c < cols; c++, row += b->row_bytes) {
        to[0] = column_of(b, col, c);
        for (int i = 0; i < n; i++) dot_rows(format, 1, b, row, &nothing, x + i * ld, to, sums + i * ld_sums);
    }
}

TP_TARGET_AVX2 void tp_mm_avx2_dot(const tp_mm_right *b, int64_t col, int64_t cols, int n, const float *x, int64_t ld,
                                   float *sums, int64_t ld_sums)
{
    switch (b->format) {
    case TP_FORMAT_F32: dot_of(TP_FORMAT_F32, b, col, cols, n, x, ld, sums, ld_sums); break;
    case TP_FORMAT_BF16: dot_of(TP_FORMAT_BF16, b, col, cols, n, x, ld, sums, ld_sums); break;
    case TP_FORMAT_F16: dot_of(TP_FORMAT_F16, b, col, cols, n, x, ld, sums, ld_sums); break;
    case TP_FORMAT_Q8_0: dot_of(TP_FORMAT_Q8_0, b, col, cols, n, x, ld, sums, ld_sums); break;
    case TP_FORMAT_Q4_0: dot_of(TP_FORMAT_Q4_0, b, col, cols, n, x, ld, sums, ld_sums); break;
    case TP_FORMAT_Q4_1: dot_of(TP_FORMAT_Q4_1, b, col, cols, n, x, ld, sums, ld_sums); break;
    default: break;
    }
}

#else
typedef int tp_few_avx2_is_for_x86;
#endif
