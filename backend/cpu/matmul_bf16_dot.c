/* The engine for CPUs whose vdpbf16ps is fast: the f32 engine's tiles and panels, word for word, except that a word is two
 * bf16 values of neighbouring k and one instruction adds both products to a sum. */
#if defined(__x86_64__)

#include "backend/cpu/avx512.h"
#include "backend/cpu/matmul_avx512.h"

enum { NR = 32 };

/* Values k .. k+32 of a row as 16 words. `n` of them exist. */
TP_INLINE_AVX512 __m512i join(__m512 lo, __m512 hi)
{
    return _mm512_inserti64x4(_mm512_castsi256_si512(tp_narrow_bf16(lo)), tp_narrow_bf16(hi), 1);
}

TP_INLINE_AVX512 __m512i load_words(tp_format_id format, const unsigned char *row, int64_t k, int64_t n)
{
    if (format == TP_FORMAT_BF16) return _mm512_maskz_loadu_epi16(tp_lanes(n), row + 2 * k);
    __m512 lo = tp_load16(format, row, k, (__mmask16)tp_lanes(n));
    return join(lo, n > 16 ? tp_load16(format, row, k + 16, (__mmask16)tp_lanes(n - 16)) : _mm512_setzero_ps());
}

static TP_TARGET_AVX512 void pack(const tp_rows *a, int64_t row, int rows, int64_t k0, int64_t kc, void *panel)
{
    uint32_t *out = panel;
    tp_format_id format = a->dtype == TP_BF16 ? TP_FORMAT_BF16 : TP_FORMAT_F32;
    int64_t row_bytes = a->ld * tp_formats[format].block_bytes;
    for (int64_t k = 0; k < kc; k += 2 * TP_MM_RUN) {
        for (int r = 0; r < rows; r++, out += TP_MM_RUN) {
            const unsigned char *source = (const unsigned char *)a->data + (row + r) * row_bytes;
            _mm512_store_si512(out, load_words(format, source, k0 + k, kc - k));
        }
    }
}

TP_INLINE_AVX512 void unpack_along(tp_format_id format, const tp_mm_right *b, int64_t k0, int64_t kc, int64_t col, int cols,
                                   uint32_t *out)
{
    for (int group = 0; group < NR && group < cols; group += 16) {
        const unsigned char *rows[16];
        int n = cols - group < 16 ? cols - group : 16;
        tp_row_walk walk = tp_walk_from(b, col + group);
        for (int i = 0; i < 16; i++) rows[i] = i < n ? tp_walk_next(&walk) : rows[0];
        for (int64_t k = 0; k < kc; k += 32) {
            __m512i t[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) t[i] = load_words(format, rows[i], k0 + k, kc - k);
            tp_transpose16(t);
            uint32_t *o = out + k / 2 * NR + group;
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                if (k + 2 * i < kc) _mm512_store_si512(o + i * NR, t[i]);
            }
        }
    }
}

/* Two stored rows become one row of words. */
TP_INLINE_AVX512 __m512i zip(tp_format_id format, const unsigned char *even, const unsigned char *odd, int64_t col,
                             __mmask16 mask)
{
    __m512i lo = tp_round_bf16(tp_load16(format, even, col, mask));
    if (odd == NULL) return _mm512_srli_epi32(lo, 16);
    return _mm512_or_si512(_mm512_srli_epi32(lo, 16), tp_round_bf16(tp_load16(format, odd, col, mask)));
}

TP_INLINE_AVX512 void unpack_across(tp_format_id format, const tp_mm_right *b, int64_t k0, int64_t kc, int64_t col, int cols,
                                    uint32_t *out)
{
    __mmask16 low = (__mmask16)tp_lanes(cols), high = (__mmask16)tp_lanes(cols - 16);
    tp_row_walk walk = tp_walk_from(b, k0);
    for (int64_t k = 0; k < kc; k += 2, out += NR) {
        const unsigned char *even = tp_walk_next(&walk), *odd = k + 1 < kc ? tp_walk_next(&walk) : NULL;
        _mm512_store_si512(out, zip(format, even, odd, col, low));
        if (cols > 16) _mm512_store_si512(out + 16, zip(format, even, odd, col + 16, high));
    }
}

#define UNPACK(format)                                                                                                         \
    if (b->along_k)                                                                                                            \
        unpack_along(format, b, k0, kc, col, cols, panel);                                                                     \
    else                                                                                                                       \
        unpack_across(format, b, k0, kc, col, cols, panel);                                                                    \
    break

static TP_TARGET_AVX512 void unpack(const tp_mm_right *b, int64_t k0, int64_t kc, int64_t col, int cols, void *panel)
{
    switch (b->format) {
    case TP_FORMAT_BF16: UNPACK(TP_FORMAT_BF16);
    case TP_FORMAT_F32: UNPACK(TP_FORMAT_F32);
    case TP_FORMAT_F16: UNPACK(TP_FORMAT_F16);
    case TP_FORMAT_Q8_0: UNPACK(TP_FORMAT_Q8_0);
    case TP_FORMAT_Q4_0: UNPACK(TP_FORMAT_Q4_0);
    case TP_FORMAT_Q4_1: UNPACK(TP_FORMAT_Q4_1);
    default: break;
    }
}

/* clang-format off */
#define ROWS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13)
/* clang-format on */

/* Rows of the right panel that are fetched ahead. */
#define AHEAD 16

static inline __attribute__((always_inline)) TP_TARGET_BF16_DOT void tile_of(int mr, int nv, __mmask16 mask,
                                                                             const tp_mm_tile *tile)
{
#define DECLARE(i) __m512 s##i = _mm512_setzero_ps(), t##i = _mm512_setzero_ps();
    ROWS(DECLARE)
#undef DECLARE
    const int *a = tile->left, *b = tile->right;
    int64_t ld = tile->right_ld;
    for (int64_t left = tile->words; left > 0; left -= TP_MM_RUN, a += (mr - 1) * TP_MM_RUN) {
        for (const int *end = a + (left < TP_MM_RUN ? left : TP_MM_RUN); a < end; a++, b += ld) {
            _mm_prefetch((const char *)(b + AHEAD * ld), _MM_HINT_T0);
            if (nv > 1) _mm_prefetch((const char *)(b + AHEAD * ld + 16), _MM_HINT_T0);
            __m512bh b0 = (__m512bh)_mm512_load_si512(b), b1 = nv > 1 ? (__m512bh)_mm512_load_si512(b + 16) : b0;
#define MULTIPLY(i)                                                                                                            \
    if (i < mr) {                                                                                                              \
        __m512bh x = (__m512bh)_mm512_set1_epi32(a[i * TP_MM_RUN]);                                                            \
        s##i = _mm512_dpbf16_ps(s##i, x, b0);                                                                                  \
        if (nv > 1) t##i = _mm512_dpbf16_ps(t##i, x, b1);                                                                      \
    }
            ROWS(MULTIPLY)
#undef MULTIPLY
        }
    }
    const float *from = tile->from;
    float *to = tile->to;
    __mmask16 low = nv > 1 ? 0xffff : mask; /* of the first vector; `mask` is of the last */
    if (from != NULL) {
#define ADD(i)                                                                                                                 \
    if (i < mr) {                                                                                                              \
        s##i = _mm512_add_ps(s##i, _mm512_maskz_loadu_ps(low, from));                                                          \
        if (nv > 1) t##i = _mm512_add_ps(t##i, _mm512_maskz_loadu_ps(mask, from + 16));                                        \
        from += tile->from_ld;                                                                                                 \
    }
        ROWS(ADD)
#undef ADD
    }
#define STORE(i)                                                                                                               \
    if (i < mr) {                                                                                                              \
        _mm512_mask_storeu_ps(to, low, s##i);                                                                                  \
        if (nv > 1) _mm512_mask_storeu_ps(to + 16, mask, t##i);                                                                \
        to += tile->ld;                                                                                                        \
    }
    ROWS(STORE)
#undef STORE
}

#define TILE(n)                                                                                                                \
    static TP_TARGET_BF16_DOT void tile_##n(const tp_mm_tile *t)                                                               \
    {                                                                                                                          \
        if (t->cols > 16)                                                                                                      \
            tile_of(n, 2, (__mmask16)tp_lanes(t->cols - 16), t);                                                               \
        else                                                                                                                   \
            tile_of(n, 1, (__mmask16)tp_lanes(t->cols), t);                                                                    \
    }
/* The formatter never settles on a layout for a row of macros. */
/* clang-format off */
TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12) TILE(13) TILE(14)
    /* clang-format on */

    static void tile(const tp_mm_tile *t)
{
    static void (*const tiles[])(const tp_mm_tile *) = {NULL,   tile_1, tile_2,  tile_3,  tile_4,  tile_5,  tile_6, tile_7,
                                                        tile_8, tile_9, tile_10, tile_11, tile_12, tile_13, tile_14};
    tiles[t->rows](t);
}

void tp_mm_bf16_dot_tile_plain(const tp_mm_tile *t)
{
    const uint16_t *a = t->left, *b = t->right;
    for (int r = 0; r < t->rows; r++) {
        for (int j = 0; j < t->cols; j++) {
            float s = 0;
            for (int64_t k = 0; k < t->words; k++) {
                const uint16_t *x = a + 2 * ((k / TP_MM_RUN * t->rows + r) * TP_MM_RUN + k % TP_MM_RUN);
                const uint16_t *y = b + 2 * (k * t->right_ld + j);
                s += tp_bf16_to_f32(x[1]) * tp_bf16_to_f32(y[1]);
                s += tp_bf16_to_f32(x[0]) * tp_bf16_to_f32(y[0]);
            }
            if (t->from != NULL) s += t->from[r * t->from_ld + j];
            t->to[r * t->ld + j] = s;
        }
    }
}

const tp_mm_engine tp_mm_bf16_dot = {
    .name = "bf16_dot",
    .mr = 14,
    .nr = NR,
    .per_word = 2,
    .pack = pack,
    .unpack = unpack,
    .tile = tile,
    .finish = tp_mm_avx512_finish,
    .dot = tp_mm_avx512_dot,
    .axpy = tp_mm_avx512_axpy,
};

#else
typedef int tp_mm_bf16_dot_is_for_x86;
#endif
