/* The rotary table and the rotation: against float64, and bit for bit where the order of roundings is the contract. */
#include "tests/backend/kernels.h"

typedef struct rope_case {
    tp_rope_table_args table;
    tp_rope_args rope;
    tp_rows before;
} rope_case;

static void run_rope(tp_ctx *ctx, void *data)
{
    rope_case *t = data;
    assert_ok(ctx, tp_run_rope_table(ctx, &t->table));
    assert_ok(ctx, tp_run_rope(ctx, &t->rope));
}

static float bf16(float x)
{
    return tp_bf16_to_f32(tp_f32_to_bf16(x));
}

static void check_rope(void *data, const char *isa)
{
    rope_case *t = data;
    const tp_rope_args *a = &t->rope;
    for (int64_t r = 0; r < a->n; r++) {
        for (int64_t i = 0; i < a->half; i++) {
            float angle = (float)t->table.positions[r] * t->table.inv_freq[i];
            double c = cos((double)angle) * (double)t->table.factor, s = sin((double)angle) * (double)t->table.factor;
            /* one rounding of cosf (under 1 ulp), one of the factor */
            assert_near((double)a->cos[r * a->half + i], c, 2.5 * 0x1p-24 * (double)t->table.factor, "%s: cos", isa);
            assert_near((double)a->sin[r * a->half + i], s, 2.5 * 0x1p-24 * (double)t->table.factor, "%s: sin", isa);
        }
        for (int64_t e = 0; e < a->heads * a->head_dim; e++) {
            int64_t i = e % a->head_dim, pair = i % a->half, other = i < a->half ? e + a->half : e - a->half;
            float want = (float)at(t->before, r, e);
            if (i < 2 * a->half) {
                float x = want, y = (float)at(t->before, r, other);
                float c = a->cos[r * a->half + pair], s = a->sin[r * a->half + pair];
                bool down = i < a->half; /* x cos - y sin here, x cos + y sin above; the inverse swaps the signs */
                if (a->x.dtype == TP_BF16) {
                    float xc = bf16(x * bf16(c)), ys = bf16(y * bf16(s));
                    want = bf16(down != a->inverse ? xc - ys : xc + ys);
                } else {
                    float xc = x * c, ys = y * s;
                    want = down != a->inverse ? xc - ys : xc + ys;
                }
            }
            if ((float)at(a->x, r, e) != want)
                fail_msg("%s: x[%lld, %lld]: got %.9g, expected %.9g", isa, (long long)r, (long long)e, at(a->x, r, e),
                         (double)want);
        }
    }
}

static void try_rope(int64_t n, int64_t heads, int64_t head_dim, int64_t half, tp_dtype dtype, bool inverse, float factor)
{
    rope_case t = {{n, half, NULL, NULL, factor, NULL, NULL}, {n, heads, head_dim, half, {0}, NULL, NULL, inverse}, {0}};
    int32_t *positions = malloc((size_t)n * 4 + 4);
    float *inv_freq = new_floats(half, 1), *cosine = new_floats(n * half, 1), *sine = new_floats(n * half, 1);
    assert_non_null(positions);
    for (int64_t i = 0; i < n; i++) positions[i] = (int32_t)(i * i * 37 % 131072);
    for (int64_t i = 0; i < half; i++) inv_freq[i] = powf(10000.0f, -2.0f * (float)i / (float)(2 * half));
    t.table.positions = positions;
    t.table.inv_freq = inv_freq;
    t.table.cos = cosine;
    t.table.sin = sine;
    t.rope.cos = cosine;
    t.rope.sin = sine;
    t.rope.x = new_rows(n, heads * head_dim, 3, dtype, 2);
    t.before = copy_rows(t.rope.x, n);
    kernel_outputs o = {.n = 0};
    add_output(&o, t.rope.x.data, rows_bytes(t.rope.x, n));
    add_output(&o, cosine, (size_t)(n * half) * 4);
    add_output(&o, sine, (size_t)(n * half) * 4);
    run_everywhere(&o, run_rope, check_rope, &t);
    free(t.rope.x.data), free(t.before.data), free(positions), free(inv_freq), free(cosine), free(sine);
}

static void test_shapes(void **state)
{
    (void)state;
    static const int64_t shapes[][3] = {{1, 2, 1},   {3, 16, 8},   {2, 20, 10}, {9, 64, 32},
                                        {2, 80, 16}, {1, 128, 64}, {2, 7, 3},   {2, 40, 17}};
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
        for (int64_t n = 0; n < 60; n += 59) {
            for (int i = 0; i < 4; i++)
                try_rope(n, shapes[s][0], shapes[s][1], shapes[s][2], i & 1 ? TP_BF16 : TP_F32, i & 2, i & 2 ? 1.25f : 1.0f);
        }
    }
}

/* A rotation and its inverse give the start again, up to four roundings. */
static void test_inverse(void **state)
{
    (void)state;
    for (int i = 0; i < 3; i++) {
        if (!devices[i].there) continue;
        tp_ctx ctx;
        tp_ctx_init(&ctx);
        ctx.device = devices[i].device[0];
        tp_rows x = new_rows(5, 32, 0, TP_F32, 1), before = copy_rows(x, 5);
        float inv_freq[8] = {1, 0.3f, 0.1f, 0.03f, 0.01f, 3e-3f, 1e-3f, 3e-4f}, cosine[40], sine[40];
        int32_t positions[5] = {0, 1, 2, 1000, 50000};
        tp_rope_table_args table = {5, 8, positions, inv_freq, 1.0f, cosine, sine};
        assert_ok(&ctx, tp_run_rope_table(&ctx, &table));
        tp_rope_args rope = {5, 2, 16, 8, x, cosine, sine, false};
        assert_ok(&ctx, tp_run_rope(&ctx, &rope));
        rope.inverse = true;
        assert_ok(&ctx, tp_run_rope(&ctx, &rope));
        for (int64_t e = 0; e < 160; e++)
            assert_near(at(x, 0, e), at(before, 0, e), 6 * 0x1p-24, "%s: element %lld", isa_names[i], (long long)e);
        free(x.data), free(before.data);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_shapes), cmocka_unit_test(test_inverse)};
    return cmocka_run_group_tests(tests, open_devices, close_devices);
}
