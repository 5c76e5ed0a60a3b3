/* Which calls of attention cuDNN takes, and its plans for them.
 *
 * A plan belongs to one shape; the first one of a kind of kernel is compiled, which takes half a second, others take 30 ms. So
 * shapes have to come again: sequences of one length, a multiple of LENGTHS, as batches have that are cut to a fixed length;
 * forward also packed ones, whose number and greatest length are rounded up to powers of two. What a call takes depends on its
 * shape, and for the gradient on what was reserved, so the same recipe gives the same bits, and a batch that is computed again
 * gets what it got before. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cuda/cudnn.cuh"
#include "base/mem.h"

#define LENGTHS      128
#define PLANS        128
#define VERSION_MIN  91000 /* before it, a mask of -inf was not what the kernels expected */
#define RESERVE_MORE ((uint64_t)1 << 20)
#define HEAD_DIM_MAX 256
#define LONG_KEYS    4096

#define PACKED_TOKENS 1024
#define PACKED_MOST   128 /* sequences of a packed call */
#define PACKED_LEAST  8   /* its plan is for at least so many, */
#define PACKED_ROWS   256 /* each of at least so many rows */

#define STARTS_STRIDE 160 /* integers of one of its six arrays in the workspace */
#define ARRAYS_BYTES  (6 * STARTS_STRIDE * sizeof(int32_t))

typedef struct plan_slot {
    tp_dnn_shape shape;
    tp_dnn_descriptor plan; /* NULL: cuDNN has none */
    int64_t workspace;
} plan_slot;

struct tp_cudnn {
    tp_dnn dnn;
    bool opened; /* false: not there, or forbidden */
    plan_slot plans[PLANS];
    int n_plans;
};

/* ---- opening ---- */

static bool open_library(tp_dnn *dnn, cudaStream_t stream)
{
    dnn->library = dlopen("libcudnn.so.9", RTLD_NOW | RTLD_LOCAL);
    if (dnn->library == NULL) return false;
    const struct {
        const char *name;
        void *function;
    } functions[] = {{"cudnnGetVersion", &dnn->GetVersion},
                     {"cudnnCreate", &dnn->Create},
                     {"cudnnDestroy", &dnn->Destroy},
                     {"cudnnSetStream", &dnn->SetStream},
                     {"cudnnBackendCreateDescriptor", &dnn->BackendCreateDescriptor},
                     {"cudnnBackendDestroyDescriptor", &dnn->BackendDestroyDescriptor},
                     {"cudnnBackendFinalize", &dnn->BackendFinalize},
                     {"cudnnBackendSetAttribute", &dnn->BackendSetAttribute},
                     {"cudnnBackendGetAttribute", &dnn->BackendGetAttribute},
                     {"cudnnBackendExecute", &dnn->BackendExecute}};
    for (const auto &f : functions) {
        void *symbol = dlsym(dnn->library, f.name);
        if (symbol == NULL) return false;
        memcpy(f.function, &symbol, sizeof symbol);
    }
    return dnn->GetVersion() >= VERSION_MIN && dnn->Create(&dnn->handle) == TP_DNN_OK &&
           dnn->SetStream(dnn->handle, stream) == TP_DNN_OK;
}

/* NULL if there is no memory for the table; else whatever there is of cuDNN, asked once. */
static tp_cudnn *open_once(tp_cuda *cuda)
{
    if (cuda->dnn != NULL) return cuda->dnn;
    cuda->dnn = (tp_cudnn *)tp_alloc(NULL, 1, sizeof *cuda->dnn);
    if (cuda->dnn == NULL) return NULL;
    const char *want = getenv("TAPEFT_CUDNN");
    if (want != NULL && strcmp(want, "none") == 0) return cuda->dnn;
    cuda->dnn->opened = open_library(&cuda->dnn->dnn, cuda->stream);
    return cuda->dnn;
}

extern "C" void tp_cuda_dnn_close(tp_cudnn *cudnn)
{
    if (cudnn == NULL) return;
    const tp_dnn *dnn = &cudnn->dnn;
    for (plan_slot &slot : cudnn->plans)
        if (slot.plan != NULL) (void)dnn->BackendDestroyDescriptor(slot.plan);
    if (dnn->handle != NULL) (void)dnn->Destroy(dnn->handle);
    if (dnn->library != NULL) (void)dlclose(dnn->library);
    tp_free(cudnn);
}

extern "C" void tp_cuda_dnn_version(tp_cuda *cuda, char out[32])
{
    const tp_cudnn *cudnn = open_once(cuda);
    const size_t version = cudnn != NULL && cudnn->opened ? cudnn->dnn.GetVersion() : 0;
    if (version == 0)
        snprintf(out, 32, "none");
    else
        snprintf(out, 32, "%zu.%zu.%zu", version / 10000, version / 100 % 100, version % 100);
}

/* ---- plans ---- */

/* The plan of a shape, from the table or new; NULL if the table is full. None is ever dropped, for recordings may hold its
 * kernels. Building loads code, which a recording of this thread would forbid. */
static const plan_slot *find_plan(tp_cudnn *cudnn, const tp_dnn_shape *shape)
{
    for (int i = 0; i < cudnn->n_plans; i++)
        if (memcmp(&cudnn->plans[i].shape, shape, sizeof *shape) == 0) return &cudnn->plans[i];
    if (cudnn->n_plans == PLANS) return NULL;
    plan_slot *slot = &cudnn->plans[cudnn->n_plans++];
    slot->shape = *shape;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    (void)cudaThreadExchangeStreamCaptureMode(&mode);
    slot->plan = tp_dnn_plan(&cudnn->dnn, shape, &slot->workspace);
    (void)cudaThreadExchangeStreamCaptureMode(&mode);
    (void)cudaGetLastError();
    return slot;
}

/* ---- calls ---- */

/* What a call works on: the plan's tensors by their ids, and the numbers among them. */
typedef struct call {
    int64_t ids[TP_DNN_IDS];
    void *data[TP_DNN_IDS];
    int n;
    float scale, masked, window, one;
} call;

static void add(call *c, int64_t id, void *data)
{
    c->ids[c->n] = id;
    c->data[c->n++] = data;
}

static void add_row(call *c, int64_t id, tp_rows x, int64_t row)
{
    add(c, id, static_cast<__nv_bfloat16 *>(x.data) + row * x.ld);
}

/* What both directions share; lse: of query 0 of the call. */
static void fill(call *c, const tp_attention_args *a, const tp_dnn_shape *shape, float *lse)
{
    const int64_t q = a->segments[0].q_start, k = a->segments[0].k_start;
    c->n = 0;
    c->scale = a->scale, c->masked = -INFINITY, c->window = (float)shape->window, c->one = 1;
    add_row(c, TP_DNN_Q, a->q, q);
    add_row(c, TP_DNN_K, a->k, k);
    add_row(c, TP_DNN_V, a->v, k);
    add_row(c, TP_DNN_OUT, a->out, q);
    add(c, TP_DNN_LSE, lse + q * a->heads);
    add(c, TP_DNN_SCALE, &c->scale);
    if (shape->causal || shape->packed) add(c, TP_DNN_MASKED, &c->masked);
    if (shape->window > 0) add(c, TP_DNN_WINDOW, &c->window);
}

static bool execute(const tp_dnn *dnn, tp_dnn_descriptor plan, const call *c, void *workspace)
{
    tp_dnn_descriptor variants = NULL;
    if (dnn->BackendCreateDescriptor(TP_DNN_VARIANTS, &variants) != TP_DNN_OK) return false;
    const bool ok =
        dnn->BackendSetAttribute(variants, TP_DNN_VARIANTS_IDS, TP_DNN_V_INT64, c->n, c->ids) == TP_DNN_OK &&
        dnn->BackendSetAttribute(variants, TP_DNN_VARIANTS_POINTERS, TP_DNN_V_POINTER, c->n, c->data) == TP_DNN_OK &&
        dnn->BackendSetAttribute(variants, TP_DNN_VARIANTS_WORKSPACE, TP_DNN_V_POINTER, 1, &workspace) == TP_DNN_OK &&
        dnn->BackendFinalize(variants) == TP_DNN_OK && dnn->BackendExecute(dnn->handle, plan, variants) == TP_DNN_OK;
    (void)dnn->BackendDestroyDescriptor(variants);
    return ok;
}

static bool fits(tp_rows x)
{
    return x.dtype != TP_F32 && tp_rows_aligned(x);
}

/* The log-sum-exp of the first query lies where plans expect it. */
static bool lse_fits(const tp_attention_args *a)
{
    const uintptr_t before = (uintptr_t)(a->segments[0].q_start * a->heads) * sizeof(float);
    return (reinterpret_cast<uintptr_t>(a->lse) + before) % 16 == 0;
}

static bool good_length(int64_t length)
{
    return length > 0 && length % LENGTHS == 0;
}

/* Plain attention over sequences of one length, at equal distances from each other, keys beside their queries. */
static bool describe(const tp_attention_args *a, tp_dnn_shape *shape)
{
    const tp_segment *s = a->segments;
    if (!fits(a->q) || !fits(a->k) || !fits(a->v) || !fits(a->out)) return false;
    if (a->n_prefix > 0 || a->soft_cap > 0 || a->alibi_slopes != NULL || a->n_segments < 1) return false;
    const int64_t length = s[0].q_len, window = a->window < length ? a->window : 0;
    if (!good_length(length) || a->head_dim % 8 != 0 || a->head_dim > HEAD_DIM_MAX || (window > 0 && !a->causal)) return false;
    int64_t q_apart = length, k_apart = length;
    if (a->n_segments > 1) q_apart = s[1].q_start - s[0].q_start, k_apart = s[1].k_start - s[0].k_start;
    for (int64_t i = 0; i < a->n_segments; i++) {
        if (s[i].q_len != length || s[i].k_len != length || s[i].q_start != s[0].q_start + i * q_apart ||
            s[i].k_start != s[0].k_start + i * k_apart)
            return false;
    }
    memset(shape, 0, sizeof *shape);
    shape->batch = a->n_segments, shape->length = length, shape->heads = a->heads, shape->kv_heads = a->kv_heads;
    shape->head_dim = a->head_dim, shape->q_apart = q_apart, shape->k_apart = k_apart;
    shape->q_ld = a->q.ld, shape->k_ld = a->k.ld, shape->v_ld = a->v.ld, shape->out_ld = a->out.ld;
    shape->causal = a->causal, shape->window = window, shape->f16 = a->q.dtype == TP_F16;
    return lse_fits(a);
}

static int64_t larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static int64_t power_of_two(int64_t least, int64_t n)
{
    while (least < n) least *= 2;
    return least;
}

/* The same over sequences of any lengths, each directly behind the one before. */
static bool describe_packed(const tp_attention_args *a, tp_dnn_shape *shape)
{
    const tp_segment *s = a->segments;
    int64_t longest = 0, widest = a->q.ld;
    if (!fits(a->q) || !fits(a->k) || !fits(a->v) || !fits(a->out)) return false;
    if (a->n_prefix > 0 || a->soft_cap > 0 || a->alibi_slopes != NULL || a->window > 0) return false;
    if (a->n_segments < 1 || a->n_segments > PACKED_MOST || a->head_dim % 8 != 0 || a->head_dim > HEAD_DIM_MAX) return false;
    const int64_t shift = s[0].k_start - s[0].q_start;
    for (int64_t i = 0, q_end = s[0].q_start; i < a->n_segments; i++, q_end += s[i - 1].q_len) {
        if (s[i].q_start != q_end || s[i].k_start != q_end + shift || s[i].k_len != s[i].q_len || s[i].q_len < 1) return false;
        longest = larger(longest, s[i].q_len);
    }
    for (int64_t ld : {a->k.ld, a->v.ld, a->out.ld}) widest = larger(widest, ld);
    if (widest > INT32_MAX / larger(a->n_q, 1)) return false; /* elements are counted in 32 bits */
    memset(shape, 0, sizeof *shape);
    shape->batch = power_of_two(PACKED_LEAST, a->n_segments), shape->length = power_of_two(PACKED_ROWS, longest);
    shape->heads = a->heads, shape->kv_heads = a->kv_heads, shape->head_dim = a->head_dim;
    shape->q_apart = shape->k_apart = shape->length;
    shape->q_ld = a->q.ld, shape->k_ld = a->k.ld, shape->v_ld = a->v.ld, shape->out_ld = a->out.ld;
    shape->causal = a->causal, shape->f16 = a->q.dtype == TP_F16, shape->packed = 1;
    return lse_fits(a);
}

/* Where packed sequences begin, and how long they are, as a plan wants to read it: arrays of `stride` integers. They come by
 * parameter, so that a recording keeps its own. */
typedef struct starts {
    int32_t row[PACKED_MOST + 1]; /* from the first sequence on */
    int32_t n, batch, stride, ld[5];
} starts;

static __global__ void starts_kernel(const __grid_constant__ starts s, int32_t *arrays)
{
    const int i = (int)threadIdx.x;
    if (i > s.batch) return;
    const int32_t row = s.row[min(i, s.n)];
    for (int array = 0; array < 5; array++) arrays[array * s.stride + i] = row * s.ld[array];
    if (i < s.batch) arrays[5 * s.stride + i] = i < s.n ? s.row[i + 1] - row : 0;
}

static tp_status place_starts(tp_ctx *ctx, const tp_attention_args *a, const tp_dnn_shape *shape, int32_t *arrays, call *c)
{
    starts s = {};
    for (int64_t i = 0; i < a->n_segments; i++) s.row[i + 1] = s.row[i] + (int32_t)a->segments[i].q_len;
    s.n = (int32_t)a->n_segments, s.batch = (int32_t)shape->batch, s.stride = STARTS_STRIDE;
    const int64_t lds[] = {a->q.ld, a->k.ld, a->v.ld, a->out.ld, a->heads};
    for (int i = 0; i < 5; i++) {
        s.ld[i] = (int32_t)lds[i];
        add(c, TP_DNN_Q_STARTS + i, arrays + i * s.stride);
    }
    add(c, TP_DNN_Q_LENGTHS, arrays + 5 * s.stride);
    add(c, TP_DNN_K_LENGTHS, arrays + 5 * s.stride);
    TP_CUDA_LAUNCH(ctx, "attention", starts_kernel, 1, STARTS_STRIDE, 0, s, arrays);
    return TP_OK;
}

/* cuDNN, if it may be used here at all. The kernels of ours that it was measured against are those for Hopper. */
static tp_cudnn *cudnn_of(tp_cuda *cuda)
{
    tp_cudnn *cudnn = cuda->capability == 90 ? open_once(cuda) : NULL;
    return cudnn != NULL && cudnn->opened ? cudnn : NULL;
}

/* Packed sequences: not for short heads, of which ours were as fast, nor for prompts, which do not come again. */
static bool packed_gains(const tp_attention_args *a)
{
    return a->head_dim > 64 && a->n_segments > 1 && a->n_q >= PACKED_TOKENS;
}

bool tp_dnn_attention(tp_ctx *ctx, const tp_attention_args *a)
{
    tp_cuda *cuda = tp_cuda_of(ctx);
    tp_dnn_shape shape;
    call c;
    if (!describe(a, &shape) && !(packed_gains(a) && describe_packed(a, &shape))) return false;
    tp_cudnn *cudnn = cudnn_of(cuda);
    const plan_slot *slot = cudnn != NULL ? find_plan(cudnn, &shape) : NULL;
    if (slot == NULL || slot->plan == NULL) return false;
    const size_t lse_bytes = a->lse == NULL ? (size_t)(a->n_q * a->heads) * sizeof(float) : 0; /* it has to go somewhere */
    const size_t own = ((size_t)slot->workspace + 255) / 256 * 256, before_lse = own + ARRAYS_BYTES;
    if (before_lse + lse_bytes > TP_CUDA_WORKSPACE_BYTES) return false;
    fill(&c, a, &shape, a->lse != NULL ? a->lse : reinterpret_cast<float *>(cuda->workspace + before_lse));
    if (shape.packed && place_starts(ctx, a, &shape, reinterpret_cast<int32_t *>(cuda->workspace + own), &c) != TP_OK)
        return false;
    return execute(&cudnn->dnn, slot->plan, &c, cuda->workspace);
}

/* ---- the gradient ---- */

/* Which gradient a call gets: our own, or one of cuDNN's two (cudnn_graph.cu). */
typedef enum gradient { OURS, STORED_SCORES, ANY_ORDER } gradient;

/* cuDNN's where it was faster than ours by enough to be worth its memory (docs/cuda.md): for heads that ours fills up with
 * zeros or cannot keep in registers, and in any order for long sequences. */
static gradient gradient_of(const tp_cuda *cuda, int64_t length, int64_t head_dim)
{
    if (cuda->device.any_order && length >= LONG_KEYS && head_dim <= 128) return ANY_ORDER;
    return head_dim > 64 && head_dim != 128 ? STORED_SCORES : OURS;
}

/* Both of cuDNN's keep dk and dv of every query head; one 16 bits for every score, the other dq in f32 (own_bytes). */
static uint64_t own_bytes(gradient kind, int64_t rows, int64_t head_dim)
{
    return kind == ANY_ORDER ? (uint64_t)(rows * head_dim) * sizeof(float) : 0;
}

static uint64_t gradient_bytes(gradient kind, int64_t sequences, int64_t length, int64_t heads, int64_t head_dim)
{
    const int64_t rows = sequences * heads * length;
    const uint64_t scores = kind == STORED_SCORES ? (uint64_t)(rows * length) * sizeof(__nv_bfloat16) : 0;
    return scores + (uint64_t)(rows * 2 * head_dim) * sizeof(__nv_bfloat16) + own_bytes(kind, rows, head_dim);
}

extern "C" tp_status tp_cuda_reserve(tp_ctx *ctx, const tp_attention_size *size, uint64_t most, uint64_t *bytes)
{
    tp_cuda *cuda = tp_cuda_of(ctx);
    *bytes = 0;
    TP_TRY(tp_cuda_check(ctx, "reserve", cudaSetDevice(cuda->index)));
    TP_TRY(tp_cuda_check(ctx, "reserve", cudaFree(cuda->reserved)));
    cuda->reserved = NULL, cuda->reserved_bytes = 0;
    if (size->sequences < 1 || !good_length(size->length)) return TP_OK;
    const gradient kind = gradient_of(cuda, size->length, size->head_dim);
    const uint64_t wanted = gradient_bytes(kind, size->sequences, size->length, size->heads, size->head_dim) + RESERVE_MORE;
    if (kind == OURS || wanted <= TP_CUDA_WORKSPACE_BYTES || wanted > most || cudnn_of(cuda) == NULL) return TP_OK;
    TP_TRY(tp_cuda_check(ctx, "reserve", cudaMalloc((void **)&cuda->reserved, wanted)));
    *bytes = cuda->reserved_bytes = wanted;
    return TP_OK;
}

bool tp_dnn_attention_backward(tp_ctx *ctx, const tp_attention_backward_args *b)
{
    const tp_attention_args *a = &b->forward;
    tp_cuda *cuda = tp_cuda_of(ctx);
    tp_dnn_shape shape;
    call c;
    if (!describe(a, &shape) || shape.window > 0) return false; /* with a window it never was faster */
    const gradient kind = gradient_of(cuda, shape.length, shape.head_dim);
    if (kind == OURS || !fits(b->dout) || !fits(b->dq) || !fits(b->dk) || !fits(b->dv)) return false;
    unsigned char *room = cuda->reserved_bytes > 0 ? cuda->reserved : cuda->workspace;
    const size_t room_bytes = cuda->reserved_bytes > 0 ? cuda->reserved_bytes : TP_CUDA_WORKSPACE_BYTES;
    if (gradient_bytes(kind, shape.batch, shape.length, shape.heads, shape.head_dim) > room_bytes) return false; /* no plan */
    tp_cudnn *cudnn = cudnn_of(cuda);
    if (cudnn == NULL) return false;
    shape.gradient = 1, shape.any_order = kind == ANY_ORDER;
    shape.dout_ld = b->dout.ld, shape.dq_ld = b->dq.ld, shape.dk_ld = b->dk.ld, shape.dv_ld = b->dv.ld;
    const plan_slot *slot = find_plan(cudnn, &shape);
    const size_t own = own_bytes(kind, shape.batch * shape.heads * shape.length, shape.head_dim);
    if (slot == NULL || slot->plan == NULL || own + (size_t)slot->workspace > room_bytes) return false;
    fill(&c, a, &shape, a->lse);
    add(&c, TP_DNN_ONE, &c.one);
    add_row(&c, TP_DNN_DOUT, b->dout, a->segments[0].q_start);
    add_row(&c, TP_DNN_DQ, b->dq, a->segments[0].q_start);
    add_row(&c, TP_DNN_DK, b->dk, a->segments[0].k_start);
    add_row(&c, TP_DNN_DV, b->dv, a->segments[0].k_start);
    add(&c, TP_DNN_DELTA, b->delta);
    if (kind == ANY_ORDER) add(&c, TP_DNN_SUMS, room);
    return execute(&cudnn->dnn, slot->plan, &c, room + own);
}
