/* One copy per term of every slot, in one buffer, made when a pass finds other factors than the last one did. */
#include "inference/narrow.h"

#include "base/mem.h"

/* A factor and its copy. */
struct factor {
    const void *from; /* data it was copied from */
    tp_tensor copy;
};

struct entry {
    tp_linear_module *module;
    tp_slot slot;        /* as found by the last begin */
    tp_lowrank *terms;   /* [slot.n_terms] of narrow->terms */
    struct factor *pair; /* [2 * slot.n_terms] of narrow->factors: a, b, a, b, ... */
};

struct tp_narrow {
    tp_device *device;
    tp_dtype dtype;        /* of the copies: the model's precision */
    struct entry *entries; /* one per linear */
    size_t n;
    tp_lowrank *terms;
    struct factor *factors;
    void *memory;
    size_t bytes;
    bool valid;
};

tp_status tp_narrow_open(tp_ctx *ctx, tp_model *model, tp_narrow **result)
{
    tp_narrow *narrow = tp_alloc(ctx, 1, sizeof *narrow);
    if (narrow == NULL) return TP_NOMEM;
    narrow->device = ctx->device;
    narrow->dtype = model->precision;
    narrow->n = model->n_linears;
    narrow->entries = tp_alloc(ctx, model->n_linears, sizeof *narrow->entries);
    if (narrow->entries == NULL) {
        tp_narrow_close(narrow);
        return TP_NOMEM;
    }
    for (size_t i = 0; i < narrow->n; i++) narrow->entries[i].module = model->linears[i];
    *result = narrow;
    return TP_OK;
}

static void drop(tp_narrow *narrow)
{
    if (narrow->memory != NULL) narrow->device->backend->free(narrow->device, narrow->memory, narrow->bytes);
    tp_free(narrow->terms);
    tp_free(narrow->factors);
    narrow->memory = NULL;
    narrow->terms = NULL;
    narrow->factors = NULL;
    narrow->valid = false;
}

void tp_narrow_close(tp_narrow *narrow)
{
    if (narrow == NULL) return;
    drop(narrow);
    tp_free(narrow->entries);
    tp_free(narrow);
}

void tp_narrow_forget(tp_narrow *narrow)
{
    narrow->valid = false;
}

static const tp_tensor *factor_of(const tp_slot *slot, int i)
{
    return i % 2 == 0 ? slot->terms[i / 2].a : slot->terms[i / 2].b;
}

/* Whether the copies are those of what sits in the slots now. */
static bool is_current(const tp_narrow *narrow)
{
    if (!narrow->valid) return false;
    for (size_t e = 0; e < narrow->n; e++) {
        const struct entry *entry = &narrow->entries[e];
        const tp_slot *slot = &entry->module->slot;
        if (slot->n_terms != entry->slot.n_terms) return false;
        for (int i = 0; i < 2 * slot->n_terms; i++) {
            const tp_tensor *now = factor_of(slot, i), *copy = &entry->pair[i].copy;
            if (now->data != entry->pair[i].from || now->rows != copy->rows || now->cols != copy->cols) return false;
        }
    }
    return true;
}

/* Room for the copies of all factors, rounded so that each begins on a line of the cache. */
static tp_status allocate(tp_ctx *ctx, tp_narrow *narrow)
{
    int64_t elements = 0, count;
    size_t n_terms = 0;
    for (size_t e = 0; e < narrow->n; e++) {
        const tp_slot *slot = &narrow->entries[e].module->slot;
        n_terms += (size_t)slot->n_terms;
        for (int i = 0; i < 2 * slot->n_terms; i++) {
            const tp_tensor *t = factor_of(slot, i);
            if (!tp_mul_i64(t->rows, t->cols, &count) || !tp_add_i64(elements, count / 32 * 32 + 32, &elements))
                return tp_fail(ctx, TP_NOMEM, "adapters too large to hold a second time");
        }
    }
    if (n_terms == 0) return TP_OK;
    narrow->terms = tp_alloc(ctx, n_terms, sizeof *narrow->terms);
    narrow->factors = tp_alloc(ctx, 2 * n_terms, sizeof *narrow->factors);
    narrow->bytes = (size_t)elements * sizeof(uint16_t);
    if (narrow->terms != NULL && narrow->factors != NULL)
        narrow->memory = narrow->device->backend->alloc(ctx, narrow->device, narrow->bytes);
    return narrow->memory != NULL ? TP_OK : TP_NOMEM;
}

static tp_status copy_factor(tp_ctx *ctx, const tp_tensor *from, tp_dtype dtype, uint16_t **to, struct factor *factor)
{
    *factor = (struct factor){.from = from->data, .copy = *from};
    factor->copy.dtype = dtype;
    factor->copy.data = *to;
    factor->copy.grad = NULL;
    factor->copy.needs_grad = false;
    *to += from->rows * from->cols / 32 * 32 + 32;
    tp_scale_args args = {
        .n = from->rows, .dim = from->cols, .x = tp_tensor_rows(from), .y = tp_tensor_rows(&factor->copy), .alpha = 1};
    return tp_run_scale(ctx, &args);
}

static tp_status make(tp_ctx *ctx, tp_narrow *narrow)
{
    drop(narrow);
    TP_TRY(allocate(ctx, narrow));
    tp_lowrank *terms = narrow->terms;
    struct factor *factors = narrow->factors;
    uint16_t *to = narrow->memory;
    for (size_t e = 0; e < narrow->n; e++) {
        struct entry *entry = &narrow->entries[e];
        entry->slot = entry->module->slot;
        entry->terms = terms;
        entry->pair = factors;
        for (int i = 0; i < 2 * entry->slot.n_terms; i++)
            TP_TRY(copy_factor(ctx, factor_of(&entry->slot, i), narrow->dtype, &to, &factors[i]));
        terms += entry->slot.n_terms;
        factors += 2 * entry->slot.n_terms;
    }
    narrow->valid = true;
    return TP_OK;
}

tp_status tp_narrow_begin(tp_ctx *ctx, tp_narrow *narrow)
{
    if (!is_current(narrow)) TP_TRY(make(ctx, narrow));
    for (size_t e = 0; e < narrow->n; e++) {
        struct entry *entry = &narrow->entries[e];
        entry->slot = entry->module->slot;
        for (int t = 0; t < entry->slot.n_terms; t++) {
            entry->terms[t] = entry->slot.terms[t]; /* scaling and rows may change from pass to pass */
            entry->terms[t].a = &entry->pair[2 * t].copy;
            entry->terms[t].b = &entry->pair[2 * t + 1].copy;
        }
        if (entry->slot.n_terms > 0) entry->module->slot.terms = entry->terms;
    }
    return TP_OK;
}

void tp_narrow_end(tp_narrow *narrow)
{
    for (size_t e = 0; e < narrow->n; e++) narrow->entries[e].module->slot = narrow->entries[e].slot;
}
