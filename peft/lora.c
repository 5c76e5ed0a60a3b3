/* LoRA: from a specification to filled slots. */
#include "peft/lora.h"

#include <math.h>
#include <string.h>

#include "base/mem.h"
#include "base/rng.h"

double tp_lora_scaling(const tp_lora_spec *spec, double alpha, int64_t rank)
{
    return spec->use_rslora ? alpha / sqrt((double)rank) : alpha / (double)rank;
}

static const char *name_of(const tp_lora_spec *spec, const char *key, const char *member)
{
    return spec->call != NULL ? spec->call(spec->call_state, key, member) : key;
}

/* Bits of the list entries and patterns that matched something. */
struct seen {
    unsigned char entry[TP_LIMIT_PATTERNS], rank[TP_LIMIT_PATTERNS], alpha[TP_LIMIT_PATTERNS];
};

static tp_status declare(tp_ctx *ctx, tp_lora *lora, const char *path, char factor, int64_t rows, int64_t cols, size_t *index)
{
    tp_buf name;
    tp_buf_init(&name, 0);
    tp_buf_printf(&name, "base_model.model.%s.lora_%c.weight", path, factor);
    tp_status status = tp_buf_status(ctx, &name, path);
    if (status == TP_OK) status = tp_params_declare(ctx, &lora->params, tp_buf_cstr(&name), rows, cols, index);
    tp_buf_free(&name);
    return status;
}

/* The A's of a layer lie behind each other, then its B's: gradients of A's that read the same input are then one array, and
 * one product (autograd/ops/joint.c). */
static tp_status declare_factors(tp_ctx *ctx, tp_lora *lora)
{
    for (size_t first = 0, end; first < lora->n_modules; first = end) {
        int layer = lora->modules[first].module->layer;
        for (end = first; end < lora->n_modules && lora->modules[end].module->layer == layer; end++) {
            tp_lora_module *m = &lora->modules[end];
            TP_TRY(declare(ctx, lora, m->module->path, 'A', m->rank, m->module->weight.cols, &m->a));
        }
        for (size_t i = first; i < end; i++) {
            tp_lora_module *m = &lora->modules[i];
            TP_TRY(declare(ctx, lora, m->module->path, 'B', m->module->weight.rows, m->rank, &m->b));
        }
    }
    return TP_OK;
}

static tp_status add_module(tp_ctx *ctx, tp_lora *lora, tp_linear_module *module, struct seen *seen)
{
    const tp_lora_spec *spec = &lora->spec;
    bool matches;
    int entry, rank_index, alpha_index;
    double rank, alpha;
    TP_TRY(tp_target_match(ctx, &spec->targets, module->path, module->is_head, &matches, &entry));
    if (!matches) return TP_OK;
    TP_TRY(
        tp_pattern_value(ctx, spec->rank_pattern, spec->n_rank_pattern, module->path, (double)spec->rank, &rank, &rank_index));
    TP_TRY(tp_pattern_value(ctx, spec->alpha_pattern, spec->n_alpha_pattern, module->path, spec->alpha, &alpha, &alpha_index));
    if (entry >= 0) seen->entry[entry] = 1;
    if (rank_index >= 0) seen->rank[rank_index] = 1;
    if (alpha_index >= 0) seen->alpha[alpha_index] = 1;
    if (!(rank >= 1 && rank <= TP_LIMIT_RANK) || floor(rank) != rank)
        return tp_fail(ctx, TP_INVALID, "%s: %s: expected a rank from 1 to %d, got %g", name_of(spec, "rank_pattern", NULL),
                       module->path, TP_LIMIT_RANK, rank);
    tp_lora_module *m = &lora->modules[lora->n_modules++];
    *m = (tp_lora_module){.module = module, .rank = (int64_t)rank, .alpha = alpha};
    return TP_OK;
}

/* The last component of some module that resembles `name`, for the message. */
static const char *nearest_module(const tp_model *model, const char *name)
{
    const char *names[64] = {NULL};
    size_t n = 0;
    for (size_t i = 0; i < model->n_linears && n < 63; i++) {
        const char *last = tp_module_name(model->linears[i]);
        bool known = false;
        for (size_t j = 0; j < n; j++) known = known || strcmp(names[j], last) == 0;
        if (!known) names[n++] = last;
    }
    return tp_nearest_name(name, names);
}

/* Entries may overlap ("q_proj", "self_attn.q_proj"): one that never came first can still match. */
static tp_status matches_alone(tp_ctx *ctx, const tp_model *model, const tp_names *include, size_t entry, bool *matches)
{
    tp_targets alone = {.include = {include->is_regex, include->list + entry, 1}};
    *matches = false;
    for (size_t i = 0; i < model->n_linears && !*matches; i++)
        TP_TRY(tp_target_match(ctx, &alone, model->linears[i]->path, model->linears[i]->is_head, matches, NULL));
    return TP_OK;
}

/* Expressions compile, layers are there, and what is to be left out is there: a typo would train what should stay as it is. */
static tp_status check_names(tp_ctx *ctx, const tp_model *model, const tp_lora_spec *spec)
{
    const tp_targets *t = &spec->targets;
    bool matches;
    if (t->include.n > TP_LIMIT_PATTERNS || spec->n_rank_pattern > TP_LIMIT_PATTERNS ||
        spec->n_alpha_pattern > TP_LIMIT_PATTERNS)
        return tp_fail(ctx, TP_INVALID, "%s: more than %d names or patterns", name_of(spec, "target_modules", NULL),
                       TP_LIMIT_PATTERNS);
    if (tp_target_match(ctx, &(tp_targets){.include = t->include}, "", false, &matches, NULL) != TP_OK)
        return tp_fail_in(ctx, "%s", name_of(spec, "target_modules", NULL));
    if (tp_target_match(ctx, &(tp_targets){.exclude = t->exclude}, "", false, &matches, NULL) != TP_OK)
        return tp_fail_in(ctx, "%s", name_of(spec, "exclude_modules", NULL));
    for (size_t i = 0; i < t->n_layers && !spec->allow_unmatched; i++)
        if (t->layers[i] < 0 || t->layers[i] >= model->config.n_layers)
            return tp_fail(ctx, TP_INVALID, "%s: %lld: the model has layers 0 to %lld",
                           name_of(spec, "layers_to_transform", NULL), (long long)t->layers[i],
                           (long long)model->config.n_layers - 1);
    for (size_t i = 0; i < t->exclude.n && !spec->allow_unmatched; i++) {
        TP_TRY(matches_alone(ctx, model, &t->exclude, i, &matches));
        if (matches) continue;
        const char *near = nearest_module(model, t->exclude.list[i]);
        return tp_fail(ctx, TP_INVALID, "%s: \"%s\" matches no linear layer of %s%s%s%s",
                       name_of(spec, "exclude_modules", NULL), t->exclude.list[i], model->config.architecture,
                       near != NULL ? "; did you mean \"" : "", near != NULL ? near : "", near != NULL ? "\"?" : "");
    }
    return TP_OK;
}

/* Whether the patterns compile, one by one. */
static tp_status check_patterns(tp_ctx *ctx, const tp_lora_spec *spec, const char *key, const tp_pattern *patterns, size_t n)
{
    double value;
    int index;
    for (size_t i = 0; i < n; i++)
        if (tp_pattern_value(ctx, patterns + i, 1, "", 0, &value, &index) != TP_OK)
            return tp_fail_in(ctx, "%s", name_of(spec, key, patterns[i].key));
    return TP_OK;
}

static tp_status all_matched(tp_ctx *ctx, const tp_model *model, const tp_lora *lora, const struct seen *seen)
{
    const tp_lora_spec *spec = &lora->spec;
    for (size_t i = 0; !spec->targets.all_linear && i < spec->targets.include.n; i++) {
        bool matches;
        if (seen->entry[i] || spec->allow_unmatched) continue;
        TP_TRY(matches_alone(ctx, model, &spec->targets.include, i, &matches));
        if (matches) continue;
        const char *near = nearest_module(model, spec->targets.include.list[i]);
        return tp_fail(ctx, TP_INVALID, "%s: \"%s\" matches no linear layer of %s%s%s%s", name_of(spec, "target_modules", NULL),
                       spec->targets.include.list[i], model->config.architecture, near != NULL ? "; did you mean \"" : "",
                       near != NULL ? near : "", near != NULL ? "\"?" : "");
    }
    for (size_t i = 0; i < spec->n_rank_pattern; i++)
        if (!seen->rank[i] && !spec->allow_unmatched)
            return tp_fail(ctx, TP_INVALID, "%s: \"%s\" matches no adapted layer",
                           name_of(spec, "rank_pattern", spec->rank_pattern[i].key), spec->rank_pattern[i].key);
    for (size_t i = 0; i < spec->n_alpha_pattern; i++)
        if (!seen->alpha[i] && !spec->allow_unmatched)
            return tp_fail(ctx, TP_INVALID, "%s: \"%s\" matches no adapted layer",
                           name_of(spec, "alpha_pattern", spec->alpha_pattern[i].key), spec->alpha_pattern[i].key);
    if (lora->n_modules == 0)
        return tp_fail(ctx, TP_INVALID, "%s: no linear layer of %s is left to adapt", name_of(spec, "target_modules", NULL),
                       model->config.architecture);
    return TP_OK;
}

static void fill_slots(tp_lora *lora)
{
    for (size_t i = 0; i < lora->n_modules; i++) {
        tp_lora_module *m = &lora->modules[i];
        m->term = (tp_lowrank){.a = &lora->params.list[m->a].tensor,
                               .b = &lora->params.list[m->b].tensor,
                               .scaling = (float)tp_lora_scaling(&lora->spec, m->alpha, m->rank),
                               .dropout = (float)lora->spec.dropout,
                               .site = (uint32_t)i};
        m->module->slot = (tp_slot){&m->term, 1};
    }
}

static tp_status declare_all(tp_ctx *ctx, tp_model *model, tp_lora *lora, struct seen *seen)
{
    lora->modules = tp_alloc(ctx, model->n_linears, sizeof *lora->modules);
    if (lora->modules == NULL) return TP_NOMEM;
    TP_TRY(check_names(ctx, model, &lora->spec));
    TP_TRY(check_patterns(ctx, &lora->spec, "rank_pattern", lora->spec.rank_pattern, lora->spec.n_rank_pattern));
    TP_TRY(check_patterns(ctx, &lora->spec, "alpha_pattern", lora->spec.alpha_pattern, lora->spec.n_alpha_pattern));
    for (size_t i = 0; i < model->n_linears; i++) TP_TRY(add_module(ctx, lora, model->linears[i], seen));
    TP_TRY(all_matched(ctx, model, lora, seen));
    return declare_factors(ctx, lora);
}

tp_status tp_lora_declare(tp_ctx *ctx, tp_model *model, const tp_lora_spec *spec, tp_lora **result)
{
    tp_lora *lora = tp_alloc(ctx, 1, sizeof *lora);
    struct seen *seen = tp_alloc(ctx, 1, sizeof *seen);
    tp_status status = lora != NULL && seen != NULL ? TP_OK : TP_NOMEM;
    if (status == TP_OK) {
        lora->spec = *spec;
        status = declare_all(ctx, model, lora, seen);
        lora->spec.call = NULL;
    }
    tp_free(seen);
    if (status != TP_OK) {
        tp_lora_free(lora);
        return status;
    }
    *result = lora;
    return TP_OK;
}

tp_status tp_lora_allocate(tp_ctx *ctx, tp_lora *lora)
{
    TP_TRY(tp_params_allocate(ctx, &lora->params));
    fill_slots(lora);
    return TP_OK;
}

tp_status tp_lora_attach(tp_ctx *ctx, tp_model *model, const tp_lora_spec *spec, tp_lora **result)
{
    tp_lora *lora;
    TP_TRY(tp_lora_declare(ctx, model, spec, &lora));
    tp_status status = tp_lora_allocate(ctx, lora);
    if (status != TP_OK) {
        tp_lora_free(lora);
        return status;
    }
    *result = lora;
    return TP_OK;
}

tp_status tp_lora_initialise(tp_ctx *ctx, tp_lora *lora)
{
    for (size_t i = 0; i < lora->n_modules; i++) {
        const tp_lora_module *m = &lora->modules[i];
        const tp_param *a = &lora->params.list[m->a];
        tp_rng_key key = {ctx->seed, TP_STREAM_INIT + (uint32_t)i, 0};
        float *values = tp_alloc(ctx, (size_t)a->count, sizeof *values);
        if (values == NULL) return TP_NOMEM;
        float bound = 1.0f / sqrtf((float)a->tensor.cols);
        if (lora->spec.gaussian)
            tp_rng_fill_normal(key, 0, a->count, 0, 1.0f / (float)m->rank, values);
        else
            tp_rng_fill_uniform(key, 0, a->count, -bound, bound, values);
        tp_status status = ctx->device->backend->copy_in(ctx, a->tensor.data, values, (size_t)a->count * sizeof *values);
        tp_free(values);
        if (status != TP_OK) return status;
    }
    return TP_OK;
}

void tp_lora_free(tp_lora *lora)
{
    if (lora == NULL) return;
    for (size_t i = 0; i < lora->n_modules; i++)
        if (lora->modules[i].module->slot.terms == &lora->modules[i].term) lora->modules[i].module->slot = (tp_slot){0};
    tp_params_free(&lora->params);
    tp_free(lora->modules);
    tp_free(lora);
}
