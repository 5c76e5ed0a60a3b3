/* Inside models/: the reader of config.json and the part of it that reads rotary scaling. */
#ifndef TP_MODELS_CONFIG_ROPE_H
#define TP_MODELS_CONFIG_ROPE_H

#include "models/config.h"

typedef struct tp_config_reader {
    tp_ctx *ctx;
    const tp_json_doc *doc;
    const tp_json *root;
    const char *name; /* of the file */
    tp_model_config *config;
} tp_config_reader;

/* Fails with "name:line:column: message"; value NULL: without a position. */
tp_status tp_config_refuse(const tp_config_reader *r, const tp_json *value, tp_status status, const char *format, ...)
    TP_PRINTF(4, 5);

/* rope_theta and rope_scaling, or rope_parameters. Needs head_dim and max_positions. */
tp_status tp_config_read_rope(const tp_config_reader *r) TP_MUST_CHECK;

#endif
