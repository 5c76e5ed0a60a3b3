/* The vector kernels for AVX2. */
#if defined(__x86_64__)
#include <immintrin.h>

#define TP_SIMD_BITS  256
#define TP_SIMD_TABLE tp_simd_avx2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "backend/cpu/simd/all.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int tp_simd_avx2_is_for_x86; /* ISO C wants a declaration in every file */
#endif
