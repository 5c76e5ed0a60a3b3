/* Inside of the CPU backend: what its kernels share. Only files of this folder and their tests include it.
 *
 * A kernel cuts its work by shape into items, runs them with tp_cpu_for, and may use one scratch area per thread. Items
 * must not depend on each other or on which thread runs them; then results are the same bits for any number of threads.
 *
 * Vector code is written with intrinsics in functions marked TP_TARGET_AVX512 or TP_TARGET_AVX2, inside
 * #if defined(__x86_64__), and chosen at run time by cpu->isa; every kernel also has a path in plain C. */
#ifndef TP_BACKEND_CPU_CPU_H
#define TP_BACKEND_CPU_CPU_H

#include "backend/backend.h"
#include "backend/cpu/threads.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Memory that a CPU device holds besides what callers allocate: TP_CPU_WORKSPACE_BYTES once, and TP_CPU_SCRATCH_BYTES a
 * thread. Both are fixed when the device opens and do not grow with the step. */
#define TP_CPU_WORKSPACE_BYTES ((size_t)14 << 20)
#define TP_CPU_SCRATCH_BYTES   ((size_t)1 << 20)

/* What the vector code may use. Later ones include the earlier ones. */
typedef enum tp_cpu_isa {
    TP_CPU_GENERIC, /* plain C */
    TP_CPU_AVX2,    /* with FMA and F16C */
    TP_CPU_AVX512   /* F, BW, VL, DQ */
} tp_cpu_isa;

#define TP_TARGET_AVX2     __attribute__((target("avx2,fma,f16c")))
#define TP_TARGET_AVX512   __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")))
#define TP_TARGET_BF16_DOT __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

struct tp_openblas;
struct tp_cpu_ahead;

typedef struct tp_cpu {
    tp_device device; /* first: a tp_device * of this backend is a tp_cpu * */
    tp_cpu_isa isa;
    bool bf16_dot;                /* vdpbf16ps is there and faster than f32 on this CPU model; implies AVX512 */
    tp_threads *pool;             /* device.threads of them */
    unsigned char *scratch;       /* TP_CPU_SCRATCH_BYTES per thread, aligned to 4096 */
    unsigned char *workspace;     /* TP_CPU_WORKSPACE_BYTES, aligned to 4096; of the kernel that runs, not of one thread */
    struct tp_cpu_ahead *ahead;   /* the order of products of few rows */
    struct tp_openblas *openblas; /* NULL: not there, or not wanted on this CPU */
    void *memory;                 /* what scratch and workspace lie in */
} tp_cpu;

static inline tp_cpu *tp_cpu_of(tp_ctx *ctx)
{
    return (tp_cpu *)ctx->device;
}

/* Runs body(arg, i, thread) for i in 0..n-1. Items are claimed in ascending order by whichever thread is free; thread is
 * 0 (the caller) .. device.threads - 1, and no two items run at once with the same thread. Returns when all are done. An
 * item should be worth at least some microseconds. Not to be called from a body. One host thread at a time may use a
 * device. */
static inline void tp_cpu_for(tp_cpu *cpu, int64_t n, void (*body)(void *arg, int64_t i, int thread), void *arg)
{
    tp_threads_for(cpu->pool, n, body, arg);
}

/* Scratch of one thread, not zeroed; holds nothing from one item to the next. */
static inline void *tp_cpu_scratch(tp_cpu *cpu, int thread)
{
    return cpu->scratch + (size_t)thread * TP_CPU_SCRATCH_BYTES;
}

/* tp_cpu_matmul, ...: the table of tp_cpu_backend. */
#define TP_KERNEL(name, args) tp_status tp_cpu_##name(tp_ctx *ctx, const void *arguments);
#include "backend/kernels.def"
#undef TP_KERNEL

#ifdef __cplusplus
}
#endif
#endif
