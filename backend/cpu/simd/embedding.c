/* Rows of a frozen table by token id, and the gradient of a trainable one. */

/* Values decoded at once: a multiple of every format's block, small enough for L1. */
#define EMBEDDING_CHUNK 4096

/* The table's element (row, c) of a dense format. */
TP_INLINE const unsigned char *dense_at(const tp_matrix *t, int64_t row, int64_t c)
{
    int64_t bytes = tp_formats[t->format].block_bytes;
    if (t->transposed) return (const unsigned char *)t->data + (c * (t->stride > 0 ? t->stride : t->rows) + row) * bytes;
    return (const unsigned char *)t->data + (row * (t->stride > 0 ? t->stride : t->cols) + c) * bytes;
}

/* Values c .. c+n-1 of a logical row, in f32. */
static void table_values(const tp_matrix *t, int64_t id, int64_t c, int64_t n, float *out)
{
    const tp_format *format = &tp_formats[t->format];
    int64_t row = tp_matrix_stored_row(t, id);
    if (!format->dense) {
        int64_t bytes = tp_format_row_bytes(t->format, t->cols);
        int64_t whole = (n + format->block - 1) / format->block * format->block;
        format->decode((const unsigned char *)t->data + row * bytes, c, whole, out);
    } else if (t->transposed) {
        for (int64_t i = 0; i < n; i++) tp_convert_to_f32(format->dtype, dense_at(t, row, c + i), 1, out + i);
    } else {
        tp_convert_to_f32(format->dtype, dense_at(t, row, c), (size_t)n, out);
    }
}

static void embedding_rows(const void *args, int64_t first, int64_t end, void *scratch)
{
    const tp_embedding_args *a = args;
    bool bf16 = is_bf16(a->out);
    float *values = scratch;
    for (int64_t r = first; r < end; r++) {
        void *out = row_at(a->out, r);
        for (int64_t c0 = 0; c0 < a->table.cols; c0 += EMBEDDING_CHUNK) {
            int64_t n = a->table.cols - c0 < EMBEDDING_CHUNK ? a->table.cols - c0 : EMBEDDING_CHUNK;
            if (a->ids[r] >= 0)
                table_values(&a->table, a->ids[r], c0, n, values);
            else
                memset(values, 0, (size_t)n * sizeof *values);
            for (int64_t i = 0; i < n; i += VL) {
                vf x = v_load_n(values + i, n - i);
                if (a->table.round_bf16) x = v_round_bf16(x);
                if (a->accumulate) x = x + v_get(out, bf16, c0 + i, n - i);
                v_put(out, bf16, c0 + i, n - i, x);
            }
        }
    }
}

static tp_status embedding(tp_ctx *ctx, const void *args)
{
    const tp_embedding_args *a = args;
    TP_TRY(check_dtype(ctx, "embedding", a->out.dtype));
    for_rows(ctx, a->n, a->table.cols, embedding_rows, args);
    return TP_OK;
}

/* The same id may come up in many rows, so an item owns columns instead and takes the rows in order. */
static void embedding_backward_columns(const void *args, int64_t first, int64_t end, void *scratch)
{
    const tp_embedding_backward_args *a = args;
    int64_t c1 = end * SUM_COLUMNS < a->dim ? end * SUM_COLUMNS : a->dim;
    (void)scratch;
    for (int64_t r = 0; r < a->n; r++) {
        float *row = a->dtable + a->ids[r] * a->dim;
        const void *dout = row_at(a->dout, r);
        for (int64_t c = first * SUM_COLUMNS; c < c1; c += VL) {
            v_store_n(row + c, c1 - c, v_load_n(row + c, c1 - c) + v_get(dout, is_bf16(a->dout), c, c1 - c));
        }
    }
}

static tp_status embedding_backward(tp_ctx *ctx, const void *args)
{
    const tp_embedding_backward_args *a = args;
    TP_TRY(check_dtype(ctx, "embedding_backward", a->dout.dtype));
    for_columns(ctx, a->dim, embedding_backward_columns, args);
    return TP_OK;
}
