/* A CUDA GPU as a device: its memory, copies between it and the host, and the table of its kernels.
 *
 * The runtime is linked statically and finds the driver when it is first used, so that the same binary starts on machines
 * without one; there, and without cuBLASLt, opening fails with what is missing. */
#include <string.h>

#include "backend/cuda/graph.cuh"
#include "backend/cuda/layers.cuh"
#include "base/mem.h"

/* Products with the head want many rows: 523 of 128256 logits each. */
#define LOGITS_BYTES  ((uint64_t)256 << 20)
#define STAGING_BYTES (TP_CUDA_STAGING_PARTS * TP_CUDA_STAGING_PART_BYTES)

static tp_cuda *cuda_of(tp_device *device)
{
    return reinterpret_cast<tp_cuda *>(device);
}

tp_status tp_cuda_check(tp_ctx *ctx, const char *name, cudaError_t error)
{
    if (error == cudaSuccess) return TP_OK;
    int index = ctx->device != NULL && ctx->device->backend == &tp_cuda_backend ? tp_cuda_of(ctx)->index : 0;
    return tp_fail(ctx, error == cudaErrorMemoryAllocation ? TP_NOMEM : TP_DEVICE, "cuda:%d: %s: %s (%s)", index, name,
                   cudaGetErrorString(error), cudaGetErrorName(error));
}

tp_status tp_cuda_check_dtype(tp_ctx *ctx, const char *name, tp_dtype dtype)
{
    if (dtype == TP_F32 || dtype == TP_BF16 || dtype == TP_F16) return TP_OK;
    return tp_fail(ctx, TP_UNSUPPORTED, "%s: expected f32, bf16 or f16, got %s", name, tp_dtype_name(dtype));
}

tp_status tp_cuda_check_dtypes(tp_ctx *ctx, const char *name, tp_dtype a, tp_dtype b)
{
    TP_TRY(tp_cuda_check_dtype(ctx, name, a));
    TP_TRY(tp_cuda_check_dtype(ctx, name, b));
    if (a == b || a == TP_F32 || b == TP_F32) return TP_OK;
    return tp_fail(ctx, TP_UNSUPPORTED, "%s: one array is %s, another %s", name, tp_dtype_name(a), tp_dtype_name(b));
}

tp_status tp_cuda_allow_shared(tp_ctx *ctx, const char *name, const void *kernel, size_t bytes)
{
    tp_cuda *cuda = tp_cuda_of(ctx);
    for (int i = 0; i < cuda->n_allowed; i++) {
        if (cuda->allowed[i].kernel == kernel && cuda->allowed[i].bytes >= bytes) return TP_OK;
    }
    TP_TRY(tp_cuda_check(ctx, name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes)));
    if (cuda->n_allowed < TP_CUDA_ALLOWED) cuda->allowed[cuda->n_allowed++] = {kernel, bytes};
    return TP_OK;
}

/* ---- opening ---- */

static void cuda_close(tp_device *device)
{
    if (device == NULL) return;
    tp_cuda *cuda = cuda_of(device);
    /* Failures here have no one to be told to: the process gives everything back when it ends. */
    (void)cudaSetDevice(cuda->index);
    if (cuda->stream != NULL) (void)cudaStreamSynchronize(cuda->stream);
    tp_cuda_dnn_close(cuda->dnn);
    tp_cuda_blas_close(cuda->blas);
    for (int i = 0; i < TP_CUDA_STAGING_PARTS; i++) {
        if (cuda->staged[i] != NULL) (void)cudaEventDestroy(cuda->staged[i]);
    }
    if (cuda->beside != NULL) (void)cudaStreamSynchronize(cuda->beside);
    for (int i = 0; i < TP_CUDA_TICKETS; i++) {
        if (cuda->beside_done[i] != NULL) (void)cudaEventDestroy(cuda->beside_done[i]);
    }
    if (cuda->before_beside != NULL) (void)cudaEventDestroy(cuda->before_beside);
    if (cuda->beside != NULL) (void)cudaStreamDestroy(cuda->beside);
    (void)cudaFreeHost(cuda->staging);
    (void)cudaFree(cuda->workspace);
    (void)cudaFree(cuda->reserved);
    if (cuda->stream != NULL) (void)cudaStreamDestroy(cuda->stream);
    tp_free(cuda);
}

/* Why there is no GPU to open. */
static tp_status no_gpu(tp_ctx *ctx, int index, cudaError_t error, int count)
{
    int driver = 0, runtime = 0;
    (void)cudaDriverGetVersion(&driver); /* 0: none */
    (void)cudaRuntimeGetVersion(&runtime);
    if (driver == 0) return tp_fail(ctx, TP_DEVICE, "cuda:%d: no NVIDIA driver is installed; use device cpu", index);
    if (error == cudaErrorInsufficientDriver)
        return tp_fail(ctx, TP_DEVICE, "cuda:%d: the NVIDIA driver supports CUDA %d.%d, this build needs %d.%d or later", index,
                       driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0))
        return tp_fail(ctx, TP_DEVICE, "cuda:%d: the driver sees no GPU", index);
    if (error != cudaSuccess)
        return tp_fail(ctx, TP_DEVICE, "cuda:%d: %s (%s)", index, cudaGetErrorString(error), cudaGetErrorName(error));
    return tp_fail(ctx, TP_DEVICE, "cuda:%d: this machine has %d GPU%s, numbered from 0", index, count, count == 1 ? "" : "s");
}

__global__ void probe() {}

static tp_status read_properties(tp_ctx *ctx, tp_cuda *cuda)
{
    cudaDeviceProp p;
    TP_TRY(tp_cuda_check(ctx, "open", cudaGetDeviceProperties(&p, cuda->index)));
    cuda->capability = 10 * p.major + p.minor;
    cuda->multiprocessors = p.multiProcessorCount;
    cuda->shared_bytes = p.sharedMemPerBlockOptin;
    cuda->l2_bytes = (size_t)p.l2CacheSize;
    cuda->device.memory_bytes = p.totalGlobalMem;
    cuda->device.auto_precision = p.major >= 8 ? TP_BF16 : TP_F32;
    cuda->device.f16 = true;
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, (const void *)probe) != cudaSuccess) {
        (void)cudaGetLastError();
        return tp_fail(ctx, TP_DEVICE, "cuda:%d: %s has compute capability %d.%d, for which this build has no code",
                       cuda->index, p.name, p.major, p.minor);
    }
    cuda->clusters = attributes.ptxVersion >= 90; /* PTX for older GPUs has none, wherever it runs */
    cudaDriverEntryPointQueryResult found;
    if (cuda->capability == 90 && cuda->clusters &&
        (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &cuda->tensor_maps, 12000, cudaEnableDefault, &found) !=
             cudaSuccess ||
         found != cudaDriverEntryPointSuccess)) {
        (void)cudaGetLastError();
        cuda->tensor_maps = NULL;
    }
    return TP_OK;
}

static tp_status open_parts(tp_ctx *ctx, tp_cuda *cuda)
{
    TP_TRY(tp_cuda_check(ctx, "open", cudaSetDevice(cuda->index)));
    TP_TRY(read_properties(ctx, cuda));
    TP_TRY(tp_cuda_check(ctx, "open", cudaStreamCreateWithFlags(&cuda->stream, cudaStreamNonBlocking)));
    TP_TRY(tp_cuda_check(ctx, "workspace", cudaMalloc((void **)&cuda->workspace, TP_CUDA_WORKSPACE_BYTES)));
    TP_TRY(
        tp_cuda_check(ctx, "pinned host memory", cudaHostAlloc((void **)&cuda->staging, STAGING_BYTES, cudaHostAllocDefault)));
    for (int i = 0; i < TP_CUDA_STAGING_PARTS; i++)
        TP_TRY(tp_cuda_check(ctx, "open", cudaEventCreateWithFlags(&cuda->staged[i], cudaEventDisableTiming)));
    cuda->device.workspace_bytes = TP_CUDA_WORKSPACE_BYTES + TP_CUDA_BLAS_BYTES + TP_CUDA_CONTEXT_BYTES;
    cuda->device.logits_bytes = LOGITS_BYTES;
    cuda->device.makes_swiglu_again = cuda->tensor_maps != NULL;
    cuda->device.drops_in_products = true;
    return tp_cuda_blas_open(ctx, cuda);
}

static tp_status cuda_open(tp_ctx *ctx, int index, int threads, tp_device **device)
{
    *device = NULL;
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    (void)cudaGetLastError(); /* or the next launch would report it */
    if (error != cudaSuccess || index >= count) return no_gpu(ctx, index, error, count);
    tp_cuda *cuda = (tp_cuda *)tp_alloc(ctx, 1, sizeof *cuda);
    if (cuda == NULL) return TP_NOMEM;
    cuda->device.backend = &tp_cuda_backend;
    cuda->device.threads = threads > 0 ? threads : 1;
    cuda->index = index;
    tp_status status = open_parts(ctx, cuda);
    if (status != TP_OK) {
        cuda_close(&cuda->device);
        return status;
    }
    *device = &cuda->device;
    return TP_OK;
}

static void cuda_describe(tp_device *device, tp_buf *json)
{
    tp_cuda *cuda = cuda_of(device);
    cudaDeviceProp p;
    int driver = 0, runtime = 0;
    size_t free_bytes = 0, total_bytes = 0;
    char blas[32], dnn[32];
    if (cudaSetDevice(cuda->index) != cudaSuccess || cudaGetDeviceProperties(&p, cuda->index) != cudaSuccess) return;
    (void)cudaDriverGetVersion(&driver);
    (void)cudaRuntimeGetVersion(&runtime);
    (void)cudaMemGetInfo(&free_bytes, &total_bytes);
    tp_cuda_blas_version(cuda->blas, blas);
    tp_cuda_dnn_version(cuda, dnn);
    tp_buf_printf(json, "\"model\": \"%s\", \"index\": %d, \"compute_capability\": \"%d.%d\", \"multiprocessors\": %d", p.name,
                  cuda->index, p.major, p.minor, p.multiProcessorCount);
    tp_buf_printf(json, ", \"memory_bytes\": %zu, \"free_bytes\": %zu", total_bytes, free_bytes);
    tp_buf_printf(json, ", \"driver\": \"%d.%d\", \"runtime\": \"%d.%d\", \"cublaslt\": \"%s\", \"cudnn\": \"%s\"",
                  driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10, blas, dnn);
}

/* ---- memory ---- */

/* A host thread starts on GPU 0; each call makes the device's own the current one, which costs nothing if it is. */
static tp_status enter(tp_ctx *ctx)
{
    return tp_cuda_check(ctx, "enter", cudaSetDevice(tp_cuda_of(ctx)->index));
}

static void *cuda_alloc(tp_ctx *ctx, tp_device *device, size_t bytes)
{
    tp_cuda *cuda = cuda_of(device);
    void *memory = NULL;
    cudaError_t error = cudaSetDevice(cuda->index);
    if (error == cudaSuccess) error = cudaMalloc(&memory, bytes > 0 ? bytes : 1);
    if (error == cudaSuccess) error = cudaMemsetAsync(memory, 0, bytes, cuda->stream);
    if (error == cudaSuccess) return memory;
    (void)cudaFree(memory);
    (void)cudaGetLastError();
    if (error == cudaErrorMemoryAllocation) {
        size_t free_bytes = 0, total_bytes = 0;
        (void)cudaMemGetInfo(&free_bytes, &total_bytes);
        tp_fail(ctx, TP_NOMEM, "cuda:%d: out of memory: %zu bytes wanted, %zu of %zu free", cuda->index, bytes, free_bytes,
                total_bytes);
    } else {
        tp_fail(ctx, TP_DEVICE, "cuda:%d: alloc: %s (%s)", cuda->index, cudaGetErrorString(error), cudaGetErrorName(error));
    }
    return NULL;
}

static void cuda_free(tp_device *device, void *memory, size_t bytes)
{
    (void)bytes;
    if (memory == NULL) return;
    (void)cudaSetDevice(cuda_of(device)->index);
    (void)cudaFree(memory); /* waits for the kernels that use it */
}

/* Room for up to `bytes` in pinned memory; *got says how many. A part is left when it is full, and entered again when the
 * copies out of it are done. */
static tp_status stage(tp_ctx *ctx, size_t bytes, unsigned char **room, size_t *got)
{
    tp_cuda *cuda = tp_cuda_of(ctx);
    if (cuda->staging_used == TP_CUDA_STAGING_PART_BYTES) {
        TP_TRY(tp_cuda_check(ctx, "copy to the device", cudaEventRecord(cuda->staged[cuda->staging_part], cuda->stream)));
        cuda->staging_part = (cuda->staging_part + 1) % TP_CUDA_STAGING_PARTS;
        cuda->staging_used = 0;
        TP_TRY(tp_cuda_check(ctx, "copy to the device", cudaEventSynchronize(cuda->staged[cuda->staging_part])));
    }
    size_t left = TP_CUDA_STAGING_PART_BYTES - cuda->staging_used;
    *got = bytes < left ? bytes : left;
    *room = cuda->staging + cuda->staging_part * TP_CUDA_STAGING_PART_BYTES + cuda->staging_used;
    cuda->staging_used += *got;
    return TP_OK;
}

static tp_status cuda_copy_in(tp_ctx *ctx, void *device_memory, const void *host, size_t bytes)
{
    unsigned char *to = (unsigned char *)device_memory, *room;
    const unsigned char *from = (const unsigned char *)host;
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    TP_TRY(enter(ctx));
    TP_TRY(tp_cuda_check(ctx, "copy to the device", cudaStreamIsCapturing(tp_cuda_of(ctx)->stream, &capture)));
    if (capture != cudaStreamCaptureStatusNone) /* a replay would read what staging holds by then */
        return tp_fail(ctx, TP_DEVICE, "copy to the device: not while kernels are recorded");
    for (size_t got; bytes > 0; to += got, from += got, bytes -= got) {
        TP_TRY(stage(ctx, bytes, &room, &got));
        memcpy(room, from, got);
        TP_TRY(tp_cuda_check(ctx, "copy to the device",
                             cudaMemcpyAsync(to, room, got, cudaMemcpyHostToDevice, tp_cuda_of(ctx)->stream)));
    }
    return TP_OK;
}

static tp_status cuda_copy_out(tp_ctx *ctx, void *host, const void *device_memory, size_t bytes)
{
    cudaStream_t stream = tp_cuda_of(ctx)->stream;
    TP_TRY(enter(ctx));
    if (bytes == 0) return TP_OK;
    TP_TRY(tp_cuda_check(ctx, "copy from the device",
                         cudaMemcpyAsync(host, device_memory, bytes, cudaMemcpyDeviceToHost, stream)));
    return tp_cuda_check(ctx, "copy from the device", cudaStreamSynchronize(stream));
}

static tp_status cuda_zero(tp_ctx *ctx, void *device_memory, size_t bytes)
{
    TP_TRY(enter(ctx));
    if (bytes == 0) return TP_OK;
    return tp_cuda_check(ctx, "zero", cudaMemsetAsync(device_memory, 0, bytes, tp_cuda_of(ctx)->stream));
}

static tp_status cuda_sync(tp_ctx *ctx)
{
    TP_TRY(enter(ctx));
    return tp_cuda_check(ctx, "sync", cudaStreamSynchronize(tp_cuda_of(ctx)->stream));
}

/* ---- copies beside the kernels ---- */

static void *cuda_host_alloc(tp_ctx *ctx, tp_device *device, size_t bytes)
{
    void *memory = NULL;
    cudaError_t error = cudaSetDevice(cuda_of(device)->index);
    if (error == cudaSuccess) error = cudaHostAlloc(&memory, bytes > 0 ? bytes : 1, cudaHostAllocDefault);
    return tp_cuda_check(ctx, "pinned host memory", error) == TP_OK ? memory : NULL;
}

static void cuda_host_free(tp_device *device, void *memory, size_t bytes)
{
    (void)bytes;
    (void)cudaSetDevice(cuda_of(device)->index);
    (void)cudaFreeHost(memory);
}

/* When they are first needed. */
static tp_status open_beside(tp_ctx *ctx, tp_cuda *cuda)
{
    if (cuda->beside != NULL) return TP_OK;
    for (int i = 0; i < TP_CUDA_TICKETS; i++)
        TP_TRY(tp_cuda_check(ctx, "open", cudaEventCreateWithFlags(&cuda->beside_done[i], cudaEventDisableTiming)));
    TP_TRY(tp_cuda_check(ctx, "open", cudaEventCreateWithFlags(&cuda->before_beside, cudaEventDisableTiming)));
    return tp_cuda_check(ctx, "open", cudaStreamCreateWithFlags(&cuda->beside, cudaStreamNonBlocking));
}

static tp_status cuda_copy_beside(tp_ctx *ctx, void *to, const void *from, size_t bytes, int *ticket)
{
    tp_cuda *cuda = tp_cuda_of(ctx);
    TP_TRY(enter(ctx));
    TP_TRY(open_beside(ctx, cuda));
    *ticket = cuda->next_ticket;
    cuda->next_ticket = (cuda->next_ticket + 1) % TP_CUDA_TICKETS;
    TP_TRY(tp_cuda_check(ctx, "copy beside", cudaEventRecord(cuda->before_beside, cuda->stream)));
    TP_TRY(tp_cuda_check(ctx, "copy beside", cudaStreamWaitEvent(cuda->beside, cuda->before_beside, 0)));
    TP_TRY(tp_cuda_check(ctx, "copy beside", cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, cuda->beside)));
    return tp_cuda_check(ctx, "copy beside", cudaEventRecord(cuda->beside_done[*ticket], cuda->beside));
}

static tp_status cuda_wait_beside(tp_ctx *ctx, int ticket)
{
    tp_cuda *cuda = tp_cuda_of(ctx);
    return tp_cuda_check(ctx, "copy beside", cudaStreamWaitEvent(cuda->stream, cuda->beside_done[ticket], 0));
}

/* ---- the table ---- */

#define TP_KERNEL(name, args)                                                                                                  \
    static tp_status run_##name(tp_ctx *ctx, const void *arguments)                                                            \
    {                                                                                                                          \
        TP_TRY(enter(ctx));                                                                                                    \
        return tp_cuda_call(ctx, TP_KERNEL_##name, tp_cuda_##name, arguments);                                                 \
    }
#include "backend/kernels.def"
#undef TP_KERNEL

extern "C" const tp_backend tp_cuda_backend = {
    .name = "cuda",
    .computes = true,
    .host_memory = false,
    .open = cuda_open,
    .close = cuda_close,
    .alloc = cuda_alloc,
    .free = cuda_free,
    .copy_in = cuda_copy_in,
    .copy_out = cuda_copy_out,
    .zero = cuda_zero,
    .sync = cuda_sync,
    .capture_begin = tp_cuda_capture_begin,
    .capture_end = tp_cuda_capture_end,
    .graph_launch = tp_cuda_graph_launch,
    .graph_free = tp_cuda_graph_free,
    .host_alloc = cuda_host_alloc,
    .host_free = cuda_host_free,
    .copy_beside = cuda_copy_beside,
    .wait_beside = cuda_wait_beside,
    .tune_begin = tp_cuda_tune_begin,
    .tune_end = tp_cuda_tune_end,
    .reserve = tp_cuda_reserve,
    .describe = cuda_describe,
    .kernels =
        {
#define TP_KERNEL(name, args) run_##name,
#include "backend/kernels.def"
#undef TP_KERNEL
        },
    .layers_open = tp_cuda_layers_open,
    .layers_run = tp_cuda_layers_run,
    .layers_close = tp_cuda_layers_close,
    .graph_segments = tp_cuda_graph_segments,
    .piece_bytes = (uint64_t)2 << 20,
    .recorded_call_bytes = 6000,
};
