/* y = x W^T + bias + residual + sum_i s_i B_i A_i x, every low-rank part i for its own columns of y
 *
 *   [ x | u ] [ W | s B ]^T            u = x A^T               behind x in memory; a copy is saved, [N, used]
 *   [ dy | du ] [ W ; A ]              du_i = dy_i s_i B_i    behind dy
 *   dB_i = s_i dy_i^T u_i,   dA = du^T x
 * W is stacked from the weights of all parts, A from their factors one below the other, and B lies in blocks: where a part's
 * rows meet the columns of another there are zeros. So one product serves all parts in each direction, and the adapters are
 * `used` more terms of its sums instead of passes over y and dx (Hu et al. 2021, arXiv:2106.09685, reads the same).
 *
 * Behind dropout every part sees an x of its own: u_i = d_i(x) A_i^T still stands behind x, but what comes back through A,
 * sum_i d_i(du_i A_i), is added to dx by a pass of its own, and dA_i = du_i^T d_i(x) is made part by part (tp_dropped_args). */
#include "autograd/op.h"
#include "autograd/ops.h"
#include "autograd/ops/factors.h"
#include "backend/lowrank.h"

struct joint_record {
    tp_record record;
    tp_tensor *x;
    tp_joint_spec spec;
    tp_tensor bias;
    tp_lowrank terms[TP_JOINT_PARTS];
    int64_t used; /* columns of the room */
    bool through; /* what passes through B has been made */
    int64_t row;  /* of the batch, where x begins: dropout counts from there */
};

static const char op_name[] = "joint_linear";

/* rows x cols of the stacked weight, from (row, col) on. */
static tp_matrix corner(const tp_matrix *w, int64_t row, int64_t col, int64_t rows, int64_t cols)
{
    tp_matrix part = *w;
    size_t bytes = (size_t)tp_formats[w->format].block_bytes;
    part.data = (const char *)w->data + (size_t)(row * w->stride + col) * bytes;
    part.rows = rows;
    part.cols = cols;
    return part;
}

static tp_status copy(tp_tape *tape, int64_t n, int64_t dim, tp_rows from, tp_rows to)
{
    tp_scale_args args = {.n = n, .dim = dim, .x = from, .y = to, .alpha = 1};
    return tp_run_scale(tp_tape_ctx(tape), &args);
}

static int64_t used_room(const tp_joint_spec *spec)
{
    int64_t used = 0;
    for (int i = 0; i < spec->n_parts; i++)
        if (spec->parts[i].term != NULL) used += spec->parts[i].term->a->rows;
    return used;
}

/* The factors into the margin of the weight. */
static tp_status pack(tp_tape *tape, const tp_joint_spec *spec, int64_t used)
{
    tp_pack_lowrank_args args = {.out = spec->weight->rows, .in = spec->weight->cols, .used = used};
    args.w = (tp_rows){(void *)(uintptr_t)spec->weight->data, tp_tape_precision(tape), spec->weight->stride};
    for (int i = 0; i < spec->n_parts; i++) {
        const tp_lowrank *term = spec->parts[i].term;
        args.rows[i] = spec->parts[i].rows;
        if (term == NULL) continue;
        args.rank[i] = term->a->rows;
        args.a[i] = term->a->data;
        args.b[i] = term->b->data;
        args.scaling[i] = term->scaling;
    }
    return tp_run_pack_lowrank(tp_tape_ctx(tape), &args);
}

/* ---- dropout ---- */

static bool drops(const tp_joint_spec *spec)
{
    for (int i = 0; i < spec->n_parts; i++)
        if (spec->parts[i].term != NULL && spec->parts[i].term->dropout > 0) return true;
    return false;
}

static tp_dropped_args dropped(tp_tape *tape, const tp_joint_spec *spec, int64_t n, int64_t row, tp_rows low)
{
    const tp_matrix *w = spec->weight;
    tp_dropped_args args = {.n = n, .in = w->cols, .low = low, .first_row = row, .state = tp_tape_state(tape)};
    args.a = (tp_rows){(void *)(uintptr_t)corner(w, w->rows, 0, 0, 0).data, low.dtype, w->stride};
    for (int i = 0; i < spec->n_parts; i++) {
        const tp_lowrank *term = spec->parts[i].term;
        if (term == NULL) continue;
        args.rank[i] = term->a->rows;
        args.p[i] = term->dropout;
        args.key[i] = (tp_rng_key){tp_tape_ctx(tape)->seed, TP_STREAM_DROPOUT + term->site, 0};
        args.da[i] = tp_wants_grad(term->a) ? term->a->grad : NULL;
    }
    return args;
}

/* Whether the device masks in its products; else there is scratch of x's size. */
static bool masks_in_products(tp_tape *tape, const tp_dropped_args *args, const tp_joint_spec *spec)
{
    bool aligned = args->low.ld % 8 == 0 && spec->weight->rows % 8 == 0;
    return aligned && tp_drops_in_products(tp_tape_ctx(tape)->device, args->low.dtype, args->in, args->rank);
}

static tp_status run_dropped(tp_tape *tape, tp_dropped_args *args, const tp_joint_spec *spec,
                             tp_status (*run)(tp_ctx *, const tp_dropped_args *))
{
    tp_storage *scratch = NULL;
    if (!masks_in_products(tape, args, spec)) {
        scratch = tp_op_alloc(tape, op_name, (size_t)(args->n * args->in) * tp_dtype_bytes(args->low.dtype));
        if (scratch == NULL) return tp_tape_status(tape);
        args->scratch = (tp_rows){tp_storage_data(scratch), args->low.dtype, args->in};
    }
    tp_status status = run(tp_tape_ctx(tape), args);
    tp_op_release(tape, scratch);
    return status;
}

/* Room for the masks of a recorded pass; *masks NULL where none are kept. */
static bool open_masks(tp_tape *tape, const tp_tensor *x, const tp_joint_spec *spec, tp_storage **masks)
{
    int64_t parts = 0;
    *masks = NULL;
    if (!drops(spec)) return true;
    tp_dropped_args args = dropped(tape, spec, x->rows, 0, tp_tensor_rows(x));
    if (!masks_in_products(tape, &args, spec)) return true;
    for (int i = 0; i < TP_PACKED_PARTS; i++) parts += args.rank[i] > 0;
    *masks = tp_op_alloc(tape, op_name, (size_t)(parts * args.n) * (size_t)(args.in / 8));
    return *masks != NULL;
}

static tp_status down(tp_tape *tape, const tp_tensor *x, const tp_joint_spec *spec, int64_t used, tp_storage *masks, tp_rows u)
{
    const tp_matrix *w = spec->weight;
    if (drops(spec)) {
        tp_dropped_args args = dropped(tape, spec, x->rows, tp_tape_row(tape), u);
        args.x = tp_tensor_rows(x);
        args.masks = masks != NULL ? tp_storage_data(masks) : NULL;
        return run_dropped(tape, &args, spec, tp_run_dropped_down);
    }
    tp_matmul_args product = {.n = x->rows, .m = used, .k = x->cols, .a = tp_tensor_rows(x), .nt = true, .c = u, .alpha = 1};
    product.b = corner(w, w->rows, 0, used, w->cols);
    return tp_op_product(tape, product);
}

/* u behind x, and a copy of it in `low`. */
static tp_status pass_down(tp_tape *tape, const tp_tensor *x, const tp_joint_spec *spec, int64_t used, tp_storage *masks,
                           tp_rows low)
{
    tp_rows u = tp_rows_from(tp_tensor_rows(x), 0, x->cols);
    if (used == 0) return TP_OK;
    if (!tp_tape_again(tape)) TP_TRY(pack(tape, spec, used)); /* else they are there since the forward pass */
    TP_TRY(down(tape, x, spec, used, masks, u));
    return low.data != NULL ? copy(tape, x->rows, used, u, low) : TP_OK;
}

/* y, with u behind x if there are columns of room. */
static tp_status multiply(tp_tape *tape, const tp_tensor *x, const tp_joint_spec *spec, int64_t used, tp_rows y)
{
    const tp_matrix *w = spec->weight;
    tp_matmul_args large = {.n = x->rows,
                            .m = w->rows,
                            .k = w->cols + used,
                            .a = tp_tensor_rows(x),
                            .b = corner(w, 0, 0, w->rows, w->cols + used),
                            .nt = true,
                            .c = y,
                            .alpha = 1,
                            .bias = spec->bias != NULL ? spec->bias->data : NULL,
                            .residual = spec->residual != NULL ? spec->residual->data : NULL,
                            .residual_ld = spec->residual != NULL ? spec->residual->ld : 0};
    return tp_op_product(tape, large);
}

/* ---- backward ---- */

/* rows of A's gradient, from so many columns of du. */
static tp_status tn(tp_tape *tape, tp_tensor *x, int64_t rows, tp_rows du, float *grad)
{
    TP_TRY(tp_op_recall(tape, x));
    tp_matmul_tn_args args = {
        .n = x->rows, .m = rows, .k = x->cols, .a = du, .b = tp_tensor_rows(x), .c = grad, .alpha = 1, .beta = 1};
    return tp_run_matmul_tn(tp_tape_ctx(tape), &args);
}

/* du and dB of every part, from its own columns of dy. */
static tp_lowrank_backward_args through_b(const struct joint_record *r)
{
    const tp_matrix *w = r->spec.weight;
    tp_tensor *y = r->record.out[0];
    tp_lowrank_backward_args args = {.n = r->x->rows, .dy = tp_tensor_grad_rows(y)};
    args.du = tp_rows_from(args.dy, 0, y->cols);
    args.u = (tp_rows){tp_storage_data(r->record.saved[0]), y->dtype, r->used};
    args.b = (tp_rows){(void *)(uintptr_t)corner(w, 0, w->cols, 0, 0).data, y->dtype, w->stride};
    for (int i = 0; i < r->spec.n_parts; i++) {
        const tp_lowrank *term = r->spec.parts[i].term;
        args.rows[i] = r->spec.parts[i].rows;
        if (term == NULL) continue;
        args.rank[i] = term->a->rows;
        args.db[i] = tp_wants_grad(term->b) ? term->b->grad : NULL;
        args.scaling[i] = term->scaling;
    }
    return args;
}

/* Gradients that lie behind each other are one product, which reads x once. */
static tp_status grad_a(tp_tape *tape, const struct joint_record *r, tp_rows du)
{
    float *start = NULL;
    int64_t rows = 0, column = 0, in = r->x->cols;
    for (int i = 0; i <= r->spec.n_parts; i++) {
        const tp_lowrank *term = i < r->spec.n_parts ? r->spec.parts[i].term : NULL;
        bool wanted = term != NULL && tp_wants_grad(term->a), last = i == r->spec.n_parts;
        if (!wanted && !last && term == NULL) continue;
        if (rows > 0 && !(wanted && (float *)term->a->grad == start + rows * in)) {
            TP_TRY(tn(tape, r->x, rows, tp_rows_from(du, 0, column), start));
            column += rows;
            rows = 0;
        }
        if (last) break;
        if (!wanted) {
            column += term->a->rows;
            continue;
        }
        if (rows == 0) start = term->a->grad;
        rows += term->a->rows;
    }
    return TP_OK;
}

/* x that was forgotten, and whose op makes it again anyway, meets du there. du stays where it is: in dy, which the residual
 * takes over as its own gradient, and there is nothing between this record and that of x. */
static bool later(const struct joint_record *r, tp_rows du)
{
    const tp_lowrank *term = r->spec.parts[0].term;
    const tp_tensor *residual = r->spec.residual, *y = r->record.out[0];
    if (!r->x->forgotten || drops(&r->spec) || r->spec.n_parts != 1 || !tp_wants_grad(term->a) || !tp_wants_grad(r->x))
        return false;
    if (!tp_wants_grad(residual) || residual->grad != NULL || residual->base != NULL || residual->dtype != y->dtype ||
        residual->ld != y->ld || y->grad_storage == NULL)
        return false;
    tp_matmul_tn_args args = {
        .n = r->x->rows, .m = term->a->rows, .k = r->x->cols, .a = du, .c = term->a->grad, .alpha = 1, .beta = 1};
    return tp_swiglu_behind(r->x, &args);
}

/* What comes back through A and dropout: into dx (data NULL: nobody wants it) and dA. */
static tp_status dropped_backward(tp_tape *tape, const struct joint_record *r, tp_rows du, tp_rows dx)
{
    bool wanted = false;
    tp_dropped_args args = dropped(tape, &r->spec, r->x->rows, r->row, du);
    tp_storage *masks = r->record.saved[1];
    args.masks = masks != NULL ? tp_storage_data(masks) : NULL;
    args.dx = dx;
    if (dx.data != NULL) TP_TRY(run_dropped(tape, &args, &r->spec, tp_run_dropped_up));
    for (int i = 0; i < TP_PACKED_PARTS; i++) wanted = wanted || args.da[i] != NULL;
    if (!wanted) return TP_OK;
    TP_TRY(tp_op_recall(tape, r->x));
    args.x = tp_tensor_rows(r->x);
    return run_dropped(tape, &args, &r->spec, tp_run_dropped_gradient);
}

static tp_status joint_backward(tp_tape *tape, tp_record *base)
{
    struct joint_record *r = (struct joint_record *)base;
    const tp_matrix *w = r->spec.weight;
    tp_tensor *y = base->out[0];
    tp_rows dy = tp_tensor_grad_rows(y), du = tp_rows_from(dy, 0, y->cols), dx = {0};
    bool apart = drops(&r->spec);
    if (r->used > 0 && !r->through) {
        tp_lowrank_backward_args through = through_b(r);
        TP_TRY(tp_run_lowrank_backward(tp_tape_ctx(tape), &through));
    }
    if (tp_wants_grad(r->x)) {
        bool accumulate;
        dx = tp_grad_for(tape, r->x, &accumulate);
        if (dx.data == NULL) return tp_tape_status(tape);
        int64_t rows = w->rows + (apart ? 0 : r->used);
        tp_matmul_args large = {.n = y->rows, .m = w->cols, .k = rows, .a = dy, .c = dx, .alpha = 1};
        large.b = corner(w, 0, 0, rows, w->cols);
        large.beta = accumulate ? 1 : 0;
        TP_TRY(tp_op_product(tape, large));
    }
    if (r->used > 0 && apart) TP_TRY(dropped_backward(tape, r, du, dx));
    if (r->used > 0 && !apart && !later(r, du)) TP_TRY(grad_a(tape, r, du));
    return tp_wants_grad(r->spec.residual) ? tp_grad_move(tape, y, r->spec.residual) : TP_OK;
}

static tp_status joint_remake(tp_tape *tape, tp_record *base)
{
    struct joint_record *r = (struct joint_record *)base;
    tp_tensor *y = base->out[0];
    TP_TRY(tp_op_recall(tape, r->x));
    if (r->used > 0) {
        tp_rows low = {tp_storage_data(base->saved[0]), y->dtype, r->used};
        TP_TRY(copy(tape, y->rows, r->used, low, tp_rows_from(tp_tensor_rows(r->x), 0, r->x->cols)));
    }
    return multiply(tape, r->x, &r->spec, r->used, tp_tensor_rows(y));
}

static const tp_op joint_op = {.name = op_name, .backward = joint_backward, .remake = joint_remake};

bool tp_joint_before(tp_tensor *y, int64_t rows, tp_lowrank_backward_args *args)
{
    struct joint_record *r = (struct joint_record *)y->maker;
    if (r == NULL || r->record.op != &joint_op || r->used == 0 || r->spec.n_parts != 2) return false;
    if (r->spec.parts[0].rows != rows || r->spec.parts[1].rows != rows) return false;
    *args = through_b(r);
    r->through = true;
    return true;
}

/* ---- forward, in public ---- */

static bool check(tp_tape *tape, const tp_tensor *x, const tp_joint_spec *spec, int64_t used)
{
    const tp_matrix *w = spec->weight;
    const tp_format *format = &tp_formats[w->format];
    int64_t rows = 0;
    for (int i = 0; i < spec->n_parts && i < TP_JOINT_PARTS; i++) rows += spec->parts[i].rows;
    if (rows != w->rows || x->cols != w->cols || w->transposed || !format->dense || format->dtype != tp_tape_precision(tape))
        return tp_op_fail(tape, op_name, TP_SHAPE,
                          "x has %lld columns, the weight is %s [%lld, %lld], its parts have %lld rows", (long long)x->cols,
                          format->name, (long long)w->rows, (long long)w->cols, (long long)rows) != NULL;
    if (used > spec->room || x->ld < x->cols + used || w->stride < w->cols + used)
        return tp_op_fail(tape, op_name, TP_SHAPE, "factors of rank %lld together, room for %lld in the weight, %lld behind x",
                          (long long)used, (long long)spec->room, (long long)(x->ld - x->cols)) != NULL;
    for (int i = 0; i < spec->n_parts; i++) {
        const tp_lowrank *term = spec->parts[i].term;
        if (term == NULL) continue;
        if (term->a->cols != x->cols || term->b->rows != spec->parts[i].rows || term->a->rows != term->b->cols)
            return tp_op_fail(tape, op_name, TP_SHAPE,
                              "low-rank factors [%lld, %lld] and [%lld, %lld] do not fit a part [%lld, %lld]",
                              (long long)term->a->rows, (long long)term->a->cols, (long long)term->b->rows,
                              (long long)term->b->cols, (long long)spec->parts[i].rows, (long long)w->cols) != NULL;
    }
    return true;
}

tp_tensor *tp_joint_linear(tp_tape *tape, tp_tensor *x, const tp_joint_spec *spec)
{
    const tp_tensor *inputs[] = {x};
    if (!tp_op_begin(tape, op_name, inputs, 1)) return NULL;
    int64_t used = used_room(spec);
    if (!check(tape, x, spec, used)) return NULL;
    bool wants = tp_wants_grad(x) || tp_wants_grad(spec->residual);
    for (int i = 0; i < spec->n_parts; i++) {
        const tp_lowrank *term = spec->parts[i].term;
        wants = wants || (term != NULL && (tp_wants_grad(term->a) || tp_wants_grad(term->b)));
    }
    bool record = wants && tp_tape_recording(tape);
    tp_tensor *y = tp_op_output(tape, op_name, tp_tape_precision(tape), x->rows, spec->weight->rows, wants);
    tp_storage *u = NULL, *masks = NULL;
    if (y == NULL) return NULL;
    if (record && used > 0) {
        u = tp_op_alloc(tape, op_name, (size_t)(x->rows * used) * tp_dtype_bytes(y->dtype));
        if (u == NULL || !open_masks(tape, x, spec, &masks)) return NULL;
    }
    tp_rows low = {u != NULL ? tp_storage_data(u) : NULL, y->dtype, used};
    if (!tp_op_ok(tape, op_name, pass_down(tape, x, spec, used, masks, low))) return NULL;
    if (!spec->unread && !tp_op_ok(tape, op_name, multiply(tape, x, spec, used, tp_tensor_rows(y)))) return NULL;
    if (!record) return y;
    struct joint_record *r = tp_op_record(tape, &joint_op, sizeof *r, y, NULL, NULL);
    if (r == NULL) return NULL;
    r->record.saved[0] = u;
    r->record.saved[1] = masks;
    r->row = tp_tape_row(tape);
    r->x = x;
    r->spec = *spec;
    r->used = used;
    if (spec->bias != NULL) {
        r->bias = *spec->bias;
        r->spec.bias = &r->bias;
    }
    for (int i = 0; i < spec->n_parts; i++) {
        if (spec->parts[i].term == NULL) continue;
        r->terms[i] = *spec->parts[i].term;
        r->spec.parts[i].term = &r->terms[i];
    }
    if (spec->unread) tp_tape_forget(tape, y);
    return y;
}
