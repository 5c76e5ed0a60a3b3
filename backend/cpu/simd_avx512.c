/* The vector kernels for AVX-512. */
#if defined(__x86_64__)
#include <immintrin.h>

#define TP_SIMD_BITS  512
#define TP_SIMD_TABLE tp_simd_avx512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#endif

#include "backend/cpu/simd/all.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int tp_simd_avx512_is_for_x86; /* ISO C wants a declaration in every file */
#endif
