/* From a configuration to a network: one table per family says what its tensors are called and where they go. */
#include "models/build.h"

#include <stdio.h>
#include <string.h>

#include "base/mem.h"

/* ---- the tables ---- */

/* Sizes in the alphabet of the configuration. */
enum size { HIDDEN, WIDTH, KV, QKV, FEED, HEAD, VOCAB, POSITIONS };

/* When a linear has a bias, or a norm exists at all. */
enum when { NEVER, ALWAYS, IF_QKV_BIAS, IF_O_BIAS, IF_MLP_BIAS, IF_QK_NORM, IF_UNTIED };

enum kind { TABLE, LINEAR, NORM };

struct row {
    const char *name, *gguf;
    enum kind kind;
    enum size rows, cols; /* norms: cols alone */
    enum when exists, bias;
    size_t at, bias_at;
    bool rotary;
};

#define BLOCK_LINEAR(member, name, gguf, rows, cols, bias, rotary)                                                             \
    {                                                                                                                          \
        name, gguf, LINEAR, rows, cols, ALWAYS, bias, offsetof(tp_block, member), offsetof(tp_block, member), rotary           \
    }
#define BLOCK_NORM(member, name, gguf, cols, exists)                                                                           \
    {                                                                                                                          \
        name, gguf, NORM, HIDDEN, cols, exists, NEVER, offsetof(tp_block, member), 0, false                                    \
    }
#define BLOCK_LAYERNORM(member, name, gguf)                                                                                    \
    {                                                                                                                          \
        name, gguf, NORM, HIDDEN, HIDDEN, ALWAYS, ALWAYS, offsetof(tp_block, member), offsetof(tp_block, member##_bias), false \
    }

static const struct row llama_block[] = {
    BLOCK_LINEAR(q, "self_attn.q_proj", "attn_q", WIDTH, HIDDEN, IF_QKV_BIAS, true),
    BLOCK_LINEAR(k, "self_attn.k_proj", "attn_k", KV, HIDDEN, IF_QKV_BIAS, true),
    BLOCK_LINEAR(v, "self_attn.v_proj", "attn_v", KV, HIDDEN, IF_QKV_BIAS, false),
    BLOCK_LINEAR(o, "self_attn.o_proj", "attn_output", HIDDEN, WIDTH, IF_O_BIAS, false),
    BLOCK_NORM(q_norm, "self_attn.q_norm", "attn_q_norm", HEAD, IF_QK_NORM),
    BLOCK_NORM(k_norm, "self_attn.k_norm", "attn_k_norm", HEAD, IF_QK_NORM),
    BLOCK_LINEAR(gate, "mlp.gate_proj", "ffn_gate", FEED, HIDDEN, IF_MLP_BIAS, false),
    BLOCK_LINEAR(up, "mlp.up_proj", "ffn_up", FEED, HIDDEN, IF_MLP_BIAS, false),
    BLOCK_LINEAR(down, "mlp.down_proj", "ffn_down", HIDDEN, FEED, IF_MLP_BIAS, false),
    BLOCK_NORM(norm1, "input_layernorm", "attn_norm", HIDDEN, ALWAYS),
    BLOCK_NORM(norm2, "post_attention_layernorm", "ffn_norm", HIDDEN, ALWAYS),
};

static const struct row gpt2_block[] = {
    BLOCK_LAYERNORM(norm1, "ln_1", "attn_norm"),
    BLOCK_LINEAR(qkv, "attn.c_attn", "attn_qkv", QKV, HIDDEN, ALWAYS, false),
    BLOCK_LINEAR(o, "attn.c_proj", "attn_output", HIDDEN, WIDTH, ALWAYS, false),
    BLOCK_LAYERNORM(norm2, "ln_2", "ffn_norm"),
    BLOCK_LINEAR(up, "mlp.c_fc", "ffn_up", FEED, HIDDEN, ALWAYS, false),
    BLOCK_LINEAR(down, "mlp.c_proj", "ffn_down", HIDDEN, FEED, ALWAYS, false),
};

#define AT(member) offsetof(tp_model, member)
static const struct row llama_first[] = {
    {"model.embed_tokens", "token_embd", TABLE, VOCAB, HIDDEN, ALWAYS, NEVER, AT(embedding), 0, false}};
static const struct row llama_last[] = {{"model.norm", "output_norm", NORM, HIDDEN, HIDDEN, ALWAYS, NEVER, AT(norm), 0, false},
                                        {"lm_head", "output", LINEAR, VOCAB, HIDDEN, IF_UNTIED, NEVER, AT(head), 0, false}};
static const struct row gpt2_first[] = {
    {"transformer.wte", "token_embd", TABLE, VOCAB, HIDDEN, ALWAYS, NEVER, AT(embedding), 0, false},
    {"transformer.wpe", "position_embd", TABLE, POSITIONS, HIDDEN, ALWAYS, NEVER, AT(position), 0, false}};
static const struct row gpt2_last[] = {
    {"transformer.ln_f", "output_norm", NORM, HIDDEN, HIDDEN, ALWAYS, ALWAYS, AT(norm), AT(norm_bias), false},
    {"lm_head", "output", LINEAR, VOCAB, HIDDEN, IF_UNTIED, NEVER, AT(head), 0, false}};

#define ROWS(table) table, sizeof table / sizeof *table
static const struct layout {
    const char *blocks; /* what stands before a block's number */
    const struct row *first;
    size_t n_first;
    const struct row *block;
    size_t n_block;
    const struct row *last;
    size_t n_last;
    bool conv1d;
} llama_layout = {"model.layers", ROWS(llama_first), ROWS(llama_block), ROWS(llama_last), false},
  gpt2_layout = {"transformer.h", ROWS(gpt2_first), ROWS(gpt2_block), ROWS(gpt2_last), true};

static const struct layout *layout_of(const tp_model_config *c)
{
    return c->family == TP_FAMILY_GPT2 ? &gpt2_layout : &llama_layout;
}

static int64_t size_of(const tp_model_config *c, enum size size)
{
    int64_t width = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    switch (size) {
    case HIDDEN: return c->hidden_size;
    case WIDTH: return width;
    case KV: return kv;
    case QKV: return width + 2 * kv;
    case FEED: return c->intermediate_size;
    case HEAD: return c->head_dim;
    case VOCAB: return c->vocab_size;
    case POSITIONS: return c->max_positions;
    }
    return 0;
}

static bool holds(const tp_model_config *c, enum when when)
{
    switch (when) {
    case NEVER: return false;
    case ALWAYS: return true;
    case IF_QKV_BIAS: return c->qkv_bias;
    case IF_O_BIAS: return c->o_bias;
    case IF_MLP_BIAS: return c->mlp_bias;
    case IF_QK_NORM: return c->qk_norm;
    case IF_UNTIED: return !c->tied;
    }
    return false;
}

/* ---- parts ---- */

struct lister {
    const tp_model_config *config;
    const struct layout *layout;
    tp_part *parts;
    size_t n;
};

static tp_part *add(struct lister *l, const struct row *row, int layer, const char *suffix)
{
    tp_part *part = &l->parts[l->n++];
    *part = (tp_part){.layer = layer, .rows = 1, .cols = size_of(l->config, row->cols), .rotary = row->rotary};
    if (layer < 0) {
        snprintf(part->name, sizeof part->name, "%s.%s", row->name, suffix);
        snprintf(part->gguf, sizeof part->gguf, "%s.%s", row->gguf, suffix);
    } else {
        snprintf(part->name, sizeof part->name, "%s.%d.%s.%s", l->layout->blocks, layer, row->name, suffix);
        snprintf(part->gguf, sizeof part->gguf, "blk.%d.%s.%s", layer, row->gguf, suffix);
    }
    return part;
}

static void list_rows(struct lister *l, const struct row *rows, size_t n, int layer)
{
    const tp_model_config *c = l->config;
    for (size_t i = 0; i < n; i++) {
        const struct row *row = &rows[i];
        bool linear = row->kind == LINEAR;
        if (!holds(c, row->exists)) continue;
        tp_part *part = add(l, row, layer, "weight");
        part->role = row->kind == NORM ? TP_PART_NORM : TP_PART_WEIGHT;
        part->at = row->at + (linear ? offsetof(tp_linear_module, weight) : 0);
        if (row->kind != NORM) part->rows = size_of(c, row->rows);
        part->conv1d = linear && layer >= 0 && l->layout->conv1d;
        if (!holds(c, row->bias)) continue;
        part = add(l, row, layer, "bias");
        part->role = TP_PART_BIAS;
        part->cols = linear ? size_of(c, row->rows) : part->cols;
        part->at = row->bias_at + (linear ? offsetof(tp_linear_module, bias) : 0);
    }
}

tp_status tp_parts_list(tp_ctx *ctx, const tp_model_config *config, tp_part **parts, size_t *n)
{
    struct lister l = {.config = config, .layout = layout_of(config)};
    size_t most = 2 * (l.layout->n_first + l.layout->n_last + (size_t)config->n_layers * l.layout->n_block);
    l.parts = tp_alloc(ctx, most, sizeof *l.parts);
    if (l.parts == NULL) return TP_NOMEM;
    list_rows(&l, l.layout->first, l.layout->n_first, -1);
    for (int i = 0; i < (int)config->n_layers; i++) list_rows(&l, l.layout->block, l.layout->n_block, i);
    list_rows(&l, l.layout->last, l.layout->n_last, -1);
    *parts = l.parts;
    *n = l.n;
    return TP_OK;
}

static void *place(tp_model *model, const tp_part *part)
{
    char *base = part->layer < 0 ? (char *)model : (char *)&model->blocks[part->layer];
    return base + part->at;
}

tp_matrix *tp_part_matrix(tp_model *model, const tp_part *part)
{
    return place(model, part);
}
tp_tensor *tp_part_vector(tp_model *model, const tp_part *part)
{
    return place(model, part);
}

/* ---- modules ---- */

static tp_status add_module(tp_ctx *ctx, tp_model *model, const struct row *row, int layer)
{
    const struct layout *layout = layout_of(&model->config);
    char path[TP_PART_NAME];
    char *base = layer < 0 ? (char *)model : (char *)&model->blocks[layer];
    tp_linear_module *module = (void *)(base + row->at);
    if (layer < 0)
        snprintf(path, sizeof path, "%s", row->name);
    else
        snprintf(path, sizeof path, "%s.%d.%s", layout->blocks, layer, row->name);
    module->path = tp_strdup(ctx, path);
    if (module->path == NULL) return TP_NOMEM;
    module->layer = layer;
    module->is_head = layer < 0;
    module->conv1d = layout->conv1d && layer >= 0;
    if (holds(&model->config, row->exists)) model->linears[model->n_linears++] = module;
    return TP_OK;
}

static tp_status add_modules(tp_ctx *ctx, tp_model *model, const struct row *rows, size_t n, int layer)
{
    for (size_t i = 0; i < n; i++)
        if (rows[i].kind == LINEAR) TP_TRY(add_module(ctx, model, &rows[i], layer));
    return TP_OK;
}

static tp_status add_all_modules(tp_ctx *ctx, tp_model *model)
{
    const struct layout *layout = layout_of(&model->config);
    size_t n_layers = (size_t)model->config.n_layers;
    model->blocks = tp_alloc(ctx, n_layers, sizeof *model->blocks);
    model->linears = tp_alloc(ctx, n_layers * layout->n_block + layout->n_last, sizeof(tp_linear_module *));
    if (model->blocks == NULL || model->linears == NULL) return TP_NOMEM;
    for (int i = 0; i < (int)n_layers; i++) TP_TRY(add_modules(ctx, model, layout->block, layout->n_block, i));
    return add_modules(ctx, model, layout->last, layout->n_last, -1);
}

static tp_status add_rope(tp_ctx *ctx, tp_model *model)
{
    if (model->config.family == TP_FAMILY_GPT2) return TP_OK;
    model->inv_freq = tp_store_alloc(ctx, model->store, (size_t)model->config.head_dim / 2 * sizeof(float));
    return model->inv_freq != NULL ? TP_OK : TP_NOMEM;
}

/* The groups that may be stacked. */
static void add_joints(tp_model *model)
{
    for (int64_t i = 0; i < model->config.n_layers && model->config.family != TP_FAMILY_GPT2; i++) {
        tp_block *b = &model->blocks[i];
        b->joints[TP_JOINT_QKV] = (tp_joint){.members = {&b->q, &b->k, &b->v}, .n = 3};
        b->joints[TP_JOINT_O] = (tp_joint){.members = {&b->o}, .n = 1};
        b->joints[TP_JOINT_GATE_UP] = (tp_joint){.members = {&b->gate, &b->up}, .n = 2};
        b->joints[TP_JOINT_DOWN] = (tp_joint){.members = {&b->down}, .n = 1};
    }
}

static tp_status fill(tp_ctx *ctx, tp_model *model, const char *path)
{
    model->path = tp_strdup(ctx, path);
    if (model->path == NULL) return TP_NOMEM;
    TP_TRY(add_all_modules(ctx, model));
    add_joints(model);
    return add_rope(ctx, model);
}

tp_status tp_model_new(tp_ctx *ctx, tp_model_config *config, tp_model_store *store, const char *path, tp_dtype precision,
                       tp_model **out)
{
    *out = NULL;
    tp_model *model = tp_alloc(ctx, 1, sizeof *model);
    if (model == NULL) {
        tp_store_free(store);
        tp_config_free(config);
        return TP_NOMEM;
    }
    model->config = *config;
    model->store = store;
    model->precision = precision;
    *config = (tp_model_config){0};
    tp_status status = fill(ctx, model, path);
    if (status != TP_OK) {
        tp_model_free(model);
        return status;
    }
    *out = model;
    return TP_OK;
}

static void free_path(tp_linear_module *module)
{
    tp_free(module->path);
}

void tp_model_free(tp_model *model)
{
    if (model == NULL) return;
    for (int64_t i = 0; model->blocks != NULL && i < model->config.n_layers; i++) {
        tp_block *b = &model->blocks[i];
        tp_linear_module *modules[] = {&b->q, &b->k, &b->v, &b->o, &b->qkv, &b->gate, &b->up, &b->down};
        for (size_t m = 0; m < sizeof modules / sizeof *modules; m++) free_path(modules[m]);
    }
    free_path(&model->head);
    tp_free(model->blocks);
    tp_free(model->linears);
    tp_free(model->path);
    tp_store_free(model->store);
    tp_config_free(&model->config);
    tp_free(model);
}
