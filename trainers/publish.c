/* The adapter folder that a run leaves: PEFT's files, and beside them what using the adapter takes, the chat template and
 * generation_config.json, and what making it again takes, recipe.yaml. */
#include <string.h>

#include "base/json.h"
#include "base/log.h"
#include "base/mem.h"
#include "trainers/run.h"

#define GENERATION          "generation_config.json"
#define GENERATION_MAX_SIZE ((size_t)1 << 20)

/* The base's own file as it is: *text is NULL if it has none, or one that is not JSON. */
static tp_status read_generation(tp_run *run, char **text)
{
    const char *base = run->config->run.base_model;
    size_t n;
    tp_json_doc *doc = NULL;
    *text = NULL;
    char *path = tp_path_is_folder(base) ? tp_path_join(run->ctx, base, GENERATION) : NULL;
    if (path == NULL) return run->ctx->status;
    tp_status status = TP_OK;
    if (tp_path_exists(path)) status = tp_file_read(run->ctx, path, GENERATION_MAX_SIZE, text, &n);
    if (status == TP_OK && *text != NULL) status = tp_json_parse(run->ctx, *text, n, &(tp_json_options){.name = path}, &doc);
    tp_json_free(doc);
    tp_free(path);
    if (status == TP_OK || status == TP_NOMEM) return status;
    tp_warn(run->ctx, "%s; the adapter gets no " GENERATION " of the base", run->ctx->message);
    tp_ctx_clear(run->ctx);
    tp_free(*text);
    *text = NULL;
    return TP_OK;
}

/* For a base without one (GGUF): what the tokenizer knows, the ids that begin, end and fill texts. */
static tp_status make_generation(tp_run *run, char **text)
{
    static const struct {
        const char *key;
        tp_token_role role;
    } roles[] = {{"bos_token_id", TP_TOKEN_BOS}, {"eos_token_id", TP_TOKEN_EOS}, {"pad_token_id", TP_TOKEN_PAD}};
    tp_buf out;
    const char *separator = "{\n";
    tp_buf_init(&out, 0);
    for (size_t i = 0; i < sizeof roles / sizeof *roles; i++) {
        int32_t id = tp_tokenizer_role(run->tokenizer, roles[i].role);
        if (id < 0) continue;
        tp_buf_printf(&out, "%s  \"%s\": %d", separator, roles[i].key, (int)id);
        separator = ",\n";
    }
    if (out.len > 0) {
        tp_buf_text(&out, "\n}\n");
        *text = tp_strdup(run->ctx, tp_buf_cstr(&out));
    }
    tp_status status = tp_buf_status(run->ctx, &out, GENERATION);
    tp_buf_free(&out);
    return status == TP_OK ? run->ctx->status : status;
}

/* The one that the rows were rendered by, which need not be the tokenizer's; without such rows the tokenizer's. */
static tp_status copy_chat_template(tp_run *run, char **text)
{
    const tp_prompt *prompt = tp_dataset_prompt(run->data);
    tp_span chat = {0};
    if (prompt != NULL && prompt->tmpl != NULL)
        chat = tp_template_source(prompt->tmpl);
    else if (run->tokenizer != NULL)
        chat = tp_tokenizer_chat_template(run->tokenizer, NULL);
    if (chat.data == NULL) return TP_OK;
    *text = tp_strndup(run->ctx, chat.data, chat.len);
    return *text != NULL ? TP_OK : TP_NOMEM;
}

tp_status tp_run_publish_adapter(tp_run *run, const char *name)
{
    char *path = tp_path_join(run->ctx, run->config->output.output_dir, name), *chat = NULL, *generation = NULL;
    const char *extra[7] = {NULL};
    tp_buf recipe;
    tp_adapter_origin origin = {.tokenizer = run->state.tokenizer, .data = run->state.data, .device = run->state.device};
    size_t n = 0;
    tp_buf_init(&recipe, 0);
    tp_run_write_recipe(run, &recipe);
    tp_status status = path != NULL ? tp_buf_status(run->ctx, &recipe, "recipe.yaml") : TP_NOMEM;
    extra[n++] = "recipe.yaml";
    extra[n++] = tp_buf_cstr(&recipe);
    if (status == TP_OK) status = copy_chat_template(run, &chat);
    if (status == TP_OK) status = read_generation(run, &generation);
    if (status == TP_OK && generation == NULL && run->tokenizer != NULL) status = make_generation(run, &generation);
    if (chat != NULL) {
        extra[n++] = "chat_template.jinja";
        extra[n++] = chat;
    }
    if (generation != NULL) {
        extra[n++] = GENERATION;
        extra[n++] = generation;
    }
    if (status == TP_OK) status = tp_adapter_save(run->ctx, run->lora, run->model, &origin, path, extra);
    tp_buf_free(&recipe);
    tp_free(generation);
    tp_free(chat);
    tp_free(path);
    return status;
}
