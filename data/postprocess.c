/* Templates as lists. */
#include "data/postprocess.h"

#include "base/mem.h"

tp_status tp_template_add(tp_ctx *ctx, tp_template *template_, tp_template_kind kind, int32_t id, int32_t type_id)
{
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
