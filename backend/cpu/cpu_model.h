/* Which kernels fit which CPU: a table of models, because a feature flag does not say whether the feature is fast. */
#ifndef TP_BACKEND_CPU_CPU_MODEL_H
#define TP_BACKEND_CPU_CPU_MODEL_H

#include <stdbool.h>

#include "backend/cpu/cpu.h"

typedef struct tp_cpu_model {
    char name[64];     /* "AMD EPYC 9B45 ...": printable, without quotes and backslashes; "unknown" */
    int family, model; /* CPUID's display family and model; 0 where there is no CPUID */
    tp_cpu_isa isa;    /* what kernels use */
    bool has_bf16_dot; /* the instruction is there */
    bool bf16_dot;     /* and is used: it is faster than f32 on this model */
} tp_cpu_model;

/* The environment variable TAPEFT_CPU may ask for less than the CPU has: "generic", "avx2" or "avx512"; or for "bf16":
 * AVX-512 with vdpbf16ps even where the table finds it slow. INVALID if the value is unknown or the CPU lacks it. */
tp_status tp_cpu_model_detect(tp_ctx *ctx, tp_cpu_model *model) TP_MUST_CHECK;

/* "generic", "avx2", "avx512". */
const char *tp_cpu_isa_name(tp_cpu_isa isa);

#endif
