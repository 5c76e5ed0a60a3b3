/* The dry device: no memory and no work, only counts. A training step that runs on it touches no data, but allocates,
 * frees and calls kernels as the real one would; so its pool's peak is the real peak, and the FLOPs and bytes counted here
 * give the least time that the step can take.
 *
 * FLOPs are those of products, two per multiplication and addition, by the precision they run in; attention counts the
 * pairs of query and key that the mask leaves, and its gradient five products where forward has two. Bytes are what a
 * kernel must read and write if each array passes through once. */
#include <unistd.h>

#include "backend/backend.h"
#include "backend/lowrank.h"
#include "base/mem.h"

typedef struct dry_device {
    tp_device device;
    uint64_t next; /* address of the next allocation */
    tp_attention_size attention;
    int64_t calls;
} dry_device;

/* Nothing is mapped here on any system we know, so a kernel that reads by mistake is caught at once. */
#define FIRST_ADDRESS ((uint64_t)1 << 40)
#define ALIGNMENT     256

static tp_status dry_open(tp_ctx *ctx, int index, int threads, tp_device **device)
{
    *device = NULL;
    if (index != 0) return tp_fail(ctx, TP_DEVICE, "dry:%d: there is one dry device, dry", index);
    dry_device *dry = tp_alloc(ctx, 1, sizeof *dry);
    if (dry == NULL) return TP_NOMEM;
    long pages = sysconf(_SC_PHYS_PAGES), page_bytes = sysconf(_SC_PAGESIZE);
    dry->device.backend = &tp_dry_backend;
    dry->device.auto_precision = TP_F32;
    dry->device.threads = threads > 0 ? threads : 1;
    dry->device.memory_bytes = pages > 0 && page_bytes > 0 ? (uint64_t)pages * (uint64_t)page_bytes : 0;
    dry->next = FIRST_ADDRESS;
    *device = &dry->device;
    return TP_OK;
}

static void dry_close(tp_device *device)
{
    tp_free(device);
}

static void *dry_alloc(tp_ctx *ctx, tp_device *device, size_t bytes)
{
    dry_device *dry = (dry_device *)device;
    uint64_t end, address = dry->next;
    if (__builtin_add_overflow(address, (uint64_t)bytes, &end) || end > UINT64_MAX - ALIGNMENT || end > UINTPTR_MAX) {
        tp_fail(ctx, TP_NOMEM, "dry: no addresses left for %zu bytes", bytes);
        return NULL;
    }
    dry->next = (end + ALIGNMENT) / ALIGNMENT * ALIGNMENT; /* always on, so that no two allocations have one address */
    return (void *)(uintptr_t)address;
}

static void dry_free(tp_device *device, void *memory, size_t bytes)
{
    (void)device, (void)memory, (void)bytes;
}

static tp_status dry_copy_in(tp_ctx *ctx, void *device_memory, const void *host, size_t bytes)
{
    (void)ctx, (void)device_memory, (void)host, (void)bytes;
    return TP_OK;
}

static tp_status dry_copy_out(tp_ctx *ctx, void *host, const void *device_memory, size_t bytes)
{
    (void)ctx, (void)host, (void)device_memory, (void)bytes;
    return TP_OK;
}

static tp_status dry_zero(tp_ctx *ctx, void *device_memory, size_t bytes)
{
    (void)ctx, (void)device_memory, (void)bytes;
    return TP_OK;
}

static tp_status dry_sync(tp_ctx *ctx)
{
    (void)ctx;
    return TP_OK;
}

static tp_status dry_copy_beside(tp_ctx *ctx, void *to, const void *from, size_t bytes, int *ticket)
{
    (void)ctx, (void)to, (void)from, (void)bytes;
    *ticket = 0;
    return TP_OK;
}

static tp_status dry_wait_beside(tp_ctx *ctx, int ticket)
{
    (void)ctx, (void)ticket;
    return TP_OK;
}

static void dry_describe(tp_device *device, tp_buf *json)
{
    tp_buf_printf(json, "\"model\": \"none: counts only\", \"memory_bytes\": %llu", (unsigned long long)device->memory_bytes);
}

/* ------------------------------------------------------------------------------------------------------- counting */

static tp_status count(tp_ctx *ctx, tp_dtype precision, double flops, double bytes)
{
    ctx->device->flops[precision != TP_F32] += flops;
    ctx->device->bytes_moved += bytes;
    ((dry_device *)ctx->device)->calls++;
    return TP_OK;
}

static tp_status count_bytes(tp_ctx *ctx, double bytes)
{
    return count(ctx, TP_F32, 0, bytes);
}

static double bytes_of(tp_rows x, int64_t n, int64_t columns)
{
    return (double)n * (double)columns * (double)tp_dtype_bytes(x.dtype);
}

static double floats(int64_t n)
{
    return 4.0 * (double)n;
}

static double matrix_bytes(const tp_matrix *w)
{
    int64_t rows = w->transposed ? w->cols : w->rows, columns = w->transposed ? w->rows : w->cols;
    return (double)rows * (double)tp_format_row_bytes(w->format, columns);
}

static tp_status count_product(tp_ctx *ctx, const tp_matmul_args *a)
{
    double bytes = bytes_of(a->a, a->n, a->k) + matrix_bytes(&a->b) + bytes_of(a->c, a->n, a->m);
    if (a->beta != 0.0f) bytes += bytes_of(a->c, a->n, a->m);
    if (a->residual != NULL) bytes += bytes_of(a->c, a->n, a->m);
    if (a->bias != NULL) bytes += floats(a->m);
    return count(ctx, a->precision, 2.0 * (double)a->n * (double)a->m * (double)a->k, bytes);
}

static tp_status dry_matmul(tp_ctx *ctx, const void *args)
{
    const tp_matmul_args *a = args;
    if (a->lowrank == NULL) return count_product(ctx, a);
    tp_matmul_args parts[TP_LOWRANK_PARTS];
    int n = tp_lowrank_split(a, parts);
    for (int i = 0; i < n; i++) TP_TRY(count_product(ctx, &parts[i]));
    return TP_OK;
}

/* Its c is f32 and its sums are exact: f32 unless both sides have 16 bits to begin with. */
static tp_status dry_matmul_tn(tp_ctx *ctx, const void *args)
{
    const tp_matmul_tn_args *a = args;
    bool narrow = a->a.dtype != TP_F32 && a->b.dtype != TP_F32;
    double bytes = bytes_of(a->a, a->n, a->m) + bytes_of(a->b, a->n, a->k) + floats(a->m * a->k) * (a->beta != 0.0f ? 2 : 1);
    return count(ctx, narrow ? TP_BF16 : TP_F32, 2.0 * (double)a->n * (double)a->m * (double)a->k, bytes);
}

static tp_status dry_pack_lowrank(tp_ctx *ctx, const void *args)
{
    const tp_pack_lowrank_args *a = args;
    return count_bytes(ctx, (floats(1) + (double)tp_dtype_bytes(a->w.dtype)) * (double)a->used * (double)(a->out + a->in));
}

static tp_status dry_lowrank_backward(tp_ctx *ctx, const void *args)
{
    const tp_lowrank_backward_args *a = args;
    for (int i = 0; i < TP_PACKED_PARTS; i++) {
        if (a->rank[i] <= 0) continue;
        double products = a->db[i] != NULL ? 2 : 1;
        double factors = 2 * bytes_of(a->u, a->n, a->rank[i]) + bytes_of(a->b, a->rows[i], a->rank[i]);
        double sums = a->db[i] != NULL ? 2 * floats(a->rows[i] * a->rank[i]) : 0;
        TP_TRY(count(ctx, a->dy.dtype, 2 * products * (double)a->n * (double)a->rows[i] * (double)a->rank[i],
                     bytes_of(a->dy, a->n, a->rows[i]) + factors + sums));
    }
    return TP_OK;
}

static tp_status dry_swiglu_factors(tp_ctx *ctx, const void *args)
{
    return tp_swiglu_factors_apart(ctx, args);
}

/* With masks, x or dx passes once for all parts. */
static tp_status dry_dropped(tp_ctx *ctx, const tp_dropped_args *a, bool reads_x, bool reads_and_writes_dx)
{
    int64_t used = 0, parts = 0;
    for (int i = 0; i < TP_PACKED_PARTS; i++) used += a->rank[i], parts += a->rank[i] > 0;
    double bytes = (reads_x ? bytes_of(a->x, a->n, a->in) : 0) + (reads_and_writes_dx ? 2 * bytes_of(a->dx, a->n, a->in) : 0);
    bytes += bytes_of(a->low, a->n, used) + bytes_of(a->a, used, a->in) + (double)(a->n * parts) * (double)a->in / 8;
    return count(ctx, a->low.dtype, 2 * (double)a->n * (double)a->in * (double)used, bytes);
}

static tp_status dry_dropped_down(tp_ctx *ctx, const void *args)
{
    const tp_dropped_args *a = args;
    return a->masks != NULL ? dry_dropped(ctx, a, true, false) : tp_dropped_down_apart(ctx, a);
}

static tp_status dry_dropped_gradient(tp_ctx *ctx, const void *args)
{
    const tp_dropped_args *a = args;
    return a->masks != NULL ? dry_dropped(ctx, a, true, false) : tp_dropped_gradient_apart(ctx, a);
}

static tp_status dry_dropped_up(tp_ctx *ctx, const void *args)
{
    const tp_dropped_args *a = args;
    return a->masks != NULL ? dry_dropped(ctx, a, false, true) : tp_dropped_up_apart(ctx, a);
}

static tp_status dry_column_sum(tp_ctx *ctx, const void *args)
{
    const tp_column_sum_args *a = args;
    return count_bytes(ctx, bytes_of(a->a, a->n, a->m) + floats(a->m) * (a->beta != 0.0f ? 2 : 1));
}

static tp_status dry_embedding(tp_ctx *ctx, const void *args)
{
    const tp_embedding_args *a = args;
    double row = a->table.rows > 0 ? matrix_bytes(&a->table) / (double)a->table.rows : 0;
    return count_bytes(ctx, (double)a->n * (4 + row) + bytes_of(a->out, a->n, a->table.cols) * (a->accumulate ? 2 : 1));
}

static tp_status dry_embedding_backward(tp_ctx *ctx, const void *args)
{
    const tp_embedding_backward_args *a = args;
    return count_bytes(ctx, floats(a->n) + bytes_of(a->dout, a->n, a->dim) + 2 * floats(a->n * a->dim));
}

static tp_status dry_gather_rows(tp_ctx *ctx, const void *args)
{
    const tp_gather_rows_args *a = args;
    return count_bytes(ctx, floats(a->n) + bytes_of(a->in, a->n, a->dim) + bytes_of(a->out, a->n, a->dim));
}

static tp_status dry_scatter_rows(tp_ctx *ctx, const void *args)
{
    const tp_scatter_rows_args *a = args;
    int64_t written = a->zero_rest ? a->rows : a->n;
    return count_bytes(ctx, floats(a->n) + bytes_of(a->in, a->n, a->dim) + bytes_of(a->out, written, a->dim));
}

static tp_status dry_rmsnorm(tp_ctx *ctx, const void *args)
{
    const tp_rmsnorm_args *a = args;
    return count_bytes(ctx, bytes_of(a->x, a->n, a->dim) + bytes_of(a->y, a->n, a->dim) + floats(a->dim + a->n));
}

static tp_status dry_rmsnorm_backward(tp_ctx *ctx, const void *args)
{
    const tp_rmsnorm_backward_args *a = args;
    double bytes =
        bytes_of(a->x, a->n, a->dim) + bytes_of(a->dy, a->n, a->dim) + bytes_of(a->dx, a->n, a->dim) * (a->accumulate ? 2 : 1);
    return count_bytes(ctx, bytes + floats(a->dim + a->n) + (a->dweight != NULL ? 2 * floats(a->dim) : 0));
}

static tp_status dry_layernorm(tp_ctx *ctx, const void *args)
{
    const tp_layernorm_args *a = args;
    return count_bytes(ctx, bytes_of(a->x, a->n, a->dim) + bytes_of(a->y, a->n, a->dim) + floats(2 * a->dim + 2 * a->n));
}

static tp_status dry_layernorm_backward(tp_ctx *ctx, const void *args)
{
    const tp_layernorm_backward_args *a = args;
    double bytes =
        bytes_of(a->x, a->n, a->dim) + bytes_of(a->dy, a->n, a->dim) + bytes_of(a->dx, a->n, a->dim) * (a->accumulate ? 2 : 1);
    int sums = (a->dweight != NULL) + (a->dbias != NULL);
    return count_bytes(ctx, bytes + floats(a->dim + 2 * a->n) + 2 * sums * floats(a->dim));
}

static tp_status dry_rope_table(tp_ctx *ctx, const void *args)
{
    const tp_rope_table_args *a = args;
    return count_bytes(ctx, floats(a->n + a->half + 2 * a->n * a->half));
}

static tp_status dry_rope(tp_ctx *ctx, const void *args)
{
    const tp_rope_args *a = args;
    return count_bytes(ctx, 2 * bytes_of(a->x, a->n, a->heads * 2 * a->half) + floats(2 * a->n * a->half));
}

/* Sum of clamp(x, 0, limit) over all integers x < z. */
static double clamped_sum(double z, double limit)
{
    if (z <= 0) return 0;
    if (z <= limit + 1) return z * (z - 1) / 2;
    return limit * (limit + 1) / 2 + (z - limit - 1) * limit;
}

/* Pairs of query and key that the mask leaves in a segment: what the diagonal leaves, less what the window cuts off. */
static double visible_pairs(const tp_attention_args *a, const tp_segment *s)
{
    double n = (double)s->q_len, keys = (double)s->k_len, diagonal = keys - n;
    double seen = a->causal ? clamped_sum(n + diagonal + 1, keys) - clamped_sum(diagonal + 1, keys) : n * keys;
    if (a->window > 0) {
        double cut = diagonal - (double)a->window + 1;
        seen -= clamped_sum(n + cut, keys) - clamped_sum(cut, keys);
    }
    return seen + n * (double)a->n_prefix;
}

static double attention_flops(const tp_attention_args *a)
{
    double pairs = 0;
    for (int64_t s = 0; s < a->n_segments; s++) pairs += visible_pairs(a, &a->segments[s]);
    return 4 * pairs * (double)(a->heads * a->head_dim);
}

/* q, k, v, out, of which keys count once however many queries read them. */
static double attention_bytes(const tp_attention_args *a)
{
    int64_t keys = a->n_prefix;
    for (int64_t s = 0; s < a->n_segments; s++) keys += a->segments[s].k_len;
    return 2 * bytes_of(a->q, a->n_q, a->heads * a->head_dim) + 2 * bytes_of(a->k, keys, a->kv_heads * a->head_dim);
}

static tp_status dry_attention(tp_ctx *ctx, const void *args)
{
    const tp_attention_args *a = args;
    double lse = a->lse != NULL ? floats(a->n_q * a->heads) : 0;
    return count(ctx, a->q.dtype, attention_flops(a), attention_bytes(a) + lse);
}

static double scores(const tp_attention_size *size)
{
    return (double)(size->sequences * size->heads) * (double)size->length * (double)size->length;
}

/* Remembers the largest one of sequences of one length. */
static void note_size(dry_device *dry, const tp_attention_args *a)
{
    if (a->q.dtype == TP_F32 || a->n_segments < 1 || a->n_prefix > 0 || a->window > 0) return;
    for (int64_t s = 0; s < a->n_segments; s++) {
        if (a->segments[s].q_len != a->segments[0].q_len || a->segments[s].k_len != a->segments[0].q_len) return;
    }
    const tp_attention_size size = {a->n_segments, a->segments[0].q_len, a->heads, a->head_dim};
    if (scores(&size) > scores(&dry->attention)) dry->attention = size;
}

tp_attention_size tp_dry_attention_size(tp_device *device)
{
    dry_device *dry = (dry_device *)device;
    const tp_attention_size size = dry->attention;
    dry->attention = (tp_attention_size){0};
    return size;
}

int64_t tp_dry_calls(tp_device *device)
{
    dry_device *dry = (dry_device *)device;
    const int64_t calls = dry->calls;
    dry->calls = 0;
    return calls;
}

static tp_status dry_attention_backward(tp_ctx *ctx, const void *args)
{
    const tp_attention_backward_args *b = args;
    const tp_attention_args *a = &b->forward;
    note_size((dry_device *)ctx->device, a);
    double bytes = attention_bytes(a) + 2 * bytes_of(b->dq, a->n_q, a->heads * a->head_dim);
    bytes += 2 * bytes_of(b->dk, b->n_k, a->kv_heads * a->head_dim) + 3 * floats(a->n_q * a->heads);
    return count(ctx, a->q.dtype, 2.5 * attention_flops(a), bytes);
}

static tp_status dry_swiglu(tp_ctx *ctx, const void *args)
{
    const tp_swiglu_args *a = args;
    return count_bytes(ctx, 3 * bytes_of(a->y, a->n, a->dim));
}

static tp_status dry_swiglu_backward(tp_ctx *ctx, const void *args)
{
    const tp_swiglu_backward_args *a = args;
    return count_bytes(ctx, 5 * bytes_of(a->dy, a->n, a->dim));
}

static tp_status dry_gelu(tp_ctx *ctx, const void *args)
{
    const tp_gelu_args *a = args;
    return count_bytes(ctx, 2 * bytes_of(a->x, a->n, a->dim));
}

static tp_status dry_gelu_backward(tp_ctx *ctx, const void *args)
{
    const tp_gelu_backward_args *a = args;
    return count_bytes(ctx, 3 * bytes_of(a->x, a->n, a->dim));
}

static tp_status dry_add(tp_ctx *ctx, const void *args)
{
    const tp_add_args *a = args;
    return count_bytes(ctx, bytes_of(a->x, a->n, a->dim) + bytes_of(a->y, a->n, a->dim) + bytes_of(a->z, a->n, a->dim));
}

static tp_status dry_scale(tp_ctx *ctx, const void *args)
{
    const tp_scale_args *a = args;
    return count_bytes(ctx, (a->alpha != 0.0f ? bytes_of(a->x, a->n, a->dim) : 0) + bytes_of(a->y, a->n, a->dim));
}

static tp_status dry_dropout(tp_ctx *ctx, const void *args)
{
    const tp_dropout_args *a = args;
    return count_bytes(ctx, bytes_of(a->x, a->n, a->dim) + bytes_of(a->y, a->n, a->dim) * (a->accumulate ? 2 : 1));
}

static tp_status dry_cross_entropy(tp_ctx *ctx, const void *args)
{
    const tp_cross_entropy_args *a = args;
    double gradient = a->want_grad ? (a->narrow ? 0.5 : 1) * floats(a->n * a->vocab) : 0;
    return count_bytes(ctx, floats(a->n * a->vocab) + gradient + floats(2 * a->n));
}

static tp_status dry_add_loss(tp_ctx *ctx, const void *args)
{
    (void)args;
    return count_bytes(ctx, 2 * floats(1));
}

static tp_status dry_grad_norm(tp_ctx *ctx, const void *args)
{
    const tp_grad_norm_args *a = args;
    return count_bytes(ctx, floats(a->n));
}

static tp_status dry_adamw(tp_ctx *ctx, const void *args)
{
    const tp_adamw_args *a = args;
    return count_bytes(ctx, 7 * floats(a->n));
}

static tp_status dry_sgd(tp_ctx *ctx, const void *args)
{
    const tp_sgd_args *a = args;
    return count_bytes(ctx, (a->momentum != 0.0f ? 5 : 3) * floats(a->n));
}

static tp_status dry_linears(tp_ctx *ctx, const void *args)
{
    const tp_linears_args *a = args;
    for (int i = 0; i < a->n_parts; i++) {
        const tp_linears_part *part = &a->parts[i];
        tp_matmul_args product = {.n = a->n, .m = part->w.rows, .k = a->k, .a = a->x, .b = part->w, .nt = true, .c = part->y};
        product.precision = a->precision;
        product.lowrank = part->lowrank;
        TP_TRY(dry_matmul(ctx, &product));
    }
    return TP_OK;
}

/* How many keys there are is only known on the device: those of full sequences are counted. */
static tp_status dry_attend(tp_ctx *ctx, const void *args)
{
    const tp_attend_args *a = args;
    int64_t keys = a->window > 0 && a->window < a->capacity ? a->window : a->capacity;
    double width = (double)a->head_dim * (double)a->heads, bytes = 2 * bytes_of(a->q, a->n, a->heads * a->head_dim);
    bytes += 2 * bytes_of(a->cache_k, a->n * keys, a->kv_heads * a->head_dim);
    return count(ctx, a->q.dtype, 4 * (double)a->n * (double)keys * width, bytes);
}

static tp_status dry_sample(tp_ctx *ctx, const void *args)
{
    const tp_sample_args *a = args;
    return count_bytes(ctx, floats(a->n * a->vocab));
}

const tp_backend tp_dry_backend = {
    .name = "dry",
    .computes = false,
    .open = dry_open,
    .close = dry_close,
    .alloc = dry_alloc,
    .free = dry_free,
    .copy_in = dry_copy_in,
    .copy_out = dry_copy_out,
    .zero = dry_zero,
    .sync = dry_sync,
    .host_alloc = dry_alloc,
    .host_free = dry_free,
    .copy_beside = dry_copy_beside,
    .wait_beside = dry_wait_beside,
    .describe = dry_describe,
    .kernels =
        {
#define TP_KERNEL(name, args) dry_##name,
#include "backend/kernels.def"
#undef TP_KERNEL
        },
};
