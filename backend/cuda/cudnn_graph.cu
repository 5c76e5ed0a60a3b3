/* Attention as cuDNN wants to hear of it: a graph of matrix products, pointwise operations and reductions over [batch, heads,
 * length, length] scores that exist nowhere. cuDNN recognises the whole as attention and has one kernel for it; the order and
 * the kinds of operations are what it looks for, and where they differ it has no plan. Transposed factors are tensors with
 * exchanged strides. */
#include <string.h>

#include "backend/cuda/cudnn.cuh"

#define DESCRIPTORS 192
#define OPERATIONS  40
#define CONFIGS     8
#define KNOBS       16
#define SHORT_KEYS  2048 /* below this, the kernel for long sequences of small heads is the slower one */

namespace
{

typedef tp_dnn_descriptor descriptor;

struct dims {
    int64_t of[4];
};

/* Everything but the plan is dropped when that is there. After the first failure nothing more happens. */
struct graph {
    const tp_dnn *dnn;
    int narrow; /* TP_DNN_BF16 or TP_DNN_F16: of all that is not f32 */
    bool failed;
    descriptor all[DESCRIPTORS], operations[OPERATIONS];
    int n, n_operations;
    int64_t next_id;
};

descriptor make(graph *g, int kind)
{
    descriptor d = NULL;
    if (g->failed || g->n == DESCRIPTORS || g->dnn->BackendCreateDescriptor(kind, &d) != TP_DNN_OK) {
        g->failed = true;
        return NULL;
    }
    g->all[g->n++] = d;
    return d;
}

void set(graph *g, descriptor d, int attribute, int value, int64_t n, const void *values)
{
    if (!g->failed) g->failed = g->dnn->BackendSetAttribute(d, attribute, value, n, values) != TP_DNN_OK;
}

void set_word(graph *g, descriptor d, int attribute, int value, int x)
{
    set(g, d, attribute, value, 1, &x);
}
void set_int(graph *g, descriptor d, int attribute, int64_t x)
{
    set(g, d, attribute, TP_DNN_V_INT64, 1, &x);
}
void set_flag(graph *g, descriptor d, int attribute, bool x)
{
    set(g, d, attribute, TP_DNN_V_BOOLEAN, 1, &x);
}
void set_part(graph *g, descriptor d, int attribute, descriptor x)
{
    set(g, d, attribute, TP_DNN_V_DESCRIPTOR, 1, &x);
}

void finish(graph *g, descriptor d)
{
    if (!g->failed) g->failed = g->dnn->BackendFinalize(d) != TP_DNN_OK;
}

void add_operation(graph *g, descriptor d)
{
    finish(g, d);
    if (g->n_operations == OPERATIONS)
        g->failed = true;
    else
        g->operations[g->n_operations++] = d;
}

/* ---- tensors ---- */

dims packed(dims sizes)
{
    return {{sizes.of[1] * sizes.of[2] * sizes.of[3], sizes.of[2] * sizes.of[3], sizes.of[3], 1}};
}

dims transposed(dims x)
{
    return {{x.of[0], x.of[1], x.of[3], x.of[2]}};
}

enum where { IN_MEMORY, NOWHERE, BY_VALUE };

/* starts: where each sequence begins, if they are packed. */
descriptor tensor(graph *g, int64_t id, int type, dims sizes, dims strides, where place, descriptor starts = NULL)
{
    const descriptor t = make(g, TP_DNN_TENSOR);
    set_word(g, t, TP_DNN_TENSOR_TYPE, TP_DNN_V_TYPE, type);
    set(g, t, TP_DNN_TENSOR_SIZES, TP_DNN_V_INT64, 4, sizes.of);
    set(g, t, TP_DNN_TENSOR_STRIDES, TP_DNN_V_INT64, 4, strides.of);
    set_int(g, t, TP_DNN_TENSOR_ID, id);
    set_int(g, t, TP_DNN_TENSOR_ALIGNMENT, place == BY_VALUE ? (int64_t)sizeof(float) : 16);
    set_flag(g, t, TP_DNN_TENSOR_VIRTUAL, place == NOWHERE);
    set_flag(g, t, TP_DNN_TENSOR_BY_VALUE, place == BY_VALUE);
    if (starts != NULL) set_part(g, t, TP_DNN_TENSOR_STARTS, starts);
    finish(g, t);
    return t;
}

/* Heads side by side in rows. */
descriptor rows(graph *g, int64_t id, dims sizes, int64_t apart, int64_t ld, descriptor starts = NULL)
{
    return tensor(g, id, g->narrow, sizes, {{apart * ld, sizes.of[3], ld, 1}}, IN_MEMORY, starts);
}

descriptor rows_transposed(graph *g, int64_t id, dims sizes, int64_t apart, int64_t ld, descriptor starts = NULL)
{
    return tensor(g, id, g->narrow, transposed(sizes), {{apart * ld, sizes.of[3], 1, ld}}, IN_MEMORY, starts);
}

/* n integers, or NULL if the sequences are not packed. */
descriptor integers(graph *g, const tp_dnn_shape *s, int64_t id, int64_t n)
{
    return s->packed ? tensor(g, id, TP_DNN_INT32, {{n, 1, 1, 1}}, {{1, 1, 1, 1}}, IN_MEMORY) : NULL;
}

descriptor starts(graph *g, const tp_dnn_shape *s, int64_t id)
{
    return integers(g, s, id, s->batch + 1);
}

descriptor number(graph *g, int64_t id)
{
    return tensor(g, id, TP_DNN_FLOAT, {{1, 1, 1, 1}}, {{1, 1, 1, 1}}, BY_VALUE);
}

descriptor inner(graph *g, int type, dims sizes)
{
    return tensor(g, g->next_id++, type, sizes, packed(sizes), NOWHERE);
}

/* ---- operations ---- */

void pointwise(graph *g, int mode, int type, descriptor x, descriptor b, descriptor y, descriptor selects = NULL,
               int64_t axis = 0)
{
    const descriptor how = make(g, TP_DNN_POINTWISE), op = make(g, TP_DNN_OP_POINTWISE);
    set_word(g, how, TP_DNN_POINTWISE_MODE, TP_DNN_V_POINTWISE, mode);
    set_word(g, how, TP_DNN_POINTWISE_TYPE, TP_DNN_V_TYPE, type);
    if (mode == TP_DNN_INDEX) set_int(g, how, TP_DNN_POINTWISE_AXIS, axis);
    finish(g, how);
    set_part(g, op, TP_DNN_OP_POINTWISE_HOW, how);
    set_part(g, op, TP_DNN_OP_POINTWISE_X, x);
    if (b != NULL) set_part(g, op, TP_DNN_OP_POINTWISE_B, b);
    if (selects != NULL) set_part(g, op, TP_DNN_OP_POINTWISE_T, selects);
    set_part(g, op, TP_DNN_OP_POINTWISE_Y, y);
    add_operation(g, op);
}

/* y = x op b in f32, [sizes] and nowhere. */
descriptor value(graph *g, int mode, dims sizes, descriptor x, descriptor b)
{
    const descriptor y = inner(g, TP_DNN_FLOAT, sizes);
    pointwise(g, mode, TP_DNN_FLOAT, x, b, y);
    return y;
}

/* n_rows, n_columns, n_sum: of each sequence's product, if they are packed. */
void product(graph *g, descriptor a, descriptor b, descriptor c, descriptor n_rows = NULL, descriptor n_columns = NULL,
             descriptor n_sum = NULL)
{
    const descriptor how = make(g, TP_DNN_MATMUL), op = make(g, TP_DNN_OP_MATMUL);
    set_word(g, how, TP_DNN_MATMUL_TYPE, TP_DNN_V_TYPE, TP_DNN_FLOAT);
    finish(g, how);
    set_part(g, op, TP_DNN_OP_MATMUL_HOW, how);
    set_part(g, op, TP_DNN_OP_MATMUL_A, a);
    set_part(g, op, TP_DNN_OP_MATMUL_B, b);
    set_part(g, op, TP_DNN_OP_MATMUL_C, c);
    if (n_rows != NULL) set_part(g, op, TP_DNN_OP_MATMUL_ROWS, n_rows);
    if (n_columns != NULL) set_part(g, op, TP_DNN_OP_MATMUL_COLUMNS, n_columns);
    if (n_sum != NULL) set_part(g, op, TP_DNN_OP_MATMUL_SUM, n_sum);
    add_operation(g, op);
}

void reduce(graph *g, int mode, descriptor x, descriptor y)
{
    const descriptor how = make(g, TP_DNN_REDUCTION), op = make(g, TP_DNN_OP_REDUCTION);
    set_word(g, how, TP_DNN_REDUCTION_HOW, TP_DNN_V_REDUCTION, mode);
    set_word(g, how, TP_DNN_REDUCTION_TYPE, TP_DNN_V_TYPE, TP_DNN_FLOAT);
    finish(g, how);
    set_part(g, op, TP_DNN_OP_REDUCTION_HOW, how);
    set_part(g, op, TP_DNN_OP_REDUCTION_X, x);
    set_part(g, op, TP_DNN_OP_REDUCTION_Y, y);
    add_operation(g, op);
}

descriptor reduced(graph *g, int mode, descriptor x, dims sizes)
{
    const descriptor y = inner(g, TP_DNN_FLOAT, sizes);
    reduce(g, mode, x, y);
    return y;
}

void reshape(graph *g, descriptor x, descriptor y)
{
    const descriptor op = make(g, TP_DNN_OP_RESHAPE);
    set_part(g, op, TP_DNN_OP_RESHAPE_X, x);
    set_part(g, op, TP_DNN_OP_RESHAPE_Y, y);
    add_operation(g, op);
}

/* ---- attention ---- */

struct sizes {
    dims wide, narrow, scores, row; /* of q, of k, and what there is for each pair, and for each query */
};

sizes sizes_of(const tp_dnn_shape *s)
{
    return {{{s->batch, s->heads, s->length, s->head_dim}},
            {{s->batch, s->kv_heads, s->length, s->head_dim}},
            {{s->batch, s->heads, s->length, s->length}},
            {{s->batch, s->heads, s->length, 1}}};
}

descriptor log_sum_exp(graph *g, const tp_dnn_shape *s, dims row)
{
    return tensor(g, TP_DNN_LSE, TP_DNN_FLOAT, row, {{s->q_apart * s->heads, 1, s->heads, 1}}, IN_MEMORY,
                  starts(g, s, TP_DNN_LSE_STARTS));
}

/* x where `low` does not exceed `high`, or is less if `strictly`; else -inf. */
descriptor where_less(graph *g, dims scores, descriptor x, descriptor low, descriptor high, bool strictly)
{
    const descriptor seen = inner(g, TP_DNN_BOOLEAN, scores), y = inner(g, TP_DNN_FLOAT, scores);
    pointwise(g, strictly ? TP_DNN_GREATER : TP_DNN_GREATER_EQUAL, TP_DNN_BOOLEAN, high, low, seen);
    pointwise(g, TP_DNN_SELECT, TP_DNN_FLOAT, x, number(g, TP_DNN_MASKED), y, seen);
    return y;
}

/* The number of the query, or of the key, of each score. */
descriptor index(graph *g, dims scores, descriptor x, int64_t axis, int type = TP_DNN_FLOAT)
{
    const descriptor y = inner(g, TP_DNN_INT32, scores);
    pointwise(g, TP_DNN_INDEX, type, x, NULL, y, NULL, axis);
    return y;
}

/* x for pairs of a sequence's own queries and keys, else -inf. */
descriptor in_sequence(graph *g, dims scores, descriptor x, descriptor n_queries, descriptor n_keys)
{
    const descriptor query = index(g, scores, x, 2, TP_DNN_INT32), key = index(g, scores, x, 3, TP_DNN_INT32),
                     is_query = inner(g, TP_DNN_BOOLEAN, scores), is_key = inner(g, TP_DNN_BOOLEAN, scores),
                     both = inner(g, TP_DNN_BOOLEAN, scores), y = inner(g, TP_DNN_FLOAT, scores);
    pointwise(g, TP_DNN_LESS, TP_DNN_BOOLEAN, query, n_queries, is_query);
    pointwise(g, TP_DNN_LESS, TP_DNN_BOOLEAN, key, n_keys, is_key);
    pointwise(g, TP_DNN_BOTH, TP_DNN_BOOLEAN, is_query, is_key, both);
    pointwise(g, TP_DNN_SELECT, TP_DNN_FLOAT, x, number(g, TP_DNN_MASKED), y, both);
    return y;
}

/* -inf for keys behind the query, and for those that the window has left. */
descriptor masked(graph *g, const tp_dnn_shape *s, dims scores, descriptor x)
{
    if (s->causal) {
        const descriptor query = index(g, scores, x, 2), key = index(g, scores, x, 3);
        x = where_less(g, scores, x, key, query, false);
    }
    if (s->window > 0) {
        const descriptor query = index(g, scores, x, 2), key = index(g, scores, x, 3);
        x = where_less(g, scores, x, query, value(g, TP_DNN_ADD, scores, key, number(g, TP_DNN_WINDOW)), true);
    }
    return x;
}

void build_forward(graph *g, const tp_dnn_shape *s)
{
    const sizes z = sizes_of(s);
    const descriptor n_queries = integers(g, s, TP_DNN_Q_LENGTHS, s->batch),
                     n_keys = integers(g, s, TP_DNN_K_LENGTHS, s->batch);
    const descriptor q = rows(g, TP_DNN_Q, z.wide, s->q_apart, s->q_ld, starts(g, s, TP_DNN_Q_STARTS)),
                     k = rows_transposed(g, TP_DNN_K, z.narrow, s->k_apart, s->k_ld, starts(g, s, TP_DNN_K_STARTS)),
                     v = rows(g, TP_DNN_V, z.narrow, s->k_apart, s->v_ld, starts(g, s, TP_DNN_V_STARTS)),
                     out = rows(g, TP_DNN_OUT, z.wide, s->q_apart, s->out_ld, starts(g, s, TP_DNN_OUT_STARTS)),
                     lse = log_sum_exp(g, s, z.row), scores = inner(g, TP_DNN_FLOAT, z.scores),
                     weights = inner(g, g->narrow, z.scores);
    product(g, q, k, scores, n_queries, n_keys);
    const descriptor scaled = value(g, TP_DNN_MUL, z.scores, scores, number(g, TP_DNN_SCALE)),
                     own = s->packed ? in_sequence(g, z.scores, scaled, n_queries, n_keys) : scaled,
                     seen = masked(g, s, z.scores, own), greatest = reduced(g, TP_DNN_MAX, seen, z.row),
                     lowered = value(g, TP_DNN_SUB, z.scores, seen, greatest),
                     powers = value(g, TP_DNN_EXP, z.scores, lowered, NULL), sum = reduced(g, TP_DNN_SUM, powers, z.row);
    pointwise(g, TP_DNN_ADD, TP_DNN_FLOAT, greatest, value(g, TP_DNN_LOG, z.row, sum, NULL), lse);
    pointwise(g, TP_DNN_DIV, TP_DNN_FLOAT, powers, sum, weights);
    product(g, weights, v, out, n_queries, NULL, n_keys);
}

/* Sums over heads that share a key head, of a product that has one for each. */
void product_of_group(graph *g, const tp_dnn_shape *s, const sizes &z, descriptor a, descriptor b, descriptor c)
{
    if (s->heads == s->kv_heads) {
        product(g, a, b, c);
        return;
    }
    const descriptor each = inner(g, g->narrow, z.wide);
    product(g, a, b, each);
    reduce(g, TP_DNN_SUM, each, c);
}

descriptor scores_transposed(graph *g, dims scores, descriptor x)
{
    dims strides = packed(scores);
    strides = transposed(strides);
    const descriptor y = tensor(g, g->next_id++, g->narrow, transposed(scores), strides, NOWHERE);
    reshape(g, x, y);
    return y;
}

/* dq is a product with stored gradients of scores: that takes much workspace, but no sums in an order left to chance. Where
 * these are allowed, they are f32 sums that every block adds its part to. */
void build_backward(graph *g, const tp_dnn_shape *s)
{
    const sizes z = sizes_of(s);
    const descriptor q = rows(g, TP_DNN_Q, z.wide, s->q_apart, s->q_ld),
                     k = rows_transposed(g, TP_DNN_K, z.narrow, s->k_apart, s->k_ld),
                     v = rows_transposed(g, TP_DNN_V, z.narrow, s->k_apart, s->v_ld),
                     out = rows(g, TP_DNN_OUT, z.wide, s->q_apart, s->out_ld),
                     dout = rows(g, TP_DNN_DOUT, z.wide, s->q_apart, s->dout_ld),
                     dq = rows(g, TP_DNN_DQ, z.wide, s->q_apart, s->dq_ld),
                     dk = rows(g, TP_DNN_DK, z.narrow, s->k_apart, s->dk_ld),
                     dv = rows(g, TP_DNN_DV, z.narrow, s->k_apart, s->dv_ld), lse = log_sum_exp(g, s, z.row),
                     delta = tensor(g, TP_DNN_DELTA, TP_DNN_FLOAT, z.row, packed(z.row), IN_MEMORY),
                     scale = number(g, TP_DNN_SCALE);
    const descriptor sum = reduced(g, TP_DNN_SUM, value(g, TP_DNN_MUL, z.wide, dout, out), z.row);
    pointwise(g, TP_DNN_MUL, TP_DNN_FLOAT, sum, number(g, TP_DNN_ONE), delta);

    const descriptor scores = inner(g, TP_DNN_FLOAT, z.scores);
    product(g, q, k, scores);
    const descriptor scaled = value(g, TP_DNN_MUL, z.scores, scores, scale),
                     lowered = value(g, TP_DNN_SUB, z.scores, scaled, lse),
                     weights = value(g, TP_DNN_EXP, z.scores, masked(g, s, z.scores, lowered), NULL);
    product_of_group(g, s, z, scores_transposed(g, z.scores, weights), dout, dv);

    const descriptor dweights = inner(g, TP_DNN_FLOAT, z.scores);
    product(g, dout, v, dweights);
    const descriptor apart = value(g, TP_DNN_SUB, z.scores, dweights, delta),
                     dscaled = value(g, TP_DNN_MUL, z.scores, apart, weights),
                     dscores = value(g, TP_DNN_MUL, z.scores, dscaled, scale);
    product_of_group(g, s, z, scores_transposed(g, z.scores, dscores), q, dk);

    const descriptor keys =
        tensor(g, g->next_id++, g->narrow, z.narrow, {{s->k_apart * s->k_ld, s->head_dim, s->k_ld, 1}}, NOWHERE);
    reshape(g, k, keys);
    if (s->any_order) {
        const descriptor sums = tensor(g, TP_DNN_SUMS, TP_DNN_FLOAT, z.wide, packed(z.wide), IN_MEMORY);
        product(g, dscores, keys, sums);
        pointwise(g, TP_DNN_IDENTITY, TP_DNN_FLOAT, sums, NULL, dq);
    } else {
        product(g, dscores, keys, dq);
    }
}

/* ---- choosing an engine ---- */

/* Which of an engine's kernels a configuration takes, or -1. */
int64_t kernel_of(graph *g, descriptor config)
{
    const tp_dnn *dnn = g->dnn;
    descriptor choices[KNOBS];
    int64_t n = 0, got, kernel = -1;
    for (int i = 0; i < KNOBS; i++) choices[i] = make(g, TP_DNN_KNOB_CHOICE);
    if (g->failed ||
        dnn->BackendGetAttribute(config, TP_DNN_CONFIG_KNOBS, TP_DNN_V_DESCRIPTOR, KNOBS, &n, choices) != TP_DNN_OK)
        return -1;
    for (int64_t i = 0; i < n && i < KNOBS; i++) {
        int type = -1;
        int64_t chosen = -1;
        if (dnn->BackendGetAttribute(choices[i], TP_DNN_KNOB_TYPE, TP_DNN_V_KNOB, 1, &got, &type) == TP_DNN_OK &&
            type == TP_DNN_KNOB_KERNEL &&
            dnn->BackendGetAttribute(choices[i], TP_DNN_KNOB_VALUE, TP_DNN_V_INT64, 1, &got, &chosen) == TP_DNN_OK)
            kernel = chosen;
    }
    return kernel;
}

descriptor finish_plan(graph *g, descriptor config, int64_t *workspace)
{
    const tp_dnn *dnn = g->dnn;
    descriptor plan = NULL;
    int64_t got;
    if (dnn->BackendCreateDescriptor(TP_DNN_PLAN, &plan) != TP_DNN_OK) return NULL;
    if (dnn->BackendSetAttribute(plan, TP_DNN_PLAN_CONFIG, TP_DNN_V_DESCRIPTOR, 1, &config) == TP_DNN_OK &&
        dnn->BackendSetAttribute(plan, TP_DNN_PLAN_HANDLE, TP_DNN_V_HANDLE, 1, &dnn->handle) == TP_DNN_OK &&
        dnn->BackendFinalize(plan) == TP_DNN_OK &&
        dnn->BackendGetAttribute(plan, TP_DNN_PLAN_WORKSPACE, TP_DNN_V_INT64, 1, &got, workspace) == TP_DNN_OK)
        return plan;
    (void)dnn->BackendDestroyDescriptor(plan);
    return NULL;
}

/* The first configuration that cuDNN's rules name, with one exception that was measured: kernel 32 of 9.14 against 7, H200. */
descriptor choose(graph *g, const tp_dnn_shape *s, int64_t *workspace)
{
    const descriptor graph_of_ops = make(g, TP_DNN_GRAPH), heuristic = make(g, TP_DNN_HEURISTIC);
    descriptor configs[CONFIGS], plan = NULL;
    int64_t n = 0;
    int first = 0;
    set(g, graph_of_ops, TP_DNN_GRAPH_OPS, TP_DNN_V_DESCRIPTOR, g->n_operations, g->operations);
    set(g, graph_of_ops, TP_DNN_GRAPH_HANDLE, TP_DNN_V_HANDLE, 1, &g->dnn->handle);
    finish(g, graph_of_ops);
    set_part(g, heuristic, TP_DNN_HEURISTIC_GRAPH, graph_of_ops);
    set_word(g, heuristic, TP_DNN_HEURISTIC_MODE, TP_DNN_V_HEURISTIC, TP_DNN_HEURISTIC_A);
    finish(g, heuristic);
    for (int i = 0; i < CONFIGS; i++) configs[i] = make(g, TP_DNN_ENGINE_CONFIG);
    if (g->failed || g->dnn->BackendGetAttribute(heuristic, TP_DNN_HEURISTIC_RESULTS, TP_DNN_V_DESCRIPTOR, CONFIGS, &n,
                                                 configs) != TP_DNN_OK)
        return NULL;
    n = tp_cuda_min(n, CONFIGS);
    if (!s->gradient && s->length < SHORT_KEYS && n > 1 && kernel_of(g, configs[0]) == 32 && kernel_of(g, configs[1]) == 7)
        first = 1;
    for (int64_t i = first; i < n && plan == NULL; i++) plan = finish_plan(g, configs[i], workspace);
    return plan;
}

} // namespace

tp_dnn_descriptor tp_dnn_plan(const tp_dnn *dnn, const tp_dnn_shape *shape, int64_t *workspace)
{
    graph g = {};
    g.dnn = dnn;
    g.next_id = TP_DNN_IDS;
    g.narrow = shape->f16 ? TP_DNN_F16 : TP_DNN_BF16;
    if (shape->gradient)
        build_backward(&g, shape);
    else
        build_forward(&g, shape);
    const descriptor plan = choose(&g, shape, workspace);
    while (g.n > 0) (void)dnn->BackendDestroyDescriptor(g.all[--g.n]);
    return plan;
}
