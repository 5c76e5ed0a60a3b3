/* The decode loop. A pass is the model's forward on a few rows whose keys and values go behind those in the cache; only the
 * last row's logits are made. Prompts run in chunks, so that the step arena stays small. */
#include "inference/generate.h"

#include <string.h>

#include "base/mem.h"
#include "inference/narrow.h"
#include "models/measure.h"

/* Rows of one prefill pass: enough for full speed of the products, and a few MB of arena. */
#define CHUNK_ROWS 512
/* Beyond what the measured pass needs: low-rank products of adapters attached later. */
#define ARENA_SLACK_BYTES ((size_t)4 << 20)
/* Of the sampler's arrays, rounded up. */
#define SAMPLER_BYTES_PER_ID 16

struct tp_generator {
    tp_model *model;
    tp_tape *tape;
    tp_kv_cache cache;
    tp_batch_buffers buffers;
    tp_sampler *sampler;
    tp_narrow *narrow; /* NULL under f32 */
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

static tp_status open_parts(tp_ctx *ctx, tp_model *model, int64_t context, tp_generator *g)
{
    size_t bytes = 0;
    int64_t rows = rows_of_a_pass(context);
    g->model = model;
    TP_TRY(measure_arena(ctx, model, context, &bytes));
    TP_TRY(tp_tape_new(ctx, bytes, model->precision, &g->tape));
    TP_TRY(tp_kv_cache_open(ctx, model, context, &g->cache));
    TP_TRY(tp_batch_buffers_open(ctx, rows, 1, &g->buffers));
    TP_TRY(tp_sampler_new(ctx, model->config.vocab_size, &g->sampler));
    if (model->precision == TP_BF16) TP_TRY(tp_narrow_open(ctx, model, &g->narrow));
    g->logits = tp_alloc(ctx, (size_t)model->config.vocab_size, sizeof *g->logits);
    return g->logits != NULL ? TP_OK : TP_NOMEM;
}

tp_status tp_generator_open(tp_ctx *ctx, tp_model *model, int64_t context, tp_generator **result)
{
    if (context < 1 || context > model->config.max_positions)
        return tp_fail(ctx, TP_INVALID, "a context of %lld tokens; the model takes 1 to %lld", (long long)context,
                       (long long)model->config.max_positions);
    tp_generator *g = tp_alloc(ctx, 1, sizeof *g);
    if (g == NULL) return TP_NOMEM;
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
    tp_tape_free(g->tape);
    tp_kv_cache_close(&g->cache);
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
    g->cache.used = 0;
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
    if (n > g->cache.capacity - g->cache.used)
        return tp_fail(ctx, TP_SHAPE, "%lld tokens are in the context and %lld more do not fit: it holds %lld",
                       (long long)g->cache.used, (long long)n, (long long)g->cache.capacity);
    for (int64_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= g->model->config.vocab_size)
            return tp_fail(ctx, TP_FORMAT, "token id %d is outside the vocabulary of %lld", (int)ids[i],
                           (long long)g->model->config.vocab_size);
    for (int64_t first = 0; first < n; first += g->buffers.rows)
        TP_TRY(run_chunk(ctx, g, ids + first, n - first < g->buffers.rows ? n - first : g->buffers.rows));
    *logits = g->logits;
    return TP_OK;
}

/* ---- text ---- */

int tp_end_tokens(const tp_model *model, const tp_tokenizer *tokenizer, int64_t ends[TP_MAX_ENDS])
{
    int n = 0;
    const int most = (int)(sizeof model->config.eos_ids / sizeof *model->config.eos_ids);
    for (; n < model->config.n_eos && n < most; n++) ends[n] = model->config.eos_ids[n];
    int32_t own = tokenizer != NULL ? tp_tokenizer_role(tokenizer, TP_TOKEN_EOS) : -1;
    if (own >= 0) ends[n++] = own;
    return n;
}

/* What has been decoded and how much of it was handed out. */
struct writer {
    const tp_generate_options *options;
    tp_buf *text;
    size_t emitted;
};

/* Length of the longest end of `text` that could be the beginning of a stop string. */
static size_t held_back(const tp_generate_options *options, const char *text, size_t n)
{
    size_t most = 0;
    for (const char *const *stop = options->stop; stop != NULL && *stop != NULL; stop++) {
        size_t length = strlen(*stop);
        for (size_t k = length > n ? n : length; k > most; k--)
            if (memcmp(text + n - k, *stop, k) == 0) most = k;
    }
    return most;
}

/* Cuts the text at the first stop string; true if there was one. */
static bool cut_at_stop(struct writer *w)
{
    const char *first = NULL;
    for (const char *const *stop = w->options->stop; stop != NULL && *stop != NULL; stop++) {
        const char *found =
            **stop != '\0' && w->text->len > 0 ? memmem(w->text->data, w->text->len, *stop, strlen(*stop)) : NULL;
        if (found != NULL && (first == NULL || found < first)) first = found;
    }
    if (first == NULL) return false;
    w->text->len = (size_t)(first - w->text->data);
    w->text->data[w->text->len] = '\0';
    return true;
}

/* Hands out what is certain; false if the receiver wants no more. */
static bool flush(struct writer *w, bool all)
{
    size_t end = w->text->len - (all ? 0 : held_back(w->options, tp_buf_cstr(w->text), w->text->len));
    if (end <= w->emitted || w->options->emit == NULL) return true;
    bool more = w->options->emit(w->options->emit_state, w->text->data + w->emitted, end - w->emitted);
    w->emitted = end;
    return more;
}

static bool is_end(const tp_generate_options *options, int32_t id)
{
    for (int i = 0; i < options->n_eos; i++)
        if (options->eos_ids[i] == id) return true;
    return false;
}

static tp_status decode_loop(tp_ctx *ctx, tp_generator *g, tp_stream_decoder *decoder, const int32_t *prompt, size_t n_prompt,
                             const tp_generate_options *options, tp_generated *out)
{
    struct writer w = {options, &out->text, 0};
    float *logits;
    int32_t *all = tp_alloc(ctx, n_prompt + (size_t)options->max_tokens, sizeof *all); /* what the repetition penalty sees */
    if (all == NULL) return TP_NOMEM;
    memcpy(all, prompt, n_prompt * sizeof *all);
    tp_status status = tp_generator_run(ctx, g, prompt, (int64_t)n_prompt, &logits);
    out->finish = TP_FINISH_LENGTH;
    while (status == TP_OK && out->n < (size_t)options->max_tokens) {
        int32_t id;
        status = tp_sampler_next(ctx, g->sampler, &options->sampling, logits, all, n_prompt + out->n, out->n, &id);
        if (status != TP_OK) break;
        all[n_prompt + out->n] = out->ids[out->n] = id;
        out->n++;
        if (is_end(options, id)) {
            out->finish = TP_FINISH_STOP;
            break;
        }
        if (decoder != NULL) status = tp_stream_decoder_push(ctx, decoder, id, &out->text);
        if (status == TP_OK && cut_at_stop(&w)) {
            out->finish = TP_FINISH_STOP;
            break;
        }
        if (status == TP_OK && !flush(&w, false)) {
            out->finish = TP_FINISH_CANCELLED;
            break;
        }
        if (status != TP_OK || out->n == (size_t)options->max_tokens || tp_generator_used(g) == g->cache.capacity) break;
        status = tp_generator_run(ctx, g, &id, 1, &logits);
    }
    if (status == TP_OK && decoder != NULL && out->finish != TP_FINISH_CANCELLED) {
        status = tp_stream_decoder_finish(ctx, decoder, &out->text);
        cut_at_stop(&w);
        if (status == TP_OK) flush(&w, true);
    }
    tp_free(all);
    return status;
}

tp_status tp_generate(tp_ctx *ctx, tp_generator *g, const tp_tokenizer *tokenizer, const int32_t *prompt, size_t n_prompt,
                      const tp_generate_options *options, tp_generated *out)
{
    tp_stream_decoder *decoder = NULL;
    *out = (tp_generated){0};
    tp_buf_init(&out->text, 0);
    out->ids = tp_alloc(ctx, (size_t)options->max_tokens, sizeof *out->ids);
    tp_status status = out->ids != NULL ? TP_OK : TP_NOMEM;
    if (status == TP_OK && tokenizer != NULL) status = tp_stream_decoder_new(ctx, tokenizer, true, &decoder);
    tp_generator_reset(g);
    if (status == TP_OK) status = decode_loop(ctx, g, decoder, prompt, n_prompt, options, out);
    if (status == TP_OK) status = tp_buf_status(ctx, &out->text, "generated text");
    tp_stream_decoder_free(decoder);
    if (status != TP_OK) tp_generated_free(out);
    return status;
}

void tp_generated_free(tp_generated *out)
{
    tp_free(out->ids);
    tp_buf_free(&out->text);
    *out = (tp_generated){0};
}
