/* All layers of one token in one kernel: decoding with a model so small that the kernels of a layer cost more to start than
 * to run.
 *
 * A cluster of MEMBERS blocks is a key head with its query heads, and a share of the feed-forward channels. Each warp has its
 * rows of every product of its cluster, of which a layer fits into shared memory: as soon as it has used those of a product, it
 * fetches those of the next layer. What blocks wait for is only each other, five times a layer:
 *
 *     q, k, v of the cluster's heads       -> to all blocks of the cluster
 *     attention over a stretch of the keys -> to all blocks of the cluster, which join what comes
 *     o, of the cluster's heads alone      -> to all blocks; the sum over clusters is added to x, which every block holds
 *     gate, up, SwiGLU                     -> to all blocks of the cluster
 *     down, of the cluster's channels      -> to all blocks
 *
 * (exchange.cuh says how.) Buffers are used anew in every layer: whoever sends the next layer's has seen what all blocks sent
 * at the end of this one, hence after they read the buffer. Sums are in fixed orders, of f32. */
#include "backend/cuda/adapter.cuh"
#include "backend/cuda/chain.cuh"
#include "backend/cuda/cluster.cuh"
#include "backend/cuda/decode.cuh"
#include "backend/cuda/layers.cuh"
#include "base/mem.h"

using namespace tp_token;

namespace
{

template <class M> __global__ void __launch_bounds__(ALL_WARPS * 32, 1) layers_kernel(const __grid_constant__ params p)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    __shared__ __align__(16) small s;
    thread<M> t = {p, s, (int)blockIdx.x / MEMBERS, (int)blockIdx.x % MEMBERS, (int)threadIdx.x / 32, (int)threadIdx.x % 32};
    if (threadIdx.x == 0) {
        tp_exchange::open(&s.fresh, 1);
        tp_exchange::open(&s.stretches, 1);
        tp_exchange::open(&s.active, 1);
        for (int i = 0; i < PRODUCTS; i++) {
            tp_exchange::open(&s.full[i], M::FETCHERS * 32);
            tp_exchange::open(&s.empty[i], WARPS);
            tp_exchange::open(&s.low[i], 1);
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
    if (t.warp >= ALL_WARPS - M::ADAPTERS) {
        if constexpr (M::ADAPTERS > 0) adapter<M>{t, p, s, t.warp - (ALL_WARPS - M::ADAPTERS), t.lane}.run();
    } else if (t.warp >= WARPS + M::FETCHERS) {
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
    int64_t hidden, heads, kv_heads, head_dim, feed, rank;
    int shared;   /* without the table of layers */
    int adapters; /* values of a layer's */
    void (*run)(params);
    void (*pack)(const factors *, __nv_bfloat16 *);
};

template <int HIDDEN, int HEADS, int KV_HEADS, int DIM, int FEED, int RANK> constexpr kernel kernel_of()
{
    using M = sizes<HIDDEN, HEADS / KV_HEADS, DIM, FEED / KV_HEADS, KV_HEADS, RANK>;
    return {HIDDEN, HEADS, KV_HEADS, DIM, FEED, RANK, M::TABLE, M::up_at(TP_LAYERS_LINEARS), layers_kernel<M>, pack_kernel<M>};
}

/* Lower ranks first. */
const kernel kernels[] = {kernel_of<576, 9, 3, 64, 1536, 0>() /* SmolLM2 135M */, kernel_of<576, 9, 3, 64, 1536, 16>(),
                          kernel_of<576, 9, 3, 64, 1536, 32>(), kernel_of<576, 9, 3, 64, 1536, 64>()};

} // namespace

struct tp_layers {
    params p;
    const kernel *k;
    size_t shared, bytes;
    void *memory; /* device: the table, the mail, the tags, adapters and where they come from */
};

namespace
{

/* ---- what fits ---- */

bool is_plain(const tp_matrix *w)
{
    return w->format == TP_FORMAT_BF16 && !w->transposed && tp_matrix_aligned(w);
}

bool is_factor(const tp_matrix *w)
{
    return (w->format == TP_FORMAT_BF16 || w->format == TP_FORMAT_F32) && !w->transposed && w->rope_pairs == 0;
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
            if (b->lora[i].rank > 0 && (!is_factor(&b->lora[i].down) || !is_factor(&b->lora[i].up))) return false;
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

int64_t rank_of(const tp_layers_args *a)
{
    int64_t rank = 0;
    for (int l = 0; l < a->n_layers; l++)
        for (const tp_layers_lora &lora : a->blocks[l].lora) rank = lora.rank > rank ? lora.rank : rank;
    return rank;
}

const kernel *kernel_for(const tp_layers_args *a)
{
    const int64_t rank = rank_of(a);
    for (const kernel &k : kernels)
        if (a->hidden == k.hidden && a->heads == k.heads && a->kv_heads == k.kv_heads && a->head_dim == k.head_dim &&
            a->feed == k.feed && rank <= k.rank)
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
    config->gridDim = dim3((unsigned)layers->k->kv_heads * MEMBERS), config->blockDim = dim3(ALL_WARPS * 32);
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
    for (int l = 0; l < a->n_layers; l++)
        for (int i = 0; i < PRODUCTS; i++)
            for (int j = 0; j < linears_of(i); j++)
                if (a->blocks[l].lora[first_linear(i) + j].rank > 0) p.adapted |= 1u << i;
    p.eps = a->eps, p.scale = a->scale, p.inv_freq = a->inv_freq, p.factor = a->factor, p.id = a->id, p.used = a->used;
    return p;
}

layer layer_of(const tp_layers_block *b)
{
    layer to = {};
    for (int i = 0; i < TP_LAYERS_LINEARS; i++) {
        to.w[i] = (const unsigned char *)b->w[i].data;
        to.scaling[i] = b->lora[i].scaling;
    }
    to.norm1 = b->norm1, to.norm2 = b->norm2;
    to.cache_k = (__nv_bfloat16 *)b->cache_k.data, to.cache_v = (__nv_bfloat16 *)b->cache_v.data;
    return to;
}

factors factors_of(const tp_layers_lora *lora)
{
    factors to = {};
    if (lora->rank <= 0) return to;
    to.rank = (int)lora->rank;
    to.down = (const unsigned char *)lora->down.data, to.up = (const unsigned char *)lora->up.data;
    to.down_bf16 = lora->down.format == TP_FORMAT_BF16, to.up_bf16 = lora->up.format == TP_FORMAT_BF16;
    to.down_ld = tp_matrix_row_bytes(&lora->down) / (to.down_bf16 ? 2 : 4);
    to.up_ld = tp_matrix_row_bytes(&lora->up) / (to.up_bf16 ? 2 : 4);
    return to;
}

size_t area(size_t *end, size_t bytes)
{
    const size_t at = *end;
    *end = at + (bytes + 255) / 256 * 256;
    return at;
}

/* The table to the device, behind which there is room for mail and tags; adapters to where the table says that they are. */
tp_status fill(tp_ctx *ctx, const tp_layers_args *a, tp_layers *layers)
{
    const tp_backend *backend = ctx->device->backend;
    const size_t n = (size_t)a->n_layers, n_factors = layers->k->rank > 0 ? n * TP_LAYERS_LINEARS : 0;
    const size_t of_layer = layers->k->rank > 0 ? (size_t)layers->k->adapters * sizeof(__nv_bfloat16) : 0;
    const size_t table = area(&layers->bytes, n * sizeof(layer)), from = area(&layers->bytes, n_factors * sizeof(factors));
    const size_t mail = area(&layers->bytes, (size_t)(a->kv_heads * a->hidden) * 8), tags = area(&layers->bytes, 4);
    const size_t adapters = area(&layers->bytes, n * of_layer);
    unsigned char *host = (unsigned char *)tp_alloc(ctx, mail, 1);
    if (host == NULL) return TP_NOMEM;
    layers->memory = backend->alloc(ctx, ctx->device, layers->bytes);
    unsigned char *memory = (unsigned char *)layers->memory;
    for (size_t l = 0; l < n && memory != NULL; l++) {
        const tp_layers_block *b = &a->blocks[l];
        layer to = layer_of(b);
        to.adapters = (const __nv_bfloat16 *)(memory + adapters + l * of_layer);
        memcpy(host + table + l * sizeof to, &to, sizeof to);
        for (size_t i = 0; i < TP_LAYERS_LINEARS && n_factors > 0; i++) {
            const factors one = factors_of(&b->lora[i]);
            memcpy(host + from + (l * TP_LAYERS_LINEARS + i) * sizeof one, &one, sizeof one);
        }
    }
    tp_status status = memory == NULL ? TP_NOMEM : backend->copy_in(ctx, memory, host, mail);
    tp_free(host);
    if (status != TP_OK) return status;
    layers->p.layers = (const layer *)(memory + table);
    layers->p.mail = (uint64_t *)(memory + mail);
    layers->p.tags = (uint32_t *)(memory + tags);
    if (n_factors == 0) return TP_OK;
    layers->k->pack<<<(unsigned)n_factors, 256, 0, tp_cuda_of(ctx)->stream>>>((const factors *)(memory + from),
                                                                              (__nv_bfloat16 *)(memory + adapters));
    TP_TRY(tp_cuda_check(ctx, "layers", cudaGetLastError()));
    return backend->sync(ctx); /* adapters may be freed now, and are read before kernels wait for each other */
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
