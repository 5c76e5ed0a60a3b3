/* One step on the dry backend: the same code as training, on an arena without memory. */
#include "trainers/plan.h"

#include <stdio.h>
#include <string.h>

#include "autograd/upload.h"
#include "base/mem.h"
#include "inference/generate.h"

/* Of an arena for slices of uneven batches, one part more. */
#define SLICES_SHARE 8

/* The program itself, its libraries and allocator, measured as the resident size after start-up. */
#define PROCESS_BYTES ((uint64_t)12 << 20)

static tp_status dry_pass(tp_ctx *dry, tp_model *model, const tp_plan_shape *shape, int64_t rows, int64_t labels, bool train,
                          uint64_t *activations, tp_place **places, size_t *n_places)
{
    tp_tape *tape;
    tp_batch_buffers buffers;
    TP_TRY(tp_batch_buffers_open(dry, rows, labels, &buffers));
    tp_status status = tp_tape_new(dry, 0, model->precision, &tape);
    if (status != TP_OK) {
        tp_batch_buffers_close(&buffers);
        return status;
    }
    if (places != NULL) tp_tape_note_places(tape);
    /* The longest possible segments: attention's work and dynamic RoPE look at them; activations do not. */
    int64_t longest = shape->longest_segment > 0 && shape->longest_segment < rows ? shape->longest_segment : rows,
            n_segments = 0;
    tp_segment *segments =
        tp_tape_scratch(tape, (size_t)(longest > 0 ? (rows + longest - 1) / longest : 0) + 1, sizeof *segments);
    for (int64_t start = 0; segments != NULL && start < rows; start += longest, n_segments++) {
        int64_t length = rows - start < longest ? rows - start : longest;
        segments[n_segments] = (tp_segment){start, length, start, length};
    }
    int32_t *memory = buffers.memory;
    tp_batch batch = {.n = rows,
                      .ids = memory,
                      .positions = memory,
                      .max_position = longest,
                      .segments = segments,
                      .n_segments = n_segments,
                      .label_rows = memory,
                      .labels = memory,
                      .n_labels = labels,
                      .n_tokens = rows};
    tp_pass pass = {.tape = tape, .batch = &batch, .training = train};
    if (train) {
        pass.recompute_every = shape->recompute_every;
        pass.remade_layers = shape->remade_layers;
        pass.remade_gates = shape->remade_gates;
        pass.recomputed_layers = shape->recomputed_layers;
        pass.recomputed_rows = shape->recomputed_rows;
        pass.parked_inputs = shape->parked_inputs;
    }
    tp_cross_entropy_spec loss = {.head = &model->head.weight, .rows = memory, .labels = memory, .n = labels, .grad_scale = 1};
    if (!train) tp_tape_no_grad_begin(tape);
    tp_tensor *value = tp_linear_cross_entropy(tape, tp_model_forward(model, &pass), &loss);
    if (!train) tp_tape_no_grad_end(tape);
    status = tp_tape_status(tape);
    if (status == TP_OK && train) status = tp_tape_backward(tape, value);
    if (tp_tape_peak(tape) > *activations) *activations = tp_tape_peak(tape);
    if (places != NULL && status == TP_OK) {
        const tp_place *noted = tp_tape_places(tape, n_places);
        *places = tp_alloc_raw(dry, *n_places, sizeof **places);
        if (*places == NULL) status = TP_NOMEM;
        if (*places != NULL && *n_places > 0) memcpy(*places, noted, *n_places * sizeof *noted);
    }
    tp_tape_free(tape);
    tp_batch_buffers_close(&buffers);
    return status;
}

tp_status tp_plan_places(tp_ctx *dry, tp_model *model, const tp_plan_shape *shape, tp_place **places, size_t *n)
{
    uint64_t ignored = 0;
    return dry_pass(dry, model, shape, shape->rows, shape->labels, shape->train, &ignored, places, n);
}

/* Decoding under bf16 and fp16 holds every factor a second time, in half the bytes. */
static tp_status plan_samples(tp_ctx *dry, const tp_model *model, const tp_plan_shape *shape, uint64_t flat, uint64_t *bytes)
{
    if (shape->sample_context == 0) return TP_OK;
    TP_TRY(tp_generator_measure(dry, model, shape->sample_context, bytes));
    if (model->precision != TP_F32) *bytes += flat / 2;
    return TP_OK;
}

static uint64_t larger(int64_t a, int64_t b)
{
    return (uint64_t)(a > b ? a : b);
}

/* What is left over of the pieces that stacked weights take. */
static uint64_t left_of_pieces(const tp_model *model, uint64_t piece)
{
    uint64_t left = 0;
    for (int64_t i = 0; piece > 0 && i < model->config.n_layers; i++)
        for (int j = 0; j < TP_JOINTS; j++) {
            const tp_joint *joint = &model->blocks[i].joints[j];
            const tp_matrix *w = &joint->weight;
            if (joint->weight.data == NULL) continue;
            uint64_t bytes =
                (uint64_t)(w->rows + joint->room) * (uint64_t)w->stride * (uint64_t)tp_formats[w->format].block_bytes;
            if (bytes >= piece / 2) left += (piece - bytes % piece) % piece;
        }
    return left;
}

tp_status tp_plan_make(tp_ctx *dry, tp_model *model, tp_lora *lora, const tp_plan_shape *shape, tp_plan *plan)
{
    *plan = (tp_plan){.shape = *shape};
    uint64_t flat = lora != NULL ? (uint64_t)lora->params.elements * sizeof(float) : 0;
    double *flops = dry->device->flops;
    flops[0] = flops[1] = dry->device->bytes_moved = 0;
    (void)tp_dry_attention_size(dry->device);
    (void)tp_dry_calls(dry->device);
    TP_TRY(dry_pass(dry, model, shape, shape->rows, shape->labels, shape->train, &plan->activations, NULL, NULL));
    plan->calls = tp_dry_calls(dry->device);
    plan->attention = tp_dry_attention_size(dry->device);
    plan->flops_f32 = flops[0] * (double)shape->accumulation;
    plan->flops_narrow = flops[1] * (double)shape->accumulation;
    plan->bytes_moved = dry->device->bytes_moved * (double)shape->accumulation;
    if (shape->eval_rows > 0)
        TP_TRY(dry_pass(dry, model, shape, shape->eval_rows, shape->eval_labels, false, &plan->activations, NULL, NULL));
    TP_TRY(plan_samples(dry, model, shape, flat, &plan->samples));
    /* Slices that end elsewhere fall differently into the holes of the arena. */
    if (shape->recomputed_rows > 0 && shape->uneven && shape->own_memory) plan->activations += plan->activations / SLICES_SHARE;
    plan->arena = plan->activations;
    plan->weights = model->weight_bytes + left_of_pieces(model, shape->piece_bytes);
    plan->adapter = flat;
    plan->gradients = shape->train ? flat : 0;
    plan->optimizer = flat * (uint64_t)shape->optimizer_states;
    plan->batch = 2 * sizeof(int32_t) * (larger(shape->rows, shape->eval_rows) + larger(shape->labels, shape->eval_labels)) *
                  (uint64_t)(1 + shape->accumulation);
    plan->workspace = shape->workspace_bytes;
    plan->save =
        shape->train && !shape->own_memory ? flat * (uint64_t)(shape->optimizer_states > 1 ? shape->optimizer_states : 1) : 0;
    plan->host = shape->own_memory ? 0 : PROCESS_BYTES + shape->host_bytes;
    plan->peak = plan->weights + plan->adapter + plan->gradients + plan->optimizer + plan->activations + plan->batch +
                 plan->workspace + plan->samples + plan->save + plan->host;
    plan->trained_parameters = lora != NULL ? lora->params.trained : 0;
    plan->all_parameters = tp_config_parameters(&model->config);
    return TP_OK;
}

/* The fewest blocks in *count, of at most all, with which the plan of `shape` fits; all of them do. */
static tp_status bisect(tp_ctx *dry, tp_model *model, tp_lora *lora, tp_plan_shape *shape, int *count, uint64_t limit,
                        tp_plan *plan)
{
    int low = 0, high = (int)model->config.n_layers; /* low does not fit, high does */
    while (high - low > 1) {
        *count = (low + high) / 2;
        TP_TRY(tp_plan_make(dry, model, lora, shape, plan));
        if (plan->peak <= limit)
            high = *count;
        else
            low = *count;
    }
    *count = high;
    return tp_plan_make(dry, model, lora, shape, plan);
}

tp_status tp_plan_fit(tp_ctx *dry, tp_model *model, tp_lora *lora, const tp_plan_shape *wanted, uint64_t limit, tp_plan *plan)
{
    tp_plan_shape shape = *wanted;
    int64_t longest = shape.longest_segment > 0 ? shape.longest_segment : shape.rows;
    TP_TRY(tp_plan_make(dry, model, lora, &shape, plan));
    if (plan->peak <= limit) return TP_OK;
    shape.remade_layers = (int)model->config.n_layers;
    TP_TRY(tp_plan_make(dry, model, lora, &shape, plan));
    if (plan->peak <= limit) return bisect(dry, model, lora, &shape, &shape.remade_layers, limit, plan);
    const uint64_t with_gates = plan->peak;
    shape.remade_gates = shape.remade_layers;
    TP_TRY(tp_plan_make(dry, model, lora, &shape, plan));
    if (plan->peak <= limit) return bisect(dry, model, lora, &shape, &shape.remade_gates, limit, plan);
    if (plan->peak == with_gates) shape.remade_gates = 0; /* they are products of their own, which stay */
    shape.recomputed_layers = (int)model->config.n_layers;
    for (int64_t slice = shape.rows;;) {
        TP_TRY(tp_plan_make(dry, model, lora, &shape, plan));
        if (plan->peak <= limit) return bisect(dry, model, lora, &shape, &shape.recomputed_layers, limit, plan);
        if (slice <= longest) return TP_OK;
        slice = (slice / longest + 1) / 2 * longest;
        shape.recomputed_rows = slice;
    }
}

#define BATCH_MOST 4096

struct search {
    tp_ctx *dry;
    tp_model *model;
    tp_lora *lora;
    tp_plan_shape shape;
    bool fit;
    uint64_t limit;
};

static tp_status fits(struct search *s, int64_t batch, int64_t length, bool *yes)
{
    tp_plan plan;
    s->shape.rows = s->shape.labels = batch * length;
    s->shape.segments = batch;
    s->shape.longest_segment = length;
    TP_TRY(s->fit ? tp_plan_fit(s->dry, s->model, s->lora, &s->shape, s->limit, &plan)
                  : tp_plan_make(s->dry, s->model, s->lora, &s->shape, &plan));
    *yes = plan.peak <= s->limit;
    return TP_OK;
}

/* The largest n from 0 to `most`, in steps, for which n x other fits. */
static tp_status largest(struct search *s, int64_t other, bool n_is_batch, int64_t step, int64_t most, int64_t *n)
{
    int64_t low = 0, high = most / step + 1; /* in steps: low fits, high does not */
    for (int64_t at = 1; high - low > 1; at = low > 0 && 2 * low < high ? 2 * low : (low + high) / 2) {
        bool yes;
        TP_TRY(n_is_batch ? fits(s, at * step, other, &yes) : fits(s, other, at * step, &yes));
        if (yes)
            low = at;
        else
            high = at;
    }
    *n = low * step;
    return TP_OK;
}

tp_status tp_plan_largest(tp_ctx *dry, tp_model *model, tp_lora *lora, const tp_plan_shape *shape, bool fit, uint64_t limit,
                          int64_t batch, int64_t length, int64_t longest, tp_plan *plan)
{
    struct search s = {dry, model, lora, *shape, fit, limit};
    tp_plan smallest;
    TP_TRY(fit ? tp_plan_fit(dry, model, lora, shape, 0, &smallest) : tp_plan_make(dry, model, lora, shape, &smallest));
    plan->least = smallest.peak;
    TP_TRY(largest(&s, length, true, 1, BATCH_MOST, &plan->largest_batch));
    return largest(&s, batch, false, longest < 64 ? 1 : 64, longest, &plan->largest_length);
}

uint64_t tp_plan_smallest_device(const tp_plan *plan)
{
    static const uint64_t gib[] = {1,  2,  4,  6,  8,   11,  12,  16,  20,  24,  32, 40,
                                   48, 64, 80, 96, 128, 141, 180, 192, 256, 288, 512};
    for (size_t i = 0; i < sizeof gib / sizeof *gib; i++)
        if (plan->least <= (gib[i] << 30) / 10 * 9) return gib[i] << 30;
    return 0;
}

static const struct {
    const char *name;
    size_t offset;
} categories[] = {
    {"weights", offsetof(tp_plan, weights)},
    {"adapter", offsetof(tp_plan, adapter)},
    {"gradients", offsetof(tp_plan, gradients)},
    {"optimizer", offsetof(tp_plan, optimizer)},
    {"activations", offsetof(tp_plan, activations)},
    {"batch", offsetof(tp_plan, batch)},
    {"workspace", offsetof(tp_plan, workspace)},
    {"samples", offsetof(tp_plan, samples)},
    {"save", offsetof(tp_plan, save)},
    {"recordings", offsetof(tp_plan, recordings)},
    {"host", offsetof(tp_plan, host)},
};

static uint64_t category(const tp_plan *plan, size_t i)
{
    return *(const uint64_t *)(const void *)((const char *)plan + categories[i].offset);
}

void tp_plan_write_json(const tp_plan *plan, tp_buf *out)
{
    tp_buf_printf(out, "{\"peak_bytes\": %llu, \"by_category\": {", (unsigned long long)plan->peak);
    for (size_t i = 0; i < sizeof categories / sizeof *categories; i++)
        tp_buf_printf(out, "%s\"%s\": %llu", i > 0 ? ", " : "", categories[i].name, (unsigned long long)category(plan, i));
    tp_buf_printf(out, "}, \"flops_per_step\": %.0f, \"seconds_per_step\": ", plan->flops_f32 + plan->flops_narrow);
    if (plan->seconds_per_step > 0)
        tp_buf_printf(out, "%.4g", plan->seconds_per_step);
    else
        tp_buf_text(out, "null");
    tp_buf_printf(out,
                  ", \"trained_parameters\": %lld, \"parameters\": %lld, \"rows\": %lld, \"recompute_every\": %d, "
                  "\"remade_layers\": %d, \"remade_gates\": %d, \"recomputed_layers\": %d, \"deterministic\": %s, "
                  "\"largest_micro_batch\": %lld, \"largest_seq_length\": %lld, \"least_bytes\": %llu, "
                  "\"smallest_device_bytes\": %llu}\n",
                  (long long)plan->trained_parameters, (long long)plan->all_parameters, (long long)plan->shape.rows,
                  plan->shape.recompute_every, plan->shape.remade_layers, plan->shape.remade_gates,
                  plan->shape.recomputed_layers, plan->shape.any_order ? "false" : "true", (long long)plan->largest_batch,
                  (long long)plan->largest_length, (unsigned long long)plan->least,
                  (unsigned long long)(plan->least > 0 ? tp_plan_smallest_device(plan) : 0));
}

void tp_plan_write_memory(const tp_plan *plan, tp_buf *out)
{
    char text[32];
    tp_buf_printf(out, "memory %s:", tp_format_bytes(plan->peak, text));
    for (size_t i = 0; i < sizeof categories / sizeof *categories; i++)
        if (i == 0 || category(plan, i) > 0)
            tp_buf_printf(out, "%s %s %s", i > 0 ? "," : "", categories[i].name, tp_format_bytes(category(plan, i), text));
}

void tp_plan_write_text(const tp_plan *plan, tp_buf *out)
{
    tp_buf_printf(out, "trains %lld of %lld parameters (%.3f %%)\n", (long long)plan->trained_parameters,
                  (long long)plan->all_parameters,
                  plan->all_parameters > 0 ? 100.0 * (double)plan->trained_parameters / (double)plan->all_parameters : 0.0);
    tp_plan_write_memory(plan, out);
    tp_buf_printf(out, "\n%.4g TFLOP a step of up to %lld tokens", (plan->flops_f32 + plan->flops_narrow) * 1e-12,
                  (long long)(plan->shape.rows * plan->shape.accumulation));
    if (plan->seconds_per_step > 0) tp_buf_printf(out, ", about %.3g s", plan->seconds_per_step);
    const tp_plan_shape *shape = &plan->shape;
    if (shape->remade_layers > 0)
        tp_buf_printf(out, "; in %d blocks norms and SwiGLU are computed again", shape->remade_layers);
    if (shape->remade_gates > 0) tp_buf_printf(out, ", gate and up in %d", shape->remade_gates);
    if (shape->recomputed_layers > 0) tp_buf_printf(out, "; %d blocks recomputed", shape->recomputed_layers);
    if (shape->recomputed_rows > 0) tp_buf_printf(out, ", %lld tokens at a time", (long long)shape->recomputed_rows);
    if (shape->parked_inputs) tp_buf_text(out, ", their inputs kept in host memory");
    if (shape->remade_layers == 0 && shape->recomputed_layers == 0)
        tp_buf_printf(out, "; %s",
                      shape->recompute_every == 0   ? "no recomputation"
                      : shape->recompute_every == 1 ? "every block recomputed"
                                                    : "blocks recomputed in groups");
    if (shape->any_order) tp_buf_text(out, "; not deterministic");
    tp_buf_char(out, '\n');
    if (plan->largest_batch > 0 || plan->largest_length > 0)
        tp_buf_printf(
            out,
            "fits: micro_batch_size up to %lld at this max_seq_length, max_seq_length up to %lld at this micro_batch_size\n",
            (long long)plan->largest_batch, (long long)plan->largest_length);
    char least[32], device[32];
    if (plan->least == 0) return;
    tp_buf_printf(out, "at least %s", tp_format_bytes(plan->least, least));
    uint64_t smallest = tp_plan_smallest_device(plan);
    if (smallest > 0) tp_buf_printf(out, ": a device of %s would do", tp_format_bytes(smallest, device));
    tp_buf_char(out, '\n');
}
