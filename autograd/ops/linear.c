/* y = x W^T + bias + residual + sum_t s_t B_t A_t drop_t(x)
 *
 *   u_t  = s_t drop_t(x) A_t^T          saved, [rows of the term, R]
 *   du_t = s_t dy B_t
 *   dx   = dy W + sum_t drop_t(du_t A_t)
 *   dB_t = dy^T u_t
 *   dA_t = du_t^T drop_t(x)
 * W is frozen, so it needs neither gradient nor saved input; x is kept for dA alone (it is somebody's output anyway). The
 * dropped x is made again from the counter-based generator rather than saved.
 *
 * The first term, if it covers all rows, rides on the product with W in both directions (tp_lowrank_args); others, and what
 * dropout takes apart, are products of their own. */
#include "autograd/op.h"
#include "autograd/ops.h"

struct linear_record {
    tp_record record;
    tp_tensor *x, *bias, *residual;
    const tp_matrix *weight;
    const tp_lowrank *terms; /* copied into the record's tail */
    tp_storage **u;
    int n_terms;
    int64_t row; /* of the batch, where x begins: dropout counts from there */
};

static const char op_name[] = "linear";

static int64_t term_rows(const tp_lowrank *term, int64_t n)
{
    return (term->end > 0 ? term->end : n) - term->begin;
}

static tp_dropout_args dropout_of(tp_tape *tape, const tp_lowrank *term, int64_t row, int64_t n, int64_t dim, tp_rows x,
                                  tp_rows y)
{
    return (tp_dropout_args){.n = n,
                             .dim = dim,
                             .x = x,
                             .y = y,
                             .p = term->dropout,
                             .key = {tp_tape_ctx(tape)->seed, TP_STREAM_DROPOUT + term->site, 0},
                             .first_row = row + term->begin,
                             .state = tp_tape_state(tape)};
}

/* The rows of x that a term sees, dropped if it asks for that; *made is scratch to release, or NULL. */
static bool term_input(tp_tape *tape, const tp_lowrank *term, int64_t row, const tp_tensor *x, tp_rows *input,
                       tp_storage **made)
{
    *input = tp_rows_from(tp_tensor_rows(x), term->begin, 0);
    *made = NULL;
    if (!(term->dropout > 0)) return true;
    int64_t n = term_rows(term, x->rows);
    *made = tp_op_alloc(tape, op_name, (size_t)n * (size_t)x->cols * tp_dtype_bytes(x->dtype));
    if (*made == NULL) return false;
    tp_rows dropped = {tp_storage_data(*made), x->dtype, x->cols};
    tp_dropout_args args = dropout_of(tape, term, row, n, x->cols, *input, dropped);
    *input = dropped;
    return tp_op_ok(tape, op_name, tp_run_dropout(tp_tape_ctx(tape), &args));
}

static tp_matrix matrix_of(const tp_tensor *t)
{
    return tp_matrix_dense(t->dtype, t->data, t->rows, t->cols);
}

/* ---- forward ---- */

/* u = s drop(x) A^T of the term's rows. */
static bool term_down(tp_tape *tape, const tp_lowrank *term, const tp_tensor *x, tp_rows u)
{
    int64_t n = term_rows(term, x->rows);
    tp_storage *made;
    tp_rows input;
    if (!term_input(tape, term, tp_tape_row(tape), x, &input, &made)) return false;
    tp_matmul_args down = {.n = n, .m = u.ld, .k = x->cols, .a = input, .b = matrix_of(term->a), .nt = true, .c = u};
    down.alpha = term->scaling;
    bool ok = tp_op_ok(tape, op_name, tp_op_product(tape, down));
    tp_op_release(tape, made);
    return ok;
}

/* y += u B^T, in the term's rows. */
static bool term_up(tp_tape *tape, const tp_lowrank *term, const tp_tensor *y, tp_rows u)
{
    tp_rows rows = tp_rows_from(tp_tensor_rows(y), term->begin, 0);
    tp_matmul_args up = {.n = term_rows(term, y->rows), .m = y->cols, .k = u.ld, .a = u, .b = matrix_of(term->b), .nt = true};
    up.c = rows;
    up.alpha = up.beta = 1;
    return tp_op_ok(tape, op_name, tp_op_product(tape, up));
}

static bool covers(const tp_lowrank *term, int64_t rows)
{
    return term->begin == 0 && term_rows(term, rows) == rows;
}

/* y, and every term's u. */
static bool forward(tp_tape *tape, const tp_tensor *x, const tp_linear_spec *spec, tp_tensor *y, tp_storage **u)
{
    tp_lowrank_args rider;
    tp_matmul_args args = {.n = x->rows,
                           .m = y->cols,
                           .k = x->cols,
                           .a = tp_tensor_rows(x),
                           .b = *spec->weight,
                           .nt = true,
                           .c = tp_tensor_rows(y),
                           .alpha = 1,
                           .bias = spec->bias != NULL ? spec->bias->data : NULL,
                           .residual = spec->residual != NULL ? spec->residual->data : NULL,
                           .residual_ld = spec->residual != NULL ? spec->residual->ld : 0};
    for (int t = 0; t < spec->n_terms; t++) {
        const tp_lowrank *term = &spec->terms[t];
        int64_t rank = term->a->rows;
        u[t] = tp_op_alloc(tape, op_name, (size_t)term_rows(term, x->rows) * (size_t)rank * sizeof(float));
        if (u[t] == NULL) return false;
        tp_rows low = {tp_storage_data(u[t]), TP_F32, rank};
        bool rides = t == 0 && covers(term, x->rows);
        if ((!rides || term->dropout > 0) && !term_down(tape, term, x, low)) return false;
        if (!rides) continue;
        rider = (tp_lowrank_args){.rank = rank, .scaling = term->scaling, .low = low, .up = matrix_of(term->b)};
        if (!(term->dropout > 0)) rider.down = matrix_of(term->a);
        args.lowrank = &rider;
    }
    if (!tp_op_ok(tape, op_name, tp_op_product(tape, args))) return false;
    for (int t = args.lowrank != NULL ? 1 : 0; t < spec->n_terms; t++) {
        tp_rows low = {tp_storage_data(u[t]), TP_F32, spec->terms[t].a->rows};
        if (!term_up(tape, &spec->terms[t], y, low)) return false;
    }
    return true;
}

/* ---- backward ---- */

/* du = s dy B of the term's rows; dy begins with them. */
static tp_status term_du(tp_tape *tape, const tp_lowrank *term, int64_t n, tp_rows dy, tp_rows du)
{
    tp_matmul_args args = {.n = n, .m = du.ld, .k = term->b->rows, .a = dy, .b = matrix_of(term->b), .c = du};
    args.alpha = term->scaling;
    return tp_op_product(tape, args);
}

/* dx += drop(du A), in the term's rows. `scratch` holds them, if there is dropout. */
static tp_status term_dx(tp_tape *tape, const struct linear_record *r, const tp_lowrank *term, tp_rows du, tp_rows dx,
                         tp_storage *scratch)
{
    int64_t n = term_rows(term, r->x->rows), in = r->x->cols;
    bool dropped = term->dropout > 0;
    dx = tp_rows_from(dx, term->begin, 0);
    tp_rows target = dropped ? (tp_rows){tp_storage_data(scratch), dx.dtype, in} : dx;
    tp_matmul_args args = {.n = n, .m = in, .k = du.ld, .a = du, .b = matrix_of(term->a), .c = target, .alpha = 1};
    args.beta = dropped ? 0 : 1;
    TP_TRY(tp_op_product(tape, args));
    if (!dropped) return TP_OK;
    tp_dropout_args dropout = dropout_of(tape, term, r->row, n, in, target, dx);
    dropout.accumulate = true;
    return tp_run_dropout(tp_tape_ctx(tape), &dropout);
}

/* dA, dB, and the term's share of dx, except what rode on the product with W: du, and then dx. */
static tp_status term_backward(tp_tape *tape, const struct linear_record *r, int t, tp_rows dy, tp_rows du, tp_rows dx,
                               bool rode)
{
    const tp_lowrank *term = &r->terms[t];
    int64_t n = term_rows(term, r->x->rows), rank = du.ld, out = term->b->rows, in = r->x->cols;
    tp_ctx *ctx = tp_tape_ctx(tape);
    dy = tp_rows_from(dy, term->begin, 0);
    if (tp_wants_grad(term->b)) {
        tp_rows u = {tp_storage_data(r->u[t]), TP_F32, rank};
        tp_matmul_tn_args args = {.n = n, .m = out, .k = rank, .a = dy, .b = u, .c = term->b->grad, .alpha = 1, .beta = 1};
        TP_TRY(tp_run_matmul_tn(ctx, &args));
    }
    if (!rode) TP_TRY(term_du(tape, term, n, dy, du));
    tp_storage *made = NULL;
    if (tp_wants_grad(term->a)) {
        tp_rows input;
        if (!term_input(tape, term, r->row, r->x, &input, &made)) return tp_tape_status(tape);
        tp_matmul_tn_args args = {.n = n, .m = rank, .k = in, .a = du, .b = input, .c = term->a->grad, .alpha = 1, .beta = 1};
        TP_TRY(tp_run_matmul_tn(ctx, &args));
    }
    if (!rode && dx.data != NULL) {
        if (term->dropout > 0 && made == NULL) {
            made = tp_op_alloc(tape, op_name, (size_t)n * (size_t)in * tp_dtype_bytes(dx.dtype));
            if (made == NULL) return tp_tape_status(tape);
        }
        TP_TRY(term_dx(tape, r, term, du, dx, made));
    }
    tp_op_release(tape, made);
    return TP_OK;
}

static tp_status linear_backward(tp_tape *tape, tp_record *base)
{
    struct linear_record *r = (struct linear_record *)base;
    tp_tensor *y = base->out[0];
    tp_rows dy = tp_tensor_grad_rows(y), dx = {0};
    tp_storage *du[TP_LINEAR_TERMS] = {0};
    tp_lowrank_args rider;
    bool rides = false;
    for (int t = 0; t < r->n_terms; t++) {
        if (tp_wants_grad(r->terms[t].a)) TP_TRY(tp_op_recall(tape, r->x));
        du[t] =
            tp_op_alloc(tape, op_name, (size_t)term_rows(&r->terms[t], y->rows) * (size_t)r->terms[t].a->rows * sizeof(float));
        if (du[t] == NULL) return tp_tape_status(tape);
    }
    if (tp_wants_grad(r->x)) {
        bool accumulate;
        dx = tp_grad_for(tape, r->x, &accumulate);
        if (dx.data == NULL) return tp_tape_status(tape);
        tp_matmul_args args = {.n = y->rows, .m = r->x->cols, .k = y->cols, .a = dy, .b = *r->weight, .c = dx, .alpha = 1};
        args.beta = accumulate ? 1 : 0;
        rides = r->n_terms > 0 && covers(&r->terms[0], y->rows) && !(r->terms[0].dropout > 0);
        if (rides) {
            const tp_lowrank *term = &r->terms[0];
            rider = (tp_lowrank_args){.rank = term->a->rows, .scaling = term->scaling};
            rider.low = (tp_rows){tp_storage_data(du[0]), TP_F32, term->a->rows};
            rider.down = matrix_of(term->b);
            rider.up = matrix_of(term->a);
            args.lowrank = &rider;
        }
        TP_TRY(tp_op_product(tape, args));
    }
    for (int t = 0; t < r->n_terms; t++) {
        tp_rows low = {tp_storage_data(du[t]), TP_F32, r->terms[t].a->rows};
        TP_TRY(term_backward(tape, r, t, dy, low, dx, rides && t == 0));
        tp_op_release(tape, du[t]);
        tp_op_release(tape, r->u[t]);
    }
    if (tp_wants_grad(r->bias)) {
        tp_column_sum_args args = {.n = y->rows, .m = y->cols, .a = dy, .out = r->bias->grad, .beta = 1};
        TP_TRY(tp_run_column_sum(tp_tape_ctx(tape), &args));
    }
    return tp_wants_grad(r->residual) ? tp_grad_move(tape, y, r->residual) : TP_OK;
}

static const tp_op linear_op = {.name = op_name, .backward = linear_backward};

static bool check_shapes(tp_tape *tape, const tp_tensor *x, const tp_linear_spec *spec)
{
    const tp_matrix *w = spec->weight;
    if (x->cols != w->cols)
        return tp_op_fail(tape, op_name, TP_SHAPE, "x has %lld columns, the weight has %lld", (long long)x->cols,
                          (long long)w->cols) != NULL;
    if (spec->bias != NULL && spec->bias->cols != w->rows)
        return tp_op_fail(tape, op_name, TP_SHAPE, "the bias has %lld values, the weight %lld rows",
                          (long long)spec->bias->cols, (long long)w->rows) != NULL;
    if (spec->residual != NULL && (spec->residual->rows != x->rows || spec->residual->cols != w->rows ||
                                   spec->residual->dtype != tp_tape_precision(tape)))
        return tp_op_fail(tape, op_name, TP_SHAPE, "the residual is [%lld, %lld], the result is [%lld, %lld]",
                          (long long)spec->residual->rows, (long long)spec->residual->cols, (long long)x->rows,
                          (long long)w->rows) != NULL;
    if (spec->n_terms > TP_LINEAR_TERMS)
        return tp_op_fail(tape, op_name, TP_UNSUPPORTED, "%d adapters on one layer, at most %d", spec->n_terms,
                          TP_LINEAR_TERMS) != NULL;
    for (int t = 0; t < spec->n_terms; t++) {
        const tp_lowrank *term = &spec->terms[t];
        if (term->a->cols != x->cols || term->b->rows != w->rows || term->a->rows != term->b->cols || term->begin < 0 ||
            term->end > x->rows || (term->end > 0 && term->end < term->begin))
            return tp_op_fail(tape, op_name, TP_SHAPE,
                              "low-rank factors [%lld, %lld] and [%lld, %lld] do not fit a weight [%lld, %lld]",
                              (long long)term->a->rows, (long long)term->a->cols, (long long)term->b->rows,
                              (long long)term->b->cols, (long long)w->rows, (long long)w->cols) != NULL;
    }
    return true;
}

static bool wants_grad(const tp_tensor *x, const tp_linear_spec *spec)
{
    bool wants = tp_wants_grad(x) || tp_wants_grad(spec->bias) || tp_wants_grad(spec->residual);
    for (int t = 0; t < spec->n_terms; t++) wants = wants || tp_wants_grad(spec->terms[t].a) || tp_wants_grad(spec->terms[t].b);
    return wants;
}

tp_tensor *tp_linear(tp_tape *tape, tp_tensor *x, const tp_linear_spec *spec)
{
    const tp_tensor *inputs[] = {x};
    if (!tp_op_begin(tape, op_name, inputs, 1) || !check_shapes(tape, x, spec)) return NULL;
    bool wants = wants_grad(x, spec), record = wants && tp_tape_recording(tape);
    tp_tensor *y = tp_op_output(tape, op_name, tp_tape_precision(tape), x->rows, spec->weight->rows, wants);
    if (y == NULL) return NULL;
    tp_storage *u[TP_LINEAR_TERMS] = {0};
    if (!forward(tape, x, spec, y, u)) return NULL;
    for (int t = 0; t < spec->n_terms && !record; t++) tp_op_release(tape, u[t]);
    if (!record) return y;
    size_t terms_bytes = (size_t)spec->n_terms * sizeof(tp_lowrank);
    struct linear_record *r =
        tp_op_record(tape, &linear_op, sizeof *r + terms_bytes + (size_t)spec->n_terms * sizeof *r->u, y, NULL, NULL);
    if (r == NULL) return NULL;
    tp_lowrank *terms = (tp_lowrank *)(r + 1);
    r->u = (tp_storage **)((char *)terms + terms_bytes);
    for (int t = 0; t < spec->n_terms; t++) {
        terms[t] = spec->terms[t];
        r->u[t] = u[t];
    }
    r->x = x;
    r->bias = spec->bias;
    r->residual = spec->residual;
    r->weight = spec->weight;
    r->terms = terms;
    r->n_terms = spec->n_terms;
    r->row = tp_tape_row(tape);
    return y;
}
