/* What all families share: linears with their slots, attention with or without a cache, blocks in recomputed segments. */
#include "models/model.h"

#include <math.h>
#include <string.h>

#include "base/mem.h"

tp_tensor *tp_module_linear(const tp_pass *pass, tp_linear_module *module, tp_tensor *x, tp_tensor *residual)
{
    tp_lowrank terms[TP_LINEAR_TERMS];
    int n_terms = pass->adapters_off ? 0 : module->slot.n_terms;
    for (int t = 0; t < n_terms && t < TP_LINEAR_TERMS; t++) { /* more are refused by tp_linear */
        terms[t] = module->slot.terms[t];
        if (!pass->training) terms[t].dropout = 0;
    }
    tp_linear_spec spec = {.weight = &module->weight,
                           .bias = module->bias.data != NULL ? &module->bias : NULL,
                           .residual = residual,
                           .terms = terms,
                           .n_terms = n_terms};
    tp_tape_scope_begin(pass->tape, "%s", tp_module_name(module));
    tp_tensor *y = tp_linear(pass->tape, x, &spec);
    tp_tape_scope_end(pass->tape);
    return y;
}

/* ---- attention and its cache ---- */

tp_status tp_kv_cache_open(tp_ctx *ctx, const tp_model *model, int64_t capacity, tp_kv_cache *cache)
{
    const tp_model_config *c = &model->config;
    *cache = (tp_kv_cache){.capacity = capacity,
                           .dtype = model->precision,
                           .row = c->n_kv_heads * c->head_dim,
                           .n_layers = (int)c->n_layers,
                           .device = ctx->device};
    int64_t bytes;
    if (!tp_mul_i64(capacity, cache->row, &bytes) ||
        !tp_mul_i64(bytes, 2 * c->n_layers * (int64_t)tp_dtype_bytes(cache->dtype), &bytes))
        return tp_fail(ctx, TP_NOMEM, "a KV cache of %lld tokens does not fit", (long long)capacity);
    cache->bytes = (size_t)bytes;
    cache->data = ctx->device->backend->alloc(ctx, ctx->device, cache->bytes);
    return cache->data != NULL ? TP_OK : TP_NOMEM;
}

void tp_kv_cache_close(tp_kv_cache *cache)
{
    if (cache->data != NULL) cache->device->backend->free(cache->device, cache->data, cache->bytes);
    *cache = (tp_kv_cache){0};
}

tp_rows tp_kv_cache_rows(const tp_kv_cache *cache, int layer, int which)
{
    size_t plane = (size_t)cache->capacity * (size_t)cache->row * tp_dtype_bytes(cache->dtype);
    return (tp_rows){cache->data + plane * (size_t)(2 * layer + which), cache->dtype, cache->row};
}

/* Copies k or v behind what the cache holds; returns the filled part as an input of the tape. */
static tp_tensor *append(const tp_pass *pass, int layer, int which, const tp_tensor *x)
{
    tp_kv_cache *cache = pass->cache;
    tp_rows all = tp_kv_cache_rows(cache, layer, which), end = all;
    end.data = (char *)all.data + (size_t)(cache->used * cache->row) * tp_dtype_bytes(cache->dtype);
    tp_scale_args copy = {.n = x->rows, .dim = x->cols, .x = tp_tensor_rows(x), .y = end, .alpha = 1};
    if (tp_run_scale(tp_tape_ctx(pass->tape), &copy) != TP_OK) return NULL;
    return tp_tape_input(pass->tape, cache->dtype, cache->used + x->rows, cache->row, all.data, false);
}

tp_tensor *tp_model_attend(tp_model *model, const tp_pass *pass, int layer, tp_tensor *q, tp_tensor *k, tp_tensor *v)
{
    const tp_model_config *c = &model->config;
    tp_attention_spec spec = {.segments = pass->batch->segments,
                              .n_segments = pass->batch->n_segments,
                              .heads = c->n_heads,
                              .kv_heads = c->n_kv_heads,
                              .head_dim = c->head_dim,
                              .causal = true,
                              .window = c->slides != NULL && c->slides[layer] ? c->window : 0,
                              .scale = 1.0f / sqrtf((float)c->head_dim) / (c->scale_by_layer ? (float)(layer + 1) : 1.0f)};
    if (pass->cache != NULL && k != NULL && v != NULL) {
        k = append(pass, layer, 0, k);
        v = append(pass, layer, 1, v);
    }
    return tp_attention(pass->tape, q, k, v, &spec);
}

/* ---- blocks ---- */

struct run {
    tp_model *model;
    const tp_pass *pass;
    tp_block_fn block;
};

struct span {
    struct run run;
    int first, last;
};

/* Rows first .. first+n-1 of the batch, cut between segments. */
static bool slice_batch(tp_tape *tape, const tp_batch *whole, int64_t first, int64_t n, tp_batch *part)
{
    tp_segment *segments = tp_tape_scratch(tape, (size_t)whole->n_segments, sizeof *segments);
    if (segments == NULL) return false;
    *part = *whole;
    part->n = n;
    part->segments = segments;
    part->n_segments = 0;
    for (int64_t s = 0; s < whole->n_segments; s++) {
        tp_segment segment = whole->segments[s];
        if (segment.q_start < first || segment.q_start >= first + n) continue;
        segment.q_start -= first;
        segment.k_start -= first;
        segments[part->n_segments++] = segment;
    }
    return true;
}

static tp_tensor *run_blocks(tp_tape *tape, const struct span *span, const tp_pass *given, tp_tensor *x)
{
    tp_pass *pass = tp_tape_scratch(tape, 1, sizeof *pass);
    if (pass == NULL) return NULL;
    *pass = *given;
    if (tp_tape_again(tape)) pass->unread = &span->run.model->blocks[span->last - 1].joints[TP_JOINT_DOWN];
    for (int i = span->first; i < span->last; i++) {
        tp_tape_scope_begin(tape, "layers.%d", i);
        x = span->run.block(span->run.model, pass, i, x);
        tp_tape_scope_end(tape);
    }
    return x;
}

static tp_tensor *run_span(tp_tape *tape, void *state, tp_tensor *x)
{
    const struct span *span = state;
    tp_model *model = span->run.model;
    if (x == NULL || x->rows == span->run.pass->batch->n) return run_blocks(tape, span, span->run.pass, x);
    int64_t first = tp_tape_row(tape);
    tp_rope_angles all = model->angles;
    tp_batch *batch = tp_tape_scratch(tape, 1, sizeof *batch);
    tp_pass *pass = tp_tape_scratch(tape, 1, sizeof *pass);
    if (batch == NULL || pass == NULL || !slice_batch(tape, span->run.pass->batch, first, x->rows, batch)) return NULL;
    *pass = *span->run.pass;
    pass->batch = batch;
    if (all.cos != NULL) model->angles = (tp_rope_angles){all.cos + first * all.half, all.sin + first * all.half, all.half};
    tp_tensor *y = run_blocks(tape, span, pass, x);
    model->angles = all;
    return y;
}

/* Where slices of at most `most` rows end: each holds whole segments, at least one, and the rows up to the next. */
static const int64_t *cut_slices(tp_tape *tape, const tp_batch *batch, int64_t most, int64_t *n)
{
    int64_t *ends = tp_tape_scratch(tape, (size_t)batch->n_segments + 1, sizeof *ends), start = 0;
    *n = 0;
    if (ends == NULL) return NULL;
    for (int64_t s = 1; s < batch->n_segments; s++) {
        const tp_segment *segment = &batch->segments[s];
        int64_t end = s + 1 < batch->n_segments ? batch->segments[s + 1].q_start : batch->n;
        if (end - start <= most) continue;
        ends[(*n)++] = start = segment->q_start;
    }
    ends[(*n)++] = batch->n;
    return ends;
}

/* Outside training a span is one block, so that values die early; an observer sees every block's output. */
tp_tensor *tp_model_run_blocks(tp_model *model, const tp_pass *pass, tp_block_fn block, tp_tensor *x)
{
    int n = (int)model->config.n_layers, every = pass->recompute_every > 0 ? pass->recompute_every : 1;
    bool all = pass->recompute_every > 0;
    int64_t n_slices = 0;
    const int64_t *ends = NULL;
    if (pass->recomputed_rows > 0) ends = cut_slices(pass->tape, pass->batch, pass->recomputed_rows, &n_slices);
    struct span *spans = tp_tape_scratch(pass->tape, (size_t)n, sizeof *spans);
    if (spans == NULL) return NULL;
    for (int i = 0, s = 0; i < n; i += every, s++) {
        spans[s] = (struct span){{model, pass, block}, i, i + every < n ? i + every : n};
        bool recomputed = all || i < pass->recomputed_layers;
        tp_tape_set_parking(pass->tape, pass->parked_inputs && recomputed && pass->observe == NULL);
        if (ends != NULL && i < pass->recomputed_layers)
            x = tp_tape_sliced_segment(pass->tape, run_span, &spans[s], x, ends, n_slices);
        else
            x = tp_tape_segment(pass->tape, run_span, &spans[s], x, recomputed);
        if (pass->observe != NULL && x != NULL) pass->observe(pass->observe_state, spans[s].last, x);
    }
    return x;
}

static tp_tensor *(*const forwards[TP_FAMILY_COUNT])(tp_model *, const tp_pass *) = {
    [TP_FAMILY_LLAMA] = tp_llama_forward, [TP_FAMILY_MISTRAL] = tp_llama_forward, [TP_FAMILY_QWEN2] = tp_llama_forward,
    [TP_FAMILY_QWEN3] = tp_llama_forward, [TP_FAMILY_GPT2] = tp_gpt2_forward,
};

tp_tensor *tp_model_forward(tp_model *model, const tp_pass *pass)
{
    tp_tensor *h = forwards[model->config.family](model, pass);
    if (pass->cache != NULL && h != NULL) pass->cache->used += pass->batch->n;
    if (pass->observe != NULL && h != NULL) pass->observe(pass->observe_state, -1, h);
    return h;
}

tp_linear_module *tp_model_find(const tp_model *model, const char *path)
{
    for (size_t i = 0; i < model->n_linears; i++)
        if (strcmp(model->linears[i]->path, path) == 0) return model->linears[i];
    return NULL;
}

/* PEFT's table of target_modules by model_type. */
const char *const *tp_model_default_targets(const tp_model *model)
{
    static const char *const llama_kind[] = {"q_proj", "v_proj", NULL}, *const gpt2[] = {"c_attn", NULL};
    return model->config.family == TP_FAMILY_GPT2 ? gpt2 : llama_kind;
}
