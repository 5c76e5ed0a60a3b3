/* The rules around a chat template: how a conversation becomes its variables, and where the text is cut when the last message
 * is to be continued. */
#include "data/chat.h"

#include <stdio.h>

#include "base/mem.h"
#include "data/template_parser.h"
#include "data/template_text.h"
#include "data/template_unicode.h"

/* ---- templates that come with tapeft ---- */

static const char chatml[] =
    "{%- for message in messages -%}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' -}}\n"
    "    {%- if message.role == 'assistant' -%}\n"
    "        {%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}{{- '\\n' -}}\n"
    "    {%- else -%}\n"
    "        {{- message.content + '<|im_end|>\\n' -}}\n"
    "    {%- endif -%}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}\n";

static const char alpaca[] =
    "{%- if messages[0].role == 'system' -%}\n"
    "    {%- set preamble = messages[0].content -%}{%- set turns = messages[1:] -%}\n"
    "{%- else -%}\n"
    "    {%- set preamble = 'Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.' -%}\n"
    "    {%- set turns = messages -%}\n"
    "{%- endif -%}\n"
    "{{- (bos_token if bos_token is defined else '') + preamble + '\\n\\n' -}}\n"
    "{%- for message in turns -%}\n"
    "    {%- if message.role == 'user' -%}\n"
    "        {{- '### Instruction:\\n' + message.content + '\\n\\n' -}}\n"
    "    {%- elif message.role == 'assistant' -%}\n"
    "        {{- '### Response:\\n' -}}\n"
    "        {%- generation -%}{{- message.content + (eos_token if eos_token is defined else '') -}}{%- endgeneration -%}\n"
    "        {{- '\\n\\n' if not loop.last else '' -}}\n"
    "    {%- else -%}\n"
    "        {{- raise_exception('alpaca knows system (first), user and assistant messages, not ' ~ message.role) -}}\n"
    "    {%- endif -%}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}\n";

const char *tp_chat_builtin(const char *name)
{
    if (strcmp(name, "chatml") == 0) return chatml;
    return strcmp(name, "alpaca") == 0 ? alpaca : NULL;
}

/* ---- messages ---- */

static const char *const reasoning_fields[] = {"reasoning_content", "thinking", "reasoning"};
enum { N_REASONING = 3 };

static tp_status set_member(tp_jinja *j, tp_jvalue *message, const char *name, const tp_jvalue *value)
{
    tp_jvalue key = tp_jliteral(name);
    return tp_jdict_set(j, message->dict, &key, value);
}

/* Fills *message, an empty dict, from JSON: nulls dropped, reasoning under its standard names. */
static tp_status message_from_json(tp_jinja *j, size_t index, const tp_json *json, tp_jvalue *message)
{
    const tp_json *reasoning = NULL;
    tp_jvalue value, source;
    if (tp_json_type_of(json) != TP_JSON_OBJECT)
        return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "messages[%zu]: expected an object, got %s", index,
                             tp_json_type_name(tp_json_type_of(json)));
    for (int i = 0; i < N_REASONING && tp_json_type_of(reasoning) == TP_JSON_NULL; i++)
        reasoning = tp_json_get(json, reasoning_fields[i]);
    bool has_reasoning = tp_json_type_of(reasoning) != TP_JSON_NULL;
    TP_TRY(tp_jdict_new(j, TP_J_DICT, tp_json_count(json) + 2, message));
    if (has_reasoning) {
        TP_TRY(tp_jmember_from_json(j, index, tp_span_of("thinking"), reasoning, &source));
        TP_TRY(set_member(j, message, "thinking", &source));
    }
    for (size_t i = 0; i < tp_json_count(json); i++) {
        const tp_json *member = tp_json_at(json, i);
        tp_span name = tp_json_key_at(json, i);
        if (tp_json_type_of(member) == TP_JSON_NULL) continue;
        tp_jvalue key = tp_jtext(name.data, name.len);
        TP_TRY(tp_jmember_from_json(j, index, name, member, &value));
        TP_TRY(tp_jdict_set(j, message->dict, &key, &value));
    }
    return has_reasoning ? set_member(j, message, "reasoning_content", &source) : TP_OK;
}

static tp_status message_from_row(tp_jinja *j, size_t index, const tp_chat_message *row, tp_jvalue *message)
{
    tp_jvalue role = tp_jliteral(row->role), value;
    uint32_t source = (uint32_t)index * 4;
    if (index > TP_J_GENERATION / 4 - 1) return tp_jinja_fail(j, TP_TEMPLATE_LIMIT, "too many messages");
    TP_TRY(tp_jdict_new(j, TP_J_DICT, 4, message));
    TP_TRY(set_member(j, message, "role", &role));
    TP_TRY(tp_jsourced(j, row->content.data, row->content.len, source + TP_FIELD_CONTENT, &value));
    TP_TRY(set_member(j, message, "content", &value));
    if (row->reasoning.data == NULL) return TP_OK;
    TP_TRY(tp_jsourced(j, row->reasoning.data, row->reasoning.len, source + TP_FIELD_REASONING, &value));
    TP_TRY(set_member(j, message, "thinking", &value));
    return set_member(j, message, "reasoning_content", &value);
}

static tp_status make_messages(tp_jinja *j, const tp_chat_input *input, tp_jvalue *messages)
{
    bool from_json = input->messages != NULL;
    size_t n = from_json ? tp_json_count(input->messages) : input->n_rows;
    if (from_json && tp_json_type_of(input->messages) != TP_JSON_ARRAY)
        return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "messages: expected an array, got %s",
                             tp_json_type_name(tp_json_type_of(input->messages)));
    if (n == 0) return tp_jinja_fail(j, TP_TEMPLATE_VALUE, "the conversation is empty: at least one message is needed");
    tp_jvalue *items = tp_jinja_alloc(j, n, sizeof *items);
    if (items == NULL) return j->status;
    for (size_t i = 0; i < n; i++) {
        if (from_json)
            TP_TRY(message_from_json(j, i, tp_json_at(input->messages, i), &items[i]));
        else
            TP_TRY(message_from_row(j, i, &input->rows[i], &items[i]));
    }
    return tp_jlist_new(j, TP_J_LIST, items, n, messages);
}

/* ---- going on with the last message ---- */

/* The tag goes behind the text that is to be continued and shows where it ends in the rendered text. */
static const char tag[] = "CONTINUE_FINAL_MESSAGE_TAG ";
enum { TAG_BYTES = sizeof tag - 2 }; /* without the blank behind it, which a template may strip */

static tp_status append_tag(tp_jinja *j, tp_jvalue *text)
{
    tp_jvalue mark = tp_jliteral(tag), before = *text;
    return tp_jarithmetic(j, TP_T_ADD, &before, &mark, text);
}

static bool source_mentions(const tp_template *tmpl, const char *word)
{
    tp_span source = tp_template_source(tmpl);
    return memmem(source.data, source.len, word, strlen(word)) != NULL;
}

/* Tags the text of the last part that has one. */
static tp_status tag_last_part(tp_jinja *j, const tp_jvalue *parts, tp_jvalue *text)
{
    tp_jvalue key = tp_jliteral("text"), *found = NULL;
    for (size_t i = parts->list->n; i > 0 && found == NULL; i--) {
        const tp_jvalue *part = &parts->list->items[i - 1];
        if (part->type != TP_J_DICT)
            return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "continue_final_message: a part of the final message is no object");
        TP_TRY(tp_jdict_get(j, part->dict, &key, &found));
    }
    if (found == NULL)
        return tp_jinja_fail(j, TP_TEMPLATE_VALUE, "continue_final_message: the final message has no text to continue");
    *text = *found;
    return append_tag(j, found);
}

/* Tags every copy of the field, since reasoning has several names. Returns the text as it was. */
static tp_status tag_final(tp_jinja *j, const tp_chat_input *input, const tp_jvalue *messages, tp_jvalue *text)
{
    tp_jdict *last = messages->list->items[messages->list->n - 1].dict;
    tp_jvalue key = tp_jliteral(input->continue_final), *found, *copies[N_REASONING];
    size_t n = 0;
    TP_TRY(tp_jdict_get(j, last, &key, &found));
    if (found == NULL)
        return tp_jinja_fail(j, TP_TEMPLATE_VALUE, "continue_final_message: the final message has no \"%s\" to continue",
                             input->continue_final);
    bool reasoning = false, mentioned = source_mentions(j->tmpl, input->continue_final);
    for (int i = 0; i < N_REASONING; i++) reasoning = reasoning || strcmp(reasoning_fields[i], input->continue_final) == 0;
    for (int i = 0; reasoning && i < N_REASONING; i++) {
        tp_jvalue name = tp_jliteral(reasoning_fields[i]), *copy;
        bool equal = false;
        TP_TRY(tp_jdict_get(j, last, &name, &copy));
        if (copy != NULL) TP_TRY(tp_jequal(j, copy, found, &equal));
        if (!equal) continue;
        copies[n++] = copy;
        mentioned = mentioned || source_mentions(j->tmpl, reasoning_fields[i]);
    }
    if (!mentioned)
        return tp_jinja_fail(j, TP_TEMPLATE_VALUE, "continue_final_message: the template never mentions \"%s\"",
                             input->continue_final);
    *text = *found;
    if (found->type == TP_J_LIST) return tag_last_part(j, found, text);
    if (!reasoning) return append_tag(j, found);
    for (size_t i = 0; i < n; i++) TP_TRY(append_tag(j, copies[i]));
    return TP_OK;
}

static void truncate_output(tp_chat_text *out, size_t n)
{
    out->text.len = n;
    if (out->text.data != NULL) out->text.data[n] = '\0';
    size_t kept = 0;
    for (size_t i = 0; i < out->n_spans; i++) {
        tp_template_span span = out->spans[i];
        if (span.end > n) span.end = n;
        if (span.begin < span.end) out->spans[kept++] = span;
    }
    out->n_spans = kept;
    kept = 0;
    for (size_t i = 0; i < out->n_generation; i++) {
        tp_template_range range = out->generation[i];
        if (range.end > n) range.end = n;
        if (range.begin <= n) out->generation[kept++] = range;
    }
    out->n_generation = kept;
}

/* Cuts the rendered text where the tag stands last. If the template stripped the blank behind the tag, it would have stripped
 * what stood before it too, had there been no tag. */
static tp_status cut_at_tag(tp_jinja *j, const tp_jvalue *text, tp_chat_text *out)
{
    size_t blank = tp_jlstrip_len(text->text, text->len), len = tp_jrstrip_len(text->text + blank, text->len - blank);
    bool appears = len == 0 || memmem(tp_buf_cstr(&out->text), out->text.len, text->text + blank, len) != NULL;
    size_t at = out->text.len >= TAG_BYTES ? out->text.len - TAG_BYTES + 1 : 0;
    while (at > 0 && memcmp(out->text.data + at - 1, tag, TAG_BYTES) != 0) at--;
    if (!appears || at == 0)
        return tp_jinja_fail(j, TP_TEMPLATE_VALUE,
                             "continue_final_message: the final message does not appear in the text that the template makes");
    at--;
    bool kept_blank = at + TAG_BYTES < out->text.len && out->text.data[at + TAG_BYTES] == tag[TAG_BYTES];
    truncate_output(out, kept_blank ? at : tp_jrstrip_len(out->text.data, at));
    return TP_OK;
}

/* ---- variables ---- */

static tp_status set_objects(tp_jinja *j, const char *name, const tp_json *json, tp_template_error error)
{
    tp_jvalue value;
    for (size_t i = 0; i < tp_json_count(json); i++)
        if (tp_json_type_of(tp_json_at(json, i)) != TP_JSON_OBJECT)
            return tp_jinja_fail(j, error, "%s[%zu]: expected an object", name, i);
    TP_TRY(tp_jvalue_from_json(j, json, 0, &value));
    tp_jinja_set(j, tp_span_of(name), &value);
    return TP_OK;
}

static tp_status set_variables(tp_jinja *j, const tp_chat_input *input, const tp_jvalue *messages)
{
    tp_jvalue value = tp_jbool(input->add_generation_prompt);
    for (size_t i = 0; i < input->n_tokens; i++) {
        tp_jvalue token = tp_jliteral(input->tokens[i].text);
        tp_jinja_set(j, tp_span_of(input->tokens[i].name), &token);
    }
    tp_jinja_set(j, tp_span_of("add_generation_prompt"), &value);
    TP_TRY(set_objects(j, "tools", input->tools, TP_TEMPLATE_VALUE));
    TP_TRY(set_objects(j, "documents", input->documents, TP_TEMPLATE_TYPE));
    tp_jinja_set(j, tp_span_of("messages"), messages);
    for (size_t i = 0; i < tp_json_count(input->kwargs); i++) {
        TP_TRY(tp_jvalue_from_json(j, tp_json_at(input->kwargs, i), 0, &value));
        tp_jinja_set(j, tp_json_key_at(input->kwargs, i), &value);
    }
    return TP_OK;
}

static tp_status render(tp_jinja *j, const tp_chat_input *input, tp_chat_text *out)
{
    tp_jvalue messages, text = {0};
    TP_TRY(make_messages(j, input, &messages));
    if (input->continue_final != NULL && input->add_generation_prompt)
        return tp_jinja_fail(j, TP_TEMPLATE_VALUE, "continue_final_message and add_generation_prompt exclude each other");
    if (input->continue_final != NULL) TP_TRY(tag_final(j, input, &messages, &text));
    TP_TRY(set_variables(j, input, &messages));
    TP_TRY(tp_jinja_run(j, out));
    return input->continue_final != NULL ? cut_at_tag(j, &text, out) : TP_OK;
}

tp_status tp_chat_render(tp_ctx *ctx, const tp_template *tmpl, const tp_chat_input *input, tp_chat_text *out)
{
    tp_jinja j;
    *out = (tp_chat_text){0};
    tp_buf_init(&out->text, 0);
    tp_status st = tp_jinja_begin(ctx, tmpl, &input->options, &j);
    if (st == TP_OK) st = render(&j, input, out);
    if (st != TP_OK) tp_buf_free(&out->text);
    tp_jinja_end(&j, out);
    return st;
}

bool tp_chat_turn(const tp_chat_text *text, size_t message, size_t *begin, size_t *end)
{
    bool found = false;
    for (size_t i = 0; i < text->n_spans; i++) {
        const tp_template_span *span = &text->spans[i];
        if (span->message != message) continue;
        if (!found || span->begin < *begin) *begin = span->begin;
        if (!found || span->end > *end) *end = span->end;
        found = true;
    }
    return found;
}
