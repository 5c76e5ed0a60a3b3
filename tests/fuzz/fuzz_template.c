/* Templates: whatever compiles renders or fails within its limits, and the spans of a render lie inside its text.
 *
 * The input is a template and, behind a line "====", the JSON of its variables, in whose place stands a fixed conversation if
 * there is none. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "data/chat.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char conversation[] = "{\"messages\":[{\"role\":\"system\",\"content\":\" S "
                                   "\"},{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"a\\nb\"}]},"
                                   "{\"role\":\"assistant\",\"content\":\"x|y\",\"thinking\":\"t\",\"tool_calls\":[{"
                                   "\"function\":{\"name\":\"f\",\"arguments\":{\"k\":[1,2.5]}}}]}],"
                                   "\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\"}}],\"s\":\"H\\u00e9 "
                                   "<b>\",\"n\":3,\"l\":[3,1,2],\"d\":{\"a\":1}}";

static void check_output(const tp_template_output *out)
{
    size_t at = 0;
    for (size_t i = 0; i < out->n_spans; i++) {
        const tp_template_span *s = &out->spans[i];
        if (s->begin < at || s->begin >= s->end || s->end > out->text.len) abort();
        at = s->end;
    }
    for (size_t i = 0; i < out->n_generation; i++)
        if (out->generation[i].begin > out->generation[i].end || out->generation[i].end > out->text.len) abort();
    if (tp_utf8_valid_prefix(tp_buf_cstr(&out->text), out->text.len) != out->text.len) abort();
}

/* The members of the variables become variables of the template. */
static void render(tp_ctx *ctx, const tp_template *tmpl, const tp_json *root)
{
    enum { MAX_VARIABLES = 16 };
    tp_template_variable variables[MAX_VARIABLES];
    char names[MAX_VARIABLES][32];
    size_t n = tp_json_count(root);
    if (tp_json_type_of(root) != TP_JSON_OBJECT) return;
    if (n > MAX_VARIABLES) n = MAX_VARIABLES;
    for (size_t i = 0; i < n; i++) {
        tp_span name = tp_json_key_at(root, i);
        size_t len = name.len < sizeof names[i] ? name.len : sizeof names[i] - 1;
        if (len > 0) memcpy(names[i], name.data, len);
        names[i][len] = '\0';
        variables[i] = (tp_template_variable){.name = names[i], .json = tp_json_at(root, i)};
    }
    const tp_template_time now = {2025, 3, 9, 7, 5, 2};
    const tp_template_options options = {.now = &now, .max_steps = 200000, .max_output = 1 << 20, .max_memory = 1 << 24};
    tp_template_output out;
    if (tp_template_render(ctx, tmpl, &options, variables, n, &out) == TP_OK) check_output(&out);
    tp_template_output_free(&out);
    tp_ctx_clear(ctx);
    const tp_chat_input input = {.messages = tp_json_get(root, "messages"),
                                 .tools = tp_json_get(root, "tools"),
                                 .continue_final = "content",
                                 .options = options};
    if (input.messages == NULL) return;
    if (tp_chat_render(ctx, tmpl, &input, &out) == TP_OK) check_output(&out);
    tp_template_output_free(&out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char divider[] = "\n====\n";
    const char *text = (const char *)data, *split = size > 0 ? memmem(text, size, divider, sizeof divider - 1) : NULL;
    size_t n = split != NULL ? (size_t)(split - text) : size;
    const char *json = split != NULL ? split + sizeof divider - 1 : conversation;
    size_t json_len = split != NULL ? size - n - (sizeof divider - 1) : sizeof conversation - 1;
    tp_ctx ctx;
    tp_template *tmpl;
    tp_json_doc *doc;
    tp_ctx_init(&ctx);
    if (tp_template_compile(&ctx, "fuzz", n > 0 ? text : "", n, &tmpl) != TP_OK) return 0;
    if (tp_json_parse(&ctx, json, json_len, NULL, &doc) == TP_OK) {
        render(&ctx, tmpl, tp_json_root(doc));
        tp_json_free(doc);
    }
    tp_template_free(tmpl);
    return 0;
}
