/* Tokenizers from the metadata of a GGUF file (tokenizer.ggml.*).
 *
 *   "gpt2"   byte-level BPE with merges; the pre-tokenizer is a name that stands for a list of patterns, kept in a table
 *   "llama"  SentencePiece: a score for each token instead of merges. Any two neighbours whose texts together are a token
 *            may be merged, the highest score first; so every way to split a token in two is a merge of the token's rank.
 *
 * Metadata has no normalizer, decoder or post-processor: they follow from the model. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/mem.h"
#include "data/tokenizer_parts.h"

#define MARK "\xe2\x96\x81" /* U+2581 */

enum token_type { NORMAL = 1, UNKNOWN = 2, CONTROL = 3, USER_DEFINED = 4, UNUSED = 5, BYTE = 6 };

struct metadata {
    const tp_gguf *file;
    const tp_gguf_value *tokens, *types, *scores, *merges; /* arrays; NULL if absent */
    tp_tokenizer *t;
};

/* ---- pre-tokenizers by name ---- */

#define GPT2_PATTERN "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
#define TAIL         "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
#define WORD         "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
#define FOLDED       "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
#define SPELLED      "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
#define UPPER        "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]"
#define LOWER        "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
#define CASED(end)   "[^\\r\\n\\p{L}\\p{N}]?" UPPER "*" LOWER "+" end "|[^\\r\\n\\p{L}\\p{N}]?" UPPER "+" LOWER "*" end "|"
#define SLASHES      "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
#define DIGITS3      "[0-9][0-9][0-9]"

struct pre_names {
    const char *names; /* separated and surrounded by blanks */
    bool ignore_merges, add_bos;
    const char *patterns[4];
};

static const struct pre_names pre_table[] = {
    {" default ", false, false, {"[\\p{P}\\$\\+<=>\\^~\\|]+", GPT2_PATTERN, "\\p{N}+", DIGITS3}},
    {" llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 ", true, true, {FOLDED WORD "\\p{N}{1,3}" TAIL}},
    {" gpt-2 phi-2 mpt olmo jais gigachat jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code roberta-bpe a.x-4.0 "
     "mellum ",
     false,
     false,
     {GPT2_PATTERN}},
    {" smollm starcoder refact command-r codeshell exaone minerva-7b ", false, false, {"\\p{N}", GPT2_PATTERN}},
    {" qwen2 deepseek-r1-qwen stablelm2 megrez ", false, false, {FOLDED WORD "\\p{N}" TAIL}},
    {" dbrx smaug-bpe chatglm-bpe glm4 ", false, false, {SPELLED WORD "\\p{N}{1,3}" TAIL}},
    {" falcon ", false, false, {"[\\p{P}\\$\\+<=>\\^~\\|`]+", GPT2_PATTERN, DIGITS3}},
    {" tekken ", true, true, {CASED("") "\\p{N}" SLASHES}},
    {" gpt-4o llama4 ", false, false, {CASED(FOLDED "?") "\\p{N}{1,3}" SLASHES}},
    {" bloom poro-chat gpt3-finnish ", false, false, {" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"}},
    {" deepseek-coder ",
     false,
     false,
     {"[\\r\\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+|\\p{N}"}},
    {" deepseek-v3 ",
     false,
     false,
     {"\\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
      "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| "
      "?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"}},
};

static bool names_contain(const char *names, tp_span name)
{
    for (const char *p = names; (p = strchr(p, ' ')) != NULL && p[1] != '\0'; p++)
        if (strcspn(p + 1, " ") == name.len && memcmp(p + 1, name.data, name.len) == 0) return true;
    return false;
}

static tp_status find_pre(tp_ctx *ctx, const struct metadata *m, const struct pre_names **out)
{
    tp_span name = tp_span_of("default");
    TP_TRY(tp_gguf_need_string(ctx, m->file, "tokenizer.ggml.pre", false, &name));
    for (size_t i = 0; name.len > 0 && i < sizeof pre_table / sizeof *pre_table; i++) {
        if (!names_contain(pre_table[i].names, name)) continue;
        *out = &pre_table[i];
        return TP_OK;
    }
    return tp_fail(ctx, TP_UNSUPPORTED, "%s: tokenizer.ggml.pre: pre-tokenizer \"%.*s\" is not supported", m->t->name,
                   (int)(name.len < 100 ? name.len : 100), name.data);
}

static tp_status add_patterns(tp_ctx *ctx, const struct metadata *m, const struct pre_names *pre)
{
    for (int i = 0; i < 4 && pre->patterns[i] != NULL; i++) {
        tp_cut_step step = {.kind = TP_CUT_REGEX, .behavior = TP_SPLIT_ISOLATED, .pattern = tp_span_of(pre->patterns[i])};
        TP_TRY(tp_pretokenizer_add(ctx, &m->t->pretokenizer, m->t->name, &step));
    }
    return TP_OK;
}

/* ---- tokens ---- */

static tp_status find_array(tp_ctx *ctx, const struct metadata *m, const char *key, bool required, tp_gguf_type element,
                            const tp_gguf_value **out)
{
    *out = tp_gguf_find(m->file, key);
    if (*out == NULL) return required ? tp_fail(ctx, TP_FORMAT, "%s: %s is missing", m->t->name, key) : TP_OK;
    if ((*out)->type == TP_GGUF_ARRAY && (*out)->element == element) return TP_OK;
    return tp_fail(ctx, TP_FORMAT, "%s: %s: expected an array of %s", m->t->name, key,
                   element == TP_GGUF_STRING ? "strings"
                   : element == TP_GGUF_F32  ? "f32"
                                             : "i32");
}

static tp_status find_arrays(tp_ctx *ctx, struct metadata *m, bool scored)
{
    TP_TRY(find_array(ctx, m, "tokenizer.ggml.tokens", true, TP_GGUF_STRING, &m->tokens));
    TP_TRY(find_array(ctx, m, "tokenizer.ggml.token_type", false, TP_GGUF_I32, &m->types));
    TP_TRY(find_array(ctx, m, "tokenizer.ggml.scores", scored, TP_GGUF_F32, &m->scores));
    TP_TRY(find_array(ctx, m, "tokenizer.ggml.merges", !scored, TP_GGUF_STRING, &m->merges));
    if (m->types != NULL && m->types->count != m->tokens->count)
        return tp_fail(ctx, TP_FORMAT, "%s: tokenizer.ggml.token_type has %llu entries, tokens %llu", m->t->name,
                       (unsigned long long)m->types->count, (unsigned long long)m->tokens->count);
    if (scored && m->scores->count != m->tokens->count)
        return tp_fail(ctx, TP_FORMAT, "%s: tokenizer.ggml.scores has %llu entries, tokens %llu", m->t->name,
                       (unsigned long long)m->scores->count, (unsigned long long)m->tokens->count);
    return TP_OK;
}

static int64_t type_of(const struct metadata *m, uint64_t i)
{
    return m->types != NULL ? tp_gguf_i64_at(m->types, i) : NORMAL;
}

static tp_status load_tokens(tp_ctx *ctx, const struct metadata *m)
{
    tp_vocabulary *v = &m->t->vocabulary;
    size_t bytes = 0;
    for (uint64_t i = 0; i < m->tokens->count; i++)
        bytes += tp_gguf_string_at(m->file, m->tokens, i).len; /* parts of one file */
    TP_TRY(tp_vocabulary_init(ctx, v, (size_t)m->tokens->count, bytes));
    for (uint64_t i = 0; i < m->tokens->count; i++) {
        tp_span text = tp_gguf_string_at(m->file, m->tokens, i);
        if (tp_utf8_valid_prefix(text.data, text.len) != text.len)
            return tp_fail(ctx, TP_FORMAT, "%s: tokenizer.ggml.tokens[%llu] is not valid UTF-8", m->t->name,
                           (unsigned long long)i);
        TP_TRY(tp_vocabulary_add(ctx, v, "tokenizer.ggml.tokens", text, (int64_t)i, false));
    }
    return TP_OK;
}

/* Control and unknown tokens are special; tokens that users defined are cut out of the text, but are text. */
static tp_status add_added_tokens(tp_ctx *ctx, const struct metadata *m)
{
    for (uint64_t i = 0; i < m->tokens->count; i++) {
        int64_t type = type_of(m, i);
        if (type != CONTROL && type != UNKNOWN && type != USER_DEFINED) continue;
        tp_added_token token = {
            .content = tp_vocabulary_text(&m->t->vocabulary, (int64_t)i), .id = (int32_t)i, .special = type != USER_DEFINED};
        TP_TRY(tp_tokenizer_add_token(ctx, m->t, &token));
    }
    return TP_OK;
}

/* ---- roles, template ---- */

static tp_status read_role(tp_ctx *ctx, const struct metadata *m, const char *key, const char *name, tp_token_role role)
{
    int64_t id = -1;
    TP_TRY(tp_gguf_need_i64(ctx, m->file, key, false, 0, (int64_t)m->t->vocabulary.size - 1, &id));
    if (id < 0) return TP_OK;
    m->t->roles[role] = (int32_t)id;
    return tp_named_texts_add(ctx, &m->t->named, tp_span_of(name), tp_vocabulary_text(&m->t->vocabulary, id));
}

static tp_status read_roles(tp_ctx *ctx, const struct metadata *m)
{
    TP_TRY(read_role(ctx, m, "tokenizer.ggml.bos_token_id", "bos_token", TP_TOKEN_BOS));
    TP_TRY(read_role(ctx, m, "tokenizer.ggml.eos_token_id", "eos_token", TP_TOKEN_EOS));
    TP_TRY(read_role(ctx, m, "tokenizer.ggml.unknown_token_id", "unk_token", TP_TOKEN_UNK));
    return read_role(ctx, m, "tokenizer.ggml.padding_token_id", "pad_token", TP_TOKEN_PAD);
}

static tp_status add_sequence(tp_ctx *ctx, const struct metadata *m, tp_template *out, tp_template_kind kind, bool bos,
                              bool eos)
{
    int32_t type_id = kind == TP_TEMPLATE_SECOND;
    if (bos) TP_TRY(tp_template_add(ctx, out, TP_TEMPLATE_SPECIAL, m->t->roles[TP_TOKEN_BOS], type_id));
    TP_TRY(tp_template_add(ctx, out, kind, 0, type_id));
    return eos ? tp_template_add(ctx, out, TP_TEMPLATE_SPECIAL, m->t->roles[TP_TOKEN_EOS], type_id) : TP_OK;
}

static tp_status read_template(tp_ctx *ctx, const struct metadata *m, bool bos, bool eos)
{
    tp_postprocessor *post = &m->t->post;
    TP_TRY(tp_gguf_need_bool(ctx, m->file, "tokenizer.ggml.add_bos_token", false, &bos));
    TP_TRY(tp_gguf_need_bool(ctx, m->file, "tokenizer.ggml.add_eos_token", false, &eos));
    bos = bos && m->t->roles[TP_TOKEN_BOS] >= 0;
    eos = eos && m->t->roles[TP_TOKEN_EOS] >= 0;
    TP_TRY(add_sequence(ctx, m, &post->single, TP_TEMPLATE_FIRST, bos, eos));
    TP_TRY(add_sequence(ctx, m, &post->pair, TP_TEMPLATE_FIRST, bos, eos));
    return add_sequence(ctx, m, &post->pair, TP_TEMPLATE_SECOND, bos, eos);
}

static tp_status read_chat_templates(tp_ctx *ctx, const struct metadata *m)
{
    static const char key[] = "tokenizer.chat_template";
    for (size_t i = 0; i < tp_gguf_value_count(m->file); i++) {
        const tp_gguf_value *value = tp_gguf_value_at(m->file, i);
        size_t n = sizeof key - 1;
        if (value->type != TP_GGUF_STRING || strncmp(value->key, key, n) != 0) continue;
        if (value->key[n] != '\0' && value->key[n] != '.') continue;
        tp_span text = {NULL, 0}, name = tp_span_of(value->key[n] == '.' ? value->key + n + 1 : "default");
        TP_TRY(tp_gguf_need_string(ctx, m->file, value->key, true, &text));
        if (tp_utf8_valid_prefix(text.data, text.len) != text.len)
            return tp_fail(ctx, TP_FORMAT, "%s: %s is not valid UTF-8", m->t->name, value->key);
        TP_TRY(tp_named_texts_add(ctx, &m->t->templates, name, text));
    }
    return TP_OK;
}

/* ---- the two models ---- */

static tp_status load_merges(tp_ctx *ctx, const struct metadata *m, tp_bpe *bpe)
{
    char where[64];
    for (uint64_t i = 0; i < m->merges->count; i++) {
        tp_span text = tp_gguf_string_at(m->file, m->merges, i);
        const char *blank = text.len > 1 ? memchr(text.data + 1, ' ', text.len - 1) : NULL;
        snprintf(where, sizeof where, "tokenizer.ggml.merges[%llu]", (unsigned long long)i);
        if (blank == NULL)
            return tp_fail(ctx, TP_FORMAT, "%s: %s: expected two tokens with a blank between them", m->t->name, where);
        size_t n = (size_t)(blank - text.data);
        TP_TRY(tp_bpe_add_merge(ctx, bpe, where, (tp_span){text.data, n}, (tp_span){blank + 1, text.len - n - 1}));
    }
    return TP_OK;
}

static tp_status load_byte_level(tp_ctx *ctx, const struct metadata *m)
{
    const struct pre_names *pre = NULL;
    tp_bpe *bpe = NULL;
    TP_TRY(find_pre(ctx, m, &pre));
    TP_TRY(add_patterns(ctx, m, pre));
    tp_bpe_options options = {.bytes = true, .unk_id = -1, .ignore_merges = pre->ignore_merges};
    TP_TRY(tp_bpe_new(ctx, &m->t->vocabulary, &options, (size_t)m->merges->count, &bpe));
    m->t->model_state = bpe;
    TP_TRY(load_merges(ctx, m, bpe));
    TP_TRY(read_template(ctx, m, pre->add_bos, false));
    tp_decode_stage stage = {.kind = TP_DECODE_BYTE_LEVEL};
    return tp_decoder_add(ctx, &m->t->decoder, m->t->name, &stage);
}

struct scored {
    double score;
    int32_t id;
};

static int by_score(const void *a, const void *b)
{
    const struct scored *x = a, *y = b;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    return (x->id > y->id) - (x->id < y->id);
}

/* Merges in the order of scores; equal scores are equal ranks. */
static tp_status add_scored_merges(tp_ctx *ctx, const struct metadata *m, tp_bpe *bpe, struct scored *list)
{
    size_t n = 0;
    for (uint64_t i = 0; i < m->tokens->count; i++) {
        double score = tp_gguf_f64_at(m->scores, i);
        if (!(fabs(score) <= 3.5e38))
            return tp_fail(ctx, TP_FORMAT, "%s: tokenizer.ggml.scores[%llu] is not a number", m->t->name,
                           (unsigned long long)i);
        if (type_of(m, i) == NORMAL) list[n++] = (struct scored){score, (int32_t)i};
    }
    qsort(list, n, sizeof *list, by_score);
    uint32_t rank = 0;
    for (size_t i = 0; i < n; i++) {
        if (i > 0 && list[i].score != list[i - 1].score) rank++;
        TP_TRY(tp_bpe_add_token_merges(ctx, bpe, list[i].id, rank));
    }
    return TP_OK;
}

static tp_status add_marks(tp_ctx *ctx, const struct metadata *m, bool prefix)
{
    tp_normal_step prepend = {.kind = TP_NORMAL_PREPEND, .content = tp_span_of(MARK)};
    tp_normal_step replace = {.kind = TP_NORMAL_REPLACE, .pattern = tp_span_of(" "), .content = tp_span_of(MARK)};
    if (prefix) TP_TRY(tp_normalizer_add(ctx, &m->t->normalizer, m->t->name, &prepend));
    return tp_normalizer_add(ctx, &m->t->normalizer, m->t->name, &replace);
}

static tp_status add_mark_decoder(tp_ctx *ctx, const struct metadata *m, bool prefix)
{
    const tp_decode_stage stages[] = {
        {.kind = TP_DECODE_REPLACE, .pattern = tp_span_of(MARK), .content = tp_span_of(" ")},
        {.kind = TP_DECODE_BYTE_FALLBACK},
        {.kind = TP_DECODE_FUSE},
        {.kind = TP_DECODE_STRIP, .pattern = tp_span_of(" "), .start = 1},
    };
    for (int i = 0; i < (prefix ? 4 : 3); i++) TP_TRY(tp_decoder_add(ctx, &m->t->decoder, m->t->name, &stages[i]));
    return TP_OK;
}

static tp_status load_scored(tp_ctx *ctx, const struct metadata *m)
{
    bool prefix = true;
    tp_bpe *bpe = NULL;
    TP_TRY(tp_gguf_need_bool(ctx, m->file, "tokenizer.ggml.add_space_prefix", false, &prefix));
    TP_TRY(add_marks(ctx, m, prefix));
    TP_TRY(add_mark_decoder(ctx, m, prefix));
    tp_bpe_options options = {.byte_fallback = true, .late_fallback = true, .unk_id = m->t->roles[TP_TOKEN_UNK]};
    TP_TRY(tp_bpe_new(ctx, &m->t->vocabulary, &options, 2 * m->t->vocabulary.count, &bpe));
    m->t->model_state = bpe;
    struct scored *list = tp_alloc_raw(ctx, (size_t)m->tokens->count, sizeof *list);
    if (list == NULL) return TP_NOMEM;
    tp_status status = add_scored_merges(ctx, m, bpe, list);
    tp_free(list);
    return status == TP_OK ? read_template(ctx, m, true, false) : status;
}

static tp_status load(tp_ctx *ctx, struct metadata *m)
{
    tp_span model = {NULL, 0};
    TP_TRY(tp_gguf_need_string(ctx, m->file, "tokenizer.ggml.model", true, &model));
    bool scored = tp_span_is(model, "llama");
    if (!scored && !tp_span_is(model, "gpt2"))
        return tp_fail(ctx, TP_UNSUPPORTED, "%s: tokenizer.ggml.model \"%.*s\" is not supported, only gpt2 and llama are",
                       m->t->name, (int)(model.len < 100 ? model.len : 100), model.data);
    TP_TRY(find_arrays(ctx, m, scored));
    TP_TRY(load_tokens(ctx, m));
    TP_TRY(read_roles(ctx, m));
    m->t->model = &tp_bpe_model;
    TP_TRY(scored ? load_scored(ctx, m) : load_byte_level(ctx, m));
    tp_bpe_finish(m->t->model_state);
    m->t->fingerprint = tp_bpe_fingerprint(m->t->model_state);
    TP_TRY(add_added_tokens(ctx, m));
    TP_TRY(read_chat_templates(ctx, m));
    return tp_tokenizer_finish(ctx, m->t);
}

tp_status tp_tokenizer_from_gguf(tp_ctx *ctx, const tp_gguf *file, tp_tokenizer **out)
{
    struct metadata m = {.file = file};
    const char *path = tp_gguf_path(file);
    *out = NULL;
    TP_TRY(tp_tokenizer_new(ctx, path != NULL ? path : "GGUF", &m.t));
    tp_status status = load(ctx, &m);
    for (size_t i = 0; status == TP_OK && i < tp_gguf_value_count(file); i++) {
        const tp_gguf_value *value = tp_gguf_value_at(file, i);
        if (tp_starts_with(value->key, "tokenizer.")) tp_tokenizer_identify(m.t, value->key, value->data, (size_t)value->bytes);
    }
    if (status == TP_OK)
        *out = m.t;
    else
        tp_tokenizer_free(m.t);
    return status;
}
