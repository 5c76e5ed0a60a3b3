/* Matrix products: what cuBLASLt can read stays where it is, the rest is converted into the workspace, slice by slice.
 *
 * Both sides of a product have one type. It is bf16 (or f16) if the precision says so, or if both sides hold such values anyway
 * (their products are exact in f32); else f32. A side of another type, a quantized weight, a weight in GGUF's rotary row order:
 * each is unpacked in slices, the left side by rows and the right side by columns of the result, so that every slice gives
 * finished elements and no sum is rounded in between. A few cases that cuBLASLt lacks (a 16-bit result of f32 products, a beta
 * and a residual at once) go through f32 sums in the workspace. */
#include "backend/cuda/blas.cuh"
#include "backend/cuda/decode.cuh"
#include "backend/cuda/few.cuh"
#include "backend/cuda/thin.cuh"

/* A slice of an unpacked weight stays in L2 until its product has read it. */
#define RIGHT_SLICE_BYTES ((int64_t)32 << 20)
#define THREADS           256

/* Leading dimension of a converted piece: rows start at 16 bytes in any type. */
static int64_t piece_ld(int64_t cols)
{
    return tp_cuda_ceil(cols, 8) * 8;
}

static void *offset(const void *data, int64_t elements, tp_dtype dtype)
{
    return (char *)const_cast<void *>(data) + elements * tp_cuda_size(dtype);
}

/* ---- conversions ---- */

/* to[i] = from[i]; a block takes 8 * THREADS columns of a row. With `rest`, what rounding lost goes there as a second
 * piece. */
template <typename From, typename To>
__global__ void convert_rows(const From *from, int64_t from_ld, int64_t n, int64_t cols, bool aligned, To *to, To *rest,
                             int64_t to_ld)
{
    const int64_t c = ((int64_t)blockIdx.y * THREADS + threadIdx.x) * 8;
    if (c >= cols) return;
    for (int64_t row = blockIdx.x; row < n; row += gridDim.x) {
        float x[8];
        tp_load_some<8>(from + row * from_ld + c, cols - c, aligned, x);
        tp_store<8>(to + row * to_ld + c, x);
        if (rest != NULL) {
#pragma unroll
            for (int i = 0; i < 8; i++) x[i] -= tp_round<To>(x[i]);
            tp_store<8>(rest + row * to_ld + c, x);
        }
    }
}

/* Thin rows: threads of a block take several of them. */
template <typename From, typename To>
__global__ void convert_thin_rows(const From *from, int64_t from_ld, int64_t n, int64_t cols, bool aligned, To *to, To *rest,
                                  int64_t to_ld)
{
    const int64_t groups = to_ld / 8, total = n * groups;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < total; i += (int64_t)gridDim.x * THREADS) {
        const int64_t row = i / groups, c = i % groups * 8;
        float x[8];
        tp_load_some<8>(from + row * from_ld + c, cols - c, aligned, x);
        tp_store<8>(to + row * to_ld + c, x);
        if (rest != NULL) {
#pragma unroll
            for (int k = 0; k < 8; k++) x[k] -= tp_round<To>(x[k]);
            tp_store<8>(rest + row * to_ld + c, x);
        }
    }
}

static dim3 grid_of(int64_t n, int64_t cols)
{
    return dim3((unsigned)tp_cuda_min(n, 65536), (unsigned)tp_cuda_ceil(cols, 8 * THREADS));
}

/* Rows of activations to a piece of another type. */
static tp_status convert(tp_ctx *ctx, const char *name, tp_rows from, int64_t n, int64_t cols, tp_dtype type, void *to,
                         void *rest)
{
    const bool aligned = tp_rows_aligned(from);
    const int64_t ld = piece_ld(cols);
    TP_TRY(tp_cuda_check_dtypes(ctx, name, from.dtype, type));
    TP_CUDA_DTYPE(from.dtype, From, {
        TP_CUDA_DTYPE_BESIDE(From, type, To, {
            if (cols < 8 * THREADS / 2)
                TP_CUDA_LAUNCH(ctx, name, (convert_thin_rows<From, To>), tp_cuda_blocks(ctx, n * (ld / 8), THREADS), THREADS, 0,
                               (const From *)from.data, from.ld, n, cols, aligned, (To *)to, (To *)rest, ld);
            else
                TP_CUDA_LAUNCH(ctx, name, (convert_rows<From, To>), grid_of(n, cols), THREADS, 0, (const From *)from.data,
                               from.ld, n, cols, aligned, (To *)to, (To *)rest, ld);
        });
    });
    return TP_OK;
}

/* Stored rows row0 .. row0+n, counted in logical order, and their values c0 .. c0+cols. c0 is a multiple of 32. */
template <tp_format_id F, typename To>
__global__ void unpack_rows(const unsigned char *data, int64_t row_bytes, int64_t rope_pairs, bool aligned, bool round_bf16,
                            int64_t row0, int64_t n, int64_t c0, int64_t cols, To *to, int64_t to_ld)
{
    const int64_t c = ((int64_t)blockIdx.y * THREADS + threadIdx.x) * TP_DECODE;
    if (c >= cols) return;
    for (int64_t row = blockIdx.x; row < n; row += gridDim.x) {
        float x[TP_DECODE];
        tp_decode<F>(data + tp_device_stored_row(rope_pairs, row0 + row) * row_bytes, c0 + c, cols - c, aligned, x);
        if (round_bf16) {
#pragma unroll
            for (int i = 0; i < TP_DECODE; i++) x[i] = tp_round_bf16(x[i]);
        }
        tp_store<TP_DECODE>(to + row * to_ld + c, x);
    }
}

static tp_status unpack(tp_ctx *ctx, const char *name, const tp_matrix *w, int64_t row0, int64_t n, int64_t c0, int64_t cols,
                        tp_dtype type, void *to)
{
    if (w->format == TP_FORMAT_F32 && w->rope_pairs <= 0 && !w->round_bf16 &&
        reinterpret_cast<uintptr_t>(w->data) % 4 == 0) { /* as adapters come: may be thin */
        const int64_t ld = tp_matrix_row_bytes(w) / 4;
        const tp_rows rows = {(float *)const_cast<void *>(w->data) + row0 * ld + c0, TP_F32, ld};
        return convert(ctx, name, rows, n, cols, type, to, NULL);
    }
    TP_CUDA_FORMAT(w->format, F, {
        TP_CUDA_DTYPE(type, To, {
            TP_CUDA_LAUNCH(ctx, name, (unpack_rows<F, To>), grid_of(n, cols), THREADS, 0, (const unsigned char *)w->data,
                           tp_matrix_row_bytes(w), (int64_t)w->rope_pairs, tp_matrix_aligned(w), w->round_bf16, row0, n, c0,
                           cols, (To *)to, piece_ld(cols));
        });
    });
    return TP_OK;
}

template <typename T> __global__ void round_bias(const float *bias, int64_t m, T *out)
{
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < m) out[i] = tp_from_f32<T>(bias[i]);
}

/* c = alpha * sums + beta * c + bias + residual; sums NULL: without them. */
template <typename T>
__global__ void finish_rows(const float *sums, int64_t sums_ld, float alpha, T *c, int64_t c_ld, float beta, const float *bias,
                            const T *residual, int64_t residual_ld, int64_t n, int64_t m)
{
    const int64_t col = (int64_t)blockIdx.y * THREADS + threadIdx.x;
    if (col >= m) return;
    for (int64_t row = blockIdx.x; row < n; row += gridDim.x) {
        float x = sums != NULL ? alpha * sums[row * sums_ld + col] : 0.0f;
        if (beta != 0) x += beta * tp_to_f32(c[row * c_ld + col]);
        if (bias != NULL) x += bias[col];
        if (residual != NULL) x += tp_to_f32(residual[row * residual_ld + col]);
        c[row * c_ld + col] = tp_from_f32<T>(x);
    }
}

/* ---- c = alpha * a op(b) + ... ---- */

/* A product on its way: what is converted, and in which slices. */
typedef struct job {
    const tp_matmul_args *args;
    tp_dtype type; /* of both sides */
    bool along_k;  /* stored rows of b run along k; else along m */
    bool convert_left, convert_right, through_sums;
    float beta;      /* of `add` */
    const void *add; /* what cuBLASLt adds: c itself, or the residual */
    int64_t add_ld;
    int64_t slice_rows, slice_cols;
    unsigned char *left, *right, *sums, *bias; /* in the workspace; sums and bias may be unused */
} job;

/* Values that a 16-bit type holds exactly. */
static bool holds(const tp_matrix *b, tp_dtype type)
{
    return type == TP_F16 ? b->format == TP_FORMAT_F16 && !b->round_bf16 : b->format == TP_FORMAT_BF16 || b->round_bf16;
}

/* Whether cuBLASLt can read b as it lies. */
static bool readable(const tp_matrix *b, tp_dtype type)
{
    return b->format == tp_format_of(type) && b->rope_pairs <= 0 && !(b->round_bf16 && b->format != TP_FORMAT_BF16) &&
           reinterpret_cast<uintptr_t>(b->data) % (uintptr_t)tp_cuda_size(type) == 0;
}

static job plan_job(const tp_matmul_args *args)
{
    job j = {};
    j.args = args;
    j.type = args->precision;
    if (j.type == TP_F32 && args->a.dtype != TP_F32 && holds(&args->b, args->a.dtype)) j.type = args->a.dtype;
    j.along_k = args->nt != args->b.transposed;
    j.convert_left = args->a.dtype != j.type;
    j.convert_right = !readable(&args->b, j.type);
    j.beta = args->beta, j.add = args->c.data, j.add_ld = args->c.ld;
    if (args->residual == args->c.data && args->residual_ld == args->c.ld)
        j.beta += 1;
    else if (args->residual != NULL && args->beta == 0)
        j.beta = 1, j.add = args->residual, j.add_ld = args->residual_ld;
    else
        j.through_sums = args->residual != NULL;
    if (args->c.dtype != TP_F32 && args->c.dtype != j.type) j.through_sums = true;
    return j;
}

/* Bytes of the workspace that columns of b take when they are unpacked. */
static int64_t right_bytes(const job *j, int64_t cols)
{
    return (j->along_k ? cols * piece_ld(j->args->k) : j->args->k * piece_ld(cols)) * tp_cuda_size(j->type);
}

/* Cuts the product so that its pieces fit: columns first, for a weight's slice should stay in L2, then rows. */
static tp_status cut_job(tp_ctx *ctx, job *j)
{
    const tp_matmul_args *args = j->args;
    unsigned char *at = tp_cuda_of(ctx)->workspace;
    int64_t left = (int64_t)TP_CUDA_WORKSPACE_BYTES;
    if (args->bias != NULL && args->c.dtype != TP_F32 && !j->through_sums) {
        const int64_t bytes = tp_cuda_ceil(args->m * 2, 256) * 256;
        j->bias = at, at += bytes, left -= bytes;
    }
    j->slice_cols = args->m;
    if (j->convert_right) {
        const int64_t fit = RIGHT_SLICE_BYTES / right_bytes(j, 32) * 32;
        if (fit < args->m) j->slice_cols = fit > 128 ? fit / 128 * 128 : fit;
        if (j->slice_cols <= 0) j->slice_cols = 32;
        const int64_t bytes = tp_cuda_ceil(right_bytes(j, j->slice_cols), 256) * 256;
        j->right = at, at += bytes, left -= bytes;
    }
    const int64_t left_row = j->convert_left ? piece_ld(args->k) * tp_cuda_size(j->type) : 0;
    const int64_t sums_row = j->through_sums ? piece_ld(j->slice_cols) * 4 : 0;
    j->slice_rows = args->n;
    if (left_row + sums_row > 0) j->slice_rows = tp_cuda_min(args->n, (left - 256) / (left_row + sums_row));
    if (j->slice_rows < args->n && j->slice_rows > 128) j->slice_rows = j->slice_rows / 128 * 128;
    if (left < 256 || j->slice_rows <= 0)
        return tp_fail(ctx, TP_UNSUPPORTED, "matmul: k = %lld, m = %lld is too long for the workspace of the cuda backend",
                       (long long)args->k, (long long)args->m);
    j->left = at;
    j->sums = at + tp_cuda_ceil(j->slice_rows * left_row, 256) * 256;
    return TP_OK;
}

template <typename T>
static tp_status finish(tp_ctx *ctx, const tp_matmul_args *args, const float *sums, int64_t row, int64_t n, int64_t col,
                        int64_t m)
{
    T *c = (T *)args->c.data + row * args->c.ld + col;
    const T *residual = args->residual != NULL ? (const T *)args->residual + row * args->residual_ld + col : NULL;
    const dim3 grid((unsigned)tp_cuda_min(n, 65536), (unsigned)tp_cuda_ceil(m, THREADS));
    TP_CUDA_LAUNCH(ctx, "matmul", finish_rows<T>, grid, THREADS, 0, sums, piece_ld(m), args->alpha, c, args->c.ld, args->beta,
                   args->bias != NULL ? args->bias + col : NULL, residual, args->residual_ld, n, m);
    return TP_OK;
}

/* One slice: rows from `row` on, columns from `col` on; the sides are where `p` says. */
static tp_status multiply_slice(tp_ctx *ctx, const job *j, tp_product p, int64_t row, int64_t col)
{
    const tp_matmul_args *args = j->args;
    if (j->through_sums) {
        p.c = {j->sums, TP_F32, piece_ld(p.m)};
        p.alpha = 1;
        TP_TRY(tp_cuda_product(ctx, "matmul", &p));
        TP_CUDA_DTYPE(args->c.dtype, T, { return finish<T>(ctx, args, (const float *)j->sums, row, p.n, col, p.m); });
    }
    p.c = {offset(args->c.data, row * args->c.ld + col, args->c.dtype), args->c.dtype, args->c.ld};
    p.add = offset(j->add, row * j->add_ld + col, args->c.dtype), p.add_ld = j->add_ld;
    p.alpha = args->alpha, p.beta = j->beta;
    if (args->bias != NULL) p.bias = j->bias != NULL ? (const void *)(j->bias + 2 * col) : (const void *)(args->bias + col);
    return tp_cuda_product(ctx, "matmul", &p);
}

/* The right side of columns col .. col+m: unpacked, or in place. */
static tp_status prepare_right(tp_ctx *ctx, const job *j, int64_t col, int64_t m, tp_product *p)
{
    const tp_matmul_args *args = j->args;
    p->right_transposed = j->along_k;
    if (j->convert_right) {
        p->right = j->right, p->right_ld = piece_ld(j->along_k ? args->k : m);
        if (j->along_k) return unpack(ctx, "matmul", &args->b, col, m, 0, args->k, j->type, j->right);
        return unpack(ctx, "matmul", &args->b, 0, args->k, col, m, j->type, j->right);
    }
    p->right_ld = tp_matrix_row_bytes(&args->b) / tp_cuda_size(j->type);
    p->right = offset(args->b.data, j->along_k ? col * p->right_ld : col, j->type);
    return TP_OK;
}

static tp_status run_job(tp_ctx *ctx, const job *j)
{
    const tp_matmul_args *args = j->args;
    if (j->bias != NULL) {
        TP_CUDA_DTYPE(args->c.dtype, T, {
            TP_CUDA_LAUNCH(ctx, "matmul", round_bias<T>, (unsigned)tp_cuda_ceil(args->m, THREADS), THREADS, 0, args->bias,
                           args->m, (T *)j->bias);
        });
    }
    for (int64_t row = 0; row < args->n; row += j->slice_rows) {
        const int64_t n = tp_cuda_min(j->slice_rows, args->n - row);
        tp_rows a = {offset(args->a.data, row * args->a.ld, args->a.dtype), args->a.dtype, args->a.ld};
        tp_product p = {};
        p.n = n, p.k = args->k, p.type = j->type;
        p.left = a.data, p.left_ld = a.ld;
        if (j->convert_left) {
            TP_TRY(convert(ctx, "matmul", a, n, args->k, j->type, j->left, NULL));
            p.left = j->left, p.left_ld = piece_ld(args->k);
        }
        for (int64_t col = 0; col < args->m; col += j->slice_cols) {
            p.m = tp_cuda_min(j->slice_cols, args->m - col);
            if (row == 0 || j->slice_cols < args->m || !j->convert_right)
                TP_TRY(prepare_right(ctx, j, col, p.m, &p));
            else
                p.right = j->right, p.right_ld = piece_ld(j->along_k ? args->k : p.m), p.right_transposed = j->along_k;
            TP_TRY(multiply_slice(ctx, j, p, row, col));
        }
    }
    return TP_OK;
}

/* The low-rank part first: c = alpha * low op(up) + beta * c + residual. Then cuBLASLt adds the large product to c, reading it
 * behind its arithmetic; the other way round the thin product would wait for every byte of c twice. */
static tp_status run_lowrank(tp_ctx *ctx, const tp_matmul_args *args)
{
    const tp_lowrank_args *l = args->lowrank;
    tp_matmul_args down = {}, up = *args, large = *args;
    if (l->down.data != NULL) {
        down.n = args->n, down.m = l->rank, down.k = args->k, down.nt = args->nt;
        down.a = args->a, down.b = l->down, down.c = l->low;
        down.alpha = l->scaling, down.precision = args->precision;
        TP_TRY(tp_cuda_matmul(ctx, &down));
    }
    up.k = l->rank, up.a = l->low, up.b = l->up;
    up.bias = NULL, up.lowrank = NULL;
    large.beta = 1, large.residual = NULL, large.lowrank = NULL;
    TP_TRY(tp_cuda_matmul(ctx, &up));
    return tp_cuda_matmul(ctx, &large);
}

extern "C" tp_status tp_cuda_matmul(tp_ctx *ctx, const void *arguments)
{
    const tp_matmul_args *args = (const tp_matmul_args *)arguments;
    if (tp_cuda_few_takes(args)) return tp_cuda_few(ctx, args);
    if (tp_cuda_skinny_takes(args)) return tp_cuda_skinny(ctx, args);
    if (args->lowrank != NULL) return run_lowrank(ctx, args);
    TP_TRY(tp_cuda_check_matrix(ctx, "matmul", &args->b));
    TP_TRY(tp_cuda_check_dtype(ctx, "matmul", args->a.dtype));
    TP_TRY(tp_cuda_check_dtype(ctx, "matmul", args->c.dtype));
    if (args->n <= 0 || args->m <= 0) return TP_OK;
    const int64_t k = args->nt ? args->b.cols : args->b.rows, m = args->nt ? args->b.rows : args->b.cols;
    if (k != args->k || m != args->m)
        return tp_fail(ctx, TP_INTERNAL, "matmul: the right side is %lld x %lld, the product needs %lld x %lld", (long long)k,
                       (long long)m, (long long)args->k, (long long)args->m);
    if (args->k <= 0 || args->alpha == 0) { /* then cuBLASLt leaves out the bias */
        TP_CUDA_DTYPE(args->c.dtype, T, { return finish<T>(ctx, args, NULL, 0, args->n, 0, args->m); });
    }
    job j = plan_job(args);
    TP_TRY(cut_job(ctx, &j));
    return run_job(ctx, &j);
}

/* ---- c = alpha * a^T b + beta * c ---- */

/* cuBLASLt 13.1 was seen to leave out the last rows of a long sum in f16 (17474 of them, 64 x 8 results, Hopper): what is not a
 * multiple of this is a product of its own. */
#define WHOLE_ROWS 64

/* The first n rows of a and b, which are of one type. */
static tp_status multiply_tn(tp_ctx *ctx, const tp_matmul_tn_args *args, int64_t n, tp_rows a, tp_rows b, float beta)
{
    if (a.dtype != TP_F32 && n > WHOLE_ROWS && n % WHOLE_ROWS != 0) {
        const int64_t whole = n / WHOLE_ROWS * WHOLE_ROWS;
        TP_TRY(multiply_tn(ctx, args, whole, a, b, beta));
        return multiply_tn(ctx, args, n - whole, {offset(a.data, whole * a.ld, a.dtype), a.dtype, a.ld},
                           {offset(b.data, whole * b.ld, b.dtype), b.dtype, b.ld}, 1);
    }
    tp_product p = {};
    p.n = args->m, p.m = args->k, p.k = n, p.type = a.dtype;
    p.left = a.data, p.left_ld = a.ld, p.left_transposed = true;
    p.right = b.data, p.right_ld = b.ld;
    p.c = {args->c, TP_F32, args->k};
    p.add = args->c, p.add_ld = args->k;
    p.alpha = args->alpha, p.beta = beta;
    return tp_cuda_product(ctx, "matmul_tn", &p);
}

/* One side is f32, the other bf16 or f16. The f32 side, in practice the thin one, becomes the sum of two pieces of that type,
 * which keeps 16 (or 22) of its 24 bits; products with each are added in f32. */
static tp_status multiply_mixed(tp_ctx *ctx, const tp_matmul_tn_args *args)
{
    const bool split_a = args->a.dtype == TP_F32;
    const tp_dtype type = split_a ? args->b.dtype : args->a.dtype;
    const int64_t cols = split_a ? args->m : args->k, ld = piece_ld(cols);
    const int64_t slice = (int64_t)TP_CUDA_WORKSPACE_BYTES / (4 * ld) / 8 * 8;
    if (slice <= 0)
        return tp_fail(ctx, TP_UNSUPPORTED, "matmul_tn: %lld columns are too many for the cuda backend", (long long)cols);
    float beta = args->beta;
    for (int64_t row = 0; row < args->n; row += slice, beta = 1) {
        const int64_t n = tp_cuda_min(slice, args->n - row);
        tp_rows a = {offset(args->a.data, row * args->a.ld, args->a.dtype), args->a.dtype, args->a.ld};
        tp_rows b = {offset(args->b.data, row * args->b.ld, args->b.dtype), args->b.dtype, args->b.ld};
        tp_rows upper = {tp_cuda_of(ctx)->workspace, type, ld}, lower = {offset(upper.data, n * ld, type), type, ld};
        TP_TRY(convert(ctx, "matmul_tn", split_a ? a : b, n, cols, type, upper.data, lower.data));
        TP_TRY(multiply_tn(ctx, args, n, split_a ? upper : a, split_a ? b : upper, beta));
        TP_TRY(multiply_tn(ctx, args, n, split_a ? lower : a, split_a ? b : lower, 1));
    }
    return TP_OK;
}

extern "C" tp_status tp_cuda_matmul_tn(tp_ctx *ctx, const void *arguments)
{
    const tp_matmul_tn_args *args = (const tp_matmul_tn_args *)arguments;
    TP_TRY(tp_cuda_check_dtypes(ctx, "matmul_tn", args->a.dtype, args->b.dtype));
    if (args->m <= 0 || args->k <= 0) return TP_OK;
    if (args->n <= 0) {
        const dim3 grid((unsigned)tp_cuda_min(args->m, 65536), (unsigned)tp_cuda_ceil(args->k, THREADS));
        TP_CUDA_LAUNCH(ctx, "matmul_tn", finish_rows<float>, grid, THREADS, 0, (const float *)NULL, args->k, args->alpha,
                       args->c, args->k, args->beta, (const float *)NULL, (const float *)NULL, args->k, args->m, args->k);
        return TP_OK;
    }
    if (tp_cuda_thin_takes(args)) return tp_cuda_thin_tn(ctx, args);
    if (args->a.dtype != args->b.dtype) return multiply_mixed(ctx, args);
    return multiply_tn(ctx, args, args->n, args->a, args->b, args->beta);
}
