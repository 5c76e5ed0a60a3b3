/* Every CUDA kernel but products and tables (test_cuda_matmul.c) against the CPU's, over odd sizes, all dtypes, and rows that
 * start at odd addresses. The GPU adds in another order than the CPU and has its own exp, tanh, sin and cos; tolerances are
 * some units of 2^-24 of the magnitudes that are added. */
#include "tests/backend/on_both.h"

#define COUNT(array) ((int64_t)(sizeof(array) / sizeof *(array)))

static const int64_t row_counts[] = {0, 1, 2, 3, 7, 33, 64, 130, 1027};
static const int64_t dims[] = {1, 2, 7, 8, 31, 32, 33, 64, 100, 257, 576, 1536, 4096, 4100};
static int64_t random_rows(void)
{
    return row_counts[below(COUNT(row_counts))];
}
static int64_t random_dim(void)
{
    return dims[below(COUNT(dims))];
}

static const char *text_of(char text[160], const char *name, int64_t n, int64_t dim, tp_dtype dtype)
{
    snprintf(text, 160, "%s n=%lld dim=%lld %s", name, (long long)n, (long long)dim, tp_dtype_name(dtype));
    return text;
}

/* ---- sums and copies of rows ---- */

static void test_add(void **state)
{
    (void)state;
    NEEDS_GPU();
    char text[160];
    for (int i = 0; i < 60; i++) {
        both b = {0};
        tp_add_args a = {.n = random_rows(), .dim = random_dim()};
        rows_in(&b, &a.x, a.n, a.dim, random_dtype(), 1);
        rows_in(&b, &a.y, a.n, a.dim, random_dtype(), 1);
        if (i % 3 == 0) {
            rows_out(&b, &a.z, a.n, a.dim, random_dtype(), EXACT);
        } else { /* z is y */
            make_output(&b, EXACT);
            a.z = a.y;
            bind_type(&b, &a.z.dtype);
            same_buffer(&b, &a.z.data, &a.y.data);
        }
        run_both(&b, TP_KERNEL_add, &a, text_of(text, "add", a.n, a.dim, a.z.dtype));
    }
}

static void test_scale(void **state)
{
    (void)state;
    NEEDS_GPU();
    static const float factors[] = {0, 1, 0.37f, -3};
    char text[160];
    for (int i = 0; i < 60; i++) {
        both b = {0};
        tp_scale_args a = {.n = random_rows(), .dim = random_dim(), .alpha = factors[i % 4]};
        rows_in(&b, &a.x, a.n, a.dim, random_dtype(), 1);
        if (a.alpha == 0) memset(b.buffers[0].host, 0xff, b.buffers[0].bytes); /* NaN: must not be read */
        rows_out(&b, &a.y, a.n, a.dim, random_dtype(), EXACT);
        run_both(&b, TP_KERNEL_scale, &a, text_of(text, "scale", a.n, a.dim, a.x.dtype));
    }
}

static tp_step_state *state_buffer(both *b, void *field)
{
    tp_step_state *s = new_buffer(b, field, sizeof *s, TP_U8);
    *s = (tp_step_state){.learning_rate = 1e-3f,
                         .bias1 = 0.271f,
                         .bias2 = 0.0297f,
                         .loss_scale = 1,
                         .clip = 0.7f,
                         .finite = 1,
                         .loss_sum = 3,
                         .loss_spread = (double)INFINITY,
                         .draw = ((uint64_t)7 << 32) + 5,
                         .grad_scale = 0.3f};
    return s;
}

static void test_dropout(void **state)
{
    (void)state;
    NEEDS_GPU();
    char text[160];
    for (int i = 0; i < 60; i++) {
        both b = {0};
        tp_dropout_args a = {
            .n = random_rows(), .dim = random_dim(), .p = i % 5 == 0 ? 0.0f : 0.1f * (float)(i % 7), .accumulate = i % 2 == 0};
        a.key = (tp_rng_key){0x123456789abcdefu * (uint64_t)(i + 1), TP_STREAM_DROPOUT + (uint32_t)i, (uint64_t)i << 31};
        a.first_row = i % 3 == 0 ? ((int64_t)1 << 33) + 5 : i;
        rows_in(&b, &a.x, a.n, a.dim, random_dtype(), 1);
        rows_out(&b, &a.y, a.n, a.dim, random_dtype(), within(1e-6, 1e-6));
        if (i % 4 == 1) state_buffer(&b, &a.state);
        run_both(&b, TP_KERNEL_dropout, &a, text_of(text, "dropout", a.n, a.dim, a.x.dtype));
    }
}

static void test_gather_scatter(void **state)
{
    (void)state;
    NEEDS_GPU();
    char text[160];
    for (int i = 0; i < 60; i++) {
        both b = {0};
        tp_gather_rows_args g = {.n = random_rows(), .dim = random_dim()};
        int32_t *from = ints_in(&b, &g.index, g.n, 50);
        for (int64_t r = 0; r < g.n; r += 1 + i % 4) from[r] = i % 4 == 0 ? from[r] : -1;
        rows_in(&b, &g.in, 50, g.dim, random_dtype(), 1);
        rows_out(&b, &g.out, g.n, g.dim, random_dtype(), EXACT);
        run_both(&b, TP_KERNEL_gather_rows, &g, text_of(text, "gather_rows", g.n, g.dim, g.out.dtype));

        tp_scatter_rows_args s = {.n = random_rows(), .dim = random_dim(), .zero_rest = i % 2 == 0};
        int32_t *index = ints_in(&b, &s.index, s.n, 1), next = 0;
        for (int64_t r = 0; r < s.n; r++) index[r] = next += (int32_t)below(4), next++;
        s.rows = next + below(5);
        for (int64_t r = s.n - s.n / 3; i % 3 == 0 && r < s.n; r++) index[r] = -1;
        rows_in(&b, &s.in, s.n, s.dim, random_dtype(), 1);
        rows_out(&b, &s.out, s.rows, s.dim, random_dtype(), EXACT);
        run_both(&b, TP_KERNEL_scatter_rows, &s, text_of(text, "scatter_rows", s.n, s.dim, s.out.dtype));
    }
}

static void test_column_sum(void **state)
{
    (void)state;
    NEEDS_GPU();
    char text[160];
    for (int i = 0; i < 60; i++) {
        both b = {0};
        tp_column_sum_args a = {.n = random_rows(), .m = random_dim(), .beta = i % 2 == 0 ? 0.0f : 1.0f};
        rows_in(&b, &a.a, a.n, a.m, random_dtype(), 1);
        floats_out(&b, &a.out, a.m, within(0, 0x1p-24 * (4 + 4 * sqrt((double)a.n)) * (2 + sqrt((double)a.n))));
        if (a.beta == 0 && a.n > 0) {
            for (int64_t c = 0; c < a.m; c++) a.out[c] = NAN;
        }
        run_both(&b, TP_KERNEL_column_sum, &a, text_of(text, "column_sum", a.n, a.m, a.a.dtype));
    }
}

/* ---- products with a thin side ---- */

/* Rows that start at 16 bytes, as the kernels for thin sides want them, with and without a gap. */
static void aligned_rows(both *b, tp_rows *x, int64_t n, int64_t cols, tp_dtype dtype)
{
    *x = (tp_rows){NULL, dtype, cols + 8 * below(4)};
    bind_type(b, &x->dtype);
    fill(new_buffer(b, &x->data, (size_t)(n * x->ld) * tp_dtype_bytes(dtype), dtype), (size_t)(n * x->ld), dtype, 1);
}

/* Sums of k products of values up to 1 in f32, in two orders. */
static tolerance product_tolerance(int64_t k)
{
    return within(0, 0x1p-24 * (4 * sqrt((double)k) + 8) * ((double)k / 2 + 3));
}

static const int64_t thin_rows[] = {1, 32, 63, 64, 65, 129, 300, 1030};
static const int64_t wide_columns[] = {8, 64, 72, 128, 136, 264, 576, 1032, 2056};

/* Activations into factors: every number of columns, both forms of the factor, few rows (a cluster shares them) and many. */
static void test_thin_results(void **state)
{
    (void)state;
    NEEDS_GPU();
    char text[160];
    for (int i = 0; i < 140; i++) {
        both b = {0};
        tp_matmul_args a = {.n = thin_rows[below(8)],
                            .m = 8 * (1 + below(8)),
                            .k = wide_columns[below(9)],
                            .nt = i % 2 == 0,
                            .alpha = i % 3 == 0 ? 0.5f : 1,
                            .precision = narrow_dtype};
        tp_rows factor;
        bind_type(&b, &a.precision);
        aligned_rows(&b, &a.a, a.n, a.k, narrow_dtype);
        aligned_rows(&b, &factor, a.nt ? a.m : a.k, a.nt ? a.k : a.m, narrow_dtype);
        a.b = tp_matrix_dense(narrow_dtype, factor.data, a.nt ? a.m : a.k, a.nt ? a.k : a.m);
        a.b.stride = factor.ld;
        b.buffers[b.n_buffers - 1].dtype = TP_U16; /* a format, which both devices know */
        b.fields[b.n_fields - 1].field = &a.b.data;
        aligned_rows(&b, &a.c, a.n, a.m, random_dtype());
        make_output(&b, product_tolerance(a.k));
        snprintf(text, sizeof text, "thin result n=%lld m=%lld k=%lld nt=%d c=%s", (long long)a.n, (long long)a.m,
                 (long long)a.k, a.nt, tp_dtype_name(a.c.dtype));
        run_both(&b, TP_KERNEL_matmul, &a, text);
    }
}

/* Gradients of factors with both sides in bf16 or f16; parts of the rows are summed in clusters, and by a second kernel. */
static void test_thin_gradients(void **state)
{
    (void)state;
    NEEDS_GPU();
    char text[160];
    for (int i = 0; i < 140; i++) {
        both b = {0};
        int64_t rank = 8 * (1 + below(8)), wide = wide_columns[below(9)];
        bool first = i % 2 == 0;
        tp_matmul_tn_args a = {.n = thin_rows[below(8)],
                               .m = first ? rank : wide,
                               .k = first ? wide : rank,
                               .alpha = i % 3 == 0 ? 0.5f : 1,
                               .beta = (float)(i % 2)};
        aligned_rows(&b, &a.a, a.n, a.m, narrow_dtype);
        aligned_rows(&b, &a.b, a.n, a.k, narrow_dtype);
        floats_out(&b, &a.c, a.m * a.k, product_tolerance(a.n));
        snprintf(text, sizeof text, "thin gradient n=%lld m=%lld k=%lld beta=%g", (long long)a.n, (long long)a.m,
                 (long long)a.k, (double)a.beta);
        run_both(&b, TP_KERNEL_matmul_tn, &a, text);
    }
}

/* What comes back to the up factors of one, two and three parts, from few rows to many: blocks share rows, or columns. */
static void test_factor_gradients(void **state)
{
    (void)state;
    NEEDS_GPU();
    char text[160];
    for (int i = 0; i < 60; i++) {
        both b = {0};
        tp_lowrank_backward_args a = {.n = i < 48 ? thin_rows[below(8)] : 16641 + below(2000)};
        int n_parts = 1 + i % 3, narrow = i / 3 % 2;
        int64_t out = 0, used = 0;
        for (int k = 0; k < n_parts; k++) {
            a.rows[k] = wide_columns[below(7)];
            a.rank[k] = 8 * (1 + below(narrow ? 2 : 4));
            a.scaling[k] = 0.75f;
            out += a.rows[k], used += a.rank[k];
            if (k == 1 && i % 2 == 0) continue;
            floats_out(&b, &a.db[k], a.rows[k] * a.rank[k], product_tolerance(a.n));
        }
        aligned_rows(&b, &a.dy, a.n, out, narrow_dtype);
        aligned_rows(&b, &a.b, out, used, narrow_dtype);
        aligned_rows(&b, &a.u, a.n, used, narrow_dtype);
        aligned_rows(&b, &a.du, a.n, used, narrow_dtype);
        make_output(&b, product_tolerance(out));
        snprintf(text, sizeof text, "factor gradients n=%lld out=%lld used=%lld parts=%d", (long long)a.n, (long long)out,
                 (long long)used, n_parts);
        run_both(&b, TP_KERNEL_lowrank_backward, &a, text);
    }
}

/* SwiGLU's gradient with those of factors on both sides of it, fused for ranks up to 16 on Hopper. Sums of products of values
 * up to 1 and of bf16 results, some of which differ in their last place. */
static void test_swiglu_factors(void **state)
{
    (void)state;
    NEEDS_GPU();
    char text[160];
    for (int i = 0; i < 40; i++) {
        both b = {0};
        int64_t n = i < 34 ? thin_rows[below(8)] : 16641 + below(500), dim = wide_columns[below(i < 34 ? 9 : 7)];
        int64_t used = 0, most = i % 4 == 3 ? 4 : 2;
        tp_swiglu_factors_args a = {.swiglu = {.n = n, .dim = dim}, .before = {.n = n}};
        aligned_rows(&b, &a.swiglu.gate, n, dim, TP_BF16);
        aligned_rows(&b, &a.swiglu.up, n, dim, TP_BF16);
        aligned_rows(&b, &a.swiglu.dy, n, dim, TP_BF16);
        b.buffers[b.n_buffers - 1].scratch = true;
        for (int k = 0; k < 2; k++) {
            a.before.rows[k] = dim;
            a.before.rank[k] = 8 * (1 + below(most));
            a.before.scaling[k] = 0.75f + (float)k;
            used += a.before.rank[k];
            floats_out(&b, &a.before.db[k], dim * a.before.rank[k], within(1e-3, 2e-3 * sqrt((double)n)));
        }
        aligned_rows(&b, &a.before.b, 2 * dim, used, TP_BF16);
        aligned_rows(&b, &a.before.u, n, used, TP_BF16);
        aligned_rows(&b, &a.before.dy, n, 2 * dim + used, TP_BF16); /* [dgate | dup | du] */
        make_output(&b, within(0x1p-7, 2e-3 * sqrt((double)dim)));
        a.swiglu.dgate = a.swiglu.dup = a.before.du = a.before.dy;
        within_buffer(&b, &a.swiglu.dgate.data, &a.before.dy.data, 0);
        within_buffer(&b, &a.swiglu.dup.data, &a.before.dy.data, (size_t)dim * 2);
        within_buffer(&b, &a.before.du.data, &a.before.dy.data, (size_t)dim * 4);
        if (i % 5 > 0) {
            a.behind = (tp_matmul_tn_args){.n = n, .m = 8 * (1 + below(2)), .k = dim, .alpha = 0.5f, .beta = 1};
            aligned_rows(&b, &a.behind.a, n, a.behind.m, TP_BF16);
            floats_out(&b, &a.behind.c, a.behind.m * dim, within(1e-3, 2e-3 * sqrt((double)n)));
        }
        snprintf(text, sizeof text, "swiglu_factors n=%lld dim=%lld used=%lld", (long long)n, (long long)dim, (long long)used);
        run_both(&b, TP_KERNEL_swiglu_factors, &a, text);
    }
}

/* ---- norms ---- */

/* In bf16 the normalized value is rounded before the weight: a difference of f32's last bit may move it by a unit of 2^-8. */
static tolerance norm_tolerance(tp_dtype dtype)
{
    return within(by_dtype(dtype, 0x1p-7, 1e-5), by_dtype(dtype, 1e-3, 2e-6));
}

static void test_rmsnorm(void **state)
{
    (void)state;
    NEEDS_GPU();
    char text[160];
    for (int i = 0; i < 80; i++) {
        both b = {0};
        tp_dtype dtype = random_dtype();
        int64_t tokens = random_rows(), heads = i % 4 == 0 ? 1 + below(5) : 1;
        tp_rmsnorm_args a = {.n = tokens * heads, .dim = random_dim(), .eps = 1e-5f, .heads = heads};
        rows_in(&b, &a.x, tokens, heads * a.dim, dtype, 2);
        rows_out(&b, &a.y, tokens, heads * a.dim, dtype, norm_tolerance(dtype));
        floats_in(&b, &a.weight, a.dim, 1);
        if (i % 3 != 0) floats_out(&b, &a.rstd, a.n, within(1e-6, 0));
        run_both(&b, TP_KERNEL_rmsnorm, &a, text_of(text, "rmsnorm", a.n, a.dim, dtype));
    }
}

/* Sums of n terms of about 1. */
static tolerance gradient_tolerance(int64_t n)
{
    return within(1e-5, 1e-6 * (4 + 4 * sqrt((double)n)));
}

static void test_rmsnorm_backward(void **state)
{
    (void)state;
    NEEDS_GPU();
    char text[160];
    for (int i = 0; i < 80; i++) {
        both b = {0};
        tp_dtype dtype = random_dtype();
        int64_t tokens = random_rows(), heads = i % 4 < 2 ? 1 + below(5) : 1;
        tp_rmsnorm_backward_args a = {.n = tokens * heads, .dim = random_dim(), .accumulate = i % 2 == 0, .heads = heads};
        rows_in(&b, &a.x, tokens, heads * a.dim, dtype, 2);
        rows_in(&b, &a.dy, tokens, heads * a.dim, dtype, 1);
        rows_out(&b, &a.dx, tokens, heads * a.dim, dtype, within(1e-5, by_dtype(dtype, 1e-3, 1e-5)));
        floats_in(&b, &a.weight, a.dim, 1);
        floats_in(&b, &a.rstd, a.n, 1);
        if (i % 3 != 0) floats_out(&b, &a.dweight, a.dim, gradient_tolerance(a.n));
        run_both(&b, TP_KERNEL_rmsnorm_backward, &a, text_of(text, "rmsnorm_backward", a.n, a.dim, dtype));
    }
}

static void test_layernorm(void **state)
{
    (void)state;
    NEEDS_GPU();
    char text[160];
    for (int i = 0; i < 80; i++) {
        both b = {0};
        tp_dtype dtype = random_dtype();
        tp_layernorm_args a = {.n = random_rows(), .dim = random_dim(), .eps = 1e-5f};
        rows_in(&b, &a.x, a.n, a.dim, dtype, 2);
        rows_out(&b, &a.y, a.n, a.dim, dtype, a.dim == 1 ? within(1, 1) : within(1e-5, by_dtype(dtype, 1e-3, 5e-6)));
        floats_in(&b, &a.weight, a.dim, 1);
        if (i % 3 != 0) floats_in(&b, &a.bias, a.dim, 1);
        floats_out(&b, &a.mean, a.n, within(1e-6, 1e-6));
        floats_out(&b, &a.rstd, a.n, within(2e-6 + (a.dim < 8 ? 1e-3 : 0), 0)); /* few values may be near their mean */
        run_both(&b, TP_KERNEL_layernorm, &a, text_of(text, "layernorm", a.n, a.dim, dtype));
    }
}

static void test_layernorm_backward(void **state)
{
    (void)state;
    NEEDS_GPU();
    char text[160];
    for (int i = 0; i < 80; i++) {
        both b = {0};
        tp_dtype dtype = random_dtype();
        tp_layernorm_backward_args a = {.n = random_rows(), .dim = random_dim(), .accumulate = i % 2 == 0};
        rows_in(&b, &a.x, a.n, a.dim, dtype, 2);
        rows_in(&b, &a.dy, a.n, a.dim, dtype, 1);
        rows_out(&b, &a.dx, a.n, a.dim, dtype, within(1e-5, by_dtype(dtype, 1e-3, 1e-5)));
        floats_in(&b, &a.weight, a.dim, 1);
        floats_in(&b, &a.mean, a.n, 0.1);
        floats_in(&b, &a.rstd, a.n, 1);
        if (i % 3 != 0) floats_out(&b, &a.dweight, a.dim, gradient_tolerance(a.n));
        if (i % 4 != 0) floats_out(&b, &a.dbias, a.dim, gradient_tolerance(a.n));
        run_both(&b, TP_KERNEL_layernorm_backward, &a, text_of(text, "layernorm_backward", a.n, a.dim, dtype));
    }
}

/* ---- rotary positions ---- */

static void test_rope(void **state)
{
    (void)state;
    NEEDS_GPU();
    static const int64_t halves[] = {1, 4, 7, 16, 32, 40, 64, 128};
    char text[160];
    for (int i = 0; i < 60; i++) {
        both b = {0};
        int64_t n = random_rows(), half = halves[i % 8];
        tp_rope_table_args t = {.n = n, .half = half, .factor = i % 3 == 0 ? 1.0f : 1.2079f};
        ints_in(&b, &t.positions, n, i % 2 == 0 ? 2048 : 131072);
        float *inv_freq;
        floats_in(&b, &t.inv_freq, half, 1);
        memcpy(&inv_freq, &t.inv_freq, sizeof inv_freq);
        for (int64_t k = 0; k < half; k++) inv_freq[k] = powf(10000.0f, -(float)k / (float)half);
        floats_out(&b, &t.cos, n * half, within(0, 4e-7));
        floats_out(&b, &t.sin, n * half, within(0, 4e-7));
        run_both(&b, TP_KERNEL_rope_table, &t, text_of(text, "rope_table", n, half, TP_F32));

        tp_dtype dtype = random_dtype();
        tp_rope_args a = {
            .n = n, .heads = 1 + below(5), .half = half, .head_dim = 2 * half + (i % 4 == 0 ? 6 : 0), .inverse = i % 2 == 0};
        /* f32: the GPU may keep a product unrounded in a multiply-add. bf16: every rounding is the contract,
         * and in f16 there are six of 2^-12 that the CPU does not make */
        rows_out(&b, &a.x, n, a.heads * a.head_dim, dtype,
                 dtype == TP_BF16 ? EXACT : within(0, dtype == TP_F16 ? 0x1p-9 : 4e-7));
        floats_in(&b, &a.cos, n * half, 1);
        floats_in(&b, &a.sin, n * half, 1);
        run_both(&b, TP_KERNEL_rope, &a, text_of(text, "rope", n, half, dtype));
    }
}

/* ---- activations ---- */

/* A result may be near 0 where its input is not: a unit of bf16 of the input's size is within what the tests allow. */
static tolerance activation_tolerance(tp_dtype dtype)
{
    return within(1e-5, by_dtype(dtype, 1e-3, 4e-6));
}

static void test_swiglu(void **state)
{
    (void)state;
    NEEDS_GPU();
    char text[160];
    for (int i = 0; i < 60; i++) {
        both b = {0};
        tp_dtype dtype = random_dtype();
        tolerance t = activation_tolerance(dtype);
        double size = i % 5 == 0 ? 100 : 4;
        tp_swiglu_args a = {.n = random_rows(), .dim = random_dim()};
        rows_in(&b, &a.gate, a.n, a.dim, dtype, size);
        rows_in(&b, &a.up, a.n, a.dim, dtype, 2);
        rows_out(&b, &a.y, a.n, a.dim, dtype, t);
        run_both(&b, TP_KERNEL_swiglu, &a, text_of(text, "swiglu", a.n, a.dim, dtype));

        tp_swiglu_backward_args d = {.n = random_rows(), .dim = random_dim()};
        rows_in(&b, &d.gate, d.n, d.dim, dtype, size);
        if (i % 2 == 0) {
            make_output(&b, t);
            d.dgate = d.gate;
            bind_type(&b, &d.dgate.dtype);
            same_buffer(&b, &d.dgate.data, &d.gate.data);
        } else {
            rows_out(&b, &d.dgate, d.n, d.dim, dtype, t);
        }
        rows_in(&b, &d.up, d.n, d.dim, dtype, 2);
        if (i % 2 == 0) {
            make_output(&b, t);
            d.dup = d.up;
            bind_type(&b, &d.dup.dtype);
            same_buffer(&b, &d.dup.data, &d.up.data);
        } else {
            rows_out(&b, &d.dup, d.n, d.dim, dtype, t);
        }
        rows_in(&b, &d.dy, d.n, d.dim, dtype, 1);
        run_both(&b, TP_KERNEL_swiglu_backward, &d, text_of(text, "swiglu_backward", d.n, d.dim, dtype));
    }
}

static void test_gelu(void **state)
{
    (void)state;
    NEEDS_GPU();
    char text[160];
    for (int i = 0; i < 60; i++) {
        both b = {0};
        tp_dtype dtype = random_dtype();
        tolerance t = activation_tolerance(dtype);
        double size = i % 5 == 0 ? 50 : 4;
        tp_gelu_args a = {.n = random_rows(), .dim = random_dim(), .exact = i % 2 == 0};
        rows_in(&b, &a.x, a.n, a.dim, dtype, size);
        rows_out(&b, &a.y, a.n, a.dim, dtype, t);
        run_both(&b, TP_KERNEL_gelu, &a, text_of(text, "gelu", a.n, a.dim, dtype));

        tp_gelu_backward_args d = {.n = random_rows(), .dim = random_dim(), .exact = i % 2 == 0};
        rows_in(&b, &d.x, d.n, d.dim, dtype, size);
        rows_in(&b, &d.dy, d.n, d.dim, dtype, 1);
        if (i % 3 == 0) {
            make_output(&b, t);
            d.dx = d.dy;
            bind_type(&b, &d.dx.dtype);
            same_buffer(&b, &d.dx.data, &d.dy.data);
        } else {
            rows_out(&b, &d.dx, d.n, d.dim, dtype, t);
        }
        run_both(&b, TP_KERNEL_gelu_backward, &d, text_of(text, "gelu_backward", d.n, d.dim, dtype));
    }
}

/* ---- attention ---- */

typedef struct attention_shape {
    int64_t heads, kv_heads, head_dim, n_prefix, window;
    tp_segment segments[4];
    int64_t n_segments, n_q, n_k;
    bool causal, alibi;
    float soft_cap;
    tp_dtype dtype;
} attention_shape;

static void describe_attention(char text[300], const char *name, const attention_shape *s)
{
    snprintf(text, 300,
             "%s heads=%lld/%lld dim=%lld prefix=%lld window=%lld segments=%lld first=%lldx%lld causal=%d alibi=%d cap=%g %s",
             name, (long long)s->heads, (long long)s->kv_heads, (long long)s->head_dim, (long long)s->n_prefix,
             (long long)s->window, (long long)s->n_segments, (long long)s->segments[0].q_len, (long long)s->segments[0].k_len,
             s->causal, s->alibi, (double)s->soft_cap, tp_dtype_name(s->dtype));
}

static attention_shape random_attention(void)
{
    static const int64_t head_dims[] = {16, 24, 64, 80, 96, 128, 256}, lengths[] = {1, 2, 7, 16, 33, 64, 65, 128, 150, 300};
    attention_shape s = {
        .kv_heads = 1 + below(3), .head_dim = head_dims[below(7)], .n_segments = 1 + below(3), .dtype = random_dtype()};
    s.heads = s.kv_heads * (1 + below(3));
    s.causal = below(4) != 0;
    s.window = below(4) == 0 ? 1 + below(70) : 0;
    s.alibi = below(6) == 0;
    s.soft_cap = below(6) == 0 ? 5.0f : 0.0f;
    s.n_prefix = below(5) == 0 ? 1 + below(20) : 0;
    bool same = below(3) != 0; /* as in training: as many keys as queries; else a cache */
    for (int64_t i = 0; i < s.n_segments; i++) {
        tp_segment *g = &s.segments[i];
        s.n_q += i > 0 && below(3) == 0 ? 5 : 0; /* rows in no segment */
        s.n_k += i > 0 && below(3) == 0 ? 3 : 0;
        g->q_len = lengths[below(10)];
        g->k_len = same ? g->q_len : lengths[below(10)]; /* fewer keys than queries: rows without keys */
        g->q_start = s.n_q, g->k_start = s.n_k;
        s.n_q += g->q_len, s.n_k += g->k_len;
    }
    return s;
}

static void attention_inputs(both *b, tp_attention_args *a, const attention_shape *s)
{
    *a = (tp_attention_args){.n_q = s->n_q,
                             .heads = s->heads,
                             .kv_heads = s->kv_heads,
                             .head_dim = s->head_dim,
                             .segments = s->segments,
                             .n_segments = s->n_segments,
                             .causal = s->causal,
                             .window = s->window,
                             .soft_cap = s->soft_cap,
                             .n_prefix = s->n_prefix,
                             .scale = 1.0f / sqrtf((float)s->head_dim)};
    rows_in(b, &a->q, s->n_q, s->heads * s->head_dim, s->dtype, 2);
    rows_in(b, &a->k, s->n_k, s->kv_heads * s->head_dim, s->dtype, 2);
    rows_in(b, &a->v, s->n_k, s->kv_heads * s->head_dim, s->dtype, 1);
    if (s->n_prefix > 0) {
        rows_in(b, &a->prefix_k, s->n_prefix, s->kv_heads * s->head_dim, s->dtype, 2);
        rows_in(b, &a->prefix_v, s->n_prefix, s->kv_heads * s->head_dim, s->dtype, 1);
    }
    if (s->alibi) floats_in(b, &a->alibi_slopes, s->heads, 0.1);
}

/* f32: sums of some hundred products. bf16: probabilities may be rounded to bf16 before they meet v, on either side. */
static tolerance attention_tolerance(tp_dtype dtype, double size)
{
    return within(0, size * by_dtype(dtype, 0x1p-7, 1e-5));
}

static void test_attention(void **state)
{
    (void)state;
    NEEDS_GPU();
    char text[300];
    random_state = 20;
    for (int i = 0; i < 150; i++) {
        both b = {0};
        attention_shape s = random_attention();
        tp_attention_args a;
        attention_inputs(&b, &a, &s);
        rows_out(&b, &a.out, s.n_q, s.heads * s.head_dim, s.dtype, attention_tolerance(s.dtype, 1));
        if (i % 3 != 0) floats_out(&b, &a.lse, s.n_q * s.heads, attention_tolerance(s.dtype, 1));
        describe_attention(text, "attention", &s);
        run_both(&b, TP_KERNEL_attention, &a, text);
    }
}

/* The backward pass gets out and lse that the CPU's forward pass made. */
static void test_attention_backward(void **state)
{
    (void)state;
    NEEDS_GPU();
    char text[300];
    random_state = 21;
    for (int i = 0; i < 120; i++) {
        both b = {0};
        attention_shape s = random_attention();
        tp_attention_backward_args a = {.n_k = s.n_k};
        int64_t q_cols = s.heads * s.head_dim, k_cols = s.kv_heads * s.head_dim;
        attention_inputs(&b, &a.forward, &s);
        rows_in(&b, &a.forward.out, s.n_q, q_cols, s.dtype, 1);
        floats_in(&b, &a.forward.lse, s.n_q * s.heads, 1);
        run_before(&b, TP_KERNEL_attention, &a.forward, "forward");
        rows_in(&b, &a.dout, s.n_q, q_cols, s.dtype, 1);
        rows_out(&b, &a.dq, s.n_q, q_cols, s.dtype, attention_tolerance(s.dtype, 2));
        rows_out(&b, &a.dk, s.n_k, k_cols, s.dtype, attention_tolerance(s.dtype, 4));
        rows_out(&b, &a.dv, s.n_k, k_cols, s.dtype, attention_tolerance(s.dtype, 4));
        floats_scratch(&b, &a.delta, s.n_q * s.heads);
        describe_attention(text, "attention_backward", &s);
        run_both(&b, TP_KERNEL_attention_backward, &a, text);
    }
}

/* Many short documents: more segments than a block of threads. */
static void test_attention_many_segments(void **state)
{
    (void)state;
    NEEDS_GPU();
    enum { SEGMENTS = 1500 };
    tp_segment *segments = calloc(SEGMENTS, sizeof *segments);
    assert_non_null(segments);
    random_state = 22;
    attention_shape s = {.heads = 2, .kv_heads = 1, .head_dim = 64, .causal = true, .n_segments = 1, .dtype = TP_BF16};
    for (int i = 0; i < SEGMENTS; i++) {
        int64_t length = 1 + below(4);
        segments[i] = (tp_segment){s.n_q, length, s.n_q, length};
        s.n_q += length, s.n_k += length;
    }
    both b = {0};
    tp_attention_args a;
    attention_inputs(&b, &a, &s);
    a.segments = segments, a.n_segments = SEGMENTS;
    rows_out(&b, &a.out, s.n_q, s.heads * s.head_dim, s.dtype, attention_tolerance(s.dtype, 1));
    run_both(&b, TP_KERNEL_attention, &a, "attention, many segments");
    free(segments);
}

/* ---- loss ---- */

static void test_cross_entropy(void **state)
{
    (void)state;
    NEEDS_GPU();
    /* around what a block and a cluster hold, and longer than any */
    static const int64_t vocabularies[] = {1, 2, 31, 33, 1000, 4099, 16385, 49152, 128256, 131075, 262147};
    char text[160];
    for (int i = 0; i < 132; i++) {
        both b = {0};
        /* many rows of 49152 and 128256: several for each cluster, of either kind of gradient, and at odd addresses */
        int64_t many = i == 29 || i == 40 || i == 62 ? 300 : i == 52 ? 150 : 5;
        tp_cross_entropy_args a = {.n = i % 11 > 5 ? many : random_rows() % 200,
                                   .vocab = vocabularies[i % 11],
                                   .grad_scale = 0.25f,
                                   .want_grad = i % 3 != 0,
                                   .narrow = i % 2 == 0};
        a.ld = a.vocab + (i / 2 % 2 == 0 ? 0 : 5);
        floats_in(&b, &a.logits, a.n * a.ld, i % 5 == 0 ? 60 : 5);
        if (a.want_grad) make_output(&b, within(1e-5, 0x1p-24)); /* near 1 a probability times 0.25 is known to 2 ulp */
        if (a.narrow && a.want_grad) {                           /* the rest of a row is left over from the logits */
            struct buffer *gradients = &b.buffers[b.n_buffers - 1];
            gradients->dtype = TP_BF16, gradients->row = (size_t)(2 * a.ld), gradients->used = (size_t)a.vocab;
        }
        int32_t *labels = ints_in(&b, &a.labels, a.n, a.vocab);
        for (int64_t r = i % 7; r < a.n; r += 3) labels[r] = -1;
        floats_out(&b, &a.loss, a.n, within(2e-6, 4e-6));
        if (i % 4 == 1) state_buffer(&b, &a.state);
        run_both(&b, TP_KERNEL_cross_entropy, &a, text_of(text, "cross_entropy", a.n, a.vocab, a.narrow ? TP_BF16 : TP_F32));
    }
}

/* In f16 the gradients are those in f32, rounded: of the GPU, whose f32 the CPU has vouched for above. */
static void test_cross_entropy_f16(void **state)
{
    (void)state;
    NEEDS_GPU();
    static const int64_t vocabularies[] = {1, 31, 1000, 16385, 49152, 262147};
    for (int i = 0; i < 24; i++) {
        both b = {0};
        unsigned char *wide[MAX_BUFFERS], *half[MAX_BUFFERS];
        tp_cross_entropy_args a = {.n = 7, .vocab = vocabularies[i % 6], .grad_scale = i % 4 == 0 ? 1e-3f : 2048.0f};
        a.ld = a.vocab + (i % 2 == 0 ? 0 : 5), a.want_grad = true;
        floats_in(&b, &a.logits, a.n * a.ld, i % 5 == 0 ? 60 : 5);
        make_output(&b, EXACT);
        ints_in(&b, &a.labels, a.n, a.vocab);
        floats_out(&b, &a.loss, a.n, EXACT);
        run_on(&b, opened.cuda, TP_KERNEL_cross_entropy, &a, "cross_entropy f32", wide);
        a.narrow = true, a.narrow_type = TP_F16;
        run_on(&b, opened.cuda, TP_KERNEL_cross_entropy, &a, "cross_entropy f16", half);
        for (int64_t r = 0; r < a.n; r++) {
            for (int64_t c = 0; c < a.vocab; c++) {
                float want = ((const float *)(const void *)wide[0])[r * a.ld + c];
                uint16_t got = ((const uint16_t *)(const void *)half[0])[r * 2 * a.ld + c];
                assert_int_equal(got, tp_f32_to_f16(want));
            }
        }
        for (int k = 0; k < b.n_buffers; k++) free(wide[k]), free(half[k]), free(b.buffers[k].host);
    }
}

static void test_add_loss(void **state)
{
    (void)state;
    NEEDS_GPU();
    both b = {0};
    tp_add_loss_args a;
    floats_out(&b, &a.loss, 1, EXACT);
    state_buffer(&b, &a.state);
    make_output(&b, EXACT);
    run_both(&b, TP_KERNEL_add_loss, &a, "add_loss");
}

/* ---- optimizer ---- */

static const int64_t counts[] = {0, 1, 3, 4, 31, 4095, 4096, 4097, 20001, 1000003};

/* The norm is taken in f64. */
static void test_grad_norm(void **state)
{
    (void)state;
    NEEDS_GPU();
    char text[160];
    for (int i = 0; i < 40; i++) {
        both b = {0};
        tp_grad_norm_args a = {.n = counts[i % COUNT(counts)]};
        float *g;
        floats_in(&b, &a.g, a.n, i % 7 == 0 ? 1e30 : 1e-2);
        memcpy(&g, &a.g, sizeof g);
        if (i % 4 == 3 && a.n > 0) g[below(a.n)] = i % 8 == 3 ? NAN : INFINITY;
        tp_step_state *s = state_buffer(&b, &a.state);
        make_output(&b, within(1e-7, 0));
        s->max_norm = i % 3 == 0 ? 0.0f : 1.0f;
        if (i % 2 == 0) s->loss_scale = 1024;
        if (i % 11 == 10) s->loss_sum = NAN;
        if (i % 5 == 3) s->loss_mean = 2, s->loss_spread = i % 2 == 0 ? 1 : 0.999; /* just no spike, and just one */
        run_both(&b, TP_KERNEL_grad_norm, &a, text_of(text, "grad_norm", a.n, 1, TP_F32));
    }
}

static void test_adamw(void **state)
{
    (void)state;
    NEEDS_GPU();
    char text[160];
    for (int i = 0; i < 40; i++) {
        both b = {0};
        tp_adamw_args a = {.n = counts[i % COUNT(counts)],
                           .beta1 = 0.9f,
                           .beta2 = 0.999f,
                           .epsilon = 1e-8f,
                           .weight_decay = i % 2 == 0 ? 0 : 0.01f};
        floats_out(&b, &a.w, a.n, within(1e-6, 1e-8));
        floats_out(&b, &a.m, a.n, within(1e-6, 1e-7));
        floats_out(&b, &a.v, a.n, within(1e-6, 0));
        for (int64_t k = 0; k < a.n; k++) a.v[k] = fabsf(a.v[k]);
        floats_in(&b, &a.g, a.n, 1);
        state_buffer(&b, &a.state)->finite = i % 5 != 4;
        run_both(&b, TP_KERNEL_adamw, &a, text_of(text, "adamw", a.n, 1, TP_F32));
    }
}

static void test_sgd(void **state)
{
    (void)state;
    NEEDS_GPU();
    char text[160];
    for (int i = 0; i < 40; i++) {
        both b = {0};
        tp_sgd_args a = {
            .n = counts[i % COUNT(counts)], .momentum = i % 3 == 0 ? 0 : 0.9f, .weight_decay = i % 2 == 0 ? 0 : 0.01f};
        floats_out(&b, &a.w, a.n, within(1e-6, 1e-8));
        if (a.momentum > 0) floats_out(&b, &a.m, a.n, within(1e-6, 2e-7));
        floats_in(&b, &a.g, a.n, 1);
        state_buffer(&b, &a.state)->finite = i % 5 != 4;
        run_both(&b, TP_KERNEL_sgd, &a, text_of(text, "sgd", a.n, 1, TP_F32));
    }
}

int main(void)
{
    f16_too = true;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_add),
        cmocka_unit_test(test_scale),
        cmocka_unit_test(test_dropout),
        cmocka_unit_test(test_gather_scatter),
        cmocka_unit_test(test_column_sum),
        cmocka_unit_test(test_thin_results),
        cmocka_unit_test(test_thin_gradients),
        cmocka_unit_test(test_factor_gradients),
        cmocka_unit_test(test_swiglu_factors),
        cmocka_unit_test(test_rmsnorm),
        cmocka_unit_test(test_rmsnorm_backward),
        cmocka_unit_test(test_layernorm),
        cmocka_unit_test(test_layernorm_backward),
        cmocka_unit_test(test_rope),
        cmocka_unit_test(test_swiglu),
        cmocka_unit_test(test_gelu),
        cmocka_unit_test(test_attention),
        cmocka_unit_test(test_attention_backward),
        cmocka_unit_test(test_attention_many_segments),
        cmocka_unit_test(test_cross_entropy),
        cmocka_unit_test(test_cross_entropy_f16),
        cmocka_unit_test(test_add_loss),
        cmocka_unit_test(test_grad_norm),
        cmocka_unit_test(test_adamw),
        cmocka_unit_test(test_sgd),
    };
    return cmocka_run_group_tests(tests, open_both, close_both);
}
