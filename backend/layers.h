/* All layers of a decoding step as one call, where a device has a way that beats a call for each part (backend/kernels.h,
 * "decoding"): a single sequence whose weights are so small that starting kernels is most of what a step takes.
 *
 * One token goes through every block:
 *     x = embedding[id];  x += o(attend(norm1(x)));  x += down(silu(gate(norm2(x))) * up(norm2(x)))
 * What the layers are is said once, when they are opened; the token and its position are read from device memory when they run,
 * so that a run can be recorded. Values are rounded where separate kernels round them, but for norms, whose factor may come in
 * after a product. */
#ifndef TP_BACKEND_LAYERS_H
#define TP_BACKEND_LAYERS_H

#include "backend/kernels.h"

enum tp_layers_linear {
    TP_LAYERS_Q,
    TP_LAYERS_K,
    TP_LAYERS_V,
    TP_LAYERS_O,
    TP_LAYERS_GATE,
    TP_LAYERS_UP,
    TP_LAYERS_DOWN,
    TP_LAYERS_LINEARS
};

/* y = w x + scaling * up (down x); rank 0: nothing beside w x. */
typedef struct tp_layers_lora {
    int64_t rank;
    float scaling;
    tp_matrix down, up; /* [rank, in], [out, rank] */
} tp_layers_lora;

typedef struct tp_layers_block {
    tp_matrix w[TP_LAYERS_LINEARS];
    tp_layers_lora lora[TP_LAYERS_LINEARS];
    const float *norm1, *norm2; /* [hidden] */
    tp_rows cache_k, cache_v;   /* [capacity, kv_heads * head_dim] */
} tp_layers_block;

/* blocks is read by open alone; device pointers must last as long as what it opens, but for those of adapters, whose values are
 * taken over by open. */
typedef struct tp_layers_args {
    int64_t hidden, heads, kv_heads, head_dim, feed;
    int n_layers;
    const tp_layers_block *blocks;
    tp_matrix embedding;   /* [vocab, hidden] */
    const int32_t *id;     /* the token */
    const int32_t *used;   /* keys in the cache, which is its position; its own go behind them */
    const float *inv_freq; /* [head_dim / 2]: angles are position * inv_freq */
    float factor;          /* of cosines and sines */
    float eps, scale;      /* of norms; of scores */
    const void *later;     /* what kernels read right behind: brought nearer meanwhile; NULL: nothing */
    uint64_t later_bytes;
    tp_rows x; /* [1, hidden]: out */
} tp_layers_args;

typedef struct tp_layers tp_layers;

#endif
