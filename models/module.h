/* Modules: the named parts of a network, and the slots where adapters sit.
 *
 * Names are those of the live Hugging Face model ("model.layers.3.self_attn.q_proj"), because PEFT's target_modules, regular
 * expressions and file keys speak of them. A model knows no method: it runs the slot's terms around each linear. */
#ifndef TP_MODELS_MODULE_H
#define TP_MODELS_MODULE_H

#include <string.h>

#include "autograd/batch.h"
#include "autograd/ops.h"

/* What methods put around one linear. Terms belong to whoever filled the slot and may change between steps: swapping an
 * adapter is swapping these entries. */
typedef struct tp_slot {
    const tp_lowrank *terms; /* borrowed; ranges of rows are filled in by the caller of a mixed batch */
    int n_terms;
} tp_slot;

typedef struct tp_linear_module {
    char *path;       /* owned by the model */
    int layer;        /* index of its block, or -1 (lm_head) */
    tp_matrix weight; /* logical [out, in] */
    tp_tensor bias;   /* [1, out]; data NULL: none */
    bool conv1d;      /* stored [in, out]: PEFT writes fan_in_fan_out */
    bool is_head;     /* output embedding: not part of "all-linear" */
    tp_slot slot;
} tp_linear_module;

/* The last name of its path: "q_proj". */
static inline const char *tp_module_name(const tp_linear_module *module)
{
    const char *dot = strrchr(module->path, '.');
    return dot != NULL ? dot + 1 : module->path;
}

/* Linears that read the same input. On a device with memory of its own their dense weights are stacked, so that one product
 * serves all of them and takes their adapters along (tp_joint_linear); elsewhere each runs by itself. */
typedef struct tp_joint {
    tp_linear_module *members[TP_JOINT_PARTS]; /* in the order of their rows; their weights are parts of the stacked one */
    int n;
    tp_matrix weight; /* [sum of outs, in]; data NULL: not stacked */
    tp_tensor bias;   /* [1, sum of outs]; data NULL: none */
    int64_t room;     /* free columns behind every row of the weight, and rows behind it */
} tp_joint;

/* Of a block. */
enum { TP_JOINT_QKV, TP_JOINT_O, TP_JOINT_GATE_UP, TP_JOINT_DOWN, TP_JOINTS };

/* How a forward pass runs. */
typedef struct tp_pass {
    tp_tape *tape;
    const tp_batch *batch;
    struct tp_kv_cache *cache; /* NULL: keys and values come from the batch itself */
    bool training;             /* dropout of adapters is on */
    bool adapters_off;         /* the base alone */
    int recompute_every;       /* 0: keep all; k: keep every k-th block's input only */
    int remade_layers;         /* so many blocks, the first ones, keep no value that a norm or SwiGLU makes again cheaply */
    int remade_gates;          /* so many of these blocks no gate and up either: a product that is made again */
    int recomputed_layers;     /* so many blocks, the first ones, keep their input only; not with recompute_every */
    bool parked_inputs;        /* inputs of recomputed blocks wait in host memory */
    int64_t recomputed_rows;   /* of these blocks, at once, at most, in whole segments of the batch; 0: all */
    const tp_joint *unread;    /* the one whose result nobody reads, or NULL */
    /* Called with the input of the first block (0), the output of block i (i), the input of the head (-1). */
    void (*observe)(void *state, int index, tp_tensor *hidden);
    void *observe_state;
} tp_pass;

/* y = module(x) + residual, with what sits in its slot. Opens the scope of the module's last path component. */
TP_API tp_tensor *tp_module_linear(const tp_pass *pass, tp_linear_module *module, tp_tensor *x, tp_tensor *residual);
/* y[i] = member i (x), for all members; of a joint of one, y[0] = member 0 (x) + residual. Whether it was one product and x is
 * read as it is: without dropout. */
TP_API bool tp_module_joint(const tp_pass *pass, const tp_joint *joint, tp_tensor *x, tp_tensor *residual, tp_tensor *y[]);

#endif
