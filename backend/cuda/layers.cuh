/* All layers of a token as one kernel (layers.cu), for tp_cuda_backend. */
#ifndef TP_BACKEND_CUDA_LAYERS_CUH
#define TP_BACKEND_CUDA_LAYERS_CUH

#include "backend/cuda/cuda.cuh"
#include "backend/layers.h"

extern "C" {
tp_status tp_cuda_layers_open(tp_ctx *ctx, const tp_layers_args *args, tp_layers **layers);
tp_status tp_cuda_layers_run(tp_ctx *ctx, tp_layers *layers);
void tp_cuda_layers_close(tp_device *device, tp_layers *layers);
}

#endif
