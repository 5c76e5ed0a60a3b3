/* Cross entropy with its gradient, in place. A row of logits comes from memory once and goes back once: greatest value,
 * exponentials with their sum, and the division run over it while it lies in L2. A narrow gradient is written behind what has
 * been read of the same row. */

#define CE_LANES 4 /* vectors summed side by side: the chain of additions would be too slow with one */

TP_INLINE float row_greatest(const float *x, int64_t n)
{
    vf m[CE_LANES];
#pragma GCC unroll 4
    for (int v = 0; v < CE_LANES; v++) m[v] = v_set(-INFINITY);
    int64_t c = 0;
    for (; c + CE_LANES * VL <= n; c += CE_LANES * VL) {
#pragma GCC unroll 4
        for (int v = 0; v < CE_LANES; v++) m[v] = v_max(m[v], v_load(x + c + v * VL));
    }
    float greatest = v_greatest(v_max(v_max(m[0], m[1]), v_max(m[2], m[3])));
    for (; c < n; c++) greatest = x[c] > greatest ? x[c] : greatest;
    return greatest;
}

/* Sum of exp(x - greatest); the exponentials replace x if `store`. */
TP_INLINE float row_exp_sum(float *x, int64_t n, float greatest, bool store)
{
    vf sum[CE_LANES], shift = v_set(greatest);
#pragma GCC unroll 4
    for (int v = 0; v < CE_LANES; v++) sum[v] = v_set(0.0f);
    int64_t c = 0;
    for (; c + CE_LANES * VL <= n; c += CE_LANES * VL) {
#pragma GCC unroll 4
        for (int v = 0; v < CE_LANES; v++) {
            vf e = v_exp(v_load(x + c + v * VL) - shift);
            sum[v] = sum[v] + e;
            if (store) v_store(x + c + v * VL, e);
        }
    }
    for (; c < n; c += VL) {
        vf e = v_exp(v_load_n(x + c, n - c) - shift);
        if (n - c < VL) e = v_pick(v_lt(v_iota(), v_set((float)(n - c))), e, v_set(0.0f));
        sum[0] = sum[0] + e;
        if (store) v_store_n(x + c, n - c, e);
    }
    return v_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

/* x becomes x * factor - (scale at the label), in f32 or in bf16. */
TP_INLINE void row_gradient(float *x, int64_t n, float factor, int64_t label, float scale, bool narrow)
{
    vf factors = v_set(factor);
    float own = x[label] * factor - scale;
    for (int64_t c = 0; c < n; c += VL) v_put(x, narrow, c, n - c, v_load_n(x + c, n - c) * factors);
    if (narrow)
        memcpy((uint16_t *)(void *)x + label, &(uint16_t){tp_f32_to_bf16(own)}, sizeof(uint16_t));
    else
        x[label] = own;
}

static void cross_entropy_rows(const void *args, int64_t first, int64_t end, void *scratch)
{
    const tp_cross_entropy_args *a = args;
    float scale = a->state != NULL ? a->state->grad_scale * a->state->loss_scale : a->grad_scale;
    (void)scratch;
    for (int64_t r = first; r < end; r++) {
        float *x = a->logits + r * a->ld;
        if (a->labels[r] < 0) {
            a->loss[r] = 0;
            if (a->want_grad) memset(x, 0, (size_t)a->vocab * (a->narrow ? 2 : 4));
            continue;
        }
        float greatest = row_greatest(x, a->vocab), correct = x[a->labels[r]];
        float sum = a->want_grad ? row_exp_sum(x, a->vocab, greatest, true) : row_exp_sum(x, a->vocab, greatest, false);
        a->loss[r] = (float)((double)greatest - (double)correct + log((double)sum));
        if (!a->want_grad) continue;
        float factor = scale / sum;
        if (a->narrow)
            row_gradient(x, a->vocab, factor, a->labels[r], scale, true);
        else
            row_gradient(x, a->vocab, factor, a->labels[r], scale, false);
    }
}

static tp_status cross_entropy(tp_ctx *ctx, const void *args)
{
    const tp_cross_entropy_args *a = args;
    for_rows(ctx, a->n, a->vocab, cross_entropy_rows, args);
    return TP_OK;
}

static tp_status add_loss(tp_ctx *ctx, const void *args)
{
    const tp_add_loss_args *a = args;
    (void)ctx;
    *a->loss *= a->state->grad_scale;
    a->state->loss_sum += (double)*a->loss;
    return TP_OK;
}
