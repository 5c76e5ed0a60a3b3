/* instruction: {instruction, input?, output, system?}, rendered as a conversation of user and assistant. An input follows the
 * instruction behind an empty line. */
#include "data/formats.h"

static bool fits(const tp_row_rules *rules, const tp_json *row)
{
    return tp_rules_has(rules, row, "instruction") && tp_rules_has(rules, row, "output");
}

static tp_status render(tp_ctx *ctx, const tp_row_rules *rules, const tp_json_doc *row, tp_span system, tp_span user,
                        tp_span output, tp_sample *sample)
{
    tp_chat_message messages[3];
    uint8_t flags[3], input = rules->train_on_inputs ? TP_MESSAGE_TRAINED : 0;
    size_t n = 0;
    if (system.len > 0) {
        flags[n] = input;
        messages[n++] = (tp_chat_message){.role = "system", .content = system};
    }
    flags[n] = input;
    messages[n++] = (tp_chat_message){.role = "user", .content = user};
    flags[n] = TP_MESSAGE_TRAINED | TP_MESSAGE_ASSISTANT;
    messages[n++] = (tp_chat_message){.role = "assistant", .content = output};
    tp_chat_input chat = {.rows = messages, .n_rows = n};
    return tp_render_row(ctx, rules->prompt, row, &chat, flags, n, sample);
}

static tp_status make(tp_ctx *ctx, const tp_row_rules *rules, const tp_json_doc *row, tp_sample *sample)
{
    tp_span instruction, input, output, system;
    TP_TRY(tp_rules_string(ctx, rules, row, "instruction", true, &instruction));
    TP_TRY(tp_rules_string(ctx, rules, row, "input", false, &input));
    TP_TRY(tp_rules_string(ctx, rules, row, "output", true, &output));
    TP_TRY(tp_rules_string(ctx, rules, row, "system", false, &system));
    if (system.len == 0 && rules->block->system != NULL) system = tp_span_of(rules->block->system);
    if (input.len == 0) return render(ctx, rules, row, system, instruction, output, sample);
    tp_buf user;
    tp_buf_init(&user, 0);
    tp_buf_append(&user, instruction.data, instruction.len);
    tp_buf_text(&user, "\n\n");
    tp_buf_append(&user, input.data, input.len);
    tp_status status = tp_buf_status(ctx, &user, "row");
    if (status == TP_OK) status = render(ctx, rules, row, system, (tp_span){user.data, user.len}, output, sample);
    tp_buf_free(&user);
    return status;
}

static const char *const names[] = {"instruction", "input", "output", "system", NULL};
const tp_row_format tp_format_instruction = {"instruction", TP_DATASET_INSTRUCTION, "instruction and output", names, true, fits,
                                             make};
