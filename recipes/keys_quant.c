/* A base that is quantized while it is loaded.
 *
 * It is quantized if the recipe says so in one of four ways: adapter qlora, load_in_4bit, load_in_8bit, or quant.type.
 * The other keys of the block describe how, and mean nothing without one of these. */
#include "recipes/keys.h"

#define AT(member)   offsetof(tp_config, quant.member)
#define COUNT(array) (sizeof(array) / sizeof *(array))

static const char *const type_words[] = {"nf4", "fp4", "int4", "int8", NULL};
static const char *const compute_words[] = {"precision", "bf16", "fp16", "fp32", NULL};

static bool is_quantized(const void *config)
{
    return ((const tp_config *)config)->quant.bits != 0;
}
static const tp_when quantized = {"a base quantized by quant.type, load_in_4bit, load_in_8bit or adapter qlora", "quant.type",
                                  is_quantized};

static const tp_field fields[] = {
    {.key = "load_in_4bit",
     .type = TP_FIELD_BOOL,
     .offset = AT(load_in_4bit),
     .otherwise = "false",
     .help = "quantize the base to 4 bits while loading",
     .aliases = (const tp_alias[]){{.name = "quantization_bit", .from = "4", .to = "true"}, {0}}},
    {.key = "load_in_8bit",
     .type = TP_FIELD_BOOL,
     .offset = AT(load_in_8bit),
     .otherwise = "false",
     .help = "quantize the base to LLM.int8 while loading",
     .aliases = (const tp_alias[]){{.name = "quantization_bit", .from = "8", .to = "true"}, {0}}},
    {.key = "quant.type",
     .type = TP_FIELD_ENUM,
     .offset = AT(type),
     .otherwise = "nf4",
     .words = type_words,
     .when = &quantized,
     .help = "the code; given alone, it quantizes too",
     .aliases =
         (const tp_alias[]){{.name = "quantization"}, {.name = "bnb_4bit_quant_type"}, {.name = "quantization_type"}, {0}}},
    {.key = "quant.block",
     .type = TP_FIELD_INT,
     .offset = AT(block),
     .otherwise = "64",
     .range = TP_RANGE(32, 4096),
     .when = &quantized,
     .help = "values per absmax, a power of two"},
    {.key = "quant.double",
     .type = TP_FIELD_BOOL,
     .offset = AT(double_quant),
     .otherwise = "true",
     .when = &quantized,
     .help = "quantize the absmax too",
     .aliases =
         (const tp_alias[]){
             {.name = "bnb_4bit_use_double_quant"}, {.name = "use_bnb_nested_quant"}, {.name = "double_quantization"}, {0}}},
    {.key = "quant.compute",
     .type = TP_FIELD_ENUM,
     .offset = AT(compute),
     .otherwise = "precision",
     .words = compute_words,
     .when = &quantized,
     .help = "type of the products; `precision`: as that key says",
     .aliases = (const tp_alias[]){{.name = "bnb_4bit_compute_dtype", .from = "bfloat16", .to = "bf16", .open = true},
                                   {.name = "bnb_4bit_compute_dtype", .from = "float16", .to = "fp16"},
                                   {.name = "bnb_4bit_compute_dtype", .from = "float32", .to = "fp32"},
                                   {0}}},
    {.key = "quant.skip_modules",
     .type = TP_FIELD_STRINGS,
     .offset = AT(skip_modules),
     .otherwise = "[lm_head]",
     .when = &quantized,
     .help = "modules that stay as loaded",
     .aliases = (const tp_alias[]){{.name = "llm_int8_skip_modules"}, {0}}},
    {.key = "quant.outlier_threshold",
     .type = TP_FIELD_FLOAT,
     .offset = AT(outlier_threshold),
     .otherwise = "6",
     .range = TP_FROM(0),
     .when = &quantized,
     .help = "columns of LLM.int8 with larger inputs stay in the compute type",
     .aliases = (const tp_alias[]){{.name = "llm_int8_threshold"}, {0}}},
};

static void settle(const tp_recipe *recipe, void *config)
{
    tp_config *c = config;
    tp_quant_config *q = &c->quant;
    bool type_given = tp_recipe_given(recipe, "quant.type");
    if (tp_config_has_adapter(c, TP_ADAPTER_QLORA) && !tp_recipe_given(recipe, "load_in_4bit")) q->load_in_4bit = true;
    if (q->load_in_8bit && !type_given) q->type = TP_QUANT_TYPE_INT8;
    if (q->load_in_4bit || q->load_in_8bit || type_given) q->bits = q->type == TP_QUANT_TYPE_INT8 ? 8 : 4;
}

static tp_status check(tp_check *chk, const void *config)
{
    const tp_config *c = config;
    const tp_quant_config *q = &c->quant;
    if ((q->block & (q->block - 1)) != 0) TP_TRY(tp_check_problem(chk, "quant.block", "%d is no power of two", (int)q->block));
    if (tp_config_has_adapter(c, TP_ADAPTER_QLORA) && !q->load_in_4bit)
        return tp_check_problem(chk, "load_in_4bit", "adapter qlora loads in 4 bits");
    if (q->load_in_4bit && q->load_in_8bit) return tp_check_problem(chk, "load_in_8bit", "load_in_4bit is set too; choose one");
    if (q->load_in_4bit && q->type == TP_QUANT_TYPE_INT8)
        return tp_check_problem(chk, "quant.type", "int8 contradicts load_in_4bit");
    if (q->load_in_8bit && q->type != TP_QUANT_TYPE_INT8)
        return tp_check_problem(chk, "quant.type", "%s contradicts load_in_8bit", type_words[q->type]);
    return TP_OK;
}

const tp_section tp_quant_section = {
    .title = "Quantized base",
    .note = "A base that is stored quantized (a bitsandbytes folder, GGUF) is used as it is; a `quant` block is then an error.",
    .fields = fields,
    .n_fields = COUNT(fields),
    .settle = settle,
    .check = check,
};
