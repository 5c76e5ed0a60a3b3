/* The algorithms that products take, by shape: what `tapeft tune` measured here and left in a file, what it measured for the
 * table that the program carries, or what cuBLASLt's rules say. */
#ifndef TP_BACKEND_CUDA_PLANS_CUH
#define TP_BACKEND_CUDA_PLANS_CUH

#include <cublasLt.h>

#include "backend/cuda/cuda.cuh"

/* What an answer depends on. Zeroed before it is filled, for it is compared byte by byte. */
typedef struct tp_plan_key {
    int64_t n, m, k, left_ld, right_ld, c_ld, add_ld;
    int32_t type, tf32, c_type, left_transposed, right_transposed, bias, beta;
    int32_t left_align, right_align, c_align, add_align, bias_align;
} tp_plan_key;

typedef struct tp_plan_slot {
    tp_plan_key key;
    cublasLtMatmulAlgo_t algorithm;
    int32_t state;       /* TP_PLAN_... */
    bool checked;        /* cuBLASLt takes it */
    float before, after; /* milliseconds by cuBLASLt's first choice and by this one; only if measured in this process */
} tp_plan_slot;

/* In the order of trust: in use, carried, measured on this kind of GPU. */
enum { TP_PLAN_EMPTY, TP_PLAN_RULE, TP_PLAN_CARRIED, TP_PLAN_TUNED };

#define TP_PLANS 4096 /* a power of two; a full table takes no more */

typedef struct tp_plans {
    tp_plan_slot *slots; /* [TP_PLANS] */
    int n;
} tp_plans;

tp_status tp_plans_open(tp_ctx *ctx, tp_plans *plans);
void tp_plans_close(tp_plans *plans);
/* The slot of a key, or an empty one where it belongs, or NULL: the table is full and lacks it. */
tp_plan_slot *tp_plans_find(tp_plans *plans, const tp_plan_key *key);
void tp_plans_fill(tp_plans *plans, tp_plan_slot *slot, const tp_plan_key *key, const cublasLtMatmulAlgo_t *algorithm,
                   int state);

/* The measured product nearest to this one: the same in all but n, and n at most doubled or halved. NULL: none. Products that
 * were only used do not count, so the answer does not depend on what ran before. */
const tp_plan_slot *tp_plans_near(const tp_plans *plans, const tp_plan_key *key);

/* Whose algorithms: those of another version of cuBLASLt mean something else. The table that the program carries goes by the
 * capability (90) and the number of multiprocessors, a file by the name of the GPU. */
typedef struct tp_plans_owner {
    size_t version;
    int capability, multiprocessors;
    const char *gpu;
} tp_plans_owner;

/* What is carried, and over it the file of one kind of GPU and one version of cuBLASLt, under $XDG_CACHE_HOME or ~/.cache. No
 * file adds nothing; a damaged line ends it with a warning. Saving adds what was measured to what the file had. */
tp_status tp_plans_load(tp_ctx *ctx, tp_plans *plans, const tp_plans_owner *owner);
tp_status tp_plans_save(tp_ctx *ctx, const tp_plans *plans, const tp_plans_owner *owner, tp_buf *path);

#endif
