/* A model folder with random weights, for tests and for measuring shapes whose weights are not at hand. */
#ifndef TP_MODELS_INIT_H
#define TP_MODELS_INIT_H

#include "models/config.h"

/* Files of a folder hold at most this many bytes of tensors, as on the hub. */
#define TP_INIT_SHARD_BYTES ((uint64_t)5000000000)

/* Reads config_path (a config.json, or a folder that has one) and writes out_folder, which must not exist yet, with
 * config.json and model.safetensors (or shards and their index): weights and embeddings N(0, initializer_range), norms 1,
 * biases 0, in dtype F32, BF16 or F16. The same seed gives the same bytes, whatever the number of threads. Memory is a few
 * buffers, never the model. The folder appears when it is complete.
 * Normal numbers are drawn from 65536 quantiles, which is finer than bf16 tells apart; none lies beyond 4.4 deviations.
 * INVALID (folder exists, dtype), IO_READ, FORMAT, UNSUPPORTED (configuration), IO_WRITE, NOMEM. */
TP_API tp_status tp_model_init(tp_ctx *ctx, const char *config_path, const char *out_folder, uint64_t seed,
                               tp_dtype dtype) TP_MUST_CHECK;

#endif
