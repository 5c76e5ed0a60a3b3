/* Recorded kernels (graph.cu): members of tp_backend, and the door through which it calls kernels. */
#ifndef TP_BACKEND_CUDA_GRAPH_CUH
#define TP_BACKEND_CUDA_GRAPH_CUH

#include "backend/cuda/cuda.cuh"

/* kernel(ctx, args), which a recording under way may have to remember. */
tp_status tp_cuda_call(tp_ctx *ctx, enum tp_kernel_id id, tp_kernel kernel, const void *args);

tp_status tp_cuda_capture_begin(tp_ctx *ctx);
tp_status tp_cuda_capture_end(tp_ctx *ctx, tp_graph **graph);
tp_status tp_cuda_graph_launch(tp_ctx *ctx, tp_graph *graph);
tp_status tp_cuda_graph_segments(tp_ctx *ctx, tp_graph *graph, const tp_segment *segments, int64_t n, bool *fits);
void tp_cuda_graph_free(tp_device *device, tp_graph *graph);

#endif
