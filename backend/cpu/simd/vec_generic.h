/* Vectors of 4 floats for any CPU, in the compiler's own vector types. Included by vec.h, which says what the names mean. */
#ifndef TP_BACKEND_CPU_SIMD_VEC_GENERIC_H
#define TP_BACKEND_CPU_SIMD_VEC_GENERIC_H

#define VL 4
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vm __attribute__((vector_size(16)));
typedef uint32_t vw __attribute__((vector_size(16)));

TP_INLINE vf v_set(float x)
{
    return (vf){x, x, x, x};
}
TP_INLINE vf v_load(const float *p)
{
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}
TP_INLINE void v_store(float *p, vf x)
{
    memcpy(p, &x, sizeof x);
}
TP_INLINE vf v_fma(vf a, vf b, vf c)
{
    return a * b + c;
}
TP_INLINE vm v_lt(vf a, vf b)
{
    return a < b;
}
TP_INLINE vm v_and(vm a, vm b)
{
    return a & b;
}
TP_INLINE vf v_pick(vm m, vf a, vf b)
{
    return (vf)(((vm)a & m) | ((vm)b & ~m));
}
TP_INLINE vf v_max(vf a, vf b)
{
    return v_pick(a > b, a, b);
}
TP_INLINE vf v_min(vf a, vf b)
{
    return v_pick(a < b, a, b);
}
TP_INLINE vf v_sqrt(vf a)
{
    return (vf){sqrtf(a[0]), sqrtf(a[1]), sqrtf(a[2]), sqrtf(a[3])};
}
TP_INLINE vf v_abs(vf a)
{
    return (vf)((vm)a & INT32_MAX);
}
TP_INLINE vf v_copysign(vf a, vf sign)
{
    return (vf)(((vm)a & INT32_MAX) | ((vm)sign & INT32_MIN));
}
TP_INLINE vf v_round(vf a)
{
    return (a + 12582912.0f) - 12582912.0f;
} /* |a| < 2^22; 1.5 * 2^23 pushes the fraction out */
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
TP_INLINE void v_store_n(float *p, int64_t n, vf x)
{
    memcpy(p, &x, n >= VL ? sizeof x : (size_t)n * 4);
}

TP_INLINE vw v_bf16_bits(vf x) /* rounded, in the low half of each lane */
{
    vw b = (vw)x, nan = (vw)(x != x);
    return (((b + 0x7fff + ((b >> 16) & 1)) >> 16) & ~nan) | (((b >> 16) | 64) & nan);
}
TP_INLINE vf v_round_bf16(vf x)
{
    return (vf)(v_bf16_bits(x) << 16);
}
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
TP_INLINE float v_sum(vf x)
{
    return (x[0] + x[2]) + (x[1] + x[3]);
}
/* The sums of four vectors. */
TP_INLINE void v_sum4(vf a, vf b, vf c, vf d, float to[4])
{
    to[0] = v_sum(a), to[1] = v_sum(b), to[2] = v_sum(c), to[3] = v_sum(d);
}
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
TP_INLINE void vu_store(uint32_t *p, vu x)
{
    memcpy(p, &x, sizeof x);
}
TP_INLINE vu vu_set(uint64_t x)
{
    return (vu){x, x};
}
TP_INLINE vu vu_mul32(vu a, vu b) /* of the low halves */
{
    return (vu){(uint64_t)(uint32_t)a[0] * (uint32_t)b[0], (uint64_t)(uint32_t)a[1] * (uint32_t)b[1]};
}
TP_INLINE vu vu_high(vu a)
{
    return a >> 32;
}
TP_INLINE vu vu_pack(vu low, vu high)
{
    return (low & 0xffffffffu) | high << 32;
}
TP_INLINE vu vu_interleave_even(vu a, vu b)
{
    return (vu){a[0], b[0]};
}
TP_INLINE vu vu_interleave_odd(vu a, vu b)
{
    return (vu){a[1], b[1]};
}
/* Lanes whose 32-bit number, shifted right by 8, is not below the threshold. */
TP_INLINE vm v_keep(const uint32_t *random, int32_t threshold)
{
    vw u;
    memcpy(&u, random, sizeof u);
    return (vm)(u >> 8) >= threshold;
}

#endif
