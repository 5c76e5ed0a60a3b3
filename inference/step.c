/* A step is five kernels a layer (backend/kernels.h, "decoding"), an embedding before and a head and the sampler behind:
 *
 *     q, k, v = linears(norm(x));  mixed = attend(q, k, v, cache);  x += o(mixed)
 *     a = silu(gate(norm(x))) * up(norm(x));                        x += down(a) */
#include "inference/step.h"

#include <math.h>

#include "base/mem.h"

#define ALIGNMENT 256
#define HISTORY   (2 * TP_STEP_AHEAD)

/* Everything that the device holds for a step, in one allocation. */
enum area { X, NORMED, Q, K, V, MIXED, ACTIVE, UP, LOGITS, COSINE, SINE, PARTS, COUNTERS, SEEN, SCRATCH, STATE, AREAS };

/* int32 values of STATE: [slots] each, and the history. */
enum state { IDS, POSITIONS, COUNTS, BAD, HISTORIES, STATES = HISTORIES + HISTORY };

struct tp_step {
    tp_model *model;
    const tp_kv_cache *cache;
    tp_device *device;
    int64_t slots, capacity;
    char *memory;
    size_t bytes, at[AREAS];
    float *low; /* device: low-rank products of the linears that run together */
    size_t low_bytes;
    tp_layers *layers; /* all layers as one call, or NULL */
    tp_sampling sampling;
    tp_graph *graph;      /* NULL where the device records none */
    unsigned char *flags; /* host [vocab] */
    int32_t state[STATES * TP_STEP_SLOTS];
};

/* ---- memory ---- */

static int64_t padded(int64_t columns)
{
    return (columns + 15) / 16 * 16;
}

/* Bytes of one slot. */
static size_t area_bytes(const tp_model *model, enum area area)
{
    const tp_model_config *c = &model->config;
    size_t value = tp_dtype_bytes(model->precision);
    int64_t width = c->n_heads * c->head_dim;
    switch (area) {
    case X:
    case NORMED: return value * (size_t)padded(c->hidden_size);
    case Q:
    case MIXED: return value * (size_t)padded(width);
    case K:
    case V: return value * (size_t)padded(c->n_kv_heads * c->head_dim);
    case ACTIVE:
    case UP: return value * (size_t)padded(c->intermediate_size);
    case LOGITS: return sizeof(float) * (size_t)padded(c->vocab_size);
    case COSINE:
    case SINE: return sizeof(float) * (size_t)(c->head_dim / 2);
    case PARTS: return sizeof(float) * (size_t)(c->n_heads * TP_ATTEND_PARTS * (c->head_dim + 2));
    case COUNTERS: return sizeof(int32_t) * (size_t)c->n_heads;
    case SEEN: return (size_t)c->vocab_size;
    case SCRATCH: return sizeof(uint64_t) * (size_t)(c->vocab_size + TP_SAMPLE_EXTRA);
    case STATE: return sizeof(int32_t) * STATES;
    case AREAS: break;
    }
    return 0;
}

static size_t lay_out(const tp_model *model, int64_t slots, size_t at[AREAS])
{
    size_t end = 0;
    for (int area = 0; area < AREAS; area++) {
        at[area] = end;
        end += (area_bytes(model, (enum area)area) * (size_t)slots + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    }
    return end;
}

uint64_t tp_step_bytes(const tp_model *model, int64_t slots)
{
    size_t at[AREAS];
    return lay_out(model, slots, at);
}

static void *area_of(const tp_step *step, enum area area)
{
    return step->memory + step->at[area];
}

static int32_t *state_of(const tp_step *step, enum state state)
{
    return (int32_t *)area_of(step, STATE) + (int64_t)state * step->slots;
}

static tp_rows rows_of(const tp_step *step, enum area area)
{
    tp_dtype dtype = area == LOGITS ? TP_F32 : step->model->precision;
    return (tp_rows){area_of(step, area), dtype, (int64_t)(area_bytes(step->model, area) / tp_dtype_bytes(dtype))};
}

bool tp_step_suits(const tp_device *device, const tp_model *model)
{
    const tp_model_config *c = &model->config;
    return device->backend->capture_begin != NULL && c->family != TP_FAMILY_GPT2 && c->head_dim % 8 == 0 &&
           c->head_dim <= 256 && !tp_rope_depends_on_length(&c->rope);
}

tp_status tp_step_open(tp_ctx *ctx, tp_model *model, const tp_kv_cache *cache, int64_t slots, int64_t capacity,
                       tp_step **result)
{
    tp_step *step = tp_alloc(ctx, 1, sizeof *step);
    if (step == NULL) return TP_NOMEM;
    *step = (tp_step){.model = model, .cache = cache, .device = ctx->device, .slots = slots, .capacity = capacity};
    step->bytes = lay_out(model, slots, step->at);
    step->flags = tp_alloc(ctx, (size_t)model->config.vocab_size, 1);
    if (step->flags != NULL) step->memory = ctx->device->backend->alloc(ctx, ctx->device, step->bytes);
    if (step->memory == NULL) {
        tp_step_close(step);
        return TP_NOMEM;
    }
    *result = step;
    return TP_OK;
}

static void forget(tp_step *step)
{
    const tp_backend *backend = step->device->backend;
    if (step->graph != NULL) backend->graph_free(step->device, step->graph);
    if (step->low != NULL) backend->free(step->device, step->low, step->low_bytes);
    if (step->layers != NULL) backend->layers_close(step->device, step->layers);
    step->graph = NULL;
    step->low = NULL;
    step->layers = NULL;
}

void tp_step_close(tp_step *step)
{
    if (step == NULL) return;
    forget(step);
    if (step->memory != NULL) step->device->backend->free(step->device, step->memory, step->bytes);
    tp_free(step->flags);
    tp_free(step);
}

/* ---- one step's kernels ---- */

/* Up to three modules of one input. `lows` are filled in and must live until the call. */
struct group {
    tp_linears_args args;
    tp_lowrank_args lows[TP_LINEARS_PARTS];
};

static tp_matrix factor(const tp_tensor *t)
{
    return tp_matrix_dense(t->dtype, t->data, t->rows, t->cols);
}

static void add_part(const tp_step *step, struct group *group, const tp_linear_module *module, tp_rows y)
{
    int i = group->args.n_parts++;
    tp_linears_part *part = &group->args.parts[i];
    *part = (tp_linears_part){.w = module->weight, .bias = module->bias.data, .y = y};
    if (module->slot.n_terms == 0) return;
    const tp_lowrank *term = &module->slot.terms[0];
    int64_t rank = term->a->rows, room = (int64_t)(step->low_bytes / sizeof(float)) / TP_LINEARS_PARTS;
    group->lows[i] = (tp_lowrank_args){.rank = rank,
                                       .scaling = term->scaling,
                                       .low = {step->low + i * room, TP_F32, rank},
                                       .down = factor(term->a),
                                       .up = factor(term->b)};
    part->lowrank = &group->lows[i];
}

static void begin_group(const tp_step *step, struct group *group, enum area x, int64_t columns, const tp_tensor *norm)
{
    *group =
        (struct group){.args = {.n = step->slots, .k = columns, .x = rows_of(step, x), .precision = step->model->precision}};
    if (norm == NULL) return;
    group->args.norm_weight = norm->data;
    group->args.eps = (float)step->model->config.norm_eps;
    group->args.normed = rows_of(step, NORMED);
}

/* x += module(from) */
static tp_status run_residual(tp_ctx *ctx, const tp_step *step, const tp_linear_module *module, enum area from)
{
    struct group group;
    tp_rows x = rows_of(step, X);
    begin_group(step, &group, from, module->weight.cols, NULL);
    add_part(step, &group, module, x);
    group.args.residual = x.data;
    group.args.residual_ld = x.ld;
    return tp_run_linears(ctx, &group.args);
}

static tp_status run_attend(tp_ctx *ctx, const tp_step *step, int layer)
{
    const tp_model_config *c = &step->model->config;
    const tp_block *b = &step->model->blocks[layer];
    tp_attend_args args = {.n = step->slots,
                           .heads = c->n_heads,
                           .kv_heads = c->n_kv_heads,
                           .head_dim = c->head_dim,
                           .q = rows_of(step, Q),
                           .k = rows_of(step, K),
                           .v = rows_of(step, V),
                           .out = rows_of(step, MIXED),
                           .q_norm = c->qk_norm ? b->q_norm.data : NULL,
                           .k_norm = c->qk_norm ? b->k_norm.data : NULL,
                           .eps = (float)c->norm_eps,
                           .cos = area_of(step, COSINE),
                           .sin = area_of(step, SINE),
                           .half = c->head_dim / 2,
                           .cache_k = tp_kv_cache_rows(step->cache, layer, 0),
                           .cache_v = tp_kv_cache_rows(step->cache, layer, 1),
                           .capacity = step->capacity,
                           .used = state_of(step, POSITIONS),
                           .window = c->slides != NULL && c->slides[layer] ? c->window : 0,
                           .scale = 1.0f / sqrtf((float)c->head_dim),
                           .parts = area_of(step, PARTS),
                           .counters = area_of(step, COUNTERS)};
    return tp_run_attend(ctx, &args);
}

static tp_status run_layer(tp_ctx *ctx, const tp_step *step, int layer)
{
    const tp_block *b = &step->model->blocks[layer];
    struct group group;
    begin_group(step, &group, X, step->model->config.hidden_size, &b->norm1);
    add_part(step, &group, &b->q, rows_of(step, Q));
    add_part(step, &group, &b->k, rows_of(step, K));
    add_part(step, &group, &b->v, rows_of(step, V));
    TP_TRY(tp_run_linears(ctx, &group.args));
    TP_TRY(run_attend(ctx, step, layer));
    TP_TRY(run_residual(ctx, step, &b->o, MIXED));
    begin_group(step, &group, X, step->model->config.hidden_size, &b->norm2);
    add_part(step, &group, &b->gate, rows_of(step, ACTIVE));
    add_part(step, &group, &b->up, rows_of(step, UP));
    group.args.swiglu = true;
    TP_TRY(tp_run_linears(ctx, &group.args));
    return run_residual(ctx, step, &b->down, ACTIVE);
}

static tp_status run_head(tp_ctx *ctx, const tp_step *step)
{
    struct group group;
    tp_linear_module plain = {.weight = step->model->head.weight}; /* adapters of the head do not run in passes either */
    begin_group(step, &group, X, step->model->config.hidden_size, &step->model->norm);
    add_part(step, &group, &plain, rows_of(step, LOGITS));
    return tp_run_linears(ctx, &group.args);
}

static tp_status run_sample(tp_ctx *ctx, const tp_step *step)
{
    const tp_sampling *s = &step->sampling;
    tp_rows logits = rows_of(step, LOGITS);
    tp_sample_args args = {.n = step->slots,
                           .vocab = step->model->config.vocab_size,
                           .logits = logits.data,
                           .ld = logits.ld,
                           .temperature = s->temperature,
                           .top_k = s->top_k,
                           .top_p = s->top_p,
                           .min_p = s->min_p,
                           .repetition_penalty = s->repetition_penalty,
                           .seed = s->seed,
                           .seen = s->repetition_penalty != 1 ? area_of(step, SEEN) : NULL,
                           .scratch = area_of(step, SCRATCH),
                           .ids = state_of(step, IDS),
                           .positions = state_of(step, POSITIONS),
                           .counts = state_of(step, COUNTS),
                           .history = state_of(step, HISTORIES),
                           .bad = state_of(step, BAD),
                           .history_length = HISTORY,
                           .position_limit = (int32_t)(step->capacity - 1)};
    return tp_run_sample(ctx, &args);
}

static tp_status run_layers(tp_ctx *ctx, const tp_step *step)
{
    const tp_model *model = step->model;
    tp_rows x = rows_of(step, X);
    tp_embedding_args embedding = {.n = step->slots, .ids = state_of(step, IDS), .table = model->embedding, .out = x};
    tp_rope_table_args angles = {.n = step->slots,
                                 .half = model->config.head_dim / 2,
                                 .positions = state_of(step, POSITIONS),
                                 .inv_freq = model->inv_freq,
                                 .factor = model->rope_factor,
                                 .cos = area_of(step, COSINE),
                                 .sin = area_of(step, SINE)};
    TP_TRY(tp_run_rope_table(ctx, &angles));
    TP_TRY(tp_run_embedding(ctx, &embedding));
    for (int layer = 0; layer < (int)model->config.n_layers; layer++) TP_TRY(run_layer(ctx, step, layer));
    return TP_OK;
}

static tp_status run_kernels(tp_ctx *ctx, const tp_step *step)
{
    TP_TRY(step->layers != NULL ? ctx->device->backend->layers_run(ctx, step->layers) : run_layers(ctx, step));
    TP_TRY(run_head(ctx, step));
    return run_sample(ctx, step);
}

/* ---- steps ---- */

/* The highest rank of the adapters in the slots; false if there are others than one for all rows. */
static bool find_rank(const tp_model *model, int64_t *rank)
{
    *rank = 0;
    for (size_t i = 0; i < model->n_linears; i++) {
        const tp_slot *slot = &model->linears[i]->slot;
        if (slot->n_terms == 0 || model->linears[i]->is_head) continue;
        if (slot->n_terms > 1 || slot->terms[0].begin != 0 || slot->terms[0].end != 0) return false;
        if (slot->terms[0].a->rows > *rank) *rank = slot->terms[0].a->rows;
    }
    return true;
}

/* What the one call for all layers takes: a sequence alone, no biases, norms of heads or windows. */
static bool is_plain(const tp_step *step)
{
    const tp_model_config *c = &step->model->config;
    if (step->slots != 1 || c->qk_norm || c->slides != NULL) return false;
    for (size_t i = 0; i < step->model->n_linears; i++)
        if (step->model->linears[i]->bias.data != NULL) return false;
    return true;
}

static tp_layers_block layers_block(const tp_step *step, int layer)
{
    const tp_block *b = &step->model->blocks[layer];
    const tp_linear_module *modules[TP_LAYERS_LINEARS] = {&b->q, &b->k, &b->v, &b->o, &b->gate, &b->up, &b->down};
    tp_layers_block to = {.norm1 = b->norm1.data,
                          .norm2 = b->norm2.data,
                          .cache_k = tp_kv_cache_rows(step->cache, layer, 0),
                          .cache_v = tp_kv_cache_rows(step->cache, layer, 1)};
    for (int i = 0; i < TP_LAYERS_LINEARS; i++) {
        to.w[i] = modules[i]->weight;
        if (modules[i]->slot.n_terms == 0) continue;
        const tp_lowrank *term = &modules[i]->slot.terms[0];
        to.lora[i] = (tp_layers_lora){term->a->rows, term->scaling, factor(term->a), factor(term->b)};
    }
    return to;
}

static tp_status open_layers(tp_ctx *ctx, tp_step *step)
{
    const tp_backend *backend = ctx->device->backend;
    const tp_model_config *c = &step->model->config;
    const tp_matrix *head = &step->model->head.weight;
    if (backend->layers_open == NULL || !is_plain(step)) return TP_OK;
    tp_layers_block *blocks = tp_alloc(ctx, (size_t)c->n_layers, sizeof *blocks);
    if (blocks == NULL) return TP_NOMEM;
    for (int i = 0; i < (int)c->n_layers; i++) blocks[i] = layers_block(step, i);
    tp_layers_args args = {.hidden = c->hidden_size,
                           .heads = c->n_heads,
                           .kv_heads = c->n_kv_heads,
                           .head_dim = c->head_dim,
                           .feed = c->intermediate_size,
                           .n_layers = (int)c->n_layers,
                           .blocks = blocks,
                           .embedding = step->model->embedding,
                           .id = state_of(step, IDS),
                           .used = state_of(step, POSITIONS),
                           .inv_freq = step->model->inv_freq,
                           .factor = step->model->rope_factor,
                           .eps = (float)c->norm_eps,
                           .scale = 1.0f / sqrtf((float)c->head_dim),
                           .later = head->data,
                           .later_bytes = (uint64_t)head->rows * (uint64_t)tp_format_row_bytes(head->format, head->cols),
                           .x = rows_of(step, X)};
    tp_status status = backend->layers_open(ctx, &args, &step->layers);
    tp_free(blocks);
    return status;
}

static tp_status record(tp_ctx *ctx, tp_step *step)
{
    const tp_backend *backend = ctx->device->backend;
    if (backend->capture_begin == NULL) return TP_OK;
    TP_TRY(backend->capture_begin(ctx));
    tp_status status = run_kernels(ctx, step);
    tp_status end = backend->capture_end(ctx, status == TP_OK ? &step->graph : NULL);
    return status != TP_OK ? status : end;
}

tp_status tp_step_begin(tp_ctx *ctx, tp_step *step, const tp_sampling *sampling, bool *takes)
{
    int64_t rank;
    forget(step);
    *takes = find_rank(step->model, &rank);
    if (!*takes) return TP_OK;
    step->sampling = *sampling;
    TP_TRY(ctx->device->backend->zero(ctx, area_of(step, STATE), area_bytes(step->model, STATE) * (size_t)step->slots));
    TP_TRY(open_layers(ctx, step));
    step->low_bytes = (size_t)(TP_LINEARS_PARTS * rank * step->slots) * sizeof(float);
    if (rank > 0 && step->layers == NULL) {
        step->low = ctx->device->backend->alloc(ctx, ctx->device, step->low_bytes);
        if (step->low == NULL) return TP_NOMEM;
    }
    return record(ctx, step);
}

static tp_status put(tp_ctx *ctx, tp_step *step, enum state state, int64_t slot, int64_t value)
{
    int32_t number = (int32_t)value;
    return ctx->device->backend->copy_in(ctx, state_of(step, state) + slot, &number, sizeof number);
}

tp_status tp_step_set(tp_ctx *ctx, tp_step *step, int64_t slot, int64_t used, int64_t count, const int32_t *ids, size_t n)
{
    int64_t vocab = step->model->config.vocab_size;
    TP_TRY(put(ctx, step, IDS, slot, ids[n - 1]));
    TP_TRY(put(ctx, step, POSITIONS, slot, used));
    TP_TRY(put(ctx, step, COUNTS, slot, count));
    TP_TRY(put(ctx, step, BAD, slot, 0));
    if (step->sampling.repetition_penalty == 1) return TP_OK;
    for (int64_t i = 0; i < vocab; i++) step->flags[i] = 0;
    for (size_t i = 0; i < n; i++)
        if (ids[i] >= 0 && ids[i] < vocab) step->flags[ids[i]] = 1;
    return ctx->device->backend->copy_in(ctx, (char *)area_of(step, SEEN) + slot * vocab, step->flags, (size_t)vocab);
}

tp_status tp_step_run(tp_ctx *ctx, tp_step *step, int n)
{
    for (int i = 0; i < n; i++)
        TP_TRY(step->graph != NULL ? ctx->device->backend->graph_launch(ctx, step->graph) : run_kernels(ctx, step));
    return TP_OK;
}

tp_status tp_step_read(tp_ctx *ctx, tp_step *step)
{
    return ctx->device->backend->copy_out(ctx, step->state, area_of(step, STATE),
                                          area_bytes(step->model, STATE) * (size_t)step->slots);
}

tp_status tp_step_token(tp_ctx *ctx, const tp_step *step, int64_t slot, int64_t number, int32_t *token)
{
    int32_t bad = step->state[(int64_t)BAD * step->slots + slot];
    if (bad != 0) return tp_fail(ctx, TP_NUMERIC, "the logit of token %d is not a number", (int)bad - 1);
    *token = step->state[(HISTORIES + number % HISTORY) * step->slots + slot];
    return TP_OK;
}

const float *tp_step_logits(const tp_step *step)
{
    return area_of(step, LOGITS);
}
