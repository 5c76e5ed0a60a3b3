/* For tests of CUDA kernels: runs a call on the CPU and on the GPU with the same arguments and compares what they write.
 * Buffers are copied to each device with bytes behind them that nobody may touch, and the GPU runs twice, which has to give the
 * same bits unless it may add in any order.
 *
 *     both b = {0};
 *     tp_add_args args = {.n = 5, .dim = 33};
 *     rows_in(&b, &args.x, 5, 33, TP_F32, 1);
 *     ...
 *     run_both(&b, TP_KERNEL_add, &args, "5 x 33");
 *
 * The CPU has no f16: where the GPU gets that, the CPU gets the same values as f32, and its results are rounded afterwards.
 *
 * Where no GPU opens, every test says so and is skipped.
 *
 * For compute-sanitizer, under which everything takes long: with TAPEFT_GPU_ALONE=1 a call runs once and on the GPU only, and
 * nothing is compared; with TAPEFT_EVERY=7 every seventh call runs. */
#ifndef TP_TESTS_BACKEND_ON_BOTH_H
#define TP_TESTS_BACKEND_ON_BOTH_H

#include "tests/support.h"

#include <math.h>
#include <stdbool.h>

#include "backend/backend.h"

#define MAX_BUFFERS 24
#define GUARD_BYTES 256

static struct {
    tp_device *cpu, *cuda;
    char why_not[512];
} opened;

static inline int open_both(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    if (tp_cuda_backend.open(&ctx, 0, 0, &opened.cuda) != TP_OK) {
        snprintf(opened.why_not, sizeof opened.why_not, "%.500s", ctx.message);
        return 0;
    }
    return tp_cpu_backend.open(&ctx, 0, 0, &opened.cpu) == TP_OK ? 0 : -1;
}

static inline int close_both(void **state)
{
    (void)state;
    tp_device_close(opened.cpu);
    tp_device_close(opened.cuda);
    return 0;
}

/* First line of every test. */
#define NEEDS_GPU()                                                                                                            \
    do {                                                                                                                       \
        if (opened.cuda == NULL) {                                                                                             \
            print_message("not run, no GPU: %s\n", opened.why_not);                                                            \
            skip();                                                                                                            \
        }                                                                                                                      \
    } while (0)

/* ---- random numbers, the same in every run ---- */

static uint64_t random_state = 1;

static inline uint32_t random_bits(void)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 32);
}
static inline int64_t below(int64_t n)
{
    return (int64_t)(random_bits() % (uint64_t)n);
}
static inline float random_value(void)
{
    return (float)(int32_t)random_bits() / 2147483648.0f;
} /* [-1, 1] */
/* What is not f32: bf16, and in programs that set f16_too f16 in every second call of run_both. */
static bool f16_too;
static tp_dtype narrow_dtype = TP_BF16;

static inline tp_dtype random_dtype(void)
{
    return below(2) == 0 ? TP_F32 : narrow_dtype;
}

/* A tolerance, or another number, that stands for a few roundings: f16 keeps three bits more than bf16. */
static inline double by_dtype(tp_dtype dtype, double bf16, double f32)
{
    return dtype == TP_BF16 ? bf16 : dtype == TP_F16 ? bf16 / 8 : f32;
}

/* ---- buffers ---- */

/* How far results may lie apart: relative * |expected| + absolute; for bf16 and f16 results one unit of the last place more,
 * since values that differ by any little may round to neighbours. */
typedef struct tolerance {
    double relative, absolute;
    bool exact;
} tolerance;

static const tolerance EXACT = {0, 0, true};
static inline tolerance within(double relative, double absolute)
{
    return (tolerance){relative, absolute, false};
}

typedef struct both {
    struct buffer {
        unsigned char *host;
        size_t bytes, shift; /* shift: bytes that the device's copy is away from an aligned address */
        tp_dtype dtype;      /* F32, BF16, F16, I32, or U8: a tp_step_state */
        bool output, scratch;
        size_t row, used; /* in elements; row > 0: what comes behind the first `used` ones of a row may be anything */
        tolerance tolerance;
    } buffers[MAX_BUFFERS];
    struct {
        void *field; /* the address of a pointer in the arguments */
        int buffer;
        size_t offset; /* bytes into the buffer */
    } fields[MAX_BUFFERS];
    tp_dtype *types[MAX_BUFFERS]; /* in the arguments, those that are F16: F32 for the CPU */
    int n_buffers, n_fields, n_types;
} both;

static inline void bind_type(both *b, tp_dtype *type)
{
    if (*type != TP_F16) return;
    assert_true(b->n_types < MAX_BUFFERS);
    b->types[b->n_types++] = type;
}

static inline void bind_field(both *b, void *field, int buffer)
{
    assert_true(b->n_fields < MAX_BUFFERS);
    b->fields[b->n_fields].field = field;
    b->fields[b->n_fields].offset = 0;
    b->fields[b->n_fields++].buffer = buffer;
}

/* A zeroed buffer for the pointer at `field`. */
static inline void *new_buffer(both *b, void *field, size_t bytes, tp_dtype dtype)
{
    assert_true(b->n_buffers < MAX_BUFFERS);
    struct buffer *buffer = &b->buffers[b->n_buffers];
    *buffer = (struct buffer){.host = calloc(bytes + 16, 1), .bytes = bytes, .dtype = dtype};
    assert_non_null(buffer->host);
    memcpy(field, &buffer->host, sizeof buffer->host);
    bind_field(b, field, b->n_buffers++);
    return buffer->host;
}

static inline void make_output(both *b, tolerance t)
{
    b->buffers[b->n_buffers - 1].output = true;
    b->buffers[b->n_buffers - 1].tolerance = t;
}

static inline void fill(void *data, size_t n, tp_dtype dtype, double size)
{
    for (size_t i = 0; i < n; i++) {
        float x = (float)size * random_value();
        tp_convert_from_f32(dtype, &x, 1, (char *)data + i * tp_dtype_bytes(dtype));
    }
}

/* Values of -size .. size. Some have gaps between rows, some start at an odd address. */
static inline void rows_in(both *b, tp_rows *rows, int64_t n, int64_t cols, tp_dtype dtype, double size)
{
    static const int64_t gaps[] = {0, 0, 3, 8};
    *rows = (tp_rows){NULL, dtype, cols + gaps[below(4)]};
    size_t count = (size_t)(n * rows->ld), bytes = tp_dtype_bytes(dtype);
    bind_type(b, &rows->dtype);
    fill(new_buffer(b, &rows->data, count * bytes, dtype), count, dtype, size);
    if (below(4) == 0) b->buffers[b->n_buffers - 1].shift = bytes;
}

static inline void rows_out(both *b, tp_rows *rows, int64_t n, int64_t cols, tp_dtype dtype, tolerance t)
{
    rows_in(b, rows, n, cols, dtype, 1);
    make_output(b, t);
}

/* `field` is a const float **. */
static inline void floats_in(both *b, void *field, int64_t n, double size)
{
    fill(new_buffer(b, field, (size_t)n * 4, TP_F32), (size_t)n, TP_F32, size);
}
static inline void floats_out(both *b, void *field, int64_t n, tolerance t)
{
    floats_in(b, field, n, 1);
    make_output(b, t);
}

/* A float ** whose contents afterwards nobody needs. */
static inline void floats_scratch(both *b, void *field, int64_t n)
{
    floats_in(b, field, n, 1);
    b->buffers[b->n_buffers - 1].scratch = true;
}

/* Numbers of 0 .. limit - 1; `field` is a const int32_t **. */
static inline int32_t *ints_in(both *b, void *field, int64_t n, int64_t limit)
{
    int32_t *ints = new_buffer(b, field, (size_t)n * 4, TP_I32);
    for (int64_t i = 0; i < n; i++) ints[i] = (int32_t)below(limit);
    return ints;
}

/* The pointer at `field` is so many bytes behind the one at `other`, which is bound already. (The dtype of rows is bound
 * apart.) */
static inline void within_buffer(both *b, void *field, const void *other, size_t offset)
{
    unsigned char *start;
    memcpy(&start, other, sizeof start);
    start += offset;
    memcpy(field, &start, sizeof start);
    for (int i = 0; i < b->n_fields; i++) {
        if (b->fields[i].field == other) {
            bind_field(b, field, b->fields[i].buffer);
            b->fields[b->n_fields - 1].offset = b->fields[i].offset + offset;
            return;
        }
    }
    fail_msg("no buffer is bound there");
}

/* The pointer at `field` is the one at `other`, which is bound already. */
static inline void same_buffer(both *b, void *field, const void *other)
{
    within_buffer(b, field, other, 0);
}

/* ---- running ---- */

/* From one dtype to another, n values at any address. */
static inline void convert_values(tp_dtype from, const void *src, tp_dtype to, void *dst, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        float x;
        tp_convert_to_f32(from, (const char *)src + i * tp_dtype_bytes(from), 1, &x);
        tp_convert_from_f32(to, &x, 1, (char *)dst + i * tp_dtype_bytes(to));
    }
}

/* Runs on one device and returns the buffers as they are afterwards. */
static inline void run_on(both *b, tp_device *device, int kernel, const void *args, const char *text,
                          unsigned char *results[MAX_BUFFERS])
{
    const tp_backend *backend = device->backend;
    unsigned char *memory[MAX_BUFFERS], guard[GUARD_BYTES], after[GUARD_BYTES];
    memset(guard, 0xA5, sizeof guard);
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    ctx.device = device;
    for (int i = 0; i < b->n_types; i++) *b->types[i] = device == opened.cpu ? TP_F32 : TP_F16;
    for (int i = 0; i < b->n_buffers; i++) {
        struct buffer *buffer = &b->buffers[i];
        bool widen = device == opened.cpu && buffer->dtype == TP_F16;
        size_t bytes = widen ? 2 * buffer->bytes : buffer->bytes;
        memory[i] = backend->alloc(&ctx, device, bytes + buffer->shift + GUARD_BYTES);
        if (memory[i] == NULL) fail_msg("%s", ctx.message);
        if (widen)
            convert_values(TP_F16, buffer->host, TP_F32, memory[i] + buffer->shift, buffer->bytes / 2);
        else
            assert_ok(&ctx, backend->copy_in(&ctx, memory[i] + buffer->shift, buffer->host, buffer->bytes));
        assert_ok(&ctx, backend->copy_in(&ctx, memory[i] + buffer->shift + bytes, guard, GUARD_BYTES));
    }
    for (int i = 0; i < b->n_fields; i++) {
        const struct buffer *buffer = &b->buffers[b->fields[i].buffer];
        bool widened = device == opened.cpu && buffer->dtype == TP_F16;
        void *pointer = memory[b->fields[i].buffer] + buffer->shift + b->fields[i].offset * (widened ? 2 : 1);
        memcpy(b->fields[i].field, &pointer, sizeof pointer);
    }
    if (backend->kernels[kernel](&ctx, args) != TP_OK) fail_msg("%s: %s: %s", backend->name, text, ctx.message);
    for (int i = 0; i < b->n_buffers; i++) {
        struct buffer *buffer = &b->buffers[i];
        bool widened = device == opened.cpu && buffer->dtype == TP_F16;
        size_t bytes = widened ? 2 * buffer->bytes : buffer->bytes;
        results[i] = malloc(buffer->bytes + 16);
        assert_non_null(results[i]);
        if (widened)
            convert_values(TP_F32, memory[i] + buffer->shift, TP_F16, results[i], buffer->bytes / 2);
        else if (backend->copy_out(&ctx, results[i], memory[i] + buffer->shift, buffer->bytes) != TP_OK)
            fail_msg("%s: %s", text, ctx.message);
        assert_ok(&ctx, backend->copy_out(&ctx, after, memory[i] + buffer->shift + bytes, GUARD_BYTES));
        if (memcmp(guard, after, sizeof guard) != 0)
            fail_msg("%s: %s: wrote behind the end of buffer %d", backend->name, text, i);
        if (!buffer->output && !buffer->scratch && memcmp(results[i], buffer->host, buffer->bytes) != 0)
            fail_msg("%s: %s: wrote to the input in buffer %d", backend->name, text, i);
        backend->free(device, memory[i], bytes + buffer->shift + GUARD_BYTES);
    }
}

static inline long number_from(const char *variable)
{
    const char *text = getenv(variable);
    return text != NULL ? strtol(text, NULL, 10) : 0;
}

static inline bool gpu_alone(void)
{
    return number_from("TAPEFT_GPU_ALONE") != 0;
}

/* A call on the CPU that makes inputs of what is tested: its results are what buffers hold from then on. */
static inline void run_before(both *b, int kernel, const void *args, const char *text)
{
    unsigned char *results[MAX_BUFFERS];
    bool scratch[MAX_BUFFERS];
    for (int i = 0; i < b->n_buffers; i++) {
        scratch[i] = b->buffers[i].scratch;
        b->buffers[i].scratch = true;
    }
    run_on(b, gpu_alone() ? opened.cuda : opened.cpu, kernel, args, text, results);
    for (int i = 0; i < b->n_buffers; i++) {
        b->buffers[i].scratch = scratch[i];
        memcpy(b->buffers[i].host, results[i], b->buffers[i].bytes);
        free(results[i]);
    }
}

static inline double value_at(const unsigned char *data, tp_dtype dtype, size_t i)
{
    if (dtype == TP_BF16) return (double)tp_bf16_to_f32(((const uint16_t *)(const void *)data)[i]);
    if (dtype == TP_F16) return (double)tp_f16_to_f32(((const uint16_t *)(const void *)data)[i]);
    if (dtype == TP_I32) return (double)((const int32_t *)(const void *)data)[i];
    return (double)((const float *)(const void *)data)[i];
}

static inline bool near(double got, double want, tolerance t, tp_dtype dtype)
{
    if (isnan(want) || isinf(want)) return isnan(want) ? isnan(got) : got == want;
    if (t.exact) return got == want;
    double limit = (t.relative + by_dtype(dtype, 0x1p-7, 0)) * fabs(want) + t.absolute;
    return fabs(got - want) <= limit;
}

static inline void compare(const struct buffer *buffer, int index, const unsigned char *want, const unsigned char *got,
                           const char *text)
{
    if (buffer->dtype == TP_U8) {
        const tp_step_state *a = (const void *)want, *b = (const void *)got;
        if (a->finite != b->finite || !near((double)b->clip, (double)a->clip, buffer->tolerance, TP_F32) ||
            !near(b->norm, a->norm, buffer->tolerance, TP_F32) || !near(b->loss_sum, a->loss_sum, buffer->tolerance, TP_F32))
            fail_msg("%s: got norm %.17g, clip %.9g, finite %d, loss %.17g; expected %.17g, %.9g, %d, %.17g", text, b->norm,
                     (double)b->clip, b->finite, b->loss_sum, a->norm, (double)a->clip, a->finite, a->loss_sum);
        return;
    }
    size_t n = buffer->bytes / tp_dtype_bytes(buffer->dtype);
    for (size_t i = 0; i < n; i++) {
        if (buffer->row > 0 && i % buffer->row >= buffer->used) continue;
        double g = value_at(got, buffer->dtype, i), w = value_at(want, buffer->dtype, i);
        if (!near(g, w, buffer->tolerance, buffer->dtype))
            fail_msg("%s: buffer %d, element %zu of %zu: the GPU has %.9g, the CPU %.9g, apart %.3g", text, index, i, n, g, w,
                     fabs(g - w));
    }
}

static inline void compare_both(both *b, int kernel, const void *args, const char *text)
{
    unsigned char *cpu[MAX_BUFFERS], *gpu[MAX_BUFFERS], *again[MAX_BUFFERS];
    run_on(b, opened.cpu, kernel, args, text, cpu);
    run_on(b, opened.cuda, kernel, args, text, gpu);
    run_on(b, opened.cuda, kernel, args, text, again);
    for (int i = 0; i < b->n_buffers; i++) {
        if (b->buffers[i].output) {
            compare(&b->buffers[i], i, cpu[i], gpu[i], text);
            if (opened.cuda->any_order)
                compare(&b->buffers[i], i, cpu[i], again[i], text);
            else if (memcmp(gpu[i], again[i], b->buffers[i].bytes) != 0)
                fail_msg("%s: buffer %d: two runs gave different bits", text, i);
        }
        free(cpu[i]), free(gpu[i]), free(again[i]);
    }
}

static inline void run_once(both *b, int kernel, const void *args, const char *text)
{
    unsigned char *results[MAX_BUFFERS];
    run_on(b, opened.cuda, kernel, args, text, results);
    for (int i = 0; i < b->n_buffers; i++) free(results[i]);
}

static inline void run_both(both *b, int kernel, const void *args, const char *text)
{
    static long calls;
    long every = number_from("TAPEFT_EVERY");
    bool runs = every <= 1 || calls++ % every == 0;
    if (runs && gpu_alone()) run_once(b, kernel, args, text);
    if (runs && !gpu_alone()) compare_both(b, kernel, args, text);
    for (int i = 0; i < b->n_buffers; i++) free(b->buffers[i].host);
    memset(b, 0, sizeof *b);
    if (f16_too) narrow_dtype = narrow_dtype == TP_BF16 ? TP_F16 : TP_BF16;
}

#endif
