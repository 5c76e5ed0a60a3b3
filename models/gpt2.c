/* GPT-2: learned positions, LayerNorm before each part, one fused projection for q, k, v, GELU.
 *
 *     x = x + c_proj(attention(c_attn(ln_1(x))))
 *     x = x + mlp.c_proj(gelu(c_fc(ln_2(x))))
 * Radford et al. 2019. Dense layers are stored [in, out] (Conv1D). The base model's own dropout is not applied: with frozen
 * weights it only adds noise, and reference adapters are trained without it. */
#include "models/model.h"

static tp_tensor *norm(const tp_pass *pass, tp_tensor *weight, tp_tensor *bias, tp_tensor *x, double eps)
{
    return tp_layernorm(pass->tape, x, weight, bias->data != NULL ? bias : NULL, (float)eps);
}

static tp_tensor *block(tp_model *model, const tp_pass *pass, int layer, tp_tensor *x)
{
    tp_block *b = &model->blocks[layer];
    const tp_model_config *c = &model->config;
    tp_tape *tape = pass->tape;
    int64_t width = c->n_heads * c->head_dim;
    tp_tensor *qkv[3];

    tp_tensor *h = norm(pass, &b->norm1, &b->norm1_bias, x, c->norm_eps);
    tp_tape_scope_begin(tape, "attn");
    tp_split(tape, tp_module_linear(pass, &b->qkv, h, NULL), (int64_t[]){width, width, width}, 3, qkv);
    x = tp_module_linear(pass, &b->o, tp_model_attend(model, pass, layer, qkv[0], qkv[1], qkv[2]), x);
    tp_tape_scope_end(tape);

    h = norm(pass, &b->norm2, &b->norm2_bias, x, c->norm_eps);
    tp_tape_scope_begin(tape, "mlp");
    h = tp_gelu(tape, tp_module_linear(pass, &b->up, h, NULL), c->activation == TP_ACT_GELU);
    x = tp_module_linear(pass, &b->down, h, x);
    tp_tape_scope_end(tape);
    return x;
}

tp_tensor *tp_gpt2_forward(tp_model *model, const tp_pass *pass)
{
    const tp_batch *batch = pass->batch;
    tp_tensor *places = tp_embedding(pass->tape, &model->position, NULL, batch->positions, batch->n, NULL);
    tp_tensor *x = tp_embedding(pass->tape, &model->embedding, NULL, batch->ids, batch->n, places);
    if (pass->observe != NULL && x != NULL) pass->observe(pass->observe_state, 0, x);
    x = tp_model_run_blocks(model, pass, block, x);
    return norm(pass, &model->norm, &model->norm_bias, x, model->config.norm_eps);
}
