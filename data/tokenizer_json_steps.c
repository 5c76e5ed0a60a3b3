/* The pipelines of tokenizer.json: normalizer, pre_tokenizer, decoder, post_processor. Each is one object or a Sequence of
 * such objects, which may nest; a table lists the types that are known, and any other one is refused by name. */
#include "base/mem.h"
#include "data/tokenizer_parts.h"

#define PARTS_MAX 256 /* objects in a pipeline: the place of each is searched from the beginning of the file */

struct reader {
    tp_ctx *ctx;
    const tp_json_doc *doc;
    const tp_json *value; /* the object at hand */
    char where[512];      /* its place */
    const tp_vocabulary *vocabulary;
    void *out;
};

struct part {
    const char *type;
    tp_status (*read)(struct reader *);
};

static tp_status refuse(struct reader *r, tp_status status, const char *problem)
{
    return tp_fail(r->ctx, status, "%s: %s", r->where, problem);
}

static tp_status read_part(struct reader *r, const char *pipeline, const struct part *parts)
{
    tp_span type;
    tp_json_where(r->doc, r->value, r->where, sizeof r->where);
    TP_TRY(tp_json_need_string(r->ctx, r->doc, r->value, "type", true, &type));
    for (; parts->type != NULL; parts++)
        if (tp_span_is(type, parts->type)) return parts->read(r);
    return tp_fail(r->ctx, TP_UNSUPPORTED, "%s: %s \"%.*s\" is not supported", r->where, pipeline,
                   (int)(type.len < 100 ? type.len : 100), type.data);
}

/* Reads `value` and, if it is a Sequence, what is in it, in order; nesting is as deep as JSON may be. */
static tp_status read_pipeline(struct reader *r, const tp_json *value, const char *pipeline, const char *list,
                               const struct part *parts)
{
    struct {
        const tp_json *items;
        size_t next;
    } open[TP_JSON_DEPTH];
    size_t depth = 0;
    if (tp_json_type_of(value) == TP_JSON_NULL) return TP_OK;
    for (int n_parts = 1;; n_parts++) {
        r->value = value;
        tp_json_where(r->doc, value, r->where, sizeof r->where);
        if (n_parts > PARTS_MAX)
            return tp_fail(r->ctx, TP_UNSUPPORTED, "%s: %s: more than %d parts", r->where, pipeline, PARTS_MAX);
        if (tp_json_type_of(value) != TP_JSON_OBJECT)
            return tp_fail(r->ctx, TP_FORMAT, "%s: %s: expected an object", r->where, pipeline);
        if (tp_span_is(tp_json_string(tp_json_get(value, "type")), "Sequence")) {
            const tp_json *items = tp_json_get(value, list);
            if (tp_json_type_of(items) != TP_JSON_ARRAY)
                return tp_fail(r->ctx, TP_FORMAT, "%s: %s: expected %s, an array", r->where, pipeline, list);
            if (depth == TP_JSON_DEPTH) return refuse(r, TP_FORMAT, "nested too deeply");
            open[depth].items = items;
            open[depth++].next = 0;
        } else {
            TP_TRY(read_part(r, pipeline, parts));
        }
        while (depth > 0 && open[depth - 1].next == tp_json_count(open[depth - 1].items)) depth--;
        if (depth == 0) return TP_OK;
        value = tp_json_at(open[depth - 1].items, open[depth - 1].next++);
    }
}

/* ---- fields ---- */

static tp_status need_bool(struct reader *r, const char *key, bool required, bool *out)
{
    return tp_json_need_bool(r->ctx, r->doc, r->value, key, required, out);
}

static tp_status need_string(struct reader *r, const char *key, bool required, tp_span *out)
{
    return tp_json_need_string(r->ctx, r->doc, r->value, key, required, out);
}

/* "pattern": {"String": "..."} or {"Regex": "..."} */
static tp_status need_pattern(struct reader *r, tp_span *pattern, bool *is_regex)
{
    const tp_json *value = tp_json_get(r->value, "pattern");
    const tp_json *string = tp_json_get(value, "String"), *regex = tp_json_get(value, "Regex");
    *is_regex = regex != NULL;
    if (tp_json_type_of(regex != NULL ? regex : string) != TP_JSON_STRING)
        return refuse(r, TP_FORMAT, "expected pattern, an object with the string \"String\" or \"Regex\"");
    *pattern = tp_json_string(regex != NULL ? regex : string);
    return TP_OK;
}

static tp_status need_behavior(struct reader *r, bool required, tp_split_behavior *out)
{
    static const char *const names[] = {"Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"};
    tp_span name = tp_span_of("Isolated");
    TP_TRY(need_string(r, "behavior", required, &name));
    for (int i = 0; i < 5; i++) {
        if (!tp_span_is(name, names[i])) continue;
        *out = (tp_split_behavior)i;
        return TP_OK;
    }
    return tp_fail(r->ctx, TP_FORMAT,
                   "%s: behavior: expected Removed, Isolated, MergedWithPrevious, MergedWithNext or Contiguous, got \"%.*s\"",
                   r->where, (int)(name.len < 100 ? name.len : 100), name.data);
}

/* prepend_scheme, or its predecessor add_prefix_space. */
static tp_status need_scheme(struct reader *r, tp_prepend_scheme *out)
{
    static const char *const names[] = {"always", "first", "never"};
    bool add_prefix_space = true;
    tp_span name = {NULL, 0};
    TP_TRY(need_bool(r, "add_prefix_space", false, &add_prefix_space));
    TP_TRY(need_string(r, "prepend_scheme", false, &name));
    if (name.data == NULL) name = tp_span_of(add_prefix_space ? "always" : "never");
    for (int i = 0; i < 3; i++) {
        if (!tp_span_is(name, names[i])) continue;
        *out = (tp_prepend_scheme)i;
        return TP_OK;
    }
    return refuse(r, TP_FORMAT, "prepend_scheme: expected always, first or never");
}

/* ---- normalizers ---- */

static tp_status add_normal(struct reader *r, tp_normal_step step)
{
    return tp_normalizer_add(r->ctx, r->out, r->where, &step);
}

static tp_status read_nfc(struct reader *r)
{
    return add_normal(r, (tp_normal_step){.kind = TP_NORMAL_FORM, .form = TP_NFC});
}
static tp_status read_nfd(struct reader *r)
{
    return add_normal(r, (tp_normal_step){.kind = TP_NORMAL_FORM, .form = TP_NFD});
}
static tp_status read_nfkc(struct reader *r)
{
    return add_normal(r, (tp_normal_step){.kind = TP_NORMAL_FORM, .form = TP_NFKC});
}
static tp_status read_nfkd(struct reader *r)
{
    return add_normal(r, (tp_normal_step){.kind = TP_NORMAL_FORM, .form = TP_NFKD});
}
static tp_status read_lowercase(struct reader *r)
{
    return add_normal(r, (tp_normal_step){.kind = TP_NORMAL_LOWERCASE});
}
static tp_status read_strip_accents(struct reader *r)
{
    return add_normal(r, (tp_normal_step){.kind = TP_NORMAL_STRIP_ACCENTS});
}
static tp_status read_bytes_normal(struct reader *r)
{
    return add_normal(r, (tp_normal_step){.kind = TP_NORMAL_BYTE_LEVEL});
}

static tp_status read_strip(struct reader *r)
{
    tp_normal_step step = {.kind = TP_NORMAL_STRIP};
    TP_TRY(need_bool(r, "strip_left", true, &step.left));
    TP_TRY(need_bool(r, "strip_right", true, &step.right));
    return add_normal(r, step);
}

static tp_status read_prepend(struct reader *r)
{
    tp_normal_step step = {.kind = TP_NORMAL_PREPEND};
    TP_TRY(need_string(r, "prepend", true, &step.content));
    return add_normal(r, step);
}

static tp_status read_replace(struct reader *r)
{
    bool is_regex;
    tp_normal_step step = {.kind = TP_NORMAL_REPLACE};
    TP_TRY(need_pattern(r, &step.pattern, &is_regex));
    TP_TRY(need_string(r, "content", true, &step.content));
    if (is_regex) step.kind = TP_NORMAL_REPLACE_REGEX;
    return add_normal(r, step);
}

/* BERT's: clean, blanks around ideographs, accents off (as lowercase says, unless stated), lower case. */
static tp_status read_bert_normal(struct reader *r)
{
    bool clean, cjk, lowercase;
    TP_TRY(need_bool(r, "clean_text", true, &clean));
    TP_TRY(need_bool(r, "handle_chinese_chars", true, &cjk));
    TP_TRY(need_bool(r, "lowercase", true, &lowercase));
    bool accents_off = lowercase;
    TP_TRY(need_bool(r, "strip_accents", false, &accents_off));
    if (clean) TP_TRY(add_normal(r, (tp_normal_step){.kind = TP_NORMAL_CLEAN}));
    if (cjk) TP_TRY(add_normal(r, (tp_normal_step){.kind = TP_NORMAL_CJK}));
    if (accents_off) {
        TP_TRY(read_nfd(r));
        TP_TRY(add_normal(r, (tp_normal_step){.kind = TP_NORMAL_STRIP_NONSPACING}));
    }
    return lowercase ? read_lowercase(r) : TP_OK;
}

static const struct part normalizers[] = {
    {"NFC", read_nfc},
    {"NFD", read_nfd},
    {"NFKC", read_nfkc},
    {"NFKD", read_nfkd},
    {"Lowercase", read_lowercase},
    {"Strip", read_strip},
    {"StripAccents", read_strip_accents},
    {"Prepend", read_prepend},
    {"Replace", read_replace},
    {"ByteLevel", read_bytes_normal},
    {"BertNormalizer", read_bert_normal},
    {NULL, NULL},
};

tp_status tp_read_normalizer(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *value, tp_normalizer *out)
{
    struct reader r = {.ctx = ctx, .doc = doc, .out = out};
    return read_pipeline(&r, value, "normalizer", "normalizers", normalizers);
}

/* ---- pre-tokenizers ---- */

static tp_status add_cut(struct reader *r, tp_cut_step step)
{
    return tp_pretokenizer_add(r->ctx, r->out, r->where, &step);
}

static tp_status read_byte_level(struct reader *r)
{
    bool add_prefix_space, use_regex = true;
    TP_TRY(need_bool(r, "add_prefix_space", true, &add_prefix_space));
    TP_TRY(need_bool(r, "use_regex", false, &use_regex));
    if (add_prefix_space) TP_TRY(add_cut(r, (tp_cut_step){.kind = TP_CUT_PREFIX_SPACE}));
    if (use_regex) {
        tp_cut_step split = {
            .kind = TP_CUT_REGEX, .behavior = TP_SPLIT_ISOLATED, .pattern = tp_span_of(tp_scanner_gpt2()->pattern)};
        TP_TRY(add_cut(r, split));
    }
    return add_cut(r, (tp_cut_step){.kind = TP_CUT_BYTE_LEVEL});
}

static tp_status read_split(struct reader *r)
{
    bool is_regex;
    tp_cut_step step = {.kind = TP_CUT_LITERAL};
    TP_TRY(need_pattern(r, &step.pattern, &is_regex));
    TP_TRY(need_behavior(r, true, &step.behavior));
    TP_TRY(need_bool(r, "invert", false, &step.invert));
    if (is_regex) step.kind = TP_CUT_REGEX;
    return add_cut(r, step);
}

static tp_status read_digits(struct reader *r)
{
    bool individual;
    TP_TRY(need_bool(r, "individual_digits", true, &individual));
    return add_cut(r, (tp_cut_step){.kind = TP_CUT_DIGITS, .behavior = individual ? TP_SPLIT_ISOLATED : TP_SPLIT_CONTIGUOUS});
}

static tp_status read_punctuation(struct reader *r)
{
    tp_cut_step step = {.kind = TP_CUT_PUNCTUATION};
    TP_TRY(need_behavior(r, false, &step.behavior));
    return add_cut(r, step);
}

static tp_status read_metaspace(struct reader *r)
{
    bool split = true;
    tp_cut_step step = {.kind = TP_CUT_METASPACE};
    TP_TRY(need_string(r, "replacement", true, &step.pattern));
    TP_TRY(need_scheme(r, &step.scheme));
    TP_TRY(need_bool(r, "split", false, &split));
    TP_TRY(add_cut(r, step));
    if (!split) return TP_OK;
    return add_cut(r, (tp_cut_step){.kind = TP_CUT_LITERAL, .behavior = TP_SPLIT_MERGED_WITH_NEXT, .pattern = step.pattern});
}

static tp_status read_whitespace_split(struct reader *r)
{
    return add_cut(r, (tp_cut_step){.kind = TP_CUT_SPACES, .behavior = TP_SPLIT_REMOVED});
}

static tp_status read_whitespace(struct reader *r)
{
    return add_cut(r, (tp_cut_step){.kind = TP_CUT_WORDS, .behavior = TP_SPLIT_REMOVED, .invert = true});
}

static tp_status read_bert_pre(struct reader *r)
{
    TP_TRY(read_whitespace_split(r));
    return add_cut(r, (tp_cut_step){.kind = TP_CUT_PUNCTUATION, .behavior = TP_SPLIT_ISOLATED});
}

static tp_status read_delimiter(struct reader *r)
{
    tp_cut_step step = {.kind = TP_CUT_LITERAL, .behavior = TP_SPLIT_REMOVED};
    TP_TRY(need_string(r, "delimiter", true, &step.pattern));
    return add_cut(r, step);
}

static const struct part pretokenizers[] = {
    {"ByteLevel", read_byte_level},
    {"Split", read_split},
    {"Digits", read_digits},
    {"Punctuation", read_punctuation},
    {"Metaspace", read_metaspace},
    {"WhitespaceSplit", read_whitespace_split},
    {"Whitespace", read_whitespace},
    {"BertPreTokenizer", read_bert_pre},
    {"CharDelimiterSplit", read_delimiter},
    {NULL, NULL},
};

tp_status tp_read_pretokenizer(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *value, tp_pretokenizer *out)
{
    struct reader r = {.ctx = ctx, .doc = doc, .out = out};
    return read_pipeline(&r, value, "pre_tokenizer", "pretokenizers", pretokenizers);
}

/* ---- decoders ---- */

static tp_status add_stage(struct reader *r, tp_decode_stage stage)
{
    return tp_decoder_add(r->ctx, r->out, r->where, &stage);
}

static tp_status read_bytes_back(struct reader *r)
{
    return add_stage(r, (tp_decode_stage){.kind = TP_DECODE_BYTE_LEVEL});
}
static tp_status read_fallback_back(struct reader *r)
{
    return add_stage(r, (tp_decode_stage){.kind = TP_DECODE_BYTE_FALLBACK});
}
static tp_status read_fuse(struct reader *r)
{
    return add_stage(r, (tp_decode_stage){.kind = TP_DECODE_FUSE});
}

static tp_status read_replace_back(struct reader *r)
{
    bool is_regex;
    tp_decode_stage stage = {.kind = TP_DECODE_REPLACE};
    TP_TRY(need_pattern(r, &stage.pattern, &is_regex));
    TP_TRY(need_string(r, "content", true, &stage.content));
    if (is_regex) stage.kind = TP_DECODE_REPLACE_REGEX;
    return add_stage(r, stage);
}

static tp_status read_strip_back(struct reader *r)
{
    int64_t start, stop;
    uint32_t c;
    tp_decode_stage stage = {.kind = TP_DECODE_STRIP};
    TP_TRY(need_string(r, "content", true, &stage.pattern));
    TP_TRY(tp_json_need_i64(r->ctx, r->doc, r->value, "start", true, 0, TP_DECODE_STRIP_MAX, &start));
    TP_TRY(tp_json_need_i64(r->ctx, r->doc, r->value, "stop", true, 0, TP_DECODE_STRIP_MAX, &stop));
    if (stage.pattern.len == 0 || tp_char_next(stage.pattern.data, stage.pattern.len, &c) != stage.pattern.len)
        return refuse(r, TP_FORMAT, "content: expected one character");
    stage.start = (size_t)start;
    stage.stop = (size_t)stop;
    return add_stage(r, stage);
}

static tp_status read_metaspace_back(struct reader *r)
{
    tp_prepend_scheme scheme;
    tp_decode_stage stage = {.kind = TP_DECODE_METASPACE};
    TP_TRY(need_string(r, "replacement", true, &stage.pattern));
    TP_TRY(need_scheme(r, &scheme));
    stage.strip_first = scheme != TP_PREPEND_NEVER;
    return add_stage(r, stage);
}

static tp_status read_suffix_back(struct reader *r)
{
    tp_decode_stage stage = {.kind = TP_DECODE_SUFFIX, .pattern = tp_span_of("</w>")};
    TP_TRY(need_string(r, "suffix", false, &stage.pattern));
    return add_stage(r, stage);
}

static const struct part decoders[] = {
    {"ByteLevel", read_bytes_back},       {"Replace", read_replace_back},
    {"ByteFallback", read_fallback_back}, {"Fuse", read_fuse},
    {"Strip", read_strip_back},           {"Metaspace", read_metaspace_back},
    {"BPEDecoder", read_suffix_back},     {NULL, NULL},
};

tp_status tp_read_decoder(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *value, tp_decoder *out)
{
    struct reader r = {.ctx = ctx, .doc = doc, .out = out};
    return read_pipeline(&r, value, "decoder", "decoders", decoders);
}

/* ---- post-processors ---- */

static tp_status known_id(struct reader *r, int64_t id)
{
    if (tp_vocabulary_text(r->vocabulary, id).data != NULL) return TP_OK;
    return tp_fail(r->ctx, TP_FORMAT, "%s: post_processor: no token has id %lld", r->where, (long long)id);
}

/* Only offsets would change, and these are exact here already. */
static tp_status read_offsets_post(struct reader *r)
{
    (void)r;
    return TP_OK;
}

static tp_status only_one(struct reader *r)
{
    const tp_postprocessor *post = r->out;
    if (post->single.count == 0 && post->pair.count == 0) return TP_OK;
    return refuse(r, TP_UNSUPPORTED, "post_processor: several that add tokens are not supported");
}

static tp_status read_special_item(struct reader *r, const tp_json *item, int64_t type_id, tp_template *out)
{
    tp_span name;
    int64_t id;
    TP_TRY(tp_json_need_string(r->ctx, r->doc, item, "id", true, &name));
    const tp_json *special = tp_json_get_span(tp_json_get(r->value, "special_tokens"), name),
                  *ids = tp_json_get(special, "ids");
    if (tp_json_type_of(ids) != TP_JSON_ARRAY)
        return tp_fail(r->ctx, TP_FORMAT, "%s: post_processor: special_tokens does not define \"%.*s\"", r->where,
                       (int)(name.len < 100 ? name.len : 100), name.data);
    for (size_t i = 0; i < tp_json_count(ids); i++) {
        if (!tp_json_i64(tp_json_at(ids, i), &id)) return refuse(r, TP_FORMAT, "post_processor: ids: expected integers");
        TP_TRY(known_id(r, id));
        TP_TRY(tp_template_add(r->ctx, out, TP_TEMPLATE_SPECIAL, (int32_t)id, (int32_t)type_id));
    }
    return TP_OK;
}

static tp_status read_template(struct reader *r, const char *key, tp_template *out)
{
    const tp_json *list = tp_json_get(r->value, key);
    if (list != NULL && tp_json_type_of(list) != TP_JSON_ARRAY)
        return refuse(r, TP_FORMAT, "post_processor: expected a template, an array");
    for (size_t i = 0; i < tp_json_count(list); i++) {
        const tp_json *item = tp_json_at(list, i), *special = tp_json_get(item, "SpecialToken"),
                      *sequence = tp_json_get(item, "Sequence");
        int64_t type_id = 0;
        tp_span id;
        if (tp_json_type_of(special != NULL ? special : sequence) != TP_JSON_OBJECT)
            return refuse(r, TP_FORMAT, "post_processor: expected a SpecialToken or a Sequence");
        TP_TRY(tp_json_need_i64(r->ctx, r->doc, special != NULL ? special : sequence, "type_id", true, 0, INT32_MAX, &type_id));
        if (special != NULL) {
            TP_TRY(read_special_item(r, special, type_id, out));
            continue;
        }
        TP_TRY(tp_json_need_string(r->ctx, r->doc, sequence, "id", true, &id));
        if (!tp_span_is(id, "A") && !tp_span_is(id, "B"))
            return refuse(r, TP_FORMAT, "post_processor: Sequence: expected A or B");
        TP_TRY(tp_template_add(r->ctx, out, tp_span_is(id, "A") ? TP_TEMPLATE_FIRST : TP_TEMPLATE_SECOND, 0, (int32_t)type_id));
    }
    return TP_OK;
}

static tp_status read_template_post(struct reader *r)
{
    tp_postprocessor *post = r->out;
    TP_TRY(only_one(r));
    TP_TRY(read_template(r, "single", &post->single));
    return read_template(r, "pair", &post->pair);
}

/* "sep": ["</s>", 2] */
static tp_status need_pair_id(struct reader *r, const char *key, int32_t *out)
{
    int64_t id;
    const tp_json *value = tp_json_get(r->value, key);
    if (tp_json_type_of(value) != TP_JSON_ARRAY || tp_json_count(value) != 2 || !tp_json_i64(tp_json_at(value, 1), &id))
        return tp_fail(r->ctx, TP_FORMAT, "%s: post_processor: expected %s, a token and its id", r->where, key);
    TP_TRY(known_id(r, id));
    *out = (int32_t)id;
    return TP_OK;
}

/* cls A sep, and cls A sep [sep] B sep. */
static tp_status add_cls_sep(struct reader *r, bool second_sep, int32_t second_type)
{
    int32_t cls, sep;
    tp_postprocessor *post = r->out;
    TP_TRY(only_one(r));
    TP_TRY(need_pair_id(r, "cls", &cls));
    TP_TRY(need_pair_id(r, "sep", &sep));
    tp_template *both[] = {&post->single, &post->pair};
    for (int i = 0; i < 2; i++) {
        TP_TRY(tp_template_add(r->ctx, both[i], TP_TEMPLATE_SPECIAL, cls, 0));
        TP_TRY(tp_template_add(r->ctx, both[i], TP_TEMPLATE_FIRST, 0, 0));
        TP_TRY(tp_template_add(r->ctx, both[i], TP_TEMPLATE_SPECIAL, sep, 0));
    }
    if (second_sep) TP_TRY(tp_template_add(r->ctx, &post->pair, TP_TEMPLATE_SPECIAL, sep, 0));
    TP_TRY(tp_template_add(r->ctx, &post->pair, TP_TEMPLATE_SECOND, 0, second_type));
    return tp_template_add(r->ctx, &post->pair, TP_TEMPLATE_SPECIAL, sep, second_type);
}

static tp_status read_roberta_post(struct reader *r)
{
    return add_cls_sep(r, true, 0);
}
static tp_status read_bert_post(struct reader *r)
{
    return add_cls_sep(r, false, 1);
}

static const struct part postprocessors[] = {
    {"ByteLevel", read_offsets_post},
    {"TemplateProcessing", read_template_post},
    {"RobertaProcessing", read_roberta_post},
    {"BertProcessing", read_bert_post},
    {NULL, NULL},
};

tp_status tp_read_postprocessor(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *value, const tp_vocabulary *vocabulary,
                                tp_postprocessor *out)
{
    struct reader r = {.ctx = ctx, .doc = doc, .vocabulary = vocabulary, .out = out};
    return read_pipeline(&r, value, "post_processor", "processors", postprocessors);
}
