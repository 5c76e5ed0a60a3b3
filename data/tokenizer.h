/* Tokenizers: text to token ids and back, as the reference libraries do it.
 *
 * A tokenizer comes from a Hugging Face tokenizer.json (with tokenizer_config.json beside it) or from the metadata of a
 * GGUF file. Encoding goes
 *     added tokens in the raw text -> normalizer -> added tokens in the normalized text -> pre-tokenizer -> model
 *     -> post-processor
 * and decoding through a chain of decoder stages. The model is BPE in all its forms (byte-level, SentencePiece-like with
 * byte fallback, with scores); other models are refused by name.
 *
 * An opened tokenizer does not change and may be used by several threads. What an encoding or decoding needs besides
 * belongs to its tp_tokens or tp_stream_decoder. `truncation` and `padding` of tokenizer.json are not applied. */
#ifndef TP_DATA_TOKENIZER_H
#define TP_DATA_TOKENIZER_H

#include "base/gguf.h"
#include "base/status.h"
#include "base/text.h"
#include "data/tokens.h"

#ifdef __cplusplus
extern "C" {
#endif

#define TP_TOKENIZER_JSON_BYTES   ((size_t)1 << 29) /* the largest published files have 35 MB */
#define TP_TOKENIZER_CONFIG_BYTES ((size_t)1 << 26) /* added_tokens_decoder makes some files large */
#define TP_TEMPLATE_FILE_BYTES    ((size_t)1 << 20)

typedef struct tp_tokenizer tp_tokenizer;

/* ---- opening ---- */
/* `path` is a tokenizer.json file, or a folder with one; of a folder tokenizer_config.json, special_tokens_map.json and
 * chat_template.jinja are read too, where they exist. IO_READ, FORMAT (malformed), UNSUPPORTED (a model, normalizer,
 * pre-tokenizer, post-processor or decoder this reader does not know; the message names it). */
TP_API tp_status tp_tokenizer_open(tp_ctx *ctx, const char *path, tp_tokenizer **tokenizer) TP_MUST_CHECK;
/* tokenizer.json as text; `name` is used in messages. Nothing is borrowed. */
TP_API tp_status tp_tokenizer_from_json(tp_ctx *ctx, const char *name, const char *text, size_t n,
                                        tp_tokenizer **tokenizer) TP_MUST_CHECK;
/* tokenizer.ggml.*: models "gpt2" (with the pre-tokenizers of llama.cpp) and "llama". Nothing is borrowed. */
TP_API tp_status tp_tokenizer_from_gguf(tp_ctx *ctx, const tp_gguf *file, tp_tokenizer **tokenizer) TP_MUST_CHECK;
TP_API void tp_tokenizer_free(tp_tokenizer *tokenizer);

/* SHA-256 in hexadecimal over all the files, or metadata values, that it was read from: tokenizers with equal identities give
 * equal ids and templates. Borrowed. */
TP_API const char *tp_tokenizer_identity(const tp_tokenizer *tokenizer);

/* ---- encoding ---- */
typedef enum tp_encode_flags {
    TP_ENCODE_PLAIN = 0,
    TP_ENCODE_ADD_SPECIAL = 1,     /* bos, eos and the like, as the post-processor says */
    TP_ENCODE_SPECIAL_AS_TEXT = 2, /* special tokens in the text are text: for what users write */
    TP_ENCODE_APPEND = 4           /* keep what `tokens` holds already and append */
} tp_encode_flags;

/* Fills `tokens`. Places are byte offsets in text[0..n). INVALID if the text is not UTF-8; UNSUPPORTED if a regex of
 * the tokenizer takes too many steps on it. */
TP_API tp_status tp_tokenizer_encode(tp_ctx *ctx, const tp_tokenizer *tokenizer, tp_span text, unsigned flags,
                                     tp_tokens *tokens) TP_MUST_CHECK;
/* Two texts with the template for pairs; places are offsets in the text that the token comes from (type_id tells which
 * for most tokenizers). */
TP_API tp_status tp_tokenizer_encode_pair(tp_ctx *ctx, const tp_tokenizer *tokenizer, tp_span first, tp_span second,
                                          unsigned flags, tp_tokens *tokens) TP_MUST_CHECK;

/* ---- decoding ---- */
/* Appends the text of ids[0..n) to `out`: always valid UTF-8. Ids without token are left out, as are special tokens
 * with skip_special. clean_up_tokenization_spaces of tokenizer_config.json is not applied: it loses information. */
TP_API tp_status tp_tokenizer_decode(tp_ctx *ctx, const tp_tokenizer *tokenizer, const int32_t *ids, size_t n,
                                     bool skip_special, tp_buf *out) TP_MUST_CHECK;

/* Decoding token by token: the pieces together are what tp_tokenizer_decode gives for the whole sequence. */
typedef struct tp_stream_decoder tp_stream_decoder;
TP_API tp_status tp_stream_decoder_new(tp_ctx *ctx, const tp_tokenizer *tokenizer, bool skip_special,
                                       tp_stream_decoder **decoder) TP_MUST_CHECK;
TP_API void tp_stream_decoder_free(tp_stream_decoder *decoder);
/* Appends the bytes that no later token can change; often none, never part of a character. */
TP_API tp_status tp_stream_decoder_push(tp_ctx *ctx, tp_stream_decoder *decoder, int32_t id, tp_buf *out) TP_MUST_CHECK;
/* Appends what was held back and starts over. */
TP_API tp_status tp_stream_decoder_finish(tp_ctx *ctx, tp_stream_decoder *decoder, tp_buf *out) TP_MUST_CHECK;

/* ---- the vocabulary ---- */
TP_API size_t tp_tokenizer_size(const tp_tokenizer *tokenizer); /* highest id + 1 */
/* The token as the vocabulary writes it (byte-level tokenizers write a blank as U+0120); data is NULL if there is none. */
TP_API tp_span tp_tokenizer_token(const tp_tokenizer *tokenizer, int64_t id);
TP_API int32_t tp_tokenizer_id(const tp_tokenizer *tokenizer, tp_span token); /* -1 if there is none */
TP_API bool tp_tokenizer_is_special(const tp_tokenizer *tokenizer, int64_t id);

/* ---- roles and templates, from tokenizer_config.json or GGUF metadata ---- */
typedef enum tp_token_role { TP_TOKEN_BOS, TP_TOKEN_EOS, TP_TOKEN_UNK, TP_TOKEN_PAD } tp_token_role;
TP_API int32_t tp_tokenizer_role(const tp_tokenizer *tokenizer, tp_token_role role);      /* id, or -1 */
TP_API tp_span tp_tokenizer_role_text(const tp_tokenizer *tokenizer, tp_token_role role); /* empty if none */
/* Whether encoding with TP_ENCODE_ADD_SPECIAL puts bos in front, eos behind. */
TP_API bool tp_tokenizer_adds_bos(const tp_tokenizer *tokenizer);
TP_API bool tp_tokenizer_adds_eos(const tp_tokenizer *tokenizer);

/* Named special tokens for chat templates: "bos_token", "eos_token", ...; "additional_special_tokens" once for each. False
 * behind the last. */
TP_API bool tp_tokenizer_named(const tp_tokenizer *tokenizer, size_t i, tp_span *name, tp_span *token);
/* The chat template; name NULL or "default" for the usual one. data is NULL if there is none. */
TP_API tp_span tp_tokenizer_chat_template(const tp_tokenizer *tokenizer, const char *name);

#ifdef __cplusplus
}
#endif
#endif
