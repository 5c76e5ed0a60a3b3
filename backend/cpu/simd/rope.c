/* Rotary positions. The table is made once a step for all layers; rotating reads and writes each channel once. */

static void rope_table_rows(const void *args, int64_t first, int64_t end, void *scratch)
{
    const tp_rope_table_args *a = args;
    (void)scratch;
    for (int64_t r = first; r < end; r++) {
        float position = (float)a->positions[r];
        for (int64_t i = 0; i < a->half; i++) {
            float angle = position * a->inv_freq[i];
            a->cos[r * a->half + i] = cosf(angle) * a->factor;
            a->sin[r * a->half + i] = sinf(angle) * a->factor;
        }
    }
}

static tp_status rope_table(tp_ctx *ctx, const void *args)
{
    const tp_rope_table_args *a = args;
    for_rows(ctx, a->n, a->half * 32, rope_table_rows, args); /* a cosine costs as much as some 32 channels elsewhere */
    return TP_OK;
}

/* One head: (x, y) becomes (x cos - y sin, y cos + x sin). In bf16 the reference rounds cos, sin, each product, and the
 * sum; f32 rounds each product and the sum by itself. */
TP_INLINE void rope_head(void *head, const float *cosine, const float *sine, int64_t half, bool inverse, bool bf16)
{
    for (int64_t i = 0; i < half; i += VL) {
        int64_t n = half - i;
        vf x = v_get(head, bf16, i, n), y = v_get(head, bf16, half + i, n);
        vf c = v_load_n(cosine + i, n), s = v_load_n(sine + i, n);
        if (inverse) s = v_set(0.0f) - s;
        if (bf16) c = v_round_bf16(c), s = v_round_bf16(s);
        vf xc = x * c, ys = y * s, yc = y * c, xs = x * s;
        if (bf16) xc = v_round_bf16(xc), ys = v_round_bf16(ys), yc = v_round_bf16(yc), xs = v_round_bf16(xs);
        v_put(head, bf16, i, n, xc - ys);
        v_put(head, bf16, half + i, n, yc + xs);
    }
}

static void rope_rows(const void *args, int64_t first, int64_t end, void *scratch)
{
    const tp_rope_args *a = args;
    bool bf16 = is_bf16(a->x);
    (void)scratch;
    for (int64_t r = first; r < end; r++) {
        const float *c = a->cos + r * a->half, *s = a->sin + r * a->half;
        for (int64_t h = 0; h < a->heads; h++) {
            if (bf16)
                rope_head((uint16_t *)row_at(a->x, r) + h * a->head_dim, c, s, a->half, a->inverse, true);
            else
                rope_head((float *)row_at(a->x, r) + h * a->head_dim, c, s, a->half, a->inverse, false);
        }
    }
}

static tp_status rope(tp_ctx *ctx, const void *args)
{
    const tp_rope_args *a = args;
    TP_TRY(check_dtype(ctx, "rope", a->x.dtype));
    for_rows(ctx, a->n, a->heads * a->head_dim, rope_rows, args);
    return TP_OK;
}
