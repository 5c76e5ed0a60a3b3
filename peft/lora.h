/* LoRA: y = W x + s B A drop(x) with frozen W.  Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.
 * Fields, initialisation, matching and scaling are PEFT's, so that an adapter means the same here and there. */
#ifndef TP_PEFT_LORA_H
#define TP_PEFT_LORA_H

#include "autograd/params.h"
#include "models/model.h"
#include "peft/target.h"
#include "recipes/keys.h" /* TP_LIMIT_RANK */

#define TP_LIMIT_PATTERNS 4096 /* targets, and keys of rank_pattern or alpha_pattern: each is tried on every module */

/* What defines a LoRA. Strings and arrays are borrowed from the recipe or the adapter file. */
typedef struct tp_lora_spec {
    int64_t rank;
    double alpha;
    double dropout;
    bool use_rslora;
    tp_targets targets;
    const tp_pattern *rank_pattern, *alpha_pattern;
    size_t n_rank_pattern, n_alpha_pattern;
    bool gaussian;        /* A ~ N(0, 1/rank) instead of the uniform default */
    bool allow_unmatched; /* entries that match nothing are fine: adapter files, as in PEFT */
    /* How messages call one of PEFT's keys, or a member of rank_pattern and alpha_pattern: with its place in a recipe, for
     * instance. NULL: as PEFT does. Used while it is declared. */
    const char *(*call)(void *state, const char *key, const char *member);
    void *call_state;
} tp_lora_spec;

typedef struct tp_lora_module {
    tp_linear_module *module;
    int64_t rank;
    double alpha;
    size_t a, b;     /* parameters: lora_A [rank, in], lora_B [out, rank] */
    tp_lowrank term; /* what sits in the module's slot */
} tp_lora_module;

typedef struct tp_lora {
    tp_lora_spec spec;
    tp_lora_module *modules; /* in the model's order */
    size_t n_modules;
    tp_params params;
} tp_lora;

/* Finds the targets (every entry, layer and pattern must match something), declares and allocates the parameters (zeros), and
 * fills the slots. INVALID naming an entry that matches nothing and the nearest module name. */
TP_API tp_status tp_lora_attach(tp_ctx *ctx, tp_model *model, const tp_lora_spec *spec, tp_lora **lora) TP_MUST_CHECK;
/* Its two halves. After the first, names and shapes are known while nothing is allocated and the model is as it was: the sizes
 * that a file claims can be compared with what it holds. */
TP_API tp_status tp_lora_declare(tp_ctx *ctx, tp_model *model, const tp_lora_spec *spec, tp_lora **lora) TP_MUST_CHECK;
TP_API tp_status tp_lora_allocate(tp_ctx *ctx, tp_lora *lora) TP_MUST_CHECK;
/* PEFT's initialisation: A ~ U(-1/sqrt(in), 1/sqrt(in)) or N(0, 1/rank); B = 0. A function of ctx->seed. */
TP_API tp_status tp_lora_initialise(tp_ctx *ctx, tp_lora *lora) TP_MUST_CHECK;
/* Empties the slots it filled and frees everything. */
TP_API void tp_lora_free(tp_lora *lora);
/* s of one module: alpha / rank, or alpha / sqrt(rank). */
TP_API double tp_lora_scaling(const tp_lora_spec *spec, double alpha, int64_t rank);

#endif
