/* How blocks of a kernel hand values to each other while it runs, and how weights come to them ahead of time. For Hopper and
 * later.
 *
 * Within a cluster: stores into the shared memory of another block, whose barrier counts their bytes; who waits for the
 * barrier sees them. Between clusters: 8 bytes of global memory, two values and a tag that says which exchange they belong to;
 * who reads finds either all or nothing, so that values need no barrier. */
#ifndef TP_BACKEND_CUDA_EXCHANGE_CUH
#define TP_BACKEND_CUDA_EXCHANGE_CUH

#include <stdint.h>

namespace tp_exchange
{

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ __forceinline__ uint32_t address(const void *shared)
{
    return (uint32_t)__cvta_generic_to_shared(shared);
}

/* ---- barriers in shared memory: one passes when all have arrived and all expected bytes are there ---- */

__device__ __forceinline__ void open(uint64_t *barrier, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void opened()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void expect(uint64_t *barrier, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void arrive(uint64_t *barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}

/* What came is in this block's shared memory, which no cache holds: a wider scope would only throw away caches of the rest. */
__device__ __forceinline__ void wait(uint64_t *barrier, uint32_t parity)
{
    uint32_t passed = 0;
    while (passed == 0)
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}\n"
                     : "=r"(passed)
                     : "r"(address(barrier)), "r"(parity)
                     : "memory");
}

/* ---- from global memory, beside everything else ---- */

/* 16 bytes. */
__device__ __forceinline__ void fetch(void *to, const void *from)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address(to)), "l"(from) : "memory");
}

/* All that this thread has fetched is there. */
__device__ __forceinline__ void fetched()
{
    asm volatile("cp.async.wait_all;" ::: "memory");
}

/* 16 bytes that nobody writes meanwhile, from here on: what is done with them may come later. */
__device__ __forceinline__ uint4 read(const void *from)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

/* Arrives when what this thread has fetched is there. */
__device__ __forceinline__ void arrive_after_fetches(uint64_t *barrier)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(address(barrier)) : "memory");
}

/* ---- to another block of the cluster ---- */

/* What stands here in this block, in that one. */
__device__ __forceinline__ uint32_t there(const void *here, int block)
{
    uint32_t at;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(address(here)), "r"(block));
    return at;
}

__device__ __forceinline__ void send(uint32_t to, const float (&v)[4], uint32_t barrier)
{
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
                 "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ void send(uint32_t to, uint2 v, uint32_t barrier)
{
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(to), "r"(v.x),
                 "r"(v.y), "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ void send(uint32_t to, float v, uint32_t barrier)
{
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to), "f"(v),
                 "r"(barrier)
                 : "memory");
}

/* ---- to all blocks of the kernel ---- */

/* Values lose the last 8 bits of their 24. */
__device__ __forceinline__ uint64_t upper(float v)
{
    return (__float_as_uint(v) + 0x80u) >> 8;
}

__device__ __forceinline__ void post(uint64_t *to, float a, float b, uint32_t tag)
{
    const uint64_t word = upper(a) << 40 | upper(b) << 16 | (tag & 0xffffu);
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}

/* A word as it is now. */
__device__ __forceinline__ uint64_t peek(const uint64_t *from)
{
    uint64_t v;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(v) : "l"(from) : "memory");
    return v;
}

__device__ __forceinline__ bool has_come(uint64_t v, uint32_t tag)
{
    return (uint16_t)v == (uint16_t)tag;
}

__device__ __forceinline__ float2 values_of(uint64_t v)
{
    return make_float2(__uint_as_float((uint32_t)(v >> 32) & 0xffffff00u), __uint_as_float((uint32_t)(v >> 8) & 0xffffff00u));
}

#endif

} // namespace tp_exchange

#endif
