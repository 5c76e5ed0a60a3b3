/* Gradient check of an op or a small network against finite differences.
 *
 * The function under test is L = sum_i c_i y_i with fixed random c. Every input element is moved by +-h and +-2h; the
 * four-point formula (-L(2h) + 8 L(h) - 8 L(-h) + L(-2h)) / 12h has an error of O(h^4), so that a large h = 1/32 keeps f32
 * rounding (about 1e-7 |L| / h = 3e-6 |L|) small as well. Every subset of the inputs is made trainable in turn: the others must
 * neither be touched nor break the ones that are. bf16 is compared with the f32 gradient: 8 bits of mantissa through a handful
 * of roundings stay within 3 % of its norm. */
#ifndef TP_TESTS_GRADCHECK_H
#define TP_TESTS_GRADCHECK_H

#include <math.h>

#include "autograd/ops.h"
#include "tests/support.h"

#define GRADCHECK_INPUTS         7
#define GRADCHECK_STEP           0.03125
#define GRADCHECK_F32_TOLERANCE  1e-3 /* of the gradient's norm; seen: below 2e-4 */
#define GRADCHECK_BF16_TOLERANCE 0.03

typedef struct gradcheck_input {
    int64_t rows, cols;
    bool parameter; /* f32 always, gradient in a buffer of its own */
    double low, high;
} gradcheck_input;

typedef struct gradcheck_case {
    const char *name;
    gradcheck_input inputs[GRADCHECK_INPUTS];
    int n_inputs;
    tp_tensor *(*build)(tp_tape *tape, tp_tensor **inputs);
    bool is_loss; /* returns a loss: c = 1 */
    int subsets;  /* bit mask of inputs that may be trained; 0: all */
} gradcheck_case;

struct gradcheck_run {
    const gradcheck_case *c;
    tp_ctx *ctx;
    tp_dtype precision;
    float *values[GRADCHECK_INPUTS];
    float *grads[GRADCHECK_INPUTS];
};

static inline double gradcheck_uniform(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (double)(*state >> 11) * 0x1p-53;
}

/* L, and gradients of the inputs in `trained` if grads are wanted. */
static inline double gradcheck_eval(struct gradcheck_run *run, int trained, bool want_grads)
{
    const gradcheck_case *c = run->c;
    tp_tape *tape;
    tp_tensor parameters[GRADCHECK_INPUTS], *inputs[GRADCHECK_INPUTS];
    void *narrow[GRADCHECK_INPUTS] = {NULL};
    double result = 0;
    assert_ok(run->ctx, tp_tape_new(run->ctx, (size_t)4 << 20, run->precision, &tape));
    for (int i = 0; i < c->n_inputs; i++) {
        size_t n = (size_t)(c->inputs[i].rows * c->inputs[i].cols);
        bool wants = trained >> i & 1;
        if (want_grads) memset(run->grads[i], 0, n * sizeof(float));
        if (c->inputs[i].parameter) {
            parameters[i] =
                tp_parameter("p", c->inputs[i].rows, c->inputs[i].cols, run->values[i], wants ? run->grads[i] : NULL);
            inputs[i] = &parameters[i];
        } else {
            narrow[i] = malloc(n * sizeof(float));
            tp_convert_from_f32(run->precision, run->values[i], n, narrow[i]);
            inputs[i] = tp_tape_input(tape, run->precision, c->inputs[i].rows, c->inputs[i].cols, narrow[i], wants);
        }
    }
    tp_tensor *y = c->build(tape, inputs);
    if (y == NULL || tp_tape_status(tape) != TP_OK) fail_msg("%s: %s", c->name, run->ctx->message);
    size_t n = (size_t)(y->rows * y->cols);
    float *out = malloc(n * sizeof *out), *weights = malloc(n * sizeof *weights);
    void *weights_narrow = malloc(n * sizeof *weights);
    tp_convert_to_f32(y->dtype, y->data, n, out);
    uint64_t state = 7;
    for (size_t i = 0; i < n; i++) {
        weights[i] =
            c->is_loss
                ? 1.0f
                : tp_bf16_to_f32(tp_f32_to_bf16((float)(gradcheck_uniform(&state) * 2 - 1))); /* exact in both precisions */
        result += (double)weights[i] * out[i];
    }
    if (want_grads) {
        tp_convert_from_f32(y->dtype, weights, n, weights_narrow);
        assert_ok(run->ctx, tp_tape_backward_from(tape, y, weights_narrow));
        for (int i = 0; i < c->n_inputs; i++)
            if (!c->inputs[i].parameter && (trained >> i & 1) && inputs[i]->grad != NULL)
                tp_convert_to_f32(run->precision, inputs[i]->grad, (size_t)(c->inputs[i].rows * c->inputs[i].cols),
                                  run->grads[i]);
    }
    free(weights_narrow);
    free(weights);
    free(out);
    for (int i = 0; i < c->n_inputs; i++) free(narrow[i]);
    tp_tape_free(tape);
    return result;
}

static inline void gradcheck_differences(struct gradcheck_run *run, int i, float *grad)
{
    static const struct {
        double steps, weight;
    } points[4] = {{2, -1.0 / 12}, {1, 8.0 / 12}, {-1, -8.0 / 12}, {-2, 1.0 / 12}};
    size_t n = (size_t)(run->c->inputs[i].rows * run->c->inputs[i].cols);
    for (size_t e = 0; e < n; e++) {
        float kept = run->values[i][e];
        double sum = 0;
        for (int p = 0; p < 4; p++) {
            run->values[i][e] = (float)(kept + points[p].steps * GRADCHECK_STEP);
            sum += points[p].weight * gradcheck_eval(run, 0, false);
        }
        run->values[i][e] = kept;
        grad[e] = (float)(sum / GRADCHECK_STEP);
    }
}

/* Norm of the difference over norm of the reference, all trained inputs together. */
static inline double gradcheck_distance(const struct gradcheck_run *run, float *const reference[], int trained)
{
    double difference = 0, norm = 0;
    for (int i = 0; i < run->c->n_inputs; i++) {
        size_t n = (size_t)(run->c->inputs[i].rows * run->c->inputs[i].cols);
        for (size_t e = 0; e < n && (trained >> i & 1); e++) {
            double d = (double)run->grads[i][e] - reference[i][e];
            difference += d * d;
            norm += (double)reference[i][e] * reference[i][e];
        }
    }
    return sqrt(difference) / (sqrt(norm) + 1e-12);
}

static inline void gradcheck(tp_ctx *ctx, const gradcheck_case *c)
{
    struct gradcheck_run run = {.c = c, .ctx = ctx, .precision = TP_F32};
    float *reference[GRADCHECK_INPUTS];
    uint64_t state = 1;
    int all = (1 << c->n_inputs) - 1;
    for (int i = 0; i < c->n_inputs; i++) {
        size_t n = (size_t)(c->inputs[i].rows * c->inputs[i].cols);
        run.values[i] = calloc(n, sizeof(float));
        run.grads[i] = calloc(n, sizeof(float));
        reference[i] = calloc(n, sizeof(float));
        double low = c->inputs[i].low, high = c->inputs[i].high;
        if (low == 0 && high == 0) low = -1, high = 1;
        for (size_t e = 0; e < n; e++)
            run.values[i][e] = tp_bf16_to_f32(tp_f32_to_bf16((float)(low + (high - low) * gradcheck_uniform(&state))));
    }
    int may = c->subsets != 0 ? c->subsets : all;
    for (int i = 0; i < c->n_inputs; i++)
        if (may >> i & 1) gradcheck_differences(&run, i, reference[i]);
    for (int trained = 1; trained <= all; trained++) {
        if ((trained & ~may) != 0) continue;
        run.precision = TP_F32;
        gradcheck_eval(&run, trained, true);
        double distance = gradcheck_distance(&run, reference, trained);
        if (!(distance <= GRADCHECK_F32_TOLERANCE))
            fail_msg("%s: f32, trained inputs %d: gradient is off by %g of its norm", c->name, trained, distance);
        for (int i = 0; i < c->n_inputs; i++) {
            size_t n = (size_t)(c->inputs[i].rows * c->inputs[i].cols);
            for (size_t e = 0; e < n && !(trained >> i & 1); e++)
                if (run.grads[i][e] != 0) fail_msg("%s: input %d is frozen and got a gradient", c->name, i);
        }
        run.precision = TP_BF16;
        gradcheck_eval(&run, trained, true);
        distance = gradcheck_distance(&run, reference, trained);
        if (!(distance <= GRADCHECK_BF16_TOLERANCE))
            fail_msg("%s: bf16, trained inputs %d: gradient is off by %g of its norm", c->name, trained, distance);
    }
    for (int i = 0; i < c->n_inputs; i++) {
        free(run.values[i]);
        free(run.grads[i]);
        free(reference[i]);
    }
}

#endif
