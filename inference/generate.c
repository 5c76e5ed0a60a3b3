/* Prompts, and the replies to them. A pass is the model's forward on a few rows whose keys and values go behind those in the
 * cache; only the last row's logits are made. Prompts run in chunks, so that the step arena stays small. Replies then grow by
 * passes of one row, sampled by the host, or by steps on the device (inference/step.h), where several grow at once. */
#include "inference/generate.h"

#include <string.h>

#include "base/mem.h"
#include "inference/narrow.h"
#include "inference/reply.h"
#include "inference/step.h"
#include "models/measure.h"

/* Rows of one prefill pass: enough for full speed of the products, and a few MB of arena. */
#define CHUNK_ROWS 512
/* Beyond what the measured pass needs: low-rank products of adapters attached later. */
#define ARENA_SLACK_BYTES ((size_t)4 << 20)
/* Of the sampler's arrays, rounded up. */
#define SAMPLER_BYTES_PER_ID 16
/* With more weights a step takes so long that the host may look at each few of them. */
#define SMALL_MODEL_BYTES ((uint64_t)2 << 30)
#define LARGE_MODEL_AHEAD 4

struct tp_generator {
    tp_model *model;
    tp_tape *tape;
    tp_kv_cache memory; /* of all slots */
    tp_kv_cache cache;  /* of the slot that passes run in: the same, seen from its first row */
    int64_t context, slots, slot;
    int64_t used[TP_STEP_SLOTS];
    tp_batch_buffers buffers;
    tp_sampler *sampler;
    tp_narrow *narrow; /* NULL under f32 */
    tp_step *step;     /* NULL: passes alone */
    int ahead;         /* steps between two looks at their tokens */
    float *logits;     /* host [vocab] */
    int32_t positions[CHUNK_ROWS];
};

static tp_segment segment_of(int64_t used, int64_t n)
{
    return (tp_segment){.q_len = n, .k_len = used + n};
}

/* One pass on a tape: logits of the last row, or NULL. */
static tp_tensor *run_pass(tp_model *model, tp_tape *tape, tp_kv_cache *cache, const tp_batch *batch, const int32_t *last_row)
{
    tp_pass pass = {.tape = tape, .batch = batch, .cache = cache};
    tp_tape_no_grad_begin(tape);
    tp_tensor *hidden = tp_model_forward(model, &pass);
    tp_tensor *logits = tp_logits(tape, hidden, &model->head.weight, last_row, 1);
    tp_tape_no_grad_end(tape);
    return logits;
}

static int64_t rows_of_a_pass(int64_t context)
{
    return context < CHUNK_ROWS ? context : CHUNK_ROWS;
}

static tp_status measure_arena(tp_ctx *ctx, const tp_model *model, int64_t context, size_t *bytes)
{
    tp_measure what = {.rows = rows_of_a_pass(context), .logits_rows = 1, .context = context};
    TP_TRY(tp_model_measure(ctx, model, &what, bytes));
    *bytes += ARENA_SLACK_BYTES;
    return TP_OK;
}

/* Passes go on in this slot, behind what it holds. */
static void enter_slot(tp_generator *g, int64_t slot)
{
    g->slot = slot;
    g->cache = g->memory; /* planes of keys and values stay as far apart */
    g->cache.data += (size_t)(slot * g->context * g->memory.row) * tp_dtype_bytes(g->memory.dtype);
    g->cache.used = g->used[slot];
}

static tp_status open_steps(tp_ctx *ctx, tp_model *model, tp_generator *g)
{
    if (!tp_step_suits(ctx->device, model)) return TP_OK;
    g->ahead = model->weight_bytes < SMALL_MODEL_BYTES ? TP_STEP_AHEAD : LARGE_MODEL_AHEAD;
    return tp_step_open(ctx, model, &g->memory, g->slots, g->context, &g->step);
}

static tp_status open_parts(tp_ctx *ctx, tp_model *model, int64_t context, tp_generator *g)
{
    size_t bytes = 0;
    int64_t rows = rows_of_a_pass(context);
    g->model = model;
    g->context = context;
    TP_TRY(measure_arena(ctx, model, context, &bytes));
    TP_TRY(tp_tape_new(ctx, bytes, model->precision, &g->tape));
    TP_TRY(tp_kv_cache_open(ctx, model, context * g->slots, &g->memory));
    TP_TRY(tp_batch_buffers_open(ctx, rows, 1, &g->buffers));
    TP_TRY(tp_sampler_new(ctx, model->config.vocab_size, &g->sampler));
    if (model->precision != TP_F32) TP_TRY(tp_narrow_open(ctx, model, &g->narrow));
    g->logits = tp_alloc(ctx, (size_t)model->config.vocab_size, sizeof *g->logits);
    if (g->logits == NULL) return TP_NOMEM;
    TP_TRY(open_steps(ctx, model, g));
    enter_slot(g, 0);
    return TP_OK;
}

tp_status tp_generator_open(tp_ctx *ctx, tp_model *model, int64_t context, tp_generator **result)
{
    return tp_generator_open_many(ctx, model, context, 1, result);
}

/* Where there are no steps, one slot serves one prompt after the other. */
static int64_t slots_for(const tp_ctx *ctx, const tp_model *model, size_t n)
{
    if (!tp_step_suits(ctx->device, model) || n < 2) return 1;
    return n < TP_STEP_SLOTS ? (int64_t)n : TP_STEP_SLOTS;
}

tp_status tp_generator_open_many(tp_ctx *ctx, tp_model *model, int64_t context, size_t n, tp_generator **result)
{
    if (context < 1 || context > model->config.max_positions)
        return tp_fail(ctx, TP_INVALID, "a context of %lld tokens; the model takes 1 to %lld", (long long)context,
                       (long long)model->config.max_positions);
    tp_generator *g = tp_alloc(ctx, 1, sizeof *g);
    if (g == NULL) return TP_NOMEM;
    g->slots = slots_for(ctx, model, n);
    tp_status status = open_parts(ctx, model, context, g);
    if (status != TP_OK) {
        tp_generator_close(g);
        return status;
    }
    *result = g;
    return TP_OK;
}

void tp_generator_close(tp_generator *g)
{
    if (g == NULL) return;
    tp_step_close(g->step);
    tp_tape_free(g->tape);
    tp_kv_cache_close(&g->memory);
    tp_batch_buffers_close(&g->buffers);
    tp_sampler_free(g->sampler);
    tp_narrow_close(g->narrow);
    tp_free(g->logits);
    tp_free(g);
}

tp_status tp_generator_measure(tp_ctx *dry, const tp_model *model, int64_t context, uint64_t *bytes)
{
    size_t arena = 0;
    tp_kv_cache cache;
    TP_TRY(measure_arena(dry, model, context, &arena));
    TP_TRY(tp_kv_cache_open(dry, model, context, &cache));
    *bytes = arena + cache.bytes + sizeof(tp_generator) + (uint64_t)rows_of_a_pass(context) * 2 * sizeof(int32_t) +
             (uint64_t)model->config.vocab_size * (sizeof(float) + SAMPLER_BYTES_PER_ID);
    tp_kv_cache_close(&cache);
    return TP_OK;
}

void tp_generator_reset(tp_generator *g)
{
    for (int64_t slot = 0; slot < g->slots; slot++) g->used[slot] = 0;
    enter_slot(g, 0);
    if (g->narrow != NULL) tp_narrow_forget(g->narrow);
}

int64_t tp_generator_used(const tp_generator *g)
{
    return g->cache.used;
}

static tp_status run_chunk(tp_ctx *ctx, tp_generator *g, const int32_t *ids, int64_t n)
{
    int32_t last = (int32_t)n - 1, no_label = 0;
    for (int64_t i = 0; i < n; i++) g->positions[i] = (int32_t)(g->cache.used + i);
    tp_segment segment = segment_of(g->cache.used, n);
    tp_batch host = {.n = n,
                     .ids = ids,
                     .positions = g->positions,
                     .max_position = g->cache.used + n,
                     .segments = &segment,
                     .n_segments = 1,
                     .label_rows = &last,
                     .labels = &no_label,
                     .n_labels = 1,
                     .n_tokens = n},
             batch;
    TP_TRY(tp_batch_upload(ctx, &g->buffers, &host, &batch));
    if (g->narrow != NULL) TP_TRY(tp_narrow_begin(ctx, g->narrow));
    tp_tensor *logits = run_pass(g->model, g->tape, &g->cache, &batch, batch.label_rows);
    if (g->narrow != NULL) tp_narrow_end(g->narrow);
    tp_status status = tp_tape_status(g->tape);
    if (status == TP_OK)
        status = ctx->device->backend->copy_out(ctx, g->logits, logits->data, (size_t)logits->cols * sizeof *g->logits);
    tp_tape_reset(g->tape);
    return status;
}

tp_status tp_generator_run(tp_ctx *ctx, tp_generator *g, const int32_t *ids, int64_t n, float **logits)
{
    if (n < 1) return tp_fail(ctx, TP_INVALID, "nothing to run: the prompt is empty");
    if (n > g->context - g->cache.used)
        return tp_fail(ctx, TP_SHAPE, "%lld tokens are in the context and %lld more do not fit: it holds %lld",
                       (long long)g->cache.used, (long long)n, (long long)g->context);
    for (int64_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= g->model->config.vocab_size)
            return tp_fail(ctx, TP_FORMAT, "token id %d is outside the vocabulary of %lld", (int)ids[i],
                           (long long)g->model->config.vocab_size);
    for (int64_t first = 0; first < n; first += g->buffers.rows)
        TP_TRY(run_chunk(ctx, g, ids + first, n - first < g->buffers.rows ? n - first : g->buffers.rows));
    g->used[g->slot] = g->cache.used;
    *logits = g->logits;
    return TP_OK;
}

int tp_end_tokens(const tp_model *model, const tp_tokenizer *tokenizer, int64_t ends[TP_MAX_ENDS])
{
    int n = 0;
    const int most = (int)(sizeof model->config.eos_ids / sizeof *model->config.eos_ids);
    for (; n < model->config.n_eos && n < most; n++) ends[n] = model->config.eos_ids[n];
    int32_t own = tokenizer != NULL ? tp_tokenizer_role(tokenizer, TP_TOKEN_EOS) : -1;
    if (own >= 0) ends[n++] = own;
    return n;
}

/* ---- sequences ---- */

/* A slot and the reply that grows in it. */
struct sequence {
    size_t index; /* of its prompt */
    bool active;
    tp_reply reply;
};

/* A call of tp_generate_all. */
struct job {
    tp_generator *g;
    const tp_tokenizer *tokenizer;
    const tp_prompt_ids *prompts;
    size_t n, next; /* prompts, and the first that has not begun */
    const tp_generate_options *options;
    tp_generate_done done;
    void *done_state;
    bool steps; /* sequences go on by steps; else one by one, pass by pass */
    bool begun; /* steps are recorded */
    struct sequence sequences[TP_STEP_SLOTS];
};

static bool is_full(const tp_generator *g, int64_t slot)
{
    return g->used[slot] == g->context;
}

/* A token for a sequence; it ends too when its slot is full. */
static tp_status accept(tp_ctx *ctx, struct job *job, int64_t slot, int32_t id)
{
    tp_reply *reply = &job->sequences[slot].reply;
    TP_TRY(tp_reply_accept(ctx, reply, id));
    if (is_full(job->g, slot)) reply->ended = true;
    return TP_OK;
}

/* Hands the reply on; *more is false if nobody wants others. */
static tp_status finish(tp_ctx *ctx, struct job *job, struct sequence *s, bool *more)
{
    tp_generated out;
    tp_status status = tp_reply_take(ctx, &s->reply, &out);
    tp_reply_close(&s->reply);
    s->active = false;
    if (status == TP_OK) *more = job->done(job->done_state, s->index, &out);
    return status;
}

/* The token after `logits`, by the host. */
static tp_status next_token(tp_ctx *ctx, struct job *job, int64_t slot, float *logits)
{
    int32_t id;
    const tp_reply *reply = &job->sequences[slot].reply;
    TP_TRY(tp_sampler_next(ctx, job->g->sampler, &job->options->sampling, logits, reply->all, reply->n_prompt + reply->out.n,
                           reply->out.n, &id));
    return accept(ctx, job, slot, id);
}

static tp_status begin_sequence(tp_ctx *ctx, struct job *job, int64_t slot)
{
    float *logits;
    struct sequence *s = &job->sequences[slot];
    const tp_prompt_ids *prompt = &job->prompts[job->next];
    TP_TRY(tp_reply_open(ctx, job->tokenizer, prompt->ids, prompt->n, job->options, &s->reply));
    s->index = job->next++;
    s->active = true;
    job->g->used[slot] = 0;
    enter_slot(job->g, slot);
    TP_TRY(tp_generator_run(ctx, job->g, prompt->ids, (int64_t)prompt->n, &logits));
    return next_token(ctx, job, slot, logits);
}

/* ---- one by one ---- */

static tp_status run_passes(tp_ctx *ctx, struct job *job)
{
    bool more = true;
    struct sequence *s = &job->sequences[0];
    while (more && (s->active || job->next < job->n)) {
        if (!s->active) TP_TRY(begin_sequence(ctx, job, 0));
        while (!s->reply.ended) {
            float *logits;
            TP_TRY(tp_generator_run(ctx, job->g, &s->reply.all[s->reply.n_prompt + s->reply.out.n - 1], 1, &logits));
            TP_TRY(next_token(ctx, job, 0, logits));
        }
        TP_TRY(finish(ctx, job, s, &more));
    }
    return TP_OK;
}

/* ---- by steps ---- */

/* Recorded after the first prefill, which leaves on the device what all steps read. */
static tp_status begin_steps(tp_ctx *ctx, struct job *job)
{
    tp_generator *g = job->g;
    if (job->begun) return TP_OK;
    job->begun = true;
    if (g->narrow != NULL) TP_TRY(tp_narrow_begin(ctx, g->narrow));
    tp_status status = tp_step_begin(ctx, g->step, &job->options->sampling, &job->steps);
    if (g->narrow != NULL) tp_narrow_end(g->narrow);
    return status;
}

static tp_status place_sequence(tp_ctx *ctx, struct job *job, int64_t slot)
{
    const tp_reply *reply = &job->sequences[slot].reply;
    return tp_step_set(ctx, job->g->step, slot, job->g->used[slot], (int64_t)reply->out.n, reply->all,
                       reply->n_prompt + reply->out.n);
}

/* Prompts into free slots, as long as there are any; *active says how many sequences there are. */
static tp_status fill_slots(tp_ctx *ctx, struct job *job, int *active, bool *more)
{
    *active = 0;
    for (int64_t slot = 0; slot < job->g->slots; slot++) {
        struct sequence *s = &job->sequences[slot];
        while (!s->active && *more && job->next < job->n) {
            TP_TRY(begin_sequence(ctx, job, slot));
            TP_TRY(begin_steps(ctx, job));
            if (!job->steps) return TP_OK;
            if (s->reply.ended)
                TP_TRY(finish(ctx, job, s, more));
            else
                TP_TRY(place_sequence(ctx, job, slot));
        }
        *active += s->active;
    }
    return TP_OK;
}

/* Steps until the next look at the tokens: no more than any sequence can take. */
static int steps_ahead(const struct job *job)
{
    int64_t most = 1;
    for (int64_t slot = 0; slot < job->g->slots; slot++) {
        const struct sequence *s = &job->sequences[slot];
        if (!s->active) continue;
        int64_t left = job->options->max_tokens - (int64_t)s->reply.out.n, room = job->g->context - job->g->used[slot];
        if (room < left) left = room;
        if (left > most) most = left;
    }
    return most < job->g->ahead ? (int)most : job->g->ahead;
}

/* What the steps made, up to each sequence's end. */
static tp_status take_tokens(tp_ctx *ctx, struct job *job, int steps)
{
    for (int64_t slot = 0; slot < job->g->slots; slot++) {
        struct sequence *s = &job->sequences[slot];
        for (int i = 0; s->active && i < steps && !s->reply.ended; i++) {
            int32_t id;
            TP_TRY(tp_step_token(ctx, job->g->step, slot, (int64_t)s->reply.out.n, &id));
            job->g->used[slot]++;
            TP_TRY(accept(ctx, job, slot, id));
        }
    }
    return TP_OK;
}

static tp_status run_steps(tp_ctx *ctx, struct job *job)
{
    bool more = true;
    int active;
    TP_TRY(fill_slots(ctx, job, &active, &more));
    if (!job->steps) return run_passes(ctx, job); /* adapters are there that steps do not run */
    while (active > 0) {
        int steps = steps_ahead(job);
        TP_TRY(tp_step_run(ctx, job->g->step, steps));
        TP_TRY(tp_step_read(ctx, job->g->step));
        TP_TRY(take_tokens(ctx, job, steps));
        for (int64_t slot = 0; slot < job->g->slots; slot++) {
            struct sequence *s = &job->sequences[slot];
            if (s->active && s->reply.ended) TP_TRY(finish(ctx, job, s, &more));
        }
        TP_TRY(fill_slots(ctx, job, &active, &more));
    }
    return TP_OK;
}

tp_status tp_generate_all(tp_ctx *ctx, tp_generator *g, const tp_tokenizer *tokenizer, const tp_prompt_ids *prompts, size_t n,
                          const tp_generate_options *options, tp_generate_done done, void *done_state)
{
    struct job job = {.g = g, .tokenizer = tokenizer, .prompts = prompts, .n = n, .options = options, .done = done};
    job.done_state = done_state;
    job.steps = g->step != NULL;
    tp_generator_reset(g);
    tp_status status = job.steps ? run_steps(ctx, &job) : run_passes(ctx, &job);
    for (int64_t slot = 0; slot < g->slots; slot++)
        if (job.sequences[slot].active) tp_reply_close(&job.sequences[slot].reply);
    return status;
}

static bool keep(void *state, size_t index, tp_generated *reply)
{
    (void)index;
    *(tp_generated *)state = *reply;
    return true;
}

tp_status tp_generate(tp_ctx *ctx, tp_generator *g, const tp_tokenizer *tokenizer, const int32_t *prompt, size_t n_prompt,
                      const tp_generate_options *options, tp_generated *out)
{
    tp_prompt_ids one = {prompt, n_prompt};
    *out = (tp_generated){0};
    return tp_generate_all(ctx, g, tokenizer, &one, 1, options, keep, out);
}

void tp_generated_free(tp_generated *out)
{
    tp_free(out->ids);
    tp_buf_free(&out->text);
    *out = (tp_generated){0};
}
