/* The ops: what networks are written in.
 *
 * Shapes: N rows (tokens), D hidden, H heads, R rank, F feed-forward, V vocabulary. Activations have the tape's precision
 * (f32 or bf16); parameters are f32. Results are owned by the tape until tp_tape_reset. Every op accepts NULL inputs once
 * the tape has failed, returns NULL then, and reports SHAPE when sizes disagree. */
#ifndef TP_AUTOGRAD_OPS_H
#define TP_AUTOGRAD_OPS_H

#include "autograd/tape.h"

/* y [n, D] = table[ids] (+ add). ids: device memory, checked by the caller. `trained` (same shape as the table, or NULL)
 * receives the gradient and, if given, is read instead of the table. Backward: for `trained` and `add`. */
TP_API tp_tensor *tp_embedding(tp_tape *tape, const tp_matrix *table, tp_tensor *trained, const int32_t *ids, int64_t n,
                               tp_tensor *add);

/* A low-rank addition to a linear: scaling * B (A (dropout x)) on rows begin..end. Hu et al. 2021, arXiv:2106.09685. */
typedef struct tp_lowrank {
    tp_tensor *a; /* [R, in] f32 */
    tp_tensor *b; /* [out, R] f32 */
    float scaling;
    float dropout;      /* probability on x; 0 where not training */
    uint32_t site;      /* number of this place, for the generator */
    int64_t begin, end; /* rows; end 0: all */
} tp_lowrank;

#define TP_LINEAR_TERMS 16 /* low-rank additions on one linear, at most */

typedef struct tp_linear_spec {
    const tp_matrix *weight; /* [out, in], any format; borrowed, must outlive the tape */
    tp_tensor *bias;         /* [1, out] f32 or NULL */
    tp_tensor *residual;     /* [N, out] added to the result, or NULL */
    const tp_lowrank *terms;
    int n_terms;
} tp_linear_spec;

/* y [N, out] = x W^T + bias + residual + terms, x [N, in]. Saves A x per term. Backward: for x, residual, bias, A, B.
 * UNSUPPORTED: more than TP_LINEAR_TERMS terms. Dettmers et al. 2023, arXiv:2305.14314, for the frozen packed W. */
TP_API tp_tensor *tp_linear(tp_tape *tape, tp_tensor *x, const tp_linear_spec *spec);

#define TP_JOINT_PARTS TP_PACKED_PARTS

/* Several linears of one input as one product: their weights are stacked. */
typedef struct tp_joint_spec {
    /* [out, in], dense, of the tape's precision, with at least in + room elements from row to row and `room` more rows behind
     * it. That margin is written: it holds the factors that ride on the product. Borrowed, must outlive the tape. */
    const tp_matrix *weight;
    int64_t room;
    tp_tensor *bias;     /* [1, out] f32, frozen, or NULL */
    tp_tensor *residual; /* [N, out] or NULL */
    bool unread;         /* y is wanted for the sweep alone: its values are not made */
    int n_parts;
    struct tp_joint_part {
        int64_t rows; /* of the weight; those of all parts make `out` */
        /* On all rows of x, or NULL; the ranks add up to at most `room`. */
        const tp_lowrank *term;
    } parts[TP_JOINT_PARTS];
} tp_joint_spec;

/* y [N, out] = x W^T + bias + residual + the parts' terms; tp_split gives each part its columns. Adapters cost no pass over y
 * and none over dx: with x = [x | u], u = x A^T in the room behind x, and W = [W | s B], they are more columns of the same sum,
 * and in backward with dy = [dy | du] more rows. x must have that room (tp_tape_set_room). Under bf16 the factors, u and du
 * are rounded to bf16. Backward: for x, residual, A, B. */
TP_API tp_tensor *tp_joint_linear(tp_tape *tape, tp_tensor *x, const tp_joint_spec *spec);

/* y [N, M] = alpha * x w^T, x [N, K], w [M, K], both may be trained (w: f32). */
TP_API tp_tensor *tp_matmul_nt(tp_tape *tape, tp_tensor *x, tp_tensor *w, float alpha);

/* y = weight * x / rms(x), over groups of `dim` columns (dim = D, or the head size for Qwen3's q and k norms).
 * weight [1, dim]. Saves 1/rms. Backward: for x and weight. */
TP_API tp_tensor *tp_rmsnorm(tp_tape *tape, tp_tensor *x, tp_tensor *weight, float eps);
/* y = weight * (x - mean) / std + bias; bias may be NULL. Backward: for x, weight, bias. */
TP_API tp_tensor *tp_layernorm(tp_tape *tape, tp_tensor *x, tp_tensor *weight, tp_tensor *bias, float eps);

/* cos and sin of a batch's positions, made once a step outside the tape. */
typedef struct tp_rope_angles {
    const float *cos, *sin; /* [N, half] device memory */
    int64_t half;           /* rotated pairs per head */
} tp_rope_angles;
/* Rotates x [N, H * head_dim] in place: x must not be used afterwards. */
TP_API tp_tensor *tp_rope(tp_tape *tape, tp_tensor *x, const tp_rope_angles *angles, int64_t head_dim);
/* The same for queries and keys, in one pass where they are columns of one tensor behind each other. False, and both NULL, on
 * the tape's error. */
TP_API bool tp_rope_both(tp_tape *tape, tp_tensor **q, tp_tensor **k, const tp_rope_angles *angles, int64_t head_dim);

/* Who sees whom. */
typedef struct tp_attention_spec {
    const tp_segment *segments; /* host memory, alive until tp_tape_reset */
    int64_t n_segments;
    int64_t heads, kv_heads, head_dim;
    bool causal;
    int64_t window; /* 0: none */
    float scale;
} tp_attention_spec;
/* out [N, H*hd] from q [N, H*hd], k and v [Nk, Hkv*hd]; any of them may be a view. Saves one number per row and head.
 * Dao 2023, arXiv:2307.08691. Backward: for q, k, v. */
TP_API tp_tensor *tp_attention(tp_tape *tape, tp_tensor *q, tp_tensor *k, tp_tensor *v, const tp_attention_spec *spec);

/* out [n] are views of columns of x, n at most 3: the sizes [n] add up to x's columns. x must not be used otherwise. */
TP_API bool tp_split(tp_tape *tape, tp_tensor *x, const int64_t *sizes, int n, tp_tensor **out);

/* y = silu(gate) * up. */
TP_API tp_tensor *tp_swiglu(tp_tape *tape, tp_tensor *gate, tp_tensor *up);
/* tanh form, or erf if exact. */
TP_API tp_tensor *tp_gelu(tp_tape *tape, tp_tensor *x, bool exact);
TP_API tp_tensor *tp_add(tp_tape *tape, tp_tensor *x, tp_tensor *y);
TP_API tp_tensor *tp_scale(tp_tape *tape, tp_tensor *x, float alpha);
/* p = 0 returns x. */
TP_API tp_tensor *tp_dropout(tp_tape *tape, tp_tensor *x, float p, uint32_t site);

/* Cross-entropy of softmax(x W^T) against labels, summed over the rows with a label. Logits exist for a chunk of rows at a
 * time, and only for those rows.
 *   x           [N, D]
 *   head        [V, D], frozen
 *   rows        [n] device, ascending row numbers of x
 *   labels      [n] device, 0..V-1
 *   grad_scale  what one unit of loss weighs: 1 / labels of the whole optimizer step
 *   state       device, or NULL: its grad_scale takes the place of the other, the gradient is that of the loss times its
 *               loss_scale, and the result, which does not know that scale, is added to its loss_sum
 *   losses      [n] device f32, or NULL: gets the loss of each row, unscaled
 * Returns [1, 1] f32 = sum * grad_scale. The gradient of x is made right here, chunk by chunk, and backward hands it over, so
 * the loss must reach tp_tape_backward as it is (or summed). */
typedef struct tp_cross_entropy_spec {
    const tp_matrix *head;
    const int32_t *rows, *labels;
    int64_t n;
    float grad_scale;
    tp_step_state *state;
    float *losses;
} tp_cross_entropy_spec;
TP_API tp_tensor *tp_linear_cross_entropy(tp_tape *tape, tp_tensor *x, const tp_cross_entropy_spec *spec);

/* logits [n, V] f32 of the given rows (device index; NULL: all rows) without gradient. */
TP_API tp_tensor *tp_logits(tp_tape *tape, tp_tensor *x, const tp_matrix *head, const int32_t *rows, int64_t n);

#endif
