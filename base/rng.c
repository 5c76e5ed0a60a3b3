/* Counter-based random numbers on top of Philox. */
#include "base/rng.h"

#include <math.h>
#include <stdbool.h>

static void philox_key(tp_rng_key key, uint32_t words[2])
{
    words[0] = (uint32_t)key.seed ^ (uint32_t)(key.seed >> 32) * 0x9E3779B9u;
    words[1] = key.stream;
}

void tp_rng_block(tp_rng_key key, uint64_t block, uint32_t out[4])
{
    uint32_t words[2], counter[4] = {(uint32_t)block, (uint32_t)(block >> 32), (uint32_t)key.step, (uint32_t)(key.step >> 32)};
    philox_key(key, words);
    tp_philox4x32(counter, words, out);
}

uint32_t tp_rng_u32(tp_rng_key key, uint64_t index)
{
    uint32_t four[4];
    tp_rng_block(key, index / 4, four);
    return four[index % 4];
}

float tp_rng_uniform(tp_rng_key key, uint64_t index)
{
    return tp_rng_to_uniform(tp_rng_u32(key, index));
}

void tp_rng_fill_uniform(tp_rng_key key, uint64_t first, int64_t n, float low, float high, float *out)
{
    uint32_t four[4];
    for (int64_t i = 0; i < n; i++) {
        uint64_t index = first + (uint64_t)i;
        if (i == 0 || index % 4 == 0) tp_rng_block(key, index / 4, four);
        out[i] = low + (high - low) * tp_rng_to_uniform(four[index % 4]);
    }
}

/* The four normal numbers of a block. */
static void normal_block(tp_rng_key key, uint64_t block, double out[4])
{
    uint32_t four[4];
    tp_rng_block(key, block, four);
    for (int i = 0; i < 4; i += 2) {
        double radius = sqrt(-2 * log((four[i] + 0.5) * 0x1p-32)), angle = 6.283185307179586477 * (four[i + 1] * 0x1p-32);
        out[i] = radius * cos(angle);
        out[i + 1] = radius * sin(angle);
    }
}

void tp_rng_fill_normal(tp_rng_key key, uint64_t first, int64_t n, float mean, float std, float *out)
{
    double four[4];
    for (int64_t i = 0; i < n; i++) {
        uint64_t index = first + (uint64_t)i;
        if (i == 0 || index % 4 == 0) normal_block(key, index / 4, four);
        out[i] = (float)((double)mean + (double)std * four[index % 4]);
    }
}

/* ---- permutation ----
 * A Feistel network maps pairs (left, right) of h-bit halves one to one, whatever its round function is. So it permutes
 * 0 .. 4^h - 1; a result of n or more is sent through again until it falls below n, which keeps the map one to one on
 * 0 .. n - 1, since a walk from there along a cycle must come back there. 4^h < 4n, so few rounds are expected. */

#define FEISTEL_ROUNDS 6
#define HALF_BITS_MIN  4 /* a network of very few bits mixes badly */

static uint64_t feistel(tp_rng_key key, int half_bits, uint64_t x)
{
    uint32_t mask = (uint32_t)(((uint64_t)1 << half_bits) - 1), out[4], words[2];
    uint32_t left = (uint32_t)(x >> half_bits), right = (uint32_t)x & mask;
    philox_key(key, words);
    for (uint32_t round = 0; round < FEISTEL_ROUNDS; round++) {
        uint32_t counter[4] = {right, round, (uint32_t)key.step, (uint32_t)(key.step >> 32)};
        tp_philox4x32(counter, words, out);
        uint32_t mixed = left ^ (out[0] & mask);
        left = right;
        right = mixed;
    }
    return (uint64_t)left << half_bits | right;
}

uint64_t tp_rng_permute(tp_rng_key key, uint64_t n, uint64_t i)
{
    int half_bits = HALF_BITS_MIN;
    while (half_bits < 32 && (n - 1) >> (2 * half_bits) != 0) half_bits++;
    do i = feistel(key, half_bits, i);
    while (i >= n);
    return i;
}
