/* Prompts become tokens once, when a run is opened; each time they are due, the decode loop of inference/ runs on the model
 * under training, with a KV cache and a step arena of its own. */
#include "trainers/sample.h"

#include <stdio.h>

#include "base/log.h"
#include "base/mem.h"
#include "data/source.h"
#include "inference/generate.h"

struct prompt {
    const char *text;
    int32_t *ids;
    size_t n;
};

struct tp_samples {
    struct prompt *prompts;
    size_t n;
    int64_t context;
    const tp_tokenizer *tokenizer;
    tp_tokenizer *own; /* the tokenizer, where the run has none: ready tokens */
    int64_t ends[TP_MAX_ENDS];
    int n_ends;
    tp_generator *generator;
};

/* ---- prompts to tokens ---- */

/* Leaves room for at least one new token. */
static tp_status check_prompt(tp_ctx *ctx, const tp_tokens *tokens, const tp_model_config *model)
{
    if (tokens->count == 0) return tp_fail(ctx, TP_FORMAT, "the prompt is empty");
    if ((uint64_t)tokens->count >= (uint64_t)model->max_positions)
        return tp_fail(ctx, TP_SHAPE, "the prompt has %zu tokens, the model's context %lld", tokens->count,
                       (long long)model->max_positions);
    for (size_t i = 0; i < tokens->count; i++)
        if (tokens->items[i].id < 0 || tokens->items[i].id >= model->vocab_size)
            return tp_fail(ctx, TP_FORMAT, "token %d lies beyond the model's embedding of %lld rows: another model's tokenizer",
                           (int)tokens->items[i].id, (long long)model->vocab_size);
    return TP_OK;
}

static tp_status encode_prompt(tp_ctx *ctx, const tp_samples_options *options, const tp_tokenizer *tokenizer, tp_tokens *tokens,
                               struct prompt *prompt)
{
    tp_span text = tp_span_of(prompt->text);
    TP_TRY(options->prompt != NULL ? tp_prompt_encode_turn(ctx, options->prompt, tokenizer, text, tokens)
                                   : tp_tokenizer_encode(ctx, tokenizer, text, TP_ENCODE_ADD_SPECIAL, tokens));
    TP_TRY(check_prompt(ctx, tokens, &options->model->config));
    prompt->ids = tp_alloc(ctx, tokens->count, sizeof *prompt->ids);
    if (prompt->ids == NULL) return TP_NOMEM;
    for (size_t i = 0; i < tokens->count; i++) prompt->ids[i] = tokens->items[i].id;
    prompt->n = tokens->count;
    return TP_OK;
}

static tp_status encode_prompts(tp_ctx *ctx, tp_samples *s, const tp_samples_options *options)
{
    tp_tokens tokens = {0};
    tp_status status = TP_OK;
    int64_t longest = 0;
    s->prompts = tp_alloc(ctx, options->prompts.n, sizeof *s->prompts);
    if (s->prompts == NULL) return TP_NOMEM;
    s->n = options->prompts.n;
    for (size_t i = 0; i < s->n && status == TP_OK; i++) {
        s->prompts[i].text = options->prompts.items[i];
        status = encode_prompt(ctx, options, s->tokenizer, &tokens, &s->prompts[i]);
        if (status != TP_OK) (void)tp_fail_in(ctx, "prompt %zu", i + 1);
        if ((int64_t)s->prompts[i].n > longest) longest = (int64_t)s->prompts[i].n;
    }
    tp_tokens_free(&tokens);
    int64_t most = options->model->config.max_positions;
    s->context = longest + TP_SAMPLE_TOKENS < most ? longest + TP_SAMPLE_TOKENS : most;
    return status;
}

static tp_status open_samples(tp_ctx *ctx, tp_samples *s, const tp_samples_options *options)
{
    if (options->tokenizer == NULL) TP_TRY(tp_tokenizer_for(ctx, options->tokenizer_path, &s->own));
    s->tokenizer = options->tokenizer != NULL ? options->tokenizer : s->own;
    s->n_ends = tp_end_tokens(options->model, s->tokenizer, s->ends);
    return encode_prompts(ctx, s, options);
}

tp_status tp_samples_open(tp_ctx *ctx, const tp_samples_options *options, tp_samples **samples)
{
    tp_samples *s = tp_alloc(ctx, 1, sizeof *s);
    if (s == NULL) return TP_NOMEM;
    tp_status status = open_samples(ctx, s, options);
    if (status != TP_OK) {
        tp_samples_close(s);
        return status;
    }
    *samples = s;
    return TP_OK;
}

void tp_samples_close(tp_samples *s)
{
    if (s == NULL) return;
    tp_generator_close(s->generator);
    for (size_t i = 0; i < s->n; i++) tp_free(s->prompts[i].ids);
    tp_free(s->prompts);
    tp_tokenizer_free(s->own);
    tp_free(s);
}

int64_t tp_samples_context(const tp_samples *s)
{
    return s->context;
}

/* ---- continuing them ---- */

tp_status tp_samples_begin(tp_ctx *ctx, tp_samples *s, tp_model *model)
{
    return tp_generator_open(ctx, model, s->context, &s->generator);
}

static bool go_on(void *state, const char *text, size_t n)
{
    const volatile sig_atomic_t *const *stop = state;
    (void)text, (void)n;
    return *stop == NULL || **stop == 0;
}

/* *done is false if it was told to stop. */
static tp_status make_one(tp_ctx *ctx, tp_samples *s, const struct prompt *prompt, tp_metrics *metrics, int64_t step,
                          const volatile sig_atomic_t *stop, bool *done)
{
    tp_generated reply;
    tp_generate_options options = {.sampling = TP_SAMPLING_GREEDY,
                                   .max_tokens = TP_SAMPLE_TOKENS,
                                   .eos_ids = s->ends,
                                   .n_eos = s->n_ends,
                                   .emit = go_on,
                                   .emit_state = &stop};
    TP_TRY(tp_generate(ctx, s->generator, s->tokenizer, prompt->ids, prompt->n, &options, &reply));
    *done = reply.finish != TP_FINISH_CANCELLED;
    if (*done) tp_metrics_sample(ctx, metrics, step, prompt->text, tp_buf_cstr(&reply.text), reply.text.len);
    tp_generated_free(&reply);
    return TP_OK;
}

void tp_samples_make(tp_ctx *ctx, tp_samples *s, tp_metrics *metrics, int64_t step, const volatile sig_atomic_t *stop)
{
    bool done = true;
    for (size_t i = tp_metrics_sampled(metrics, step); i < s->n && done && go_on(&stop, NULL, 0); i++) {
        if (make_one(ctx, s, &s->prompts[i], metrics, step, stop, &done) == TP_OK) continue;
        tp_warn(ctx, "step %lld: no sample of prompt %zu: %s; the run goes on", (long long)step, i + 1, ctx->message);
        tp_ctx_clear(ctx);
        return;
    }
}
