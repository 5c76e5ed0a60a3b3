/* tp_cpu_<kernel> for the vector kernels: each calls its version for the device's instruction set. */
#include "backend/cpu/simd.h"

static const tp_simd *table_for(tp_cpu_isa isa)
{
#if defined(__x86_64__)
    if (isa == TP_CPU_AVX512) return &tp_simd_avx512;
    if (isa == TP_CPU_AVX2) return &tp_simd_avx2;
#endif
    (void)isa;
    return &tp_simd_generic;
}

#define X(name)                                                                                                                \
    tp_status tp_cpu_##name(tp_ctx *ctx, const void *arguments)                                                                \
    {                                                                                                                          \
        return table_for(tp_cpu_of(ctx)->isa)->name(ctx, arguments);                                                           \
    }
TP_SIMD_KERNELS(X)
#undef X
