/* Vectors of 16 floats: AVX-512 F, BW, VL, DQ. Included by vec.h, which says what the names mean. */
#ifndef TP_BACKEND_CPU_SIMD_VEC_AVX512_H
#define TP_BACKEND_CPU_SIMD_VEC_AVX512_H

#include <immintrin.h>
#define VL 16
typedef __m512 vf;
typedef __mmask16 vm;

TP_INLINE vf v_set(float x)
{
    return _mm512_set1_ps(x);
}
TP_INLINE vf v_load(const float *p)
{
    return _mm512_loadu_ps(p);
}
TP_INLINE void v_store(float *p, vf x)
{
    _mm512_storeu_ps(p, x);
}
TP_INLINE vf v_fma(vf a, vf b, vf c)
{
    return _mm512_fmadd_ps(a, b, c);
}
TP_INLINE vf v_max(vf a, vf b)
{
    return _mm512_max_ps(a, b);
}
TP_INLINE vf v_min(vf a, vf b)
{
    return _mm512_min_ps(a, b);
}
TP_INLINE vf v_sqrt(vf a)
{
    return _mm512_sqrt_ps(a);
}
TP_INLINE vf v_abs(vf a)
{
    return _mm512_abs_ps(a);
}
TP_INLINE vf v_copysign(vf a, vf sign)
{
    const __m512i bit = _mm512_set1_epi32(INT32_MIN);
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(bit, _mm512_castps_si512(sign), _mm512_castps_si512(a), 0xca));
}
TP_INLINE vf v_round(vf a)
{
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
TP_INLINE vm v_lt(vf a, vf b)
{
    return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ);
}
TP_INLINE vm v_and(vm a, vm b)
{
    return a & b;
}
TP_INLINE vf v_pick(vm m, vf a, vf b)
{
    return _mm512_mask_blend_ps(m, b, a);
}
TP_INLINE vf v_scale_unless(vm zero, vf a, vf n) /* a 2^n, or 0 */
{
    return _mm512_maskz_scalef_ps((__mmask16)~zero, a, n);
}

TP_INLINE __mmask16 v_tail(int64_t n)
{
    return n >= VL ? (__mmask16)0xffff : (__mmask16)((1u << n) - 1);
}
TP_INLINE vf v_load_n(const float *p, int64_t n)
{
    return _mm512_maskz_loadu_ps(v_tail(n), p);
}
TP_INLINE void v_store_n(float *p, int64_t n, vf x)
{
    _mm512_mask_storeu_ps(p, v_tail(n), x);
}

TP_INLINE __m512i v_bf16_bits(vf x) /* rounded, in the low half of each lane */
{
    __m512i b = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(b, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __m512i nan = _mm512_or_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(64));
    return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), r, nan);
}
TP_INLINE vf v_round_bf16(vf x)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(v_bf16_bits(x), 16));
}
TP_INLINE vf v_load_bf16(const uint16_t *p, int64_t n)
{
    __m256i h = _mm256_maskz_loadu_epi16(v_tail(n), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
TP_INLINE void v_store_bf16(uint16_t *p, int64_t n, vf x)
{
    _mm256_mask_storeu_epi16(p, v_tail(n), _mm512_cvtepi32_epi16(v_bf16_bits(x)));
}
TP_INLINE __m256 v_low(vf x)
{
    return _mm512_castps512_ps256(x);
}
TP_INLINE __m256 v_high(vf x)
{
    return _mm512_extractf32x8_ps(x, 1);
}
TP_INLINE float v_sum(vf x)
{
    __m256 y = v_low(x) + v_high(x);
    __m128 z = _mm256_castps256_ps128(y) + _mm256_extractf128_ps(y, 1);
    z = z + _mm_movehl_ps(z, z);
    return z[0] + z[1];
}
/* The sums of four vectors. */
TP_INLINE void v_sum4(vf a, vf b, vf c, vf d, float to[4])
{
    vf ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b), cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
    vf all = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
    __m256 y = v_low(all) + v_high(all);
    _mm_storeu_ps(to, _mm256_castps256_ps128(y) + _mm256_extractf128_ps(y, 1));
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
TP_INLINE vu vu_load(const uint64_t *p)
{
    return _mm512_loadu_si512(p);
}
TP_INLINE void vu_store(uint32_t *p, vu x)
{
    _mm512_storeu_si512(p, x);
}
TP_INLINE vu vu_set(uint64_t x)
{
    return _mm512_set1_epi64((long long)x);
}
TP_INLINE vu vu_mul32(vu a, vu b)
{
    return _mm512_mul_epu32(a, b);
} /* of the low halves */
TP_INLINE vu vu_high(vu a)
{
    return _mm512_srli_epi64(a, 32);
}
TP_INLINE vu vu_pack(vu low, vu high)
{
    return _mm512_mask_blend_epi32(0xaaaa, low, _mm512_slli_epi64(high, 32));
}
TP_INLINE vu vu_interleave_even(vu a, vu b)
{
    return _mm512_unpacklo_epi64(a, b);
} /* a0 b0 a2 b2 ... */
TP_INLINE vu vu_interleave_odd(vu a, vu b)
{
    return _mm512_unpackhi_epi64(a, b);
} /* a1 b1 a3 b3 ... */
/* Lanes whose 32-bit number, shifted right by 8, is not below the threshold. */
TP_INLINE vm v_keep(const uint32_t *random, int32_t threshold)
{
    __m512i u = _mm512_srli_epi32(_mm512_loadu_si512(random), 8);
    return _mm512_cmp_epi32_mask(u, _mm512_set1_epi32(threshold), _MM_CMPINT_NLT);
}

#endif
