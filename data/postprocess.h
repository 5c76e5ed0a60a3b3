/* Post-processors: special tokens around one text, or around two.
 *
 * Every kind of tokenizer.json (TemplateProcessing, RobertaProcessing, BertProcessing, ByteLevel) comes down to two
 * lists of items: a special token, or the place of the first or second text, each with a type id. */
#ifndef TP_DATA_POSTPROCESS_H
#define TP_DATA_POSTPROCESS_H

#include "data/tokens.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum tp_template_kind { TP_TEMPLATE_SPECIAL, TP_TEMPLATE_FIRST, TP_TEMPLATE_SECOND } tp_template_kind;

typedef struct tp_template_item {
    tp_template_kind kind;
    int32_t id; /* of a special token */
    int32_t type_id;
} tp_template_item;

#define TP_TEMPLATE_ITEMS 256 /* that a list may have, */
#define TP_TEMPLATE_TEXTS 4   /* and texts among them: each makes the result longer by a whole text */

typedef struct tp_template {
    tp_template_item *items;
    size_t count, capacity;
} tp_template;

typedef struct tp_postprocessor {
    tp_template single, pair; /* without items: the text alone; both texts, with type ids 0 and 1 */
} tp_postprocessor;

/* UNSUPPORTED beyond the limits above. */
TP_API tp_status tp_template_add(tp_ctx *ctx, tp_template *template_, tp_template_kind kind, int32_t id,
                                 int32_t type_id) TP_MUST_CHECK;
TP_API void tp_postprocessor_free(tp_postprocessor *post);

#ifdef __cplusplus
}
#endif
#endif
