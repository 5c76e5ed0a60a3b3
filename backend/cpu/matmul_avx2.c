/* The f32 engine on AVX2: tiles of 6 x 16 sums in 12 of the 16 registers. Otherwise the AVX-512 engine's twin at half the
 * width; ends of rows are decoded by the scalar definition, for AVX2 has no masks for 16-bit loads. */
#if defined(__x86_64__)

#include <immintrin.h>
#include <string.h>

#include "backend/cpu/matmul.h"

#define INLINE_AVX2 static inline __attribute__((always_inline)) TP_TARGET_AVX2

enum { MR = 6, NR = 16 };

INLINE_AVX2 __m256 widen_bf16(__m128i h)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

/* Bits of x rounded to bf16 in the upper halves, zeros below. */
INLINE_AVX2 __m256i round_bf16(__m256 x)
{
    __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
    return _mm256_and_si256(rounded, _mm256_set1_epi32((int)0xffff0000));
}

INLINE_AVX2 float f16_at(const unsigned char *p)
{
    uint16_t h;
    memcpy(&h, p, 2);
    return _cvtsh_ss(h);
}

INLINE_AVX2 __m256i load_bytes8(const unsigned char *p, bool is_signed)
{
    __m128i q = _mm_loadl_epi64((const __m128i *)(const void *)p);
    return is_signed ? _mm256_cvtepi8_epi32(q) : _mm256_cvtepu8_epi32(q);
}

INLINE_AVX2 __m256i load_codes(const unsigned char *codes, int64_t in)
{
    __m256i q = load_bytes8(codes + in % 16, false);
    return in >= 16 ? _mm256_srli_epi32(q, 4) : _mm256_and_si256(q, _mm256_set1_epi32(15));
}

INLINE_AVX2 __m256 load8_whole(tp_format_id format, const unsigned char *row, int64_t k)
{
    const unsigned char *block = row + k / 32 * tp_formats[format].block_bytes;
    switch (format) {
    case TP_FORMAT_F32: return _mm256_loadu_ps((const float *)(const void *)(row + 4 * k));
    case TP_FORMAT_BF16: return widen_bf16(_mm_loadu_si128((const __m128i *)(const void *)(row + 2 * k)));
    case TP_FORMAT_F16: return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(row + 2 * k)));
    case TP_FORMAT_Q8_0:
        return _mm256_mul_ps(_mm256_cvtepi32_ps(load_bytes8(block + 2 + k % 32, true)), _mm256_set1_ps(f16_at(block)));
    case TP_FORMAT_Q4_0: {
        __m256i q = _mm256_sub_epi32(load_codes(block + 2, k % 32), _mm256_set1_epi32(8));
        return _mm256_mul_ps(_mm256_cvtepi32_ps(q), _mm256_set1_ps(f16_at(block)));
    }
    case TP_FORMAT_Q4_1: {
        __m256 q = _mm256_cvtepi32_ps(load_codes(block + 4, k % 32));
        return _mm256_fmadd_ps(q, _mm256_set1_ps(f16_at(block)), _mm256_set1_ps(f16_at(block + 2)));
    }
    default: return _mm256_setzero_ps();
    }
}

/* Values k .. k+8 of a stored row, k a multiple of 8; those from n on are zero and not read. */
INLINE_AVX2 __m256 load8(const tp_mm_right *b, tp_format_id format, const unsigned char *row, int64_t k, int64_t n)
{
    if (n < 8) {
        float x[8] = {0};
        if (n > 0) tp_mm_decode(b, row, k, n, x);
        return _mm256_loadu_ps(x);
    }
    __m256 x = load8_whole(format, row, k);
    return b->round_bf16 ? _mm256_castsi256_ps(round_bf16(x)) : x;
}

/* 8 values of an activation row. */
INLINE_AVX2 __m256 load8_rows(tp_dtype dtype, const void *data, int64_t i, int64_t n)
{
    if (n < 8) {
        float x[8] = {0};
        for (int64_t j = 0; j < n; j++)
            x[j] = dtype == TP_BF16 ? tp_bf16_to_f32(((const uint16_t *)data)[i + j]) : ((const float *)data)[i + j];
        return _mm256_loadu_ps(x);
    }
    if (dtype == TP_BF16) return widen_bf16(_mm_loadu_si128((const __m128i *)(const void *)((const uint16_t *)data + i)));
    return _mm256_loadu_ps((const float *)data + i);
}

INLINE_AVX2 void transpose8(__m256 r[8])
{
    __m256 t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) r[i] = t[i];
}

/* ---- left side ---- */

static TP_TARGET_AVX2 void pack(const tp_rows *a, int64_t row, int rows, int64_t k0, int64_t kc, void *panel)
{
    float *out = panel;
    for (int64_t k = 0; k < kc; k += TP_MM_RUN) {
        for (int r = 0; r < rows; r++, out += TP_MM_RUN) {
            int64_t i = (row + r) * a->ld + k0 + k;
            _mm256_store_ps(out, load8_rows(a->dtype, a->data, i, kc - k));
            _mm256_store_ps(out + 8, load8_rows(a->dtype, a->data, i + 8, kc - k - 8));
        }
    }
}

static TP_TARGET_AVX2 void pack_transposed(const tp_rows *a, int64_t row, int rows, int64_t k0, int64_t kc, void *panel)
{
    float *out = panel;
    int64_t padded = tp_mm_ceil(kc, TP_MM_RUN) * TP_MM_RUN;
    for (int64_t k = 0; k < padded; k += 8) {
        __m256 t[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) t[i] = load8_rows(a->dtype, a->data, (k0 + k + i) * a->ld + row, k + i < kc ? rows : 0);
        transpose8(t);
        float *o = out + k / TP_MM_RUN * TP_MM_RUN * rows + k % TP_MM_RUN;
#pragma GCC unroll 6
        for (int r = 0; r < MR; r++) {
            if (r < rows) _mm256_store_ps(o + r * TP_MM_RUN, t[r]);
        }
    }
}

/* ---- right side ---- */

INLINE_AVX2 void unpack_along(tp_format_id format, const tp_mm_right *b, int64_t k0, int64_t kc, int64_t col, int cols,
                              float *out)
{
    for (int group = 0; group < NR; group += 8) {
        const unsigned char *rows[8];
        for (int i = 0; i < 8; i++) rows[i] = tp_mm_stored_row(b, col + (group + i < cols ? group + i : 0));
        for (int64_t k = 0; k < kc; k += 8) {
            __m256 t[8];
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) t[i] = load8(b, format, rows[i], k0 + k, kc - k);
            transpose8(t);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                if (k + i < kc) _mm256_store_ps(out + (k + i) * NR + group, t[i]);
            }
        }
    }
}

INLINE_AVX2 void unpack_across(tp_format_id format, const tp_mm_right *b, int64_t k0, int64_t kc, int64_t col, int cols,
                               float *out)
{
    for (int64_t k = 0; k < kc; k++, out += NR) {
        const unsigned char *row = tp_mm_stored_row(b, k0 + k);
        _mm256_store_ps(out, load8(b, format, row, col, cols));
        _mm256_store_ps(out + 8, load8(b, format, row, col + 8, cols - 8));
    }
}

#define EACH_FORMAT(WHAT)                                                                                                      \
    switch (b->format) {                                                                                                       \
    case TP_FORMAT_F32: WHAT(TP_FORMAT_F32); break;                                                                            \
    case TP_FORMAT_BF16: WHAT(TP_FORMAT_BF16); break;                                                                          \
    case TP_FORMAT_F16: WHAT(TP_FORMAT_F16); break;                                                                            \
    case TP_FORMAT_Q8_0: WHAT(TP_FORMAT_Q8_0); break;                                                                          \
    case TP_FORMAT_Q4_0: WHAT(TP_FORMAT_Q4_0); break;                                                                          \
    case TP_FORMAT_Q4_1: WHAT(TP_FORMAT_Q4_1); break;                                                                          \
    default: break;                                                                                                            \
    }

static TP_TARGET_AVX2 void unpack(const tp_mm_right *b, int64_t k0, int64_t kc, int64_t col, int cols, void *panel)
{
#define ALONG(format)  unpack_along(format, b, k0, kc, col, cols, panel)
#define ACROSS(format) unpack_across(format, b, k0, kc, col, cols, panel)
    if (b->along_k)
        EACH_FORMAT(ALONG)
    else
        EACH_FORMAT(ACROSS)
}

/* ---- tile ---- */

/* Rows of the right panel that are fetched ahead. */
#define AHEAD 16

#define ROWS(X) X(0) X(1) X(2) X(3) X(4) X(5)

INLINE_AVX2 void tile_of(int mr, const tp_mm_tile *tile)
{
#define DECLARE(i) __m256 s##i = _mm256_setzero_ps(), t##i = _mm256_setzero_ps();
    ROWS(DECLARE)
#undef DECLARE
    const float *a = tile->left, *b = tile->right;
    int64_t ld = tile->right_ld;
    for (int64_t left = tile->words; left > 0; left -= TP_MM_RUN, a += (mr - 1) * TP_MM_RUN) {
        for (const float *end = a + (left < TP_MM_RUN ? left : TP_MM_RUN); a < end; a++, b += ld) {
            _mm_prefetch((const char *)(b + AHEAD * ld), _MM_HINT_T0);
            __m256 b0 = _mm256_loadu_ps(b), b1 = _mm256_loadu_ps(b + 8);
#define MULTIPLY(i)                                                                                                            \
    if (i < mr) {                                                                                                              \
        __m256 x = _mm256_broadcast_ss(a + i * TP_MM_RUN);                                                                     \
        s##i = _mm256_fmadd_ps(x, b0, s##i);                                                                                   \
        t##i = _mm256_fmadd_ps(x, b1, t##i);                                                                                   \
    }
            ROWS(MULTIPLY)
#undef MULTIPLY
        }
    }
    const float *from = tile->from;
    float *to = tile->to;
#define STORE(i)                                                                                                               \
    if (i < mr) {                                                                                                              \
        if (from != NULL) {                                                                                                    \
            s##i = _mm256_add_ps(s##i, _mm256_loadu_ps(from));                                                                 \
            t##i = _mm256_add_ps(t##i, _mm256_loadu_ps(from + 8));                                                             \
            from += tile->from_ld;                                                                                             \
        }                                                                                                                      \
        _mm256_storeu_ps(to, s##i);                                                                                            \
        _mm256_storeu_ps(to + 8, t##i);                                                                                        \
        to += tile->ld;                                                                                                        \
    }
    ROWS(STORE)
#undef STORE
}

static TP_TARGET_AVX2 void whole_tile(const tp_mm_tile *t)
{
    switch (t->rows) {
    case 1: tile_of(1, t); break;
    case 2: tile_of(2, t); break;
    case 3: tile_of(3, t); break;
    case 4: tile_of(4, t); break;
    case 5: tile_of(5, t); break;
    default: tile_of(6, t); break;
    }
}

static void tile(const tp_mm_tile *t)
{
    if (t->cols == NR) {
        whole_tile(t);
        return;
    }
    float part[MR * NR];
    tp_mm_tile whole = *t;
    whole.from = NULL;
    whole.to = part;
    whole.ld = NR;
    whole_tile(&whole);
    for (int r = 0; r < t->rows; r++) {
        for (int j = 0; j < t->cols; j++)
            t->to[r * t->ld + j] = part[r * NR + j] + (t->from != NULL ? t->from[r * t->from_ld + j] : 0);
    }
}

/* ---- result ---- */

INLINE_AVX2 void store8_rows(const tp_rows *c, int64_t i, __m256 x)
{
    if (c->dtype == TP_BF16) {
        __m256i h = _mm256_srli_epi32(round_bf16(x), 16);
        __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
        _mm_storeu_si128((__m128i *)(void *)((uint16_t *)c->data + i), packed);
    } else {
        _mm256_storeu_ps((float *)c->data + i, x);
    }
}

static TP_TARGET_AVX2 void finish(const tp_mm_out *out, int64_t row, int64_t rows, int64_t col, int64_t cols, const float *sums,
                                  int64_t ld)
{
    int64_t whole = out->transposed ? 0 : cols / 8 * 8;
    __m256 alpha = _mm256_set1_ps(out->alpha), beta = _mm256_set1_ps(out->beta);
    for (int64_t r = 0; r < rows; r++) {
        int64_t at = (row + r) * out->c.ld + col, residual_at = (row + r) * out->residual_ld + col;
        for (int64_t j = 0; j < whole; j += 8) {
            __m256 x = _mm256_mul_ps(alpha, _mm256_loadu_ps(sums + r * ld + j));
            if (out->beta != 0) x = _mm256_add_ps(x, _mm256_mul_ps(beta, load8_rows(out->c.dtype, out->c.data, at + j, 8)));
            if (out->bias != NULL) x = _mm256_add_ps(x, _mm256_loadu_ps(out->bias + col + j));
            if (out->residual != NULL) x = _mm256_add_ps(x, load8_rows(out->c.dtype, out->residual, residual_at + j, 8));
            store8_rows(&out->c, at + j, x);
        }
    }
    if (whole < cols) tp_mm_generic_finish(out, row, rows, col + whole, cols - whole, sums + whole, ld);
}

/* ---- few rows, rounded to bf16; few_avx2.c has the common case ---- */

/* 4 stored rows against one row of x. */
INLINE_AVX2 void dot_rows(tp_format_id format, int nw, const tp_mm_right *b, const unsigned char *const *rows, const float *x,
                          float *sums)
{
    __m256 s[4], t[4];
#pragma GCC unroll 4
    for (int w = 0; w < nw; w++) s[w] = t[w] = _mm256_setzero_ps();
    for (int64_t k = 0; k < b->k; k += 16) {
        __m256 x0 = _mm256_loadu_ps(x + k), x1 = _mm256_loadu_ps(x + k + 8);
#pragma GCC unroll 4
        for (int w = 0; w < nw; w++) {
            s[w] = _mm256_fmadd_ps(load8(b, format, rows[w], k, b->k - k), x0, s[w]);
            t[w] = _mm256_fmadd_ps(load8(b, format, rows[w], k + 8, b->k - k - 8), x1, t[w]);
        }
    }
#pragma GCC unroll 4
    for (int w = 0; w < nw; w++) {
        __m256 v = _mm256_add_ps(s[w], t[w]);
        __m128 h = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        h = _mm_add_ps(h, _mm_movehl_ps(h, h));
        sums[w] = _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
    }
}

/* For more rows of x the stored rows are read again, from L1. */
INLINE_AVX2 void dot_of(tp_format_id format, const tp_mm_right *b, int64_t col, int64_t cols, int n, const float *x, int64_t ld,
                        float *sums, int64_t ld_sums)
{
    const unsigned char *rows[4];
    for (int64_t c = 0; c < cols; c += 4) {
        int nw = (int)tp_mm_min(4, cols - c);
        for (int w = 0; w < nw; w++) rows[w] = tp_mm_stored_row(b, col + c + w);
        for (int i = 0; i < n; i++) {
            float *out = sums + i * ld_sums + c;
            if (nw == 4)
                dot_rows(format, 4, b, rows, x + i * ld, out);
            else {
                for (int w = 0; w < nw; w++) dot_rows(format, 1, b, rows + w, x + i * ld, out + w);
            }
        }
    }
}

static TP_TARGET_AVX2 void dot(const tp_mm_right *b, int64_t col, int64_t cols, int n, const float *x, int64_t ld, float *sums,
                               int64_t ld_sums)
{
#define DOT(format) dot_of(format, b, col, cols, n, x, ld, sums, ld_sums)
    if (!b->round_bf16) {
        tp_mm_avx2_dot(b, col, cols, n, x, ld, sums, ld_sums);
        return;
    }
    EACH_FORMAT(DOT)
}

INLINE_AVX2 void add_rows(tp_format_id format, int nw, const tp_mm_right *b, const unsigned char *const *rows, int64_t col,
                          int64_t cols, int n, const float *x, int64_t ld, float *sums, int64_t ld_sums)
{
    for (int64_t j = 0; j < cols; j += 8) {
        __m256 v[4];
#pragma GCC unroll 4
        for (int w = 0; w < nw; w++) v[w] = load8(b, format, rows[w], col + j, cols - j);
        for (int i = 0; i < n; i++) { /* sums have room up to a multiple of 8 columns */
            __m256 s = _mm256_loadu_ps(sums + i * ld_sums + j);
#pragma GCC unroll 4
            for (int w = 0; w < nw; w++) s = _mm256_fmadd_ps(_mm256_broadcast_ss(x + i * ld + w), v[w], s);
            _mm256_storeu_ps(sums + i * ld_sums + j, s);
        }
    }
}

INLINE_AVX2 void axpy_of(tp_format_id format, const tp_mm_right *b, int64_t col, int64_t cols, int n, const float *x,
                         int64_t ld, float *sums, int64_t ld_sums)
{
    const unsigned char *rows[4];
    int64_t k = 0;
    for (int i = 0; i < n; i++) memset(sums + i * ld_sums, 0, (size_t)ld_sums * sizeof *sums);
    for (; k + 4 <= b->k; k += 4) {
        for (int w = 0; w < 4; w++) rows[w] = tp_mm_stored_row(b, k + w);
        add_rows(format, 4, b, rows, col, cols, n, x + k, ld, sums, ld_sums);
    }
    for (; k < b->k; k++) {
        rows[0] = tp_mm_stored_row(b, k);
        add_rows(format, 1, b, rows, col, cols, n, x + k, ld, sums, ld_sums);
    }
}

static TP_TARGET_AVX2 void axpy(const tp_mm_right *b, int64_t col, int64_t cols, int n, const float *x, int64_t ld, float *sums,
                                int64_t ld_sums)
{
#define AXPY(format) axpy_of(format, b, col, cols, n, x, ld, sums, ld_sums)
    EACH_FORMAT(AXPY)
}

const tp_mm_engine tp_mm_avx2 = {
    .name = "avx2",
    .mr = MR,
    .nr = NR,
    .per_word = 1,
    .pack = pack,
    .pack_transposed = pack_transposed,
    .unpack = unpack,
    .tile = tile,
    .finish = finish,
    .dot = dot,
    .axpy = axpy,
};

#else
typedef int tp_mm_avx2_is_for_x86;
#endif
