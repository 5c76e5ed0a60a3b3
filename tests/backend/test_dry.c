/* The dry backend: addresses without memory, and counts that equal those taken by hand. */
#include "tests/support.h"

#include <stdbool.h>

#include "backend/backend.h"

static tp_ctx ctx;

static int open_dry(void **state)
{
    (void)state;
    tp_ctx_init(&ctx);
    return tp_dry_backend.open(&ctx, 0, 0, &ctx.device) == TP_OK ? 0 : -1;
}

static int close_dry(void **state)
{
    (void)state;
    tp_dry_backend.close(ctx.device);
    return 0;
}

static void forget(void)
{
    ctx.device->flops[0] = ctx.device->flops[1] = ctx.device->bytes_moved = 0;
}

static void *fake(void)
{
    void *p = tp_dry_backend.alloc(&ctx, ctx.device, 1);
    assert_non_null(p);
    return p;
}

static void test_device(void **state)
{
    (void)state;
    tp_device *device;
    assert_status(&ctx, TP_DEVICE, tp_dry_backend.open(&ctx, 1, 0, &device));
    assert_null(device);
    assert_false(tp_dry_backend.computes);
    char *a = tp_dry_backend.alloc(&ctx, ctx.device, 0), *b = tp_dry_backend.alloc(&ctx, ctx.device, (size_t)1 << 50);
    char *c = tp_dry_backend.alloc(&ctx, ctx.device, 256);
    assert_true(a != NULL && b != NULL && c != NULL);
    assert_true(b > a && c >= b + ((size_t)1 << 50) && (uintptr_t)b % 256 == 0 && (uintptr_t)c % 256 == 0);
    assert_null(tp_dry_backend.alloc(&ctx, ctx.device, SIZE_MAX - 100));
    assert_int_equal(ctx.status, TP_NOMEM);
    tp_ctx_clear(&ctx);
    int untouched = 7;
    assert_ok(&ctx, tp_dry_backend.copy_in(&ctx, b, &untouched, sizeof untouched));
    assert_ok(&ctx, tp_dry_backend.copy_out(&ctx, &untouched, b, sizeof untouched));
    assert_ok(&ctx, tp_dry_backend.zero(&ctx, b, (size_t)1 << 50));
    assert_ok(&ctx, tp_dry_backend.sync(&ctx));
    assert_int_equal(untouched, 7);
    tp_dry_backend.free(ctx.device, b, (size_t)1 << 50);
}

static void test_products(void **state)
{
    (void)state;
    void *p = fake();
    tp_matmul_args a = {.n = 10, .m = 64, .k = 96, .a = {p, TP_BF16, 96}, .c = {p, TP_F32, 64}, .precision = TP_BF16};
    a.b = (tp_matrix){TP_FORMAT_Q4_0, p, 64, 96, 0, false, 0, false};
    forget();
    assert_ok(&ctx, tp_run_matmul(&ctx, &a));
    assert_true(ctx.device->flops[0] == 0 && ctx.device->flops[1] == 2.0 * 10 * 64 * 96);
    assert_true(ctx.device->bytes_moved == 10 * 96 * 2 + 64 * (96 / 32 * 18) + 10 * 64 * 4);
    a.precision = TP_F32;
    a.b = (tp_matrix){TP_FORMAT_BF16, p, 64, 96, 0, true, 0, false};
    a.beta = 1;
    a.bias = p;
    a.residual = p;
    forget();
    assert_ok(&ctx, tp_run_matmul(&ctx, &a));
    assert_true(ctx.device->flops[0] == 2.0 * 10 * 64 * 96 && ctx.device->flops[1] == 0);
    assert_true(ctx.device->bytes_moved == 10 * 96 * 2 + 64 * 96 * 2 + 3 * 10 * 64 * 4 + 64 * 4);
    tp_matmul_tn_args t = {7, 5, 3, {p, TP_F32, 5}, {p, TP_BF16, 3}, p, 1, 1};
    forget();
    assert_ok(&ctx, tp_run_matmul_tn(&ctx, &t));
    assert_true(ctx.device->flops[0] == 2.0 * 7 * 5 * 3);
    assert_true(ctx.device->bytes_moved == 7 * 5 * 4 + 7 * 3 * 2 + 2 * 5 * 3 * 4);
}

/* Pairs by asking the mask for each. */
static double pairs(const tp_segment *s, bool causal, int64_t window)
{
    double n = 0;
    for (int64_t i = 0; i < s->q_len; i++) {
        int64_t diagonal = i + s->k_len - s->q_len;
        for (int64_t j = 0; j < s->k_len; j++) n += (!causal || j <= diagonal) && (window == 0 || j > diagonal - window);
    }
    return n;
}

static void test_attention(void **state)
{
    (void)state;
    static const int64_t lengths[][2] = {{1, 1}, {5, 5}, {1, 9}, {4, 9}, {9, 4}, {9, 1}, {0, 3}, {3, 0}, {20, 30}};
    static const int64_t windows[] = {0, 1, 2, 4, 7, 9, 100};
    void *p = fake();
    for (size_t l = 0; l < sizeof lengths / sizeof lengths[0]; l++) {
        for (int i = 0; i < 28; i++) {
            tp_segment s[2] = {{0, lengths[l][0], 0, lengths[l][1]}, {40, 6, 40, 6}};
            tp_attention_backward_args b = {.n_k = 50, .forward = {.n_q = 50, .heads = 6, .kv_heads = 2, .head_dim = 8}};
            tp_attention_args *a = &b.forward;
            tp_dtype dtype = i & 1 ? TP_BF16 : TP_F32;
            a->q = a->k = a->v = a->out = b.dout = b.dq = b.dk = b.dv = (tp_rows){p, dtype, 48};
            a->segments = s;
            a->n_segments = 2;
            a->causal = i & 2;
            a->window = windows[i / 4];
            a->n_prefix = i % 3;
            double want = 4 * 48 *
                          (pairs(&s[0], a->causal, a->window) + pairs(&s[1], a->causal, a->window) +
                           (double)(a->n_prefix * (s[0].q_len + s[1].q_len)));
            forget();
            assert_ok(&ctx, tp_run_attention(&ctx, a));
            assert_true(ctx.device->flops[dtype == TP_BF16] == want && ctx.device->flops[dtype != TP_BF16] == 0);
            forget();
            assert_ok(&ctx, tp_run_attention_backward(&ctx, &b));
            assert_true(ctx.device->flops[dtype == TP_BF16] == 2.5 * want);
            assert_true(ctx.device->bytes_moved > 0);
        }
    }
}

/* The largest gradient in bf16 over sequences of one length, until it is asked for. */
static void test_attention_size(void **state)
{
    (void)state;
    void *p = fake();
    tp_segment s[3] = {{0, 8, 0, 8}, {8, 8, 8, 8}, {16, 8, 16, 8}};
    tp_attention_backward_args b = {.n_k = 24, .forward = {.n_q = 24, .heads = 6, .kv_heads = 2, .head_dim = 8}};
    tp_attention_args *a = &b.forward;
    a->q = a->k = a->v = a->out = b.dout = b.dq = b.dk = b.dv = (tp_rows){p, TP_BF16, 48};
    a->segments = s;
    for (a->n_segments = 3; a->n_segments > 0; a->n_segments--) assert_ok(&ctx, tp_run_attention_backward(&ctx, &b));
    a->n_segments = 3;
    tp_attention_size size = tp_dry_attention_size(ctx.device);
    assert_true(size.sequences == 3 && size.length == 8 && size.heads == 6 && size.head_dim == 8);
    assert_true(tp_dry_attention_size(ctx.device).sequences == 0);
    s[2].q_len = s[2].k_len = 7;
    assert_ok(&ctx, tp_run_attention_backward(&ctx, &b));
    s[2].q_len = s[2].k_len = 8;
    a->q.dtype = TP_F32;
    assert_ok(&ctx, tp_run_attention_backward(&ctx, &b));
    assert_true(tp_dry_attention_size(ctx.device).sequences == 0);
}

#define EXPECT_BYTES(name, args, bytes)                                                                                        \
    do {                                                                                                                       \
        forget();                                                                                                              \
        assert_ok(&ctx, tp_run_##name(&ctx, args));                                                                            \
        if (ctx.device->bytes_moved != (bytes))                                                                                \
            fail_msg(#name ": %g bytes, expected %g", ctx.device->bytes_moved, (double)(bytes));                               \
        assert_true(ctx.device->flops[0] == 0 && ctx.device->flops[1] == 0);                                                   \
    } while (0)

static void test_bytes(void **state)
{
    (void)state;
    void *p = fake();
    tp_rows h = {p, TP_BF16, 10}, f = {p, TP_F32, 10};
    EXPECT_BYTES(column_sum, (&(tp_column_sum_args){3, 10, h, p, 1}), 3 * 10 * 2 + 2 * 10 * 4);
    tp_matrix table = {TP_FORMAT_Q8_0, p, 100, 64, 0, false, 0, false};
    EXPECT_BYTES(embedding, (&(tp_embedding_args){3, p, table, f, false}), 3 * (4 + 68 + 64 * 4));
    EXPECT_BYTES(embedding_backward, (&(tp_embedding_backward_args){3, 10, p, h, p}), 3 * (4 + 20 + 80));
    EXPECT_BYTES(gather_rows, (&(tp_gather_rows_args){3, 10, p, h, f}), 3 * (4 + 20 + 40));
    EXPECT_BYTES(scatter_rows, (&(tp_scatter_rows_args){3, 10, 7, p, h, f, true}), 3 * (4 + 20) + 7 * 40);
    EXPECT_BYTES(rmsnorm, (&(tp_rmsnorm_args){3, 10, h, h, p, p, 1e-5f, 1}), 2 * 60 + 40 + 12);
    EXPECT_BYTES(rmsnorm_backward, (&(tp_rmsnorm_backward_args){3, 10, h, h, h, p, p, p, true, 1}), 4 * 60 + 40 + 12 + 80);
    EXPECT_BYTES(layernorm, (&(tp_layernorm_args){3, 10, f, f, p, p, p, p, 1e-5f}), 2 * 120 + 80 + 24);
    EXPECT_BYTES(layernorm_backward, (&(tp_layernorm_backward_args){3, 10, f, f, f, p, p, p, NULL, p, false}),
                 3 * 120 + 40 + 24 + 80);
    EXPECT_BYTES(rope_table, (&(tp_rope_table_args){3, 5, p, p, 1, p, p}), 12 + 20 + 120);
    EXPECT_BYTES(rope, (&(tp_rope_args){3, 2, 5, 2, h, p, p, false}), 2 * 3 * 8 * 2 + 2 * 6 * 4);
    EXPECT_BYTES(swiglu, (&(tp_swiglu_args){3, 10, h, h, h}), 3 * 60);
    EXPECT_BYTES(swiglu_backward, (&(tp_swiglu_backward_args){3, 10, h, h, h, h, h}), 5 * 60);
    EXPECT_BYTES(gelu, (&(tp_gelu_args){3, 10, f, f, true}), 2 * 120);
    EXPECT_BYTES(gelu_backward, (&(tp_gelu_backward_args){3, 10, f, f, f, true}), 3 * 120);
    EXPECT_BYTES(add, (&(tp_add_args){3, 10, f, h, f}), 300);
    EXPECT_BYTES(scale, (&(tp_scale_args){3, 10, f, h, 0}), 60);
    EXPECT_BYTES(dropout, (&(tp_dropout_args){3, 10, f, f, 0.5f, {1, 2, 3}, 0, true, NULL}), 360);
    EXPECT_BYTES(cross_entropy, (&(tp_cross_entropy_args){3, 10, p, 10, p, p, 1, true, false, TP_F32, NULL}), 2 * 120 + 24);
    EXPECT_BYTES(cross_entropy, (&(tp_cross_entropy_args){3, 10, p, 10, p, p, 1, true, true, TP_BF16, NULL}), 120 + 60 + 24);
    EXPECT_BYTES(add_loss, (&(tp_add_loss_args){p, p}), 8);
    EXPECT_BYTES(grad_norm, (&(tp_grad_norm_args){100, p, p}), 400);
    EXPECT_BYTES(adamw, (&(tp_adamw_args){100, p, p, p, p, p, 0.9f, 0.999f, 1e-8f, 0}), 2800);
    EXPECT_BYTES(sgd, (&(tp_sgd_args){100, p, p, p, p, 0.9f, 0}), 2000);
    EXPECT_BYTES(sgd, (&(tp_sgd_args){100, p, p, p, p, 0, 0}), 1200);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_device), cmocka_unit_test(test_products),
                                       cmocka_unit_test(test_attention), cmocka_unit_test(test_attention_size),
                                       cmocka_unit_test(test_bytes)};
    return cmocka_run_group_tests(tests, open_dry, close_dry);
}
