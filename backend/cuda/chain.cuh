/* Launches in a chain: a kernel may start while the one before it still runs, fetch what that one does not write, and then wait
 * for it. Decoding is hundreds of short kernels in a row, and their starting up is most of what they take.
 *
 * On the device such a kernel says tp_chain_begin() (the next one may start) and tp_chain_wait() (all before this are done, and
 * what they wrote is there) in every thread. All kernels of a chain wait, so that being done passes along it. */
#ifndef TP_BACKEND_CUDA_CHAIN_CUH
#define TP_BACKEND_CUDA_CHAIN_CUH

#include "backend/cuda/cuda.cuh"

__device__ __forceinline__ void tp_chain_begin()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void tp_chain_wait()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* Launches on the device's stream; early: as a link of a chain, if the code that will run is one that can wait. */
template <typename Params>
static inline tp_status tp_chain_launch(tp_ctx *ctx, const char *name, void (*kernel)(Params), dim3 grid, unsigned threads,
                                        size_t shared, bool early, const Params &params)
{
    cudaFuncAttributes code;
    TP_TRY(tp_cuda_check(ctx, name, cudaFuncGetAttributes(&code, (const void *)kernel)));
    if (shared > 32 << 10) TP_CUDA_ALLOW_SHARED(ctx, name, kernel, shared); /* beside what kernels declare: 48 KiB in all */
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared;
    config.stream = tp_cuda_of(ctx)->stream;
    config.attrs = &overlap, config.numAttrs = early && code.ptxVersion >= 90 ? 1 : 0;
    return tp_cuda_check(ctx, name, cudaLaunchKernelEx(&config, kernel, params));
}

#endif
