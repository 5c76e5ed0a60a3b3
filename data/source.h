/* The tokenizer that belongs to a model path: a folder, a tokenizer.json, or a .gguf file. */
#ifndef TP_DATA_SOURCE_H
#define TP_DATA_SOURCE_H

#include "data/tokenizer.h"

/* INVALID for weights or a config.json of a folder, which hold none. */
TP_API tp_status tp_tokenizer_for(tp_ctx *ctx, const char *path, tp_tokenizer **tokenizer) TP_MUST_CHECK;

#endif
