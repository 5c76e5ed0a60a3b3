/* For tests of CPU kernels: runs a case on every instruction set that this machine has, with 1, 2 and 3 threads. Results
 * are compared with a float64 reference once per instruction set, and bit by bit between thread counts. */
#ifndef TP_TESTS_BACKEND_KERNELS_H
#define TP_TESTS_BACKEND_KERNELS_H

#include "tests/support.h"

#include <math.h>
#include <stdbool.h>

#include "backend/backend.h"

#define MAX_THREADS 3
#define MAX_OUTPUTS 8

/* ------------------------------------------------------------------------------------------------------ arrays */

static uint64_t random_state = 1;

static inline double random_uniform(void) /* [-1, 1) */
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (double)(int32_t)(random_state >> 32) / 2147483648.0;
}

/* Rows with `gap` elements between them, which nobody may touch. Values are `size` times something around 1. */
static inline tp_rows new_rows(int64_t n, int64_t columns, int64_t gap, tp_dtype dtype, double size)
{
    tp_rows rows = {NULL, dtype, columns + gap};
    size_t count = (size_t)(n * rows.ld);
    rows.data = malloc(count * 4 + 4);
    assert_non_null(rows.data);
    for (size_t i = 0; i < count; i++) {
        float x = (float)(size * random_uniform());
        if (dtype == TP_BF16)
            ((uint16_t *)rows.data)[i] = tp_f32_to_bf16(x);
        else
            ((float *)rows.data)[i] = x;
    }
    return rows;
}

static inline double at(tp_rows x, int64_t r, int64_t c)
{
    if (x.dtype == TP_BF16) return (double)tp_bf16_to_f32(((const uint16_t *)x.data)[r * x.ld + c]);
    return (double)((const float *)x.data)[r * x.ld + c];
}

static inline size_t rows_bytes(tp_rows x, int64_t n)
{
    return (size_t)(n * x.ld) * (x.dtype == TP_BF16 ? 2 : 4);
}

static inline tp_rows copy_rows(tp_rows x, int64_t n)
{
    tp_rows y = x;
    y.data = malloc(rows_bytes(x, n) + 4);
    assert_non_null(y.data);
    memcpy(y.data, x.data, rows_bytes(x, n));
    return y;
}

static inline float *new_floats(int64_t n, double size)
{
    float *x = malloc((size_t)n * 4 + 4);
    assert_non_null(x);
    for (int64_t i = 0; i < n; i++) x[i] = (float)(size * random_uniform());
    return x;
}

/* Half of the distance between neighbours near x: what one rounding costs. */
static inline double rounding(tp_dtype dtype, double x)
{
    return fmax(fabs(x), 1e-30) * (dtype == TP_BF16 ? 0x1p-8 : 0x1p-24);
}

#define assert_near(got, want, tolerance, ...)                                                                                 \
    do {                                                                                                                       \
        double got_ = (got), want_ = (want), tolerance_ = (tolerance);                                                         \
        if (!(fabs(got_ - want_) <= tolerance_)) {                                                                             \
            char where_[256];                                                                                                  \
            snprintf(where_, sizeof where_, __VA_ARGS__);                                                                      \
            fail_msg("%s: got %.9g, expected %.9g within %.3g", where_, got_, want_, tolerance_);                              \
        }                                                                                                                      \
    } while (0)

/* ----------------------------------------------------------------------------------------------------- devices */

static const char *const isa_names[] = {"generic", "avx2", "avx512"};
static struct {
    tp_device *device[MAX_THREADS];
    bool there;
} devices[3];

static inline int open_devices(void **state)
{
    (void)state;
    for (int i = 0; i < 3; i++) {
        devices[i].there = true;
        setenv("TAPEFT_CPU", isa_names[i], 1);
        for (int t = 0; t < MAX_THREADS; t++) {
            tp_ctx ctx;
            tp_ctx_init(&ctx);
            tp_status status = tp_cpu_backend.open(&ctx, 0, t + 1, &devices[i].device[t]);
            if (status == TP_INVALID && i > 0)
                devices[i].there = false; /* this CPU has no such instructions */
            else if (status != TP_OK)
                fail_msg("%s: %s", isa_names[i], ctx.message);
        }
    }
    unsetenv("TAPEFT_CPU");
    return 0;
}

static inline int close_devices(void **state)
{
    (void)state;
    for (int i = 0; i < 3; i++) {
        for (int t = 0; t < MAX_THREADS; t++) {
            if (devices[i].there) tp_cpu_backend.close(devices[i].device[t]);
        }
    }
    return 0;
}

/* What a case writes. */
typedef struct kernel_outputs {
    void *data[MAX_OUTPUTS];
    size_t bytes[MAX_OUTPUTS];
    int n;
} kernel_outputs;

static inline void add_output(kernel_outputs *o, void *data, size_t bytes)
{
    assert_true(o->n < MAX_OUTPUTS);
    o->data[o->n] = data;
    o->bytes[o->n++] = bytes;
}

/* Runs the case everywhere. Before each run the outputs are what they were at the call. check compares them with the
 * reference and names the instruction set in its messages. */
static inline void run_everywhere(const kernel_outputs *o, void (*run)(tp_ctx *ctx, void *data),
                                  void (*check)(void *data, const char *isa), void *data)
{
    void *before[MAX_OUTPUTS], *first[MAX_OUTPUTS];
    for (int k = 0; k < o->n; k++) {
        before[k] = malloc(o->bytes[k] + 1);
        first[k] = malloc(o->bytes[k] + 1);
        assert_true(before[k] != NULL && first[k] != NULL);
        memcpy(before[k], o->data[k], o->bytes[k]);
    }
    for (int i = 0; i < 3; i++) {
        for (int t = 0; devices[i].there && t < MAX_THREADS; t++) {
            tp_ctx ctx;
            tp_ctx_init(&ctx);
            ctx.device = devices[i].device[t];
            for (int k = 0; k < o->n; k++) memcpy(o->data[k], before[k], o->bytes[k]);
            run(&ctx, data);
            if (t == 0) check(data, isa_names[i]);
            for (int k = 0; k < o->n; k++) {
                if (t == 0)
                    memcpy(first[k], o->data[k], o->bytes[k]);
                else if (memcmp(first[k], o->data[k], o->bytes[k]) != 0)
                    fail_msg("%s: output %d differs between 1 and %d threads", isa_names[i], k, t + 1);
            }
        }
    }
    for (int k = 0; k < o->n; k++) {
        memcpy(o->data[k], before[k], o->bytes[k]);
        free(before[k]);
        free(first[k]);
    }
}

#endif
