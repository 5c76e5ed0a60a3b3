/* Templates as lists. */
#include "data/postprocess.h"

#include "base/mem.h"

tp_status tp_template_add(tp_ctx *ctx, tp_template *template_, tp_template_kind kind, int32_t id, int32_t type_id)
{
    size_t texts = kind != TP_TEMPLATE_SPECIAL;
    for (size_t i = 0; i < template_->count; i++) texts += template_->items[i].kind != TP_TEMPLATE_SPECIAL;
    if (template_->count >= TP_TEMPLATE_ITEMS || texts > TP_TEMPLATE_TEXTS)
        return tp_fail(ctx, TP_UNSUPPORTED, "post_processor: a template of more than %d tokens, or %d texts", TP_TEMPLATE_ITEMS,
                       TP_TEMPLATE_TEXTS);
    TP_TRY(tp_grow(ctx, &template_->items, &template_->capacity, template_->count + 1, sizeof *template_->items));
    template_->items[template_->count++] = (tp_template_item){kind, id, type_id};
    return TP_OK;
}

void tp_postprocessor_free(tp_postprocessor *post)
{
    tp_free(post->single.items);
    tp_free(post->pair.items);
    *post = (tp_postprocessor){0};
}
