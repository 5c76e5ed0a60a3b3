/* completion: {text}, all of it learned, or {prompt, completion}, the completion learned. No template: the text is what the
 * model sees, with bos in front and eos behind. */
#include "data/formats.h"

static bool fits(const tp_row_rules *rules, const tp_json *row)
{
    return tp_rules_has(rules, row, "text") || (tp_rules_has(rules, row, "prompt") && tp_rules_has(rules, row, "completion"));
}

static tp_status make_pair(tp_ctx *ctx, const tp_row_rules *rules, const tp_json_doc *row, tp_sample *sample)
{
    tp_span prompt, completion;
    TP_TRY(tp_rules_string(ctx, rules, row, "prompt", true, &prompt));
    TP_TRY(tp_rules_string(ctx, rules, row, "completion", true, &completion));
    tp_buf_append(&sample->text, prompt.data, prompt.len);
    tp_buf_append(&sample->text, completion.data, completion.len);
    TP_TRY(tp_buf_status(ctx, &sample->text, "row"));
    if (rules->train_on_inputs) TP_TRY(tp_sample_train(ctx, sample, 0, prompt.len, prompt.len));
    return tp_sample_train(ctx, sample, prompt.len, sample->text.len, sample->text.len);
}

static tp_status make(tp_ctx *ctx, const tp_row_rules *rules, const tp_json_doc *row, tp_sample *sample)
{
    tp_span text;
    if (rules->pairs) return make_pair(ctx, rules, row, sample);
    TP_TRY(tp_rules_string(ctx, rules, row, "text", true, &text));
    return tp_sample_from_text(ctx, text, sample);
}

static const char *const names[] = {"text", "prompt", "completion", NULL};
const tp_row_format tp_format_completion = {
    "completion", TP_DATASET_COMPLETION, "text, or prompt and completion", names, false, fits, make};
