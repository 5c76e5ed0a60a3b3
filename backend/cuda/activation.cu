/* SwiGLU and GELU with their gradients. Everything between load and store is f32; 16 bits are rounded once, at the end.
 *
 * With exact exponentials and divisions the kernels would be bound by arithmetic in 16 bits, where the last bits of f32 are
 * rounded away anyway: there the hardware's approximations are used (some 2^-21), in f32 the exact functions. */
#include "backend/cuda/rows.cuh"

namespace
{

template <typename T> __device__ __forceinline__ float sigmoid(float x)
{
    return __fdividef(1.0f, 1.0f + __expf(-x));
}
template <> __device__ __forceinline__ float sigmoid<float>(float x)
{
    return 1.0f / (1.0f + expf(-x));
}

template <typename T> __device__ __forceinline__ float tanh_of(float x)
{
    return 1.0f -
           __fdividef(2.0f, 1.0f + __expf(fminf(2.0f * x, 80.0f))); /* beyond 2^126 the quick division gives 0 too early */
}
template <> __device__ __forceinline__ float tanh_of<float>(float x)
{
    return tanhf(x);
}

template <typename T> struct swiglu_chunk {
    tp_typed_rows<T> gate, up, y;
    __device__ void operator()(int64_t row, int64_t column, int64_t count) const
    {
        float g[TP_CHUNK], u[TP_CHUNK];
        gate.load(row, column, count, g);
        up.load(row, column, count, u);
#pragma unroll
        for (int i = 0; i < TP_CHUNK; i++) g[i] = g[i] * sigmoid<T>(g[i]) * u[i];
        y.store(row, column, count, g);
    }
};

/* With s = sigmoid(g): d silu / dg = s (1 + g (1 - s)). */
template <typename T> struct swiglu_backward_chunk {
    tp_typed_rows<T> gate, up, dy, dgate, dup;
    __device__ void operator()(int64_t row, int64_t column, int64_t count) const
    {
        float g[TP_CHUNK], u[TP_CHUNK], d[TP_CHUNK];
        gate.load(row, column, count, g);
        up.load(row, column, count, u);
        dy.load(row, column, count, d);
#pragma unroll
        for (int i = 0; i < TP_CHUNK; i++) {
            const float s = sigmoid<T>(g[i]), slope = s * fmaf(g[i], 1.0f - s, 1.0f);
            u[i] = d[i] * u[i] * slope;
            g[i] = d[i] * g[i] * s;
        }
        dgate.store(row, column, count, u);
        dup.store(row, column, count, g);
    }
};

/* GELU is x times a smooth step: 0.5 (1 + erf(x / sqrt 2)), or with tanh(u), u = sqrt(2/pi) (x + 0.044715 x^3). */
constexpr float GELU_ROOT = 0.79788456f; /* sqrt(2 / pi) */
constexpr float GELU_CUBE = 0.044715f;

template <typename T, bool EXACT> __device__ __forceinline__ float gelu_step(float x)
{
    float t;
    if constexpr (EXACT)
        t = erff(x * 0.70710678f);
    else
        t = tanh_of<T>(GELU_ROOT * fmaf(GELU_CUBE * x * x, x, x));
    return fmaf(0.5f, t, 0.5f);
}

/* The step's derivative: the normal density, or 0.5 (1 - tanh^2) u' = 2 step (1 - step) u'. */
template <typename T, bool EXACT> __device__ __forceinline__ float gelu_step_slope(float x, float step)
{
    if constexpr (EXACT) return 0.39894228f * expf(-0.5f * x * x);
    return 2.0f * step * (1.0f - step) * GELU_ROOT * fmaf(3.0f * GELU_CUBE * x, x, 1.0f);
}

template <typename T, bool EXACT> struct gelu_chunk {
    tp_typed_rows<T> x, y;
    __device__ void operator()(int64_t row, int64_t column, int64_t count) const
    {
        float v[TP_CHUNK];
        x.load(row, column, count, v);
#pragma unroll
        for (int i = 0; i < TP_CHUNK; i++) v[i] *= gelu_step<T, EXACT>(v[i]);
        y.store(row, column, count, v);
    }
};

template <typename T, bool EXACT> struct gelu_backward_chunk {
    tp_typed_rows<T> x, dy, dx;
    __device__ void operator()(int64_t row, int64_t column, int64_t count) const
    {
        float v[TP_CHUNK], d[TP_CHUNK];
        x.load(row, column, count, v);
        dy.load(row, column, count, d);
#pragma unroll
        for (int i = 0; i < TP_CHUNK; i++) {
            const float step = gelu_step<T, EXACT>(v[i]);
            d[i] *= fmaf(v[i], gelu_step_slope<T, EXACT>(v[i], step), step);
        }
        dx.store(row, column, count, d);
    }
};

} // namespace

extern "C" tp_status tp_cuda_swiglu(tp_ctx *ctx, const void *args)
{
    const tp_swiglu_args *a = static_cast<const tp_swiglu_args *>(args);
    TP_TRY(tp_check_same_dtype(ctx, "swiglu", a->gate.dtype, a->up.dtype));
    TP_TRY(tp_check_same_dtype(ctx, "swiglu", a->gate.dtype, a->y.dtype));
    TP_CUDA_DTYPE(a->gate.dtype, T, {
        const swiglu_chunk<T> body = {tp_typed<T>(a->gate), tp_typed<T>(a->up), tp_typed<T>(a->y)};
        return tp_for_chunks(ctx, "swiglu", a->n, a->dim, body);
    });
}

extern "C" tp_status tp_cuda_swiglu_backward(tp_ctx *ctx, const void *args)
{
    const tp_swiglu_backward_args *a = static_cast<const tp_swiglu_backward_args *>(args);
    TP_TRY(tp_check_same_dtype(ctx, "swiglu_backward", a->gate.dtype, a->up.dtype));
    TP_TRY(tp_check_same_dtype(ctx, "swiglu_backward", a->gate.dtype, a->dy.dtype));
    TP_TRY(tp_check_same_dtype(ctx, "swiglu_backward", a->gate.dtype, a->dgate.dtype));
    TP_TRY(tp_check_same_dtype(ctx, "swiglu_backward", a->gate.dtype, a->dup.dtype));
    TP_CUDA_DTYPE(a->gate.dtype, T, {
        const swiglu_backward_chunk<T> body = {tp_typed<T>(a->gate), tp_typed<T>(a->up), tp_typed<T>(a->dy),
                                               tp_typed<T>(a->dgate), tp_typed<T>(a->dup)};
        return tp_for_chunks(ctx, "swiglu_backward", a->n, a->dim, body);
    });
}

extern "C" tp_status tp_cuda_gelu(tp_ctx *ctx, const void *args)
{
    const tp_gelu_args *a = static_cast<const tp_gelu_args *>(args);
    TP_TRY(tp_check_same_dtype(ctx, "gelu", a->x.dtype, a->y.dtype));
    TP_CUDA_DTYPE(a->x.dtype, T, {
        TP_CUDA_BOOL(a->exact, EXACT, {
            const gelu_chunk<T, EXACT> body = {tp_typed<T>(a->x), tp_typed<T>(a->y)};
            return tp_for_chunks(ctx, "gelu", a->n, a->dim, body);
        });
    });
}

extern "C" tp_status tp_cuda_gelu_backward(tp_ctx *ctx, const void *args)
{
    const tp_gelu_backward_args *a = static_cast<const tp_gelu_backward_args *>(args);
    TP_TRY(tp_check_same_dtype(ctx, "gelu_backward", a->x.dtype, a->dy.dtype));
    TP_TRY(tp_check_same_dtype(ctx, "gelu_backward", a->x.dtype, a->dx.dtype));
    TP_CUDA_DTYPE(a->x.dtype, T, {
        TP_CUDA_BOOL(a->exact, EXACT, {
            const gelu_backward_chunk<T, EXACT> body = {tp_typed<T>(a->x), tp_typed<T>(a->dy), tp_typed<T>(a->dx)};
            return tp_for_chunks(ctx, "gelu_backward", a->n, a->dim, body);
        });
    });
}
