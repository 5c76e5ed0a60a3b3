/* Which tokens of a row are learned.
 *
 * A row becomes a sample: its text, and the stretches of it that are trained. The text is cut where a trained stretch begins
 * and the pieces are encoded in turn, so that the ids in front of a reply are those that serving sends, whatever the reply
 * begins with. A token is learned if it holds any byte of a trained stretch. Turns of a conversation go on behind their content
 * up to the first end-of-turn token: eos, or the first special token other than bos before the next message. */
#ifndef TP_DATA_MASK_H
#define TP_DATA_MASK_H

#include "data/chat.h"
#include "data/tokenizer.h"

#define TP_NO_LABEL (-100)

typedef struct tp_trained {
    size_t begin, end; /* bytes of the text */
    size_t limit;      /* beyond end: trained further, to the end of the first end-of-turn token that begins before limit */
} tp_trained;

typedef struct tp_sample {
    tp_buf text;
    bool rendered;       /* by a template, which wrote the special tokens itself; else bos and eos are added */
    tp_trained *trained; /* ascending; they may touch, or overlap */
    size_t n_trained, capacity;
} tp_sample;

TP_API void tp_sample_clear(tp_sample *sample); /* keeps the memory; zero-initialised samples are clear */
TP_API void tp_sample_free(tp_sample *sample);
TP_API tp_status tp_sample_train(tp_ctx *ctx, tp_sample *sample, size_t begin, size_t end, size_t limit) TP_MUST_CHECK;

/* What is known of a message: trained, and whether the assistant wrote it. */
enum { TP_MESSAGE_TRAINED = 1, TP_MESSAGE_ASSISTANT = 2 };

/* Fills `sample` from a rendered conversation. marked: the template has {% generation %} blocks; then these, and nothing else,
 * say what of an assistant's message is trained. */
TP_API tp_status tp_sample_from_chat(tp_ctx *ctx, const tp_chat_text *text, const uint8_t *messages, size_t n_messages,
                                     bool marked, tp_sample *sample) TP_MUST_CHECK;

typedef struct tp_encoded {
    tp_tokens tokens;      /* places are bytes of the sample's text */
    int32_t *ids, *labels; /* [tokens.count]; labels TP_NO_LABEL where nothing is learned, as for the first token */
    size_t ids_capacity, labels_capacity;
    int64_t n_labels;
    bool learns_end; /* an end-of-turn token is among the labels */
} tp_encoded;
TP_API void tp_encoded_free(tp_encoded *encoded);

/* Encodes bytes [begin, end) of the text, replacing what `encoded` held. Unless the text was rendered, bos is put in front
 * where begin is 0, and a trained eos behind where end is the text's. cut false: as serving does it, in one piece. Errors:
 * those of tp_tokenizer_encode. */
TP_API tp_status tp_sample_encode(tp_ctx *ctx, const tp_tokenizer *tokenizer, const tp_sample *sample, size_t begin, size_t end,
                                  bool cut, tp_encoded *encoded) TP_MUST_CHECK;

/* eos, or another special token that is not bos. */
TP_API bool tp_ends_turn(const tp_tokenizer *tokenizer, int32_t id);

#endif
