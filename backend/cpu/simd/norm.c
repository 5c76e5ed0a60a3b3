/* RMSNorm and LayerNorm. A row is read twice, the second time from L1: once for its statistics, once to write. Gradients
 * of weight and bias are sums down columns (rows.h); they run first, because dx may lie where dy was. */

/* Row r of rows that may be heads of tokens. */
TP_INLINE void *head_at(tp_rows rows, int64_t r, int64_t heads, int64_t dim)
{
    if (heads <= 1) return row_at(rows, r);
    return (char *)row_at(rows, r / heads) + (size_t)(r % heads * dim) * tp_dtype_bytes(rows.dtype);
}

TP_INLINE float rms_rstd(const void *x, int64_t dim, float eps, bool bf16)
{
    vf sum = v_set(0.0f), other = v_set(0.0f);
    int64_t c = 0;
    for (; c + 2 * VL <= dim; c += 2 * VL) {
        vf a = v_get(x, bf16, c, VL), b = v_get(x, bf16, c + VL, VL);
        sum = v_fma(a, a, sum);
        other = v_fma(b, b, other);
    }
    for (; c < dim; c += VL) {
        vf a = v_get(x, bf16, c, dim - c);
        sum = v_fma(a, a, sum);
    }
    return 1.0f / sqrtf(v_sum(sum + other) / (float)dim + eps);
}

TP_INLINE void rmsnorm_some(const tp_rmsnorm_args *a, int64_t first, int64_t end, bool bf16)
{
    for (int64_t r = first; r < end; r++) {
        const void *x = head_at(a->x, r, a->heads, a->dim);
        void *y = head_at(a->y, r, a->heads, a->dim);
        float rstd = rms_rstd(x, a->dim, a->eps, bf16);
        if (a->rstd != NULL) a->rstd[r] = rstd;
        for (int64_t c = 0; c < a->dim; c += VL) {
            vf normal = v_get(x, bf16, c, a->dim - c) * v_set(rstd);
            if (bf16) normal = v_round_bf16(normal);
            v_put(y, bf16, c, a->dim - c, v_load_n(a->weight + c, a->dim - c) * normal);
        }
    }
}

static void rmsnorm_rows(const void *args, int64_t first, int64_t end, void *scratch)
{
    const tp_rmsnorm_args *a = args;
    (void)scratch;
    if (is_bf16(a->x))
        rmsnorm_some(a, first, end, true);
    else
        rmsnorm_some(a, first, end, false);
}

static tp_status rmsnorm(tp_ctx *ctx, const void *args)
{
    const tp_rmsnorm_args *a = args;
    TP_TRY(check_dtypes(ctx, "rmsnorm", a->x.dtype, a->y.dtype));
    for_rows(ctx, a->n, a->dim, rmsnorm_rows, args);
    return TP_OK;
}

/* dx (+)= rstd * (w dy - x rstd^2 mean(w dy x)) */
TP_INLINE void rmsnorm_backward_some(const tp_rmsnorm_backward_args *a, int64_t first, int64_t end, bool bf16)
{
    for (int64_t r = first; r < end; r++) {
        const void *x = head_at(a->x, r, a->heads, a->dim), *dy = head_at(a->dy, r, a->heads, a->dim);
        void *dx = head_at(a->dx, r, a->heads, a->dim);
        vf sum = v_set(0.0f);
        for (int64_t c = 0; c < a->dim; c += VL) {
            vf g = v_load_n(a->weight + c, a->dim - c) * v_get(dy, bf16, c, a->dim - c);
            sum = v_fma(g, v_get(x, bf16, c, a->dim - c), sum);
        }
        float rstd = a->rstd[r];
        vf along = v_set(rstd * rstd * (v_sum(sum) / (float)a->dim));
        for (int64_t c = 0; c < a->dim; c += VL) {
            vf g = v_load_n(a->weight + c, a->dim - c) * v_get(dy, bf16, c, a->dim - c);
            vf d = v_set(rstd) * (g - v_get(x, bf16, c, a->dim - c) * along);
            if (a->accumulate) d = d + v_get(dx, bf16, c, a->dim - c);
            v_put(dx, bf16, c, a->dim - c, d);
        }
    }
}

static void rmsnorm_backward_rows(const void *args, int64_t first, int64_t end, void *scratch)
{
    const tp_rmsnorm_backward_args *a = args;
    (void)scratch;
    if (is_bf16(a->x))
        rmsnorm_backward_some(a, first, end, true);
    else
        rmsnorm_backward_some(a, first, end, false);
}

static vf rmsnorm_dweight_term(const void *args, int64_t r, int64_t c, int64_t n)
{
    const tp_rmsnorm_backward_args *a = args;
    vf x = v_get(head_at(a->x, r, a->heads, a->dim), is_bf16(a->x), c, n),
       dy = v_get(head_at(a->dy, r, a->heads, a->dim), is_bf16(a->dy), c, n);
    return dy * x * v_set(a->rstd[r]);
}

static void rmsnorm_dweight_columns(const void *args, int64_t first, int64_t end, void *scratch)
{
    const tp_rmsnorm_backward_args *a = args;
    (void)end, (void)scratch;
    sum_columns(args, a->n, a->dim, first, rmsnorm_dweight_term, a->dweight, true);
}

static tp_status rmsnorm_backward(tp_ctx *ctx, const void *args)
{
    const tp_rmsnorm_backward_args *a = args;
    TP_TRY(check_dtypes(ctx, "rmsnorm_backward", a->x.dtype, a->dy.dtype));
    TP_TRY(check_dtypes(ctx, "rmsnorm_backward", a->x.dtype, a->dx.dtype));
    if (a->dweight != NULL) for_columns(ctx, a->dim, rmsnorm_dweight_columns, args);
    for_rows(ctx, a->n, a->dim, rmsnorm_backward_rows, args);
    return TP_OK;
}

/* The variance is taken around the mean, in a second pass over the row in L1: no cancellation. */
TP_INLINE void layernorm_some(const tp_layernorm_args *a, int64_t first, int64_t end, bool bf16)
{
    for (int64_t r = first; r < end; r++) {
        const void *x = row_at(a->x, r);
        void *y = row_at(a->y, r);
        vf sum = v_set(0.0f);
        for (int64_t c = 0; c < a->dim; c += VL) sum = sum + v_get(x, bf16, c, a->dim - c);
        float mean = v_sum(sum) / (float)a->dim;
        vf squares = v_set(0.0f);
        for (int64_t c = 0; c < a->dim; c += VL) {
            vf d = v_get(x, bf16, c, a->dim - c) - v_set(mean);
            if (a->dim - c < VL) d = v_pick(v_lt(v_iota(), v_set((float)(a->dim - c))), d, v_set(0.0f));
            squares = v_fma(d, d, squares);
        }
        float rstd = 1.0f / sqrtf(v_sum(squares) / (float)a->dim + a->eps);
        if (a->mean != NULL) a->mean[r] = mean;
        if (a->rstd != NULL) a->rstd[r] = rstd;
        for (int64_t c = 0; c < a->dim; c += VL) {
            vf normal = (v_get(x, bf16, c, a->dim - c) - v_set(mean)) * v_set(rstd);
            vf out = v_load_n(a->weight + c, a->dim - c) * normal;
            if (a->bias != NULL) out = out + v_load_n(a->bias + c, a->dim - c);
            v_put(y, bf16, c, a->dim - c, out);
        }
    }
}

static void layernorm_rows(const void *args, int64_t first, int64_t end, void *scratch)
{
    const tp_layernorm_args *a = args;
    (void)scratch;
    if (is_bf16(a->x))
        layernorm_some(a, first, end, true);
    else
        layernorm_some(a, first, end, false);
}

static tp_status layernorm(tp_ctx *ctx, const void *args)
{
    const tp_layernorm_args *a = args;
    TP_TRY(check_dtypes(ctx, "layernorm", a->x.dtype, a->y.dtype));
    for_rows(ctx, a->n, a->dim, layernorm_rows, args);
    return TP_OK;
}

/* With xh = (x - mean) rstd and g = w dy:  dx (+)= rstd * (g - mean(g) - xh mean(g xh)) */
TP_INLINE void layernorm_backward_some(const tp_layernorm_backward_args *a, int64_t first, int64_t end, bool bf16)
{
    for (int64_t r = first; r < end; r++) {
        const void *x = row_at(a->x, r), *dy = row_at(a->dy, r);
        void *dx = row_at(a->dx, r);
        vf mean = v_set(a->mean[r]), rstd = v_set(a->rstd[r]);
        vf sum = v_set(0.0f), product = v_set(0.0f);
        for (int64_t c = 0; c < a->dim; c += VL) {
            vf g = v_load_n(a->weight + c, a->dim - c) * v_get(dy, bf16, c, a->dim - c); /* 0 beyond the row */
            sum = sum + g;
            product = v_fma(g, (v_get(x, bf16, c, a->dim - c) - mean) * rstd, product);
        }
        vf level = v_set(v_sum(sum) / (float)a->dim), along = v_set(v_sum(product) / (float)a->dim);
        for (int64_t c = 0; c < a->dim; c += VL) {
            vf g = v_load_n(a->weight + c, a->dim - c) * v_get(dy, bf16, c, a->dim - c);
            vf normal = (v_get(x, bf16, c, a->dim - c) - mean) * rstd;
            vf d = rstd * (g - level - normal * along);
            if (a->accumulate) d = d + v_get(dx, bf16, c, a->dim - c);
            v_put(dx, bf16, c, a->dim - c, d);
        }
    }
}

static void layernorm_backward_rows(const void *args, int64_t first, int64_t end, void *scratch)
{
    const tp_layernorm_backward_args *a = args;
    (void)scratch;
    if (is_bf16(a->x))
        layernorm_backward_some(a, first, end, true);
    else
        layernorm_backward_some(a, first, end, false);
}

static vf layernorm_dweight_term(const void *args, int64_t r, int64_t c, int64_t n)
{
    const tp_layernorm_backward_args *a = args;
    vf x = v_get(row_at(a->x, r), is_bf16(a->x), c, n), dy = v_get(row_at(a->dy, r), is_bf16(a->dy), c, n);
    return dy * ((x - v_set(a->mean[r])) * v_set(a->rstd[r]));
}

static vf layernorm_dbias_term(const void *args, int64_t r, int64_t c, int64_t n)
{
    const tp_layernorm_backward_args *a = args;
    return v_get(row_at(a->dy, r), is_bf16(a->dy), c, n);
}

static void layernorm_dweight_columns(const void *args, int64_t first, int64_t end, void *scratch)
{
    const tp_layernorm_backward_args *a = args;
    (void)end, (void)scratch;
    if (a->dweight != NULL) sum_columns(args, a->n, a->dim, first, layernorm_dweight_term, a->dweight, true);
    if (a->dbias != NULL) sum_columns(args, a->n, a->dim, first, layernorm_dbias_term, a->dbias, true);
}

static tp_status layernorm_backward(tp_ctx *ctx, const void *args)
{
    const tp_layernorm_backward_args *a = args;
    TP_TRY(check_dtypes(ctx, "layernorm_backward", a->x.dtype, a->dy.dtype));
    TP_TRY(check_dtypes(ctx, "layernorm_backward", a->x.dtype, a->dx.dtype));
    if (a->dweight != NULL || a->dbias != NULL) for_columns(ctx, a->dim, layernorm_dweight_columns, args);
    for_rows(ctx, a->n, a->dim, layernorm_backward_rows, args);
    return TP_OK;
}
