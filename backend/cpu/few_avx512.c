/* Few rows on AVX-512: 1 to 7 rows of x against weights that stream through once.
 *
 * All the time goes into reading, and a core reads fastest along one line of addresses, further ahead than its hardware
 * dares to. So stored rows are taken in the order in which they lie, some at once to share the loads of x, and while they
 * are multiplied the bytes a fixed distance ahead are asked for, line after line. */
#if defined(__x86_64__)

#include "backend/cpu/avx512.h"
#include "backend/cpu/matmul_avx512.h"

/* How far ahead, at least; and at least as far as the rows that are multiplied together reach. */
#define AHEAD_BYTES ((int64_t)4096)

/* What has been asked for, and where there is nothing more to ask for. */
typedef struct ahead {
    const unsigned char *at, *end;
} ahead;

/* Asks for the next `bytes`. */
TP_INLINE_AVX512 void fetch(ahead *a, int64_t bytes)
{
    const unsigned char *to = a->end - a->at < bytes ? a->end : a->at + bytes;
    for (; a->at < to; a->at += 64) _mm_prefetch((const char *)a->at, _MM_HINT_T0);
}

/* Adds up the lanes of `nw` sums, each in the same fixed tree, and leaves them in columns to[w]. */
TP_INLINE_AVX512 void leave_sums(int nw, const __m512 *s, int stride, const int64_t *to, float *sums)
{
    float four[4];
    __m512 a = s[0], b = nw > 1 ? s[stride] : s[0], c = nw > 2 ? s[2 * stride] : s[0], d = nw > 3 ? s[3 * stride] : s[0];
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(four, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#pragma GCC unroll 4
    for (int w = 0; w < nw; w++) sums[to[w]] = four[w];
}

/* `nw` stored rows, one after the other, against n rows of x. Each of the n * nw sums is one register, 16 partial sums by
 * k mod 16, added up in a fixed tree at the end; the sums of stored row w go to column to[w]. */
TP_INLINE_AVX512 void dot_values(tp_format_id format, bool round, int nw, int n, const unsigned char *row, int64_t row_bytes,
                                 ahead *next, int64_t k, const float *x, int64_t ld, const int64_t *to, float *sums,
                                 int64_t ld_sums)
{
    __m512 s[16];
#pragma GCC unroll 16
    for (int i = 0; i < nw * n; i++) s[i] = _mm512_setzero_ps();
    int64_t whole = k / 32 * 32, step = nw * 32 * (format == TP_FORMAT_F32 ? 4 : 2);
    for (int64_t j = 0; j < whole; j += 32) {
        fetch(next, step);
#pragma GCC unroll 8
        for (int w = 0; w < nw; w++) {
            __m512 lo = tp_load16_rounded(format, round, row + w * row_bytes, j, 0xffff);
            __m512 hi = tp_load16_rounded(format, round, row + w * row_bytes, j + 16, 0xffff);
#pragma GCC unroll 4
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
            __m512 v = tp_load16_rounded(format, round, row + w * row_bytes, j, mask);
#pragma GCC unroll 4
            for (int i = 0; i < n; i++) s[w * n + i] = _mm512_fmadd_ps(v, _mm512_loadu_ps(x + i * ld + j), s[w * n + i]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) leave_sums(nw, s + i, n, to, sums + i * ld_sums);
}

/* The same for formats in blocks. A block's scale leaves the sum: d * sum(q x), and for Q4_1 m * sum(x), whose sum stands
 * behind x. Scales are converted for 16 blocks at once. So a value costs a conversion, or a look-up of its 4-bit code in a
 * register, and an FMA. (The look-up itself ignores the upper bits of an index.) */
TP_INLINE_AVX512 void dot_blocks(tp_format_id format, int nw, int n, const unsigned char *row, int64_t row_bytes, ahead *next,
                                 int64_t k, const float *x, int64_t ld, const int64_t *to, float *sums, int64_t ld_sums)
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
            __m512i heads =
                _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, offsets, row + w * row_bytes + b0 * bytes, 1);
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
            int64_t at = (b0 + j) * bytes + (format == TP_FORMAT_Q4_1 ? 4 : 2);
            fetch(next, nw * bytes);
#pragma GCC unroll 8
            for (int w = 0; w < nw; w++) {
                const unsigned char *q = row + w * row_bytes + at;
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
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) leave_sums(nw, s + i, n, to, sums + i * ld_sums);
}

TP_INLINE_AVX512 void dot_rows(tp_format_id format, bool round, int nw, int n, const unsigned char *row, int64_t row_bytes,
                               ahead *next, int64_t k, const float *x, int64_t ld, const int64_t *to, float *sums,
                               int64_t ld_sums)
{
    bool blocks = format == TP_FORMAT_Q8_0 || format == TP_FORMAT_Q4_0 || format == TP_FORMAT_Q4_1;
    if (blocks && !round)
        dot_blocks(format, nw, n, row, row_bytes, next, k, x, ld, to, sums, ld_sums);
    else
        dot_values(format, round, nw, n, row, row_bytes, next, k, x, ld, to, sums, ld_sums);
}

/* The column, from `col` on, of the stored row `index` rows behind that of column `col`. */
TP_INLINE_AVX512 int64_t column_of(const tp_mm_right *b, int64_t col, int64_t index)
{
    if (b->rope_pairs == 0) return index;
    int64_t hd = b->rope_pairs, head = (col + index) / hd * hd, in = col + index - head;
    return head + in / 2 + in % 2 * (hd / 2) - col;
}

/* Rows of at most 16 * nv values, 4 at a time: the `up` side of a low-rank part. x stays in registers, and the hardware
 * itself follows what is so short. */
TP_INLINE_AVX512 void dot_short(tp_format_id format, bool round, int nv, const tp_mm_right *b, int64_t col, int64_t cols,
                                const float *x, float *sums)
{
    static const int64_t to[4] = {0, 1, 2, 3};
    const unsigned char *row = b->data + col * b->row_bytes;
    __m512 v[4], s[4];
    __mmask16 mask[4];
#pragma GCC unroll 4
    for (int i = 0; i < nv; i++) {
        v[i] = _mm512_loadu_ps(x + 16 * i); /* with zeros up to 32 values, so up to 16 * nv */
        mask[i] = (__mmask16)tp_lanes(b->k - 16 * i);
    }
    for (int64_t c = 0; c < cols; c += 4, row += 4 * b->row_bytes) {
        int nw = cols - c < 4 ? (int)(cols - c) : 4;
#pragma GCC unroll 4
        for (int w = 0; w < 4; w++) {
            const unsigned char *from = w < nw ? row + w * b->row_bytes : row;
            s[w] = _mm512_mul_ps(tp_load16_rounded(format, round, from, 0, mask[0]), v[0]);
#pragma GCC unroll 4
            for (int i = 1; i < nv; i++)
                s[w] = _mm512_fmadd_ps(tp_load16_rounded(format, round, from, 16 * i, mask[i]), v[i], s[w]);
        }
        if (nw == 4) {
            leave_sums(4, s, 1, to, sums + c);
        } else {
            for (int w = 0; w < nw; w++) leave_sums(1, s + w, 1, to, sums + c + w);
        }
    }
}

TP_INLINE_AVX512 bool is_short(const tp_mm_right *b)
{
    return b->k <= 64 && tp_formats[b->format].dense && b->rope_pairs == 0;
}

TP_INLINE_AVX512 void dot_all_short(tp_format_id format, bool round, const tp_mm_right *b, int64_t col, int64_t cols, int n,
                                    const float *x, int64_t ld, float *sums, int64_t ld_sums)
{
    for (int i = 0; i < n; i++) {
        const float *from = x + i * ld;
        float *out = sums + i * ld_sums;
        if (b->k <= 16)
            dot_short(format, round, 1, b, col, cols, from, out);
        else if (b->k <= 32)
            dot_short(format, round, 2, b, col, cols, from, out);
        else
            dot_short(format, round, 4, b, col, cols, from, out);
    }
}

/* All columns of an item: 4 stored rows at a time against up to four rows of x, and once more, from cache, against the
 * rest; what is left over one at a time. */
TP_INLINE_AVX512 void dot_of(tp_format_id format, bool round, const tp_mm_right *b, int64_t col, int64_t cols, int n,
                             const float *x, int64_t ld, float *sums, int64_t ld_sums)
{
    const unsigned char *row = b->data + col * b->row_bytes;
    ahead next = {row, b->data + b->m * b->row_bytes}, nothing = {NULL, NULL};
    int64_t to[4], c = 0, group = 4 * b->row_bytes;
    if (is_short(b)) {
        dot_all_short(format, round, b, col, cols, n, x, ld, sums, ld_sums);
        return;
    }
    fetch(&next, group > AHEAD_BYTES ? group : AHEAD_BYTES);
    for (; c + 4 <= cols; c += 4, row += group) {
        for (int w = 0; w < 4; w++) to[w] = column_of(b, col, c + w);
        for (int i = 0; i < n; i += 4) {
            const float *from = x + i * ld;
            float *out = sums + i * ld_sums;
            ahead *then = i == 0 ? &next : &nothing;
            if (n - i == 1)
                dot_rows(format, round, 4, 1, row, b->row_bytes, then, b->k, from, ld, to, out, ld_sums);
            else if (n - i == 2)
                dot_rows(format, round, 4, 2, row, b->row_bytes, then, b->k, from, ld, to, out, ld_sums);
            else if (n - i == 3)
                dot_rows(format, round, 4, 3, row, b->row_bytes, then, b->k, from, ld, to, out, ld_sums);
            else
                dot_rows(format, round, 4, 4, row, b->row_bytes, then, b->k, from, ld, to, out, ld_sums);
        }
    }
    for (; c < cols; c++, row += b->row_bytes) {
        to[0] = column_of(b, col, c);
        for (int i = 0; i < n; i++)
            dot_rows(format, round, 1, 1, row, b->row_bytes, &nothing, b->k, x + i * ld, ld, to, sums + i * ld_sums, ld_sums);
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
