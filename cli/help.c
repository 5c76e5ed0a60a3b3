/* Help on the keys of recipes, from the tables that check them. */
#include "cli/help.h"

#include <stdbool.h>
#include <string.h>

#include "cli/command.h"
#include "recipes/keys.h"

#define MAX_KEYS 512

/* INVALID with the nearest key, if one is near. */
static tp_status suggest(tp_ctx *ctx, const char *name)
{
    const char *keys[MAX_KEYS + 1];
    size_t n = 0;
    for (size_t s = 0; s < tp_recipe_schema.n_sections; s++)
        for (size_t f = 0; f < tp_recipe_schema.sections[s]->n_fields && n < MAX_KEYS; f++)
            keys[n++] = tp_recipe_schema.sections[s]->fields[f].key;
    keys[n] = NULL;
    const char *near = tp_nearest_name(name, keys);
    if (near == NULL) return TP_OK;
    return tp_fail(ctx, TP_INVALID,
                   "no command or key is called \"%s\", did you mean \"%s\"? `tapeft help recipe` lists the keys", name, near);
}

tp_status tp_cli_print_key(tp_ctx *ctx, const char *name, bool *known)
{
    tp_buf text;
    tp_buf_init(&text, 0);
    *known = strcmp(name, "recipe") == 0;
    if (*known)
        tp_schema_write_reference(&tp_recipe_schema, &text);
    else
        *known = tp_schema_write_key(&tp_recipe_schema, name, &text);
    tp_status status = *known ? TP_OK : suggest(ctx, name);
    if (status == TP_OK) status = tp_buf_status(ctx, &text, "help");
    if (status == TP_OK) status = tp_cli_print(ctx, tp_buf_cstr(&text), text.len);
    tp_buf_free(&text);
    return status;
}
