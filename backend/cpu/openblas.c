#include "backend/cpu/openblas.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"

/* From cblas.h. */
enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };

/* POSIX lets the object pointer of dlsym be a function pointer, ISO C does not convert it: copy the bytes. */
static bool find(void *library, const char *name, void *function)
{
    void *symbol = dlsym(library, name);
    memcpy(function, &symbol, sizeof symbol);
    return symbol != NULL;
}

tp_openblas *tp_openblas_open(bool avx512)
{
    const char *want = getenv("TAPEFT_BLAS");
    if (want != NULL && strcmp(want, "none") == 0) return NULL;
    if (avx512 && (want == NULL || strcmp(want, "system") != 0)) {
        unsetenv("OPENBLAS_CORETYPE");
        unsetenv("OPENBLAS_L2_SIZE");
    }
    tp_openblas *blas = tp_alloc(NULL, 1, sizeof *blas);
    if (blas == NULL) return NULL;
    blas->library = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL);
    if (blas->library == NULL || !find(blas->library, "cblas_sgemm", &blas->cblas_sgemm) ||
        !find(blas->library, "openblas_set_num_threads", &blas->set_num_threads) ||
        !find(blas->library, "openblas_get_corename", &blas->get_corename)) {
        tp_openblas_close(blas);
        return NULL;
    }
    return blas;
}

void tp_openblas_close(tp_openblas *blas)
{
    if (blas == NULL) return;
    if (blas->library != NULL) dlclose(blas->library);
    tp_free(blas);
}

const char *tp_openblas_core(const tp_openblas *blas)
{
    return blas->get_corename();
}

void tp_openblas_sgemm(const tp_openblas *blas, bool nt, int64_t n, int64_t m, int64_t k, const float *a, int64_t lda,
                       const float *b, int64_t ldb, float beta, float *c, int64_t ldc)
{
    blas->cblas_sgemm(ROW_MAJOR, NO_TRANS, nt ? TRANS : NO_TRANS, (int)n, (int)m, (int)k, 1.0f, a, (int)lda, b, (int)ldb, beta,
                      c, (int)ldc);
}
