/* All layers of a token in one CUDA kernel against the same layers kernel by kernel on the CPU. */
#include "tests/backend/on_both.h"

#define LAYERS_MAX 3
#define IDS        7

typedef struct network {
    int64_t hidden, heads, kv_heads, head_dim, feed, capacity;
    int layers;
    int64_t rank;     /* of adapters, but for k of the first layer, which has half of it; 0: none */
    unsigned adapted; /* linears that have one, a bit each */
    tp_dtype dtype;   /* of its factors */
} network;

/* The same network on both devices. */
typedef struct side {
    tp_ctx ctx;
    void *memory[128];
    int n;
    tp_layers_block blocks[LAYERS_MAX];
    tp_rows x;
    tp_matrix embedding;
    float *inv_freq;
    int32_t *id, *used;
} side;

static void *put(side *s, const void *host, size_t bytes)
{
    void *memory = s->ctx.device->backend->alloc(&s->ctx, s->ctx.device, bytes);
    assert_non_null(memory);
    assert_ok(&s->ctx, s->ctx.device->backend->copy_in(&s->ctx, memory, host, bytes));
    assert_true(s->n < 128);
    return s->memory[s->n++] = memory;
}

static void *random_values(size_t n, tp_dtype dtype, double size, double middle)
{
    void *values = malloc(n * (dtype == TP_BF16 ? 2 : 4));
    assert_non_null(values);
    fill(values, n, dtype, size);
    for (size_t i = 0; i < n && dtype == TP_F32; i++) ((float *)values)[i] += (float)middle;
    return values;
}

/* Values of one kind at the address of a pointer in each side. */
static void on_each(side sides[2], void *cpu, void *cuda, size_t n, tp_dtype dtype, double size, double middle)
{
    void *values = random_values(n, dtype, size, middle);
    void *at[2] = {put(&sides[0], values, n * (dtype == TP_BF16 ? 2 : 4)),
                   put(&sides[1], values, n * (dtype == TP_BF16 ? 2 : 4))};
    memcpy(cpu, &at[0], sizeof(void *));
    memcpy(cuda, &at[1], sizeof(void *));
    free(values);
}

/* The adapter's part of a result is about a third as large as the weight's. */
static void new_lora(side sides[2], const network *n, int layer, int which, int64_t rows, int64_t cols)
{
    if ((n->adapted >> which & 1) == 0) return;
    int64_t rank = which == TP_LAYERS_K && layer == 0 ? n->rank / 2 : n->rank;
    void *down[2], *up[2];
    on_each(sides, &down[0], &down[1], (size_t)(rank * cols), n->dtype, sqrt(3.0 / (double)cols), 0);
    on_each(sides, &up[0], &up[1], (size_t)(rows * rank), n->dtype, sqrt(3.0 / (double)rank), 0);
    for (int i = 0; i < 2; i++)
        sides[i].blocks[layer].lora[which] =
            (tp_layers_lora){rank, 0.25f + 0.05f * (float)which, tp_matrix_dense(n->dtype, down[i], rank, cols),
                             tp_matrix_dense(n->dtype, up[i], rows, rank)};
}

static void new_weight(side sides[2], const network *n, int layer, int which, int64_t rows, int64_t cols, int64_t gap)
{
    void *data[2];
    on_each(sides, &data[0], &data[1], (size_t)(rows * (cols + gap)), TP_BF16, sqrt(3.0 / (double)cols), 0);
    for (int i = 0; i < 2; i++) {
        sides[i].blocks[layer].w[which] = tp_matrix_dense(TP_BF16, data[i], rows, cols);
        if (gap > 0) sides[i].blocks[layer].w[which].stride = cols + gap;
    }
    new_lora(sides, n, layer, which, rows, cols);
}

static void build(side sides[2], const network *n, int64_t gap)
{
    int64_t width = n->heads * n->head_dim, kv = n->kv_heads * n->head_dim;
    for (int i = 0; i < 2; i++) {
        tp_ctx_init(&sides[i].ctx);
        sides[i].ctx.device = i == 0 ? opened.cpu : opened.cuda;
        sides[i].x = (tp_rows){NULL, TP_BF16, n->hidden};
    }
    for (int l = 0; l < n->layers; l++) {
        tp_layers_block *a = &sides[0].blocks[l], *b = &sides[1].blocks[l];
        new_weight(sides, n, l, TP_LAYERS_Q, width, n->hidden, gap);
        new_weight(sides, n, l, TP_LAYERS_K, kv, n->hidden, gap);
        new_weight(sides, n, l, TP_LAYERS_V, kv, n->hidden, gap);
        new_weight(sides, n, l, TP_LAYERS_O, n->hidden, width, 0);
        new_weight(sides, n, l, TP_LAYERS_GATE, n->feed, n->hidden, 0);
        new_weight(sides, n, l, TP_LAYERS_UP, n->feed, n->hidden, 0);
        new_weight(sides, n, l, TP_LAYERS_DOWN, n->hidden, n->feed, gap);
        on_each(sides, &a->norm1, &b->norm1, (size_t)n->hidden, TP_F32, 0.5, 1);
        on_each(sides, &a->norm2, &b->norm2, (size_t)n->hidden, TP_F32, 0.5, 1);
        a->cache_k = b->cache_k = a->cache_v = b->cache_v = (tp_rows){NULL, TP_BF16, kv};
        on_each(sides, &a->cache_k.data, &b->cache_k.data, (size_t)(n->capacity * kv), TP_BF16, 1, 0);
        on_each(sides, &a->cache_v.data, &b->cache_v.data, (size_t)(n->capacity * kv), TP_BF16, 1, 0);
    }
    void *table[2];
    on_each(sides, &table[0], &table[1], (size_t)(IDS * n->hidden), TP_BF16, 1, 0);
    on_each(sides, &sides[0].inv_freq, &sides[1].inv_freq, (size_t)(n->head_dim / 2), TP_F32, 0.5, 0.5);
    int32_t zero = 0;
    for (int i = 0; i < 2; i++) {
        sides[i].embedding = tp_matrix_dense(TP_BF16, table[i], IDS, n->hidden);
        sides[i].x.data = put(&sides[i], table[0], (size_t)n->hidden * 2);
        sides[i].used = put(&sides[i], &zero, sizeof zero);
        sides[i].id = put(&sides[i], &zero, sizeof zero);
    }
}

static void drop(side sides[2])
{
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < sides[i].n; j++) sides[i].ctx.device->backend->free(sides[i].ctx.device, sides[i].memory[j], 0);
}

static void get(side *s, void *host, const void *memory, size_t bytes)
{
    assert_ok(&s->ctx, s->ctx.device->backend->copy_out(&s->ctx, host, memory, bytes));
}

/* ---- the CPU: kernel by kernel ---- */

static void linears(side *s, const tp_layers_block *b, tp_rows x, const float *norm, int first, int n, tp_rows y[], bool swiglu,
                    bool residual)
{
    tp_rows normed = {malloc((size_t)x.ld * 2), TP_BF16, x.ld};
    tp_linears_args args = {.n = 1, .k = x.ld, .x = x, .n_parts = n, .swiglu = swiglu, .precision = TP_BF16};
    args.norm_weight = norm, args.eps = 1e-5f, args.normed = normed;
    tp_lowrank_args lows[TP_LINEARS_PARTS];
    float low[TP_LINEARS_PARTS][64];
    for (int i = 0; i < n; i++) {
        const tp_layers_lora *lora = &b->lora[first + i];
        args.parts[i] = (tp_linears_part){.w = b->w[first + i], .y = y[i]};
        if (lora->rank == 0) continue;
        lows[i] = (tp_lowrank_args){lora->rank, lora->scaling, {low[i], TP_F32, lora->rank}, lora->down, lora->up};
        args.parts[i].lowrank = &lows[i];
    }
    if (residual) args.residual = y[0].data, args.residual_ld = y[0].ld;
    assert_ok(&s->ctx, tp_run_linears(&s->ctx, &args));
    free(normed.data);
}

static void run_apart(side *s, const network *n)
{
    int64_t width = n->heads * n->head_dim, kv = n->kv_heads * n->head_dim;
    tp_rows q = {calloc((size_t)width, 2), TP_BF16, width}, k = {calloc((size_t)kv, 2), TP_BF16, kv},
            v = {calloc((size_t)kv, 2), TP_BF16, kv}, mixed = {calloc((size_t)width, 2), TP_BF16, width},
            active = {calloc((size_t)n->feed, 2), TP_BF16, n->feed}, up = {calloc((size_t)n->feed, 2), TP_BF16, n->feed};
    float *parts = malloc((size_t)(n->heads * TP_ATTEND_PARTS * (n->head_dim + 2)) * 4);
    float *cosine = malloc((size_t)n->head_dim * 2), *sine = malloc((size_t)n->head_dim * 2);
    int32_t *counters = calloc((size_t)n->heads, 4);
    tp_rope_table_args angles = {
        .n = 1, .half = n->head_dim / 2, .positions = s->used, .inv_freq = s->inv_freq, .factor = 0.9f};
    angles.cos = cosine, angles.sin = sine;
    assert_ok(&s->ctx, tp_run_rope_table(&s->ctx, &angles));
    tp_embedding_args embedding = {.n = 1, .ids = s->id, .table = s->embedding, .out = s->x};
    assert_ok(&s->ctx, tp_run_embedding(&s->ctx, &embedding));
    for (int l = 0; l < n->layers; l++) {
        const tp_layers_block *b = &s->blocks[l];
        linears(s, b, s->x, b->norm1, TP_LAYERS_Q, 3, (tp_rows[]){q, k, v}, false, false);
        tp_attend_args args = {.n = 1, .heads = n->heads, .kv_heads = n->kv_heads, .head_dim = n->head_dim};
        args.q = q, args.k = k, args.v = v, args.out = mixed, args.cos = cosine, args.sin = sine, args.half = n->head_dim / 2;
        args.cache_k = b->cache_k, args.cache_v = b->cache_v, args.capacity = n->capacity, args.used = s->used;
        args.scale = 1 / sqrtf((float)n->head_dim), args.parts = parts, args.counters = counters;
        assert_ok(&s->ctx, tp_run_attend(&s->ctx, &args));
        linears(s, b, mixed, NULL, TP_LAYERS_O, 1, &s->x, false, true);
        linears(s, b, s->x, b->norm2, TP_LAYERS_GATE, 2, (tp_rows[]){active, up}, true, false);
        linears(s, b, active, NULL, TP_LAYERS_DOWN, 1, &s->x, false, true);
    }
    void *all[] = {q.data, k.data, v.data, mixed.data, active.data, up.data, parts, counters, cosine, sine};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

/* ---- both ---- */

static tp_layers *open_layers(side *s, const network *n)
{
    tp_layers *layers;
    tp_layers_args args = {.hidden = n->hidden,
                           .heads = n->heads,
                           .kv_heads = n->kv_heads,
                           .head_dim = n->head_dim,
                           .feed = n->feed,
                           .n_layers = n->layers,
                           .blocks = s->blocks,
                           .embedding = s->embedding,
                           .id = s->id,
                           .used = s->used,
                           .inv_freq = s->inv_freq,
                           .factor = 0.9f,
                           .eps = 1e-5f,
                           .scale = 1 / sqrtf((float)n->head_dim),
                           .x = s->x};
    assert_ok(&s->ctx, s->ctx.device->backend->layers_open(&s->ctx, &args, &layers));
    return layers;
}

/* 2-norm of the difference over that of what is expected. */
static double distance(const uint16_t *got, const uint16_t *expected, size_t n)
{
    double difference = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        double a = tp_bf16_to_f32(got[i]), b = tp_bf16_to_f32(expected[i]);
        difference += (a - b) * (a - b), size += b * b;
    }
    return sqrt(difference / size);
}

/* Every value is rounded to bf16 (2^-9 of itself at most, on average 0.3 of that) some ten times a layer, and both sides round
 * sums of another order: values lie apart by a few roundings. */
static void compare_side(side sides[2], const network *n, int32_t used)
{
    size_t size = (size_t)n->hidden, kv = (size_t)(n->kv_heads * n->head_dim), cache = (size_t)n->capacity * kv;
    uint16_t *a = malloc((size + cache) * 2), *b = malloc((size + cache) * 2);
    assert_true(a != NULL && b != NULL);
    get(&sides[0], a, sides[0].x.data, size * 2);
    get(&sides[1], b, sides[1].x.data, size * 2);
    double x = distance(b, a, size);
    if (!(x <= 0.015)) fail_msg("rank %d, %d keys: x is off by %g of its size", (int)n->rank, used, x);
    for (int l = 0; l < n->layers; l++)
        for (int which = 0; which < 2; which++) {
            const tp_layers_block *p = &sides[0].blocks[l], *q = &sides[1].blocks[l];
            get(&sides[0], a, which == 0 ? p->cache_k.data : p->cache_v.data, cache * 2);
            get(&sides[1], b, which == 0 ? q->cache_k.data : q->cache_v.data, cache * 2);
            double row = distance(b + (size_t)used * kv, a + (size_t)used * kv, kv);
            if (!(row <= 0.015))
                fail_msg("rank %d, %d keys: layer %d, %s of the token is off by %g", (int)n->rank, used, l,
                         which == 0 ? "k" : "v", row);
            memcpy(a + (size_t)used * kv, b + (size_t)used * kv, kv * 2);
            if (memcmp(a, b, cache * 2) != 0) fail_msg("%d keys: layer %d, the cache has changed elsewhere", used, l);
            assert_ok(&sides[0].ctx,
                      sides[0].ctx.device->backend->copy_in(/* the next token finds the same cache */
                                                            &sides[0].ctx, which == 0 ? p->cache_k.data : p->cache_v.data, a,
                                                            cache * 2));
        }
    free(a), free(b);
}

static void try_network(const network *n, const int32_t *lengths, size_t n_lengths, int64_t gap)
{
    side sides[2] = {0};
    size_t bytes = (size_t)n->hidden * 2;
    uint16_t *once = malloc(bytes), *twice = malloc(bytes);
    assert_true(once != NULL && twice != NULL);
    build(sides, n, gap);
    tp_layers *layers = open_layers(&sides[1], n);
    assert_non_null(layers);
    for (size_t i = 0; i < n_lengths; i++) {
        int32_t id = (int32_t)(i % IDS);
        for (int k = 0; k < 2; k++) {
            const tp_backend *backend = sides[k].ctx.device->backend;
            assert_ok(&sides[k].ctx, backend->copy_in(&sides[k].ctx, sides[k].used, &lengths[i], 4));
            assert_ok(&sides[k].ctx, backend->copy_in(&sides[k].ctx, sides[k].id, &id, 4));
        }
        run_apart(&sides[0], n);
        assert_ok(&sides[1].ctx, opened.cuda->backend->layers_run(&sides[1].ctx, layers));
        compare_side(sides, n, lengths[i]);
        get(&sides[1], once, sides[1].x.data, bytes);
        assert_ok(&sides[1].ctx, opened.cuda->backend->layers_run(&sides[1].ctx, layers));
        get(&sides[1], twice, sides[1].x.data, bytes);
        assert_memory_equal(once, twice, bytes);
    }
    opened.cuda->backend->layers_close(opened.cuda, layers);
    drop(sides);
    free(once), free(twice);
}

static void test_layers(void **state)
{
    (void)state;
    NEEDS_GPU();
    static const network networks[] = {{576, 9, 3, 64, 1536, 1100, 3, 0, 0, TP_F32},
                                       {576, 9, 3, 64, 1536, 300, 1, 0, 0, TP_F32},
                                       {576, 9, 3, 64, 1536, 300, 3, 16, 127, TP_F32},
                                       {576, 9, 3, 64, 1536, 300, 3, 8, 1 << TP_LAYERS_Q | 1 << TP_LAYERS_V, TP_BF16},
                                       {576, 9, 3, 64, 1536, 300, 3, 32, 127, TP_BF16},
                                       {576, 9, 3, 64, 1536, 300, 3, 64, 127, TP_F32},
                                       {576, 9, 3, 64, 1536, 300, 2, 62, 1 << TP_LAYERS_O | 1 << TP_LAYERS_UP, TP_F32},
                                       {576, 9, 3, 64, 1536, 300, 2, 4, 1 << TP_LAYERS_K | 1 << TP_LAYERS_DOWN, TP_F32}};
    static const int32_t lengths[] = {0, 1, 5, 63, 64, 99, 127, 128, 299, 511, 699, 1024, 1099};
    random_state = 31;
    for (size_t i = 0; i < sizeof networks / sizeof *networks; i++) {
        size_t count = 0;
        while (count < sizeof lengths / sizeof *lengths && lengths[count] < networks[i].capacity) count++;
        try_network(&networks[i], lengths, count, i % 2 == 0 ? 0 : 8);
    }
}

/* What the kernel does not take is said, not tried. */
static void test_unsuited(void **state)
{
    (void)state;
    NEEDS_GPU();
    static const network networks[] = {
        {576, 9, 9, 64, 1536, 10, 1, 0, 0, TP_F32},  {576, 12, 3, 48, 1536, 10, 1, 0, 0, TP_F32},
        {576, 9, 3, 64, 1504, 10, 1, 0, 0, TP_F32},  {576, 9, 3, 64, 1536, 10, 1, 65, 1, TP_F32},
        {960, 15, 5, 64, 2560, 10, 1, 0, 0, TP_F32}, {4096, 32, 8, 128, 1024, 10, 1, 0, 0, TP_F32}};
    for (size_t i = 0; i < sizeof networks / sizeof *networks; i++) {
        side sides[2] = {0};
        build(sides, &networks[i], 0);
        assert_null(open_layers(&sides[1], &networks[i]));
        drop(sides);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_layers), cmocka_unit_test(test_unsuited)};
    return cmocka_run_group_tests(tests, open_both, close_both);
}
