/* SwiGLU and GELU with their gradients. Everything between load and store is f32; bf16 is rounded once, at the end. */

TP_INLINE vf v_sigmoid(vf x)
{
    return v_set(1.0f) / (v_set(1.0f) + v_exp(v_set(0.0f) - x));
}

TP_INLINE void swiglu_some(const tp_swiglu_args *a, int64_t first, int64_t end, bool bf16)
{
    for (int64_t r = first; r < end; r++) {
        const void *gate = row_at(a->gate, r), *up = row_at(a->up, r);
        void *y = row_at(a->y, r);
        for (int64_t c = 0; c < a->dim; c += VL) {
            vf g = v_get(gate, bf16, c, a->dim - c);
            vf silu = g / (v_set(1.0f) + v_exp(v_set(0.0f) - g));
            v_put(y, bf16, c, a->dim - c, silu * v_get(up, bf16, c, a->dim - c));
        }
    }
}

static void swiglu_rows(const void *args, int64_t first, int64_t end, void *scratch)
{
    const tp_swiglu_args *a = args;
    (void)scratch;
    if (is_bf16(a->gate))
        swiglu_some(a, first, end, true);
    else
        swiglu_some(a, first, end, false);
}

static tp_status swiglu(tp_ctx *ctx, const void *args)
{
    const tp_swiglu_args *a = args;
    TP_TRY(check_dtypes(ctx, "swiglu", a->gate.dtype, a->up.dtype));
    TP_TRY(check_dtypes(ctx, "swiglu", a->gate.dtype, a->y.dtype));
    for_rows(ctx, a->n, a->dim, swiglu_rows, args);
    return TP_OK;
}

/* With s = sigmoid(g): d silu / dg = s (1 + g (1 - s)). */
TP_INLINE void swiglu_backward_some(const tp_swiglu_backward_args *a, int64_t first, int64_t end, bool bf16)
{
    const vf one = v_set(1.0f);
    for (int64_t r = first; r < end; r++) {
        const void *gate = row_at(a->gate, r), *up = row_at(a->up, r), *dy = row_at(a->dy, r);
        void *dgate = row_at(a->dgate, r), *dup = row_at(a->dup, r);
        for (int64_t c = 0; c < a->dim; c += VL) {
            int64_t n = a->dim - c;
            vf g = v_get(gate, bf16, c, n), u = v_get(up, bf16, c, n), d = v_get(dy, bf16, c, n);
            vf s = v_sigmoid(g);
            v_put(dgate, bf16, c, n, d * u * s * v_fma(g, one - s, one));
            v_put(dup, bf16, c, n, d * g * s);
        }
    }
}

static void swiglu_backward_rows(const void *args, int64_t first, int64_t end, void *scratch)
{
    const tp_swiglu_backward_args *a = args;
    (void)scratch;
    if (is_bf16(a->gate))
        swiglu_backward_some(a, first, end, true);
    else
        swiglu_backward_some(a, first, end, false);
}

static tp_status swiglu_backward(tp_ctx *ctx, const void *args)
{
    const tp_swiglu_backward_args *a = args;
    TP_TRY(check_dtypes(ctx, "swiglu_backward", a->gate.dtype, a->up.dtype));
    TP_TRY(check_dtypes(ctx, "swiglu_backward", a->gate.dtype, a->dy.dtype));
    TP_TRY(check_dtypes(ctx, "swiglu_backward", a->gate.dtype, a->dgate.dtype));
    TP_TRY(check_dtypes(ctx, "swiglu_backward", a->gate.dtype, a->dup.dtype));
    for_rows(ctx, a->n, a->dim, swiglu_backward_rows, args);
    return TP_OK;
}

/* GELU is x times a smooth step: 0.5 (1 + erf(x / sqrt 2)), or with tanh(u), u = sqrt(2/pi) (x + 0.044715 x^3). */
#define GELU_ROOT 0.79788456f /* sqrt(2 / pi) */
#define GELU_CUBE 0.044715f

TP_INLINE vf gelu_step(vf x, bool exact)
{
    vf t;
    if (exact)
        t = v_erf(x * v_set(0.70710678f));
    else
        t = v_tanh(v_set(GELU_ROOT) * v_fma(v_set(GELU_CUBE) * x * x, x, x));
    return v_fma(v_set(0.5f), t, v_set(0.5f));
}

/* The step's derivative: the normal density, or 0.5 (1 - tanh^2) u' = 2 step (1 - step) u'. */
TP_INLINE vf gelu_step_slope(vf x, vf step, bool exact)
{
    if (exact) return v_set(0.39894228f) * v_exp(v_set(-0.5f) * x * x);
    vf du = v_set(GELU_ROOT) * v_fma(v_set(3.0f * GELU_CUBE) * x, x, v_set(1.0f));
    return v_set(2.0f) * step * (v_set(1.0f) - step) * du;
}

TP_INLINE void gelu_some(const tp_gelu_args *a, int64_t first, int64_t end, bool bf16, bool exact)
{
    for (int64_t r = first; r < end; r++) {
        const void *x = row_at(a->x, r);
        void *y = row_at(a->y, r);
        for (int64_t c = 0; c < a->dim; c += VL) {
            vf v = v_get(x, bf16, c, a->dim - c);
            v_put(y, bf16, c, a->dim - c, v * gelu_step(v, exact));
        }
    }
}

static void gelu_rows(const void *args, int64_t first, int64_t end, void *scratch)
{
    const tp_gelu_args *a = args;
    (void)scratch;
    if (is_bf16(a->x))
        a->exact ? gelu_some(a, first, end, true, true) : gelu_some(a, first, end, true, false);
    else
        a->exact ? gelu_some(a, first, end, false, true) : gelu_some(a, first, end, false, false);
}

static tp_status gelu(tp_ctx *ctx, const void *args)
{
    const tp_gelu_args *a = args;
    TP_TRY(check_dtypes(ctx, "gelu", a->x.dtype, a->y.dtype));
    for_rows(ctx, a->n, a->dim, gelu_rows, args);
    return TP_OK;
}

TP_INLINE void gelu_backward_some(const tp_gelu_backward_args *a, int64_t first, int64_t end, bool bf16, bool exact)
{
    for (int64_t r = first; r < end; r++) {
        const void *x = row_at(a->x, r), *dy = row_at(a->dy, r);
        void *dx = row_at(a->dx, r);
        for (int64_t c = 0; c < a->dim; c += VL) {
            vf v = v_get(x, bf16, c, a->dim - c), d = v_get(dy, bf16, c, a->dim - c);
            vf step = gelu_step(v, exact);
            v_put(dx, bf16, c, a->dim - c, d * v_fma(v, gelu_step_slope(v, step, exact), step));
        }
    }
}

static void gelu_backward_rows(const void *args, int64_t first, int64_t end, void *scratch)
{
    const tp_gelu_backward_args *a = args;
    (void)scratch;
    if (is_bf16(a->x))
        a->exact ? gelu_backward_some(a, first, end, true, true) : gelu_backward_some(a, first, end, true, false);
    else
        a->exact ? gelu_backward_some(a, first, end, false, true) : gelu_backward_some(a, first, end, false, false);
}

static tp_status gelu_backward(tp_ctx *ctx, const void *args)
{
    const tp_gelu_backward_args *a = args;
    TP_TRY(check_dtypes(ctx, "gelu_backward", a->x.dtype, a->dy.dtype));
    TP_TRY(check_dtypes(ctx, "gelu_backward", a->x.dtype, a->dx.dtype));
    for_rows(ctx, a->n, a->dim, gelu_backward_rows, args);
    return TP_OK;
}
