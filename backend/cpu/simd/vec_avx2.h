/* Vectors of 8 floats: AVX2 with FMA. Included by vec.h, which says what the names mean. */
#ifndef TP_BACKEND_CPU_SIMD_VEC_AVX2_H
#define TP_BACKEND_CPU_SIMD_VEC_AVX2_H

#include <immintrin.h>
#define VL 8
typedef __m256 vf;
typedef __m256 vm;

TP_INLINE vf v_set(float x)
{
    return _mm256_set1_ps(x);
}
TP_INLINE vf v_load(const float *p)
{
    return _mm256_loadu_ps(p);
}
TP_INLINE void v_store(float *p, vf x)
{
    _mm256_storeu_ps(p, x);
}
TP_INLINE vf v_fma(vf a, vf b, vf c)
{
    return _mm256_fmadd_ps(a, b, c);
}
TP_INLINE vf v_max(vf a, vf b)
{
    return _mm256_max_ps(a, b);
}
TP_INLINE vf v_min(vf a, vf b)
{
    return _mm256_min_ps(a, b);
}
TP_INLINE vf v_sqrt(vf a)
{
    return _mm256_sqrt_ps(a);
}
TP_INLINE vf v_abs(vf a)
{
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a);
}
TP_INLINE vf v_copysign(vf a, vf sign)
{
    const __m256 bit = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(bit, a), _mm256_and_ps(bit, sign));
}
TP_INLINE vf v_round(vf a)
{
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
TP_INLINE vf v_scale_unless(__m256 zero, vf a, vf n) /* a 2^n, or 0; in two steps, since 2^n may be out of range */
{
    __m256i i = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(i, 1), rest = _mm256_sub_epi32(i, half);
    const __m256i bias = _mm256_set1_epi32(127);
    vf first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
    vf second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
    return _mm256_andnot_ps(zero, a * first * second);
}
TP_INLINE vm v_lt(vf a, vf b)
{
    return _mm256_cmp_ps(a, b, _CMP_LT_OQ);
}
TP_INLINE vm v_and(vm a, vm b)
{
    return _mm256_and_ps(a, b);
}
TP_INLINE vf v_pick(vm m, vf a, vf b)
{
    return _mm256_blendv_ps(b, a, m);
}

TP_INLINE __m256i v_tail(int64_t n)
{
    int first = n >= VL ? VL : (int)n;
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
TP_INLINE vf v_load_n(const float *p, int64_t n)
{
    return n >= VL ? v_load(p) : _mm256_maskload_ps(p, v_tail(n));
}
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
TP_INLINE vf v_round_bf16(vf x)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(v_bf16_bits(x), 16));
}
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
/* The sums of four vectors. */
TP_INLINE void v_sum4(vf a, vf b, vf c, vf d, float to[4])
{
    vf ab = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b), cd = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
    vf all = _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xee);
    _mm_storeu_ps(to, _mm256_castps256_ps128(all) + _mm256_extractf128_ps(all, 1));
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
TP_INLINE vu vu_load(const uint64_t *p)
{
    return _mm256_loadu_si256((const __m256i *)p);
}
TP_INLINE void vu_store(uint32_t *p, vu x)
{
    _mm256_storeu_si256((__m256i *)p, x);
}
TP_INLINE vu vu_set(uint64_t x)
{
    return _mm256_set1_epi64x((long long)x);
}
TP_INLINE vu vu_mul32(vu a, vu b)
{
    return _mm256_mul_epu32(a, b);
} /* of the low halves */
TP_INLINE vu vu_high(vu a)
{
    return _mm256_srli_epi64(a, 32);
}
TP_INLINE vu vu_pack(vu low, vu high)
{
    return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xaa);
}
TP_INLINE vu vu_interleave_even(vu a, vu b)
{
    return _mm256_unpacklo_epi64(a, b);
} /* a0 b0 a2 b2 ... */
TP_INLINE vu vu_interleave_odd(vu a, vu b)
{
    return _mm256_unpackhi_epi64(a, b);
} /* a1 b1 a3 b3 ... */
/* Lanes whose 32-bit number, shifted right by 8, is not below the threshold. */
TP_INLINE vm v_keep(const uint32_t *random, int32_t threshold)
{
    __m256i u = _mm256_srli_epi32(_mm256_loadu_si256((const __m256i *)random), 8);
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(u, _mm256_set1_epi32(threshold - 1)));
}

#endif
