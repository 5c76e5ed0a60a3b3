/* Recorded kernels, and attention over other segments than those it was recorded with.
 *
 * Segments travel in the parameters of attention's kernels, and the grids of these follow from them. So a recording keeps what each
 * call of attention was told and which of its nodes came from it. For other segments the calls are recorded once more, by
 * themselves, and where that makes the same kernels, their parameters and grids take the places of the old ones. All of this
 * is the host's work, while the device is still busy with what came before. */
#include <string.h>

#include "backend/cuda/graph.cuh"
#include "base/mem.h"

struct attention_call {
    bool gradient;
    tp_attention_backward_args args; /* forward alone unless gradient */
};

struct tp_graph {
    cudaGraph_t recorded; /* whose nodes these are */
    cudaGraphExec_t ready;
    attention_call *calls;
    size_t n_calls, calls_capacity;
    cudaGraphNode_t *nodes, *others; /* of these calls, in their order; of the same for other segments */
    size_t n_nodes, nodes_capacity, others_capacity;
};

static void free_graph(tp_graph *graph)
{
    if (graph->ready != NULL) (void)cudaGraphExecDestroy(graph->ready);
    if (graph->recorded != NULL) (void)cudaGraphDestroy(graph->recorded);
    tp_free(graph->calls);
    tp_free(graph->nodes);
    tp_free(graph->others);
    tp_free(graph);
}

static tp_status begin(tp_ctx *ctx, cudaStreamCaptureMode mode)
{
    TP_TRY(tp_cuda_check(ctx, "capture", cudaSetDevice(tp_cuda_of(ctx)->index)));
    return tp_cuda_check(ctx, "capture", cudaStreamBeginCapture(tp_cuda_of(ctx)->stream, mode));
}

/* What was recorded so far ends with *node; NULL: nothing was. */
static tp_status last_node(tp_ctx *ctx, cudaGraphNode_t *node)
{
    cudaStreamCaptureStatus status;
    const cudaGraphNode_t *last;
    const cudaGraphEdgeData *edges;
    size_t n = 0;
    *node = NULL;
    TP_TRY(tp_cuda_check(
        ctx, "capture", cudaStreamGetCaptureInfo(tp_cuda_of(ctx)->stream, &status, NULL, NULL, &last, &edges, &n)));
    if (status != cudaStreamCaptureStatusActive || n > 1) return tp_fail(ctx, TP_DEVICE, "capture: the recording broke off");
    if (n == 1) *node = last[0];
    return TP_OK;
}

/* Appends the nodes behind `from` (NULL: from the first one on) up to `to`, which follow each other in one line. */
static tp_status collect(tp_ctx *ctx, cudaGraphNode_t from, cudaGraphNode_t to, cudaGraphNode_t **nodes, size_t *n,
                         size_t *capacity)
{
    const size_t first = *n;
    for (cudaGraphNode_t node = to, before; node != from; node = before) {
        cudaGraphEdgeData edge;
        size_t one = 1;
        TP_TRY(tp_grow(ctx, nodes, capacity, *n + 1, sizeof **nodes));
        (*nodes)[(*n)++] = node;
        before = NULL;
        TP_TRY(tp_cuda_check(ctx, "capture", cudaGraphNodeGetDependencies(node, &before, &edge, &one)));
        if (one == 0) before = NULL;
        if (before == NULL && from != NULL) return tp_fail(ctx, TP_DEVICE, "capture: kernels in more than one line");
    }
    for (size_t i = first, j = *n; i + 1 < j; i++) { /* they were found backwards */
        cudaGraphNode_t node = (*nodes)[--j];
        (*nodes)[j] = (*nodes)[i];
        (*nodes)[i] = node;
    }
    return TP_OK;
}

/* ---- recording ---- */

static tp_status capture_attention(tp_ctx *ctx, tp_graph *graph, enum tp_kernel_id id, tp_kernel kernel, const void *args)
{
    attention_call call = {};
    cudaGraphNode_t before, after;
    call.gradient = id == TP_KERNEL_attention_backward;
    if (call.gradient)
        call.args = *static_cast<const tp_attention_backward_args *>(args);
    else
        call.args.forward = *static_cast<const tp_attention_args *>(args);
    TP_TRY(last_node(ctx, &before));
    TP_TRY(kernel(ctx, args));
    TP_TRY(last_node(ctx, &after));
    TP_TRY(collect(ctx, before, after, &graph->nodes, &graph->n_nodes, &graph->nodes_capacity));
    TP_TRY(tp_grow(ctx, &graph->calls, &graph->calls_capacity, graph->n_calls + 1, sizeof *graph->calls));
    graph->calls[graph->n_calls++] = call;
    return TP_OK;
}

tp_status tp_cuda_call(tp_ctx *ctx, enum tp_kernel_id id, tp_kernel kernel, const void *args)
{
    tp_graph *graph = tp_cuda_of(ctx)->recording;
    if (graph == NULL || (id != TP_KERNEL_attention && id != TP_KERNEL_attention_backward)) return kernel(ctx, args);
    return capture_attention(ctx, graph, id, kernel, args);
}

tp_status tp_cuda_capture_begin(tp_ctx *ctx)
{
    tp_graph *graph = static_cast<tp_graph *>(tp_alloc(ctx, 1, sizeof *graph));
    if (graph == NULL) return TP_NOMEM;
    tp_status status = begin(ctx, cudaStreamCaptureModeThreadLocal);
    if (status == TP_OK)
        tp_cuda_of(ctx)->recording = graph;
    else
        free_graph(graph);
    return status;
}

tp_status tp_cuda_capture_end(tp_ctx *ctx, tp_graph **result)
{
    tp_graph *graph = tp_cuda_of(ctx)->recording;
    tp_cuda_of(ctx)->recording = NULL;
    cudaError_t error = cudaStreamEndCapture(tp_cuda_of(ctx)->stream, &graph->recorded);
    if (result != NULL) *result = NULL;
    if (error == cudaSuccess && result != NULL) error = cudaGraphInstantiate(&graph->ready, graph->recorded, 0);
    (void)cudaGetLastError(); /* a recording that broke off is reported here, once */
    if (result == NULL || error != cudaSuccess) free_graph(graph);
    if (result == NULL) return TP_OK;
    TP_TRY(tp_cuda_check(ctx, "capture", error));
    *result = graph;
    return TP_OK;
}

tp_status tp_cuda_graph_launch(tp_ctx *ctx, tp_graph *graph)
{
    TP_TRY(tp_cuda_check(ctx, "graph", cudaSetDevice(tp_cuda_of(ctx)->index)));
    return tp_cuda_check(ctx, "graph", cudaGraphLaunch(graph->ready, tp_cuda_of(ctx)->stream));
}

void tp_cuda_graph_free(tp_device *device, tp_graph *graph)
{
    tp_cuda *cuda = reinterpret_cast<tp_cuda *>(device);
    if (graph == NULL) return;
    (void)cudaSetDevice(cuda->index);
    (void)cudaStreamSynchronize(cuda->stream); /* it may still run */
    free_graph(graph);
}

/* ---- other segments ---- */

static tp_status call_again(tp_ctx *ctx, const tp_graph *graph, const tp_segment *segments, int64_t n, cudaGraphNode_t *last)
{
    for (size_t i = 0; i < graph->n_calls; i++) {
        tp_attention_backward_args args = graph->calls[i].args;
        args.forward.segments = segments, args.forward.n_segments = n;
        TP_TRY(graph->calls[i].gradient ? tp_cuda_attention_backward(ctx, &args) : tp_cuda_attention(ctx, &args.forward));
    }
    return last_node(ctx, last);
}

/* Whether b is the same kernel as a, or no kernel, as a: what clears rows does not look at segments. */
static tp_status alike(tp_ctx *ctx, cudaGraphNode_t a, cudaGraphNode_t b, bool *yes)
{
    cudaGraphNodeType types[2];
    cudaKernelNodeParams kernels[2];
    TP_TRY(tp_cuda_check(ctx, "graph", cudaGraphNodeGetType(a, &types[0])));
    TP_TRY(tp_cuda_check(ctx, "graph", cudaGraphNodeGetType(b, &types[1])));
    *yes = types[0] == types[1];
    if (types[0] != cudaGraphNodeTypeKernel || !*yes) return TP_OK;
    TP_TRY(tp_cuda_check(ctx, "graph", cudaGraphKernelNodeGetParams(a, &kernels[0])));
    TP_TRY(tp_cuda_check(ctx, "graph", cudaGraphKernelNodeGetParams(b, &kernels[1])));
    *yes = kernels[0].func == kernels[1].func;
    return TP_OK;
}

static tp_status take_over(tp_ctx *ctx, tp_graph *graph, cudaGraphNode_t last, bool *fits)
{
    size_t n = 0;
    *fits = false;
    TP_TRY(collect(ctx, NULL, last, &graph->others, &n, &graph->others_capacity));
    if (n != graph->n_nodes) return TP_OK;
    for (size_t i = 0; i < n; i++) {
        bool same;
        TP_TRY(alike(ctx, graph->nodes[i], graph->others[i], &same));
        if (!same) return TP_OK;
    }
    for (size_t i = 0; i < n; i++) {
        cudaGraphNodeType type;
        cudaKernelNodeParams params;
        TP_TRY(tp_cuda_check(ctx, "graph", cudaGraphNodeGetType(graph->others[i], &type)));
        if (type != cudaGraphNodeTypeKernel) continue;
        TP_TRY(tp_cuda_check(ctx, "graph", cudaGraphKernelNodeGetParams(graph->others[i], &params)));
        TP_TRY(tp_cuda_check(ctx, "graph", cudaGraphExecKernelNodeSetParams(graph->ready, graph->nodes[i], &params)));
    }
    *fits = true;
    return TP_OK;
}

tp_status tp_cuda_graph_segments(tp_ctx *ctx, tp_graph *graph, const tp_segment *segments, int64_t n, bool *fits)
{
    cudaGraph_t again = NULL;
    cudaGraphNode_t last = NULL;
    *fits = false;
    TP_TRY(begin(ctx, cudaStreamCaptureModeRelaxed)); /* a kernel that is met for the first time is loaded */
    tp_status status = call_again(ctx, graph, segments, n, &last);
    cudaError_t error = cudaStreamEndCapture(tp_cuda_of(ctx)->stream, &again);
    (void)cudaGetLastError(); /* as above */
    if (status == TP_OK) status = tp_cuda_check(ctx, "capture", error);
    if (status == TP_OK) status = take_over(ctx, graph, last, fits);
    if (again != NULL) (void)cudaGraphDestroy(again);
    return status;
}
