/* Any bytes as the text of a recipe. What is accepted must read back from its written form: to the same config,
 * without a remark, and then be written in the same bytes. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "recipes/keys.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct run {
    tp_ctx ctx;
    tp_config config;
    tp_problems problems;
    tp_recipe *recipe;
    tp_status status;
    tp_buf written;
};

static void open_run(struct run *r, const char *text, size_t n)
{
    static const char *const optional[] = {"base_model", "datasets", "output_dir", NULL};
    tp_recipe_options options = {.schema = &tp_recipe_schema, .optional = optional};
    memset(r, 0, sizeof *r);
    tp_ctx_init(&r->ctx);
    tp_buf_init(&r->written, 0);
    r->status = tp_recipe_parse(&r->ctx, "f", text, n, &options, &r->config, &r->problems, &r->recipe);
    if (r->status == TP_OK) tp_schema_write(&tp_recipe_schema, &r->config, &r->written);
}

static void close_run(struct run *r)
{
    tp_recipe_free(r->recipe);
    tp_problems_free(&r->problems);
    tp_buf_free(&r->written);
}

static void require(bool holds, const char *what, const struct run *r)
{
    if (holds) return;
    fprintf(stderr, "%s\n%s\n%s\n", what, r->ctx.message, tp_buf_cstr(&r->written));
    abort();
}

static void check_round_trip(struct run *first)
{
    struct run second;
    size_t from = 0;
    open_run(&second, tp_buf_cstr(&first->written), first->written.len);
    require(second.status == TP_OK, "the written recipe is refused", &second);
    require(second.problems.n == 0, "the written recipe is remarked upon", &second);
    const char *key = tp_schema_difference(&tp_recipe_schema, &first->config, &second.config, &from);
    require(key == NULL, key != NULL ? key : "", &second);
    require(strcmp(tp_buf_cstr(&first->written), tp_buf_cstr(&second.written)) == 0, "written otherwise", &second);
    close_run(&second);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct run run;
    open_run(&run, (const char *)data, size);
    require((run.status == TP_OK) == (run.recipe != NULL), "status and recipe disagree", &run);
    require(run.status == TP_OK || run.ctx.message[0] != '\0', "refused without a message", &run);
    if (run.status == TP_OK) check_round_trip(&run);
    close_run(&run);
    return 0;
}
