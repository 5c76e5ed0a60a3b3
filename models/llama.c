/* Llama and its relatives: Mistral (sliding window), Qwen2 (biases on q, k, v), Qwen3 (norms on q and k), SmolLM.
 *
 *     x = x + o(attention(rope(q(h)), rope(k(h)), v(h))),   h = rmsnorm(x)
 *     x = x + down(silu(gate(h)) * up(h)),                   h = rmsnorm(x)
 * Touvron et al. 2023, arXiv:2302.13971; Jiang et al. 2023, arXiv:2310.06825; Qwen team 2024/2025, arXiv:2407.10671,
 * arXiv:2505.09388. */
#include "models/model.h"

#include "autograd/op.h"
#include "base/mem.h"

/* Frequencies depend on the batch only for dynamic scaling and longrope; then they are copied again when its length changes. */
static tp_status refresh_frequencies(tp_ctx *ctx, tp_model *model, int64_t length)
{
    bool dynamic = tp_rope_depends_on_length(&model->config.rope);
    if (model->inv_freq_length != 0 && (!dynamic || model->inv_freq_length == length)) return TP_OK;
    size_t half = (size_t)model->config.head_dim / 2;
    float *frequencies = tp_alloc(ctx, half, sizeof *frequencies);
    if (frequencies == NULL) return TP_NOMEM;
    tp_rope_frequencies(&model->config, length, frequencies, &model->rope_factor);
    tp_status status = ctx->device->backend->copy_in(ctx, model->inv_freq, frequencies, half * sizeof *frequencies);
    tp_free(frequencies);
    if (status == TP_OK) model->inv_freq_length = length;
    return status;
}

static tp_status rope_angles(tp_model *model, const tp_pass *pass, tp_rope_angles *angles)
{
    tp_ctx *ctx = tp_tape_ctx(pass->tape);
    const tp_batch *batch = pass->batch;
    int64_t half = model->config.head_dim / 2;
    TP_TRY(refresh_frequencies(ctx, model, batch->max_position));
    tp_storage *cos = tp_op_alloc(pass->tape, "rope", (size_t)(batch->n * half) * sizeof(float));
    tp_storage *sin = tp_op_alloc(pass->tape, "rope", (size_t)(batch->n * half) * sizeof(float));
    if (cos == NULL || sin == NULL) return TP_NOMEM;
    tp_rope_table_args args = {.n = batch->n,
                               .half = half,
                               .positions = batch->positions,
                               .inv_freq = model->inv_freq,
                               .factor = model->rope_factor,
                               .cos = tp_storage_data(cos),
                               .sin = tp_storage_data(sin)};
    *angles = (tp_rope_angles){args.cos, args.sin, half};
    return tp_run_rope_table(ctx, &args);
}

static tp_tensor *norm(const tp_pass *pass, tp_tensor *weight, tp_tensor *x, double eps)
{
    return tp_rmsnorm(pass->tape, x, weight, (float)eps);
}

static tp_tensor *attention(tp_model *model, const tp_pass *pass, int layer, tp_tensor *x)
{
    tp_block *b = &model->blocks[layer];
    const tp_model_config *c = &model->config;
    tp_tape *tape = pass->tape;
    tp_tensor *h = norm(pass, &b->norm1, x, c->norm_eps);
    tp_tape_scope_begin(tape, "self_attn");
    tp_tensor *qkv[3], *o[1];
    tp_module_joint(pass, &b->joints[TP_JOINT_QKV], h, NULL, qkv);
    if (layer < pass->remade_layers) tp_tape_forget(tape, h);
    tp_tensor *q = qkv[0], *k = qkv[1];
    if (c->qk_norm) {
        q = norm(pass, &b->q_norm, q, c->norm_eps);
        k = norm(pass, &b->k_norm, k, c->norm_eps);
    }
    (void)tp_rope_both(tape, &q, &k, &model->angles, c->head_dim); /* NULL ends the rest as well */
    tp_tensor *mixed = tp_model_attend(model, pass, layer, q, k, qkv[2]);
    tp_module_joint(pass, &b->joints[TP_JOINT_O], mixed, x, o);
    tp_tape_scope_end(tape);
    return o[0];
}

static tp_tensor *feed_forward(tp_model *model, const tp_pass *pass, int layer, tp_tensor *x)
{
    tp_block *b = &model->blocks[layer];
    tp_tensor *h = norm(pass, &b->norm2, x, model->config.norm_eps);
    tp_tensor *gate_up[2], *down[1];
    tp_tape_scope_begin(pass->tape, "mlp");
    tp_module_joint(pass, &b->joints[TP_JOINT_GATE_UP], h, NULL, gate_up);
    if (layer < pass->remade_layers) tp_tape_forget(pass->tape, h);
    tp_tensor *product = tp_swiglu(pass->tape, gate_up[0], gate_up[1]);
    bool joint = tp_module_joint(pass, &b->joints[TP_JOINT_DOWN], product, x, down);
    bool again = joint && tp_tape_ctx(pass->tape)->device->makes_swiglu_again;
    if (again || layer < pass->remade_layers) tp_tape_forget(pass->tape, product);
    if (layer < pass->remade_gates && !tp_tape_again(pass->tape)) tp_tape_forget(pass->tape, gate_up[0]);
    tp_tape_scope_end(pass->tape);
    return down[0];
}

static tp_tensor *block(tp_model *model, const tp_pass *pass, int layer, tp_tensor *x)
{
    return feed_forward(model, pass, layer, attention(model, pass, layer, x));
}

tp_tensor *tp_llama_forward(tp_model *model, const tp_pass *pass)
{
    tp_tape *tape = pass->tape;
    tp_tape_set_room(tape, tp_tape_recording(tape) && !pass->adapters_off ? model->room : 0);
    tp_tensor *x = tp_embedding(tape, &model->embedding, NULL, pass->batch->ids, pass->batch->n, NULL);
    if (!tp_op_ok(tape, "rope", rope_angles(model, pass, &model->angles))) return NULL;
    if (pass->observe != NULL && x != NULL) pass->observe(pass->observe_state, 0, x);
    x = tp_model_run_blocks(model, pass, block, x);
    return norm(pass, &model->norm, x, model->config.norm_eps);
}
