#include "models/quantiles.h"

#include <math.h>
#include <string.h>

#include "base/mem.h"
#include "models/twice.h"

#define QUANTILES 65536
#define HALF      (QUANTILES / 2)
#define LANES     64 /* generator blocks drawn side by side */

/* ---- the table ---- */

/* Solves Phi(z) = u > 1/2 by Newton's method from below, where Phi is concave and the steps never overshoot. */
static double quantile(double u, double start)
{
    double z = start;
    for (int i = 0; i < 50; i++) {
        double step = (0.5 * erfc(-z * M_SQRT1_2) - u) / (exp(-0.5 * z * z) * M_SQRT1_2 / sqrt(M_PI));
        z -= step;
        if (!(fabs(step) > 1e-12)) break;
    }
    return z;
}

/* values[HALF + i] and their mirror images. */
static void fill_table(double deviation, float *values)
{
    double z = 0, squares = 0;
    for (int i = 0; i < HALF; i++) {
        z = quantile(0.5 + (i + 0.5) / QUANTILES, z);
        squares += z * z;
        values[HALF + i] = (float)z;
    }
    double scale = deviation / sqrt(squares / HALF);
    for (int i = 0; i < HALF; i++) {
        values[HALF + i] = (float)(scale * (double)values[HALF + i]);
        values[HALF - 1 - i] = -values[HALF + i];
    }
}

void *tp_quantiles_new(tp_ctx *ctx, double deviation, tp_dtype dtype)
{
    float *values = tp_alloc(ctx, QUANTILES, sizeof *values);
    void *table = values != NULL ? tp_alloc(ctx, QUANTILES, tp_dtype_bytes(dtype)) : NULL;
    if (table != NULL) {
        fill_table(deviation, values);
        tp_convert_from_f32(dtype, values, QUANTILES, table);
    }
    tp_free(values);
    return table;
}

/* ---- drawing ---- */

struct lanes {
    uint32_t words[4][LANES];
};

/* tp_philox4x32 on the counters block .. block + LANES - 1, round by round over all of them. Returns LANES. */
TP_INLINE int64_t draw_body(tp_rng_key key, uint64_t block, struct lanes *l)
{
    uint32_t k0 = (uint32_t)key.seed ^ (uint32_t)(key.seed >> 32) * 0x9E3779B9u, k1 = key.stream;
    for (uint32_t i = 0; i < LANES; i++) {
        l->words[0][i] = (uint32_t)(block + i);
        l->words[1][i] = (uint32_t)((block + i) >> 32);
        l->words[2][i] = (uint32_t)key.step;
        l->words[3][i] = (uint32_t)(key.step >> 32);
    }
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
        for (int i = 0; i < LANES; i++) {
            uint64_t a = (uint64_t)0xD2511F53u * l->words[0][i], b = (uint64_t)0xCD9E8D57u * l->words[2][i];
            l->words[0][i] = (uint32_t)(b >> 32) ^ l->words[1][i] ^ k0;
            l->words[1][i] = (uint32_t)b;
            l->words[2][i] = (uint32_t)(a >> 32) ^ l->words[3][i] ^ k1;
            l->words[3][i] = (uint32_t)a;
        }
    return LANES;
}

TP_TWICE(int64_t, draw, (tp_rng_key key, uint64_t block, struct lanes *l), (key, block, l))

#define PER_LANES (LANES * TP_QUANTILES_BLOCK)

static void look_up16(const struct lanes *l, const uint16_t *quantiles, uint16_t out[PER_LANES])
{
    for (int block = 0; block < LANES; block++)
        for (int w = 0; w < 4; w++) {
            uint32_t bits = l->words[w][block];
            out[TP_QUANTILES_BLOCK * block + 2 * w] = quantiles[bits & 0xffff];
            out[TP_QUANTILES_BLOCK * block + 2 * w + 1] = quantiles[bits >> 16];
        }
}

static void look_up32(const struct lanes *l, const uint32_t *quantiles, uint32_t out[PER_LANES])
{
    for (int block = 0; block < LANES; block++)
        for (int w = 0; w < 4; w++) {
            uint32_t bits = l->words[w][block];
            out[TP_QUANTILES_BLOCK * block + 2 * w] = quantiles[bits & 0xffff];
            out[TP_QUANTILES_BLOCK * block + 2 * w + 1] = quantiles[bits >> 16];
        }
}

void tp_quantiles_fill(const void *quantiles, size_t value_bytes, tp_rng_key key, uint64_t first, int64_t n, void *out)
{
    for (int64_t at = 0; at < n; at += PER_LANES) {
        struct lanes l;
        union {
            uint16_t half[PER_LANES];
            uint32_t full[PER_LANES];
        } values;
        draw(key, (first + (uint64_t)at) / TP_QUANTILES_BLOCK, &l);
        if (value_bytes == 2)
            look_up16(&l, quantiles, values.half);
        else
            look_up32(&l, quantiles, values.full);
        memcpy((char *)out + (size_t)at * value_bytes, &values,
               (size_t)(n - at < PER_LANES ? n - at : PER_LANES) * value_bytes);
    }
}
