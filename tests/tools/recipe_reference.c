/* Prints docs/recipes.md, the reference of every recipe key, from the field tables. */
#include <stdio.h>

#include "recipes/keys.h"

int main(void)
{
    tp_buf text;
    tp_buf_init(&text, 0);
    tp_schema_write_reference(&tp_recipe_schema, &text);
    bool good = !text.failed && fwrite(text.data, 1, text.len, stdout) == text.len && fflush(stdout) == 0;
    tp_buf_free(&text);
    return good ? 0 : 1;
}
