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

#if TP_SIMD_BITS == 512 /* ------------------------------------------------------------------------------- AVX-512 */
#include <immintrin.h>
#define VL 16
typedef __m512 vf;
typedef __mmask16 vm;

TP_INLINE vf v_set(float x) { return _mm512_set1_ps(x); }
TP_INLINE vf v_load(const float *p) { return _mm512_loadu_ps(p); }
TP_INLINE void v_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
TP_INLINE vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
TP_INLINE vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
TP_INLINE vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
TP_INLINE vf v_sqrt(vf a) { return _mm512_sqrt_ps(a); }
TP_INLINE vf v_abs(vf a) { return _mm512_abs_ps(a); }
TP_INLINE vf v_copysign(vf a, vf sign)
{
    const __m512i bit = _mm512_set1_epi32(INT32_MIN);
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(bit, _mm512_castps_si512(sign), _mm512_castps_si512(a), 0xca));
}
TP_INLINE vf v_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
TP_INLINE vm v_lt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
TP_INLINE vm v_and(vm a, vm b) { return a & b; }
TP_INLINE vf v_pick(vm m, vf a, vf b) { return _mm512_mask_blend_ps(m, b, a); }
TP_INLINE vf v_scale_unless(vm zero, vf a, vf n) /* a 2^n, or 0 */
{
    return _mm512_maskz_scalef_ps((__mmask16)~zero, a, n);
}

TP_INLINE __mmask16 v_tail(int64_t n) { return n >= VL ? (__mmask16)0xffff : (__mmask16)((1u << n) - 1); }
TP_INLINE vf v_load_n(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(v_tail(n), p); }
TP_INLINE void v_store_n(float *p, int64_t n, vf x) { _mm512_mask_storeu_ps(p, v_tail(n), x); }

TP_INLINE __m512i v_bf16_bits(vf x) /* rounded, in the low half of each lane */
{
    __m512i b = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(b, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __m512i nan = _mm512_or_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(64));
    return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), r, nan);
}
TP_INLINE vf v_round_bf16(vf x) { return _mm512_castsi512_ps(_mm512_slli_epi32(v_bf16_bits(x), 16)); }
TP_INLINE vf v_load_bf16(const uint16_t *p, int64_t n)
{
    __m256i h = _mm256_maskz_loadu_epi16(v_tail(n), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
TP_INLINE void v_store_bf16(uint16_t *p, int64_t n, vf x)
{
    _mm256_mask_storeu_epi16(p, v_tail(n), _mm512_cvtepi32_epi16(v_bf16_bits(x)));
}
TP_INLINE __m256 v_low(vf x) { return _mm512_castps512_ps256(x); }
TP_INLINE __m256 v_high(vf x) { return _mm512_extractf32x8_ps(x, 1); }
TP_INLINE float v_sum(vf x)
{
    __m256 y = v_low(x) + v_high(x);
    __m128 z = _mm256_castps256_ps128(y) + _mm256_extractf128_ps(y, 1);
    z = z + _mm_movehl_ps(z, z);
    return z[0] + z[1];
}
TP_INLINE float v_greatest(vf x)
{
    __m256 y = _mm256_max_ps(v_low(x), v_high(x));
    __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_max_ps(z, _mm_movehl_ps(z, z));
    return z[0] > z[1] ? z[0] : z[1];
}
TP_INLINE double v_sum_squares(vf x) /* in double */
{
    __m512d a = _mm512_cvtps_pd(v_low(x)), b = _mm512_cvtps_pd(v_high(x));
    return _mm512_reduce_add_pd(_mm512_fmadd_pd(a, a, _mm512_mul_pd(b, b)));
}

typedef __m512i vu;
TP_INLINE vu vu_load(const uint64_t *p) { return _mm512_loadu_si512(p); }
TP_INLINE void vu_store(uint32_t *p, vu x) { _mm512_storeu_si512(p, x); }
TP_INLINE vu vu_set(uint64_t x) { return _mm512_set1_epi64((long long)x); }
TP_INLINE vu vu_mul32(vu a, vu b) { return _mm512_mul_epu32(a, b); } /* of the low halves */
TP_INLINE vu vu_high(vu a) { return _mm512_srli_epi64(a, 32); }
TP_INLINE vu vu_pack(vu low, vu high) { return _mm512_mask_blend_epi32(0xaaaa, low, _mm512_slli_epi64(high, 32)); }
TP_INLINE vu vu_interleave_even(vu a, vu b) { return _mm512_unpacklo_epi64(a, b); } /* a0 b0 a2 b2 ... */
TP_INLINE vu vu_interleave_odd(vu a, vu b) { return _mm512_unpackhi_epi64(a, b); }  /* a1 b1 a3 b3 ... */
/* Lanes whose 32-bit number, shifted right by 8, is not below the threshold. */
TP_INLINE vm v_keep(const uint32_t *random, int32_t threshold)
{
    __m512i u = _mm512_srli_epi32(_mm512_loadu_si512(random), 8);
    return _mm512_cmp_epi32_mask(u, _mm512_set1_epi32(threshold), _MM_CMPINT_NLT);
}

#elif TP_SIMD_BITS == 256 /* -------------------------------------------------------------------------------- AVX2 */
#include <immintrin.h>
#define VL 8
typedef __m256 vf;
typedef __m256 vm;

TP_INLINE vf v_set(float x) { return _mm256_set1_ps(x); }
TP_INLINE vf v_load(const float *p) { return _mm256_loadu_ps(p); }
TP_INLINE void v_store(float *p, vf x) { _mm256_storeu_ps(p, x); }
TP_INLINE vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
TP_INLINE vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
TP_INLINE vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
TP_INLINE vf v_sqrt(vf a) { return _mm256_sqrt_ps(a); }
TP_INLINE vf v_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
TP_INLINE vf v_copysign(vf a, vf sign)
{
    const __m256 bit = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(bit, a), _mm256_and_ps(bit, sign));
}
TP_INLINE vf v_round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
TP_INLINE vf v_scale_unless(__m256 zero, vf a, vf n) /* a 2^n, or 0; in two steps, since 2^n may be out of range */
{
    __m256i i = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(i, 1), rest = _mm256_sub_epi32(i, half);
    const __m256i bias = _mm256_set1_epi32(127);
    vf first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
    vf second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
    return _mm256_andnot_ps(zero, a * first * second);
}
TP_INLINE vm v_lt(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
TP_INLINE vm v_and(vm a, vm b) { return _mm256_and_ps(a, b); }
TP_INLINE vf v_pick(vm m, vf a, vf b) { return _mm256_blendv_ps(b, a, m); }

TP_INLINE __m256i v_tail(int64_t n)
{
    int first = n >= VL ? VL : (int)n;
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
TP_INLINE vf v_load_n(const float *p, int64_t n) { return n >= VL ? v_load(p) : _mm256_maskload_ps(p, v_tail(n)); }
TP_INLINE void v_store_n(float *p, int64_t n, vf x)
{
    if (n >= VL)
        v_store(p, x);
    else
        _mm256_maskstore_ps(p, v_tail(n), x);
}

TP_INLINE __m256i v_bf16_bits(vf x) /* rounded, in the low half of each lane */
{
    __m256i b = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(b, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_or_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(64));
    return _mm256_blendv_epi8(r, nan, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
TP_INLINE vf v_round_bf16(vf x) { return _mm256_castsi256_ps(_mm256_slli_epi32(v_bf16_bits(x), 16)); }
TP_INLINE vf v_load_bf16(const uint16_t *p, int64_t n)
{
    __m128i h = _mm_setzero_si128();
    if (n >= VL)
        h = _mm_loadu_si128((const __m128i *)p);
    else
        memcpy(&h, p, (size_t)n * 2);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
TP_INLINE void v_store_bf16(uint16_t *p, int64_t n, vf x)
{
    __m256i b = v_bf16_bits(x);
    __m128i h = _mm_packus_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    if (n >= VL)
        _mm_storeu_si128((__m128i *)p, h);
    else
        memcpy(p, &h, (size_t)n * 2);
}
TP_INLINE float v_sum(vf x)
{
    __m128 z = _mm256_castps256_ps128(x) + _mm256_extractf128_ps(x, 1);
    z = z + _mm_movehl_ps(z, z);
    return z[0] + z[1];
}
TP_INLINE float v_greatest(vf x)
{
    __m128 z = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    z = _mm_max_ps(z, _mm_movehl_ps(z, z));
    return z[0] > z[1] ? z[0] : z[1];
}
TP_INLINE double v_sum_squares(vf x) /* in double */
{
    __m256d a = _mm256_cvtps_pd(_mm256_castps256_ps128(x)), b = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
    __m256d s = _mm256_fmadd_pd(a, a, _mm256_mul_pd(b, b));
    return (s[0] + s[2]) + (s[1] + s[3]);
}

typedef __m256i vu;
TP_INLINE vu vu_load(const uint64_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
TP_INLINE void vu_store(uint32_t *p, vu x) { _mm256_storeu_si256((__m256i *)p, x); }
TP_INLINE vu vu_set(uint64_t x) { return _mm256_set1_epi64x((long long)x); }
TP_INLINE vu vu_mul32(vu a, vu b) { return _mm256_mul_epu32(a, b); } /* of the low halves */
TP_INLINE vu vu_high(vu a) { return _mm256_srli_epi64(a, 32); }
TP_INLINE vu vu_pack(vu low, vu high) { return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xaa); }
TP_INLINE vu vu_interleave_even(vu a, vu b) { return _mm256_unpacklo_epi64(a, b); } /* a0 b0 a2 b2 ... */
TP_INLINE vu vu_interleave_odd(vu a, vu b) { return _mm256_unpackhi_epi64(a, b); }  /* a1 b1 a3 b3 ... */
/* Lanes whose 32-bit number, shifted right by 8, is not below the threshold. */
TP_INLINE vm v_keep(const uint32_t *random, int32_t threshold)
{
    __m256i u = _mm256_srli_epi32(_mm256_loadu_si256((const __m256i *)random), 8);
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(u, _mm256_set1_epi32(threshold - 1)));
}

#else /* --------------------------------------------------- any CPU: the compiler's own vectors of four, or scalars */
#define VL 4
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vm __attribute__((vector_size(16)));
typedef uint32_t vw __attribute__((vector_size(16)));

TP_INLINE vf v_set(float x) { return (vf){x, x, x, x}; }
TP_INLINE vf v_load(const float *p)
{
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}
TP_INLINE void v_store(float *p, vf x) { memcpy(p, &x, sizeof x); }
TP_INLINE vf v_fma(vf a, vf b, vf c) { return a * b + c; }
TP_INLINE vm v_lt(vf a, vf b) { return a < b; }
TP_INLINE vm v_and(vm a, vm b) { return a & b; }
TP_INLINE vf v_pick(vm m, vf a, vf b) { return (vf)(((vm)a & m) | ((vm)b & ~m)); }
TP_INLINE vf v_max(vf a, vf b) { return v_pick(a > b, a, b); }
TP_INLINE vf v_min(vf a, vf b) { return v_pick(a < b, a, b); }
TP_INLINE vf v_sqrt(vf a) { return (vf){sqrtf(a[0]), sqrtf(a[1]), sqrtf(a[2]), sqrtf(a[3])}; }
TP_INLINE vf v_abs(vf a) { return (vf)((vm)a & INT32_MAX); }
TP_INLINE vf v_copysign(vf a, vf sign) { return (vf)(((vm)a & INT32_MAX) | ((vm)sign & INT32_MIN)); }
TP_INLINE vf v_round(vf a) { return (a + 12582912.0f) - 12582912.0f; } /* |a| < 2^22; 1.5 * 2^23 pushes the fraction out */
TP_INLINE vf v_scale_unless(vm zero, vf a, vf n) /* a 2^n, or 0; in two steps, since 2^n may be out of range */
{
    vm i = (vm)(n + 12582912.0f) - 0x4b400000, half = i >> 1; /* the bits of 1.5 * 2^23; defined for NaN too */
    vf scaled = a * (vf)((vw)(half + 127) << 23) * (vf)((vw)(i - half + 127) << 23);
    return (vf)((vm)scaled & ~zero);
}

TP_INLINE vf v_load_n(const float *p, int64_t n)
{
    vf x = {0, 0, 0, 0};
    memcpy(&x, p, n >= VL ? sizeof x : (size_t)n * 4);
    return x;
}
TP_INLINE void v_store_n(float *p, int64_t n, vf x) { memcpy(p, &x, n >= VL ? sizeof x : (size_t)n * 4); }

TP_INLINE vw v_bf16_bits(vf x) /* rounded, in the low half of each lane */
{
    vw b = (vw)x, nan = (vw)(x != x);
    return (((b + 0x7fff + ((b >> 16) & 1)) >> 16) & ~nan) | (((b >> 16) | 64) & nan);
}
TP_INLINE vf v_round_bf16(vf x) { return (vf)(v_bf16_bits(x) << 16); }
TP_INLINE vf v_load_bf16(const uint16_t *p, int64_t n)
{
    uint16_t h[VL] = {0};
    memcpy(h, p, n >= VL ? sizeof h : (size_t)n * 2);
    return (vf)((vw){h[0], h[1], h[2], h[3]} << 16);
}
TP_INLINE void v_store_bf16(uint16_t *p, int64_t n, vf x)
{
    vw b = v_bf16_bits(x);
    uint16_t h[VL] = {(uint16_t)b[0], (uint16_t)b[1], (uint16_t)b[2], (uint16_t)b[3]};
    memcpy(p, h, n >= VL ? sizeof h : (size_t)n * 2);
}
TP_INLINE float v_sum(vf x) { return (x[0] + x[2]) + (x[1] + x[3]); }
TP_INLINE float v_greatest(vf x)
{
    float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
    return a > b ? a : b;
}
TP_INLINE double v_sum_squares(vf x) /* in double */
{
    double a = x[0], b = x[1], c = x[2], d = x[3];
    return (a * a + c * c) + (b * b + d * d);
}

typedef uint64_t vu __attribute__((vector_size(16)));
TP_INLINE vu vu_load(const uint64_t *p)
{
    vu x;
    memcpy(&x, p, sizeof x);
    return x;
}
TP_INLINE void vu_store(uint32_t *p, vu x) { memcpy(p, &x, sizeof x); }
TP_INLINE vu vu_set(uint64_t x) { return (vu){x, x}; }
TP_INLINE vu vu_mul32(vu a, vu b) /* of the low halves */
{
    return (vu){(uint64_t)(uint32_t)a[0] * (uint32_t)b[0], (uint64_t)(uint32_t)a[1] * (uint32_t)b[1]};
}
TP_INLINE vu vu_high(vu a) { return a >> 32; }
TP_INLINE vu vu_pack(vu low, vu high) { return (low & 0xffffffffu) | high << 32; }
TP_INLINE vu vu_interleave_even(vu a, vu b) { return (vu){a[0], b[0]}; }
TP_INLINE vu vu_interleave_odd(vu a, vu b) { return (vu){a[1], b[1]}; }
/* Lanes whose 32-bit number, shifted right by 8, is not below the threshold. */
TP_INLINE vm v_keep(const uint32_t *random, int32_t threshold)
{
    vw u;
    memcpy(&u, random, sizeof u);
    return (vm)(u >> 8) >= threshold;
}
#endif /* -------------------------------------------------------------------------------------- common to all three */

/* v_max(a, b) and v_min(a, b) give b where either is NaN; keep the value that may be NaN on the right. */

/* 0, 1, 2, ... */
TP_INLINE vf v_iota(void)
{
    static const float lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return v_load(lanes);
}

/* e^x within 1.1 ulp: x = n ln 2 + r, a polynomial of degree 6 in r (minimax, error 3e-9), times 2^n. Overflows to
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

/* tanh: an odd polynomial below 0.625 (minimax, relative error 5e-9), else 1 - 2 / (e^2x + 1). */
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

/* erf: an odd polynomial below 0.95, else 1 - exp(-q(|x|)) with q fitted to -log erfc up to 4, where erf rounds to 1. */
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
