/* Decoding: prefill in chunks, then a token at a time against the KV cache; on a GPU several sequences at once. */
#ifndef TP_INFERENCE_GENERATE_H
#define TP_INFERENCE_GENERATE_H

#include "autograd/upload.h"
#include "data/tokenizer.h"
#include "inference/sampler.h"
#include "models/model.h"

/* A model made ready for decoding: cache, step arena, buffers. Adapters are whatever the model's slots hold when a call
 * begins. Under bf16 their factors are rounded to bf16; values that changed in place are seen after a reset. */
typedef struct tp_generator tp_generator;

/* Room for `context` tokens (prompt and reply). Model borrowed. */
TP_API tp_status tp_generator_open(tp_ctx *ctx, tp_model *model, int64_t context, tp_generator **generator) TP_MUST_CHECK;
/* The same for n prompts: on a GPU there is room for up to 8 of them at once, elsewhere for one. `context` is for each. */
TP_API tp_status tp_generator_open_many(tp_ctx *ctx, tp_model *model, int64_t context, size_t n,
                                        tp_generator **generator) TP_MUST_CHECK;
TP_API void tp_generator_close(tp_generator *generator);

/* Bytes that an open generator holds for such a context, with the adapters that sit in the model's slots now; their copies
 * under bf16 come on top, and the few MB of a GPU's steps. On a dry device, with a model of shapes alone. */
TP_API tp_status tp_generator_measure(tp_ctx *dry, const tp_model *model, int64_t context, uint64_t *bytes) TP_MUST_CHECK;

/* ---- token level ---- */
/* Forgets the sequence. */
TP_API void tp_generator_reset(tp_generator *generator);
/* Runs ids [n] behind what is there; *logits (host, [vocab], valid until the next call) are those after the last one.
 * SHAPE if the context is full. */
TP_API tp_status tp_generator_run(tp_ctx *ctx, tp_generator *generator, const int32_t *ids, int64_t n,
                                  float **logits) TP_MUST_CHECK;
TP_API int64_t tp_generator_used(const tp_generator *generator);

/* ---- text level ---- */
/* Ids that end a reply: the model's, and the tokenizer's own (NULL: none). Returns how many. */
#define TP_MAX_ENDS 16
TP_API int tp_end_tokens(const tp_model *model, const tp_tokenizer *tokenizer, int64_t ends[TP_MAX_ENDS]);

typedef enum tp_finish { TP_FINISH_STOP, TP_FINISH_LENGTH, TP_FINISH_CANCELLED } tp_finish;

typedef struct tp_generate_options {
    tp_sampling sampling;
    int64_t max_tokens;
    const char *const *stop; /* strings that end the text and are not part of it; NULL-terminated, may be NULL */
    const int64_t *eos_ids;
    int n_eos;
    /* Called with each piece of text that is certain (complete UTF-8, not the start of a stop string); returning false ends the
     * generation. May be NULL. */
    bool (*emit)(void *state, const char *text, size_t n);
    void *emit_state;
} tp_generate_options;

typedef struct tp_generated {
    int32_t *ids; /* new tokens, the end token included; tp_free */
    size_t n;
    tp_buf text; /* without special tokens; tp_buf_free */
    tp_finish finish;
} tp_generated;

/* tokenizer may be NULL: then there is no text and no stop strings. */
TP_API tp_status tp_generate(tp_ctx *ctx, tp_generator *generator, const tp_tokenizer *tokenizer, const int32_t *prompt,
                             size_t n_prompt, const tp_generate_options *options, tp_generated *out) TP_MUST_CHECK;
TP_API void tp_generated_free(tp_generated *out);

typedef struct tp_prompt_ids {
    const int32_t *ids;
    size_t n;
} tp_prompt_ids;

/* A finished reply, given away, to prompt `index`; returning false begins no more of them. */
typedef bool (*tp_generate_done)(void *state, size_t index, tp_generated *reply);

/* Replies to all prompts, in the order in which they end. Each is what it would be alone, with the same seed; emit hears pieces
 * of all of them. On a GPU they grow at once, as many as the generator has room for. */
TP_API tp_status tp_generate_all(tp_ctx *ctx, tp_generator *generator, const tp_tokenizer *tokenizer,
                                 const tp_prompt_ids *prompts, size_t n, const tp_generate_options *options,
                                 tp_generate_done done, void *done_state) TP_MUST_CHECK;

#endif
