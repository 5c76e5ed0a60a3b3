/* Inside of the CUDA backend: what its kernels share. Only .cu files of this folder include it.
 *
 * Everything runs on one stream, in the order of the calls; nothing waits for the host except copies out and sync. Sums are
 * taken by fixed trees, never by atomics, so that the same call on the same GPU gives the same bits. A kernel launches with
 * TP_CUDA_LAUNCH, which reports a failure under the name of the operation. */
#ifndef TP_BACKEND_CUDA_CUDA_CUH
#define TP_BACKEND_CUDA_CUDA_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "backend/backend.h"

/* Memory that a CUDA device holds besides what callers allocate, all of it taken when the device opens. */
#define TP_CUDA_WORKSPACE_BYTES ((size_t)128 << 20) /* of the kernel that runs: converted operands, partial sums */
#define TP_CUDA_BLAS_BYTES      ((size_t)32 << 20)  /* cuBLASLt's own */
/* What the driver keeps for a process: context, code, heaps. Measured on H100 and H200: 517 MiB with 135M, 560 with 8B. */
#define TP_CUDA_CONTEXT_BYTES   ((size_t)560 << 20)
/* Pinned host memory through which copies to the device pass. */
#define TP_CUDA_STAGING_PARTS      4
#define TP_CUDA_STAGING_PART_BYTES ((size_t)8 << 20)

#define TP_CUDA_ALLOWED            64
#define TP_CUDA_TICKETS            16

struct tp_cublas;
struct tp_cudnn;

struct tp_cuda {
    tp_device device; /* first: a tp_device * of this backend is a tp_cuda * */
    int index;        /* of the GPU */
    cudaStream_t stream;
    int multiprocessors;
    int capability;             /* 90 on Hopper */
    size_t shared_bytes;        /* most dynamic shared memory of a block */
    size_t l2_bytes;
    unsigned char *workspace;   /* device, TP_CUDA_WORKSPACE_BYTES, aligned to 256 */
    struct tp_cublas *blas;     /* matmul.cu */
    unsigned char *staging;     /* pinned host memory */
    cudaEvent_t staged[TP_CUDA_STAGING_PARTS]; /* the copies out of this part are done */
    cudaStream_t beside;        /* copies that run beside the kernels */
    cudaEvent_t before_beside, beside_done[TP_CUDA_TICKETS];
    int next_ticket;
    int staging_part;
    size_t staging_used;        /* of this part */
    bool clusters;              /* the code for this GPU was compiled with clusters of blocks (cluster.cuh) */
    struct {
        const void *kernel;
        size_t bytes;
    } allowed[TP_CUDA_ALLOWED]; /* dynamic shared memory that kernels were allowed: asking again costs as much as a launch */
    int n_allowed;
    void *tensor_maps; /* cuTensorMapEncodeTiled, or NULL where the code for this GPU does not use them (tensor_map.cuh) */
    struct tp_cudnn *dnn;       /* cudnn.cu; NULL until a call could use it */
    unsigned char *reserved;    /* device memory beside the workspace, for attention's gradient by cuDNN */
    size_t reserved_bytes;
    struct tp_graph *recording; /* graph.cu; NULL: kernels run */
};

static inline tp_cuda *tp_cuda_of(tp_ctx *ctx);

extern "C" {
/* TP_OK, or the failure under the name of the operation: NOMEM for memory, else DEVICE. */
tp_status tp_cuda_check(tp_ctx *ctx, const char *name, cudaError_t error);
/* UNSUPPORTED unless f32, bf16 or f16; of two arrays, also if one is bf16 and the other f16. */
tp_status tp_cuda_check_dtype(tp_ctx *ctx, const char *name, tp_dtype dtype);
tp_status tp_cuda_check_dtypes(tp_ctx *ctx, const char *name, tp_dtype a, tp_dtype b);

/* matmul.cu: opens cuBLASLt, and closes it (NULL: nothing). */
tp_status tp_cuda_blas_open(tp_ctx *ctx, tp_cuda *cuda);
void tp_cuda_blas_close(struct tp_cublas *blas);
/* "13.1.0", for descriptions. */
void tp_cuda_blas_version(const struct tp_cublas *blas, char out[32]);

/* cudnn.cu: closes cuDNN (NULL: nothing). "9.14.0" or "none", for descriptions; opens it. */
void tp_cuda_dnn_close(struct tp_cudnn *cudnn);
void tp_cuda_dnn_version(tp_cuda *cuda, char out[32]);
/* tp_backend.reserve. */
tp_status tp_cuda_reserve(tp_ctx *ctx, const tp_attention_size *size, uint64_t most, uint64_t *bytes);

/* blas.cu: tp_backend.tune_begin and tune_end. */
void tp_cuda_tune_begin(tp_device *device);
tp_status tp_cuda_tune_end(tp_ctx *ctx, tp_buf *report);

/* Lets a kernel take so many bytes of dynamic shared memory, more than the 48 KiB that need no asking. */
tp_status tp_cuda_allow_shared(tp_ctx *ctx, const char *name, const void *kernel, size_t bytes);

/* tp_cuda_matmul, ...: the table of tp_cuda_backend. */
#define TP_KERNEL(name, args) tp_status tp_cuda_##name(tp_ctx *ctx, const void *arguments);
#include "backend/kernels.def"
#undef TP_KERNEL
}

static inline tp_cuda *tp_cuda_of(tp_ctx *ctx)
{
    return reinterpret_cast<tp_cuda *>(ctx->device);
}

/* ---- launching ---- */

/* Launches on the device's stream; leaves the calling function with the failure, named `name`, if it cannot. An empty grid is
 * no work. A template with commas stands in parentheses: TP_CUDA_LAUNCH(ctx, "add", (add<float, 4>), grid, 256, 0, x, y). */
#define TP_CUDA_LAUNCH(ctx, name, kernel, grid, block, shared, ...)                                     \
    do {                                                                                                \
        const dim3 grid_(grid), block_(block);                                                          \
        if (grid_.x > 0 && grid_.y > 0 && grid_.z > 0) {                                                \
            kernel<<<grid_, block_, (shared), tp_cuda_of(ctx)->stream>>>(__VA_ARGS__);                  \
            TP_TRY(tp_cuda_check(ctx, name, cudaGetLastError()));                                       \
        }                                                                                               \
    } while (0)

/* Lets a kernel take more than 48 KiB of dynamic shared memory; before its launch. */
#define TP_CUDA_ALLOW_SHARED(ctx, name, kernel, bytes) TP_TRY(tp_cuda_allow_shared(ctx, name, (const void *)(kernel), bytes))

/* Runs the statements with the type T for a dtype: TP_CUDA_DTYPE(args->x.dtype, T, { TP_CUDA_LAUNCH(...); }). */
#define TP_CUDA_DTYPE(dtype, T, ...)        \
    do {                                    \
        if ((dtype) == TP_BF16) {           \
            using T = __nv_bfloat16;        \
            __VA_ARGS__                     \
        } else if ((dtype) == TP_F16) {     \
            using T = __half;               \
            __VA_ARGS__                     \
        } else {                            \
            using T = float;                \
            __VA_ARGS__                     \
        }                                   \
    } while (0)

/* The same within it, for an array beside one of type A: f32, or the 16-bit type of A. bf16 and f16 do not meet in a kernel
 * (tp_cuda_check_dtypes). */
#define TP_CUDA_DTYPE_BESIDE(A, dtype, T, ...)           \
    do {                                                 \
        if ((dtype) == TP_BF16) {                        \
            using T = tp_beside<A, __nv_bfloat16>::type; \
            __VA_ARGS__                                  \
        } else if ((dtype) == TP_F16) {                  \
            using T = tp_beside<A, __half>::type;        \
            __VA_ARGS__                                  \
        } else {                                         \
            using T = float;                             \
            __VA_ARGS__                                  \
        }                                                \
    } while (0)

template <typename A, typename B> struct tp_beside {
    typedef A type;
};
template <typename B> struct tp_beside<float, B> {
    typedef B type;
};

/* The same for a condition: B is a constant. */
#define TP_CUDA_BOOL(condition, B, ...)     \
    do {                                    \
        if (condition) {                    \
            constexpr bool B = true;        \
            __VA_ARGS__                     \
        } else {                            \
            constexpr bool B = false;       \
            __VA_ARGS__                     \
        }                                   \
    } while (0)

static inline int64_t tp_cuda_ceil(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static inline int64_t tp_cuda_min(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Bytes of a value of activations. */
static inline int64_t tp_cuda_size(tp_dtype dtype)
{
    return dtype == TP_F32 ? 4 : 2;
}

/* Blocks for `items` in a loop with a stride of the whole grid: enough to fill the GPU, not more than there is work. */
static inline unsigned tp_cuda_blocks(tp_ctx *ctx, int64_t items, int64_t items_per_block)
{
    return (unsigned)tp_cuda_min(tp_cuda_ceil(items, items_per_block), (int64_t)tp_cuda_of(ctx)->multiprocessors * 16);
}

/* ---- values ---- */

template <typename A, typename B> struct tp_same {
    static constexpr bool yes = false;
};
template <typename A> struct tp_same<A, A> {
    static constexpr bool yes = true;
};

__device__ __forceinline__ float tp_to_f32(float x) { return x; }
__device__ __forceinline__ float tp_to_f32(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float tp_to_f32(__half x) { return __half2float(x); }

template <typename T> __device__ __forceinline__ T tp_from_f32(float x);
template <> __device__ __forceinline__ float tp_from_f32<float>(float x) { return x; }
template <> __device__ __forceinline__ __nv_bfloat16 tp_from_f32<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

template <> __device__ __forceinline__ __half tp_from_f32<__half>(float x) { return __float2half_rn(x); }

__device__ __forceinline__ float tp_round_bf16(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }
template <typename T> __device__ __forceinline__ float tp_round(float x) { return tp_to_f32(tp_from_f32<T>(x)); }

/* N consecutive values by accesses of 16 bytes (or the whole, if it is less): p aligned to that. */
template <int N> __device__ __forceinline__ void tp_load(const float *p, float (&x)[N])
{
    if constexpr (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            const float4 v = *reinterpret_cast<const float4 *>(p + i);
            x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = p[i];
    }
}

__device__ __forceinline__ void tp_unpack_bf16(uint32_t pair, float &low, float &high)
{
    low = __uint_as_float(pair << 16);
    high = __uint_as_float(pair & 0xffff0000u);
}

__device__ __forceinline__ uint32_t tp_pack_bf16(float low, float high)
{
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t *>(&pair);
}

/* The same for either 16-bit type. */
template <typename T> __device__ __forceinline__ void tp_unpack(uint32_t pair, float &low, float &high)
{
    if constexpr (tp_same<T, __nv_bfloat16>::yes) {
        tp_unpack_bf16(pair, low, high);
    } else {
        const float2 x = __half22float2(*reinterpret_cast<const __half2 *>(&pair));
        low = x.x, high = x.y;
    }
}

template <typename T> __device__ __forceinline__ uint32_t tp_pack(float low, float high)
{
    if constexpr (tp_same<T, __nv_bfloat16>::yes) {
        return tp_pack_bf16(low, high);
    } else {
        const __half2 pair = __floats2half2_rn(low, high);
        return *reinterpret_cast<const uint32_t *>(&pair);
    }
}

template <int N, typename T> __device__ __forceinline__ void tp_load(const T *p, float (&x)[N])
{
    if constexpr (N % 8 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 8) {
            const uint4 v = *reinterpret_cast<const uint4 *>(p + i);
            tp_unpack<T>(v.x, x[i], x[i + 1]);
            tp_unpack<T>(v.y, x[i + 2], x[i + 3]);
            tp_unpack<T>(v.z, x[i + 4], x[i + 5]);
            tp_unpack<T>(v.w, x[i + 6], x[i + 7]);
        }
    } else if constexpr (N == 4) {
        const uint2 v = *reinterpret_cast<const uint2 *>(p);
        tp_unpack<T>(v.x, x[0], x[1]);
        tp_unpack<T>(v.y, x[2], x[3]);
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = tp_to_f32(p[i]);
    }
}

template <int N> __device__ __forceinline__ void tp_store(float *p, const float (&x)[N])
{
    if constexpr (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 4) *reinterpret_cast<float4 *>(p + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) p[i] = x[i];
    }
}

template <int N, typename T> __device__ __forceinline__ void tp_store(T *p, const float (&x)[N])
{
    if constexpr (N % 8 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 8) {
            *reinterpret_cast<uint4 *>(p + i) = make_uint4(tp_pack<T>(x[i], x[i + 1]), tp_pack<T>(x[i + 2], x[i + 3]),
                                                           tp_pack<T>(x[i + 4], x[i + 5]), tp_pack<T>(x[i + 6], x[i + 7]));
        }
    } else if constexpr (N == 4) {
        *reinterpret_cast<uint2 *>(p) = make_uint2(tp_pack<T>(x[0], x[1]), tp_pack<T>(x[2], x[3]));
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) p[i] = tp_from_f32<T>(x[i]);
    }
}

/* Up to N values: those from `count` on are 0, and are not written. Vector accesses where `aligned` and all N are there. */
template <int N, typename T> __device__ __forceinline__ void tp_load_some(const T *p, int64_t count, bool aligned, float (&x)[N])
{
    if (aligned && count >= N) {
        tp_load<N>(p, x);
        return;
    }
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = i < count ? tp_to_f32(p[i]) : 0.0f;
}

template <int N, typename T> __device__ __forceinline__ void tp_store_some(T *p, int64_t count, bool aligned, const float (&x)[N])
{
    if (aligned && count >= N) {
        tp_store<N>(p, x);
        return;
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (i < count) p[i] = tp_from_f32<T>(x[i]);
    }
}

/* Whether every row starts where 16-byte accesses may. */
static inline bool tp_rows_aligned(tp_rows x)
{
    return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.ld * tp_cuda_size(x.dtype) % 16 == 0;
}

static inline bool tp_pointer_aligned(const void *p)
{
    return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

/* ---- reductions: every thread gets the result, the same bits in every thread ---- */

template <typename T> __device__ __forceinline__ T tp_warp_sum(T x)
{
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

__device__ __forceinline__ float tp_warp_max(float x)
{
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

/* All threads of a one-dimensional block of whole warps must come along. `shared` holds 32 values and may be used again
 * right after the call. */
template <typename T> __device__ __forceinline__ T tp_block_sum(T x, T *shared)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
    x = tp_warp_sum(x);
    __syncthreads(); /* readers of an earlier call are done */
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return tp_warp_sum(lane < n_warps ? shared[lane] : T(0));
}

__device__ __forceinline__ float tp_block_max(float x, float *shared)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
    x = tp_warp_max(x);
    __syncthreads();
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return tp_warp_max(lane < n_warps ? shared[lane] : -INFINITY);
}

#endif
