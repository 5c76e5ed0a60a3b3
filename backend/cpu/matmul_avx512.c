/* The f32 engine on AVX-512: tiles of 8 x 48 sums in 24 of the 32 registers, six for the right side, one for a broadcast word
 * of the left. Per word of k that is 24 FMAs, and the two FMA units are the limit: 12 cycles. A tile of 14 x 32 is 3 % faster
 * on a core of its own, but needs more instructions per FMA, and where another hardware thread shares the core, the rule on
 * rented machines, it is a tenth slower. */
#if defined(__x86_64__)

#include "backend/cpu/avx512.h"
#include "backend/cpu/matmul_avx512.h"

enum { MR = 8, NR = 48 };

/* ---- left side ---- */

static TP_TARGET_AVX512 void pack(const tp_rows *a, int64_t row, int rows, int64_t k0, int64_t kc, void *panel)
{
    float *out = panel;
    for (int64_t k = 0; k < kc; k += TP_MM_RUN) {
        __mmask16 mask = (__mmask16)tp_lanes(kc - k);
        for (int r = 0; r < rows; r++, out += TP_MM_RUN)
            _mm512_store_ps(out, tp_load16_rows(a->dtype, a->data, (row + r) * a->ld + k0 + k, mask));
    }
}

static TP_TARGET_AVX512 void pack_transposed(const tp_rows *a, int64_t row, int rows, int64_t k0, int64_t kc, void *panel)
{
    float *out = panel;
    __mmask16 mask = (__mmask16)tp_lanes(rows);
    for (int64_t k = 0; k < kc; k += TP_MM_RUN, out += rows * TP_MM_RUN) {
        __m512i t[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            t[i] = _mm512_setzero_si512();
            if (k + i < kc) t[i] = _mm512_castps_si512(tp_load16_rows(a->dtype, a->data, (k0 + k + i) * a->ld + row, mask));
        }
        tp_transpose16(t);
#pragma GCC unroll 8
        for (int r = 0; r < MR; r++) {
            if (r < rows) _mm512_store_si512(out + r * TP_MM_RUN, t[r]);
        }
    }
}

/* ---- right side ---- */

/* k runs along stored rows: 16 rows at a time are loaded and transposed. */
TP_INLINE_AVX512 void unpack_along(tp_format_id format, bool round, const tp_mm_right *b, int64_t k0, int64_t kc, int64_t col,
                                   int cols, float *out)
{
    for (int group = 0; group < NR && group < cols; group += 16) {
        const unsigned char *rows[16];
        int n = cols - group < 16 ? cols - group : 16;
        tp_row_walk walk = tp_walk_from(b, col + group);
        for (int i = 0; i < 16; i++) rows[i] = i < n ? tp_walk_next(&walk) : rows[0];
        for (int64_t k = 0; k < kc; k += 16) {
            __m512i t[16];
            __mmask16 mask = (__mmask16)tp_lanes(kc - k);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) t[i] = _mm512_castps_si512(tp_load16_rounded(format, round, rows[i], k0 + k, mask));
            tp_transpose16(t);
            float *o = out + k * NR + group;
            if (kc - k >= 16) {
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++) _mm512_store_si512(o + i * NR, t[i]);
            } else {
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++) {
                    if (k + i < kc) _mm512_store_si512(o + i * NR, t[i]);
                }
            }
        }
    }
}

/* Stored rows are rows of the panel: they are copied. */
TP_INLINE_AVX512 void unpack_across(tp_format_id format, bool round, const tp_mm_right *b, int64_t k0, int64_t kc, int64_t col,
                                    int cols, float *out)
{
    __mmask16 first = (__mmask16)tp_lanes(cols), second = (__mmask16)tp_lanes(cols - 16),
              third = (__mmask16)tp_lanes(cols - 32);
    if (cols == NR && b->rope_pairs == 0) { /* the common case, without masks */
        const unsigned char *row = b->data + k0 * b->row_bytes;
        for (int64_t k = 0; k < kc; k++, out += NR, row += b->row_bytes) {
            __m512 x = tp_load16_rounded(format, round, row, col, 0xffff);
            __m512 y = tp_load16_rounded(format, round, row, col + 16, 0xffff);
            __m512 z = tp_load16_rounded(format, round, row, col + 32, 0xffff);
            _mm512_store_ps(out, x);
            _mm512_store_ps(out + 16, y);
            _mm512_store_ps(out + 32, z);
        }
        return;
    }
    tp_row_walk walk = tp_walk_from(b, k0);
    for (int64_t k = 0; k < kc; k++, out += NR) {
        const unsigned char *row = tp_walk_next(&walk);
        _mm512_store_ps(out, tp_load16_rounded(format, round, row, col, first));
        if (cols > 16) _mm512_store_ps(out + 16, tp_load16_rounded(format, round, row, col + 16, second));
        if (cols > 32) _mm512_store_ps(out + 32, tp_load16_rounded(format, round, row, col + 32, third));
    }
}

#define UNPACK(format, round)                                                                                                  \
    if (b->along_k)                                                                                                            \
        unpack_along(format, round, b, k0, kc, col, cols, panel);                                                              \
    else                                                                                                                       \
        unpack_across(format, round, b, k0, kc, col, cols, panel);                                                             \
    break

static TP_TARGET_AVX512 void unpack(const tp_mm_right *b, int64_t k0, int64_t kc, int64_t col, int cols, void *panel)
{
    switch (b->format) {
    case TP_FORMAT_BF16: UNPACK(TP_FORMAT_BF16, false);
    case TP_FORMAT_F32: UNPACK(TP_FORMAT_F32, b->round_bf16);
    case TP_FORMAT_F16: UNPACK(TP_FORMAT_F16, b->round_bf16);
    case TP_FORMAT_Q8_0: UNPACK(TP_FORMAT_Q8_0, b->round_bf16);
    case TP_FORMAT_Q4_0: UNPACK(TP_FORMAT_Q4_0, b->round_bf16);
    case TP_FORMAT_Q4_1: UNPACK(TP_FORMAT_Q4_1, b->round_bf16);
    default: break;
    }
}

/* ---- tile ---- */

/* The order of the instructions of a word is kept, for it matters where another hardware thread takes half of the core's
 * attention: vectors of the right side are loaded a word before they are used, and three rows of the left read their word as
 * an operand of the FMA, which saves a broadcast for two more loads. That is 8 % faster there; alone it makes no difference. */
#define LOAD(x, p)          __asm__ volatile("vmovups %1, %0" : "=v"(x) : "m"(*(const __m512_u *)(p)))
#define BROADCAST(x, p)     __asm__ volatile("vbroadcastss %1, %0" : "=v"(x) : "m"(*(p)))
#define FMA(sum, x, b)      __asm__ volatile("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(b))
#define FMA_WORD(sum, p, b) __asm__ volatile("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(b), "m"(*(p)))
#define READS_ITS_WORD(row) ((row) == 1 || (row) == 4 || (row) == 6)

/* clang-format off */
#define ROWS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
/* clang-format on */

/* Row i of the word at `a`, times b##0 .. b##2. */
#define MULTIPLY(i, a, b)                                                                                                      \
    if (i < mr && READS_ITS_WORD(i)) {                                                                                         \
        FMA_WORD(s##i, (a) + i * TP_MM_RUN, b##0);                                                                             \
        if (nv > 1) FMA_WORD(t##i, (a) + i * TP_MM_RUN, b##1);                                                                 \
        if (nv > 2) FMA_WORD(u##i, (a) + i * TP_MM_RUN, b##2);                                                                 \
    } else if (i < mr) {                                                                                                       \
        BROADCAST(x, (a) + i * TP_MM_RUN);                                                                                     \
        FMA(s##i, x, b##0);                                                                                                    \
        if (nv > 1) FMA(t##i, x, b##1);                                                                                        \
        if (nv > 2) FMA(u##i, x, b##2);                                                                                        \
    }
/* All rows of one word; meanwhile the next word's vectors come from `next`. */
#define WORD(a, b, n, next)                                                                                                    \
    MULTIPLY(0, a, b) LOAD(n##0, next);                                                                                        \
    MULTIPLY(1, a, b) if (nv > 1) LOAD(n##1, (next) + 16);                                                                     \
    MULTIPLY(2, a, b) if (nv > 2) LOAD(n##2, (next) + 32);                                                                     \
    MULTIPLY(3, a, b) MULTIPLY(4, a, b) MULTIPLY(5, a, b) MULTIPLY(6, a, b) MULTIPLY(7, a, b)

/* Sums of `mr` rows and `nv` vectors of 16 columns, of which the last is cut by `mask`. mr and nv are constants at every call,
 * so the tests vanish and every sum is a register. */
TP_INLINE_AVX512 void tile_of(int mr, int nv, __mmask16 mask, int64_t ld, const tp_mm_tile *tile)
{
#define DECLARE(i) __m512 s##i = _mm512_setzero_ps(), t##i = _mm512_setzero_ps(), u##i = _mm512_setzero_ps();
    ROWS(DECLARE)
#undef DECLARE
    const float *a = tile->left, *b = tile->right, *last = b + (tile->words - 1) * ld;
    __m512 x, b0, b1, b2, n0, n1, n2;
    LOAD(b0, b);
    if (nv > 1) LOAD(b1, b + 16);
    if (nv > 2) LOAD(b2, b + 32);
    for (int64_t left = tile->words; left > 0; left -= TP_MM_RUN, a += (mr - 1) * TP_MM_RUN) {
        const float *end = a + (left < TP_MM_RUN ? left : TP_MM_RUN);
        for (; a + 4 <= end; a += 4) {
            const float *next = b + 4 * ld < last ? b + 4 * ld : last; /* behind the last word nothing is read */
            WORD(a, b, n, b + ld)
            WORD(a + 1, n, b, b + 2 * ld)
            WORD(a + 2, b, n, b + 3 * ld)
            WORD(a + 3, n, b, next)
            b = next;
        }
        for (; a < end; a++) {
            b = b < last ? b + ld : last;
            WORD(a, b, n, b)
            b0 = n0;
            if (nv > 1) b1 = n1;
            if (nv > 2) b2 = n2;
        }
    }
    const float *from = tile->from;
    float *to = tile->to;
    __mmask16 m0 = nv > 1 ? 0xffff : mask, m1 = nv > 2 ? 0xffff : mask;
    if (from != NULL) {
#define ADD(i)                                                                                                                 \
    if (i < mr) {                                                                                                              \
        s##i = _mm512_add_ps(s##i, _mm512_maskz_loadu_ps(m0, from));                                                           \
        if (nv > 1) t##i = _mm512_add_ps(t##i, _mm512_maskz_loadu_ps(m1, from + 16));                                          \
        if (nv > 2) u##i = _mm512_add_ps(u##i, _mm512_maskz_loadu_ps(mask, from + 32));                                        \
        from += tile->from_ld;                                                                                                 \
    }
        ROWS(ADD)
#undef ADD
    }
#define STORE(i)                                                                                                               \
    if (i < mr) {                                                                                                              \
        _mm512_mask_storeu_ps(to, m0, s##i);                                                                                   \
        if (nv > 1) _mm512_mask_storeu_ps(to + 16, m1, t##i);                                                                  \
        if (nv > 2) _mm512_mask_storeu_ps(to + 32, mask, u##i);                                                                \
        to += tile->ld;                                                                                                        \
    }
    ROWS(STORE)
#undef STORE
}

#define TILE(n)                                                                                                                \
    static TP_TARGET_AVX512 void tile_##n(const tp_mm_tile *t)                                                                 \
    {                                                                                                                          \
        if (t->cols <= 16)                                                                                                     \
            tile_of(n, 1, (__mmask16)tp_lanes(t->cols), NR, t);                                                                \
        else if (t->cols <= 32)                                                                                                \
            tile_of(n, 2, (__mmask16)tp_lanes(t->cols - 16), NR, t);                                                           \
        else if (t->right_ld == NR)                                                                                            \
            tile_of(n, 3, (__mmask16)tp_lanes(t->cols - 32), NR, t);                                                           \
        else                                                                                                                   \
            tile_of(n, 3, (__mmask16)tp_lanes(t->cols - 32), t->right_ld, t);                                                  \
    }
/* The formatter never settles on a layout for a row of macros. */
/* clang-format off */
TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8)
    /* clang-format on */

    static void tile(const tp_mm_tile *t)
{
    static void (*const tiles[])(const tp_mm_tile *) = {NULL, tile_1, tile_2, tile_3, tile_4, tile_5, tile_6, tile_7, tile_8};
    tiles[t->rows](t);
}

/* ---- result ---- */

TP_INLINE_AVX512 void finish_as(tp_dtype dtype, const tp_mm_out *out, int64_t row, int64_t rows, int64_t col, int64_t cols,
                                const float *sums, int64_t ld)
{
    __m512 alpha = _mm512_set1_ps(out->alpha), beta = _mm512_set1_ps(out->beta);
    for (int64_t r = 0; r < rows; r++, sums += ld) {
        int64_t at = (row + r) * out->c.ld + col, residual_at = (row + r) * out->residual_ld + col;
        for (int64_t j = 0; j < cols; j += 16) {
            __mmask16 mask = (__mmask16)tp_lanes(cols - j);
            __m512 x = _mm512_mul_ps(alpha, _mm512_maskz_loadu_ps(mask, sums + j));
            if (out->beta != 0) x = _mm512_fmadd_ps(beta, tp_load16_rows(dtype, out->c.data, at + j, mask), x);
            if (out->bias != NULL) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, out->bias + col + j));
            if (out->residual != NULL) x = _mm512_add_ps(x, tp_load16_rows(dtype, out->residual, residual_at + j, mask));
            if (dtype == TP_BF16)
                _mm256_mask_storeu_epi16((uint16_t *)out->c.data + at + j, mask, tp_narrow_bf16(x));
            else
                _mm512_mask_storeu_ps((float *)out->c.data + at + j, mask, x);
        }
    }
}

/* 16 columns of up to 16 rows become 16 stored rows. */
static TP_TARGET_AVX512 void finish_transposed(const tp_mm_out *out, int64_t row, int64_t rows, int64_t col, int64_t cols,
                                               const float *sums, int64_t ld)
{
    __m512 alpha = _mm512_set1_ps(out->alpha), beta = _mm512_set1_ps(out->beta);
    __mmask16 mask = (__mmask16)tp_lanes(rows);
    for (int64_t j = 0; j < cols; j += 16) {
        __m512i t[16];
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++) t[r] = r < rows ? _mm512_loadu_si512(sums + r * ld + j) : _mm512_setzero_si512();
        tp_transpose16(t);
        float *c = (float *)out->c.data + (col + j) * out->c.ld + row;
        int64_t n = cols - j;
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            if (i >= n) continue;
            __m512 x = _mm512_mul_ps(alpha, _mm512_castsi512_ps(t[i]));
            if (out->beta != 0) x = _mm512_fmadd_ps(beta, _mm512_maskz_loadu_ps(mask, c + i * out->c.ld), x);
            _mm512_mask_storeu_ps(c + i * out->c.ld, mask, x);
        }
    }
}

TP_TARGET_AVX512 void tp_mm_avx512_finish(const tp_mm_out *out, int64_t row, int64_t rows, int64_t col, int64_t cols,
                                          const float *sums, int64_t ld)
{
    if (out->transposed)
        finish_transposed(out, row, rows, col, cols, sums, ld);
    else if (out->c.dtype == TP_BF16)
        finish_as(TP_BF16, out, row, rows, col, cols, sums, ld);
    else
        finish_as(TP_F32, out, row, rows, col, cols, sums, ld);
}

const tp_mm_engine tp_mm_avx512 = {
    .name = "avx512",
    .mr = MR,
    .nr = NR,
    .per_word = 1,
    .pack = pack,
    .pack_transposed = pack_transposed,
    .unpack = unpack,
    .tile = tile,
    .finish = tp_mm_avx512_finish,
    .dot = tp_mm_avx512_dot,
    .axpy = tp_mm_avx512_axpy,
};

#else
typedef int tp_mm_avx512_is_for_x86;
#endif
