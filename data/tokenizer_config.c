/* What stands beside tokenizer.json: tokenizer_config.json (roles of tokens, chat templates), special_tokens_map.json (the
 * same roles, older), chat_template.jinja (which wins over an inline template). */
#include "base/file.h"
#include "base/mem.h"
#include "data/tokenizer_parts.h"

/* The text of a token that is written as a string or as an AddedToken object. */
static bool token_text(const tp_json *value, tp_span *text)
{
    const tp_json *string = tp_json_type_of(value) == TP_JSON_OBJECT ? tp_json_get(value, "content") : value;
    if (tp_json_type_of(string) != TP_JSON_STRING) return false;
    *text = tp_json_string(string);
    return true;
}

static bool has_name(const tp_named_texts *list, tp_span name)
{
    for (size_t i = 0; i < list->count; i++)
        if (tp_span_is(name, list->items[i].name)) return true;
    return false;
}

static bool ends_in_token(tp_span key)
{
    return key.len > 6 && memcmp(key.data + key.len - 6, "_token", 6) == 0;
}

static tp_status add_list(tp_ctx *ctx, tp_tokenizer *t, tp_span name, const tp_json *list)
{
    tp_span text;
    for (size_t i = 0; i < tp_json_count(list); i++)
        if (token_text(tp_json_at(list, i), &text)) TP_TRY(tp_named_texts_add(ctx, &t->named, name, text));
    return TP_OK;
}

/* Every KEY_token with a text, and the lists of additional tokens; what is known already stays. */
static tp_status read_names(tp_ctx *ctx, const tp_json *root, tp_tokenizer *t)
{
    tp_span additional = tp_span_of("additional_special_tokens"), text;
    bool had_additional = has_name(&t->named, additional);
    for (size_t i = 0; i < tp_json_count(root); i++) {
        tp_span key = tp_json_key_at(root, i);
        const tp_json *value = tp_json_at(root, i);
        if (tp_span_equal(key, additional) && !had_additional) TP_TRY(add_list(ctx, t, additional, value));
        if (ends_in_token(key) && token_text(value, &text) && !has_name(&t->named, key))
            TP_TRY(tp_named_texts_add(ctx, &t->named, key, text));
    }
    return TP_OK;
}

/* One template, or a list of {name, template}. */
static tp_status read_templates(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *root, tp_tokenizer *t)
{
    const tp_json *value = tp_json_get(root, "chat_template");
    if (tp_json_type_of(value) == TP_JSON_STRING)
        return tp_named_texts_add(ctx, &t->templates, tp_span_of("default"), tp_json_string(value));
    for (size_t i = 0; tp_json_type_of(value) == TP_JSON_ARRAY && i < tp_json_count(value); i++) {
        const tp_json *item = tp_json_at(value, i);
        tp_span name, text;
        TP_TRY(tp_json_need_string(ctx, doc, item, "name", true, &name));
        TP_TRY(tp_json_need_string(ctx, doc, item, "template", true, &text));
        TP_TRY(tp_named_texts_add(ctx, &t->templates, name, text));
    }
    return TP_OK;
}

/* The path of a file that may be missing: *path is NULL then. */
static tp_status find_file(tp_ctx *ctx, const char *folder, const char *name, char **path)
{
    *path = tp_path_join(ctx, folder, name);
    if (*path == NULL) return TP_NOMEM;
    bool exists = tp_path_exists(*path);
    tp_free(*path);
    *path = NULL;
    return exists ? tp_path_beneath(ctx, folder, name, path) : TP_OK;
}

static tp_status read_config(tp_ctx *ctx, const char *folder, const char *name, tp_tokenizer *t)
{
    char *path, *text = NULL;
    size_t n;
    tp_json_doc *doc = NULL;
    TP_TRY(find_file(ctx, folder, name, &path));
    if (path == NULL) return TP_OK;
    tp_status status = tp_file_read(ctx, path, TP_TOKENIZER_CONFIG_BYTES, &text, &n);
    if (status == TP_OK) tp_tokenizer_identify(t, name, text, n);
    if (status == TP_OK) status = tp_json_parse(ctx, text, n, &(tp_json_options){.name = path}, &doc);
    const tp_json *root = status == TP_OK ? tp_json_root(doc) : NULL;
    if (status == TP_OK && tp_json_type_of(root) != TP_JSON_OBJECT)
        status = tp_fail(ctx, TP_FORMAT, "%s: expected an object", path);
    if (status == TP_OK) status = read_names(ctx, root, t);
    if (status == TP_OK && t->templates.count == 0) status = read_templates(ctx, doc, root, t);
    tp_json_free(doc);
    tp_free(text);
    tp_free(path);
    return status;
}

static tp_status read_template_file(tp_ctx *ctx, const char *folder, tp_tokenizer *t)
{
    char *path, *text = NULL;
    size_t n;
    TP_TRY(find_file(ctx, folder, "chat_template.jinja", &path));
    if (path == NULL) return TP_OK;
    tp_status status = tp_file_read(ctx, path, TP_TEMPLATE_FILE_BYTES, &text, &n);
    if (status == TP_OK && tp_utf8_valid_prefix(text, n) != n)
        status = tp_fail(ctx, TP_FORMAT, "%s: byte %zu is not valid UTF-8", path, tp_utf8_valid_prefix(text, n));
    if (status == TP_OK) status = tp_named_texts_add(ctx, &t->templates, tp_span_of("default"), (tp_span){text, n});
    if (status == TP_OK) tp_tokenizer_identify(t, "chat_template.jinja", text, n);
    tp_free(text);
    tp_free(path);
    return status;
}

static void find_roles(tp_tokenizer *t)
{
    static const char *const names[TP_ROLES] = {"bos_token", "eos_token", "unk_token", "pad_token"};
    for (size_t i = 0; i < t->named.count; i++)
        for (int role = 0; role < TP_ROLES; role++)
            if (strcmp(t->named.items[i].name, names[role]) == 0)
                t->roles[role] = tp_vocabulary_find_any(&t->vocabulary, (tp_span){t->named.items[i].text, t->named.items[i].n});
}

tp_status tp_read_tokenizer_config(tp_ctx *ctx, const char *folder, tp_tokenizer *t)
{
    TP_TRY(read_template_file(ctx, folder, t));
    TP_TRY(read_config(ctx, folder, "tokenizer_config.json", t));
    TP_TRY(read_config(ctx, folder, "special_tokens_map.json", t));
    find_roles(t);
    return TP_OK;
}
