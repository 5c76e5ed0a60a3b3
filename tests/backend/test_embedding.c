/* Rows of frozen tables in every format and layout, and the gradient of a trainable table. */
#include "tests/backend/kernels.h"

typedef struct embedding_case {
    tp_embedding_args a;
    tp_rows before;
    const double *values; /* [V, D] logical */
} embedding_case;

static void run_embedding(tp_ctx *ctx, void *data)
{
    embedding_case *t = data;
    assert_ok(ctx, tp_run_embedding(ctx, &t->a));
}

static void check_embedding(void *data, const char *isa)
{
    embedding_case *t = data;
    const tp_embedding_args *a = &t->a;
    for (int64_t r = 0; r < a->n; r++) {
        for (int64_t c = 0; c < a->table.cols; c++) {
            float want = a->ids[r] < 0 ? 0 : (float)t->values[a->ids[r] * a->table.cols + c];
            if (a->table.round_bf16) want = tp_bf16_to_f32(tp_f32_to_bf16(want));
            if (a->accumulate) want += (float)at(t->before, r, c);
            if (a->out.dtype == TP_BF16) want = tp_bf16_to_f32(tp_f32_to_bf16(want));
            if ((float)at(a->out, r, c) != want)
                fail_msg("%s: %s: out[%lld, %lld]: got %.9g, expected %.9g", isa, tp_formats[a->table.format].name,
                         (long long)r, (long long)c, at(a->out, r, c), (double)want);
        }
    }
}

static void try_table(tp_matrix table, const double *values)
{
    static const int32_t ids[] = {0, 5, 5, -1, 7, 1, 0};
    for (int i = 0; i < 8; i++) {
        table.round_bf16 = i & 4;
        int64_t n = i == 7 ? 0 : 7;
        tp_rows out = new_rows(n, table.cols, 3, i & 1 ? TP_BF16 : TP_F32, 1);
        embedding_case t = {{n, ids, table, out, i & 2}, copy_rows(out, n), values};
        kernel_outputs o = {.n = 0};
        add_output(&o, out.data, rows_bytes(out, n));
        run_everywhere(&o, run_embedding, check_embedding, &t);
        free(out.data), free(t.before.data);
    }
}

static void put(tp_format_id format, void *data, int64_t i, float x)
{
    if (format == TP_FORMAT_F32)
        ((float *)data)[i] = x;
    else
        ((uint16_t *)data)[i] = format == TP_FORMAT_BF16 ? tp_f32_to_bf16(x) : tp_f32_to_f16(x);
}

static double get(tp_format_id format, const void *data, int64_t i)
{
    if (format == TP_FORMAT_F32) return (double)((const float *)data)[i];
    uint16_t h = ((const uint16_t *)data)[i];
    return (double)(format == TP_FORMAT_BF16 ? tp_bf16_to_f32(h) : tp_f16_to_f32(h));
}

/* 8 rows: plain, with a stride, transposed, transposed with a stride, in GGUF's rotary order. */
static void test_dense(void **state)
{
    (void)state;
    static const int64_t dims[] = {1, 33, 64, 5000};
    static const tp_format_id formats[] = {TP_FORMAT_F32, TP_FORMAT_BF16, TP_FORMAT_F16};
    for (int k = 0; k < 60; k++) {
        tp_format_id format = formats[k % 3];
        int64_t dim = dims[k / 3 % 4], layout = k / 12;
        bool transposed = layout == 2 || layout == 3;
        int64_t stride = (transposed ? 8 : dim) + (layout == 1 || layout == 3 ? 3 : 0), lines = transposed ? dim : 8;
        void *data = malloc((size_t)(stride * lines) * 4);
        double *values = malloc((size_t)(8 * dim) * sizeof *values);
        assert_true(data && values);
        for (int64_t i = 0; i < stride * lines; i++) put(format, data, i, (float)random_uniform());
        tp_matrix table = {format, data, 8, dim, layout == 1 || layout == 3 ? stride : 0, transposed, layout == 4 ? 4 : 0,
                           false};
        for (int64_t r = 0; r < 8; r++) {
            /* heads of 4 rows: logical 0 1 2 3 are stored at 0 2 1 3 */
            static const int64_t rotary[] = {0, 2, 1, 3, 4, 6, 5, 7};
            int64_t stored = layout == 4 ? rotary[r] : r;
            for (int64_t c = 0; c < dim; c++)
                values[r * dim + c] = get(format, data, transposed ? c * stride + stored : stored * stride + c);
        }
        try_table(table, values);
        free(data), free(values);
    }
}

/* Blocks of 32: scales of a power of two and known codes, decoded by hand. */
static void test_quantized(void **state)
{
    (void)state;
    enum { DIM = 8192 + 64 };
    int64_t blocks = DIM / 32;
    unsigned char *data = malloc((size_t)(8 * blocks * 34));
    double *values = malloc(8 * DIM * sizeof *values);
    assert_true(data && values);
    for (int64_t b = 0; b < 8 * blocks; b++) {
        uint16_t scale = tp_f32_to_f16(ldexpf(1.0f, (int)(b % 5) - 2));
        memcpy(data + b * 34, &scale, 2);
        for (int64_t i = 0; i < 32; i++) {
            int8_t code = (int8_t)((b * 7 + i * 13) % 255 - 127);
            memcpy(data + b * 34 + 2 + i, &code, 1);
            values[b * 32 + i] = ldexp((double)code, (int)(b % 5) - 2);
        }
    }
    tp_matrix table = {TP_FORMAT_Q8_0, data, 8, DIM, 0, false, 0, false};
    try_table(table, values);
    free(data), free(values);
}

static void run_backward(tp_ctx *ctx, void *data)
{
    assert_ok(ctx, tp_run_embedding_backward(ctx, data));
}

static float *table_before;

/* f32 sums in row order: exact order, so exact bits. */
static void check_backward(void *data, const char *isa)
{
    const tp_embedding_backward_args *a = data;
    float *want = memcpy(new_floats(6 * a->dim, 1), table_before, (size_t)(6 * a->dim) * 4);
    for (int64_t r = 0; r < a->n; r++) {
        for (int64_t c = 0; c < a->dim; c++) want[a->ids[r] * a->dim + c] += (float)at(a->dout, r, c);
    }
    if (memcmp(want, a->dtable, (size_t)(6 * a->dim) * 4) != 0)
        fail_msg("%s: dtable of width %lld differs", isa, (long long)a->dim);
    free(want);
}

static void test_backward(void **state)
{
    (void)state;
    static const int64_t dims[] = {1, 31, 64, 200};
    int32_t ids[90];
    for (int i = 0; i < 90; i++) ids[i] = i * i % 6;
    for (int i = 0; i < 16; i++) {
        int64_t dim = dims[i / 4], n = i & 2 ? 90 : 0;
        tp_embedding_backward_args a = {n, dim, ids, new_rows(n, dim, 1, i & 1 ? TP_BF16 : TP_F32, 1), new_floats(6 * dim, 1)};
        table_before = memcpy(new_floats(6 * dim, 1), a.dtable, (size_t)(6 * dim) * 4);
        kernel_outputs o = {.n = 0};
        add_output(&o, a.dtable, (size_t)(6 * dim) * 4);
        run_everywhere(&o, run_backward, check_backward, &a);
        free(a.dout.data), free(a.dtable), free(table_before);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_dense), cmocka_unit_test(test_quantized),
                                       cmocka_unit_test(test_backward)};
    return cmocka_run_group_tests(tests, open_devices, close_devices);
}
