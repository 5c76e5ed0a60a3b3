/* cuBLASLt, opened at run time: the binary starts without it, and says what is missing when a GPU is opened.
 *
 * cuBLASLt thinks in columns. A row-major matrix is its transpose, so c = left * right is asked for as c^T = right^T left^T:
 * the library's A is our right, its B our left, its rows are m. Which algorithm suits a shape takes the library tens of
 * microseconds to say, so answers are kept in a table (plans.cuh). It begins with what was measured, and takes the library's
 * word for the rest. */
#include <dlfcn.h>
#include <string.h>

#include "backend/cuda/blas.cuh"
#include "backend/cuda/plans.cuh"
#include "base/mem.h"

/* Products of fewer multiplications are not worth measuring. */
#define TUNE_LEAST   ((double)(1 << 28))
#define TUNE_CHOICES 64
#define TUNE_FINAL   4 /* of them are measured again, in turn with the first */
#define TUNE_REPEATS 3
#define TUNE_ROUNDS  4
#define TUNE_GAIN    0.99f /* what a choice must bring before it replaces the first */

/* The functions that we call, under their names without the prefix. */
#define FUNCTIONS(X)                                                                                                           \
    X(Create)                                                                                                                  \
    X(Destroy)                                                                                                                 \
    X(GetVersion)                                                                                                              \
    X(GetStatusName)                                                                                                           \
    X(Matmul)                                                                                                                  \
    X(MatmulAlgoCheck)                                                                                                         \
    X(MatmulAlgoGetHeuristic)                                                                                                  \
    X(MatmulDescCreate)                                                                                                        \
    X(MatmulDescDestroy)                                                                                                       \
    X(MatmulDescSetAttribute)                                                                                                  \
    X(MatrixLayoutCreate)                                                                                                      \
    X(MatrixLayoutDestroy)                                                                                                     \
    X(MatmulPreferenceCreate)                                                                                                  \
    X(MatmulPreferenceDestroy)                                                                                                 \
    X(MatmulPreferenceSetAttribute)

struct tp_cublas {
    void *library;
    cublasLtHandle_t handle;
    void *workspace;
    tp_plans plans;
    bool tuning;
    char gpu[256]; /* its name */
    tp_plans_owner owner;
#define X(name) decltype(&cublasLt##name) name;
    FUNCTIONS(X)
#undef X
};

/* ---- opening ---- */

static bool find_functions(tp_cublas *blas)
{
#define X(name)                                                                                                                \
    blas->name = reinterpret_cast<decltype(blas->name)>(dlsym(blas->library, "cublasLt" #name));                               \
    if (blas->name == NULL) return false;
    FUNCTIONS(X)
#undef X
    return true;
}

static tp_status fail_blas(tp_ctx *ctx, const tp_cublas *blas, const char *name, cublasStatus_t status)
{
    return tp_fail(ctx, status == CUBLAS_STATUS_ALLOC_FAILED ? TP_NOMEM : TP_DEVICE, "%s: cuBLASLt: %s", name,
                   blas->GetStatusName(status));
}

tp_status tp_cuda_blas_open(tp_ctx *ctx, tp_cuda *cuda)
{
    static const char *const names[] = {"libcublasLt.so.13", "libcublasLt.so.12"};
    tp_cublas *blas = (tp_cublas *)tp_alloc(ctx, 1, sizeof *blas);
    if (blas == NULL) return TP_NOMEM;
    cuda->blas = blas; /* closed with the device, whatever happens here */
    for (int i = 0; i < 2 && blas->library == NULL; i++) blas->library = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
    if (blas->library == NULL)
        return tp_fail(ctx, TP_DEVICE,
                       "cuda:%d: %s is not installed; it comes with the CUDA toolkit and with pip's nvidia-cublas "
                       "(LD_LIBRARY_PATH says where)",
                       cuda->index, names[0]);
    if (!find_functions(blas))
        return tp_fail(ctx, TP_DEVICE, "cuda:%d: libcublasLt lacks a function: %s", cuda->index, dlerror());
    TP_TRY(tp_plans_open(ctx, &blas->plans));
    TP_TRY(tp_cuda_check(ctx, "workspace of cuBLASLt", cudaMalloc(&blas->workspace, TP_CUDA_BLAS_BYTES)));
    cublasStatus_t status = blas->Create(&blas->handle);
    if (status != CUBLAS_STATUS_SUCCESS) return fail_blas(ctx, blas, "open", status);
    cudaDeviceProp properties;
    TP_TRY(tp_cuda_check(ctx, "name of the GPU", cudaGetDeviceProperties(&properties, cuda->index)));
    snprintf(blas->gpu, sizeof blas->gpu, "%s", properties.name);
    blas->owner = {blas->GetVersion(), 10 * properties.major + properties.minor, properties.multiProcessorCount, blas->gpu};
    return tp_plans_load(ctx, &blas->plans, &blas->owner);
}

void tp_cuda_blas_close(tp_cublas *blas)
{
    if (blas == NULL) return;
    if (blas->handle != NULL) (void)blas->Destroy(blas->handle);
    (void)cudaFree(blas->workspace);
    if (blas->library != NULL) (void)dlclose(blas->library);
    tp_plans_close(&blas->plans);
    tp_free(blas);
}

void tp_cuda_blas_version(const tp_cublas *blas, char out[32])
{
    size_t version = blas->GetVersion();
    snprintf(out, 32, "%zu.%zu.%zu", version / 10000, version / 100 % 100, version % 100);
}

/* ---- choosing an algorithm ---- */

/* The power of two, up to 16, that an address is a multiple of. */
static int32_t alignment(const void *address)
{
    uintptr_t bits = reinterpret_cast<uintptr_t>(address) | 16;
    return (int32_t)(bits & (0 - bits));
}

static tp_plan_key key_of(const tp_product *p, bool tf32)
{
    tp_plan_key key;
    memset(&key, 0, sizeof key);
    key.n = p->n, key.m = p->m, key.k = p->k;
    key.left_ld = p->left_ld, key.right_ld = p->right_ld, key.c_ld = p->c.ld, key.add_ld = p->add_ld;
    key.type = p->type, key.tf32 = tf32, key.c_type = p->c.dtype;
    key.left_transposed = p->left_transposed, key.right_transposed = p->right_transposed;
    key.bias = p->bias != NULL, key.beta = p->beta != 0;
    key.left_align = alignment(p->left), key.right_align = alignment(p->right);
    key.c_align = alignment(p->c.data), key.add_align = alignment(p->add), key.bias_align = alignment(p->bias);
    return key;
}

/* What cuBLASLt wants to know of a product; released together. */
typedef struct description {
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t right, left, add, c;
    cublasLtMatmulPreference_t preference;
} description;

static cudaDataType_t type_of(tp_dtype dtype)
{
    return dtype == TP_BF16 ? CUDA_R_16BF : dtype == TP_F16 ? CUDA_R_16F : CUDA_R_32F;
}

/* A row-major matrix with rows of `cols`: for cuBLASLt, columns of that many rows. */
static cublasStatus_t layout(const tp_cublas *blas, cublasLtMatrixLayout_t *out, tp_dtype dtype, int64_t rows, int64_t cols,
                             int64_t ld)
{
    return blas->MatrixLayoutCreate(out, type_of(dtype), (uint64_t)cols, (uint64_t)rows, ld);
}

#define TRY_BLAS(call)                                                                                                         \
    do {                                                                                                                       \
        cublasStatus_t try_ = (call);                                                                                          \
        if (try_ != CUBLAS_STATUS_SUCCESS) return try_;                                                                        \
    } while (0)

static cublasStatus_t describe(const tp_cuda *cuda, const tp_product *p, description *d)
{
    const tp_cublas *blas = cuda->blas;
    const bool tf32 = p->type == TP_F32 && cuda->device.tf32;
    cublasOperation_t yes = CUBLAS_OP_T;
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    TRY_BLAS(blas->MatmulDescCreate(&d->operation, tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F, CUDA_R_32F));
    if (p->right_transposed)
        TRY_BLAS(blas->MatmulDescSetAttribute(d->operation, CUBLASLT_MATMUL_DESC_TRANSA, &yes, sizeof yes));
    if (p->left_transposed) TRY_BLAS(blas->MatmulDescSetAttribute(d->operation, CUBLASLT_MATMUL_DESC_TRANSB, &yes, sizeof yes));
    if (p->bias != NULL) {
        TRY_BLAS(blas->MatmulDescSetAttribute(d->operation, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue));
        TRY_BLAS(blas->MatmulDescSetAttribute(d->operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p->bias, sizeof p->bias));
    }
    TRY_BLAS(
        layout(blas, &d->right, p->type, p->right_transposed ? p->m : p->k, p->right_transposed ? p->k : p->m, p->right_ld));
    TRY_BLAS(layout(blas, &d->left, p->type, p->left_transposed ? p->k : p->n, p->left_transposed ? p->n : p->k, p->left_ld));
    TRY_BLAS(layout(blas, &d->add, p->c.dtype, p->n, p->m, p->add_ld));
    return layout(blas, &d->c, p->c.dtype, p->n, p->m, p->c.ld);
}

static void release(const tp_cublas *blas, description *d)
{
    if (d->operation != NULL) (void)blas->MatmulDescDestroy(d->operation);
    if (d->right != NULL) (void)blas->MatrixLayoutDestroy(d->right);
    if (d->left != NULL) (void)blas->MatrixLayoutDestroy(d->left);
    if (d->add != NULL) (void)blas->MatrixLayoutDestroy(d->add);
    if (d->c != NULL) (void)blas->MatrixLayoutDestroy(d->c);
    if (d->preference != NULL) (void)blas->MatmulPreferenceDestroy(d->preference);
}

/* Parts of a sum may only be added in f32: no rounding in between, and no order left to chance. */
static cublasStatus_t set_preference(const tp_cublas *blas, const tp_plan_key *key, cublasLtMatmulPreference_t *preference)
{
    size_t bytes = TP_CUDA_BLAS_BYTES;
    uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    const struct {
        cublasLtMatmulPreferenceAttributes_t attribute;
        uint32_t bytes;
    } alignments[] = {{CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, (uint32_t)key->right_align},
                      {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, (uint32_t)key->left_align},
                      {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, (uint32_t)key->add_align},
                      {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, (uint32_t)key->c_align}};
    TRY_BLAS(blas->MatmulPreferenceCreate(preference));
    TRY_BLAS(blas->MatmulPreferenceSetAttribute(*preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes));
    TRY_BLAS(
        blas->MatmulPreferenceSetAttribute(*preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes, sizeof schemes));
    for (int i = 0; i < 4; i++)
        TRY_BLAS(
            blas->MatmulPreferenceSetAttribute(*preference, alignments[i].attribute, &alignments[i].bytes, sizeof(uint32_t)));
    return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t run(const tp_cuda *cuda, const tp_product *p, const description *d, const cublasLtMatmulAlgo_t *algorithm)
{
    const tp_cublas *blas = cuda->blas;
    return blas->Matmul(blas->handle, d->operation, &p->alpha, p->right, d->right, p->left, d->left, &p->beta, p->add, d->add,
                        p->c.data, d->c, algorithm, blas->workspace, TP_CUDA_BLAS_BYTES, cuda->stream);
}

/* Milliseconds of one product by this algorithm; infinite if it does not run. */
static float measure(const tp_cuda *cuda, const tp_product *p, const description *d, const cublasLtMatmulAlgo_t *algorithm)
{
    cudaEvent_t began = NULL, ended = NULL;
    float milliseconds = INFINITY;
    bool ok = run(cuda, p, d, algorithm) == CUBLAS_STATUS_SUCCESS && cudaEventCreate(&began) == cudaSuccess &&
              cudaEventCreate(&ended) == cudaSuccess && cudaEventRecord(began, cuda->stream) == cudaSuccess;
    for (int i = 0; ok && i < TUNE_REPEATS; i++) ok = run(cuda, p, d, algorithm) == CUBLAS_STATUS_SUCCESS;
    ok = ok && cudaEventRecord(ended, cuda->stream) == cudaSuccess && cudaEventSynchronize(ended) == cudaSuccess;
    if (ok && cudaEventElapsedTime(&milliseconds, began, ended) != cudaSuccess) milliseconds = INFINITY;
    if (began != NULL) (void)cudaEventDestroy(began);
    if (ended != NULL) (void)cudaEventDestroy(ended);
    return milliseconds / TUNE_REPEATS;
}

/* The fastest of what cuBLASLt offers, measured on the operands at hand: their contents are lost where c is added to. The few
 * that a first look leaves meet again in turn, so that a GPU that slows down meanwhile is fair to all. */
static cublasStatus_t tune(tp_cuda *cuda, const tp_plan_key *key, const tp_product *p, description *d, tp_plan_slot *slot)
{
    tp_cublas *blas = cuda->blas;
    cublasLtMatmulHeuristicResult_t results[TUNE_CHOICES];
    int n = 0, n_last = 0, last[1 + TUNE_FINAL] = {0}, best = 0;
    float first_look[TUNE_CHOICES], total[1 + TUNE_FINAL] = {0};
    TRY_BLAS(set_preference(blas, key, &d->preference));
    TRY_BLAS(blas->MatmulAlgoGetHeuristic(blas->handle, d->operation, d->right, d->left, d->add, d->c, d->preference,
                                          TUNE_CHOICES, results, &n));
    for (int i = 0; i < n; i++)
        first_look[i] = results[i].state == CUBLAS_STATUS_SUCCESS ? measure(cuda, p, d, &results[i].algo) : INFINITY;
    for (; n_last <= TUNE_FINAL; n_last++) { /* the first is cuBLASLt's choice */
        int fastest = -1;
        for (int i = 0; i < n; i++)
            if (first_look[i] < INFINITY && (fastest < 0 || (n_last > 0 && first_look[i] < first_look[fastest]))) fastest = i;
        if (fastest < 0) break;
        last[n_last] = fastest, first_look[fastest] = INFINITY;
    }
    if (n_last == 0) return CUBLAS_STATUS_NOT_SUPPORTED;
    for (int round = 0; round < TUNE_ROUNDS; round++)
        for (int i = 0; i < n_last; i++) total[i] += measure(cuda, p, d, &results[last[i]].algo) / TUNE_ROUNDS;
    for (int i = 1; i < n_last; i++)
        if (total[i] < total[best] * (best == 0 ? TUNE_GAIN : 1.0f)) best = i;
    tp_plans_fill(&blas->plans, slot, key, &results[last[best]].algo, TP_PLAN_TUNED);
    slot->checked = true, slot->before = total[0], slot->after = total[best];
    return CUBLAS_STATUS_SUCCESS;
}

/* By cuBLASLt's own rules. */
static cublasStatus_t ask(tp_cublas *blas, const tp_plan_key *key, description *d, cublasLtMatmulAlgo_t *algorithm)
{
    cublasLtMatmulHeuristicResult_t result;
    int n_results = 0;
    TRY_BLAS(set_preference(blas, key, &d->preference));
    TRY_BLAS(blas->MatmulAlgoGetHeuristic(blas->handle, d->operation, d->right, d->left, d->add, d->c, d->preference, 1,
                                          &result, &n_results));
    if (n_results < 1) return CUBLAS_STATUS_NOT_SUPPORTED;
    TRY_BLAS(result.state);
    *algorithm = result.algo;
    return CUBLAS_STATUS_SUCCESS;
}

/* What was measured, for this product or one that is near; else by the rules. */
static cublasStatus_t choose(tp_cublas *blas, const tp_plan_key *key, description *d, cublasLtMatmulAlgo_t *algorithm)
{
    const tp_plan_slot *near = tp_plans_near(&blas->plans, key);
    cublasLtMatmulHeuristicResult_t result;
    if (near == NULL) return ask(blas, key, d, algorithm);
    cublasStatus_t status =
        blas->MatmulAlgoCheck(blas->handle, d->operation, d->right, d->left, d->add, d->c, &near->algorithm, &result);
    if (status != CUBLAS_STATUS_SUCCESS || result.workspaceSize > TP_CUDA_BLAS_BYTES) return ask(blas, key, d, algorithm);
    *algorithm = near->algorithm;
    return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t multiply(tp_cuda *cuda, const tp_product *p, description *d)
{
    tp_cublas *blas = cuda->blas;
    const tp_plan_key key = key_of(p, cuda->device.tf32);
    cublasLtMatmulAlgo_t algorithm;
    TRY_BLAS(describe(cuda, p, d));
    tp_plan_slot *slot = tp_plans_find(&blas->plans, &key);
    const bool large = (double)p->n * (double)p->m * (double)p->k >= TUNE_LEAST;
    if (blas->tuning && large && slot != NULL && !(slot->after > 0)) TRY_BLAS(tune(cuda, &key, p, d, slot));
    if (slot != NULL && slot->checked) return run(cuda, p, d, &slot->algorithm);
    TRY_BLAS(choose(blas, &key, d, &algorithm));
    if (slot != NULL) {
        tp_plans_fill(&blas->plans, slot, &key, &algorithm, slot->state == TP_PLAN_EMPTY ? TP_PLAN_RULE : slot->state);
        slot->checked = true;
    }
    return run(cuda, p, d, &algorithm);
}

/* ---- tuning ---- */

void tp_cuda_tune_begin(tp_device *device)
{
    reinterpret_cast<tp_cuda *>(device)->blas->tuning = true;
}

tp_status tp_cuda_tune_end(tp_ctx *ctx, tp_buf *report)
{
    tp_cublas *blas = tp_cuda_of(ctx)->blas;
    tp_buf path;
    int n = 0, faster = 0;
    blas->tuning = false;
    for (int i = 0; i < TP_PLANS; i++) {
        const tp_plan_slot *slot = &blas->plans.slots[i];
        if (!(slot->after > 0)) continue;
        n++;
        faster += slot->after < slot->before;
        tp_buf_printf(report, "%7lld x %6lld x %6lld %s  %8.3f ms -> %8.3f ms\n", (long long)slot->key.n,
                      (long long)slot->key.m, (long long)slot->key.k, tp_dtype_name((tp_dtype)slot->key.type),
                      (double)slot->before, (double)slot->after);
    }
    tp_buf_init(&path, 0);
    tp_status status = tp_plans_save(ctx, &blas->plans, &blas->owner, &path);
    if (status == TP_OK)
        tp_buf_printf(report, "%d products, %d of them faster than by cuBLASLt's rules; kept in %s\n", n, faster,
                      tp_buf_cstr(&path));
    tp_buf_free(&path);
    return status;
}

/* One row, or none, has no distance to the next: any that cuBLASLt accepts will do. */
static int64_t legal_ld(int64_t ld, int64_t rows, int64_t cols)
{
    return rows <= 1 || ld < cols ? cols : ld;
}

tp_status tp_cuda_product(tp_ctx *ctx, const char *name, const tp_product *product)
{
    tp_cuda *cuda = tp_cuda_of(ctx);
    tp_product p = *product;
    p.left_ld = legal_ld(p.left_ld, p.left_transposed ? p.k : p.n, p.left_transposed ? p.n : p.k);
    p.right_ld = legal_ld(p.right_ld, p.right_transposed ? p.m : p.k, p.right_transposed ? p.k : p.m);
    p.c.ld = legal_ld(p.c.ld, p.n, p.m);
    if (p.beta == 0) p.add = p.c.data, p.add_ld = p.c.ld;
    p.add_ld = legal_ld(p.add_ld, p.n, p.m);
    if (p.add == p.c.data) p.add_ld = p.c.ld;
    description d = {};
    cublasStatus_t status = multiply(cuda, &p, &d);
    release(cuda->blas, &d);
    if (status == CUBLAS_STATUS_SUCCESS) return TP_OK;
    if (status == CUBLAS_STATUS_NOT_SUPPORTED)
        return tp_fail(ctx, TP_UNSUPPORTED, "%s: cuBLASLt has no algorithm for [%lld, %lld] x [%lld, %lld] in %s", name,
                       (long long)p.n, (long long)p.k, (long long)p.k, (long long)p.m, tp_dtype_name(p.type));
    return fail_blas(ctx, cuda->blas, name, status);
}
