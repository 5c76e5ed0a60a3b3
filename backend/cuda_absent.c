/* Stands in for the CUDA backend in builds without nvcc: opening it says so. The other functions cannot be reached. */
#include "backend/backend.h"

static tp_status absent_open(tp_ctx *ctx, int index, int threads, tp_device **device)
{
    (void)threads;
    *device = NULL;
    return tp_fail(ctx, TP_DEVICE, "cuda:%d: this build has no CUDA support; rebuild with nvcc in PATH, or use device cpu",
                   index);
}

static tp_status absent_kernel(tp_ctx *ctx, const void *args)
{
    (void)args;
    return tp_fail(ctx, TP_DEVICE, "cuda: this build has no CUDA support");
}

const tp_backend tp_cuda_backend = {
    .name = "cuda",
    .computes = true,
    .open = absent_open,
    .kernels =
        {
#define TP_KERNEL(name, args) absent_kernel,
#include "backend/kernels.def"
#undef TP_KERNEL
        },
};
