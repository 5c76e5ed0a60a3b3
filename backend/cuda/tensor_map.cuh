/* Tiles of a matrix that Hopper copies by itself: one thread names a tile, hardware brings it into shared memory, zeros where the
 * matrix has ended, and counts its bytes at a barrier there (hopper.cuh). */
#ifndef TP_BACKEND_CUDA_TENSOR_MAP_CUH
#define TP_BACKEND_CUDA_TENSOR_MAP_CUH

#include <cuda.h>

#include "backend/cuda/cuda.cuh"
#include "backend/cuda/hopper.cuh"

/* Tiles [tile_rows, tile_columns] of bf16 rows x columns. A tile's row has 32 or 128 bytes, and its 16-byte chunks are swizzled:
 * within 128 bytes the chunk's number takes the exclusive or with the number of the 128 bytes, modulo 2 or 8. Data and rows are
 * aligned to 16 bytes. */
tp_status tp_cuda_tensor_map(tp_ctx *ctx, const char *name, CUtensorMap *map, tp_rows data, int64_t rows, int64_t columns,
                             int tile_rows, int tile_columns);

#if TP_HOPPER

namespace tp_tiles {

/* A barrier that also waits for so many bytes. */
__device__ __forceinline__ void expect(uint32_t barrier, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void bring(uint32_t to, const CUtensorMap *map, int64_t column, int64_t row, uint32_t barrier)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                 "l"(map), "r"((int)column), "r"((int)row), "r"(barrier)
                 : "memory");
}

/* Where 16-byte chunk `chunk` of a row lies: in a tile with rows of 128 bytes, and of 32. */
__device__ __forceinline__ uint32_t wide_at(int row, int chunk)
{
    return (uint32_t)(row * 128 + (chunk ^ (row % 8)) * 16);
}
__device__ __forceinline__ uint32_t thin_at(int row, int chunk)
{
    return (uint32_t)(row * 32 + (chunk ^ (row / 4 % 2)) * 16);
}

__device__ __forceinline__ void matrices(uint32_t (&x)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void matrices_transposed(uint32_t (&x)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
}

/* The ring of stages as both sides walk it. */
struct ring {
    uint32_t full, empty; /* barriers of stage 0; 8 bytes from one to the next */
    int stages, stage, round;
    __device__ __forceinline__ void next()
    {
        if (++stage == stages) stage = 0, round ^= 1;
    }
};

} // namespace tp_tiles

#endif

#endif
