/* Linears of one input as one product, where they were stacked and nothing stands against it. */
#include <stdio.h>

#include "models/model.h"

void tp_model_join_like(tp_model *shapes, const tp_model *model)
{
    shapes->room = model->room;
    for (int64_t i = 0; i < model->config.n_layers; i++)
        for (int j = 0; j < TP_JOINTS; j++) {
            tp_joint *to = &shapes->blocks[i].joints[j];
            const tp_joint *from = &model->blocks[i].joints[j];
            to->weight = from->weight;
            to->bias = from->bias;
            to->room = from->room;
        }
}

/* "q_proj+k_proj+v_proj", for messages. */
static void name_of(const tp_joint *joint, char *out, size_t size)
{
    size_t n = 0;
    for (int i = 0; i < joint->n && n < size; i++) {
        int wrote = snprintf(out + n, size - n, "%s%s", i > 0 ? "+" : "", tp_module_name(joint->members[i]));
        n += wrote > 0 ? (size_t)wrote : 0;
    }
}

/* One adapter at most on each, for all rows, and with room for its factors. terms: as they are in this pass. */
static bool describe(const tp_pass *pass, const tp_joint *joint, const tp_tensor *x, tp_joint_spec *spec,
                     tp_lowrank terms[TP_JOINT_PARTS])
{
    int64_t used = 0;
    for (int i = 0; i < joint->n; i++) {
        const tp_slot *slot = &joint->members[i]->slot;
        int n_terms = pass->adapters_off ? 0 : slot->n_terms;
        spec->parts[i].rows = joint->members[i]->weight.rows;
        spec->parts[i].term = n_terms > 0 ? &terms[i] : NULL;
        if (n_terms == 0) continue;
        terms[i] = slot->terms[0];
        if (!pass->training) terms[i].dropout = 0;
        if (n_terms > 1 || terms[i].begin != 0 || terms[i].end != 0) return false;
        used += terms[i].a->rows;
    }
    return used <= joint->room && used <= x->ld - x->cols;
}

bool tp_module_joint(const tp_pass *pass, const tp_joint *joint, tp_tensor *x, tp_tensor *residual, tp_tensor *y[])
{
    tp_lowrank terms[TP_JOINT_PARTS];
    tp_joint_spec spec = {.weight = &joint->weight, .room = joint->room, .residual = residual, .n_parts = joint->n};
    spec.unread = joint == pass->unread;
    if (x == NULL || joint->weight.data == NULL || !describe(pass, joint, x, &spec, terms)) {
        for (int i = 0; i < joint->n; i++) y[i] = tp_module_linear(pass, joint->members[i], x, residual);
        return false;
    }
    char name[64];
    int64_t sizes[TP_JOINT_PARTS];
    tp_tensor bias = joint->bias;
    if (bias.data != NULL) spec.bias = &bias;
    for (int i = 0; i < joint->n; i++) sizes[i] = spec.parts[i].rows;
    name_of(joint, name, sizeof name);
    tp_tape_scope_begin(pass->tape, "%s", name);
    y[0] = tp_joint_linear(pass->tape, x, &spec);
    if (joint->n > 1) tp_split(pass->tape, y[0], sizes, joint->n, y);
    tp_tape_scope_end(pass->tape);
    for (int i = 0; i < joint->n; i++)
        if (spec.parts[i].term != NULL && terms[i].dropout > 0) return false;
    return true;
}
