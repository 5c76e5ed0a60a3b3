/* Vectors of floats: the few operations the CPU kernels need, for the instruction set that TP_SIMD_BITS names.
 *
 * Every kernel of this folder is written once over these operations and compiled three times: simd_avx512.c,
 * simd_avx2.c and simd_generic.c set TP_SIMD_BITS (512, 256, 128) and the compiler's target, then include the kernels.
 * So the names below need no suffix, and + - * / on vectors are the language's own.
 *
 *   vf   VL floats          vm   a mask of VL lanes, from v_lt          vu   VL/2 64-bit integers, for the generator
 *
 * Products and sums are rounded one by one unless v_fma says otherwise (which the generic set also rounds twice). */
#ifndef TP_BACKEND_CPU_SIMD_VEC_H
#define TP_BACKEND_CPU_SIMD_VEC_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "base/dtype.h"

#define TP_INLINE static inline __attribute__((always_inline, unused))

#if TP_SIMD_BITS == 512
#include "backend/cpu/simd/vec_avx512.h"
#elif TP_SIMD_BITS == 256
#include "backend/cpu/simd/vec_avx2.h"
#else
#include "backend/cpu/simd/vec_generic.h"
#endif

/* v_max(a, b) and v_min(a, b) give b where either is NaN; keep the value that may be NaN on the right. */

/* 0, 1, 2, ... */
TP_INLINE vf v_iota(void)
{
    static const float lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return v_load(lanes);
}

/* e^x within 1.2 ulp: x = n ln 2 + r, a polynomial of degree 6 in r (minimax, error 3e-9), times 2^n. Overflows to
 * infinity; results below 2^-126 are 0, since denormals cost a hundred times as much and nobody here needs them. */
TP_INLINE vf v_exp(vf x)
{
    vm tiny = v_lt(x, v_set(-87.3365f));
    x = v_max(v_set(-87.3365f), v_min(v_set(90.0f), x));
    vf n = v_round(x * v_set(1.44269504f));
    vf r = v_fma(n, v_set(-0.693359375f), x); /* ln 2 in two parts; the first product is exact */
    r = v_fma(n, v_set(2.12194440e-4f), r);
    vf p = v_fma(v_set(1.381459879e-3f), r, v_set(8.368716575e-3f));
    p = v_fma(p, r, v_set(4.166838899e-2f));
    p = v_fma(p, r, v_set(1.666652113e-1f));
    p = v_fma(p, r, v_set(0.5f));
    p = v_fma(p, r * r, r) + v_set(1.0f);
    return v_scale_unless(tiny, p, n);
}

/* tanh within 1.5 ulp: an odd polynomial below 0.625 (minimax, relative error 5e-9), else 1 - 2 / (e^2x + 1). */
TP_INLINE vf v_tanh(vf x)
{
    vf a = v_abs(x), z = x * x;
    vf p = v_fma(v_set(-5.705004558e-3f), z, v_set(2.063910291e-2f));
    p = v_fma(p, z, v_set(-5.373971909e-2f));
    p = v_fma(p, z, v_set(1.333144158e-1f));
    p = v_fma(p, z, v_set(-3.333328068e-1f));
    vf small = v_fma(p * z, x, x);
    vf large = v_set(1.0f) - v_set(2.0f) / (v_exp(a + a) + v_set(1.0f));
    return v_pick(v_lt(a, v_set(0.625f)), small, v_copysign(large, x));
}

/* erf within 1.7 ulp: an odd polynomial below 0.95, else 1 - exp(-q(|x|)) with q fitted to -log erfc up to 4, where erf rounds
 * to 1. */
TP_INLINE vf v_erf(vf x)
{
    vf a = v_min(v_set(4.0f), v_abs(x)), z = x * x;
    vf p = v_fma(v_set(-5.862123217e-4f), z, v_set(4.967517219e-3f));
    p = v_fma(p, z, v_set(-2.674887329e-2f));
    p = v_fma(p, z, v_set(1.128132120e-1f));
    p = v_fma(p, z, v_set(-3.761244714e-1f));
    p = v_fma(p, z, v_set(1.283791363e-1f));
    vf small = v_fma(p, x, x);
    vf q = v_fma(v_set(-1.971782767e-4f), a, v_set(3.055575304e-3f));
    q = v_fma(q, a, v_set(-2.227696590e-2f));
    q = v_fma(q, a, v_set(1.040371209e-1f));
    q = v_fma(q, a, v_set(6.370599866e-1f));
    q = v_fma(q, a, v_set(1.127749443f));
    q = v_fma(q, a, v_set(1.775253186e-4f));
    vf large = v_set(1.0f) - v_exp(v_set(0.0f) - q);
    return v_pick(v_lt(a, v_set(0.95f)), small, v_copysign(large, x));
}

/* Elements i .. i+VL-1 of a row in f32 or bf16, of which the first n exist (n may exceed VL); the rest reads as 0.
 * `bf16` is a constant wherever it matters, so that each caller compiles to one kind of load. */
TP_INLINE vf v_get(const void *row, bool bf16, int64_t i, int64_t n)
{
    return bf16 ? v_load_bf16((const uint16_t *)row + i, n) : v_load_n((const float *)row + i, n);
}
TP_INLINE void v_put(void *row, bool bf16, int64_t i, int64_t n, vf x)
{
    if (bf16)
        v_store_bf16((uint16_t *)row + i, n, x);
    else
        v_store_n((float *)row + i, n, x);
}

#endif
