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

/* Four 32-bit numbers of block `block`; index i of a stream is number i % 4 of block i / 4.
 * Counter words: block low, block high, step low, step high; key words: seed low ^ (seed high * 0x9E3779B9), stream. */
TP_API void tp_rng_block(tp_rng_key key, uint64_t block, uint32_t out[4]);
TP_API uint32_t tp_rng_u32(tp_rng_key key, uint64_t index);
/* [0, 1) with 24 bits: (u >> 8) * 2^-24. */
TP_API float tp_rng_uniform(tp_rng_key key, uint64_t index);
/* n values, number first + i for out[i]. */
TP_API void tp_rng_fill_uniform(tp_rng_key key, uint64_t first, int64_t n, float low, float high, float *out);
/* N(mean, std) by Box-Muller on the pairs (0,1), (2,3) of each block. */
TP_API void tp_rng_fill_normal(tp_rng_key key, uint64_t first, int64_t n, float mean, float std, float *out);
/* A permutation of 0..n-1 as a function, without a table (cycle-walking Feistel network keyed by the generator). */
TP_API uint64_t tp_rng_permute(tp_rng_key key, uint64_t n, uint64_t i);

#ifdef __cplusplus
}
#endif
#endif
