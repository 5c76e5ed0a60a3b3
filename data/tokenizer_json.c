/* tokenizer.json: model, vocabulary and added tokens. The pipelines are read by tokenizer_json_steps.c. */
#include "base/file.h"
#include "base/mem.h"
#include "data/tokenizer_parts.h"

#define AFFIX_MAX 256                             /* bytes: a prefix stands before each character of a word */
#define NODES_MAX (8 * (size_t)TP_VOCABULARY_MAX) /* values and keys: a key, an id and a merge of three for each token */

static const tp_token_model *const token_models[] = {&tp_bpe_model, NULL};

/* Puts the place of a value in front of the message that was recorded. */
static tp_status failed_at(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *value)
{
    char where[512];
    return tp_fail_in(ctx, "%s", tp_json_where(doc, value, where, sizeof where));
}

static tp_status refuse(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *value, tp_status status, const char *problem)
{
    char where[512];
    return tp_fail(ctx, status, "%s: %s", tp_json_where(doc, value, where, sizeof where), problem);
}

/* ---- BPE ---- */

/* The two parts of a merge: a pair, or a string with one blank. */
static tp_status merge_parts(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *merge, tp_span *left, tp_span *right)
{
    if (tp_json_type_of(merge) == TP_JSON_STRING) {
        tp_span text = tp_json_string(merge);
        const char *blank = memchr(text.data, ' ', text.len);
        size_t n = blank != NULL ? (size_t)(blank - text.data) : 0;
        if (blank == NULL || memchr(blank + 1, ' ', text.len - n - 1) != NULL)
            return refuse(ctx, doc, merge, TP_FORMAT, "merge: expected two tokens with one blank between them");
        *left = (tp_span){text.data, n};
        *right = (tp_span){blank + 1, text.len - n - 1};
        return TP_OK;
    }
    const tp_json *a = tp_json_at(merge, 0), *b = tp_json_at(merge, 1);
    if (tp_json_type_of(merge) != TP_JSON_ARRAY || tp_json_count(merge) != 2 || tp_json_type_of(a) != TP_JSON_STRING ||
        tp_json_type_of(b) != TP_JSON_STRING)
        return refuse(ctx, doc, merge, TP_FORMAT, "merge: expected a string or a pair of strings");
    *left = tp_json_string(a);
    *right = tp_json_string(b);
    return TP_OK;
}

static bool is_version_line(const tp_json *merge)
{
    tp_span text = tp_json_string(merge);
    return text.len >= 8 && memcmp(text.data, "#version", 8) == 0;
}

static tp_status load_merges(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *merges, tp_bpe *bpe)
{
    for (size_t i = 0; i < tp_json_count(merges); i++) {
        const tp_json *merge = tp_json_at(merges, i);
        tp_span left, right;
        if (is_version_line(merge)) continue;
        TP_TRY(merge_parts(ctx, doc, merge, &left, &right));
        if (tp_bpe_add_merge(ctx, bpe, "merge", left, right) != TP_OK) return failed_at(ctx, doc, merge);
    }
    return TP_OK;
}

static tp_status load_vocabulary(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *vocab, tp_vocabulary *vocabulary)
{
    for (size_t i = 0; i < tp_json_count(vocab); i++) {
        const tp_json *value = tp_json_at(vocab, i);
        int64_t id;
        if (!tp_json_i64(value, &id)) return refuse(ctx, doc, value, TP_FORMAT, "vocab: expected an integer id");
        if (tp_vocabulary_add(ctx, vocabulary, "vocab", tp_json_key_at(vocab, i), id, false) != TP_OK)
            return failed_at(ctx, doc, value);
    }
    return TP_OK;
}

/* Text that ends up in the byte alphabet need not be rewritten when the model can work on bytes: the last step of the
 * pre-tokenizer becomes a property of the model. */
static bool take_byte_level(tp_tokenizer *t, const tp_bpe_options *o)
{
    tp_pretokenizer *pre = &t->pretokenizer;
    if (o->byte_fallback || o->prefix.len > 0 || o->suffix.len > 0) return false;
    if (pre->count == 0 || pre->steps[pre->count - 1].kind != TP_CUT_BYTE_LEVEL) return false;
    for (size_t i = 0; i + 1 < pre->count; i++)
        if (pre->steps[i].kind == TP_CUT_BYTE_LEVEL) return false;
    tp_pretokenizer_drop_last(pre);
    return true;
}

static tp_status optional_string(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *object, const char *key, tp_span *out)
{
    *out = (tp_span){"", 0};
    return tp_json_need_string(ctx, doc, object, key, false, out);
}

static tp_status bpe_options(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *model, tp_tokenizer *t, tp_bpe_options *o)
{
    double dropout = 0;
    tp_span unk = {NULL, 0};
    *o = (tp_bpe_options){.unk_id = -1};
    TP_TRY(tp_json_need_f64(ctx, doc, model, "dropout", false, 0, 1, &dropout));
    if (dropout > 0)
        return refuse(ctx, doc, tp_json_get(model, "dropout"), TP_UNSUPPORTED, "dropout: merges at random are not supported");
    TP_TRY(tp_json_need_bool(ctx, doc, model, "byte_fallback", false, &o->byte_fallback));
    TP_TRY(tp_json_need_bool(ctx, doc, model, "fuse_unk", false, &o->fuse_unk));
    TP_TRY(tp_json_need_bool(ctx, doc, model, "ignore_merges", false, &o->ignore_merges));
    TP_TRY(optional_string(ctx, doc, model, "continuing_subword_prefix", &o->prefix));
    TP_TRY(optional_string(ctx, doc, model, "end_of_word_suffix", &o->suffix));
    if (o->prefix.len > AFFIX_MAX || o->suffix.len > AFFIX_MAX)
        return refuse(ctx, doc, model, TP_UNSUPPORTED,
                      "continuing_subword_prefix or end_of_word_suffix of more than 256 bytes");
    TP_TRY(tp_json_need_string(ctx, doc, model, "unk_token", false, &unk));
    if (unk.data != NULL) {
        o->unk_id = tp_vocabulary_find(&t->vocabulary, unk);
        if (o->unk_id < 0) o->missing_unk = unk;
    }
    o->bytes = take_byte_level(t, o);
    return TP_OK;
}

static tp_status bpe_measure(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *model, size_t *count, size_t *bytes)
{
    const tp_json *vocab = tp_json_get(model, "vocab");
    if (tp_json_type_of(vocab) != TP_JSON_OBJECT)
        return refuse(ctx, doc, vocab != NULL ? vocab : model, TP_FORMAT, "model: expected vocab, an object of ids");
    if (tp_json_type_of(tp_json_get(model, "merges")) != TP_JSON_ARRAY)
        return refuse(ctx, doc, model, TP_FORMAT, "model: expected merges, an array");
    *count = tp_json_count(vocab);
    *bytes = 0;
    for (size_t i = 0; i < *count; i++) *bytes += tp_json_key_at(vocab, i).len; /* parts of one text: no overflow */
    return TP_OK;
}

static tp_status bpe_load(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *model, tp_tokenizer *t)
{
    tp_bpe_options options;
    tp_bpe *bpe = NULL;
    const tp_json *merges = tp_json_get(model, "merges");
    TP_TRY(load_vocabulary(ctx, doc, tp_json_get(model, "vocab"), &t->vocabulary));
    TP_TRY(bpe_options(ctx, doc, model, t, &options));
    TP_TRY(tp_bpe_new(ctx, &t->vocabulary, &options, tp_json_count(merges), &bpe));
    t->model_state = bpe;
    TP_TRY(load_merges(ctx, doc, merges, bpe));
    tp_bpe_finish(bpe);
    t->fingerprint = tp_bpe_fingerprint(bpe);
    return TP_OK;
}

static tp_status bpe_encode(tp_ctx *ctx, const void *state, struct tp_encode_scratch *scratch, const char *text, size_t begin,
                            size_t end, tp_tokens *out)
{
    return tp_bpe_encode(ctx, state, &scratch->bpe, text, begin, end, out);
}

static void bpe_free(void *state)
{
    tp_bpe_free(state);
}

const tp_token_model tp_bpe_model = {"BPE", bpe_measure, bpe_load, bpe_encode, bpe_free};

/* ---- added tokens ---- */

static tp_status read_added(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *value, tp_added_token *token)
{
    int64_t id;
    if (tp_json_type_of(value) != TP_JSON_OBJECT) return refuse(ctx, doc, value, TP_FORMAT, "added_tokens: expected an object");
    TP_TRY(tp_json_need_i64(ctx, doc, value, "id", true, 0, TP_VOCABULARY_MAX - 1, &id));
    TP_TRY(tp_json_need_string(ctx, doc, value, "content", true, &token->content));
    TP_TRY(tp_json_need_bool(ctx, doc, value, "single_word", false, &token->single_word));
    TP_TRY(tp_json_need_bool(ctx, doc, value, "lstrip", false, &token->lstrip));
    TP_TRY(tp_json_need_bool(ctx, doc, value, "rstrip", false, &token->rstrip));
    TP_TRY(tp_json_need_bool(ctx, doc, value, "special", false, &token->special));
    token->normalized = !token->special;
    return tp_json_need_bool(ctx, doc, value, "normalized", false, &token->normalized);
}

/* The reference library does not use the ids of the file: content that the model knows keeps the model's id, the rest is
 * numbered from the model's token count upwards. Files agree with this unless they are broken. */
static tp_status load_added(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *list, tp_tokenizer *t)
{
    int64_t next = (int64_t)t->vocabulary.count;
    for (size_t i = 0; i < tp_json_count(list); i++) {
        const tp_json *value = tp_json_at(list, i);
        tp_added_token token = {0};
        TP_TRY(read_added(ctx, doc, value, &token));
        if (token.content.len == 0) continue;
        token.id = tp_vocabulary_find_any(&t->vocabulary, token.content);
        if (token.id < 0) {
            if (tp_vocabulary_add(ctx, &t->vocabulary, "added_tokens", token.content, next, true) != TP_OK)
                return failed_at(ctx, doc, value);
            token.id = (int32_t)next;
        }
        if (token.id >= next) next = (int64_t)token.id + 1;
        if (tp_tokenizer_add_token(ctx, t, &token) != TP_OK) return failed_at(ctx, doc, value);
    }
    return TP_OK;
}

static void measure_added(const tp_json *list, size_t *count, size_t *bytes)
{
    *count += tp_json_count(list);
    for (size_t i = 0; i < tp_json_count(list); i++) *bytes += tp_json_string(tp_json_get(tp_json_at(list, i), "content")).len;
}

/* ---- the whole file ---- */

/* Files without model.type are old, and BPE if they have merges. */
static tp_status find_model(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *model, const tp_token_model **out)
{
    tp_span type = tp_span_of("BPE");
    if (tp_json_type_of(model) != TP_JSON_OBJECT)
        return refuse(ctx, doc, model != NULL ? model : tp_json_root(doc), TP_FORMAT, "model: expected an object");
    TP_TRY(tp_json_need_string(ctx, doc, model, "type", tp_json_get(model, "merges") == NULL, &type));
    for (const tp_token_model *const *m = token_models; *m != NULL; m++) {
        if (!tp_span_is(type, (*m)->type)) continue;
        *out = *m;
        return TP_OK;
    }
    char where[512];
    return tp_fail(ctx, TP_UNSUPPORTED, "%s: tokenizer model \"%.*s\" is not supported, only BPE is",
                   tp_json_where(doc, model, where, sizeof where), (int)(type.len < 100 ? type.len : 100), type.data);
}

static tp_status load(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *root, tp_tokenizer *t)
{
    size_t count, bytes;
    const tp_token_model *kind = NULL;
    const tp_json *model = tp_json_get(root, "model"), *added = tp_json_get(root, "added_tokens");
    if (tp_json_type_of(root) != TP_JSON_OBJECT) return refuse(ctx, doc, root, TP_FORMAT, "expected an object");
    if (added != NULL && tp_json_type_of(added) != TP_JSON_ARRAY && tp_json_type_of(added) != TP_JSON_NULL)
        return refuse(ctx, doc, added, TP_FORMAT, "added_tokens: expected an array");
    TP_TRY(find_model(ctx, doc, model, &kind));
    TP_TRY(tp_read_normalizer(ctx, doc, tp_json_get(root, "normalizer"), &t->normalizer));
    TP_TRY(tp_read_pretokenizer(ctx, doc, tp_json_get(root, "pre_tokenizer"), &t->pretokenizer));
    TP_TRY(tp_read_decoder(ctx, doc, tp_json_get(root, "decoder"), &t->decoder));
    TP_TRY(kind->measure(ctx, doc, model, &count, &bytes));
    measure_added(added, &count, &bytes);
    TP_TRY(tp_vocabulary_init(ctx, &t->vocabulary, count, bytes));
    t->model = kind;
    TP_TRY(kind->load(ctx, doc, model, t));
    TP_TRY(load_added(ctx, doc, added, t));
    TP_TRY(tp_read_postprocessor(ctx, doc, tp_json_get(root, "post_processor"), &t->vocabulary, &t->post));
    return tp_tokenizer_finish(ctx, t);
}

tp_status tp_tokenizer_from_json(tp_ctx *ctx, const char *name, const char *text, size_t n, tp_tokenizer **out)
{
    tp_json_doc *doc = NULL;
    tp_tokenizer *t = NULL;
    *out = NULL;
    /* strict: half a surrogate pair would become U+FFFD, and the token another one */
    const tp_json_options options = {.name = name, .max_nodes = NODES_MAX, .strict_surrogates = true};
    TP_TRY(tp_json_parse(ctx, text, n, &options, &doc));
    tp_status status = tp_tokenizer_new(ctx, name, &t);
    if (status == TP_OK) status = load(ctx, doc, tp_json_root(doc), t);
    if (status == TP_OK) tp_tokenizer_identify(t, "tokenizer.json", text, n);
    tp_json_free(doc);
    if (status == TP_OK)
        *out = t;
    else
        tp_tokenizer_free(t);
    return status;
}

static tp_status open_file(tp_ctx *ctx, const char *path, tp_tokenizer **out)
{
    char *text = NULL;
    size_t n;
    TP_TRY(tp_file_read(ctx, path, TP_TOKENIZER_JSON_BYTES, &text, &n));
    tp_status status = tp_tokenizer_from_json(ctx, path, text, n, out);
    tp_free(text);
    return status;
}

tp_status tp_tokenizer_open(tp_ctx *ctx, const char *path, tp_tokenizer **out)
{
    *out = NULL;
    if (!tp_path_is_folder(path)) return open_file(ctx, path, out);
    char *file = NULL;
    TP_TRY(tp_path_beneath(ctx, path, "tokenizer.json", &file));
    tp_status status = open_file(ctx, file, out);
    tp_free(file);
    if (status == TP_OK) status = tp_read_tokenizer_config(ctx, path, *out);
    if (status != TP_OK) {
        tp_tokenizer_free(*out);
        *out = NULL;
    }
    return status;
}
