/* Preferences, classification, distillation. */
#include "recipes/keys.h"

#define AT(member)   offsetof(tp_config, objective.member)
#define IN(member)   offsetof(tp_kd_feature_config, member)
#define COUNT(array) (sizeof(array) / sizeof *(array))

static const char *const dpo_words[] = {"sigmoid", "ipo", "hinge", "robust", "simpo", NULL};
static const char *const divergence_words[] = {"forward_kl", "reverse_kl", "jsd", NULL};
static const char *const feature_words[] = {"mse", "cosine", "relational", NULL};
static const char *const teacher_words[] = {"base", NULL};

static int objective_of(const void *config)
{
    return ((const tp_config *)config)->run.objective;
}
static bool is_dpo(const void *c)
{
    return objective_of(c) == TP_OBJECTIVE_DPO;
}
static bool has_reference(const void *c)
{
    return is_dpo(c) || objective_of(c) == TP_OBJECTIVE_KTO;
}
static bool has_beta(const void *c)
{
    return has_reference(c) || objective_of(c) == TP_OBJECTIVE_ORPO;
}
static bool is_classify(const void *c)
{
    return objective_of(c) == TP_OBJECTIVE_CLASSIFY;
}
static bool is_distill(const void *c)
{
    return objective_of(c) == TP_OBJECTIVE_DISTILL;
}
static bool has_live_teacher(const void *c)
{
    return is_distill(c) && ((const tp_config *)c)->objective.teacher_model != NULL;
}

static const tp_when dpo = {"objective dpo", "objective", is_dpo};
static const tp_when reference = {"objective dpo or kto", "objective", has_reference};
static const tp_when beta = {"objective dpo, orpo or kto", "objective", has_beta};
static const tp_when classify = {"objective classify", "objective", is_classify};
static const tp_when distill = {"objective distill", "objective", is_distill};
static const tp_when live_teacher = {"objective distill with teacher.model", "objective", has_live_teacher};

static const tp_field feature_fields[] = {
    {.key = "student_layer",
     .type = TP_FIELD_INT,
     .offset = IN(student_layer),
     .range = TP_RANGE(0, 4096),
     .required = true,
     .help = "0 is the input of the first layer"},
    {.key = "teacher_layer",
     .type = TP_FIELD_INT,
     .offset = IN(teacher_layer),
     .range = TP_RANGE(0, 4096),
     .required = true,
     .help = "the layer it is compared with"},
    {.key = "loss",
     .type = TP_FIELD_ENUM,
     .offset = IN(loss),
     .otherwise = "mse",
     .words = feature_words,
     .help = "how they are compared"},
    {.key = "weight",
     .type = TP_FIELD_FLOAT,
     .offset = IN(weight),
     .otherwise = "1",
     .range = TP_FROM(0),
     .help = "of this term in the loss"},
};

static const tp_section feature_section = {
    .title = "Feature",
    .fields = feature_fields,
    .n_fields = COUNT(feature_fields),
    .item_bytes = sizeof(tp_kd_feature_config),
};

static const tp_field fields[] = {
    {.key = "beta",
     .type = TP_FIELD_FLOAT,
     .offset = AT(beta),
     .otherwise = "0.1",
     .range = TP_ABOVE(0),
     .when = &beta,
     .help = "weight of the preference",
     .aliases = (const tp_alias[]){{.name = "rl_beta"}, {.name = "pref_beta"}, {0}}},
    {.key = "dpo_loss",
     .type = TP_FIELD_ENUM,
     .offset = AT(dpo_loss),
     .otherwise = "sigmoid",
     .words = dpo_words,
     .when = &dpo,
     .help = "form of the loss; the reference is the base with the adapter off",
     .aliases = (const tp_alias[]){{.name = "pref_loss"}, {0}}},
    {.key = "precompute_reference",
     .type = TP_FIELD_BOOL,
     .offset = AT(precompute_reference),
     .otherwise = "true",
     .when = &reference,
     .help = "log-probabilities of the reference once, before training"},
    {.key = "num_labels",
     .type = TP_FIELD_INT,
     .offset = AT(num_labels),
     .range = TP_RANGE(2, 4194304),
     .default_note = "from the data",
     .when = &classify,
     .help = "classes"},
    {.key = "teacher.model",
     .type = TP_FIELD_INPUT,
     .offset = AT(teacher_model),
     .words = teacher_words,
     .when = &distill,
     .help = "live teacher; `base`: the base with the adapter off",
     .aliases = (const tp_alias[]){{.name = "teacher_model_name_or_path"}, {0}}},
    {.key = "teacher.adapter",
     .type = TP_FIELD_INPUT,
     .offset = AT(teacher_adapter),
     .when = &live_teacher,
     .help = "adapter of the teacher"},
    {.key = "teacher.load_in_4bit",
     .type = TP_FIELD_BOOL,
     .offset = AT(teacher_load_in_4bit),
     .otherwise = "false",
     .when = &live_teacher,
     .help = "quantize the teacher while loading"},
    {.key = "teacher.logits",
     .type = TP_FIELD_INPUT,
     .offset = AT(teacher_logits),
     .when = &distill,
     .help = "folder of stored logits, in place of a model"},
    {.key = "teacher.top_k",
     .type = TP_FIELD_INT,
     .offset = AT(teacher_top_k),
     .otherwise = "64",
     .range = TP_RANGE(0, 4096),
     .when = &distill,
     .help = "logits kept per token, the rest as one mass; 0: all",
     .aliases = (const tp_alias[]){{.name = "loss_top_k"}, {0}}},
    {.key = "kd_alpha",
     .type = TP_FIELD_FLOAT,
     .offset = AT(kd_alpha),
     .otherwise = "0.5",
     .range = TP_RANGE(0, 1),
     .when = &distill,
     .help = "loss = (1 − a)·CE + a·T²·KD",
     .aliases = (const tp_alias[]){{.name = "kd_ratio"}, {0}}},
    {.key = "kd_temperature",
     .type = TP_FIELD_FLOAT,
     .offset = AT(kd_temperature),
     .otherwise = "1",
     .range = TP_RANGE(0.05, 100),
     .when = &distill,
     .help = "T of that formula"},
    {.key = "kd_divergence",
     .type = TP_FIELD_ENUM,
     .offset = AT(kd_divergence),
     .otherwise = "forward_kl",
     .words = divergence_words,
     .when = &distill,
     .help = "KD of that formula"},
    {.key = "kd_features",
     .type = TP_FIELD_BLOCKS,
     .offset = AT(kd_features),
     .otherwise = "[]",
     .block = &feature_section,
     .when = &distill,
     .help = "hidden states to bring together"},
    {.key = "kd_on_policy",
     .type = TP_FIELD_FLOAT,
     .offset = AT(kd_on_policy),
     .otherwise = "0",
     .range = TP_RANGE(0, 1),
     .when = &live_teacher,
     .help = "part of the batches that the student writes itself",
     .aliases = (const tp_alias[]){{.name = "lmbda"}, {0}}},
};

static tp_status check(tp_check *chk, const void *config)
{
    const tp_objective_config *o = &((const tp_config *)config)->objective;
    if (!is_distill(config)) return TP_OK;
    if (o->teacher_model == NULL && o->teacher_logits == NULL)
        return tp_check_problem(chk, "objective", "distill needs teacher.model or teacher.logits");
    if (o->teacher_model != NULL && o->teacher_logits != NULL)
        return tp_check_problem(chk, "teacher.logits", "teacher.model is set too; choose one");
    return TP_OK;
}

const tp_section tp_objective_section = {
    .title = "Objectives",
    .fields = fields,
    .n_fields = COUNT(fields),
    .check = check,
};
