/* The only door to a device: memory, copies, and a table of kernels.
 *
 * A backend is a constant table; cpu and dry are always there, cuda is backend/cuda/ or, in a build without nvcc, the
 * stand-in cuda_absent.c, whose open returns a clear error. Nothing above this folder knows which one it runs on. */
#ifndef TP_BACKEND_BACKEND_H
#define TP_BACKEND_BACKEND_H

#include "backend/kernels.h"
#include "base/text.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tp_device tp_device;

typedef struct tp_backend {
    const char *name; /* "cpu", "cuda", "dry" */
    bool computes;    /* false: shapes only; data pointers must not be read */
    bool host_memory; /* its memory can be read and written by the host directly */
    tp_status (*open)(tp_ctx *ctx, int index, int threads, tp_device **device);
    void (*close)(tp_device *device);
    /* Device memory aligned to 256 bytes, zeroed; NULL with NOMEM recorded. */
    void *(*alloc)(tp_ctx *ctx, tp_device *device, size_t bytes);
    void (*free)(tp_device *device, void *memory, size_t bytes);
    tp_status (*copy_in)(tp_ctx *ctx, void *device_memory, const void *host, size_t bytes);
    tp_status (*copy_out)(tp_ctx *ctx, void *host, const void *device_memory, size_t bytes);
    tp_status (*zero)(tp_ctx *ctx, void *device_memory, size_t bytes);
    tp_status (*sync)(tp_ctx *ctx);
    /* Human and machine description for `doctor`: appends JSON members ("model": ..., ...). */
    void (*describe)(tp_device *device, tp_buf *json);
    tp_kernel kernels[TP_KERNEL_COUNT];
} tp_backend;

/* First member of every backend's device struct. */
struct tp_device {
    const tp_backend *backend;
    tp_dtype auto_precision; /* what precision: auto means here */
    int threads;
    uint64_t memory_bytes;    /* what the machine or GPU has */
    uint64_t workspace_bytes; /* what the device holds for its kernels, fixed at open */
    double flops[2];          /* counted by the dry backend: f32 and bf16 products of this step; else 0 */
    double bytes_moved;       /* dry: bytes read and written by kernels */
};

extern const tp_backend tp_cpu_backend, tp_dry_backend, tp_cuda_backend;

/* "cpu", "cuda", "cuda:1", "dry" or "auto" (cuda if it opens, else cpu with a note). threads 0: all cores.
 * DEVICE if it cannot be opened, with what is missing. */
TP_API tp_status tp_device_open(tp_ctx *ctx, const char *name, int threads, tp_device **device) TP_MUST_CHECK;
TP_API void tp_device_close(tp_device *device);

/* tp_run_matmul(ctx, &args), ...: runs a kernel on ctx->device. */
#define TP_KERNEL(name, type)                                                                                                  \
    static inline tp_status tp_run_##name(tp_ctx *ctx, const type *args)                                                       \
    {                                                                                                                          \
        return ctx->device->backend->kernels[TP_KERNEL_##name](ctx, args);                                                     \
    }
#include "backend/kernels.def"
#undef TP_KERNEL

#ifdef __cplusplus
}
#endif
#endif
