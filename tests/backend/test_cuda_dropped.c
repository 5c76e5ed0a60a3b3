/* Low-rank factors behind dropout: CUDA kernels, with masks where they take them and with scratch, against the CPU's, and the
 * masks against the generator itself. */
#include "tests/backend/on_both.h"

static const int64_t row_counts[] = {1, 7, 16, 17, 33, 130, 1027}, wide[] = {64, 128, 192, 576, 1536, 2048};

static void rows_of(both *b, tp_rows *x, int64_t n, int64_t cols, tp_dtype dtype)
{
    *x = (tp_rows){NULL, dtype, cols + 8 * below(4)};
    bind_type(b, &x->dtype);
    fill(new_buffer(b, &x->data, (size_t)(n * x->ld) * tp_dtype_bytes(dtype), dtype), (size_t)(n * x->ld), dtype, 1);
}

/* Up to three parts of ranks 8, 16, 24 or 32. */
static int open_parts(tp_dropped_args *a, int i, int64_t *used)
{
    int n = 1 + i % 3;
    *used = 0;
    for (int k = 0; k < n; k++) {
        if (n == 2 && k == 1 && i % 4 == 1) continue; /* a part without factors */
        a->rank[k] = 8 * (1 + below(i % 2 == 0 ? 2 : 4));
        a->p[k] = i % 5 == 4 ? 0 : 0.1f * (float)(1 + k + i % 4);
        a->key[k] = (tp_rng_key){0x123456789abcdefu * (uint64_t)(i + 1), TP_STREAM_DROPOUT + (uint32_t)k, (uint64_t)i << 31};
        *used += a->rank[k];
    }
    return n;
}

static uint64_t step_of(const tp_dropped_args *a, int k)
{
    return a->state != NULL ? ((uint64_t)7 << 32) + 5 : a->key[k].step;
}

static void open_masks(both *b, tp_dropped_args *a)
{
    size_t bytes = 0, each = (size_t)(a->n * a->in / 8), part = 0;
    for (int k = 0; k < TP_PACKED_PARTS; k++) bytes += a->rank[k] > 0 ? each : 0;
    uint8_t *masks = new_buffer(b, &a->masks, bytes, TP_I32);
    for (int k = 0; k < TP_PACKED_PARTS; k++) {
        if (a->rank[k] == 0) continue;
        tp_rng_key key = a->key[k];
        key.step = step_of(a, k);
        for (int64_t at = 0; at < a->n * a->in; at++)
            if (tp_rng_uniform(key, (uint64_t)(a->first_row * a->in + at)) >= a->p[k])
                masks[part * each + (size_t)at / 8] |= (uint8_t)(1u << (at % 8));
        part++;
    }
}

static void open_state(both *b, tp_dropped_args *a)
{
    tp_step_state *s = new_buffer(b, &a->state, sizeof *s, TP_U8);
    *s = (tp_step_state){.draw = ((uint64_t)7 << 32) + 5};
}

/* What the kernels share; masks where `fused`, and scratch, which the CPU takes in any case. */
static void open_case(both *b, tp_dropped_args *a, int i, tp_dtype dtype, bool fused, int64_t *used)
{
    *a = (tp_dropped_args){.n = row_counts[below(7)], .in = fused ? wide[below(6)] : 1 + below(100)};
    a->first_row = i % 3 == 0 ? ((int64_t)1 << 33) + 5 : i;
    open_parts(a, i, used);
    if (i % 4 == 1) open_state(b, a);
    if (fused) open_masks(b, a);
    rows_of(b, &a->a, *used, a->in, dtype);
    rows_of(b, &a->scratch, a->n, a->in, dtype);
    b->buffers[b->n_buffers - 1].scratch = true;
}

static tp_dtype dtype_of(int i, bool fused)
{
    return fused || i % 3 == 0 ? TP_BF16 : i % 3 == 1 ? TP_F32 : TP_F16;
}

/* Values up to 1 / (1 - p) that one side rounds before it multiplies, and sums that are rounded: a place of 8 bits each, at
 * random. */
static tolerance tolerance_of(tp_dtype dtype, int64_t terms)
{
    return within(1e-5, by_dtype(dtype, 0x1p-6, 0x1p-20) * (1 + sqrt((double)terms)));
}

static void test_kernels(void **state)
{
    (void)state;
    NEEDS_GPU();
    char text[160];
    for (int i = 0; i < 96; i++) {
        bool fused = i % 4 != 3;
        tp_dtype dtype = dtype_of(i, fused);
        for (int which = 0; which < 3; which++) {
            both b = {0};
            tp_dropped_args a;
            int64_t used;
            open_case(&b, &a, i, dtype, fused, &used);
            rows_of(&b, &a.low, a.n, used, dtype);
            if (which == 0) make_output(&b, tolerance_of(dtype, a.in));
            rows_of(&b, &a.x, a.n, a.in, dtype);
            rows_of(&b, &a.dx, a.n, a.in, dtype);
            if (which == 2) make_output(&b, tolerance_of(dtype, used));
            for (int k = 0; k < TP_PACKED_PARTS && which == 1; k++) {
                if (a.rank[k] == 0 || (k == 1 && i % 3 == 2)) continue;
                floats_out(&b, &a.da[k], a.rank[k] * a.in, tolerance_of(dtype, a.n));
            }
            snprintf(text, sizeof text, "dropped %d n=%lld in=%lld used=%lld %s%s", which, (long long)a.n, (long long)a.in,
                     (long long)used, tp_dtype_name(dtype), fused ? ", masks" : "");
            run_both(&b, TP_KERNEL_dropped_down + which, &a, text);
        }
    }
}

/* Every bit, where there were none before. */
static void test_masks(void **state)
{
    (void)state;
    NEEDS_GPU();
    for (int i = 0; i < 12; i++) {
        both b = {0};
        tp_dropped_args a;
        int64_t used;
        unsigned char *results[MAX_BUFFERS];
        open_case(&b, &a, i, TP_BF16, true, &used);
        rows_of(&b, &a.low, a.n, used, TP_BF16);
        make_output(&b, EXACT);
        rows_of(&b, &a.x, a.n, a.in, TP_BF16);
        int masks = i % 4 == 1 ? 1 : 0; /* behind the state */
        unsigned char *expected = b.buffers[masks].host;
        b.buffers[masks].host = calloc(b.buffers[masks].bytes + 16, 1);
        b.buffers[masks].output = true;
        run_on(&b, opened.cuda, TP_KERNEL_dropped_down, &a, "masks", results);
        assert_memory_equal(results[masks], expected, b.buffers[masks].bytes);
        free(expected);
        for (int k = 0; k < b.n_buffers; k++) free(results[k]), free(b.buffers[k].host);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_kernels), cmocka_unit_test(test_masks)};
    return cmocka_run_group_tests(tests, open_both, close_both);
}
