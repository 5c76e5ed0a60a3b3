/* The vector kernels of one instruction set, as a table.
 *
 * The sources in simd/ are compiled once for each set (simd_avx512.c, simd_avx2.c, simd_generic.c include them all);
 * simd.c defines tp_cpu_<kernel> for these names and chooses the table by cpu->isa. */
#ifndef TP_BACKEND_CPU_SIMD_H
#define TP_BACKEND_CPU_SIMD_H

#include "backend/cpu/cpu.h"

/* All kernels but the matrix products. */
/* clang-format off */
#define TP_SIMD_KERNELS(X) \
    X(column_sum) X(embedding) X(embedding_backward) X(gather_rows) X(scatter_rows) X(rmsnorm) \
    X(rmsnorm_backward) X(layernorm) X(layernorm_backward) X(rope_table) X(rope) X(attention) \
    X(attention_backward) X(swiglu) X(swiglu_backward) X(gelu) X(gelu_backward) X(add) \
    X(scale) X(dropout) X(cross_entropy) X(add_loss) X(grad_norm) X(adamw) X(sgd)
/* clang-format on */

typedef struct tp_simd {
#define X(name) tp_kernel name;
    TP_SIMD_KERNELS(X)
#undef X
} tp_simd;

#if defined(__x86_64__)
extern const tp_simd tp_simd_avx512, tp_simd_avx2;
#endif
extern const tp_simd tp_simd_generic;

#endif
