/* What the adapter of a run is: as the recipe says, or as the adapter that it starts from does, with which the recipe has to
 * agree. */
#include <string.h>

#include "base/mem.h"
#include "trainers/run.h"

static tp_names names_of(const tp_patterns *patterns)
{
    if (patterns->kind == TP_PATTERNS_REGEX) return (tp_names){true, &patterns->text, 1};
    return (tp_names){false, patterns->list.items, patterns->list.n};
}

static tp_status spec_from_recipe(tp_run *run, const tp_model *model, tp_lora_spec *spec)
{
    const tp_lora_config *c = &run->config->lora;
    size_t n = c->rank_pattern.n + c->alpha_pattern.n;
    if (run->patterns == NULL) run->patterns = tp_alloc(run->ctx, n, sizeof *run->patterns);
    if (run->patterns == NULL) return TP_NOMEM;
    for (size_t i = 0; i < c->rank_pattern.n; i++)
        run->patterns[i] = (tp_pattern){c->rank_pattern.items[i].name, c->rank_pattern.items[i].value};
    for (size_t i = 0; i < c->alpha_pattern.n; i++)
        run->patterns[c->rank_pattern.n + i] = (tp_pattern){c->alpha_pattern.items[i].name, c->alpha_pattern.items[i].value};
    *spec = (tp_lora_spec){.rank = c->rank,
                           .alpha = c->alpha,
                           .dropout = c->dropout,
                           .use_rslora = c->use_rslora,
                           .gaussian = c->init == TP_LORA_INIT_GAUSSIAN,
                           .rank_pattern = run->patterns,
                           .n_rank_pattern = c->rank_pattern.n,
                           .alpha_pattern = run->patterns + c->rank_pattern.n,
                           .n_alpha_pattern = c->alpha_pattern.n};
    tp_targets *t = &spec->targets;
    t->all_linear = c->target_modules.kind == TP_PATTERNS_WORD && strcmp(c->target_modules.text, "all-linear") == 0;
    if (c->target_modules.kind == TP_PATTERNS_WORD && !t->all_linear) {
        t->include.list = tp_model_default_targets(model);
        while (t->include.list[t->include.n] != NULL) t->include.n++;
    } else if (!t->all_linear) {
        t->include = names_of(&c->target_modules);
    }
    t->exclude = names_of(&c->exclude_modules);
    t->layers = c->layers.items;
    t->n_layers = c->layers.n;
    return TP_OK;
}

/* A recipe key beside adapter_path must agree with the adapter's own configuration. */
static tp_status disagrees(tp_run *run, const char *key, double ours, double theirs)
{
    char where[512];
    if (!tp_recipe_given(run->recipe, key) || ours == theirs) return TP_OK;
    return tp_fail(run->ctx, TP_INVALID, "%s: %s: the recipe says %g, the adapter it starts from %g",
                   tp_recipe_where(run->recipe, key, where, sizeof where), key, ours, theirs);
}

static bool same_names(const tp_names *a, const tp_names *b)
{
    if (a->is_regex != b->is_regex || a->n != b->n) return false;
    for (size_t i = 0; i < a->n; i++) {
        bool found = false;
        for (size_t j = 0; j < b->n && !found; j++) found = strcmp(a->list[i], b->list[j]) == 0;
        if (!found) return false;
    }
    return true;
}

static bool same_layers(const tp_targets *a, const tp_targets *b)
{
    if (a->n_layers != b->n_layers) return false;
    for (size_t i = 0; i < a->n_layers; i++) {
        bool found = false;
        for (size_t j = 0; j < b->n_layers && !found; j++) found = a->layers[i] == b->layers[j];
        if (!found) return false;
    }
    return true;
}

static bool same_patterns(const tp_pattern *a, size_t n_a, const tp_pattern *b, size_t n_b)
{
    if (n_a != n_b) return false;
    for (size_t i = 0; i < n_a; i++) {
        bool found = false;
        for (size_t j = 0; j < n_b && !found; j++) found = strcmp(a[i].key, b[j].key) == 0 && a[i].value == b[j].value;
        if (!found) return false;
    }
    return true;
}

/* The same for keys that are more than a number. */
static tp_status check_targets(tp_run *run, const tp_lora_spec *ours, const tp_lora_spec *theirs)
{
    const struct {
        const char *key;
        bool agrees;
    } keys[] = {
        {"lora_target_modules", ours->targets.all_linear || same_names(&ours->targets.include, &theirs->targets.include)},
        {"lora_exclude_modules", same_names(&ours->targets.exclude, &theirs->targets.exclude)},
        {"layers_to_transform", same_layers(&ours->targets, &theirs->targets)},
        {"rank_pattern", same_patterns(ours->rank_pattern, ours->n_rank_pattern, theirs->rank_pattern, theirs->n_rank_pattern)},
        {"alpha_pattern",
         same_patterns(ours->alpha_pattern, ours->n_alpha_pattern, theirs->alpha_pattern, theirs->n_alpha_pattern)},
        {"init_lora_weights", false},
    };
    char where[512];
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        if (!keys[i].agrees && tp_recipe_given(run->recipe, keys[i].key))
            return tp_fail(run->ctx, TP_INVALID, "%s: %s: the adapter it starts from has its own, which is another",
                           tp_recipe_where(run->recipe, keys[i].key, where, sizeof where), keys[i].key);
    return TP_OK;
}

static tp_status spec_from_adapter(tp_run *run, const tp_model *model, tp_lora_spec *spec)
{
    const tp_lora_config *c = &run->config->lora;
    tp_lora_spec wanted;
    TP_TRY(spec_from_recipe(run, model, &wanted));
    *spec = run->start.spec;
    TP_TRY(disagrees(run, "lora_r", (double)c->rank, (double)spec->rank));
    TP_TRY(disagrees(run, "lora_alpha", c->alpha, spec->alpha));
    TP_TRY(disagrees(run, "use_rslora", c->use_rslora, spec->use_rslora));
    if (tp_recipe_given(run->recipe, "lora_dropout")) spec->dropout = c->dropout; /* a matter of training, not of the tensors */
    return check_targets(run, &wanted, spec);
}

tp_status tp_run_lora_spec(tp_run *run, const tp_model *model, tp_lora_spec *spec)
{
    bool continues = run->config->run.adapter_path != NULL;
    return continues ? spec_from_adapter(run, model, spec) : spec_from_recipe(run, model, spec);
}
