/* Attention and its gradient against the formulas in float64, over shapes at and around the tile size. The reference's own
 * gradient is checked by differences of its forward pass. */
#include "tests/backend/kernels.h"

#define MAX_SEGMENTS 4

typedef struct attention_case {
    tp_attention_backward_args b;
    tp_segment *segments;
    int64_t n_k;
    /* reference */
    double *out, *lse, *dq, *dk, *dv;
} attention_case;

/* What makes a case; the rest is random. */
typedef struct shape {
    int64_t n_q, n_k, heads, kv_heads, head_dim;
    tp_segment segments[MAX_SEGMENTS];
    int64_t n_segments;
    int64_t singles; /* > 0: that many segments of one query and one key instead */
    bool causal;
    int64_t window, n_prefix;
    float soft_cap;
    bool alibi;
    tp_dtype dtype;
    double size; /* of q and k */
} shape;

/* Visible key of a segment, or of the prefix (j < 0). */
static bool sees(const tp_attention_args *a, const tp_segment *s, int64_t i, int64_t j)
{
    int64_t diagonal = i + s->k_len - s->q_len;
    if (j < 0) return true;
    return (!a->causal || j <= diagonal) && (a->window == 0 || j > diagonal - a->window);
}

static double key(const tp_attention_args *a, const tp_segment *s, int64_t j, int64_t column)
{
    return j < 0 ? at(a->prefix_k, j + a->n_prefix, column) : at(a->k, s->k_start + j, column);
}

static double value(const tp_attention_args *a, const tp_segment *s, int64_t j, int64_t column)
{
    return j < 0 ? at(a->prefix_v, j + a->n_prefix, column) : at(a->v, s->k_start + j, column);
}

/* Score before the mask; *slope is its derivative by scale * q k. */
static double score(const tp_attention_args *a, const tp_segment *s, int64_t i, int64_t h, int64_t j, double *slope)
{
    int64_t d = a->head_dim, kv = h / (a->heads / a->kv_heads);
    double x = 0;
    for (int64_t c = 0; c < d; c++) x += at(a->q, s->q_start + i, h * d + c) * key(a, s, j, kv * d + c);
    x *= (double)a->scale;
    *slope = 1;
    if (a->soft_cap > 0) {
        double t = tanh(x / (double)a->soft_cap);
        x = (double)a->soft_cap * t;
        *slope = 1 - t * t;
    }
    if (a->alibi_slopes != NULL) x += (double)a->alibi_slopes[h] * (double)(j - (i + s->k_len - s->q_len));
    return x;
}

static void reference_row(attention_case *t, const tp_segment *s, int64_t i, int64_t h, bool backward)
{
    const tp_attention_args *a = &t->b.forward;
    int64_t d = a->head_dim, kv = h / (a->heads / a->kv_heads), row = s->q_start + i, n = a->n_prefix + s->k_len;
    double *p = calloc((size_t)n + 1, sizeof *p), *slope = calloc((size_t)n + 1, sizeof *slope), greatest = -INFINITY, sum = 0;
    for (int64_t j = -a->n_prefix; j < s->k_len; j++) {
        double x = sees(a, s, i, j) ? score(a, s, i, h, j, &slope[j + a->n_prefix]) : -INFINITY;
        p[j + a->n_prefix] = x;
        greatest = fmax(greatest, x);
    }
    for (int64_t j = 0; j < n; j++) sum += p[j] > -INFINITY ? exp(p[j] - greatest) : 0;
    for (int64_t j = 0; j < n; j++) p[j] = p[j] > -INFINITY ? exp(p[j] - greatest) / sum : 0;
    t->lse[row * a->heads + h] = sum > 0 ? greatest + log(sum) : -INFINITY;
    double delta = 0, *out = t->out + row * a->heads * d + h * d;
    for (int64_t j = 0; j < n; j++) {
        for (int64_t c = 0; p[j] > 0 && c < d; c++) out[c] += p[j] * value(a, s, j - a->n_prefix, kv * d + c);
    }
    for (int64_t c = 0; backward && c < d; c++) delta += out[c] * at(t->b.dout, row, h * d + c);
    for (int64_t j = 0; backward && j < n; j++) {
        int64_t k = j - a->n_prefix;
        if (p[j] == 0) continue;
        double dp = 0;
        for (int64_t c = 0; c < d; c++) dp += at(t->b.dout, row, h * d + c) * value(a, s, k, kv * d + c);
        double ds = p[j] * (dp - delta) * slope[j] * (double)a->scale;
        for (int64_t c = 0; c < d; c++) {
            t->dq[row * a->heads * d + h * d + c] += ds * key(a, s, k, kv * d + c);
            if (k < 0) continue;
            int64_t to = (s->k_start + k) * a->kv_heads * d + kv * d + c;
            t->dk[to] += ds * at(a->q, row, h * d + c);
            t->dv[to] += p[j] * at(t->b.dout, row, h * d + c);
        }
    }
    free(p);
    free(slope);
}

static void reference(attention_case *t, bool backward)
{
    const tp_attention_args *a = &t->b.forward;
    size_t nq = (size_t)(a->n_q * a->heads * a->head_dim), nk = (size_t)(t->n_k * a->kv_heads * a->head_dim);
    memset(t->out, 0, nq * sizeof(double));
    memset(t->dq, 0, nq * sizeof(double));
    memset(t->dk, 0, nk * sizeof(double));
    memset(t->dv, 0, nk * sizeof(double));
    for (int64_t i = 0; i < a->n_q * a->heads; i++) t->lse[i] = -INFINITY;
    for (int64_t s = 0; s < a->n_segments; s++) {
        for (int64_t i = 0; i < a->segments[s].q_len; i++) {
            for (int64_t h = 0; h < a->heads; h++) reference_row(t, &a->segments[s], i, h, backward);
        }
    }
}

static attention_case *new_case(const shape *s)
{
    attention_case *t = calloc(1, sizeof *t);
    assert_non_null(t);
    tp_attention_args *a = &t->b.forward;
    int64_t wide = s->heads * s->head_dim, narrow = s->kv_heads * s->head_dim;
    double size = s->size > 0 ? s->size : 1.0;
    random_state = (uint64_t)(s->n_q * 1000003 + s->n_k * 101 + s->head_dim + 1);
    t->n_k = t->b.n_k = s->n_k;
    int64_t n_segments = s->singles > 0 ? s->singles : s->n_segments;
    t->segments = calloc((size_t)n_segments + 1, sizeof *t->segments);
    assert_non_null(t->segments);
    for (int64_t i = 0; i < n_segments; i++) t->segments[i] = s->singles > 0 ? (tp_segment){i, 1, i, 1} : s->segments[i];
    *a = (tp_attention_args){.n_q = s->n_q, .heads = s->heads, .kv_heads = s->kv_heads, .head_dim = s->head_dim};
    a->segments = t->segments;
    a->n_segments = n_segments;
    a->causal = s->causal;
    a->window = s->window;
    a->soft_cap = s->soft_cap;
    a->scale = (float)(1 / sqrt((double)s->head_dim));
    a->q = new_rows(s->n_q, wide, 3, s->dtype, 2 * size);
    a->k = new_rows(s->n_k, narrow, 5, s->dtype, 2 * size);
    a->v = new_rows(s->n_k, narrow, 1, s->dtype, 1);
    a->out = new_rows(s->n_q, wide, 2, s->dtype, 1);
    a->lse = new_floats(s->n_q * s->heads, 1);
    a->n_prefix = s->n_prefix;
    a->prefix_k = new_rows(s->n_prefix, narrow, 0, s->dtype, 2);
    a->prefix_v = new_rows(s->n_prefix, narrow, 4, s->dtype, 1);
    if (s->alibi) {
        float *slopes = new_floats(s->heads, 0.1);
        a->alibi_slopes = slopes;
    }
    t->b.dout = new_rows(s->n_q, wide, 1, s->dtype, 1);
    t->b.dq = new_rows(s->n_q, wide, 7, s->dtype, 1);
    t->b.dk = new_rows(s->n_k, narrow, 0, s->dtype, 1);
    t->b.dv = new_rows(s->n_k, narrow, 6, s->dtype, 1);
    t->b.delta = new_floats(s->n_q * s->heads, 1);
    t->out = calloc((size_t)(s->n_q * wide) + 1, sizeof(double));
    t->dq = calloc((size_t)(s->n_q * wide) + 1, sizeof(double));
    t->lse = calloc((size_t)(s->n_q * s->heads) + 1, sizeof(double));
    t->dk = calloc((size_t)(s->n_k * narrow) + 1, sizeof(double));
    t->dv = calloc((size_t)(s->n_k * narrow) + 1, sizeof(double));
    assert_true(t->out && t->dq && t->lse && t->dk && t->dv);
    return t;
}

static void free_case(attention_case *t)
{
    tp_attention_args *a = &t->b.forward;
    void *all[] = {a->q.data,        a->k.data,      a->v.data,    a->out.data,  a->lse,       a->prefix_k.data,
                   a->prefix_v.data, t->b.dout.data, t->b.dq.data, t->b.dk.data, t->b.dv.data, t->b.delta,
                   t->segments,      t->out,         t->dq,        t->lse,       t->dk,        t->dv};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
    union {
        const float *constant;
        void *memory;
    } slopes = {.constant = a->alibi_slopes};
    free(slopes.memory);
    free(t);
}

static void run_attention(tp_ctx *ctx, void *data)
{
    attention_case *t = data;
    assert_ok(ctx, tp_run_attention(ctx, &t->b.forward));
    assert_ok(ctx, tp_run_attention_backward(ctx, &t->b));
}

static double largest(const double *x, int64_t n)
{
    double m = 0;
    for (int64_t i = 0; i < n; i++) m = fmax(m, fabs(x[i]));
    return m;
}

/* Sums of up to a few hundred products, each off by the score's error times its size: relative to the largest result,
 * 64 roundings in f32, and 4 in bf16, where the inputs of the gradient (out) are rounded themselves. */
static void check_rows(const char *isa, const char *name, tp_rows got, const double *want, int64_t n, int64_t columns)
{
    double limit = largest(want, n * columns) * (got.dtype == TP_BF16 ? 4 * 0x1p-8 : 64 * 0x1p-24) + 1e-6;
    for (int64_t r = 0; r < n; r++) {
        for (int64_t c = 0; c < columns; c++) {
            assert_near(at(got, r, c), want[r * columns + c], limit, "%s: %s[%lld, %lld]", isa, name, (long long)r,
                        (long long)c);
        }
    }
}

static void check_attention(void *data, const char *isa)
{
    attention_case *t = data;
    const tp_attention_args *a = &t->b.forward;
    int64_t wide = a->heads * a->head_dim, narrow = a->kv_heads * a->head_dim;
    check_rows(isa, "out", a->out, t->out, a->n_q, wide);
    for (int64_t i = 0; i < a->n_q * a->heads; i++) {
        if (t->lse[i] == -INFINITY)
            assert_true(a->lse[i] == -INFINITY);
        else
            assert_near((double)a->lse[i], t->lse[i], 1e-5 + fabs(t->lse[i]) * 1e-6, "%s: lse[%lld]", isa, (long long)i);
    }
    check_rows(isa, "dq", t->b.dq, t->dq, a->n_q, wide);
    check_rows(isa, "dk", t->b.dk, t->dk, t->n_k, narrow);
    check_rows(isa, "dv", t->b.dv, t->dv, t->n_k, narrow);
}

static void try_shape(const shape *s)
{
    attention_case *t = new_case(s);
    tp_attention_args *a = &t->b.forward;
    reference(t, true);
    kernel_outputs o = {.n = 0};
    add_output(&o, a->out.data, rows_bytes(a->out, s->n_q));
    add_output(&o, a->lse, (size_t)(s->n_q * s->heads) * 4);
    add_output(&o, t->b.dq.data, rows_bytes(t->b.dq, s->n_q));
    add_output(&o, t->b.dk.data, rows_bytes(t->b.dk, s->n_k));
    add_output(&o, t->b.dv.data, rows_bytes(t->b.dv, s->n_k));
    run_everywhere(&o, run_attention, check_attention, t);
    free_case(t);
}

/* One segment over everything. */
static shape whole(int64_t n_q, int64_t n_k, int64_t heads, int64_t kv_heads, int64_t head_dim)
{
    shape s = {.n_q = n_q, .n_k = n_k, .heads = heads, .kv_heads = kv_heads, .head_dim = head_dim};
    s.segments[0] = (tp_segment){0, n_q, 0, n_k};
    s.n_segments = 1;
    s.causal = true;
    s.dtype = TP_F32;
    return s;
}

static void test_reference(void **state)
{
    (void)state;
    shape s = whole(5, 7, 2, 1, 3);
    s.soft_cap = 1.5f;
    s.alibi = true;
    s.n_prefix = 2;
    attention_case *t = new_case(&s);
    reference(t, true);
    tp_attention_args *a = &t->b.forward;
    struct {
        tp_rows x;
        double *gradient;
        int64_t n, columns;
    } inputs[] = {{a->q, t->dq, 5, 6}, {a->k, t->dk, 7, 3}, {a->v, t->dv, 7, 3}};
    double *got[3];
    for (int k = 0; k < 3; k++) {
        got[k] = malloc((size_t)(inputs[k].n * inputs[k].columns) * sizeof(double));
        assert_non_null(got[k]);
        memcpy(got[k], inputs[k].gradient, (size_t)(inputs[k].n * inputs[k].columns) * sizeof(double));
    }
    const float step = 0x1p-7f; /* exact in f32 beside values around 1; the error of a central difference is step^2 / 6 */
    for (int k = 0; k < 3; k++) {
        for (int64_t e = 0; e < inputs[k].n * inputs[k].columns; e++) {
            float *x = (float *)inputs[k].x.data + e / inputs[k].columns * inputs[k].x.ld + e % inputs[k].columns;
            float old = *x;
            double loss[2] = {0, 0}, where[2];
            for (int side = 0; side < 2; side++) {
                *x = old + (side == 0 ? -step : step);
                where[side] = (double)*x;
                reference(t, false);
                for (int64_t i = 0; i < 5 * 6; i++) loss[side] += t->out[i] * at(t->b.dout, i / 6, i % 6);
            }
            *x = old;
            assert_near((loss[1] - loss[0]) / (where[1] - where[0]), got[k][e], 2e-4, "input %d, element %lld", k,
                        (long long)e);
        }
        free(got[k]);
    }
    free_case(t);
}

static void test_lengths(void **state)
{
    (void)state;
    static const int64_t lengths[] = {1, 2, 17, 63, 64, 65, 130};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        shape s = whole(lengths[i], lengths[i], 2, 2, 16);
        try_shape(&s);
        s = whole(lengths[i], lengths[i], 3, 1, 16);
        try_shape(&s);
        s = whole(lengths[i], lengths[i], 4, 2, 16);
        s.causal = false;
        try_shape(&s);
    }
}

static void test_head_dims(void **state)
{
    (void)state;
    static const int64_t dims[] = {1, 8, 16, 20, 64, 80, 96, 128, 256};
    for (size_t i = 0; i < sizeof dims / sizeof dims[0]; i++) {
        shape s = whole(70, 70, 2, 1, dims[i]);
        try_shape(&s);
        s.dtype = TP_BF16;
        try_shape(&s);
        s = whole(2, 300, 2, 1, dims[i]);
        try_shape(&s);
        s.dtype = TP_BF16;
        try_shape(&s);
    }
}

static void test_groups(void **state)
{
    (void)state;
    static const struct {
        int64_t heads, kv_heads;
    } groups[] = {{1, 1}, {9, 3}, {6, 1}, {7, 1}, {71, 1}, {130, 2}};
    for (size_t i = 0; i < sizeof groups / sizeof groups[0]; i++) {
        shape s = whole(33, 40, groups[i].heads, groups[i].kv_heads, 8);
        try_shape(&s);
        s.dtype = TP_BF16;
        try_shape(&s);
    }
}

/* One or a few queries at the end of many keys, and more queries than keys, whose first see nothing. */
static void test_decode(void **state)
{
    (void)state;
    static const int64_t pairs[][2] = {{1, 1},   {1, 255},  {1, 256}, {1, 600}, {2, 300}, {3, 65},
                                       {5, 513}, {20, 200}, {64, 1},  {9, 4},   {3, 1}};
    for (size_t i = 0; i < sizeof pairs / sizeof pairs[0]; i++) {
        shape s = whole(pairs[i][0], pairs[i][1], 3, 1, 20);
        try_shape(&s);
        s.window = 7;
        try_shape(&s);
        s.dtype = TP_BF16;
        s.causal = false;
        try_shape(&s);
    }
}

static void test_windows(void **state)
{
    (void)state;
    static const int64_t windows[] = {1, 2, 16, 63, 64, 65, 100, 1000};
    for (size_t i = 0; i < sizeof windows / sizeof windows[0]; i++) {
        shape s = whole(200, 200, 2, 1, 8);
        s.window = windows[i];
        try_shape(&s);
        s = whole(66, 210, 1, 1, 8);
        s.window = windows[i];
        try_shape(&s);
        s.causal = false;
        try_shape(&s);
    }
}

/* Packed sequences with rows between them that belong to none, empty ones, and two that read the same keys. */
static void test_segments(void **state)
{
    (void)state;
    shape s = whole(200, 230, 3, 1, 16);
    s.n_segments = 4;
    s.segments[0] = (tp_segment){3, 70, 0, 70};
    s.segments[1] = (tp_segment){73, 1, 75, 1};
    s.segments[2] = (tp_segment){80, 0, 80, 5};
    s.segments[3] = (tp_segment){90, 100, 100, 120};
    try_shape(&s);
    s.dtype = TP_BF16;
    s.n_prefix = 70;
    try_shape(&s);
    s.segments[1] = (tp_segment){73, 5, 10, 30};
    try_shape(&s);
    s.dtype = TP_F32;
    s.segments[2] = (tp_segment){80, 4, 80, 0}; /* queries without keys */
    try_shape(&s);
    s.n_prefix = 0;
    try_shape(&s);
    s.n_segments = 0;
    try_shape(&s);
    s = whole(0, 0, 2, 1, 8);
    try_shape(&s);
}

/* More than the gradient's workspace takes at once: segments, and sums of dq in bf16 for two key heads and for one. */
static void test_rounds(void **state)
{
    (void)state;
    shape s = whole(4200, 4200, 2, 1, 4);
    s.singles = 4200;
    try_shape(&s);
    s.dtype = TP_BF16;
    try_shape(&s);
    for (int64_t kv_heads = 1; kv_heads <= 2; kv_heads++) {
        s = whole(165, 4, 64, kv_heads, 256);
        s.causal = false;
        s.dtype = TP_BF16;
        try_shape(&s);
    }
}

static void test_scores(void **state)
{
    (void)state;
    for (int i = 0; i < 8; i++) {
        shape s = whole(i & 1 ? 70 : 2, 90, 4, 2, 16);
        s.soft_cap = i & 2 ? 2.0f : 0.0f;
        s.alibi = (i & 2) == 0 || i & 4;
        s.n_prefix = i & 4 ? 5 : 0;
        try_shape(&s);
        s.dtype = TP_BF16;
        s.window = 40;
        try_shape(&s);
    }
}

/* Scores of some thousands: the softmax is nearly one key, and exponentials far from the greatest vanish. */
static void test_extremes(void **state)
{
    (void)state;
    tp_ctx ctx;
    for (int i = 0; i < 3; i++) {
        if (!devices[i].there) continue;
        tp_ctx_init(&ctx);
        ctx.device = devices[i].device[1];
        for (int few = 0; few < 2; few++) {
            shape s = whole(few ? 1 : 70, 70, 1, 1, 16);
            attention_case *t = new_case(&s);
            tp_attention_args *a = &t->b.forward;
            for (int64_t r = 0; r < s.n_q; r++) {
                for (int64_t c = 0; c < 16; c++) ((float *)a->q.data)[r * a->q.ld + c] = 1e4f;
            }
            for (int64_t r = 0; r < 70; r++) {
                for (int64_t c = 0; c < 16; c++)
                    ((float *)a->k.data)[r * a->k.ld + c] = r == 0 ? 1e4f : r == 1 ? -INFINITY : -1e30f;
            }
            assert_ok(&ctx, tp_run_attention(&ctx, a));
            for (int64_t r = 0; r < s.n_q; r++) {
                for (int64_t c = 0; c < 16; c++) assert_true(at(a->out, r, c) == at(a->v, 0, c));
            }
            /* A query of zeros against an infinite key is not a number, and must not be hidden. */
            for (int64_t c = 0; c < 16; c++) ((float *)a->q.data)[(s.n_q - 1) * a->q.ld + c] = 0.0f;
            assert_ok(&ctx, tp_run_attention(&ctx, a));
            assert_true(isnan(at(a->out, s.n_q - 1, 0)));
            free_case(t);
        }
    }
}

static void test_refusals(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    ctx.device = devices[0].device[0];
    shape s = whole(2, 2, 1, 1, 8);
    attention_case *t = new_case(&s);
    t->b.forward.head_dim = 257;
    assert_status(&ctx, TP_UNSUPPORTED, tp_run_attention(&ctx, &t->b.forward));
    assert_status(&ctx, TP_UNSUPPORTED, tp_run_attention_backward(&ctx, &t->b));
    t->b.forward.head_dim = 8;
    t->b.forward.q.dtype = TP_F16;
    assert_status(&ctx, TP_UNSUPPORTED, tp_run_attention(&ctx, &t->b.forward));
    t->b.forward.q.dtype = TP_BF16;
    assert_status(&ctx, TP_UNSUPPORTED, tp_run_attention(&ctx, &t->b.forward));
    free_case(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reference), cmocka_unit_test(test_lengths),  cmocka_unit_test(test_head_dims),
        cmocka_unit_test(test_groups),    cmocka_unit_test(test_decode),   cmocka_unit_test(test_windows),
        cmocka_unit_test(test_segments),  cmocka_unit_test(test_rounds),   cmocka_unit_test(test_scores),
        cmocka_unit_test(test_extremes),  cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, open_devices, close_devices);
}
