/* Few rows on AVX-512: 1 to 7 rows of x against weights that stream through once. */
#if defined(__x86_64__)

#include "backend/cpu/avx512.h"
#include "backend/cpu/matmul_avx512.h"

/* `nw` stored rows against n rows of x. Each of the n * nw sums is one register, 16 partial sums by k mod 16, added up in
 * a fixed tree at the end. */
TP_INLINE_AVX512 void dot_values(tp_format_id format, bool round, int nw, int n, const unsigned char *const *rows, int64_t k,
                                 const float *x, int64_t ld, float *sums, int64_t ld_sums)
{
    __m512 s[16];
#pragma GCC unroll 16
    for (int i = 0; i < nw * n; i++) s[i] = _mm512_setzero_ps();
    int64_t whole = k / 32 * 32;
    for (int64_t j = 0; j < whole; j += 32) {
#pragma GCC unroll 8
        for (int w = 0; w < nw; w++) {
            __m512 lo = tp_load16_rounded(format, round, rows[w], j, 0xffff);
            __m512 hi = tp_load16_rounded(format, round, rows[w], j + 16, 0xffff);
#pragma GCC unroll 7
            for (int i = 0; i < n; i++) {
                s[w * n + i] = _mm512_fmadd_ps(lo, _mm512_loadu_ps(x + i * ld + j), s[w * n + i]);
                s[w * n + i] = _mm512_fmadd_ps(hi, _mm512_loadu_ps(x + i * ld + j + 16), s[w * n + i]);
            }
        }
    }
    for (int64_t j = whole; j < k; j += 16) {
        __mmask16 mask = (__mmask16)tp_lanes(k - j);
#pragma GCC unroll 8
        for (int w = 0; w < nw; w++) {
            __m512 v = tp_load16_rounded(format, round, rows[w], j, mask);
#pragma GCC unroll 7
            for (int i = 0; i < n; i++) s[w * n + i] = _mm512_fmadd_ps(v, _mm512_loadu_ps(x + i * ld + j), s[w * n + i]);
        }
    }
#pragma GCC unroll 8
    for (int w = 0; w < nw; w++) {
#pragma GCC unroll 7
        for (int i = 0; i < n; i++) sums[i * ld_sums + w] = _mm512_reduce_add_ps(s[w * n + i]);
    }
}

/* The same for formats in blocks. A block's scale leaves the sum: d * sum(q x), and for Q4_1 m * sum(x), whose sum stands
 * behind x. Scales are converted for 16 blocks at once. So a value costs a conversion, or a look-up of its 4-bit code in a
 * register, and an FMA. (The look-up itself ignores the upper bits of an index.) */
TP_INLINE_AVX512 void dot_blocks(tp_format_id format, int nw, int n, const unsigned char *const *rows, int64_t k,
                                 const float *x, int64_t ld, float *sums, int64_t ld_sums)
{
    const int64_t bytes = format == TP_FORMAT_Q8_0 ? 34 : format == TP_FORMAT_Q4_0 ? 18 : 20, blocks = (k + 31) / 32;
    const __m512 zero = _mm512_set1_ps(format == TP_FORMAT_Q4_0 ? -8.0f : 0.0f);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 codes = _mm512_add_ps(zero, _mm512_cvtepi32_ps(lanes));
    const __m512i offsets = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)bytes));
    __m512 s[16];
#pragma GCC unroll 16
    for (int i = 0; i < nw * n; i++) s[i] = _mm512_setzero_ps();
    for (int64_t b0 = 0; b0 < blocks; b0 += 16) {
        float d[8][16] __attribute__((aligned(64)));
        int64_t count = blocks - b0 < 16 ? blocks - b0 : 16;
        __mmask16 mask = (__mmask16)tp_lanes(count);
#pragma GCC unroll 8
        for (int w = 0; w < nw; w++) {
            __m512i heads = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, offsets, rows[w] + b0 * bytes, 1);
            _mm512_store_ps(d[w], _mm512_cvtph_ps(_mm512_cvtepi32_epi16(heads)));
            if (format == TP_FORMAT_Q4_1) {
                __m512 m = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(heads, 16)));
#pragma GCC unroll 4
                for (int i = 0; i < n; i++)
                    s[w * n + i] = _mm512_fmadd_ps(m, _mm512_loadu_ps(x + i * ld + blocks * 32 + b0), s[w * n + i]);
            }
        }
        for (int64_t j = 0; j < count; j++) {
            const float *xj = x + (b0 + j) * 32;
            int64_t at = (b0 + j) * bytes;
#pragma GCC unroll 8
            for (int w = 0; w < nw; w++) {
                const unsigned char *q = rows[w] + at + (format == TP_FORMAT_Q4_1 ? 4 : 2);
                __m128i low = _mm_loadu_si128((const __m128i *)(const void *)q);
                __m512 lo, hi, scale = _mm512_set1_ps(d[w][j]);
                if (format == TP_FORMAT_Q8_0) {
                    lo = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(low));
                    hi = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)(q + 16))));
                } else {
                    __m512i pairs = _mm512_cvtepu8_epi32(low);
                    lo = _mm512_permutexvar_ps(pairs, codes);
                    hi = _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), codes);
                }
#pragma GCC unroll 4
                for (int i = 0; i < n; i++) {
                    __m512 product = _mm512_mul_ps(lo, _mm512_loadu_ps(xj + i * ld));
                    product = _mm512_fmadd_ps(hi, _mm512_loadu_ps(xj + i * ld + 16), product);
                    s[w * n + i] = _mm512_fmadd_ps(scale, product, s[w * n + i]);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int w = 0; w < nw; w++) {
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) sums[i * ld_sums + w] = _mm512_reduce_add_ps(s[w * n + i]);
    }
}

TP_INLINE_AVX512 void dot_rows(tp_format_id format, bool round, int nw, int n, const unsigned char *const *rows, int64_t k,
                               const float *x, int64_t ld, float *sums, int64_t ld_sums)
{
    bool blocks = format == TP_FORMAT_Q8_0 || format == TP_FORMAT_Q4_0 || format == TP_FORMAT_Q4_1;
    if (blocks && !round)
        dot_blocks(format, nw, n, rows, k, x, ld, sums, ld_sums);
    else
        dot_values(format, round, nw, n, rows, k, x, ld, sums, ld_sums);
}

/* All columns of an item: 8 stored rows at a time against one row of x; 4 against up to four rows of x, and once more,
 * from cache, against the rest; what is left over one at a time. */
TP_INLINE_AVX512 void dot_of(tp_format_id format, bool round, const tp_mm_right *b, int64_t col, int64_t cols, int n,
                             const float *x, int64_t ld, float *sums, int64_t ld_sums)
{
    tp_row_walk walk = tp_walk_from(b, col);
    const unsigned char *rows[8];
    int64_t c = 0, nw = n == 1 ? 8 : 4;
    for (; c + nw <= cols; c += nw) {
        for (int w = 0; w < nw; w++) rows[w] = tp_walk_next(&walk);
        for (int i = 0; i < n; i += 4) {
            const float *from = x + i * ld;
            float *to = sums + i * ld_sums + c;
            if (n == 1)
                dot_rows(format, round, 8, 1, rows, b->k, from, ld, to, ld_sums);
            else if (n - i == 1)
                dot_rows(format, round, 4, 1, rows, b->k, from, ld, to, ld_sums);
            else if (n - i == 2)
                dot_rows(format, round, 4, 2, rows, b->k, from, ld, to, ld_sums);
            else if (n - i == 3)
                dot_rows(format, round, 4, 3, rows, b->k, from, ld, to, ld_sums);
            else
                dot_rows(format, round, 4, 4, rows, b->k, from, ld, to, ld_sums);
        }
    }
    for (; c < cols; c++) {
        rows[0] = tp_walk_next(&walk);
        for (int i = 0; i < n; i++) dot_rows(format, round, 1, 1, rows, b->k, x + i * ld, ld, sums + i * ld_sums + c, ld_sums);
    }
}

#define DOT(format, round)                                                                                                     \
    dot_of(format, round, b, col, cols, n, x, ld, sums, ld_sums);                                                              \
    break

TP_TARGET_AVX512 void tp_mm_avx512_dot(const tp_mm_right *b, int64_t col, int64_t cols, int n, const float *x, int64_t ld,
                                       float *sums, int64_t ld_sums)
{
    /* Rounding is rare: one copy of the code that looks at the format again and again will do. */
    switch (b->round_bf16 ? TP_FORMAT_COUNT : b->format) {
    case TP_FORMAT_BF16: DOT(TP_FORMAT_BF16, false);
    case TP_FORMAT_F32: DOT(TP_FORMAT_F32, false);
    case TP_FORMAT_F16: DOT(TP_FORMAT_F16, false);
    case TP_FORMAT_Q8_0: DOT(TP_FORMAT_Q8_0, false);
    case TP_FORMAT_Q4_0: DOT(TP_FORMAT_Q4_0, false);
    case TP_FORMAT_Q4_1: DOT(TP_FORMAT_Q4_1, false);
    default: DOT(b->format, true);
    }
}

/* sums [n][cols] += x[:, k .. k+nw] times nw stored rows. The sums stay in L1 while rows pass. */
TP_INLINE_AVX512 void add_rows(tp_format_id format, bool round, int nw, int n, const unsigned char *const *rows, int64_t col,
                               int64_t cols, const float *x, int64_t ld, float *sums, int64_t ld_sums)
{
    for (int64_t j = 0; j < cols; j += 16) {
        __mmask16 mask = (__mmask16)tp_lanes(cols - j);
        __m512 v[8];
#pragma GCC unroll 8
        for (int w = 0; w < nw; w++) v[w] = tp_load16_rounded(format, round, rows[w], col + j, mask);
        for (int i = 0; i < n; i++) {
            float *o = sums + i * ld_sums + j;
            __m512 s = _mm512_maskz_loadu_ps(mask, o);
#pragma GCC unroll 8
            for (int w = 0; w < nw; w++) s = _mm512_fmadd_ps(_mm512_set1_ps(x[i * ld + w]), v[w], s);
            _mm512_mask_storeu_ps(o, mask, s);
        }
    }
}

TP_INLINE_AVX512 void axpy_of(tp_format_id format, bool round, const tp_mm_right *b, int64_t col, int64_t cols, int n,
                              const float *x, int64_t ld, float *sums, int64_t ld_sums)
{
    enum { NW = 8 };
    tp_row_walk walk = tp_walk_from(b, 0);
    const unsigned char *rows[NW];
    for (int i = 0; i < n; i++) memset(sums + i * ld_sums, 0, (size_t)cols * sizeof *sums);
    int64_t k = 0;
    for (; k + NW <= b->k; k += NW) {
        for (int w = 0; w < NW; w++) rows[w] = tp_walk_next(&walk);
        add_rows(format, round, NW, n, rows, col, cols, x + k, ld, sums, ld_sums);
    }
    for (; k < b->k; k++) {
        rows[0] = tp_walk_next(&walk);
        add_rows(format, round, 1, n, rows, col, cols, x + k, ld, sums, ld_sums);
    }
}

#define AXPY(format, round)                                                                                                    \
    axpy_of(format, round, b, col, cols, n, x, ld, sums, ld_sums);                                                             \
    break

TP_TARGET_AVX512 void tp_mm_avx512_axpy(const tp_mm_right *b, int64_t col, int64_t cols, int n, const float *x, int64_t ld,
                                        float *sums, int64_t ld_sums)
{
    /* Rounding is rare: one copy of the code that looks at the format again and again will do. */
    switch (b->round_bf16 ? TP_FORMAT_COUNT : b->format) {
    case TP_FORMAT_BF16: AXPY(TP_FORMAT_BF16, false);
    case TP_FORMAT_F32: AXPY(TP_FORMAT_F32, false);
    case TP_FORMAT_F16: AXPY(TP_FORMAT_F16, false);
    case TP_FORMAT_Q8_0: AXPY(TP_FORMAT_Q8_0, false);
    case TP_FORMAT_Q4_0: AXPY(TP_FORMAT_Q4_0, false);
    case TP_FORMAT_Q4_1: AXPY(TP_FORMAT_Q4_1, false);
    default: AXPY(b->format, true);
    }
}

#else
typedef int tp_few_avx512_is_for_x86;
#endif
