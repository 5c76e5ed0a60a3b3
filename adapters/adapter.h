/* Adapters on disk: PEFT's folder, read into a model's slots and written from them. */
#ifndef TP_ADAPTERS_ADAPTER_H
#define TP_ADAPTERS_ADAPTER_H

#include "adapters/config.h"
#include "base/file.h"

typedef struct tp_adapter {
    tp_adapter_config config;
    tp_lora *lora; /* attached to the model it was opened on */
} tp_adapter;

/* Opens `folder` on a model: configuration, every tensor's name and shape against the base, no NaN or infinity. Nothing of the
 * model changes on failure. A base fingerprint in tapeft.json that is not the model's is refused unless `force`.
 * FORMAT, SHAPE, UNSUPPORTED naming the tensor. */
TP_API tp_status tp_adapter_open(tp_ctx *ctx, tp_model *model, const char *folder, bool force,
                                 tp_adapter **adapter) TP_MUST_CHECK;
/* Detaches and frees; accepts NULL. */
TP_API void tp_adapter_close(tp_adapter *adapter);

/* Values of adapter_model.safetensors at `path` into parameters that exist already (resume, start from a folder). */
TP_API tp_status tp_adapter_load_values(tp_ctx *ctx, const char *path, tp_params *params) TP_MUST_CHECK;

/* What it was trained with besides the base: fingerprints in hexadecimal, the device's name; NULL or "": none. */
typedef struct tp_adapter_origin {
    const char *tokenizer, *data, *device;
} tp_adapter_origin;

/* What tapeft.json says of it; "" where it says nothing, or is not there. */
typedef struct tp_adapter_made {
    char base[65], tokenizer[65], data[65], version[32], device[32];
} tp_adapter_made;
TP_API tp_status tp_adapter_read_made(tp_ctx *ctx, const char *folder, tp_adapter_made *made) TP_MUST_CHECK;

/* Adds adapter_config.json, adapter_model.safetensors and tapeft.json (fingerprints of base, tokenizer and data, device,
 * version) to a folder under way. NUMERIC, and nothing written, if a value is not finite. origin may be NULL. */
TP_API tp_status tp_adapter_write(tp_ctx *ctx, const tp_lora *lora, const tp_model *model, const tp_adapter_origin *origin,
                                  tp_publish *publish) TP_MUST_CHECK;
/* A whole adapter folder in one step; an existing one is replaced at once. `extra` names and texts (NULL-terminated pairs,
 * may be NULL) are further files, such as the chat template. */
TP_API tp_status tp_adapter_save(tp_ctx *ctx, const tp_lora *lora, const tp_model *model, const tp_adapter_origin *origin,
                                 const char *folder, const char *const *extra) TP_MUST_CHECK;

/* One safetensors file of parameters or their gradients under PEFT's names (--dump-gradients, checkpoints). */
TP_API tp_status tp_params_save(tp_ctx *ctx, const tp_params *params, const float *flat, const char *path) TP_MUST_CHECK;

#endif
