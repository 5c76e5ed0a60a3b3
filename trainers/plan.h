/* The plan: what a training step needs, learned by running it on the dry backend before any weight is read. */
#ifndef TP_TRAINERS_PLAN_H
#define TP_TRAINERS_PLAN_H

#include "models/model.h"
#include "peft/lora.h"

/* One micro-batch at its largest, and how it is run. */
typedef struct tp_plan_shape {
    int64_t rows, labels, segments, longest_segment;
    int64_t eval_rows, eval_labels; /* largest held-out batch; 0: none */
    int64_t accumulation;           /* micro-batches per step */
    int64_t sample_context;         /* tokens that the KV cache of samples holds; 0: no samples */
    int recompute_every;            /* these as in tp_pass */
    int remade_layers, remade_gates, recomputed_layers;
    int64_t recomputed_rows;
    bool parked_inputs;
    bool any_order;           /* of sums: tp_device.any_order, where the device makes use of it */
    bool uneven;              /* other micro-batches have fewer rows */
    bool train;               /* false: forward and loss only */
    int optimizer_states;     /* f32 numbers kept per parameter */
    uint64_t host_bytes;      /* data index, tokenizer and the like, as the caller knows them */
    bool own_memory;          /* the device's memory is not the host's: what is there alone does not count */
    uint64_t piece_bytes;     /* tp_backend.piece_bytes of the device that will run it */
    uint64_t workspace_bytes; /* the device's own: tp_device.workspace_bytes of the one that will run it */
} tp_plan_shape;

typedef struct tp_plan {
    tp_plan_shape shape;
    uint64_t weights, adapter, gradients, optimizer, activations, batch, workspace;
    uint64_t samples; /* KV cache, arena and copies of the factors that samples are decoded with */
    uint64_t save;    /* host copies while a checkpoint is written */
    uint64_t host;
    uint64_t recordings;            /* of micro-batches, as many as recorded_most */
    uint64_t peak;                  /* sum: what the process will hold at most, in bytes */
    tp_attention_size attention;    /* the largest of the step */
    int64_t calls;                  /* of kernels, in a micro-batch */
    int64_t recorded_most;          /* recordings that are kept: whoever makes the plan adds them */
    uint64_t arena;                 /* capacity the step arena gets (activations, exactly) */
    double flops_f32, flops_narrow; /* of one optimizer step, by precision of the product: f32, 16 bits */
    double bytes_moved;             /* of one optimizer step, by all kernels */
    double seconds_per_step;        /* by the device's measured rate; 0: not known */
    int64_t trained_parameters, all_parameters;
    int64_t largest_batch, largest_length; /* what tp_plan_largest found; 0: nobody asked */
    uint64_t least;                        /* likewise: the peak at its smallest */
} tp_plan;

/* Runs one step of the shape on the dry backend. `shape_model` was opened there (tp_model_open or tp_model_from_config) and has
 * its slots filled by `lora` (NULL: none). */
TP_API tp_status tp_plan_make(tp_ctx *dry, tp_model *shape_model, tp_lora *lora, const tp_plan_shape *shape,
                              tp_plan *plan) TP_MUST_CHECK;
/* Where such a step's allocations lie: a micro-batch with fewer rows or labels, run in the same way, fits into these places.
 * Not for steps in slices of the batch. *places is the caller's (tp_free). */
TP_API tp_status tp_plan_places(tp_ctx *dry, tp_model *shape_model, const tp_plan_shape *shape, tp_place **places,
                                size_t *n) TP_MUST_CHECK;
/* The same for the cheapest way that fits into `limit` bytes: nothing computed again; norms and SwiGLU of some blocks; of all,
 * and gate and up of some, where they are one product; of all; some blocks as a whole; all of them; all of them in slices of
 * the batch. Where none fits, the plan is the smallest one. */
TP_API tp_status tp_plan_fit(tp_ctx *dry, tp_model *shape_model, tp_lora *lora, const tp_plan_shape *shape, uint64_t limit,
                             tp_plan *plan) TP_MUST_CHECK;
/* The largest micro-batch of rows of `length` tokens, all of them with labels, and the longest rows, up to `longest`, in a
 * micro-batch of `batch`, that fit into `limit` bytes; 0 if not even one does; and the fewest bytes that the shape itself can
 * do with. fit: as tp_plan_fit, else as the shape says. */
TP_API tp_status tp_plan_largest(tp_ctx *dry, tp_model *shape_model, tp_lora *lora, const tp_plan_shape *shape, bool fit,
                                 uint64_t limit, int64_t batch, int64_t length, int64_t longest, tp_plan *plan) TP_MUST_CHECK;
/* {"peak_bytes": ..., "by_category": {...}, "flops_per_step": ..., "seconds_per_step": ...} */
TP_API void tp_plan_write_json(const tp_plan *plan, tp_buf *out);
/* The smallest usual memory, of a GPU or a machine, nine tenths of which hold plan->least; 0: none does. */
TP_API uint64_t tp_plan_smallest_device(const tp_plan *plan);
/* "memory 33.8 GiB: weights 15.5 GiB, ..." without an end of line. */
TP_API void tp_plan_write_memory(const tp_plan *plan, tp_buf *out);
/* The same as lines for people. */
TP_API void tp_plan_write_text(const tp_plan *plan, tp_buf *out);

#endif
