/* Products of few rows (few.cu, few_mma.cu), as matmul.cu sees them and as those two share them. */
#ifndef TP_BACKEND_CUDA_FEW_CUH
#define TP_BACKEND_CUDA_FEW_CUH

#include "backend/cuda/cuda.cuh"

/* Whether a product has so few rows, and a weight that lies so, that tp_cuda_few is the way. */
bool tp_cuda_few_takes(const tp_matmul_args *args);
tp_status tp_cuda_few(tp_ctx *ctx, const tp_matmul_args *args);

namespace tp_few
{

/* A pointer to f32 or bf16 values. */
struct values {
    const unsigned char *data;
    bool bf16;
    __device__ float operator[](int64_t i) const
    {
        return bf16 ? tp_to_f32(reinterpret_cast<const __nv_bfloat16 *>(data)[i]) : reinterpret_cast<const float *>(data)[i];
    }
};

struct part {
    const unsigned char *w;
    int64_t row_bytes;
    int rope_pairs, m;
    const float *bias;
    unsigned char *y;
    int64_t y_ld;
    const float *low; /* NULL: none */
    int64_t low_ld, up_ld;
    values up;
    int rank;
};

struct params {
    part parts[TP_LINEARS_PARTS];
    int n_parts, n, k;
    int rows;   /* of all parts; with swiglu, of one */
    int groups; /* of R rows of w */
    int split;  /* warps that share a sum: 1, or SPLIT_WARPS, which are all of a block */
    int tile;   /* columns of x in shared memory */
    bool alone; /* of tensor cores: warps do not share sums */
    values x;
    int64_t x_ld;
    const float *norm;
    float eps;
    bool round_x, round_w, round_low, y_bf16, swiglu;
    float alpha, beta;
    values residual;
    int64_t residual_ld;
};

/* A row of w: which part, and which row of it; part -1 beyond the end. */
struct place {
    int part, row;
};

__device__ __forceinline__ float finish(const params &p, place at, int row, float sum)
{
    const part &to = p.parts[at.part];
    const int64_t y = row * to.y_ld + at.row;
    float v = p.alpha * sum;
    if (p.beta != 0) v += p.beta * values{to.y, p.y_bf16}[y];
    if (to.bias != nullptr) v += to.bias[at.row];
    if (p.residual.data != nullptr && at.part == 0 && !p.swiglu) v += p.residual[row * p.residual_ld + at.row];
    return p.y_bf16 ? tp_round_bf16(v) : v;
}

__device__ __forceinline__ void store_y(const params &p, place at, int row, float v)
{
    const part &to = p.parts[at.part];
    const int64_t y = row * to.y_ld + at.row;
    if (p.y_bf16)
        reinterpret_cast<__nv_bfloat16 *>(to.y)[y] = __float2bfloat16_rn(v);
    else
        reinterpret_cast<float *>(to.y)[y] = v;
}

/* SwiGLU of two results, as separate kernels round it, and the residual. */
__device__ __forceinline__ float glue(const params &p, place at, int row, float gate, float up)
{
    float v = (p.y_bf16 ? __fdividef(gate, 1.0f + __expf(-gate)) : gate / (1.0f + expf(-gate))) * up;
    if (p.residual.data == nullptr) return v;
    if (p.y_bf16) v = tp_round_bf16(v);
    return v + p.residual[row * p.residual_ld + at.row];
}

/* few_mma.cu: the same on tensor cores, for bf16 weights and an x that is bf16 or rounded to it. */
bool mma_takes(tp_ctx *ctx, tp_format_id format, const params &p);
tp_status launch_mma(tp_ctx *ctx, const char *name, params *p, bool early);

} // namespace tp_few

#endif
