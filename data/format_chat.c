/* chat: {messages: [{role, content, train?, tool_calls?}], tools?}, or ShareGPT's {conversations: [{from, value}]}. The turns
 * of the assistant are learned. */
#include "base/mem.h"
#include "data/formats.h"

#define PLACE_BYTES 1024

/* Roles of messages, and what ShareGPT calls them. */
static const struct role {
    const char *name, *role;
    bool assistant;
} roles[] = {
    {"system", "system", false},      {"developer", "developer", false}, {"user", "user", false},
    {"assistant", "assistant", true}, {"tool", "tool", false},           {"function", "function", false},
    {"human", "user", false},         {"gpt", "assistant", true},        {"chatgpt", "assistant", true},
    {"model", "assistant", true},     {"observation", "tool", false},
};
enum { N_PLAIN_ROLES = 6, N_ROLES = sizeof roles / sizeof *roles };

static const struct role *find_role(tp_span name, bool sharegpt)
{
    for (size_t i = 0; i < (sharegpt ? N_ROLES : N_PLAIN_ROLES); i++)
        if (tp_span_is(name, roles[i].name)) return &roles[i];
    return NULL;
}

/* The messages of a row in the template's own form: the row's own list, or, where ShareGPT's {from, value} had to become {role,
 * content} or a system message was put in front, a list of our own. */
struct conversation {
    const tp_json *messages;
    tp_json_doc *own;
    tp_buf text;    /* of own */
    uint8_t *flags; /* [n], as tp_sample_from_chat */
    size_t n;
};

/* ---- checks ---- */

struct message {
    const struct role *role;
    const tp_json *content;
    bool sharegpt;
};

static tp_status bad(tp_ctx *ctx, const tp_json_doc *row, const tp_json *value, const char *what)
{
    char place[PLACE_BYTES];
    return tp_fail(ctx, TP_FORMAT, "%s: %s", tp_json_where(row, value, place, sizeof place), what);
}

static tp_status check_parts(tp_ctx *ctx, const tp_json_doc *row, const tp_json *parts)
{
    for (size_t i = 0; i < tp_json_count(parts); i++) {
        const tp_json *part = tp_json_at(parts, i);
        if (!tp_span_is(tp_json_string(tp_json_get(part, "type")), "text") ||
            tp_json_type_of(tp_json_get(part, "text")) != TP_JSON_STRING)
            return bad(ctx, row, part, "content: expected parts {\"type\": \"text\", \"text\": ...}");
    }
    return TP_OK;
}

static tp_status check_content(tp_ctx *ctx, const tp_json_doc *row, const tp_json *item, const struct message *m)
{
    switch (tp_json_type_of(m->content)) {
    case TP_JSON_STRING: return TP_OK;
    case TP_JSON_ARRAY: return check_parts(ctx, row, m->content);
    case TP_JSON_NULL:
        if (m->role->assistant && tp_json_count(tp_json_get(item, "tool_calls")) > 0) return TP_OK;
        return bad(ctx, row, item,
                   m->sharegpt ? "value: expected a string, got nothing" : "content: expected a string, got nothing");
    default: return bad(ctx, row, m->content, m->sharegpt ? "value: expected a string" : "content: expected a string");
    }
}

static tp_status read_message(tp_ctx *ctx, const tp_json_doc *row, const tp_json *item, struct message *m)
{
    char place[PLACE_BYTES];
    tp_span name;
    if (tp_json_type_of(item) != TP_JSON_OBJECT) return bad(ctx, row, item, "expected a message {role, content}");
    m->sharegpt = tp_json_get(item, "role") == NULL && tp_json_get(item, "from") != NULL;
    TP_TRY(tp_json_need_string(ctx, row, item, m->sharegpt ? "from" : "role", true, &name));
    m->role = find_role(name, m->sharegpt);
    if (m->role == NULL)
        return tp_fail(ctx, TP_FORMAT, "%s: role: expected system, developer, user, assistant, tool or function, got \"%.*s\"",
                       tp_json_where(row, item, place, sizeof place), (int)(name.len < 64 ? name.len : 64), name.data);
    m->content = tp_json_get(item, m->sharegpt ? "value" : "content");
    return check_content(ctx, row, item, m);
}

/* ---- which turns are trained ---- */

static tp_status set_flags(tp_ctx *ctx, const tp_json_doc *row, const tp_json *list, const tp_row_rules *rules,
                           struct conversation *c, size_t shift)
{
    size_t last = SIZE_MAX, n = tp_json_count(list);
    for (size_t i = 0; i < n; i++)
        if ((c->flags[i + shift] & TP_MESSAGE_ASSISTANT) != 0) last = i;
    for (size_t i = 0; i < n; i++) {
        const tp_json *item = tp_json_at(list, i);
        bool assistant = (c->flags[i + shift] & TP_MESSAGE_ASSISTANT) != 0;
        bool trained = assistant ? rules->train_on_turns == TP_TURNS_ALL || i == last : rules->train_on_inputs;
        TP_TRY(tp_json_need_bool(ctx, row, item, "train", false, &trained));
        if (trained) c->flags[i + shift] |= TP_MESSAGE_TRAINED;
    }
    if (shift > 0 && rules->train_on_inputs) c->flags[0] |= TP_MESSAGE_TRAINED;
    return TP_OK;
}

/* ---- the template's form ---- */

static void write_message(tp_buf *out, const tp_json *item, const struct message *m)
{
    if (!m->sharegpt) {
        tp_json_write(out, item, -1);
        return;
    }
    tp_buf_printf(out, "{\"role\":\"%s\",\"content\":", m->role->role);
    tp_json_write(out, m->content, -1);
    tp_buf_char(out, '}');
}

/* Writes the messages once more, as the template wants them. */
static tp_status rewrite(tp_ctx *ctx, const tp_json_doc *row, const tp_json *list, const char *system, struct conversation *c)
{
    char place[PLACE_BYTES];
    struct message m;
    tp_buf_char(&c->text, '[');
    if (system != NULL) {
        tp_buf_text(&c->text, "{\"role\":\"system\",\"content\":");
        tp_json_write_string(&c->text, system, strlen(system));
        tp_buf_char(&c->text, '}');
    }
    for (size_t i = 0; i < tp_json_count(list); i++) {
        TP_TRY(read_message(ctx, row, tp_json_at(list, i), &m));
        if (i > 0 || system != NULL) tp_buf_char(&c->text, ',');
        write_message(&c->text, tp_json_at(list, i), &m);
    }
    tp_buf_char(&c->text, ']');
    TP_TRY(tp_buf_status(ctx, &c->text, "row"));
    tp_json_options options = {.name = tp_json_where(row, list, place, sizeof place)};
    TP_TRY(tp_json_parse(ctx, c->text.data, c->text.len, &options, &c->own));
    c->messages = tp_json_root(c->own);
    return TP_OK;
}

static tp_status read_conversation(tp_ctx *ctx, const tp_json_doc *row, const tp_json *list, const tp_row_rules *rules,
                                   struct conversation *c)
{
    size_t n = tp_json_count(list), turns = 0;
    struct message m;
    bool sharegpt = false;
    if (tp_json_type_of(list) != TP_JSON_ARRAY)
        return bad(ctx, row, list != NULL ? list : tp_json_root(row), "messages: expected an array");
    if (n == 0) return bad(ctx, row, list, "messages: the conversation is empty");
    c->flags = tp_alloc(ctx, n + 1, sizeof *c->flags);
    if (c->flags == NULL) return TP_NOMEM;
    TP_TRY(read_message(ctx, row, tp_json_at(list, 0), &m));
    const char *system = rules->block->system != NULL && strcmp(m.role->role, "system") != 0 ? rules->block->system : NULL;
    size_t shift = system != NULL;
    for (size_t i = 0; i < n; i++) {
        TP_TRY(read_message(ctx, row, tp_json_at(list, i), &m));
        if (m.role->assistant) c->flags[i + shift] = TP_MESSAGE_ASSISTANT;
        turns += m.role->assistant;
        sharegpt = sharegpt || m.sharegpt;
    }
    if (turns == 0) return bad(ctx, row, list, "messages: no turn of the assistant, so there is nothing to learn");
    TP_TRY(set_flags(ctx, row, list, rules, c, shift));
    c->n = n + shift;
    c->messages = list;
    return sharegpt || system != NULL ? rewrite(ctx, row, list, system, c) : TP_OK;
}

/* ---- the format ---- */

/* The list, under either name. */
static const tp_json *find_list(const tp_row_rules *rules, const tp_json *row)
{
    bool theirs = !tp_rules_has(rules, row, "messages") && tp_rules_has(rules, row, "conversations");
    return tp_json_get(row, tp_rules_column(rules, theirs ? "conversations" : "messages"));
}

static bool fits(const tp_row_rules *rules, const tp_json *row)
{
    return tp_json_type_of(find_list(rules, row)) != TP_JSON_NULL;
}

static tp_status make(tp_ctx *ctx, const tp_row_rules *rules, const tp_json_doc *row, tp_sample *sample)
{
    const tp_json *root = tp_json_root(row), *tools = tp_json_get(root, tp_rules_column(rules, "tools"));
    struct conversation c = {0};
    if (tp_json_type_of(tools) == TP_JSON_NULL) tools = NULL;
    if (tools != NULL && tp_json_type_of(tools) != TP_JSON_ARRAY)
        return bad(ctx, row, tools, "tools: expected an array of objects");
    tp_status status = read_conversation(ctx, row, find_list(rules, root), rules, &c);
    if (status == TP_OK) {
        tp_chat_input input = {.messages = c.messages, .tools = tools};
        status = tp_render_row(ctx, rules->prompt, row, &input, c.flags, c.n, sample);
    }
    tp_json_free(c.own);
    tp_buf_free(&c.text);
    tp_free(c.flags);
    return status;
}

static const char *const names[] = {"messages", "conversations", "tools", NULL};
const tp_row_format tp_format_chat = {"chat", TP_DATASET_CHAT, "messages (or conversations)", names, true, fits, make};
