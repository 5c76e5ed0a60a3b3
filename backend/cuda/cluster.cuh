/* Clusters of blocks that add up their sums, and kernels that start while the one before them ends. Both need code for Hopper
 * or later (tp_cuda.clusters); other GPUs get grids of single blocks. */
#ifndef TP_BACKEND_CUDA_CLUSTER_CUH
#define TP_BACKEND_CUDA_CLUSTER_CUH

#include "backend/cuda/cuda.cuh"

namespace tp_cluster {

/* All threads of all blocks of the cluster meet, and see what the others have written to shared memory: each says that it has
 * come, and waits for the rest. */
__device__ __forceinline__ void arrive()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void meet()
{
    arrive();
    wait();
}

/* Two floats of block `rank` of the cluster, at the place of `own` in this block's shared memory. */
__device__ __forceinline__ float2 read_of(int rank, const float *own)
{
    float2 x = make_float2(0, 0);
#if __CUDA_ARCH__ >= 900
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"((uint32_t)__cvta_generic_to_shared(own)), "r"(rank));
    asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(there) : "memory");
#else
    (void)rank, (void)own;
#endif
    return x;
}

/* How many clusters of `size` blocks the GPU holds at once; at least 1. */
template <typename... Parameters>
static tp_status most_at_once(tp_ctx *ctx, void (*kernel)(Parameters...), int threads, int shared, int size, int *clusters)
{
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = (unsigned)size, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)size), config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = (size_t)shared;
    config.attrs = &attribute, config.numAttrs = 1;
    TP_TRY(tp_cuda_check(ctx, "clusters", cudaOccupancyMaxActiveClusters(clusters, kernel, &config)));
    if (*clusters < 1) *clusters = 1;
    return TP_OK;
}

/* A grid of clusters of `size` blocks; 1: of blocks. */
template <typename... Parameters, typename... Arguments>
static cudaError_t launch(tp_ctx *ctx, void (*kernel)(Parameters...), int64_t blocks, int threads, int shared, int size,
                          Arguments... arguments)
{
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = (unsigned)size, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks), config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = (size_t)shared, config.stream = tp_cuda_of(ctx)->stream;
    config.attrs = &attribute, config.numAttrs = size > 1 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

/* A kernel whose blocks may be set up while the kernel before it still runs, where the GPU can do that. It begins with
 * tp_chain_wait (chain.cuh). */
template <typename... Parameters, typename... Arguments>
static cudaError_t launch_early(tp_ctx *ctx, void (*kernel)(Parameters...), int64_t blocks, int threads, Arguments... arguments)
{
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks), config.blockDim = dim3((unsigned)threads), config.stream = tp_cuda_of(ctx)->stream;
    config.attrs = &attribute, config.numAttrs = tp_cuda_of(ctx)->clusters ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

} // namespace tp_cluster

#endif
