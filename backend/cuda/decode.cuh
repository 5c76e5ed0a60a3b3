/* Eight neighbouring values of a stored row of a matrix in any format (backend/matrix.h), on the device: what quant/ defines in
 * C, bit by bit. Products of a scale and a code are exact in f32, so a fused multiply-add rounds no differently. */
#ifndef TP_BACKEND_CUDA_DECODE_CUH
#define TP_BACKEND_CUDA_DECODE_CUH

#include "backend/cuda/cuda.cuh"

/* Values decoded by one thread. */
#define TP_DECODE 8

/* Mapped files may bring rows to odd addresses: 2 bytes, little endian, from anywhere. */
__device__ __forceinline__ uint32_t tp_u16_at(const unsigned char *p, bool aligned)
{
    return aligned ? *reinterpret_cast<const uint16_t *>(p) : (uint32_t)p[0] | (uint32_t)p[1] << 8;
}

__device__ __forceinline__ float tp_f16_at(const unsigned char *p, bool aligned)
{
    return __half2float(__ushort_as_half((unsigned short)tp_u16_at(p, aligned)));
}

/* Eight bytes at p. */
__device__ __forceinline__ uint2 tp_8_bytes_at(const unsigned char *p, bool aligned)
{
    return make_uint2(tp_u16_at(p, aligned) | tp_u16_at(p + 2, aligned) << 16,
                      tp_u16_at(p + 4, aligned) | tp_u16_at(p + 6, aligned) << 16);
}

__device__ __forceinline__ uint32_t tp_byte_of(uint2 bytes, int i)
{
    return ((i < 4 ? bytes.x : bytes.y) >> (i % 4 * 8)) & 255u;
}

/* Values c .. c+7 of a dense row; those from `count` on are 0. aligned: by 16-byte accesses. */
template <tp_format_id F>
__device__ __forceinline__ void tp_decode_dense(const unsigned char *row, int64_t c, int64_t count, bool aligned, float (&x)[TP_DECODE])
{
    if constexpr (F == TP_FORMAT_F32) {
        const unsigned char *p = row + 4 * c;
        if (aligned && count >= TP_DECODE) {
            tp_load<TP_DECODE>(reinterpret_cast<const float *>(p), x);
            return;
        }
#pragma unroll
        for (int i = 0; i < TP_DECODE; i++)
            x[i] = i < count ? __uint_as_float(tp_u16_at(p + 4 * i, false) | tp_u16_at(p + 4 * i + 2, false) << 16) : 0.0f;
    } else {
        const unsigned char *p = row + 2 * c;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (aligned && count >= TP_DECODE) {
            v = *reinterpret_cast<const uint4 *>(p);
        } else {
            uint32_t h[TP_DECODE];
#pragma unroll
            for (int i = 0; i < TP_DECODE; i++) h[i] = i < count ? tp_u16_at(p + 2 * i, false) : 0;
            v = make_uint4(h[0] | h[1] << 16, h[2] | h[3] << 16, h[4] | h[5] << 16, h[6] | h[7] << 16);
        }
        const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if constexpr (F == TP_FORMAT_BF16) {
                tp_unpack_bf16(pairs[i], x[2 * i], x[2 * i + 1]);
            } else {
                x[2 * i] = __half2float(__ushort_as_half((unsigned short)(pairs[i] & 0xffffu)));
                x[2 * i + 1] = __half2float(__ushort_as_half((unsigned short)(pairs[i] >> 16)));
            }
        }
    }
}

/* Values c .. c+7 of a row of blocks; c is a multiple of 8. aligned: by 2-byte accesses. */
template <tp_format_id F>
__device__ __forceinline__ void tp_decode_blocks(const unsigned char *row, int64_t c, bool aligned, float (&x)[TP_DECODE])
{
    constexpr int block_bytes = F == TP_FORMAT_Q8_0 ? 34 : F == TP_FORMAT_Q4_0 ? 18 : 20;
    const unsigned char *block = row + c / 32 * block_bytes;
    const int in = (int)(c % 32);
    const float d = tp_f16_at(block, aligned);
    if constexpr (F == TP_FORMAT_Q8_0) {
        const uint2 codes = tp_8_bytes_at(block + 2 + in, aligned);
#pragma unroll
        for (int i = 0; i < TP_DECODE; i++) x[i] = (float)(int8_t)tp_byte_of(codes, i) * d;
    } else {
        constexpr int head = F == TP_FORMAT_Q4_0 ? 2 : 4;
        const float minimum = F == TP_FORMAT_Q4_1 ? tp_f16_at(block + 2, aligned) : 0.0f;
        const uint2 codes = tp_8_bytes_at(block + head + in % 16, aligned);
        const int shift = in / 16 * 4; /* the upper halves hold values 16 .. 31 */
#pragma unroll
        for (int i = 0; i < TP_DECODE; i++) {
            const int code = (int)(tp_byte_of(codes, i) >> shift & 15u);
            x[i] = F == TP_FORMAT_Q4_0 ? (float)(code - 8) * d : fmaf((float)code, d, minimum);
        }
    }
}

/* Values c .. c+7 of a stored row of any format; c is a multiple of 8; of dense rows those from `count` on are 0. */
template <tp_format_id F>
__device__ __forceinline__ void tp_decode(const unsigned char *row, int64_t c, int64_t count, bool aligned, float (&x)[TP_DECODE])
{
    if constexpr (F == TP_FORMAT_F32 || F == TP_FORMAT_BF16 || F == TP_FORMAT_F16)
        tp_decode_dense<F>(row, c, count, aligned, x);
    else
        tp_decode_blocks<F>(row, c, aligned, x);
}

/* tp_matrix_stored_row on the device. */
__device__ __forceinline__ int64_t tp_device_stored_row(int64_t rope_pairs, int64_t row)
{
    if (rope_pairs <= 0) return row;
    const int64_t head = row / rope_pairs, in = row % rope_pairs;
    return head * rope_pairs + 2 * (in % (rope_pairs / 2)) + in / (rope_pairs / 2);
}

/* Bytes from one stored row to the next. */
static inline int64_t tp_matrix_row_bytes(const tp_matrix *w)
{
    const tp_format *f = &tp_formats[w->format];
    return f->dense && w->stride > 0 ? w->stride * f->block_bytes : tp_format_row_bytes(w->format, w->transposed ? w->rows : w->cols);
}

/* The `aligned` of tp_decode for all rows of w. */
static inline bool tp_matrix_aligned(const tp_matrix *w)
{
    const uintptr_t unit = tp_formats[w->format].dense ? 16 : 2;
    return reinterpret_cast<uintptr_t>(w->data) % unit == 0 && (uintptr_t)tp_matrix_row_bytes(w) % unit == 0;
}

/* Runs the statements with F, a constant, for a dense format, or for any. */
#define TP_CUDA_FORMAT_CASE(format, F, ...)  \
    case format: {                           \
        constexpr tp_format_id F = format;   \
        __VA_ARGS__                          \
    } break;
#define TP_CUDA_DENSE_FORMAT(format, F, ...)                    \
    do {                                                        \
        switch (format) {                                       \
            TP_CUDA_FORMAT_CASE(TP_FORMAT_F32, F, __VA_ARGS__)  \
            TP_CUDA_FORMAT_CASE(TP_FORMAT_BF16, F, __VA_ARGS__) \
            TP_CUDA_FORMAT_CASE(TP_FORMAT_F16, F, __VA_ARGS__)  \
        default: break;                                         \
        }                                                       \
    } while (0)
#define TP_CUDA_FORMAT(format, F, ...)                          \
    do {                                                        \
        switch (format) {                                       \
            TP_CUDA_FORMAT_CASE(TP_FORMAT_F32, F, __VA_ARGS__)  \
            TP_CUDA_FORMAT_CASE(TP_FORMAT_BF16, F, __VA_ARGS__) \
            TP_CUDA_FORMAT_CASE(TP_FORMAT_F16, F, __VA_ARGS__)  \
            TP_CUDA_FORMAT_CASE(TP_FORMAT_Q8_0, F, __VA_ARGS__) \
            TP_CUDA_FORMAT_CASE(TP_FORMAT_Q4_0, F, __VA_ARGS__) \
            TP_CUDA_FORMAT_CASE(TP_FORMAT_Q4_1, F, __VA_ARGS__) \
        default: break;                                         \
        }                                                       \
    } while (0)

/* UNSUPPORTED for formats that the backend lacks, and layouts that are none. */
static inline tp_status tp_cuda_check_matrix(tp_ctx *ctx, const char *name, const tp_matrix *w)
{
    if (w->format < 0 || w->format > TP_FORMAT_Q4_1)
        return tp_fail(ctx, TP_UNSUPPORTED, "%s: the cuda backend has no weight format number %d", name, (int)w->format);
    if (w->transposed && (!tp_formats[w->format].dense || w->rope_pairs > 0))
        return tp_fail(ctx, TP_UNSUPPORTED, "%s: a transposed matrix must be dense and in plain row order", name);
    return TP_OK;
}

#endif
