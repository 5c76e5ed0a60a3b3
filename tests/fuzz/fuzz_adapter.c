/* Adapter folders on a tiny base: what opens fills slots with finite numbers, is written and read back to the same values, and
 * leaves the base as it was; so does what is refused.
 *
 * The input is adapter_config.json and, behind a line "====", adapter_model.safetensors (no line: no such file). */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "adapters/adapter.h"
#include "models/init.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char base_config[] =
    "{\"architectures\":[\"LlamaForCausalLM\"],\"model_type\":\"llama\",\"hidden_size\":16,\"intermediate_size\":24,"
    "\"num_hidden_layers\":2,\"num_attention_heads\":2,\"num_key_value_heads\":1,\"head_dim\":8,\"vocab_size\":40,"
    "\"max_position_embeddings\":64,\"rms_norm_eps\":1e-05,\"rope_theta\":10000.0,\"hidden_act\":\"silu\","
    "\"tie_word_embeddings\":false,\"torch_dtype\":\"float32\",\"attention_bias\":false,\"mlp_bias\":false}";

struct bench {
    char folder[64], config[96], model[96], given[96], written[96];
    tp_ctx ctx;
    tp_model *base;
};

static void require(bool holds, const char *what, const tp_ctx *ctx)
{
    if (holds) return;
    fprintf(stderr, "%s\n%s\n", what, ctx->message);
    abort();
}

static void make_folder(char folder[64])
{
    snprintf(folder, 64, "%s/tapeft-fuzz-XXXXXX", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
    if (mkdtemp(folder) == NULL) abort();
}

/* The base is made once; its files lose their names, and stay mapped. */
static struct bench *open_bench(void)
{
    static struct bench b;
    const tp_model_options options = {.precision = TP_F32};
    if (b.base != NULL) return &b;
    make_folder(b.folder);
    snprintf(b.config, sizeof b.config, "%.63s/config.json", b.folder);
    snprintf(b.model, sizeof b.model, "%.63s/model", b.folder);
    tp_ctx_init(&b.ctx);
    tp_status status = tp_device_open(&b.ctx, "cpu", 1, &b.ctx.device);
    if (status == TP_OK) status = tp_file_write(&b.ctx, b.config, base_config, sizeof base_config - 1);
    if (status == TP_OK) status = tp_model_init(&b.ctx, b.config, b.model, 1, TP_F32);
    if (status == TP_OK) status = tp_model_open(&b.ctx, b.model, &options, &b.base);
    require(status == TP_OK, "the base cannot be made", &b.ctx);
    if (tp_folder_remove(&b.ctx, b.folder) != TP_OK) abort();
    return &b;
}

static void put_file(const char *folder, const char *name, const uint8_t *data, size_t n)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "wb");
    if (file == NULL || fwrite(data, 1, n, file) != n || fclose(file) != 0) abort();
}

static bool base_is_bare(const struct bench *b)
{
    for (size_t i = 0; i < b->base->n_linears; i++)
        if (b->base->linears[i]->slot.n_terms != 0) return false;
    return true;
}

static void check_values(const struct bench *b, const tp_lora *lora)
{
    require(lora->n_modules > 0 && lora->params.n == 2 * lora->n_modules, "an adapter of nothing", &b->ctx);
    for (size_t i = 0; i < lora->n_modules; i++) {
        const tp_lora_module *m = &lora->modules[i];
        require(m->module->slot.n_terms == 1 && isfinite(m->term.scaling), "a slot is wrong", &b->ctx);
    }
    for (size_t i = 0; i < lora->params.n; i++)
        for (int64_t k = 0; k < lora->params.list[i].count; k++)
            require(isfinite(lora->params.values[lora->params.list[i].offset + k]), "a value is not finite", &b->ctx);
}

static void check_same(const struct bench *b, const tp_lora *first, const tp_lora *second)
{
    require(first->n_modules == second->n_modules && first->params.elements == second->params.elements, "other modules",
            &b->ctx);
    for (size_t i = 0; i < first->n_modules; i++)
        require(first->modules[i].module == second->modules[i].module && first->modules[i].rank == second->modules[i].rank &&
                    first->modules[i].term.scaling == second->modules[i].term.scaling,
                "a module came back otherwise", &b->ctx);
    for (size_t i = 0; i < first->params.n; i++) {
        const tp_param *p = &first->params.list[i], *q = &second->params.list[i];
        require(strcmp(p->name, q->name) == 0 && p->offset == q->offset, "other names", &b->ctx);
        require(memcmp(first->params.values + p->offset, second->params.values + q->offset, (size_t)p->count * sizeof(float)) ==
                    0,
                "other values", &b->ctx);
    }
}

/* A second reading fills the same slots: what the first one put there is compared, then both go. */
static void check_round_trip(struct bench *b, tp_adapter *adapter)
{
    tp_adapter *again = NULL;
    require(tp_adapter_save(&b->ctx, adapter->lora, b->base, NULL, b->written, NULL) == TP_OK, "cannot be written", &b->ctx);
    require(tp_adapter_open(&b->ctx, b->base, b->written, false, &again) == TP_OK, "what was written is refused", &b->ctx);
    check_same(b, adapter->lora, again->lora);
    tp_adapter_close(again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char divider[] = "\n====\n";
    struct bench *b = open_bench();
    const uint8_t *split = size > 0 ? memmem(data, size, divider, sizeof divider - 1) : NULL;
    size_t n = split != NULL ? (size_t)(split - data) : size;
    tp_adapter *adapter = NULL;
    make_folder(b->folder);
    snprintf(b->given, sizeof b->given, "%.63s/given", b->folder);
    snprintf(b->written, sizeof b->written, "%.63s/written", b->folder);
    if (mkdir(b->given, 0700) != 0) abort();
    put_file(b->given, "adapter_config.json", data, n);
    if (split != NULL)
        put_file(b->given, "adapter_model.safetensors", split + sizeof divider - 1, size - n - (sizeof divider - 1));

    tp_ctx_clear(&b->ctx);
    tp_status status = tp_adapter_open(&b->ctx, b->base, b->given, false, &adapter);
    if (status == TP_OK) {
        check_values(b, adapter->lora);
        check_round_trip(b, adapter);
        tp_adapter_close(adapter);
    } else {
        require(tp_status_exit_code(status) == 3 && strstr(b->ctx.message, "adapter_") != NULL, "refused in the wrong way",
                &b->ctx);
    }
    require(base_is_bare(b), "something is left in the base", &b->ctx);
    tp_ctx_clear(&b->ctx);
    if (tp_folder_remove(&b->ctx, b->folder) != TP_OK) abort();
    return 0;
}
