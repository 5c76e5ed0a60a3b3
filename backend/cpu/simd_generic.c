/* The vector kernels for any CPU, in vectors of four that the compiler maps to what the target has. */
#define TP_SIMD_BITS  128
#define TP_SIMD_TABLE tp_simd_generic
#include "backend/cpu/simd/all.h"
