/* Sums, copies and conversions of rows: add, scale, gather_rows, scatter_rows, column_sum. All are bound by memory; the
 * vectors only keep the conversions between bf16 and f32 out of the way. */

TP_INLINE void add_row(const tp_add_args *a, int64_t r, bool x16, bool y16, bool z16)
{
    const void *x = row_at(a->x, r), *y = row_at(a->y, r);
    void *z = row_at(a->z, r);
    for (int64_t c = 0; c < a->dim; c += VL) {
        v_put(z, z16, c, a->dim - c, v_get(x, x16, c, a->dim - c) + v_get(y, y16, c, a->dim - c));
    }
}

static void add_rows(const void *args, int64_t first, int64_t end, void *scratch)
{
    const tp_add_args *a = args;
    bool x16 = is_bf16(a->x), y16 = is_bf16(a->y), z16 = is_bf16(a->z);
    (void)scratch;
    for (int64_t r = first; r < end; r++) {
        if (!x16 && !y16 && !z16)
            add_row(a, r, false, false, false);
        else if (x16 && y16 && z16)
            add_row(a, r, true, true, true);
        else
            add_row(a, r, x16, y16, z16);
    }
}

static tp_status add(tp_ctx *ctx, const void *args)
{
    const tp_add_args *a = args;
    TP_TRY(check_dtype(ctx, "add", a->x.dtype));
    TP_TRY(check_dtype(ctx, "add", a->y.dtype));
    TP_TRY(check_dtype(ctx, "add", a->z.dtype));
    for_rows(ctx, a->n, a->dim, add_rows, args);
    return TP_OK;
}

TP_INLINE void scale_row(const tp_scale_args *a, int64_t r, bool x16, bool y16)
{
    const void *x = row_at(a->x, r);
    void *y = row_at(a->y, r);
    vf alpha = v_set(a->alpha);
    for (int64_t c = 0; c < a->dim; c += VL) v_put(y, y16, c, a->dim - c, alpha * v_get(x, x16, c, a->dim - c));
}

static void scale_rows(const void *args, int64_t first, int64_t end, void *scratch)
{
    const tp_scale_args *a = args;
    bool x16 = is_bf16(a->x), y16 = is_bf16(a->y);
    size_t row_bytes = (size_t)a->dim * (y16 ? 2 : 4);
    (void)scratch;
    for (int64_t r = first; r < end; r++) {
        if (a->alpha == 0.0f)
            memset(row_at(a->y, r), 0, row_bytes);
        else if (a->alpha == 1.0f && x16 == y16)
            memmove(row_at(a->y, r), row_at(a->x, r), row_bytes);
        else if (x16)
            scale_row(a, r, true, y16);
        else
            scale_row(a, r, false, y16);
    }
}

static tp_status scale(tp_ctx *ctx, const void *args)
{
    const tp_scale_args *a = args;
    if (a->alpha != 0.0f) TP_TRY(check_dtype(ctx, "scale", a->x.dtype));
    TP_TRY(check_dtype(ctx, "scale", a->y.dtype));
    for_rows(ctx, a->n, a->dim, scale_rows, args);
    return TP_OK;
}

/* Copies row i of x to row j of y, converting if their dtypes differ. */
TP_INLINE void copy_row(tp_rows x, int64_t i, tp_rows y, int64_t j, int64_t dim)
{
    const void *from = row_at(x, i);
    void *to = row_at(y, j);
    if (x.dtype == y.dtype) {
        memcpy(to, from, (size_t)dim * (is_bf16(x) ? 2 : 4));
        return;
    }
    for (int64_t c = 0; c < dim; c += VL) v_put(to, is_bf16(y), c, dim - c, v_get(from, is_bf16(x), c, dim - c));
}

static void gather_some_rows(const void *args, int64_t first, int64_t end, void *scratch)
{
    const tp_gather_rows_args *a = args;
    (void)scratch;
    for (int64_t r = first; r < end; r++) {
        if (a->index[r] >= 0)
            copy_row(a->in, a->index[r], a->out, r, a->dim);
        else
            memset(row_at(a->out, r), 0, (size_t)a->dim * (is_bf16(a->out) ? 2 : 4));
    }
}

static tp_status gather_rows(tp_ctx *ctx, const void *args)
{
    const tp_gather_rows_args *a = args;
    TP_TRY(check_dtype(ctx, "gather_rows", a->in.dtype));
    TP_TRY(check_dtype(ctx, "gather_rows", a->out.dtype));
    for_rows(ctx, a->n, a->dim, gather_some_rows, args);
    return TP_OK;
}

/* Rows of the result between the places that rows first .. end-1 go to; the first item also clears what lies before the
 * first place, and each clears what follows its last. */
static void scatter_some_rows(const void *args, int64_t first, int64_t end, void *scratch)
{
    const tp_scatter_rows_args *a = args;
    size_t row_bytes = (size_t)a->dim * (is_bf16(a->out) ? 2 : 4);
    (void)scratch;
    for (int64_t r = first; r < end; r++) {
        int64_t own = a->index[r];
        if (own >= 0) copy_row(a->in, r, a->out, own, a->dim);
        if (!a->zero_rest || (own < 0 && r > 0)) continue;
        int64_t next = own >= 0 && r + 1 < a->n && a->index[r + 1] >= 0 ? a->index[r + 1] : a->rows;
        for (int64_t z = r == 0 ? 0 : own + 1; z < next; z++) {
            if (z != own) memset(row_at(a->out, z), 0, row_bytes);
        }
    }
}

static tp_status scatter_rows(tp_ctx *ctx, const void *args)
{
    const tp_scatter_rows_args *a = args;
    TP_TRY(check_dtype(ctx, "scatter_rows", a->in.dtype));
    TP_TRY(check_dtype(ctx, "scatter_rows", a->out.dtype));
    if (a->n == 0 && a->zero_rest) {
        tp_scale_args zeros = {a->rows, a->dim, a->out, a->out, 0.0f};
        return scale(ctx, &zeros);
    }
    for_rows(ctx, a->n, a->dim, scatter_some_rows, args);
    return TP_OK;
}

static vf column_sum_term(const void *args, int64_t r, int64_t c, int64_t n)
{
    const tp_column_sum_args *a = args;
    return v_get(row_at(a->a, r), is_bf16(a->a), c, n);
}

static void column_sum_columns(const void *args, int64_t first, int64_t end, void *scratch)
{
    const tp_column_sum_args *a = args;
    (void)end, (void)scratch;
    sum_columns(args, a->n, a->m, first, column_sum_term, a->out, a->beta != 0.0f);
}

static tp_status column_sum(tp_ctx *ctx, const void *args)
{
    const tp_column_sum_args *a = args;
    TP_TRY(check_dtype(ctx, "column_sum", a->a.dtype));
    for_columns(ctx, a->m, column_sum_columns, args);
    return TP_OK;
}
