/* The products in plain C: the engine for CPUs without vector code of ours, and the scalar ends that vector code uses. */
#include <string.h>

#include "backend/cpu/matmul.h"

enum { MR = 4, NR = 8 };

static float load(const tp_rows *a, int64_t i)
{
    return a->dtype == TP_BF16 ? tp_bf16_to_f32(((const uint16_t *)a->data)[i]) : ((const float *)a->data)[i];
}

static float round_bf16(float x)
{
    return tp_bf16_to_f32(tp_f32_to_bf16(x));
}

void tp_mm_decode(const tp_mm_right *b, const unsigned char *row, int64_t first, int64_t n, float *out)
{
    const tp_format *f = &tp_formats[b->format];
    if (f->dense) {
        f->decode(row, first, n, out);
    } else {
        float block[32];
        f->decode(row, first / 32 * 32, 32, block);
        memcpy(out, block + first % 32, (size_t)n * sizeof *out);
    }
    for (int64_t i = 0; b->round_bf16 && i < n; i++) out[i] = round_bf16(out[i]);
}

static void pack(const tp_rows *a, int64_t row, int rows, int64_t k0, int64_t kc, void *panel)
{
    float *out = panel;
    for (int64_t k = 0; k < kc; k += TP_MM_RUN) {
        for (int r = 0; r < rows; r++) {
            for (int64_t i = 0; i < TP_MM_RUN; i++) *out++ = k + i < kc ? load(a, (row + r) * a->ld + k0 + k + i) : 0.0f;
        }
    }
}

static void pack_transposed(const tp_rows *a, int64_t row, int rows, int64_t k0, int64_t kc, void *panel)
{
    float *out = panel;
    for (int64_t k = 0; k < kc; k += TP_MM_RUN) {
        for (int r = 0; r < rows; r++) {
            for (int64_t i = 0; i < TP_MM_RUN; i++) *out++ = k + i < kc ? load(a, (k0 + k + i) * a->ld + row + r) : 0.0f;
        }
    }
}

static void unpack(const tp_mm_right *b, int64_t k0, int64_t kc, int64_t col, int cols, void *panel)
{
    float *out = panel, run[32];
    memset(out, 0, (size_t)(kc * NR) * sizeof *out);
    if (b->along_k) {
        for (int c = 0; c < cols; c++) {
            const unsigned char *row = tp_mm_stored_row(b, col + c);
            for (int64_t k = 0; k < kc; k += 32) {
                int64_t n = tp_mm_min(32, kc - k);
                tp_mm_decode(b, row, k0 + k, n, run);
                for (int64_t i = 0; i < n; i++) out[(k + i) * NR + c] = run[i];
            }
        }
    } else {
        for (int64_t k = 0; k < kc; k++) tp_mm_decode(b, tp_mm_stored_row(b, k0 + k), col, cols, out + k * NR);
    }
}

static void tile(const tp_mm_tile *t)
{
    float acc[MR][NR] = {{0}};
    const float *a = t->left, *b = t->right;
    for (int64_t k = 0; k < t->words; k++) {
        const float *x = a + k / TP_MM_RUN * TP_MM_RUN * t->rows + k % TP_MM_RUN;
        for (int r = 0; r < t->rows; r++) {
            for (int j = 0; j < NR; j++) acc[r][j] += x[r * TP_MM_RUN] * b[k * t->right_ld + j];
        }
    }
    for (int r = 0; r < t->rows; r++) {
        for (int j = 0; j < t->cols; j++)
            t->to[r * t->ld + j] = acc[r][j] + (t->from != NULL ? t->from[r * t->from_ld + j] : 0);
    }
}

static void store(const tp_rows *c, int64_t i, float x)
{
    if (c->dtype == TP_BF16)
        ((uint16_t *)c->data)[i] = tp_f32_to_bf16(x);
    else
        ((float *)c->data)[i] = x;
}

void tp_mm_generic_finish(const tp_mm_out *out, int64_t row, int64_t rows, int64_t col, int64_t cols, const float *sums,
                          int64_t ld)
{
    const tp_rows *c = &out->c;
    tp_rows residual = {.dtype = c->dtype, .ld = out->residual_ld};
    memcpy(&residual.data, &out->residual, sizeof residual.data);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t j = 0; j < cols; j++) {
            int64_t i = out->transposed ? (col + j) * c->ld + row + r : (row + r) * c->ld + col + j;
            float x = out->alpha * sums[r * ld + j];
            if (out->beta != 0) x += out->beta * load(c, i);
            if (out->bias != NULL) x += out->bias[col + j];
            if (residual.data != NULL) x += load(&residual, (row + r) * residual.ld + col + j);
            store(c, i, x);
        }
    }
}

static void dot(const tp_mm_right *b, int64_t col, int64_t cols, int n, const float *x, int64_t ld, float *sums,
                int64_t ld_sums)
{
    for (int64_t c = 0; c < cols; c++) {
        const unsigned char *row = tp_mm_stored_row(b, col + c);
        float acc[TP_MM_FEW] = {0}, run[32];
        for (int64_t k = 0; k < b->k; k += 32) {
            int64_t count = tp_mm_min(32, b->k - k);
            tp_mm_decode(b, row, k, count, run);
            for (int i = 0; i < n; i++) {
                for (int64_t j = 0; j < count; j++) acc[i] += x[i * ld + k + j] * run[j];
            }
        }
        for (int i = 0; i < n; i++) sums[i * ld_sums + c] = acc[i];
    }
}

static void axpy(const tp_mm_right *b, int64_t col, int64_t cols, int n, const float *x, int64_t ld, float *sums,
                 int64_t ld_sums)
{
    for (int i = 0; i < n; i++) memset(sums + i * ld_sums, 0, (size_t)cols * sizeof *sums);
    for (int64_t k = 0; k < b->k; k++) {
        const unsigned char *row = tp_mm_stored_row(b, k);
        for (int64_t c = 0; c < cols; c += 32) {
            float run[32];
            int64_t count = tp_mm_min(32, cols - c);
            tp_mm_decode(b, row, col + c, count, run);
            for (int i = 0; i < n; i++) {
                for (int64_t j = 0; j < count; j++) sums[i * ld_sums + c + j] += x[i * ld + k] * run[j];
            }
        }
    }
}

const tp_mm_engine tp_mm_generic = {
    .name = "generic",
    .mr = MR,
    .nr = NR,
    .per_word = 1,
    .pack = pack,
    .pack_transposed = pack_transposed,
    .unpack = unpack,
    .tile = tile,
    .finish = tp_mm_generic_finish,
    .dot = dot,
    .axpy = axpy,
};
