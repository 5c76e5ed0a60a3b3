/* Which calls of attention cuDNN takes, and its plans for them.
 *
 * A plan belongs to one shape; the first one of a kind of kernel is compiled, which takes half a second, others take 30 ms. So
 * only sequences of one length, a multiple of LENGTHS, are worth one: those are batches that are cut to a fixed length, and
 * come again in every step. What a call takes depends on its shape, and for the gradient on what was reserved, so the same
 * recipe gives the same bits, and a batch that is computed again gets what it got before. */
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
    if (shape->causal) add(c, TP_DNN_MASKED, &c->masked);
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
    return x.dtype == TP_BF16 && tp_rows_aligned(x);
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
    shape->causal = a->causal, shape->window = window;
    return lse_fits(a);
}

/* cuDNN, if it may be used here at all. The kernels of ours that it was measured against are those for Hopper. */
static tp_cudnn *cudnn_of(tp_cuda *cuda)
{
    tp_cudnn *cudnn = cuda->capability == 90 ? open_once(cuda) : NULL;
    return cudnn != NULL && cudnn->opened ? cudnn : NULL;
}

bool tp_dnn_attention(tp_ctx *ctx, const tp_attention_args *a)
{
    tp_cuda *cuda = tp_cuda_of(ctx);
    tp_dnn_shape shape;
    call c;
    tp_cudnn *cudnn = describe(a, &shape) ? cudnn_of(cuda) : NULL;
    if (cudnn == NULL) return false;
    const plan_slot *slot = find_plan(cudnn, &shape);
    if (slot == NULL || slot->plan == NULL) return false;
    const size_t lse_bytes = a->lse == NULL ? (size_t)(a->n_q * a->heads) * sizeof(float) : 0; /* it has to go somewhere */
    const size_t own = ((size_t)slot->workspace + 255) / 256 * 256;
    if (own + lse_bytes > TP_CUDA_WORKSPACE_BYTES) return false;
    fill(&c, a, &shape, a->lse != NULL ? a->lse : reinterpret_cast<float *>(cuda->workspace + own));
    return execute(&cudnn->dnn, slot->plan, &c, cuda->workspace);
}

/* ---- the gradient ---- */

/* It keeps a bf16 number for every score, and dk and dv of every query head. */
static uint64_t gradient_bytes(int64_t sequences, int64_t length, int64_t heads, int64_t head_dim)
{
    return (uint64_t)(sequences * heads) * (uint64_t)length * (uint64_t)(length + 2 * head_dim) * sizeof(__nv_bfloat16);
}

/* Where it was faster than our own by enough to be worth that memory (docs/cuda.md); with a window it never was. */
static bool gradient_gains(int64_t length, int64_t head_dim)
{
    return head_dim > 64 || length <= 1024;
}

extern "C" tp_status tp_cuda_reserve(tp_ctx *ctx, const tp_attention_size *size, uint64_t most, uint64_t *bytes)
{
    tp_cuda *cuda = tp_cuda_of(ctx);
    *bytes = 0;
    TP_TRY(tp_cuda_check(ctx, "reserve", cudaSetDevice(cuda->index)));
    TP_TRY(tp_cuda_check(ctx, "reserve", cudaFree(cuda->reserved)));
    cuda->reserved = NULL, cuda->reserved_bytes = 0;
    if (size->sequences < 1 || !good_length(size->length) || !gradient_gains(size->length, size->head_dim)) return TP_OK;
    const uint64_t wanted = gradient_bytes(size->sequences, size->length, size->heads, size->head_dim) + RESERVE_MORE;
    if (wanted <= TP_CUDA_WORKSPACE_BYTES || wanted > most || cudnn_of(cuda) == NULL) return TP_OK;
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
    if (!describe(a, &shape) || shape.window > 0 || !gradient_gains(shape.length, shape.head_dim)) return false;
    if (!fits(b->dout) || !fits(b->dq) || !fits(b->dk) || !fits(b->dv)) return false;
    const bool reserved = cuda->reserved_bytes > 0;
    const size_t room = reserved ? cuda->reserved_bytes : TP_CUDA_WORKSPACE_BYTES;
    if (gradient_bytes(shape.batch, shape.length, shape.heads, shape.head_dim) > room) return false; /* not worth a plan */
    tp_cudnn *cudnn = cudnn_of(cuda);
    if (cudnn == NULL) return false;
    shape.gradient = 1;
    shape.dout_ld = b->dout.ld, shape.dq_ld = b->dq.ld, shape.dk_ld = b->dk.ld, shape.dv_ld = b->dv.ld;
    const plan_slot *slot = find_plan(cudnn, &shape);
    if (slot == NULL || slot->plan == NULL || (size_t)slot->workspace > room) return false;
    fill(&c, a, &shape, a->lse);
    add(&c, TP_DNN_ONE, &c.one);
    add_row(&c, TP_DNN_DOUT, b->dout, a->segments[0].q_start);
    add_row(&c, TP_DNN_DQ, b->dq, a->segments[0].q_start);
    add_row(&c, TP_DNN_DK, b->dk, a->segments[0].k_start);
    add_row(&c, TP_DNN_DV, b->dv, a->segments[0].k_start);
    add(&c, TP_DNN_DELTA, b->delta);
    return execute(&cudnn->dnn, slot->plan, &c, reserved ? cuda->reserved : cuda->workspace);
}
