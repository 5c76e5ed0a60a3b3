/* Tiles of a matrix that Hopper copies by itself: one thread names a tile, hardware brings it into shared memory, zeros where the
 * matrix has ended, and counts its bytes at a barrier there (hopper.cuh). */
#ifndef TP_BACKEND_CUDA_TENSOR_MAP_CUH
#define TP_BACKEND_CUDA_TENSOR_MAP_CUH

#include <cuda.h>

#include "backend/cuda/cuda.cuh"

/* Tiles [tile_rows, tile_columns] of bf16 rows x columns. A tile's row has 32 or 128 bytes, and its 16-byte chunks are swizzled:
 * within 128 bytes the chunk's number takes the exclusive or with the number of the 128 bytes, modulo 2 or 8. Data and rows are
 * aligned to 16 bytes. */
tp_status tp_cuda_tensor_map(tp_ctx *ctx, const char *name, CUtensorMap *map, tp_rows data, int64_t rows, int64_t columns,
                             int tile_rows, int tile_columns);

#endif
