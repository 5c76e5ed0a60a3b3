/* Few rows on AVX-512: 1 to 7 rows of x against weights that stream through once. */
#if defined(__x86_64__)

#include "backend/cpu/avx512.h"
#include "backend/cpu/matmul_avx512.h"

/* Bytes that a stored row is prefetched ahead: the hardware stops at page ends. */
#define AHEAD 1024

/* `nw` stored rows against n rows of x. Each of the n * nw sums is one register, 16 partial sums by k mod 16, added up in
 * a fixed tree at the end. */
TP_INLINE_AVX512 void dot_rows(tp_format_id format, bool round, int nw, int n, const unsigned char *const *rows, int64_t k,
                               const float *x, int64_t ld, float *sums, int64_t ld_sums)
{
    __m512 s[28];
#pragma GCC unroll 28
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

/* All columns of an item, `nw` stored rows at a time, then one at a time. */
TP_INLINE_AVX512 void dot_of(tp_format_id format, bool round, int nw, int n, const tp_mm_right *b, int64_t col, int64_t cols,
                             const float *x, int64_t ld, float *sums, int64_t ld_sums)
{
    tp_row_walk walk = tp_walk_from(b, col);
    const unsigned char *rows[8];
    int64_t c = 0;
    for (; c + nw <= cols; c += nw) {
        for (int w = 0; w < nw; w++) rows[w] = tp_walk_next(&walk);
        dot_rows(format, round, nw, n, rows, b->k, x, ld, sums + c, ld_sums);
    }
    for (; c < cols; c++) {
        rows[0] = tp_walk_next(&walk);
        dot_rows(format, round, 1, n, rows, b->k, x, ld, sums + c, ld_sums);
    }
}

/* More stored rows at a time where there are registers for their sums. */
#define DOT(format, round)                                                                          \
    switch (n) {                                                                                    \
    case 1: dot_of(format, round, 8, 1, b, col, cols, x, ld, sums, ld_sums); break;                 \
    case 2: dot_of(format, round, 8, 2, b, col, cols, x, ld, sums, ld_sums); break;                 \
    case 3: dot_of(format, round, 4, 3, b, col, cols, x, ld, sums, ld_sums); break;                 \
    case 4: dot_of(format, round, 4, 4, b, col, cols, x, ld, sums, ld_sums); break;                 \
    case 5: dot_of(format, round, 4, 5, b, col, cols, x, ld, sums, ld_sums); break;                 \
    case 6: dot_of(format, round, 4, 6, b, col, cols, x, ld, sums, ld_sums); break;                 \
    default: dot_of(format, round, 4, 7, b, col, cols, x, ld, sums, ld_sums); break;                \
    }                                                                                               \
    break

TP_TARGET_AVX512 void tp_mm_avx512_dot(const tp_mm_right *b, int64_t col, int64_t cols, int n, const float *x, int64_t ld,
                                       float *sums, int64_t ld_sums)
{
    switch (b->format) {
    case TP_FORMAT_BF16: DOT(TP_FORMAT_BF16, false);
    case TP_FORMAT_F32: DOT(TP_FORMAT_F32, b->round_bf16);
    case TP_FORMAT_F16: DOT(TP_FORMAT_F16, b->round_bf16);
    case TP_FORMAT_Q8_0: DOT(TP_FORMAT_Q8_0, b->round_bf16);
    case TP_FORMAT_Q4_0: DOT(TP_FORMAT_Q4_0, b->round_bf16);
    case TP_FORMAT_Q4_1: DOT(TP_FORMAT_Q4_1, b->round_bf16);
    default: break;
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

#define AXPY(format, round) axpy_of(format, round, b, col, cols, n, x, ld, sums, ld_sums); break

TP_TARGET_AVX512 void tp_mm_avx512_axpy(const tp_mm_right *b, int64_t col, int64_t cols, int n, const float *x, int64_t ld,
                                        float *sums, int64_t ld_sums)
{
    switch (b->format) {
    case TP_FORMAT_BF16: AXPY(TP_FORMAT_BF16, false);
    case TP_FORMAT_F32: AXPY(TP_FORMAT_F32, b->round_bf16);
    case TP_FORMAT_F16: AXPY(TP_FORMAT_F16, b->round_bf16);
    case TP_FORMAT_Q8_0: AXPY(TP_FORMAT_Q8_0, b->round_bf16);
    case TP_FORMAT_Q4_0: AXPY(TP_FORMAT_Q4_0, b->round_bf16);
    case TP_FORMAT_Q4_1: AXPY(TP_FORMAT_Q4_1, b->round_bf16);
    default: break;
    }
}

#else
typedef int tp_few_avx512_is_for_x86;
#endif
