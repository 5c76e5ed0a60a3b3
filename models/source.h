/* Inside models/: the two kinds of places that models come from. */
#ifndef TP_MODELS_SOURCE_H
#define TP_MODELS_SOURCE_H

#include "models/build.h"

typedef struct tp_source {
    /* Opens the files into the store and reads the configuration (nothing to free in *config after a failure). */
    tp_status (*open)(tp_ctx *ctx, const char *path, tp_model_store *store, tp_model_config *config);
    /* stored[i] for parts[i]; name NULL where the files have none. Tensors that nothing asks for get one note. */
    tp_status (*locate)(tp_ctx *ctx, tp_model_store *store, const tp_model_config *config, const tp_part *parts, size_t n,
                        tp_stored *stored);
} tp_source;

extern const tp_source tp_source_hf;   /* a folder with config.json and safetensors */
extern const tp_source tp_source_gguf; /* one .gguf file */

#endif
