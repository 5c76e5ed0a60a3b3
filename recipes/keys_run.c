/* What is trained, where, and in which precision. */
#include <string.h>

#include "recipes/keys.h"

#define AT(member)   offsetof(tp_config, run.member)
#define COUNT(array) (sizeof(array) / sizeof *(array))

static const char *const adapter_words[] = {"lora",   "qlora",    "dora", "ia3",  "prompt",
                                            "prefix", "p_tuning", "full", "none", NULL};
static const char *const objective_words[] = {"sft", "dpo", "orpo", "kto", "distill", "classify", NULL};
static const char *const precision_words[] = {"auto", "bf16", "fp16", "fp32", "tf32", NULL};

static const tp_alias precision_aliases[] = {
    {.name = "bf16", .from = "true", .to = "bf16"},
    {.name = "bf16", .from = "auto", .to = "auto"},
    {.name = "fp16", .from = "true", .to = "fp16"},
    {.name = "dtype", .from = "bfloat16", .to = "bf16", .open = true},
    {.name = "dtype", .from = "float16", .to = "fp16"},
    {.name = "dtype", .from = "float32", .to = "fp32"},
    {.name = "torch_dtype", .from = "bfloat16", .to = "bf16", .open = true},
    {.name = "torch_dtype", .from = "float16", .to = "fp16"},
    {.name = "torch_dtype", .from = "float32", .to = "fp32"},
    {0},
};

static const tp_field fields[] = {
    {.key = "base_model",
     .type = TP_FIELD_INPUT,
     .offset = AT(base_model),
     .required = true,
     .help = "model folder or `.gguf` file",
     .aliases = (const tp_alias[]){{.name = "model_name_or_path"}, {.name = "model"}, {0}}},
    {.key = "tokenizer",
     .type = TP_FIELD_INPUT,
     .offset = AT(tokenizer),
     .default_note = "`base_model`",
     .help = "folder or `tokenizer.json`"},
    {.key = "adapter",
     .type = TP_FIELD_ENUMS,
     .offset = AT(adapters),
     .otherwise = "lora",
     .words = adapter_words,
     .help = "the method, or several; `full` trains the named modules themselves, `none` is for eval, generate and serve",
     .aliases = (const tp_alias[]){{.name = "finetuning_type"}, {.name = "fine_tune_type"}, {0}}},
    {.key = "adapter_path",
     .type = TP_FIELD_INPUT,
     .offset = AT(adapter_path),
     .help = "adapter to continue; its settings apply, and keys given beside it must agree",
     .aliases =
         (const tp_alias[]){
             {.name = "lora_model_dir"}, {.name = "adapter_name_or_path"}, {.name = "resume_adapter_file"}, {0}}},
    {.key = "objective",
     .type = TP_FIELD_ENUM,
     .offset = AT(objective),
     .otherwise = "sft",
     .words = objective_words,
     .help = "the loss",
     .aliases = (const tp_alias[]){{.name = "stage"}, {.name = "rl"}, {0}}},
    {.key = "device",
     .type = TP_FIELD_STRING,
     .offset = AT(device),
     .otherwise = "auto",
     .help = "`auto`, `cpu`, `cuda` or `cuda:N`; auto: CUDA if it opens, else the CPU with a note"},
    {.key = "precision",
     .type = TP_FIELD_ENUM,
     .offset = AT(precision),
     .otherwise = "auto",
     .words = precision_words,
     .help = "of base products and activations; auto: bf16 on GPUs and on CPUs where it is faster, else fp32; fp16: on GPUs, "
             "with a dynamic loss scale",
     .aliases = precision_aliases},
    {.key = "seed",
     .type = TP_FIELD_INT,
     .offset = AT(seed),
     .otherwise = "42",
     .range = TP_FROM(0),
     .help = "of all randomness"},
    {.key = "threads",
     .type = TP_FIELD_INT,
     .offset = AT(threads),
     .otherwise = "0",
     .range = TP_RANGE(0, 65536),
     .help = "0: all cores"},
    {.key = "deterministic",
     .type = TP_FIELD_BOOL,
     .offset = AT(deterministic),
     .otherwise = "true",
     .help =
         "false: a GPU may add up gradients in an order left to chance where that is faster (attention's, by cuDNN); runs then "
         "differ in the last bits; no effect on the CPU"},
    {.key = "memory_limit",
     .type = TP_FIELD_SIZE,
     .offset = AT(memory_limit),
     .otherwise = "auto",
     .help = "what the memory plan may use"},
    {.key = "devices",
     .type = TP_FIELD_INT,
     .offset = AT(devices),
     .otherwise = "1",
     .range = TP_RANGE(1, 65536),
     .help = "of a parallel run"},
    {.key = "zero_stage",
     .type = TP_FIELD_INT,
     .offset = AT(zero_stage),
     .otherwise = "0",
     .range = TP_RANGE(0, 3),
     .help = "what the devices of a parallel run divide between them"},
    {.key = "tensor_parallel_size",
     .type = TP_FIELD_INT,
     .offset = AT(tensor_parallel_size),
     .otherwise = "1",
     .range = TP_RANGE(1, 65536),
     .help = "devices that share a matrix"},
    {.key = "context_parallel_size",
     .type = TP_FIELD_INT,
     .offset = AT(context_parallel_size),
     .otherwise = "1",
     .range = TP_RANGE(1, 65536),
     .help = "devices that share a row of tokens"},
};

static bool is_device(const char *device)
{
    if (strcmp(device, "auto") == 0 || strcmp(device, "cpu") == 0 || strcmp(device, "cuda") == 0) return true;
    const char *number = device + 5;
    if (strncmp(device, "cuda:", 5) != 0) return false;
    size_t n = strspn(number, "0123456789");
    return n > 0 && n <= 3 && number[n] == '\0';
}

static tp_status check_adapters(tp_check *check, const tp_config *c)
{
    bool seen[sizeof adapter_words / sizeof *adapter_words] = {false};
    const tp_ints *list = &c->run.adapters;
    for (size_t i = 0; i < list->n; i++) {
        if (seen[list->items[i]])
            TP_TRY(tp_check_problem(check, "adapter", "%s stands in the list twice", adapter_words[list->items[i]]));
        seen[list->items[i]] = true;
    }
    if (list->n > 1 && seen[TP_ADAPTER_NONE]) return tp_check_problem(check, "adapter", "none stands alone");
    return TP_OK;
}

static tp_status check(tp_check *chk, const void *config)
{
    const tp_config *c = config;
    TP_TRY(check_adapters(chk, c));
    if (!is_device(c->run.device))
        return tp_check_problem(chk, "device", "expected auto, cpu, cuda or cuda:N, got \"%.60s\"", c->run.device);
    return TP_OK;
}

static void settle(const tp_recipe *recipe, void *config)
{
    tp_config *c = config;
    (void)recipe;
    if (c->run.tokenizer == NULL) c->run.tokenizer = c->run.base_model;
}

const tp_section tp_run_section = {
    .title = "Run",
    .note = "Adapter, gradients, loss and moments are fp32. `qlora` is `lora` with `load_in_4bit`, `dora` is `lora` with "
            "`use_dora`.",
    .fields = fields,
    .n_fields = COUNT(fields),
    .settle = settle,
    .check = check,
};
