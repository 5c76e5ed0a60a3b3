/* Hopper's own tensor core instructions, and the tiles in shared memory that they read.
 *
 * wgmma multiplies for a warpgroup (four warps): d [64, N] f32 += a [64, 16] b [16, N]. Warp w holds rows 16 w .. 16 w + 15 of
 * d, each as tensor cores always do (attention.cuh). b, and a unless it lies in registers, are read from shared memory
 * through descriptors, asynchronously: after issue and commit, wait; until then nobody touches d, or the memory.
 *
 * A tile of R rows lies in panels of 64 columns, [R][64] each, 128 bytes a row. Within 8 rows (1 KiB) the 16-byte chunk c of
 * row r stands at place c ^ (r % 8): the swizzle that descriptors name. The same tile serves as b^T, whose rows are columns
 * of d, and as b, whose rows are the sum's. */
#ifndef TP_BACKEND_CUDA_HOPPER_CUH
#define TP_BACKEND_CUDA_HOPPER_CUH

#include "backend/cuda/cuda.cuh"

/* Whether this pass compiles for a GPU that has them. */
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TP_HOPPER 1
#else
#define TP_HOPPER 0
#endif

namespace tp_hopper {

/* A tile whose first row, a multiple of 8, is at `address`; panel_bytes from one panel to the next. */
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t panel_bytes)
{
    const uint64_t swizzle_128 = (uint64_t)1 << 62, eight_rows = (uint64_t)(1024 >> 4) << 32;
    return swizzle_128 | eight_rows | (uint64_t)(panel_bytes >> 4) << 16 | ((address & 0x3ffff) >> 4);
}

/* The same, so many bytes further on in the tile. Only the lower word changes: that is one instruction for each product. */
__device__ __forceinline__ uint64_t further(uint64_t descriptor, uint32_t bytes)
{
    return (descriptor & 0xffffffff00000000u) | ((uint32_t)descriptor + (bytes >> 4));
}

/* Where 16-byte chunk `chunk` of a row lies, counted from the tile's start. */
template <int ROWS> __device__ __forceinline__ uint32_t chunk_offset(int row, int chunk)
{
    return (uint32_t)(chunk / 8 * ROWS * 128 + row * 128 + ((chunk % 8) ^ (row % 8)) * 16);
}

#if TP_HOPPER

/* What this thread knows to be written by stores and asynchronous copies comes before what tensor cores read from now on. (On the
 * side that copies it would wait for all copies under way.) */
__device__ __forceinline__ void see_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* Before the first product that uses registers which ordinary instructions wrote. */
__device__ __forceinline__ void arrive() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

/* Keeps the compiler from moving uses of results in front of the wait. */
template <int N> __device__ __forceinline__ void hold(float (&d)[N][4])
{
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : "+f"(d[n][i])::"memory");
}

/* Barriers in shared memory between threads that fill tiles and threads that use them: one passes when as many have arrived as
 * it was set up for, and starts anew. The first passing has parity 0, the next 1, and so on. */
__device__ __forceinline__ void barrier_open(uint32_t barrier, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }
/* Arrives when the copies that this thread has begun are complete. */
__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t barrier)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ bool barrier_passed(uint32_t barrier, int parity)
{
    uint32_t yes;
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
                 : "=r"(yes)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return yes != 0;
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity)
{
    while (!barrier_passed(barrier, parity)) {
    }
}

/* Registers of a thread of this warpgroup, from here on: those that copy give some to those that compute. */
template <int N> __device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

/* 2^x as the hardware computes it: within 2^-22, 0 below 2^-126. */
__device__ __forceinline__ float quick_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#define TP_REGISTERS(x) "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3])

/* d = or += a b^T: both from shared memory, both of type T. */
template <typename T>
__device__ __forceinline__ void multiply_nt(float (&d)[8][4], uint64_t a, uint64_t b, int add)
{
#define TP_WGMMA(type) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " \
                 "%32, %33, p, 1, 1, 0, 0;\n}\n" \
                 : TP_REGISTERS(d[0]), TP_REGISTERS(d[1]), TP_REGISTERS(d[2]), TP_REGISTERS(d[3]), TP_REGISTERS(d[4]), TP_REGISTERS(d[5]), TP_REGISTERS(d[6]), TP_REGISTERS(d[7]) \
                 : "l"(a), "l"(b), "r"(add) \
                 : "memory")
    if constexpr (tp_same<T, __nv_bfloat16>::yes)
        TP_WGMMA("bf16");
    else
        TP_WGMMA("f16");
#undef TP_WGMMA
}

template <typename T>
__device__ __forceinline__ void multiply_nt(float (&d)[16][4], uint64_t a, uint64_t b, int add)
{
#define TP_WGMMA(type) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
                 "%64, %65, p, 1, 1, 0, 0;\n}\n" \
                 : TP_REGISTERS(d[0]), TP_REGISTERS(d[1]), TP_REGISTERS(d[2]), TP_REGISTERS(d[3]), TP_REGISTERS(d[4]), TP_REGISTERS(d[5]), TP_REGISTERS(d[6]), TP_REGISTERS(d[7]), TP_REGISTERS(d[8]), TP_REGISTERS(d[9]), TP_REGISTERS(d[10]), TP_REGISTERS(d[11]), TP_REGISTERS(d[12]), TP_REGISTERS(d[13]), TP_REGISTERS(d[14]), TP_REGISTERS(d[15]) \
                 : "l"(a), "l"(b), "r"(add) \
                 : "memory")
    if constexpr (tp_same<T, __nv_bfloat16>::yes)
        TP_WGMMA("bf16");
    else
        TP_WGMMA("f16");
#undef TP_WGMMA
}

/* d = or += a b^T: a from registers. */
template <typename T>
__device__ __forceinline__ void multiply_held(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, int add)
{
#define TP_WGMMA(type) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " \
                 "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n" \
                 : TP_REGISTERS(d[0]), TP_REGISTERS(d[1]), TP_REGISTERS(d[2]), TP_REGISTERS(d[3]), TP_REGISTERS(d[4]), TP_REGISTERS(d[5]), TP_REGISTERS(d[6]), TP_REGISTERS(d[7]) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add) \
                 : "memory")
    if constexpr (tp_same<T, __nv_bfloat16>::yes)
        TP_WGMMA("bf16");
    else
        TP_WGMMA("f16");
#undef TP_WGMMA
}

/* d += a b: a from registers. */
template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b)
{
#define TP_WGMMA(type) \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " \
                 "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n" \
                 : TP_REGISTERS(d[0]), TP_REGISTERS(d[1]), TP_REGISTERS(d[2]), TP_REGISTERS(d[3]), TP_REGISTERS(d[4]), TP_REGISTERS(d[5]), TP_REGISTERS(d[6]), TP_REGISTERS(d[7]) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) \
                 : "memory")
    if constexpr (tp_same<T, __nv_bfloat16>::yes)
        TP_WGMMA("bf16");
    else
        TP_WGMMA("f16");
#undef TP_WGMMA
}

template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b)
{
#define TP_WGMMA(type) \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
                 "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n" \
                 : TP_REGISTERS(d[0]), TP_REGISTERS(d[1]), TP_REGISTERS(d[2]), TP_REGISTERS(d[3]), TP_REGISTERS(d[4]), TP_REGISTERS(d[5]), TP_REGISTERS(d[6]), TP_REGISTERS(d[7]), TP_REGISTERS(d[8]), TP_REGISTERS(d[9]), TP_REGISTERS(d[10]), TP_REGISTERS(d[11]), TP_REGISTERS(d[12]), TP_REGISTERS(d[13]), TP_REGISTERS(d[14]), TP_REGISTERS(d[15]) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) \
                 : "memory")
    if constexpr (tp_same<T, __nv_bfloat16>::yes)
        TP_WGMMA("bf16");
    else
        TP_WGMMA("f16");
#undef TP_WGMMA
}

/* d [64, N] = a b^T over DIM: a is 64 rows of a tile of A_ROWS, from row a_row on; b all N rows of a tile. Issued only. */
template <typename T, int N, int DIM, int A_ROWS>
__device__ __forceinline__ void tile_multiply_nt(float (&d)[N / 8][4], uint32_t a, int a_row, uint32_t b)
{
    const uint64_t first_a = descriptor(a + a_row * 128, 16), first_b = descriptor(b, 16);
#pragma unroll
    for (int k = 0; k < DIM / 16; k++)
        multiply_nt<T>(d, further(first_a, k / 4 * A_ROWS * 128 + k % 4 * 32), further(first_b, k / 4 * N * 128 + k % 4 * 32), k > 0);
}

/* The same with the 64 rows of a in registers, a warp's 16 in each of its lanes (load_factor). */
template <typename T, int N, int DIM>
__device__ __forceinline__ void tile_multiply_held(float (&d)[N / 8][4], const uint32_t (&a)[DIM / 16][4], uint32_t b)
{
    const uint64_t first = descriptor(b, 16);
#pragma unroll
    for (int k = 0; k < DIM / 16; k++) multiply_held<T>(d, a[k], further(first, k / 4 * N * 128 + k % 4 * 32), k > 0);
}

/* Rows row .. row+15 of a tile of ROWS, as they stand in the registers of a first factor. */
template <int DIM, int ROWS> __device__ __forceinline__ void load_factor(uint32_t (&a)[DIM / 16][4], uint32_t tile, int row)
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < DIM / 16; k++)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(a[k][0]), "=r"(a[k][1]), "=r"(a[k][2]), "=r"(a[k][3])
                     : "r"(tile + chunk_offset<ROWS>(row + lane % 16, k * 2 + lane / 16))
                     : "memory");
}

/* d [64, DIM] += w b: w [64, K] in registers as T, b a tile of K rows. Issued only. */
template <typename T, int K, int DIM>
__device__ __forceinline__ void tile_multiply_add(float (&d)[DIM / 8][4], const uint32_t (&w)[K / 16][4], uint32_t b)
{
    const uint64_t first = descriptor(b, K * 128);
#pragma unroll
    for (int k = 0; k < K / 16; k++) multiply_add<T>(d, w[k], further(first, k * 16 * 128));
}

/* Results of one product as the first factor of the next. */
template <typename T, int N> __device__ __forceinline__ void pack(uint32_t (&w)[N / 2][4], const float (&s)[N][4])
{
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        w[n / 2][0] = tp_pack<T>(s[n][0], s[n][1]);
        w[n / 2][1] = tp_pack<T>(s[n][2], s[n][3]);
        w[n / 2][2] = tp_pack<T>(s[n + 1][0], s[n + 1][1]);
        w[n / 2][3] = tp_pack<T>(s[n + 1][2], s[n + 1][3]);
    }
}

#undef TP_REGISTERS

#endif
} // namespace tp_hopper

#endif
