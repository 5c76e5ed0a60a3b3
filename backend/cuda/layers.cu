/* All layers of one token in one kernel: decoding with a model so small that the kernels of a layer cost more to start than
 * to run.
 *
 * A cluster of MEMBERS blocks is a key head with its query heads, and a share of the feed-forward channels. Each warp has its
 * rows of every product of its cluster, of which a layer fits into shared memory: as soon as it has used those of a product, it
 * fetches those of the next layer. What blocks wait for is only each other, six times a layer:
 *
 *     q, k, v of the cluster's heads       -> to all blocks of the cluster
 *     attention over a stretch of the keys -> to the blocks of the cluster that own the channels; joined, to all of it
 *     o, of the cluster's heads alone      -> to all blocks; the sum over clusters is added to x, which every block holds
 *     gate, up, SwiGLU                     -> to all blocks of the cluster
 *     down, of the cluster's channels      -> to all blocks
 *
 * (exchange.cuh says how.) Buffers are used anew in every layer: whoever sends the next layer's has seen what all blocks sent
 * at the end of this one, hence after they read the buffer. Sums are in fixed orders, of f32. */
#include "backend/cuda/chain.cuh"
#include "backend/cuda/cluster.cuh"
#include "backend/cuda/decode.cuh"
#include "backend/cuda/layers.cuh"
#include "backend/cuda/token.cuh"
#include "base/mem.h"

using namespace tp_token;

namespace
{

template <class M> __global__ void __launch_bounds__(ALL_THREADS, 1) layers_kernel(const __grid_constant__ params p)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    __shared__ __align__(16) small s;
    thread<M> t = {p, s, (int)blockIdx.x / MEMBERS, (int)blockIdx.x % MEMBERS, (int)threadIdx.x / 32, (int)threadIdx.x % 32};
    if (threadIdx.x == 0) {
        tp_exchange::open(&s.fresh, 1);
        tp_exchange::open(&s.stretches, 1);
        tp_exchange::open(&s.mixed, 1);
        tp_exchange::open(&s.active, 1);
        for (int i = 0; i < PRODUCTS; i++) {
            tp_exchange::open(&s.full[i], FETCHERS * 32);
            tp_exchange::open(&s.empty[i], WARPS);
        }
        tp_exchange::opened();
        s.progress = 0;
    }
    const uint64_t *table = reinterpret_cast<const uint64_t *>(p.layers);
    for (int i = threadIdx.x; i < p.n_layers * (int)(sizeof(layer) / 8); i += (int)blockDim.x)
        room<uint64_t>(M::TABLE)[i] = __ldg(table + i);
    if (t.warp < WARPS) t.open();
    __syncthreads();
    tp_chain_begin();
    tp_cluster::meet(); /* before anyone sends */
    if (t.warp >= WARPS + FETCHERS) {
        t.prefetch_all();
    } else if (t.warp >= WARPS) {
        t.fetch_all();
    } else {
        tp_chain_wait();
        t.compute();
    }
#else
    (void)p;
#endif
}

/* ---- models that there is a kernel for ---- */

struct kernel {
    int64_t hidden, heads, kv_heads, head_dim, feed;
    int shared; /* without the table of layers */
    void (*run)(params);
};

template <int HIDDEN, int HEADS, int KV_HEADS, int DIM, int FEED> constexpr kernel kernel_of()
{
    using M = sizes<HIDDEN, HEADS / KV_HEADS, DIM, FEED / KV_HEADS, KV_HEADS>;
    return {HIDDEN, HEADS, KV_HEADS, DIM, FEED, M::TABLE, layers_kernel<M>};
}

const kernel kernels[] = {kernel_of<576, 9, 3, 64, 1536>() /* SmolLM2 135M */};

} // namespace

struct tp_layers {
    params p;
    const kernel *k;
    size_t shared, bytes;
    void *memory; /* device: the table, the mail, the tags */
};

namespace
{

/* ---- what fits ---- */

bool is_plain(const tp_matrix *w)
{
    return w->format == TP_FORMAT_BF16 && !w->transposed && tp_matrix_aligned(w);
}

bool weights_suit(const tp_layers_args *a)
{
    if (a->n_layers < 1 || a->x.dtype != TP_BF16 || !tp_pointer_aligned(a->x.data) || !is_plain(&a->embedding) ||
        a->embedding.rope_pairs > 0)
        return false;
    for (int l = 0; l < a->n_layers; l++) {
        const tp_layers_block *b = &a->blocks[l];
        for (int i = 0; i < TP_LAYERS_LINEARS; i++) {
            const tp_matrix *w = &b->w[i], *first = &a->blocks[0].w[i];
            if (!is_plain(w) || w->rope_pairs != first->rope_pairs || tp_matrix_row_bytes(w) != tp_matrix_row_bytes(first) ||
                w->rows * tp_matrix_row_bytes(w) > UINT32_MAX)
                return false;
        }
        const tp_rows *caches[] = {&b->cache_k, &b->cache_v};
        for (const tp_rows *rows : caches)
            if (rows->dtype != TP_BF16 || rows->ld > INT32_MAX || !tp_rows_aligned(*rows) ||
                rows->ld != a->blocks[0].cache_k.ld)
                return false;
        if (!tp_pointer_aligned(b->norm1) || !tp_pointer_aligned(b->norm2)) return false;
    }
    return true;
}

const kernel *kernel_for(const tp_layers_args *a)
{
    for (const kernel &k : kernels)
        if (a->hidden == k.hidden && a->heads == k.heads && a->kv_heads == k.kv_heads && a->head_dim == k.head_dim &&
            a->feed == k.feed)
            return &k;
    return NULL;
}

void configure(tp_ctx *ctx, const tp_layers *layers, cudaLaunchConfig_t *config, cudaLaunchAttribute attributes[2])
{
    *config = {};
    attributes[0] = {}, attributes[1] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = MEMBERS, attributes[0].val.clusterDim.y = 1, attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config->gridDim = dim3((unsigned)layers->k->kv_heads * MEMBERS), config->blockDim = dim3(ALL_THREADS);
    config->dynamicSmemBytes = layers->shared, config->stream = tp_cuda_of(ctx)->stream;
    config->attrs = attributes, config->numAttrs = 2;
}

/* Whether all clusters can run at once. */
tp_status fits(tp_ctx *ctx, const tp_layers *layers, bool *yes)
{
    cudaLaunchConfig_t config;
    cudaLaunchAttribute attributes[2];
    int clusters = 0;
    *yes = false;
    if (layers->shared > SHARED_MOST - 2048) return TP_OK; /* a kernel's own, and what the GPU keeps */
    configure(ctx, layers, &config, attributes);
    config.numAttrs = 1;
    TP_TRY(tp_cuda_check(
        ctx, "layers", cudaFuncSetAttribute((const void *)layers->k->run, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)));
    TP_TRY(tp_cuda_check(
        ctx, "layers",
        cudaFuncSetAttribute((const void *)layers->k->run, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)layers->shared)));
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, (const void *)layers->k->run, &config);
    if (error != cudaSuccess) (void)cudaGetLastError();
    *yes = error == cudaSuccess && clusters >= layers->k->kv_heads;
    return TP_OK;
}

params params_of(const tp_layers_args *a)
{
    params p = {};
    p.n_layers = a->n_layers;
    for (int i = 0; i < TP_LAYERS_LINEARS; i++) {
        p.row_bytes[i] = (uint32_t)tp_matrix_row_bytes(&a->blocks[0].w[i]);
        p.rope_pairs[i] = a->blocks[0].w[i].rope_pairs;
    }
    p.cache_ld = (int)a->blocks[0].cache_k.ld;
    p.x = (__nv_bfloat16 *)a->x.data;
    p.embedding = (const unsigned char *)a->embedding.data, p.embedding_bytes = (uint32_t)tp_matrix_row_bytes(&a->embedding);
    p.later = (const unsigned char *)a->later, p.later_bytes = tp_cuda_min((int64_t)a->later_bytes, LATER_BYTES);
    p.eps = a->eps, p.scale = a->scale, p.inv_freq = a->inv_freq, p.factor = a->factor, p.id = a->id, p.used = a->used;
    return p;
}

/* The table to the device, behind which there is room for mail and tags. */
tp_status fill(tp_ctx *ctx, const tp_layers_args *a, tp_layers *layers)
{
    const tp_backend *backend = ctx->device->backend;
    const size_t table = sizeof(layer) * (size_t)a->n_layers, mail = (size_t)(2 * a->kv_heads * a->hidden) * 8;
    const size_t before = (table + 255) / 256 * 256;
    layers->bytes = before + mail + 256;
    layer *host = (layer *)tp_alloc(ctx, (size_t)a->n_layers, sizeof *host);
    if (host == NULL) return TP_NOMEM;
    for (int l = 0; l < a->n_layers; l++) {
        const tp_layers_block *b = &a->blocks[l];
        for (int i = 0; i < TP_LAYERS_LINEARS; i++) host[l].w[i] = (const unsigned char *)b->w[i].data;
        host[l].norm1 = b->norm1, host[l].norm2 = b->norm2;
        host[l].cache_k = (__nv_bfloat16 *)b->cache_k.data, host[l].cache_v = (__nv_bfloat16 *)b->cache_v.data;
    }
    layers->memory = backend->alloc(ctx, ctx->device, layers->bytes);
    tp_status status = layers->memory == NULL ? TP_NOMEM : backend->copy_in(ctx, layers->memory, host, table);
    tp_free(host);
    layers->p.layers = (const layer *)layers->memory;
    layers->p.mail = (uint64_t *)((char *)layers->memory + before);
    layers->p.tags = (uint32_t *)((char *)layers->memory + before + mail);
    return status;
}

} // namespace

extern "C" tp_status tp_cuda_layers_open(tp_ctx *ctx, const tp_layers_args *a, tp_layers **result)
{
    const kernel *k = kernel_for(a);
    *result = NULL;
    if (!tp_cuda_of(ctx)->clusters || k == NULL || !weights_suit(a)) return TP_OK;
    tp_layers *layers = (tp_layers *)tp_alloc(ctx, 1, sizeof *layers);
    if (layers == NULL) return TP_NOMEM;
    *layers = {};
    layers->p = params_of(a), layers->k = k, layers->shared = (size_t)k->shared + sizeof(layer) * (size_t)a->n_layers;
    bool yes = false;
    tp_status status = fits(ctx, layers, &yes);
    if (status == TP_OK && yes) status = fill(ctx, a, layers);
    if (status == TP_OK && yes)
        *result = layers;
    else
        tp_cuda_layers_close(ctx->device, layers);
    return status;
}

extern "C" tp_status tp_cuda_layers_run(tp_ctx *ctx, tp_layers *layers)
{
    cudaLaunchConfig_t config;
    cudaLaunchAttribute attributes[2];
    configure(ctx, layers, &config, attributes);
    return tp_cuda_check(ctx, "layers", cudaLaunchKernelEx(&config, layers->k->run, layers->p));
}

extern "C" void tp_cuda_layers_close(tp_device *device, tp_layers *layers)
{
    if (layers == NULL) return;
    if (layers->memory != NULL) device->backend->free(device, layers->memory, layers->bytes);
    tp_free(layers);
}
