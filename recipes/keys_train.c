/* Batches, learning rate, optimizer, guards. */
#include "recipes/keys.h"

#define AT(member)   offsetof(tp_config, train.member)
#define COUNT(array) (sizeof(array) / sizeof *(array))

static const char *const scheduler_words[] = {"cosine", "linear", "constant", NULL};
static const char *const optimizer_words[] = {"adamw",     "adamw_8bit",       "paged_adamw_32bit", "paged_adamw_8bit", "lion",
                                              "lion_8bit", "paged_lion_32bit", "paged_lion_8bit",   "adafactor",        "sgd",
                                              NULL};
static const char *const checkpointing_words[] = {"auto", "none", "full", "sqrt", "every_k", "offload", NULL};

static int optimizer_of(const void *config)
{
    return ((const tp_config *)config)->train.optimizer;
}
static bool is_adam(const void *c)
{
    return optimizer_of(c) <= TP_OPTIMIZER_PAGED_ADAMW_8BIT;
}
static bool has_betas(const void *c)
{
    return optimizer_of(c) <= TP_OPTIMIZER_PAGED_LION_8BIT;
}
static bool is_sgd(const void *c)
{
    return optimizer_of(c) == TP_OPTIMIZER_SGD;
}
static bool has_ratio(const void *c)
{
    return ((const tp_config *)c)->train.warmup_steps == TP_UNSET;
}

static bool takes_k(const void *c)
{
    return ((const tp_config *)c)->train.gradient_checkpointing == TP_CHECKPOINTING_EVERY_K;
}
static bool has_threshold(const void *c)
{
    return ((const tp_config *)c)->train.loss_watchdog_threshold > 0;
}

static const tp_when every_k = {"gradient_checkpointing every_k", "gradient_checkpointing", takes_k};
static const tp_when watchdog = {"recipes with loss_watchdog_threshold", "loss_watchdog_threshold", has_threshold};
static const tp_when adam = {"optimizer adamw and its variants", "optimizer", is_adam};
static const tp_when betas = {"optimizer adamw, lion and their variants", "optimizer", has_betas};
static const tp_when sgd = {"optimizer sgd", "optimizer", is_sgd};
static const tp_when no_steps = {"recipes without warmup_steps", "warmup_steps", has_ratio};

static const tp_field fields[] = {
    {.key = "micro_batch_size",
     .type = TP_FIELD_INT,
     .offset = AT(micro_batch_size),
     .otherwise = "1",
     .range = TP_RANGE(1, 4096),
     .help = "rows per device and pass",
     .aliases = (const tp_alias[]){{.name = "per_device_train_batch_size"}, {0}}},
    {.key = "gradient_accumulation_steps",
     .type = TP_FIELD_INT,
     .offset = AT(gradient_accumulation_steps),
     .otherwise = "1",
     .range = TP_RANGE(1, 65536),
     .help = "passes per step",
     .aliases = (const tp_alias[]){{.name = "grad_accumulation_steps"}, {0}}},
    {.key = "num_epochs",
     .type = TP_FIELD_FLOAT,
     .offset = AT(num_epochs),
     .otherwise = "1",
     .range = TP_ABOVE(0),
     .help = "passes over the data",
     .aliases = (const tp_alias[]){{.name = "num_train_epochs"}, {.name = "epochs"}, {0}}},
    {.key = "max_steps",
     .type = TP_FIELD_INT,
     .offset = AT(max_steps),
     .otherwise = "0",
     .range = TP_FROM(0),
     .help = "wins over `num_epochs` when set; 0: not set",
     .aliases = (const tp_alias[]){{.name = "iters"}, {0}}},
    {.key = "learning_rate",
     .type = TP_FIELD_FLOAT,
     .offset = AT(learning_rate),
     .range = TP_ABOVE_TO(0, 1),
     .default_note = "LoRA 2e-4, IA3 3e-3, virtual tokens 1e-2, full 1e-5",
     .help = "the highest of the schedule"},
    {.key = "lr_scheduler",
     .type = TP_FIELD_ENUM,
     .offset = AT(lr_scheduler),
     .otherwise = "cosine",
     .words = scheduler_words,
     .help = "after the warm-up",
     .aliases = (const tp_alias[]){{.name = "lr_scheduler_type"}, {0}}},
    {.key = "min_lr_ratio",
     .type = TP_FIELD_FLOAT,
     .offset = AT(min_lr_ratio),
     .otherwise = "0",
     .range = TP_FROM_BELOW(0, 1),
     .help = "part of the learning rate that is left at the end"},
    {.key = "warmup_ratio",
     .type = TP_FIELD_FLOAT,
     .offset = AT(warmup_ratio),
     .otherwise = "0.03",
     .range = TP_FROM_BELOW(0, 1),
     .when = &no_steps,
     .help = "part of the steps, rounded up"},
    {.key = "warmup_steps",
     .type = TP_FIELD_INT,
     .offset = AT(warmup_steps),
     .range = TP_FROM(0),
     .default_note = "by `warmup_ratio`",
     .help = "in place of the ratio, 0 too; fewer than all steps",
     .aliases = (const tp_alias[]){{.name = "num_warmup_steps"}, {0}}},
    {.key = "optimizer",
     .type = TP_FIELD_ENUM,
     .offset = AT(optimizer),
     .otherwise = "adamw",
     .words = optimizer_words,
     .help = "adamw and lion decay decoupled",
     .aliases = (const tp_alias[]){{.name = "optim", .from = "adamw_torch", .to = "adamw", .open = true},
                                   {.name = "optim", .from = "adamw_bnb_8bit", .to = "adamw_8bit"},
                                   {0}}},
    {.key = "weight_decay",
     .type = TP_FIELD_FLOAT,
     .offset = AT(weight_decay),
     .otherwise = "0",
     .range = TP_FROM_BELOW(0, 1),
     .help = "for sgd: L2"},
    {.key = "momentum",
     .type = TP_FIELD_FLOAT,
     .offset = AT(momentum),
     .otherwise = "0",
     .range = TP_FROM_BELOW(0, 1),
     .when = &sgd,
     .help = "of the gradient"},
    {.key = "adam_beta1",
     .type = TP_FIELD_FLOAT,
     .offset = AT(adam_beta1),
     .otherwise = "0.9",
     .range = TP_FROM_BELOW(0, 1),
     .when = &betas,
     .help = "decay of the first moment"},
    {.key = "adam_beta2",
     .type = TP_FIELD_FLOAT,
     .offset = AT(adam_beta2),
     .otherwise = "0.999",
     .range = TP_FROM_BELOW(0, 1),
     .when = &betas,
     .help = "decay of the second moment"},
    {.key = "adam_epsilon",
     .type = TP_FIELD_FLOAT,
     .offset = AT(adam_epsilon),
     .otherwise = "1e-8",
     .range = TP_ABOVE_TO(0, 1),
     .when = &adam,
     .help = "added to the root of the second moment"},
    {.key = "max_grad_norm",
     .type = TP_FIELD_FLOAT,
     .offset = AT(max_grad_norm),
     .otherwise = "1",
     .range = TP_FROM(0),
     .help = "global norm to clip at; 0: off",
     .aliases = (const tp_alias[]){{.name = "clip_grad_norm"}, {0}}},
    {.key = "gradient_checkpointing",
     .type = TP_FIELD_ENUM,
     .offset = AT(gradient_checkpointing),
     .otherwise = "auto",
     .words = checkpointing_words,
     .help = "activations to compute again; auto: none if they fit",
     .aliases = (const tp_alias[]){{.name = "grad_checkpoint", .from = "true", .to = "full"},
                                   {.name = "grad_checkpoint", .from = "false", .to = "none"},
                                   {.name = "enable_activation_checkpointing", .from = "true", .to = "full"},
                                   {.name = "enable_activation_checkpointing", .from = "false", .to = "none"},
                                   {.name = "disable_gradient_checkpointing", .from = "true", .to = "none"},
                                   {.name = "disable_gradient_checkpointing", .from = "false", .to = "auto"},
                                   {0}}},
    {.key = "gradient_checkpointing_k",
     .type = TP_FIELD_INT,
     .offset = AT(gradient_checkpointing_k),
     .otherwise = "2",
     .range = TP_RANGE(1, 256),
     .when = &every_k,
     .help = "k of `every_k`"},
    {.key = "activation_offloading",
     .type = TP_FIELD_BOOL,
     .offset = AT(activation_offloading),
     .otherwise = "false",
     .help = "keep activations in host memory",
     .aliases = (const tp_alias[]){{.name = "enable_activation_offloading"}, {0}}},
    {.key = "max_skipped_steps",
     .type = TP_FIELD_INT,
     .offset = AT(max_skipped_steps),
     .otherwise = "10",
     .range = TP_FROM(1),
     .help = "non-finite steps in a row that end the run with exit 5"},
    {.key = "loss_watchdog_threshold",
     .type = TP_FIELD_FLOAT,
     .offset = AT(loss_watchdog_threshold),
     .otherwise = "0",
     .range = TP_FROM(0),
     .help = "a loss above it, as often as the patience says, ends the run with exit 5; 0: off"},
    {.key = "loss_watchdog_patience",
     .type = TP_FIELD_INT,
     .offset = AT(loss_watchdog_patience),
     .otherwise = "3",
     .range = TP_FROM(1),
     .when = &watchdog,
     .help = "steps in a row"},
    {.key = "spike_zscore",
     .type = TP_FIELD_FLOAT,
     .offset = AT(spike_zscore),
     .otherwise = "0",
     .range = TP_FROM(0),
     .help = "skip steps whose loss is that many deviations off; 0: off"},
    {.key = "check_base_weights",
     .type = TP_FIELD_BOOL,
     .offset = AT(check_base_weights),
     .otherwise = "true",
     .help = "look for NaN in the base while loading"},
};

/* By the first adapter: what its method usually wants. */
static double default_learning_rate(const tp_config *c)
{
    if (c->run.adapters.n == 0) return 2e-4;
    switch (c->run.adapters.items[0]) {
    case TP_ADAPTER_IA3: return 3e-3;
    case TP_ADAPTER_PROMPT:
    case TP_ADAPTER_PREFIX:
    case TP_ADAPTER_P_TUNING: return 1e-2;
    case TP_ADAPTER_FULL: return 1e-5;
    default: return 2e-4;
    }
}

static void settle(const tp_recipe *recipe, void *config)
{
    tp_config *c = config;
    (void)recipe;
    if (!(c->train.learning_rate > 0)) c->train.learning_rate = default_learning_rate(c);
}

static tp_status check(tp_check *chk, const void *config)
{
    const tp_train_config *t = &((const tp_config *)config)->train;
    if (t->max_steps > 0 && t->warmup_steps >= t->max_steps)
        return tp_check_problem(chk, "warmup_steps", "%lld of %lld steps: expected fewer than max_steps",
                                (long long)t->warmup_steps, (long long)t->max_steps);
    return TP_OK;
}

const tp_section tp_train_section = {
    .title = "Training",
    .fields = fields,
    .n_fields = COUNT(fields),
    .settle = settle,
    .check = check,
};
