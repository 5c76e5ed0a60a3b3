/* Recording, the reverse sweep, and who owns what in between.
 *
 * Values and gradients are counted blocks of the step arena (tp_storage). A record holds its outputs; when the sweep has run
 * its backward, every later user of those outputs has run too, so values and gradients are given back at once. That keeps
 * the peak near "all activations plus a few gradients" without any planning by the ops. */
#include "autograd/tape.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "autograd/op.h"
#include "autograd/park.h"
#include "base/mem.h"

#define SCOPE_BYTES      256
#define SCOPE_DEPTH      16
#define HOST_CHUNK_BYTES ((size_t)256 << 10)

struct tp_storage {
    void *data;
    size_t bytes;
    size_t live_index;
    int users;
};

struct tp_tape {
    tp_ctx *ctx;
    tp_status status;
    tp_dtype precision;
    int64_t room;
    tp_pool pool;
    tp_arena host; /* tensors, records, storages, scope texts */
    tp_record **records;
    size_t n_records, records_capacity;
    tp_storage **live; /* in order of creation; NULL: released */
    size_t n_live, live_capacity;
    int no_grad;
    bool again;   /* a segment is run for the sweep */
    bool parking; /* inputs of recomputed segments go to host memory */
    tp_park park;
    const tp_step_state *state;
    int64_t row; /* of the batch, where the rows at hand begin */
    char scope[SCOPE_BYTES];
    size_t scope_starts[SCOPE_DEPTH];
    int scope_depth;
    const char *scope_text; /* copy of scope in the host arena; NULL: changed since */
};

tp_status tp_tape_new(tp_ctx *ctx, size_t capacity, tp_dtype precision, tp_tape **result)
{
    tp_tape *tape = tp_alloc(ctx, 1, sizeof *tape);
    if (tape == NULL) return TP_NOMEM;
    tape->ctx = ctx;
    tape->precision = precision;
    tp_arena_init(&tape->host, HOST_CHUNK_BYTES);
    tp_status status = tp_pool_open(ctx, &tape->pool, capacity);
    if (status != TP_OK) {
        tp_tape_free(tape);
        return status;
    }
    *result = tape;
    return TP_OK;
}

void tp_tape_free(tp_tape *tape)
{
    if (tape == NULL) return;
    tp_pool_close(&tape->pool);
    tp_park_free(&tape->park);
    tp_arena_free(&tape->host);
    tp_free(tape->records);
    tp_free(tape->live);
    tp_free(tape);
}

void tp_tape_reset(tp_tape *tape)
{
    tp_pool_reset(&tape->pool);
    tp_arena_reset(&tape->host);
    tape->n_records = tape->n_live = 0;
    tape->status = TP_OK;
    tape->no_grad = 0;
    tape->park.n = 0;
    tape->row = 0;
    tape->scope_depth = 0;
    tape->scope[0] = '\0';
    tape->scope_text = NULL;
}

tp_status tp_tape_status(const tp_tape *tape)
{
    return tape->status;
}
tp_dtype tp_tape_precision(const tp_tape *tape)
{
    return tape->precision;
}
tp_ctx *tp_tape_ctx(tp_tape *tape)
{
    return tape->ctx;
}
void tp_tape_set_room(tp_tape *tape, int64_t columns)
{
    tape->room = columns;
}
size_t tp_tape_peak(const tp_tape *tape)
{
    return tape->pool.peak;
}
void tp_tape_set_state(tp_tape *tape, const tp_step_state *state)
{
    tape->state = state;
}
const tp_step_state *tp_tape_state(const tp_tape *tape)
{
    return tape->state;
}
uint64_t tp_tape_trace(const tp_tape *tape)
{
    return tape->pool.trace;
}
void tp_tape_note_places(tp_tape *tape)
{
    tape->pool.notes = true;
}
const tp_place *tp_tape_places(const tp_tape *tape, size_t *n)
{
    *n = tape->pool.n_noted;
    return tape->pool.noted;
}
void tp_tape_follow_places(tp_tape *tape, const tp_place *places, size_t n)
{
    tp_pool_follow(&tape->pool, places, n);
}
void tp_tape_set_parking(tp_tape *tape, bool parking)
{
    tape->parking = parking;
}
bool tp_tape_again(const tp_tape *tape)
{
    return tape->again;
}

int64_t tp_tape_row(const tp_tape *tape)
{
    return tape->row;
}
void tp_tape_no_grad_begin(tp_tape *tape)
{
    tape->no_grad++;
}
void tp_tape_no_grad_end(tp_tape *tape)
{
    tape->no_grad--;
}
bool tp_tape_recording(const tp_tape *tape)
{
    return tape->no_grad == 0;
}

/* ---- scopes and errors ---- */

void tp_tape_scope_begin(tp_tape *tape, const char *format, ...)
{
    size_t used = strlen(tape->scope);
    if (tape->scope_depth < SCOPE_DEPTH) tape->scope_starts[tape->scope_depth] = used;
    tape->scope_depth++;
    if (tape->scope_depth > SCOPE_DEPTH || used + 2 >= SCOPE_BYTES) return;
    if (used > 0) tape->scope[used++] = '.';
    va_list args;
    va_start(args, format);
    vsnprintf(tape->scope + used, SCOPE_BYTES - used, format, args);
    va_end(args);
    tape->scope_text = NULL;
}

void tp_tape_scope_end(tp_tape *tape)
{
    if (tape->scope_depth == 0) return; /* the tape was reset inside the scope */
    tape->scope_depth--;
    if (tape->scope_depth < SCOPE_DEPTH) tape->scope[tape->scope_starts[tape->scope_depth]] = '\0';
    tape->scope_text = NULL;
}

static tp_status fail_at(tp_tape *tape, const char *scope, const char *op, tp_status status)
{
    if (tape->status == TP_OK) {
        tape->status = status;
        if (scope != NULL && scope[0] != '\0')
            tp_fail_in(tape->ctx, "%s: %s", scope, op);
        else
            tp_fail_in(tape->ctx, "%s", op);
    }
    return tape->status;
}

void *tp_op_fail(tp_tape *tape, const char *op, tp_status status, const char *format, ...)
{
    if (tape->status != TP_OK) return NULL;
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    tp_fail(tape->ctx, status, "%s", text);
    fail_at(tape, tape->scope, op, status);
    return NULL;
}

bool tp_op_ok(tp_tape *tape, const char *op, tp_status status)
{
    if (status != TP_OK) fail_at(tape, tape->scope, op, status);
    return tape->status == TP_OK;
}

bool tp_op_begin(tp_tape *tape, const char *op, const tp_tensor *const *inputs, int n)
{
    if (tape->status != TP_OK) return false;
    for (int i = 0; i < n; i++) {
        if (inputs[i] == NULL) {
            tp_op_fail(tape, op, TP_INTERNAL, "input %d is missing", i);
            return false;
        }
    }
    return true;
}

/* ---- storage ---- */

static tp_storage *new_storage(tp_tape *tape, size_t bytes)
{
    tp_storage *storage = tp_arena_alloc(tape->ctx, &tape->host, 1, sizeof *storage);
    if (storage == NULL) return NULL;
    if (tp_grow(tape->ctx, &tape->live, &tape->live_capacity, tape->n_live + 1, sizeof *tape->live) != TP_OK) return NULL;
    storage->data = tp_pool_alloc(tape->ctx, &tape->pool, bytes);
    if (storage->data == NULL) return NULL;
    storage->bytes = bytes;
    storage->users = 1;
    storage->live_index = tape->n_live;
    tape->live[tape->n_live++] = storage;
    return storage;
}

static void release(tp_tape *tape, tp_storage *storage)
{
    if (storage == NULL || --storage->users > 0) return;
    tp_pool_free(&tape->pool, storage->data, storage->bytes);
    storage->data = NULL;
    tape->live[storage->live_index] = NULL;
    while (tape->n_live > 0 && tape->live[tape->n_live - 1] == NULL) tape->n_live--;
}

tp_storage *tp_op_alloc(tp_tape *tape, const char *op, size_t bytes)
{
    if (tape->status != TP_OK) return NULL;
    tp_storage *storage = new_storage(tape, bytes);
    if (storage == NULL) fail_at(tape, tape->scope, op, TP_NOMEM);
    return storage;
}

void *tp_storage_data(const tp_storage *storage)
{
    return storage->data;
}
void tp_op_release(tp_tape *tape, tp_storage *storage)
{
    release(tape, storage);
}

size_t tp_tape_mark(const tp_tape *tape)
{
    return tape->n_live;
}

void tp_tape_rewind(tp_tape *tape, size_t mark, const tp_tensor *keep)
{
    for (size_t i = tape->n_live; i > mark; i--) {
        tp_storage *storage = i <= tape->n_live ? tape->live[i - 1] : NULL;
        if (storage == NULL || (keep != NULL && keep->storage == storage)) continue;
        storage->users = 1;
        release(tape, storage);
    }
}

/* ---- tensors ---- */

static tp_tensor *new_tensor(tp_tape *tape, const char *op)
{
    tp_tensor *t = tp_arena_alloc(tape->ctx, &tape->host, 1, sizeof *t);
    if (t == NULL) fail_at(tape, tape->scope, op, TP_NOMEM);
    return t;
}

static bool tensor_bytes(tp_dtype dtype, int64_t rows, int64_t ld, size_t *bytes)
{
    int64_t elements, total;
    if (!tp_mul_i64(rows, ld, &elements) || !tp_mul_i64(elements, (int64_t)tp_dtype_bytes(dtype), &total) || total < 0)
        return false;
    *bytes = (size_t)total;
    return true;
}

tp_tensor *tp_op_output(tp_tape *tape, const char *op, tp_dtype dtype, int64_t rows, int64_t cols, bool needs_grad)
{
    size_t bytes;
    int64_t ld = dtype == tape->precision && cols > 1 ? cols + tape->room : cols;
    if (tape->status != TP_OK) return NULL;
    if (!tensor_bytes(dtype, rows, ld, &bytes))
        return tp_op_fail(tape, op, TP_SHAPE, "a result of [%lld, %lld] is too large", (long long)rows, (long long)cols);
    tp_tensor *t = new_tensor(tape, op);
    if (t == NULL) return NULL;
    t->storage = tp_op_alloc(tape, op, bytes);
    if (t->storage == NULL) return NULL;
    t->dtype = dtype;
    t->rows = rows;
    t->cols = cols;
    t->ld = ld;
    t->data = t->storage->data;
    t->needs_grad = needs_grad;
    return t;
}

tp_tensor *tp_op_in_place(tp_tape *tape, const char *op, tp_tensor *x, bool needs_grad)
{
    tp_tensor *t = new_tensor(tape, op);
    if (t == NULL) return NULL;
    *t = (tp_tensor){.dtype = x->dtype,
                     .rows = x->rows,
                     .cols = x->cols,
                     .ld = x->ld,
                     .data = x->data,
                     .needs_grad = needs_grad,
                     .storage = x->storage,
                     .base = x->base};
    if (t->storage != NULL) t->storage->users++;
    return t;
}

tp_tensor *tp_tape_input(tp_tape *tape, tp_dtype dtype, int64_t rows, int64_t cols, void *data, bool needs_grad)
{
    if (tape->status != TP_OK) return NULL;
    tp_tensor *t = new_tensor(tape, "input");
    if (t == NULL) return NULL;
    *t = (tp_tensor){.dtype = dtype, .rows = rows, .cols = cols, .ld = cols, .data = data, .needs_grad = needs_grad};
    return t;
}

void *tp_tape_scratch(tp_tape *tape, size_t count, size_t size)
{
    if (tape->status != TP_OK) return NULL;
    void *memory = tp_arena_alloc(tape->ctx, &tape->host, count, size);
    if (memory == NULL) fail_at(tape, tape->scope, "scratch", TP_NOMEM);
    return memory;
}

/* ---- records and gradients ---- */

void *tp_op_record(tp_tape *tape, const tp_op *op, size_t bytes, tp_tensor *out0, tp_tensor *out1, tp_tensor *out2)
{
    if (tape->status != TP_OK) return NULL;
    if (tape->scope_text == NULL) tape->scope_text = tp_arena_strndup(tape->ctx, &tape->host, tape->scope, strlen(tape->scope));
    tp_record *record = tape->scope_text != NULL ? tp_arena_alloc(tape->ctx, &tape->host, 1, bytes) : NULL;
    if (record == NULL ||
        tp_grow(tape->ctx, &tape->records, &tape->records_capacity, tape->n_records + 1, sizeof *tape->records) != TP_OK) {
        fail_at(tape, tape->scope, op->name, TP_NOMEM);
        return NULL;
    }
    record->op = op;
    record->scope = tape->scope_text;
    record->out[0] = out0;
    record->out[1] = out1;
    record->out[2] = out2;
    for (int i = 0; i < TP_RECORD_OUTPUTS; i++)
        if (record->out[i] != NULL) record->out[i]->maker = record;
    tape->records[tape->n_records++] = record;
    return record;
}

static bool can_remake(const tp_tensor *x)
{
    return x->maker != NULL && x->maker->op->remake != NULL;
}

static void forget(tp_tape *tape, tp_tensor *x)
{
    release(tape, x->storage);
    x->storage = NULL;
    x->data = NULL;
    x->forgotten = true;
}

/* All views of what x is a view of, and that itself, if nothing else shares the memory. */
static void forget_views(tp_tape *tape, tp_tensor *x)
{
    int n = 0;
    if (!can_remake(x) || !can_remake(x->base)) return;
    while (n < TP_RECORD_OUTPUTS && x->maker->out[n] != NULL) n++;
    if (x->storage->users != n + 1) return;
    forget(tape, x->base);
    for (int i = 0; i < n; i++) forget(tape, x->maker->out[i]);
}

void tp_tape_forget(tp_tape *tape, tp_tensor *x)
{
    if (tape->status != TP_OK || x == NULL || !tp_tape_recording(tape)) return;
    if (x->base != NULL)
        forget_views(tape, x);
    else if (can_remake(x) && x->storage->users == 1)
        forget(tape, x);
}

tp_status tp_op_recall(tp_tape *tape, tp_tensor *x)
{
    size_t bytes;
    if (!x->forgotten) return TP_OK;
    if (x->base != NULL) return x->maker->op->remake(tape, x->maker);
    if (!tensor_bytes(x->dtype, x->rows, x->ld, &bytes)) return TP_INTERNAL; /* it fitted before */
    x->storage = tp_op_alloc(tape, x->maker->op->name, bytes);
    if (x->storage == NULL) return tape->status;
    x->data = x->storage->data;
    x->forgotten = false;
    return x->maker->op->remake(tape, x->maker);
}

void tp_op_view_again(tp_tensor *view, int64_t column)
{
    view->storage = view->base->storage;
    view->storage->users++;
    view->data = (char *)view->base->data + (size_t)column * tp_dtype_bytes(view->dtype);
    view->forgotten = false;
}

static bool allocate_grad(tp_tape *tape, tp_tensor *t)
{
    if (t->grad != NULL) return true;
    if (t->base != NULL) {
        if (!allocate_grad(tape, t->base)) return false;
        int64_t column = (int64_t)((char *)t->data - (char *)t->base->data);
        t->grad = (char *)t->base->grad + column;
        return true;
    }
    size_t bytes;
    if (!tensor_bytes(t->dtype, t->rows, t->ld, &bytes)) return false;
    t->grad_storage = tp_op_alloc(tape, "gradient", bytes);
    if (t->grad_storage == NULL) return false;
    t->grad = t->grad_storage->data;
    return true;
}

tp_rows tp_grad_for(tp_tape *tape, tp_tensor *t, bool *accumulate)
{
    if (!allocate_grad(tape, t)) return (tp_rows){0};
    *accumulate = t->grad_written;
    t->grad_written = true;
    return tp_tensor_grad_rows(t);
}

tp_status tp_grad_move(tp_tape *tape, tp_tensor *out, tp_tensor *x)
{
    if (!x->grad_written && x->grad == NULL && x->base == NULL && out->grad_storage != NULL && out->dtype == x->dtype &&
        out->ld == x->ld) {
        x->grad = out->grad;
        x->grad_storage = out->grad_storage;
        x->grad_written = true;
        out->grad = NULL;
        out->grad_storage = NULL;
        return TP_OK;
    }
    if (x->base != NULL && out->base == x->base && out->data == x->data) { /* in place on a view: the same gradient memory */
        x->grad = out->grad;
        x->grad_written = true;
        return TP_OK;
    }
    bool accumulate;
    tp_rows grad = tp_grad_for(tape, x, &accumulate);
    if (grad.data == NULL) return tape->status;
    if (accumulate) {
        tp_add_args add = {.n = x->rows, .dim = x->cols, .x = grad, .y = tp_tensor_grad_rows(out), .z = grad};
        return tp_run_add(tape->ctx, &add);
    }
    tp_scale_args copy = {.n = x->rows, .dim = x->cols, .x = tp_tensor_grad_rows(out), .y = grad, .alpha = 1};
    return tp_run_scale(tape->ctx, &copy);
}

/* ---- the sweep ---- */

static void release_tensor(tp_tape *tape, tp_tensor *t)
{
    release(tape, t->grad_storage);
    release(tape, t->storage);
    t->grad_storage = t->storage = NULL;
    t->grad = t->data = NULL;
}

/* Gradient zeros for outputs that nobody used while others were. */
static tp_status complete_gradients(tp_tape *tape, tp_record *record, bool *any)
{
    *any = false;
    for (int i = 0; i < TP_RECORD_OUTPUTS; i++) *any = *any || (record->out[i] != NULL && record->out[i]->grad_written);
    for (int i = 0; *any && i < TP_RECORD_OUTPUTS; i++) {
        tp_tensor *out = record->out[i];
        if (out == NULL || out->grad_written || !out->needs_grad) continue;
        bool accumulate;
        tp_rows grad = tp_grad_for(tape, out, &accumulate);
        if (grad.data == NULL) return tape->status;
        tp_scale_args zero = {.n = out->rows, .dim = out->cols, .x = grad, .y = grad, .alpha = 0};
        TP_TRY(tp_run_scale(tape->ctx, &zero));
    }
    return TP_OK;
}

static tp_status sweep(tp_tape *tape, size_t down_to)
{
    while (tape->status == TP_OK && tape->n_records > down_to) {
        tp_record *record = tape->records[--tape->n_records];
        bool any;
        tp_status status = complete_gradients(tape, record, &any);
        if (status == TP_OK && any) status = record->op->backward(tape, record);
        if (status != TP_OK) return fail_at(tape, record->scope, record->op->name, status);
        for (int i = 0; i < TP_RECORD_SAVED; i++) release(tape, record->saved[i]);
        for (int i = 0; i < TP_RECORD_OUTPUTS; i++)
            if (record->out[i] != NULL) release_tensor(tape, record->out[i]);
    }
    return tape->status;
}

tp_status tp_tape_backward_from(tp_tape *tape, tp_tensor *out, const void *grad)
{
    if (tape->status != TP_OK) return tape->status;
    if (out == NULL) return tp_fail(tape->ctx, TP_INTERNAL, "backward: nothing to start from");
    if (!out->needs_grad) return sweep(tape, 0);
    bool accumulate;
    tp_rows rows = tp_grad_for(tape, out, &accumulate);
    if (rows.data == NULL) return tape->status;
    size_t bytes = (size_t)out->rows * (size_t)out->cols * tp_dtype_bytes(out->dtype);
    if (!tp_op_ok(tape, "backward", tape->ctx->device->backend->copy_in(tape->ctx, rows.data, grad, bytes)))
        return tape->status;
    return sweep(tape, 0);
}

tp_status tp_tape_backward(tp_tape *tape, tp_tensor *loss)
{
    if (tape->status != TP_OK) return tape->status;
    if (loss == NULL || (loss->maker != NULL && !loss->maker->op->is_loss))
        return tp_fail(tape->ctx, TP_INTERNAL, "backward: there is no loss to start from");
    loss->grad_written = true;
    return sweep(tape, 0);
}

/* ---- segments ---- */

struct segment_record {
    tp_record record;
    tp_segment_fn forward;
    void *state;
    tp_tensor *x;
    const int64_t *ends; /* of slices; NULL: x as a whole */
    int64_t n_slices;
    size_t parked; /* number of x in the park, from 1; 0: stayed */
};

/* ---- inputs that wait in host memory ---- */

/* A value whose copy is out gives its memory back. */
static tp_status settle(tp_tape *tape, tp_parked *parked)
{
    if (parked->state != TP_PARK_LEAVING) return TP_OK;
    TP_TRY(tp_park_wait(tape->ctx, parked));
    release(tape, parked->x->storage);
    parked->x->storage = NULL;
    parked->x->data = NULL;
    parked->state = TP_PARK_AWAY;
    return TP_OK;
}

/* Forward has done with x; the value that left before it is out by now. Returns its number, 0 if it stays. */
static size_t park(tp_tape *tape, tp_tensor *x)
{
    size_t bytes;
    tp_park *park = &tape->park;
    if (!tape->parking || x->storage == NULL || x->storage->users > 1 || !tensor_bytes(x->dtype, x->rows, x->ld, &bytes))
        return 0;
    if (park->n > 0 && !tp_op_ok(tape, "offload", settle(tape, &park->list[park->n - 1]))) return 0;
    return tp_op_ok(tape, "offload", tp_park_leave(tape->ctx, park, x, bytes)) ? park->n : 0;
}

static tp_status fetch(tp_tape *tape, tp_parked *parked)
{
    if (parked->state != TP_PARK_AWAY) return TP_OK;
    parked->x->storage = tp_op_alloc(tape, "offload", parked->bytes);
    if (parked->x->storage == NULL) return tape->status;
    parked->x->data = parked->x->storage->data;
    return tp_park_return(tape->ctx, parked);
}

/* Brings value `number` back, and sends for the one that the sweep needs next. */
static tp_status unpark(tp_tape *tape, size_t number)
{
    if (number == 0) return TP_OK;
    tp_parked *parked = &tape->park.list[number - 1];
    TP_TRY(fetch(tape, parked));
    if (parked->state == TP_PARK_COMING) TP_TRY(tp_park_wait(tape->ctx, parked));
    parked->state = TP_PARK_HERE;
    return number > 1 ? fetch(tape, &tape->park.list[number - 2]) : TP_OK;
}

/* ---- recomputing ---- */

/* Rows first .. end - 1 of x as an input of their own. */
static tp_tensor *slice_of(tp_tape *tape, const tp_tensor *x, int64_t first, int64_t end)
{
    tp_rows rows = tp_rows_from(tp_tensor_rows(x), first, 0);
    tp_tensor *slice = tp_tape_input(tape, x->dtype, end - first, x->cols, rows.data, x->needs_grad);
    if (slice != NULL) slice->ld = x->ld;
    return slice;
}

/* Rows first .. end - 1 of the segment again, with gradients, on a detached handle of x's rows. */
static tp_tensor *run_again(tp_tape *tape, const struct segment_record *r, int64_t first, int64_t end, tp_tensor **result)
{
    int64_t row_now = tape->row;
    tp_tensor *x = slice_of(tape, r->x, first, end);
    if (x == NULL) return NULL;
    tape->row = first;
    tape->again = true;
    *result = r->forward(tape, r->state, x);
    tape->again = false;
    tape->row = row_now;
    return tape->status == TP_OK && *result != NULL ? x : NULL;
}

/* Runs the segment again, sweeps just that part, and hands x its gradient. */
static tp_status whole_backward(tp_tape *tape, struct segment_record *r)
{
    tp_tensor *out = r->record.out[0], *again;
    size_t first = tape->n_records;
    tp_tensor *x = run_again(tape, r, 0, r->x->rows, &again);
    if (x == NULL) return tape->status != TP_OK ? tape->status : TP_INTERNAL;
    TP_TRY(tp_grad_move(tape, out, again));
    TP_TRY(sweep(tape, first));
    if (!tp_wants_grad(r->x)) return TP_OK;
    if (!x->grad_written) return TP_OK;
    TP_TRY(tp_grad_move(tape, x, r->x));
    release(tape, x->grad_storage);
    return TP_OK;
}

/* The gradient of x's rows from `first` on, out of a slice. */
static tp_status collect(tp_tape *tape, tp_tensor *slice, tp_rows dx, int64_t first, bool accumulate)
{
    tp_rows to = tp_rows_from(dx, first, 0), from = tp_tensor_grad_rows(slice);
    tp_add_args add = {.n = slice->rows, .dim = slice->cols, .x = to, .y = from, .z = to};
    tp_scale_args copy = {.n = slice->rows, .dim = slice->cols, .x = from, .y = to, .alpha = slice->grad_written ? 1 : 0};
    if (!slice->grad_written && accumulate) return TP_OK;
    if (!slice->grad_written) copy.x = to; /* zeros, without reading */
    TP_TRY(accumulate ? tp_run_add(tape->ctx, &add) : tp_run_scale(tape->ctx, &copy));
    release(tape, slice->grad_storage);
    return TP_OK;
}

static tp_status sliced_backward(tp_tape *tape, struct segment_record *r)
{
    tp_tensor *out = r->record.out[0];
    bool accumulate = false;
    tp_rows dx = {0};
    if (tp_wants_grad(r->x)) {
        dx = tp_grad_for(tape, r->x, &accumulate);
        if (dx.data == NULL) return tape->status;
    }
    for (int64_t s = 0, first = 0; s < r->n_slices; first = r->ends[s++]) {
        tp_tensor *again;
        size_t mark = tape->n_records;
        tp_tensor *x = run_again(tape, r, first, r->ends[s], &again);
        if (x == NULL) return tape->status != TP_OK ? tape->status : TP_INTERNAL;
        bool unused;
        tp_rows to = tp_grad_for(tape, again, &unused);
        tp_scale_args copy = {.n = again->rows, .dim = again->cols, .y = to, .alpha = 1};
        copy.x = tp_rows_from(tp_tensor_grad_rows(out), first, 0);
        if (to.data == NULL) return tape->status;
        TP_TRY(tp_run_scale(tape->ctx, &copy));
        TP_TRY(sweep(tape, mark));
        if (dx.data != NULL) TP_TRY(collect(tape, x, dx, first, accumulate));
    }
    return TP_OK;
}

static tp_status segment_backward(tp_tape *tape, tp_record *base)
{
    struct segment_record *r = (struct segment_record *)base;
    TP_TRY(unpark(tape, r->parked));
    return r->n_slices > 1 ? sliced_backward(tape, r) : whole_backward(tape, r);
}

static const tp_op segment_op = {.name = "segment", .backward = segment_backward};

/* y without a record, and without values in between. */
static tp_tensor *forward_once(tp_tape *tape, tp_segment_fn forward, void *state, tp_tensor *x)
{
    size_t mark = tp_tape_mark(tape);
    tp_tape_no_grad_begin(tape);
    tp_tensor *y = forward(tape, state, x);
    tp_tape_no_grad_end(tape);
    if (tape->status != TP_OK || y == NULL) return NULL;
    tp_tape_rewind(tape, mark, y);
    return y;
}

/* The same slice by slice into a y of x's shape. */
static tp_tensor *forward_slices(tp_tape *tape, tp_segment_fn forward, void *state, tp_tensor *x, const int64_t *ends,
                                 int64_t n)
{
    int64_t row_now = tape->row;
    tp_tensor *y = tp_op_output(tape, segment_op.name, x->dtype, x->rows, x->cols, false);
    for (int64_t s = 0, first = 0; y != NULL && s < n; first = ends[s++]) {
        size_t mark = tp_tape_mark(tape);
        tp_tensor *rows = slice_of(tape, x, first, ends[s]);
        if (rows == NULL) return NULL;
        tape->row = first;
        tp_tensor *part = forward_once(tape, forward, state, rows);
        tape->row = row_now;
        if (part == NULL) return NULL;
        tp_scale_args copy = {.n = part->rows, .dim = part->cols, .x = tp_tensor_rows(part), .alpha = 1};
        copy.y = tp_rows_from(tp_tensor_rows(y), first, 0);
        if (!tp_op_ok(tape, segment_op.name, tp_run_scale(tape->ctx, &copy))) return NULL;
        y->needs_grad = y->needs_grad || part->needs_grad;
        tp_tape_rewind(tape, mark, NULL);
    }
    return y;
}

static tp_tensor *segment(tp_tape *tape, tp_segment_fn forward, void *state, tp_tensor *x, const int64_t *ends, int64_t n)
{
    tp_tensor *y = n > 1 ? forward_slices(tape, forward, state, x, ends, n) : forward_once(tape, forward, state, x);
    if (y == NULL || !tp_tape_recording(tape) || !y->needs_grad) return y;
    struct segment_record *r = tp_op_record(tape, &segment_op, sizeof *r, y, NULL, NULL);
    if (r == NULL) return NULL;
    r->forward = forward;
    r->state = state;
    r->x = x;
    r->ends = ends;
    r->n_slices = n;
    r->parked = park(tape, x);
    return tape->status == TP_OK ? y : NULL;
}

tp_tensor *tp_tape_segment(tp_tape *tape, tp_segment_fn forward, void *state, tp_tensor *x, bool recompute)
{
    const tp_tensor *inputs[] = {x};
    if (!tp_op_begin(tape, segment_op.name, inputs, 1)) return NULL;
    if (tp_tape_recording(tape) && !recompute) return forward(tape, state, x);
    return segment(tape, forward, state, x, NULL, 1);
}

tp_tensor *tp_tape_sliced_segment(tp_tape *tape, tp_segment_fn forward, void *state, tp_tensor *x, const int64_t *ends,
                                  int64_t n)
{
    const tp_tensor *inputs[] = {x};
    if (!tp_op_begin(tape, segment_op.name, inputs, 1)) return NULL;
    if (n < 1 || ends[n - 1] != x->rows)
        return tp_op_fail(tape, segment_op.name, TP_SHAPE, "%lld slices that end at row %lld, x has %lld", (long long)n,
                          n > 0 ? (long long)ends[n - 1] : 0LL, (long long)x->rows);
    return segment(tape, forward, state, x, ends, n);
}
