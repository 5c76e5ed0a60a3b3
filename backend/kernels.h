/* What every kernel computes: one argument struct each, the same for every backend.
 *
 * Shapes: N rows (tokens), D hidden, H heads, V vocabulary. All arrays are row-major; `ld` is the distance between rows in
 * elements. Activations are f32, bf16 or, on a GPU, f16 (a kernel gets one dtype for all its activations unless it says
 * otherwise; what is said of bf16 holds for f16 as well); sums are always taken in f32 or wider; adapter factors, norm weights,
 * biases and optimizer state are f32. Results are the same bits for any number of threads: work is cut by shape, reductions run
 * in a fixed order. Pointers are device memory. Kernels take empty shapes (N = 0) and odd sizes. They allocate nothing that
 * grows with the step beyond the device's workspace, and fail only with UNSUPPORTED (a format or dtype this backend lacks),
 * NOMEM or DEVICE. */
#ifndef TP_BACKEND_KERNELS_H
#define TP_BACKEND_KERNELS_H

#include "backend/matrix.h"
#include "base/rng.h"
#include "base/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Rows of activations. */
typedef struct tp_rows {
    void *data;
    tp_dtype dtype; /* TP_F32, TP_BF16 or TP_F16 */
    int64_t ld;
} tp_rows;

/* A low-rank part of a product (Hu et al. 2021): its own columns of a, in `low`, and more rows for b, in `up`.
 *   low [n, rank] f32 = scaling * a op(down), written here; or, if down.data is NULL, given by the caller
 *   nt: down is [rank, k], up is [m, rank];  otherwise down is [k, rank], up is [rank, m] */
typedef struct tp_lowrank_args {
    int64_t rank;
    float scaling;
    tp_rows low;
    tp_matrix down, up;
} tp_lowrank_args;

/* c = alpha * (a op(b) + low op(up)) + beta * c + bias.
 *   a [n, k];  nt: b is [m, k], c = a b^T;  otherwise b is [k, m], c = a b;  c [n, m]
 * a and c may differ in dtype. beta is 0 (c is not read, even if NaN) or any value. `residual` (or NULL; dtype of c)
 * is added: c = ... + residual, and may be c itself.
 * precision: f32 products of exact values, or (bf16) both sides rounded to bf16 first where that is faster; sums f32. */
typedef struct tp_matmul_args {
    int64_t n, m, k;
    tp_rows a;
    tp_matrix b;
    bool nt;
    tp_rows c;
    float alpha, beta;
    const float *bias;    /* [m] or NULL; added once, not scaled */
    const void *residual; /* [n, m] with leading dimension residual_ld, or NULL */
    int64_t residual_ld;
    tp_dtype precision;             /* TP_F32, TP_BF16 or TP_F16 */
    const tp_lowrank_args *lowrank; /* or NULL */
} tp_matmul_args;

/* c [m, k] f32 = alpha * a^T b + beta * c;  a [n, m], b [n, k], any mix of f32 and bf16. Gradients of weights. */
typedef struct tp_matmul_tn_args {
    int64_t n, m, k;
    tp_rows a, b;
    float *c; /* contiguous */
    float alpha, beta;
} tp_matmul_tn_args;

#define TP_PACKED_PARTS 3

/* The factors of low-rank parts into the margin of a stacked weight w [out, in] with w.ld >= in + used and `used` more rows.
 * Part i has rows[i] rows of w and rank[i] of the `used` columns and rows, one part behind the other:
 *   w[rows of i, in + columns of i] = scaling[i] * b[i] [rows[i], rank[i]],   w[out + columns of i, :in] = a[i] [rank[i], in]
 * and zeros in the margin's columns elsewhere. Factors are f32, rounded to w's dtype. */
typedef struct tp_pack_lowrank_args {
    int64_t out, in, used;
    tp_rows w;
    int64_t rows[TP_PACKED_PARTS], rank[TP_PACKED_PARTS]; /* unused parts: 0 */
    const float *a[TP_PACKED_PARTS], *b[TP_PACKED_PARTS];
    float scaling[TP_PACKED_PARTS];
} tp_pack_lowrank_args;

/* Both gradients that pass through the up factors of such parts, from one reading of dy [n, out]. Part i has rows[i] columns of
 * dy and rows of b, and rank[i] columns of b [out, used], u and du [n, used], one part behind the other:
 *   du_i = dy_i b_i         db_i [rows[i], rank[i]] f32 += scaling[i] * dy_i^T u_i
 * dy, u, b and du have one dtype. */
typedef struct tp_lowrank_backward_args {
    int64_t n;
    tp_rows dy, b, u, du;
    int64_t rows[TP_PACKED_PARTS], rank[TP_PACKED_PARTS]; /* unused parts: 0 */
    float *db[TP_PACKED_PARTS];                           /* contiguous; NULL: not wanted */
    float scaling[TP_PACKED_PARTS];
} tp_lowrank_backward_args;

/* out [m] f32 += sum over n rows of a [n, m] (beta = 1) or = (beta = 0). */
typedef struct tp_column_sum_args {
    int64_t n, m;
    tp_rows a;
    float *out;
    float beta;
} tp_column_sum_args;

/* out[i, :] (+)= table[ids[i], :]. ids are checked by the caller; a negative one stands for zeros. */
typedef struct tp_embedding_args {
    int64_t n;
    const int32_t *ids;
    tp_matrix table; /* [V, D] */
    tp_rows out;     /* [n, D] */
    bool accumulate;
} tp_embedding_args;

/* dtable[ids[i], :] += dout[i, :], in row order. */
typedef struct tp_embedding_backward_args {
    int64_t n, dim;
    const int32_t *ids;
    tp_rows dout;
    float *dtable;
} tp_embedding_backward_args;

/* out[i, :] = in[index[i], :] and out[index[i], :] = in[i, :] (scatter: `rows` total rows, others set to 0 if zero_rest). A
 * negative index gathers zeros, and scatters nowhere. */
typedef struct tp_gather_rows_args {
    int64_t n, dim;
    const int32_t *index;
    tp_rows in, out;
} tp_gather_rows_args;
typedef struct tp_scatter_rows_args {
    int64_t n, dim, rows;
    const int32_t *index; /* ascending, distinct; negative ones behind them */
    tp_rows in, out;
    bool zero_rest;
} tp_scatter_rows_args;

/* y = weight * x * rstd, rstd = 1/sqrt(mean(x^2) + eps) in f32. For bf16, x * rstd is rounded before the weight (Llama).
 * Zhang & Sennrich 2019. The n rows may be heads of tokens: then every `heads` of them lie side by side, `dim` apart, and
 * ld leads from token to token. */
typedef struct tp_rmsnorm_args {
    int64_t n, dim;
    tp_rows x, y;
    const float *weight; /* [dim] */
    float *rstd;         /* [n], may be NULL when no gradient is wanted */
    float eps;
    int64_t heads; /* 0 or 1: rows are ld apart */
} tp_rmsnorm_args;
/* dx (+)= rstd * (w dy - x rstd^2 mean(w dy x)); dweight += sum dy x rstd (NULL: not wanted). */
typedef struct tp_rmsnorm_backward_args {
    int64_t n, dim;
    tp_rows x, dy, dx;
    const float *weight, *rstd;
    float *dweight;
    bool accumulate;
    int64_t heads; /* as above */
} tp_rmsnorm_backward_args;

/* y = weight * (x - mean) * rstd + bias. */
typedef struct tp_layernorm_args {
    int64_t n, dim;
    tp_rows x, y;
    const float *weight, *bias; /* bias may be NULL */
    float *mean, *rstd;         /* [n] */
    float eps;
} tp_layernorm_args;
typedef struct tp_layernorm_backward_args {
    int64_t n, dim;
    tp_rows x, dy, dx;
    const float *weight, *mean, *rstd;
    float *dweight, *dbias; /* NULL: not wanted; else added to */
    bool accumulate;
} tp_layernorm_backward_args;

/* cos, sin [n, half] of position * inv_freq, times `factor` (yarn's attention factor); angles in f32, as PyTorch does. */
typedef struct tp_rope_table_args {
    int64_t n, half;
    const int32_t *positions;
    const float *inv_freq; /* [half] */
    float factor;
    float *cos, *sin;
} tp_rope_table_args;

/* Rotates x [n, heads * head_dim] in place, first 2*half channels of each head, pairs (i, i + half): Su et al. 2021,
 * arXiv:2104.09864, in GPT-NeoX's order. inverse: the transposed rotation (gradient). For bf16, cos and sin are rounded
 * to bf16 first, as the reference does. */
typedef struct tp_rope_args {
    int64_t n, heads, head_dim, half;
    tp_rows x;
    const float *cos, *sin;
    bool inverse;
} tp_rope_args;

/* A run of queries over a run of keys; query i of the run sees keys j <= i + (k_len - q_len) if causal. */
typedef struct tp_segment {
    int64_t q_start, q_len, k_start, k_len;
} tp_segment;

/* out = softmax(scale q k^T + mask) v per head, never storing a score matrix (Dao 2023, arXiv:2307.08691).
 * Query head h reads key head h / (heads / kv_heads). window w > 0: also j > i + (k_len - q_len) - w. Rows in no segment
 * and fully masked rows give zeros. Prefix keys (prefix tuning) are seen by every query of every segment. */
typedef struct tp_attention_args {
    int64_t n_q; /* rows of q and out */
    int64_t heads, kv_heads, head_dim;
    tp_rows q, k, v, out;       /* q, out [n_q, heads*head_dim]; k, v [n_k, kv_heads*head_dim] */
    float *lse;                 /* [n_q, heads] log-sum-exp per row for backward, or NULL; -inf for rows without keys */
    const tp_segment *segments; /* ascending, not overlapping in q; host memory */
    int64_t n_segments;
    bool causal;
    int64_t window;
    float scale;
    float soft_cap;             /* 0: none; c*tanh(s/c) before the mask */
    const float *alibi_slopes;  /* [heads] or NULL */
    tp_rows prefix_k, prefix_v; /* [n_prefix, kv_heads*head_dim] */
    int64_t n_prefix;
} tp_attention_args;
/* dq, dk, dv are overwritten (rows outside segments with zeros); the other fields as in forward, whose out and lse it
 * needs. delta [n_q, heads] is scratch. */
typedef struct tp_attention_backward_args {
    tp_attention_args forward;
    int64_t n_k;
    tp_rows dout, dq, dk, dv;
    float *delta;
} tp_attention_backward_args;

/* y = silu(gate) * up;  silu(g) = g / (1 + exp(-g)). Shazeer 2020, arXiv:2002.05202. All [n, dim]. */
typedef struct tp_swiglu_args {
    int64_t n, dim;
    tp_rows gate, up, y;
} tp_swiglu_args;
/* dgate and dup may be the same memory as gate and up. */
typedef struct tp_swiglu_backward_args {
    int64_t n, dim;
    tp_rows gate, up, dy, dgate, dup;
} tp_swiglu_backward_args;

/* The gradient of y = silu(gate) * up between linears with low-rank factors, and of those factors:
 *   before   of the stacked weight that made gate and up, whose dy is [dgate | dup]; no ranks: none
 *   behind   of the weight that read y: c = alpha a^T y + beta c, where y is made again, for it need not have been kept; b is
 * not read; c NULL: none No two arrays share memory, and dy's contents may be lost. */
typedef struct tp_swiglu_factors_args {
    tp_swiglu_backward_args swiglu;
    tp_lowrank_backward_args before;
    tp_matmul_tn_args behind;
} tp_swiglu_factors_args;

/* tanh form (gelu_new): 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), or with erf if `exact`. */
typedef struct tp_gelu_args {
    int64_t n, dim;
    tp_rows x, y;
    bool exact;
} tp_gelu_args;
typedef struct tp_gelu_backward_args {
    int64_t n, dim;
    tp_rows x, dy, dx; /* dx may be dy */
    bool exact;
} tp_gelu_backward_args;

/* z = x + y, any aliasing of whole arrays; dtypes may differ. */
typedef struct tp_add_args {
    int64_t n, dim;
    tp_rows x, y, z;
} tp_add_args;

/* y = alpha * x (alpha = 1 copies and converts; alpha = 0 writes zeros without reading x). */
typedef struct tp_scale_args {
    int64_t n, dim;
    tp_rows x, y;
    float alpha;
} tp_scale_args;

/* What changes from step to step, in device memory, so that recorded kernels can be replayed. */
typedef struct tp_step_state {
    float learning_rate;
    float bias1, bias2;            /* 1 - beta1^t, 1 - beta2^t */
    float max_norm;                /* 0: no clipping */
    float loss_scale;              /* a power of 2: gradients are of the loss times this */
    float clip;                    /* out: min(1, max_norm / (norm + 1e-6)) / loss_scale */
    int32_t finite;                /* out: 1 if loss and norm are finite and the loss is no spike; the updates obey it */
    double norm;                   /* out: 2-norm of all gradients, divided by loss_scale, before clipping */
    double loss_sum;               /* sum over labels of the step so far */
    double loss_mean, loss_spread; /* a loss is a spike if it is more than the spread above the mean; infinite: none is */
    uint64_t draw;                 /* of the micro-batch that runs: the step of its random numbers, */
    float grad_scale;              /* and what one unit of loss weighs */
} tp_step_state;

/* y (+)= keep ? x / (1 - p) : 0. Element (r, c) uses number (first_row + r) * dim + c of the generator: keep iff
 * uniform >= p. The gradient is the same kernel on dy. With a state, its draw takes the place of key.step. */
typedef struct tp_dropout_args {
    int64_t n, dim;
    tp_rows x, y;
    float p;
    tp_rng_key key;
    int64_t first_row;
    bool accumulate;
    const tp_step_state *state; /* or NULL */
} tp_dropout_args;

/* What low-rank parts of a stacked weight do behind dropout, each with draws of its own: d_i(x) is tp_dropout of x [n, in] with
 * p[i] and key[i]. Part i has rank[i] columns of low [n, used] and rows of a [used, in], one part behind the other.
 *   dropped_down      low_i = d_i(x) a_i^T
 *   dropped_gradient  da_i [rank[i], in] f32 += low_i^T d_i(x)         where da_i is not NULL
 *   dropped_up        dx += sum_i d_i(low_i a_i)
 * x, dx, low and a have one dtype. Devices and shapes that tp_drops_in_products names use `masks`: for each part with a rank a
 * bit for each value of x, 1 where it is kept, as [n, in / 8] bytes, which dropped_down writes (unless it is NULL) and the others
 * read. All others use `scratch` [n, in]. */
typedef struct tp_dropped_args {
    int64_t n, in;
    tp_rows x, dx, low, a;
    int64_t rank[TP_PACKED_PARTS]; /* unused parts: 0 */
    float *da[TP_PACKED_PARTS];
    float p[TP_PACKED_PARTS];
    tp_rng_key key[TP_PACKED_PARTS];
    int64_t first_row;
    const tp_step_state *state; /* or NULL */
    uint8_t *masks;
    tp_rows scratch;
} tp_dropped_args;

/* loss[i] = log-sum-exp(logits[i]) - logits[i, labels[i]]; logits (f32) become gradients in place:
 * (softmax - onehot) * grad_scale, if want_grad. `narrow`: gradients are rounded to narrow_type and lie over the first half of
 * their row: an array of twice the leading dimension. With a state, its grad_scale * loss_scale is what counts. */
typedef struct tp_cross_entropy_args {
    int64_t n, vocab;
    float *logits; /* [n, ld] */
    int64_t ld;
    const int32_t *labels; /* [n], all in 0..vocab-1, or negative: no loss, and a gradient of zeros */
    float *loss;           /* [n] */
    float grad_scale;
    bool want_grad, narrow;
    tp_dtype narrow_type;       /* TP_BF16 or TP_F16 */
    const tp_step_state *state; /* or NULL */
} tp_cross_entropy_args;

/* loss *= state->grad_scale, state->loss_sum += loss. */
typedef struct tp_add_loss_args {
    float *loss;
    tp_step_state *state;
} tp_add_loss_args;

/* Norm of g [n], clip factor and finite flag into state. The sum of squares is taken over blocks of 4096 in f64, added in
 * order. */
typedef struct tp_grad_norm_args {
    int64_t n;
    const float *g;
    tp_step_state *state;
} tp_grad_norm_args;

/* If state->finite: g' = clip*g; w *= 1 - lr*decay; m = b1 m + (1-b1) g'; v = b2 v + (1-b2) g'^2;
 * w -= lr * (m / bias1) / (sqrt(v) / sqrt(bias2) + eps).  Loshchilov & Hutter 2019, arXiv:1711.05101. */
typedef struct tp_adamw_args {
    int64_t n;
    float *w, *m, *v;
    const float *g;
    const tp_step_state *state;
    float beta1, beta2, epsilon, weight_decay;
} tp_adamw_args;

/* If state->finite: g' = clip*g + decay*w; m = momentum*m + g' (first step: m = g'); w -= lr * m. As torch.optim.SGD.
 * momentum 0: m is not touched and may be NULL. */
typedef struct tp_sgd_args {
    int64_t n;
    float *w, *m;
    const float *g;
    const tp_step_state *state;
    float momentum, weight_decay;
} tp_sgd_args;

/* ---- decoding: a few rows, each the next token of a sequence of its own ----
 *
 * A token reads every weight once, so these kernels do in one pass what would be several: launches and passes over small rows
 * are what is left beside the weights. On a GPU each row's result is the same bits whatever the other rows are and however
 * many; what changes from step to step is read from device memory, so that a step can be captured and replayed. */

#define TP_LINEARS_PARTS 3

typedef struct tp_linears_part {
    tp_matrix w;                    /* [m_i, k] */
    const float *bias;              /* or NULL */
    const tp_lowrank_args *lowrank; /* nt, or NULL */
    tp_rows y;                      /* [n, m_i]; with swiglu, that of part 1 is scratch */
} tp_linears_part;

/* y_i = norm(x) w_i^T + bias_i + low-rank part of i, for linears that read the same x [n, k]. norm is rmsnorm with
 * `norm_weight` and eps, or nothing if that is NULL. swiglu: there are two parts, and y_0 = silu(y_0) * y_1. residual (or
 * NULL) is added to y_0 and may be y_0. y is rounded where several passes would round it. Weights, norms, biases and
 * factors must not be written by the kernels that ran just before: reading them may begin before those end. */
typedef struct tp_linears_args {
    int64_t n, k;
    tp_rows x;
    const float *norm_weight; /* [k] or NULL */
    float eps;
    tp_rows normed; /* [n, k] scratch, dtype of x; only with a norm */
    int n_parts;
    tp_linears_part parts[TP_LINEARS_PARTS];
    bool swiglu;
    const void *residual; /* dtype of y_0 */
    int64_t residual_ld;
    tp_dtype precision; /* as in tp_matmul_args */
} tp_linears_args;

#define TP_ATTEND_PARTS 32 /* stretches that the keys of a row are cut into, at most */

/* Attention of the next token of n sequences. Row i belongs to sequence i, which has used[i] keys in rows i * capacity and on
 * of the cache: heads of q and k get their norms (rmsnorm, unless NULL) and rope (halves of `half` pairs, as tp_rope_args),
 * k and v go to the cache behind those keys, and out = softmax(scale q k^T) v over used[i] + 1 keys, or the last `window` of
 * them if that is > 0. q and k may be changed. All arrays have one dtype. used, the angles, the norms and the cache must not be
 * written by the kernels that ran just before, other than by such calls. */
typedef struct tp_attend_args {
    int64_t n, heads, kv_heads, head_dim;
    tp_rows q, k, v, out;         /* [n, heads * head_dim], [n, kv_heads * head_dim] */
    const float *q_norm, *k_norm; /* [head_dim] */
    float eps;
    const float *cos, *sin;   /* [n, half] */
    int64_t half;             /* 0: no rope */
    tp_rows cache_k, cache_v; /* [n * capacity, kv_heads * head_dim] */
    int64_t capacity;
    const int32_t *used; /* [n] */
    int64_t window;
    float scale;
    float *parts;      /* [n * heads * TP_ATTEND_PARTS, head_dim + 2] scratch */
    int32_t *counters; /* [n * heads], zero before and after */
} tp_attend_args;

#define TP_SAMPLE_EXTRA 256 /* numbers of scratch for a row, beyond the vocabulary */

/* The next token of n sequences from logits [n, ld], which are changed: what inference/sampler.h says, with its draws. What it
 * depends on and what it leaves is in device memory: seen [n, vocab] (what the repetition penalty counts; the chosen one is
 * added), counts [n] (tokens sampled so far: the index of the draw), ids [n] (out: the token), history [history_length, n]
 * (out: the token, in line counts % history_length), positions [n] and counts (one more each; positions at most
 * position_limit), bad [n] (out: 1 + the first token whose logit is no number, if it was 0; the token is then 0). */
typedef struct tp_sample_args {
    int64_t n, vocab;
    float *logits;
    int64_t ld;
    double temperature; /* 0: greedy */
    int64_t top_k;      /* 0: off */
    double top_p, min_p, repetition_penalty;
    uint64_t seed;
    unsigned char *seen; /* NULL: no penalty */
    uint64_t *scratch;   /* [n, vocab + TP_SAMPLE_EXTRA] */
    int32_t *ids, *positions, *counts, *history, *bad;
    int64_t history_length;
    int32_t position_limit;
} tp_sample_args;

enum tp_kernel_id {
#define TP_KERNEL(name, args) TP_KERNEL_##name,
#include "backend/kernels.def"
#undef TP_KERNEL
    TP_KERNEL_COUNT
};

typedef tp_status (*tp_kernel)(tp_ctx *ctx, const void *args);

#ifdef __cplusplus
}
#endif
#endif
