/* OpenBLAS, if the machine has it: the f32 engine where we have only plain C, and the peer that benchmarks time us against.
 * Never required.
 *
 * It is loaded at run time because it picks its kernels in a constructor, from OPENBLAS_CORETYPE if that is set; some
 * environments set it to Haswell, which halves the speed of AVX-512 machines. There we clear it, and OPENBLAS_L2_SIZE,
 * before loading. TAPEFT_BLAS=system leaves them alone; TAPEFT_BLAS=none loads nothing. */
#ifndef TP_BACKEND_CPU_OPENBLAS_H
#define TP_BACKEND_CPU_OPENBLAS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

typedef struct tp_openblas {
    void *library;
    /* Row-major c [n, m] = alpha * a op(b) + beta * c; b [m, k] if nt, else [k, m]. */
    void (*cblas_sgemm)(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                        const float *b, int ldb, float beta, float *c, int ldc);
    void (*set_num_threads)(int threads);
    char *(*get_corename)(void);
} tp_openblas;

/* NULL if there is none, or one without the functions above, or out of memory: not an error. */
tp_openblas *tp_openblas_open(bool avx512);
void tp_openblas_close(tp_openblas *blas); /* accepts NULL */

/* "SkylakeX", "Zen", ... */
const char *tp_openblas_core(const tp_openblas *blas);

void tp_openblas_sgemm(const tp_openblas *blas, bool nt, int64_t n, int64_t m, int64_t k, const float *a, int64_t lda,
                       const float *b, int64_t ldb, float beta, float *c, int64_t ldc);

#endif
