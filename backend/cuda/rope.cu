/* Rotary positions. The table is made once a step for all layers; rotating reads and writes each channel once. A thread
 * takes 8 pairs of the same channels of two heads, so cosine and sine are read once for both. */
#include "backend/cuda/rows.cuh"

namespace
{

constexpr int HEADS_AT_ONCE = 2;

__global__ void rope_table_kernel(int64_t items, int64_t half, const int32_t *positions, const float *inv_freq, float factor,
                                  float *cosine, float *sine)
{
    const int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < items; i += step) {
        const float angle = (float)positions[i / half] * inv_freq[i % half];
        cosine[i] = cosf(angle) * factor;
        sine[i] = sinf(angle) * factor;
    }
}

/* A pair of either 16-bit type, and arithmetic that rounds. */
template <typename T> struct pair_of {
    typedef __nv_bfloat162 type;
    static __device__ __forceinline__ type round(float low, float high) { return __floats2bfloat162_rn(low, high); }
};
template <> struct pair_of<__half> {
    typedef __half2 type;
    static __device__ __forceinline__ type round(float low, float high) { return __floats2half2_rn(low, high); }
};

/* item / groups; a division of 32 bits where they hold the items is several times as quick. */
__device__ __forceinline__ int64_t quotient(int64_t item, int64_t groups, bool small)
{
    return small ? (int64_t)((uint32_t)item / (uint32_t)groups) : item / groups;
}

/* The four products of 2 x 8 pairs in 16 bits, two values an instruction: each is rounded, and so is the sum, as the
 * reference does. a, b: the halves of a head; c, s: cosine and sine. */
template <typename T>
__device__ __forceinline__ void turn_pairs(uint4 &a, uint4 &b, const float (&c)[TP_CHUNK], const float (&s)[TP_CHUNK])
{
    typedef typename pair_of<T>::type pair;
    uint32_t *const x = reinterpret_cast<uint32_t *>(&a), *const y = reinterpret_cast<uint32_t *>(&b);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const pair cosine = pair_of<T>::round(c[2 * i], c[2 * i + 1]), sine = pair_of<T>::round(s[2 * i], s[2 * i + 1]);
        const pair x0 = *reinterpret_cast<pair *>(x + i), x1 = *reinterpret_cast<pair *>(y + i);
        *reinterpret_cast<pair *>(x + i) = __hsub2_rn(__hmul2_rn(x0, cosine), __hmul2_rn(x1, sine));
        *reinterpret_cast<pair *>(y + i) = __hadd2_rn(__hmul2_rn(x1, cosine), __hmul2_rn(x0, sine));
    }
}

/* The pair (x, y) becomes (x cos - y sin, y cos + x sin). In 16 bits the reference rounds cos, sin, each product, and the sum;
 * f32 rounds each product and the sum by itself. The chunk's row stands for (token, heads), its columns for pairs. */
template <typename T> struct rope_chunk {
    tp_typed_rows<T> x; /* aligned: each half of each head as well */
    const float *cosine, *sine;
    int64_t heads, head_dim, half, groups; /* groups of HEADS_AT_ONCE in a token */
    bool inverse, table_aligned, small;
    __device__ void operator()(int64_t item, int64_t column, int64_t count) const
    {
        const int64_t row = quotient(item, groups, small), first = (item - row * groups) * HEADS_AT_ONCE;
        float c[TP_CHUNK], s[TP_CHUNK], a[HEADS_AT_ONCE][TP_CHUNK], b[HEADS_AT_ONCE][TP_CHUNK];
        tp_load_some<TP_CHUNK>(cosine + row * half + column, count, table_aligned, c);
        tp_load_some<TP_CHUNK>(sine + row * half + column, count, table_aligned, s);
#pragma unroll
        for (int h = 0; h < HEADS_AT_ONCE; h++) { /* all loads before the first store */
            const int64_t at = (first + h) * head_dim + column, left = first + h < heads ? count : 0;
            x.load(row, at, left, a[h]);
            x.load(row, at + half, left, b[h]);
        }
#pragma unroll
        for (int i = 0; i < TP_CHUNK; i++) {
            c[i] = tp_round<T>(c[i]);
            s[i] = tp_round<T>(inverse ? -s[i] : s[i]);
        }
#pragma unroll
        for (int h = 0; h < HEADS_AT_ONCE; h++) {
            const int64_t at = (first + h) * head_dim + column, left = first + h < heads ? count : 0;
#pragma unroll
            for (int i = 0; i < TP_CHUNK; i++) {
                const float x0 = a[h][i], x1 = b[h][i];
                const float ac = tp_round<T>(__fmul_rn(x0, c[i])), bs = tp_round<T>(__fmul_rn(x1, s[i]));
                const float bc = tp_round<T>(__fmul_rn(x1, c[i])), as = tp_round<T>(__fmul_rn(x0, s[i]));
                a[h][i] = __fsub_rn(ac, bs);
                b[h][i] = __fadd_rn(bc, as);
            }
            x.store(row, at, left, a[h]);
            x.store(row, at + half, left, b[h]);
        }
    }
};

/* The same in 16 bits where every chunk is aligned and all there. */
template <typename T> struct aligned_rope_chunk {
    tp_typed_rows<T> x;
    const float *cosine, *sine;
    int64_t heads, head_dim, half, groups;
    bool inverse, small;
    __device__ void operator()(int64_t item, int64_t column, int64_t) const
    {
        const int64_t row = quotient(item, groups, small), first = (item - row * groups) * HEADS_AT_ONCE;
        const bool both = first + 1 < heads;
        T *const at = x.at(row, first * head_dim + column), *const next = both ? at + head_dim : at;
        uint4 *const places[4] = {reinterpret_cast<uint4 *>(at), reinterpret_cast<uint4 *>(at + half),
                                  reinterpret_cast<uint4 *>(next), reinterpret_cast<uint4 *>(next + half)};
        uint4 v[4];
        float c[TP_CHUNK], s[TP_CHUNK];
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = *places[i];
        tp_load<TP_CHUNK>(cosine + row * half + column, c);
        tp_load<TP_CHUNK>(sine + row * half + column, s);
#pragma unroll
        for (int i = 0; i < TP_CHUNK; i++) s[i] = inverse ? -s[i] : s[i];
        turn_pairs<T>(v[0], v[1], c, s);
        turn_pairs<T>(v[2], v[3], c, s);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i < 2 || both) *places[i] = v[i];
        }
    }
};
static_assert(HEADS_AT_ONCE == 2, "aligned_rope_chunk takes two heads");

template <typename T> tp_status rotate(tp_ctx *ctx, const tp_rope_args *a)
{
    rope_chunk<T> body = {
        tp_typed<T>(a->x), a->cos, a->sin, a->heads, a->head_dim, a->half, tp_cuda_ceil(a->heads, HEADS_AT_ONCE),
        a->inverse,        false,  false};
    body.x.aligned = body.x.aligned && a->head_dim % TP_CHUNK == 0 && a->half % TP_CHUNK == 0;
    body.table_aligned = a->half % 4 == 0 && tp_pointer_aligned(a->cos) && tp_pointer_aligned(a->sin);
    body.small = a->n * body.groups <= INT32_MAX;
    if constexpr (sizeof(T) == 2) {
        if (body.x.aligned && body.table_aligned) {
            const aligned_rope_chunk<T> quick = {body.x,  a->cos,      a->sin,     a->heads,  a->head_dim,
                                                 a->half, body.groups, a->inverse, body.small};
            return tp_for_chunks(ctx, "rope", a->n * body.groups, a->half, quick);
        }
    }
    return tp_for_chunks(ctx, "rope", a->n * body.groups, a->half, body);
}

} // namespace

extern "C" tp_status tp_cuda_rope_table(tp_ctx *ctx, const void *args)
{
    const tp_rope_table_args *a = static_cast<const tp_rope_table_args *>(args);
    const int64_t items = a->n * a->half;
    if (items <= 0) return TP_OK;
    TP_CUDA_LAUNCH(ctx, "rope_table", rope_table_kernel, tp_cuda_blocks(ctx, items, 256), 256, 0, items, a->half, a->positions,
                   a->inv_freq, a->factor, a->cos, a->sin);
    return TP_OK;
}

extern "C" tp_status tp_cuda_rope(tp_ctx *ctx, const void *args)
{
    const tp_rope_args *a = static_cast<const tp_rope_args *>(args);
    TP_TRY(tp_cuda_check_dtype(ctx, "rope", a->x.dtype));
    TP_CUDA_DTYPE(a->x.dtype, T, { return rotate<T>(ctx, a); });
}
