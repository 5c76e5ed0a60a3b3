/* The only door to a device: memory, copies, and a table of kernels.
 *
 * A backend is a constant table; cpu and dry are always there, cuda is backend/cuda/ or, in a build without nvcc, the
 * stand-in cuda_absent.c, whose open returns a clear error. Nothing above this folder knows which one it runs on. */
#ifndef TP_BACKEND_BACKEND_H
#define TP_BACKEND_BACKEND_H

#include "backend/layers.h"
#include "base/text.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tp_device tp_device;
typedef struct tp_graph tp_graph; /* recorded kernels */

/* Attention over sequences of one length in bf16 or f16, each query of which sees keys of its own sequence alone. */
typedef struct tp_attention_size {
    int64_t sequences, length, heads, head_dim; /* sequences 0: none */
} tp_attention_size;

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
    /* Kernels called between begin and end are recorded, not run; a launch runs them all, with the pointers and numbers they
     * were called with, on what memory holds by then. In between there are no allocations, copies or syncs. end finishes the
     * recording even if it fails; graph NULL: it is dropped. All NULL where kernels cannot be recorded. */
    tp_status (*capture_begin)(tp_ctx *ctx);
    tp_status (*capture_end)(tp_ctx *ctx, tp_graph **graph);
    tp_status (*graph_launch)(tp_ctx *ctx, tp_graph *graph);
    void (*graph_free)(tp_device *device, tp_graph *graph);
    /* Memory of the host for copy_beside; NULL with NOMEM recorded. */
    void *(*host_alloc)(tp_ctx *ctx, tp_device *device, size_t bytes);
    void (*host_free)(tp_device *device, void *memory, size_t bytes);
    /* Copies between such memory and the device's, either way, beside the kernels: it begins when what was called before is
     * done. wait_beside: what is called from then on comes after the copy of that ticket, one of the last sixteen. */
    tp_status (*copy_beside)(tp_ctx *ctx, void *to, const void *from, size_t bytes, int *ticket);
    tp_status (*wait_beside)(tp_ctx *ctx, int ticket);
    /* Between the two, every large product of a new shape is made by each algorithm there is, and the fastest one is kept for
     * later processes; results are of no use. end appends what was found. NULL where there is nothing to choose from. */
    void (*tune_begin)(tp_device *device);
    tp_status (*tune_end)(tp_ctx *ctx, tp_buf *report);
    /* Takes memory beside workspace_bytes, at most `most` bytes, if kernels that train such attention would be faster with it;
     * *bytes says how much, 0 where it makes no difference. Before the first of them; what an earlier call took is given back.
     * NULL where nothing would be. */
    tp_status (*reserve)(tp_ctx *ctx, const tp_attention_size *size, uint64_t most, uint64_t *bytes);
    /* Human and machine description for `doctor`: appends JSON members ("model": ..., ...). */
    void (*describe)(tp_device *device, tp_buf *json);
    tp_kernel kernels[TP_KERNEL_COUNT];
    /* All layers of a decoding step in one call (backend/layers.h). open gives NULL, and no error, where this device or these
     * shapes are not suited; the functions are NULL where no shapes are. */
    tp_status (*layers_open)(tp_ctx *ctx, const tp_layers_args *args, tp_layers **layers);
    tp_status (*layers_run)(tp_ctx *ctx, tp_layers *layers);
    void (*layers_close)(tp_device *device, tp_layers *layers);
    /* Attention in a recording, from its next launch on, is over these segments instead of those it was called with. *fits
     * false: they would take other kernels, and the recording is as it was. NULL where kernels cannot be recorded. */
    tp_status (*graph_segments)(tp_ctx *ctx, tp_graph *graph, const tp_segment *segments, int64_t n, bool *fits);
    uint64_t piece_bytes;         /* its memory comes in such pieces, for allocations of half of one or more; 0: as it is */
    uint64_t recorded_call_bytes; /* about what a call of a kernel takes of the device's memory in a recording */
} tp_backend;

/* First member of every backend's device struct. */
struct tp_device {
    const tp_backend *backend;
    tp_dtype auto_precision; /* what precision: auto means here */
    int threads;
    bool tf32;                /* set by the caller: f32 products may round their factors to tf32, where the device can */
    bool makes_swiglu_again;  /* its swiglu_factors makes y on the way, so that y need not be kept */
    bool any_order;           /* set by the caller: kernels may add in an order left to chance, where that is faster */
    bool drops_in_products;   /* its dropped_down and the like draw and apply masks on the way (tp_drops_in_products) */
    uint64_t memory_bytes;    /* what the machine or GPU has */
    uint64_t workspace_bytes; /* what the device holds for its kernels, fixed at open */
    uint64_t logits_bytes;    /* that a loss should make at once; 0: as the op likes */
    bool f16;                 /* kernels take f16: precision fp16 works */
    double flops[2];          /* counted by the dry backend: f32 and 16-bit products of this step; else 0 */
    double bytes_moved;       /* dry: bytes read and written by kernels */
};

extern const tp_backend tp_cpu_backend, tp_dry_backend, tp_cuda_backend;

/* "cpu", "cuda", "cuda:1", "dry" or "auto" (cuda if it opens, else cpu with a note). threads 0: all cores.
 * DEVICE if it cannot be opened, with what is missing. */
TP_API tp_status tp_device_open(tp_ctx *ctx, const char *name, int threads, tp_device **device) TP_MUST_CHECK;
TP_API void tp_device_close(tp_device *device);
/* What "auto", "fp32", "tf32", "bf16" or "fp16" means on ctx->device, which is set up for tf32 or not. UNSUPPORTED for fp16
 * where it does not work; INVALID for another word. */
TP_API tp_status tp_device_precision(tp_ctx *ctx, const char *word, tp_dtype *precision) TP_MUST_CHECK;
/* Of a dry device: the largest attention whose gradient was counted since it was asked last. */
TP_API tp_attention_size tp_dry_attention_size(tp_device *device);
/* Of a dry device: how many calls of kernels were counted since it was asked last. */
TP_API int64_t tp_dry_calls(tp_device *device);

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
