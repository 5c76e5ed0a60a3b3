/* config.json of a model: what is accepted is written and read back to the same text, has rotary frequencies that are numbers,
 * and is the shape of a network. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "models/model.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool holds, const char *what, const tp_ctx *ctx)
{
    if (holds) return;
    fprintf(stderr, "%s\n%s\n", what, ctx->message);
    abort();
}

static tp_status read_config(tp_ctx *ctx, const char *text, size_t n, tp_model_config *config)
{
    tp_json_doc *doc = NULL;
    tp_status status = tp_json_parse(ctx, text, n, &(tp_json_options){.name = "f"}, &doc);
    if (status == TP_OK) status = tp_config_from_json(ctx, doc, config);
    tp_json_free(doc);
    return status;
}

static void check_round_trip(tp_ctx *ctx, const tp_model_config *config)
{
    tp_buf first, second;
    tp_model_config again;
    tp_buf_init(&first, 0);
    tp_buf_init(&second, 0);
    tp_config_write_json(config, &first);
    require(!first.failed && read_config(ctx, first.data, first.len, &again) == TP_OK, tp_buf_cstr(&first), ctx);
    tp_config_write_json(&again, &second);
    if (strcmp(tp_buf_cstr(&first), tp_buf_cstr(&second)) != 0) {
        fprintf(stderr, "%s\n", tp_buf_cstr(&first));
        require(false, tp_buf_cstr(&second), ctx);
    }
    tp_config_free(&again);
    tp_buf_free(&first);
    tp_buf_free(&second);
}

static void check_frequencies(tp_ctx *ctx, const tp_model_config *config)
{
    static const int64_t lengths[] = {1, 4096, TP_LIMIT_POSITIONS};
    float factor, inv_freq[512];
    if (config->family == TP_FAMILY_GPT2 || config->head_dim > 1024) return;
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        tp_rope_frequencies(config, lengths[i], inv_freq, &factor);
        require(isfinite(factor), "the factor of the angles is not finite", ctx);
        for (int64_t k = 0; k < config->head_dim / 2; k++) require(isfinite(inv_freq[k]), "a frequency is not finite", ctx);
    }
}

static void check_network(tp_ctx *ctx, const tp_model_config *config)
{
    enum { FEW_LAYERS = 8 }; /* more of them show nothing new */
    const tp_model_options options = {.precision = TP_F32};
    tp_model *model = NULL;
    if (config->n_layers > FEW_LAYERS) return;
    require(tp_device_open(ctx, "dry", 1, &ctx->device) == TP_OK, "no dry device", ctx);
    require(tp_model_from_config(ctx, config, &options, &model) == TP_OK, "the network cannot be made", ctx);
    require(model->n_linears > 0 && tp_config_parameters(config) > tp_config_linear_weights(config), "a network of nothing",
            ctx);
    tp_model_free(model);
    tp_device_close(ctx->device);
    ctx->device = NULL;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    tp_ctx ctx;
    tp_model_config config;
    tp_ctx_init(&ctx);
    tp_status status = read_config(&ctx, (const char *)data, size, &config);
    if (status != TP_OK) {
        require(tp_status_exit_code(status) == 3 && ctx.message[0] != '\0', "refused in the wrong way", &ctx);
        return 0;
    }
    check_round_trip(&ctx, &config);
    check_frequencies(&ctx, &config);
    check_network(&ctx, &config);
    tp_config_free(&config);
    return 0;
}
