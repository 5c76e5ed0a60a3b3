/* Every key of a recipe: the config structs that the program reads, and the tables that fill them.
 *
 * The tables stand together here, one file a section, and not in the folders that use the values: a
 * recipe is checked as a whole, names of other tools, conditions and rules cross sections, and the
 * reference and the written-out recipe come from all of them in one order. The folders above read
 * plain structs and need to know nothing of YAML.
 *
 * Strings, lists and blocks belong to the recipe that was loaded. Fields named after a word of a fixed
 * list are int and hold the enum beside them. Integers without default are TP_UNSET (-1) where the
 * recipe does not set them, strings NULL. */
#ifndef TP_RECIPES_KEYS_H
#define TP_RECIPES_KEYS_H

#include <stdbool.h>
#include <stdint.h>

#include "recipes/recipe.h"
#include "recipes/schema.h"

#define TP_LIMIT_RANK           1024
#define TP_LIMIT_VIRTUAL_TOKENS 1024

/* ---- run ---- */
typedef enum tp_adapter_kind {
    TP_ADAPTER_LORA,
    TP_ADAPTER_QLORA,
    TP_ADAPTER_DORA,
    TP_ADAPTER_IA3,
    TP_ADAPTER_PROMPT,
    TP_ADAPTER_PREFIX,
    TP_ADAPTER_P_TUNING,
    TP_ADAPTER_FULL,
    TP_ADAPTER_NONE
} tp_adapter_kind;

typedef enum tp_objective_kind {
    TP_OBJECTIVE_SFT,
    TP_OBJECTIVE_DPO,
    TP_OBJECTIVE_ORPO,
    TP_OBJECTIVE_KTO,
    TP_OBJECTIVE_DISTILL,
    TP_OBJECTIVE_CLASSIFY
} tp_objective_kind;

typedef enum tp_precision {
    TP_PRECISION_AUTO,
    TP_PRECISION_BF16,
    TP_PRECISION_FP16,
    TP_PRECISION_FP32,
    TP_PRECISION_TF32
} tp_precision;

typedef struct tp_run_config {
    const char *base_model;
    const char *tokenizer; /* base_model, if the recipe names none */
    tp_ints adapters;      /* tp_adapter_kind, at least one, each once */
    const char *adapter_path;
    int objective;         /* tp_objective_kind */
    const char *device;    /* "auto", "cpu", "cuda" or "cuda:N" */
    int precision;         /* tp_precision */
    int64_t seed, threads; /* threads 0: all cores */
    bool deterministic;    /* sums in fixed orders only */
    uint64_t memory_limit; /* bytes; 0: auto */
    int64_t devices, zero_stage, tensor_parallel_size, context_parallel_size;
} tp_run_config;

/* ---- LoRA ---- */
typedef enum tp_lora_init {
    TP_LORA_INIT_TRUE,
    TP_LORA_INIT_GAUSSIAN,
    TP_LORA_INIT_PISSA,
    TP_LORA_INIT_OLORA,
    TP_LORA_INIT_LOFTQ,
    TP_LORA_INIT_EVA
} tp_lora_init;
typedef enum tp_lora_bias { TP_LORA_BIAS_NONE, TP_LORA_BIAS_ALL, TP_LORA_BIAS_LORA_ONLY } tp_lora_bias;

typedef struct tp_lora_config {
    int64_t rank;
    double alpha; /* settled: 2 * rank, if the recipe does not set it */
    double dropout;
    tp_patterns target_modules, exclude_modules;
    tp_ints layers; /* empty: all; ascending */
    tp_number_map rank_pattern, alpha_pattern;
    bool use_dora, use_rslora;
    double lr_ratio; /* learning rate of B / that of A */
    int init;        /* tp_lora_init */
    int bias;        /* tp_lora_bias */
    bool lora_bias;
    tp_strings modules_to_save;
    tp_token_list trainable_tokens;
} tp_lora_config;

/* ---- IA3 and virtual tokens ---- */
typedef enum tp_prompt_init { TP_PROMPT_INIT_RANDOM, TP_PROMPT_INIT_TEXT, TP_PROMPT_INIT_SAMPLE_VOCAB } tp_prompt_init;
typedef enum tp_encoder_type { TP_ENCODER_MLP, TP_ENCODER_LSTM } tp_encoder_type;
typedef enum tp_virtual_position { TP_VIRTUAL_FRONT, TP_VIRTUAL_MARKER } tp_virtual_position;

typedef struct tp_virtual_config {
    tp_patterns ia3_target_modules, ia3_feedforward_modules; /* unset: the family's */
    int64_t n_tokens;
    int prompt_init; /* tp_prompt_init */
    const char *prompt_init_text;
    bool prefix_projection;
    int encoder_type;       /* tp_encoder_type */
    int64_t encoder_hidden; /* unset: the model's hidden size */
    int64_t encoder_layers;
    double encoder_dropout;
    int position; /* tp_virtual_position */
} tp_virtual_config;

/* ---- quantized base ---- */
typedef enum tp_quant_type { TP_QUANT_TYPE_NF4, TP_QUANT_TYPE_FP4, TP_QUANT_TYPE_INT4, TP_QUANT_TYPE_INT8 } tp_quant_type;
typedef enum tp_quant_compute {
    TP_QUANT_COMPUTE_PRECISION,
    TP_QUANT_COMPUTE_BF16,
    TP_QUANT_COMPUTE_FP16,
    TP_QUANT_COMPUTE_FP32
} tp_quant_compute;

typedef struct tp_quant_config {
    bool load_in_4bit, load_in_8bit;
    int bits; /* settled: 0 (loaded as stored), 4 or 8 */
    int type; /* tp_quant_type */
    int64_t block;
    bool double_quant;
    int compute; /* tp_quant_compute */
    tp_strings skip_modules;
    double outlier_threshold;
} tp_quant_config;

/* ---- data ---- */
typedef enum tp_dataset_type {
    TP_DATASET_AUTO,
    TP_DATASET_COMPLETION,
    TP_DATASET_INSTRUCTION,
    TP_DATASET_CHAT,
    TP_DATASET_PREFERENCE,
    TP_DATASET_KTO,
    TP_DATASET_CLASSIFY,
    TP_DATASET_TOKENS
} tp_dataset_type;

typedef struct tp_dataset_config {
    const char *path;
    const char *split;
    int type;              /* tp_dataset_type */
    tp_string_map columns; /* ours: theirs */
    const char *system;
    double weight;
    int64_t limit; /* unset: all rows */
} tp_dataset_config;

typedef struct tp_datasets { /* what a list of blocks is stored as */
    const tp_dataset_config *items;
    size_t n;
} tp_datasets;

typedef enum tp_train_turns { TP_TURNS_ALL, TP_TURNS_LAST } tp_train_turns;
typedef enum tp_excess_strategy { TP_EXCESS_DROP, TP_EXCESS_TRUNCATE, TP_EXCESS_SPLIT, TP_EXCESS_RAISE } tp_excess_strategy;
typedef enum tp_bad_row { TP_BAD_ROW_ERROR, TP_BAD_ROW_SKIP } tp_bad_row;

typedef struct tp_data_config {
    tp_datasets datasets, test_datasets;
    tp_share val_set_size;
    const char *chat_template; /* "tokenizer_default", "chatml", "alpaca", "none", or a path */
    int64_t max_seq_length;    /* unset: min(2048, the model's) */
    bool packing, train_on_inputs;
    int train_on_turns; /* tp_train_turns */
    int excess_length;  /* tp_excess_strategy */
    double max_dropped;
    int on_bad_row; /* tp_bad_row */
    bool shuffle, group_by_length;
    const char *cache_dir;
    double neftune_noise_alpha, label_smoothing;
} tp_data_config;

/* ---- objectives ---- */
typedef enum tp_dpo_loss { TP_DPO_SIGMOID, TP_DPO_IPO, TP_DPO_HINGE, TP_DPO_ROBUST, TP_DPO_SIMPO } tp_dpo_loss;
typedef enum tp_kd_divergence { TP_KD_FORWARD_KL, TP_KD_REVERSE_KL, TP_KD_JSD } tp_kd_divergence;
typedef enum tp_kd_feature_loss { TP_KD_MSE, TP_KD_COSINE, TP_KD_RELATIONAL } tp_kd_feature_loss;

typedef struct tp_kd_feature_config {
    int64_t student_layer, teacher_layer;
    int loss; /* tp_kd_feature_loss */
    double weight;
} tp_kd_feature_config;

typedef struct tp_kd_features {
    const tp_kd_feature_config *items;
    size_t n;
} tp_kd_features;

typedef struct tp_objective_config {
    double beta;
    int dpo_loss; /* tp_dpo_loss */
    bool precompute_reference;
    int64_t num_labels;        /* unset: from the data */
    const char *teacher_model; /* a path, or "base": the base with the adapter off */
    const char *teacher_adapter;
    bool teacher_load_in_4bit;
    const char *teacher_logits;
    int64_t teacher_top_k; /* 0: all */
    double kd_alpha, kd_temperature;
    int kd_divergence; /* tp_kd_divergence */
    tp_kd_features kd_features;
    double kd_on_policy;
} tp_objective_config;

/* ---- training ---- */
typedef enum tp_lr_scheduler { TP_LR_COSINE, TP_LR_LINEAR, TP_LR_CONSTANT } tp_lr_scheduler;
typedef enum tp_optimizer_kind {
    TP_OPTIMIZER_ADAMW,
    TP_OPTIMIZER_ADAMW_8BIT,
    TP_OPTIMIZER_PAGED_ADAMW_32BIT,
    TP_OPTIMIZER_PAGED_ADAMW_8BIT,
    TP_OPTIMIZER_LION,
    TP_OPTIMIZER_LION_8BIT,
    TP_OPTIMIZER_PAGED_LION_32BIT,
    TP_OPTIMIZER_PAGED_LION_8BIT,
    TP_OPTIMIZER_ADAFACTOR,
    TP_OPTIMIZER_SGD
} tp_optimizer_kind;
typedef enum tp_checkpointing {
    TP_CHECKPOINTING_AUTO,
    TP_CHECKPOINTING_NONE,
    TP_CHECKPOINTING_FULL,
    TP_CHECKPOINTING_SQRT,
    TP_CHECKPOINTING_EVERY_K,
    TP_CHECKPOINTING_OFFLOAD
} tp_checkpointing;

typedef struct tp_train_config {
    int64_t micro_batch_size, gradient_accumulation_steps;
    double num_epochs;
    int64_t max_steps;    /* 0: as many as num_epochs needs */
    double learning_rate; /* settled by the adapter, if the recipe does not set it */
    int lr_scheduler;     /* tp_lr_scheduler */
    double min_lr_ratio;
    double warmup_ratio;
    int64_t warmup_steps; /* unset: by warmup_ratio, rounded up */
    int optimizer;        /* tp_optimizer_kind */
    double weight_decay, momentum;
    double adam_beta1, adam_beta2, adam_epsilon;
    double max_grad_norm;       /* 0: no clipping */
    int gradient_checkpointing; /* tp_checkpointing */
    int64_t gradient_checkpointing_k;
    bool activation_offloading;
    int64_t max_skipped_steps;
    double loss_watchdog_threshold; /* 0: off */
    int64_t loss_watchdog_patience;
    double spike_zscore; /* 0: off */
    bool check_base_weights;
} tp_train_config;

/* ---- output ---- */
typedef enum tp_report_to { TP_REPORT_JSONL, TP_REPORT_TENSORBOARD } tp_report_to;
typedef enum tp_merge_dtype {
    TP_MERGE_DTYPE_BASE,
    TP_MERGE_DTYPE_FP32,
    TP_MERGE_DTYPE_BF16,
    TP_MERGE_DTYPE_FP16
} tp_merge_dtype;
typedef enum tp_merge_format { TP_MERGE_SAFETENSORS, TP_MERGE_GGUF } tp_merge_format;

typedef struct tp_merge_config {
    bool present; /* the recipe has the block */
    const char *out;
    int dtype;  /* tp_merge_dtype */
    int format; /* tp_merge_format */
    const char *proof;
} tp_merge_config;

typedef struct tp_serve_adapter_config {
    const char *name, *path;
} tp_serve_adapter_config;

typedef struct tp_serve_adapters {
    const tp_serve_adapter_config *items;
    size_t n;
} tp_serve_adapters;

typedef struct tp_serve_config {
    bool present; /* the recipe has the block */
    const char *host;
    int64_t port;
    tp_serve_adapters adapters;
    const char *adapter_dir;
    int64_t max_adapters, max_cpu_adapters, max_batch, context;
    uint64_t kv_memory; /* bytes; 0: auto */
    const char *api_key_file, *admin_key_file;
} tp_serve_config;

typedef struct tp_output_config {
    const char *output_dir;
    bool overwrite;
    int64_t save_steps, saves_per_epoch;
    double save_minutes;
    int64_t save_total_limit;
    bool save_optimizer;
    const char *resume_from_checkpoint; /* "none", "auto" or a path */
    int64_t eval_steps, evals_per_epoch;
    bool load_best_model_at_end;
    const char *metric_for_best_model;
    int64_t early_stopping_patience;
    int64_t logging_steps;
    tp_ints report_to; /* tp_report_to */
    bool plot_loss;
    tp_strings sample_prompts;
    int64_t sample_steps;
    tp_merge_config merge;
    tp_serve_config serve;
} tp_output_config;

typedef struct tp_config {
    tp_run_config run;
    tp_lora_config lora;
    tp_virtual_config virtual_tokens;
    tp_quant_config quant;
    tp_data_config data;
    tp_objective_config objective;
    tp_train_config train;
    tp_output_config output;
} tp_config;

extern TP_API const tp_section tp_run_section, tp_lora_section, tp_virtual_section, tp_quant_section, tp_data_section,
    tp_objective_section, tp_train_section, tp_output_section;

/* All of them, into a tp_config. */
extern TP_API const tp_schema tp_recipe_schema;

TP_API bool tp_config_has_adapter(const tp_config *config, tp_adapter_kind kind);

/* Refuses, by name, what recipes may say but this version cannot do: UNSUPPORTED, every such key as a problem.
 * The text of the recipe is right when this is called. */
TP_API tp_status tp_config_available(tp_ctx *ctx, const tp_recipe *recipe, const tp_config *config,
                                     tp_problems *problems) TP_MUST_CHECK;

/* No data set that is a file has a `split`, which names the file of a folder. Else INVALID. The paths exist when this is
 * called. */
TP_API tp_status tp_config_check_splits(tp_ctx *ctx, const tp_recipe *recipe, const tp_config *config,
                                        tp_problems *problems) TP_MUST_CHECK;

/* The output folder can be used: it does not exist, or overwriting or resuming was asked for; it is no file, not the
 * model's folder, and can be written. Else INVALID. */
TP_API tp_status tp_config_check_output(tp_ctx *ctx, const tp_recipe *recipe, const tp_config *config,
                                        tp_problems *problems) TP_MUST_CHECK;

/* "adamw", "cosine": the word of the recipe for an enum value, by its key. "" for no such key or value. */
TP_API const char *tp_config_word(const char *key, int value);

#endif
