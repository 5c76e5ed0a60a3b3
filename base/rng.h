/* Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
 * No state: a number is a function of (seed, stream, step, index), the same on every device, so that recomputed
 * dropout equals the first and a resumed run needs no saved generator. */
#ifndef TP_BASE_RNG_H
#define TP_BASE_RNG_H

#include <stdint.h>

#include "base/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Streams separate uses; dropout sites and tensors add their number to one of these. */
enum {
    TP_STREAM_SHUFFLE = 0x01000000,
    TP_STREAM_INIT = 0x02000000,    /* + parameter number */
    TP_STREAM_DROPOUT = 0x03000000, /* + site number */
    TP_STREAM_SAMPLE = 0x04000000
};

typedef struct tp_rng_key {
    uint64_t seed;
    uint32_t stream;
    uint64_t step;
} tp_rng_key;

#ifdef __CUDACC__
#define TP_HOST_DEVICE __host__ __device__
#else
#define TP_HOST_DEVICE
#endif

/* The bare generator: 128 bits of counter and 64 bits of key give 128 random bits. The same on host and device. */
static inline TP_HOST_DEVICE void tp_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4])
{
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3], k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)b;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)a;
        k0 += 0x9E3779B9u; /* the golden ratio, and the square root of 3 less 1 */
        k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

/* [0, 1) with 24 bits from a 32-bit number. */
static inline TP_HOST_DEVICE float tp_rng_to_uniform(uint32_t u)
{
    return (float)(u >> 8) * 0x1p-24f;
}

/* Four 32-bit numbers of block `block`; index i of a stream is number i % 4 of block i / 4.
 * Counter words: block low, block high, step low, step high; key words: seed low ^ (seed high * 0x9E3779B9), stream. */
TP_API void tp_rng_block(tp_rng_key key, uint64_t block, uint32_t out[4]);
TP_API uint32_t tp_rng_u32(tp_rng_key key, uint64_t index);
/* [0, 1) with 24 bits: (u >> 8) * 2^-24. */
TP_API float tp_rng_uniform(tp_rng_key key, uint64_t index);
/* n values, number first + i for out[i]: low + (high - low) * uniform. */
TP_API void tp_rng_fill_uniform(tp_rng_key key, uint64_t first, int64_t n, float low, float high, float *out);
/* N(mean, std) by Box-Muller on the pairs (0,1), (2,3) of each block, in double precision: with u = (a + 0.5) 2^-32 and
 * v = b 2^-32 of a pair (a, b), the numbers are sqrt(-2 ln u) cos(2 pi v) and sqrt(-2 ln u) sin(2 pi v). */
TP_API void tp_rng_fill_normal(tp_rng_key key, uint64_t first, int64_t n, float mean, float std, float *out);
/* A permutation of 0..n-1 as a function, without a table (cycle-walking Feistel network keyed by the generator):
 * where element i goes. i < n. */
TP_API uint64_t tp_rng_permute(tp_rng_key key, uint64_t n, uint64_t i);

#ifdef __cplusplus
}
#endif
#endif
