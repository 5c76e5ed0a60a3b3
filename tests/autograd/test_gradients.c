/* Every op, every subset of trainable inputs, odd sizes, reused inputs, recomputed segments. */
#include "tests/autograd/gradcheck.h"

static float weight_values[7 * 5 + 40 * 7];
static tp_matrix frozen(int64_t rows, int64_t cols)
{
    uint64_t state = 99;
    for (size_t i = 0; i < sizeof weight_values / sizeof *weight_values; i++)
        weight_values[i] = tp_bf16_to_f32(tp_f32_to_bf16((float)(gradcheck_uniform(&state) - 0.5)));
    return tp_matrix_dense(TP_F32, weight_values, rows, cols);
}

static tp_matrix weight;

/* x [3, 5], residual [3, 7], bias [7], A [2, 5], B [7, 2] */
static tp_tensor *linear_with(tp_tape *tape, tp_tensor **in, float dropout)
{
    weight = frozen(7, 5);
    tp_lowrank term = {.a = in[3], .b = in[4], .scaling = 0.75f, .dropout = dropout, .site = 3};
    tp_linear_spec spec = {.weight = &weight, .bias = in[2], .residual = in[1], .terms = &term, .n_terms = 1};
    return tp_linear(tape, in[0], &spec);
}
static tp_tensor *linear(tp_tape *tape, tp_tensor **in)
{
    return linear_with(tape, in, 0);
}
static tp_tensor *linear_dropout(tp_tape *tape, tp_tensor **in)
{
    return linear_with(tape, in, 0.4f);
}
static tp_tensor *linear_twice(tp_tape *tape, tp_tensor **in)
{
    return tp_add(tape, linear_with(tape, in, 0), linear_with(tape, in, 0.4f));
}

/* Two adapters, each on a range of rows, one row without any. x [5, 5], A0 [1, 5], B0 [7, 1], A1 [3, 5], B1 [7, 3] */
static tp_tensor *linear_ranges(tp_tape *tape, tp_tensor **in)
{
    weight = frozen(7, 5);
    tp_lowrank terms[] = {{.a = in[1], .b = in[2], .scaling = 2, .end = 2},
                          {.a = in[3], .b = in[4], .scaling = 0.5f, .begin = 3, .end = 5, .dropout = 0.3f, .site = 1}};
    tp_linear_spec spec = {.weight = &weight, .terms = terms, .n_terms = 2};
    return tp_linear(tape, in[0], &spec);
}

static tp_tensor *matmul(tp_tape *tape, tp_tensor **in)
{
    return tp_matmul_nt(tape, in[0], in[1], 1.5f);
}
static tp_tensor *rmsnorm(tp_tape *tape, tp_tensor **in)
{
    return tp_rmsnorm(tape, in[0], in[1], 1e-5f);
}
static tp_tensor *rmsnorm_reused(tp_tape *tape, tp_tensor **in)
{
    return tp_add(tape, tp_rmsnorm(tape, in[0], in[1], 1e-5f), in[0]);
}
static tp_tensor *layernorm(tp_tape *tape, tp_tensor **in)
{
    return tp_layernorm(tape, in[0], in[1], in[2], 1e-5f);
}
static tp_tensor *layernorm_no_bias(tp_tape *tape, tp_tensor **in)
{
    return tp_layernorm(tape, in[0], in[1], NULL, 1e-5f);
}
static tp_tensor *swiglu(tp_tape *tape, tp_tensor **in)
{
    return tp_swiglu(tape, in[0], in[1]);
}
static tp_tensor *swiglu_same(tp_tape *tape, tp_tensor **in)
{
    return tp_swiglu(tape, in[0], in[0]);
}
static tp_tensor *gelu(tp_tape *tape, tp_tensor **in)
{
    return tp_gelu(tape, in[0], false);
}
static tp_tensor *gelu_exact(tp_tape *tape, tp_tensor **in)
{
    return tp_gelu(tape, in[0], true);
}
static tp_tensor *add(tp_tape *tape, tp_tensor **in)
{
    return tp_add(tape, in[0], in[1]);
}
static tp_tensor *add_same(tp_tape *tape, tp_tensor **in)
{
    return tp_add(tape, in[0], in[0]);
}
static tp_tensor *scale(tp_tape *tape, tp_tensor **in)
{
    return tp_scale(tape, in[0], -0.375f);
}
static tp_tensor *dropout(tp_tape *tape, tp_tensor **in)
{
    return tp_dropout(tape, in[0], 0.3f, 5);
}

static const int32_t ids[] = {2, 0, 2, 3};
static tp_tensor *embedding(tp_tape *tape, tp_tensor **in)
{
    return tp_embedding(tape, NULL, in[0], ids, 4, in[1]);
}

/* Rotation works in place, so it gets a copy of x. x [3, 8], two heads of 4. */
static tp_tensor *rope(tp_tape *tape, tp_tensor **in)
{
    static float cosines[3 * 2], sines[3 * 2];
    for (int i = 0; i < 6; i++) {
        cosines[i] = cosf(0.7f * (float)i);
        sines[i] = sinf(0.7f * (float)i);
    }
    tp_rope_angles angles = {cosines, sines, 2};
    return tp_rope(tape, tp_scale(tape, in[0], 1), &angles, 4);
}

/* q [7, 4 x 4], k and v [7, 2 x 4]: two packed documents and one row of padding between them. */
static const tp_segment packed[] = {{0, 3, 0, 3}, {4, 3, 4, 3}};
static tp_tensor *attention_with(tp_tape *tape, tp_tensor *q, tp_tensor *k, tp_tensor *v, int64_t window)
{
    tp_attention_spec spec = {.segments = packed,
                              .n_segments = 2,
                              .heads = 4,
                              .kv_heads = 2,
                              .head_dim = 4,
                              .causal = true,
                              .window = window,
                              .scale = 0.5f};
    return tp_attention(tape, q, k, v, &spec);
}
static tp_tensor *attention(tp_tape *tape, tp_tensor **in)
{
    return attention_with(tape, in[0], in[1], in[2], 0);
}
static tp_tensor *attention_window(tp_tape *tape, tp_tensor **in)
{
    return attention_with(tape, in[0], in[1], in[2], 2);
}
static tp_tensor *attention_shared(tp_tape *tape, tp_tensor **in)
{
    return attention_with(tape, in[0], in[1], in[1], 0);
}
static tp_tensor *attention_reused(tp_tape *tape, tp_tensor **in)
{
    return tp_add(tape, attention_with(tape, in[0], in[1], in[2], 0),
                  tp_scale(tape, attention_with(tape, in[0], in[1], in[2], 2), 2));
}

/* x [7, 16 + 8 + 8] split into q, k, v, as GPT-2's fused projection; then with one part unused. */
static tp_tensor *split(tp_tape *tape, tp_tensor **in)
{
    tp_tensor *qkv[3];
    tp_split3(tape, tp_scale(tape, in[0], 1), (int64_t[]){16, 8, 8}, qkv);
    return attention_with(tape, qkv[0], qkv[1], qkv[2], 0);
}
static tp_tensor *split_unused(tp_tape *tape, tp_tensor **in)
{
    tp_tensor *qkv[3];
    tp_split3(tape, tp_scale(tape, in[0], 1), (int64_t[]){16, 8, 8}, qkv);
    return attention_with(tape, qkv[0], qkv[1], qkv[1], 0);
}

/* x [6, 7], head [40, 7]; rows 1, 2 and 5 have labels. */
static tp_tensor *cross_entropy(tp_tape *tape, tp_tensor **in)
{
    static const int32_t rows[] = {1, 2, 5}, labels[] = {39, 0, 7};
    weight = frozen(40, 7);
    tp_cross_entropy_spec spec = {.head = &weight, .rows = rows, .labels = labels, .n = 3, .grad_scale = 0.25f};
    return tp_linear_cross_entropy(tape, in[0], &spec);
}

/* A block with everything that interacts: norm, adapted linear with dropout and residual, gated unit, reuse of x. */
static tp_tensor *block_body(tp_tape *tape, void *state, tp_tensor *x)
{
    tp_tensor **in = state;
    weight = frozen(5, 5);
    tp_lowrank term = {.a = in[2], .b = in[3], .scaling = 1, .dropout = 0.25f, .site = 9};
    tp_linear_spec spec = {.weight = &weight, .residual = x, .terms = &term, .n_terms = 1};
    tp_tensor *h = tp_linear(tape, tp_rmsnorm(tape, x, in[1], 1e-5f), &spec);
    return tp_add(tape, tp_swiglu(tape, h, tp_gelu(tape, h, false)), x);
}
static tp_tensor *block_kept(tp_tape *tape, tp_tensor **in)
{
    return tp_tape_segment(tape, block_body, in, in[0], false);
}
static tp_tensor *block_recomputed(tp_tape *tape, tp_tensor **in)
{
    return tp_tape_segment(tape, block_body, in, in[0], true);
}
static tp_tensor *blocks_recomputed(tp_tape *tape, tp_tensor **in)
{
    tp_tensor **copy = tp_tape_scratch(tape, 4, sizeof *copy);
    memcpy(copy, in, 4 * sizeof *copy);
    tp_tensor *h = tp_tape_segment(tape, block_body, copy, in[0], true);
    return tp_add(tape, tp_tape_segment(tape, block_body, copy, h, true), in[0]);
}

#define P             true, 0, 0
#define X             false, 0, 0
#define LINEAR_INPUTS {{3, 5, X}, {3, 7, X}, {1, 7, P}, {2, 5, P}, {7, 2, P}}, 5
#define BLOCK_INPUTS  {{3, 5, X}, {1, 5, P}, {2, 5, P}, {5, 2, P}}, 4
static const gradcheck_case cases[] = {
    {"linear", LINEAR_INPUTS, linear, false, 0},
    {"linear with dropout", LINEAR_INPUTS, linear_dropout, false, 0},
    {"linear used twice", LINEAR_INPUTS, linear_twice, false, 0},
    {"linear with adapters on ranges of rows",
     {{5, 5, X}, {1, 5, P}, {7, 1, P}, {3, 5, P}, {7, 3, P}},
     5,
     linear_ranges,
     false,
     0},
    {"matmul", {{3, 5, X}, {4, 5, P}}, 2, matmul, false, 0},
    {"rmsnorm", {{3, 7, X}, {1, 7, P}}, 2, rmsnorm, false, 0},
    {"rmsnorm per head", {{3, 6, X}, {1, 3, P}}, 2, rmsnorm, false, 0},
    {"rmsnorm and its input", {{3, 7, X}, {1, 7, P}}, 2, rmsnorm_reused, false, 0},
    {"layernorm", {{3, 7, X}, {1, 7, P}, {1, 7, P}}, 3, layernorm, false, 0},
    {"layernorm without bias", {{2, 9, X}, {1, 9, P}}, 2, layernorm_no_bias, false, 0},
    {"swiglu", {{3, 7, false, -3, 3}, {3, 7, X}}, 2, swiglu, false, 0},
    {"swiglu of one tensor", {{3, 7, false, -3, 3}}, 1, swiglu_same, false, 0},
    {"gelu", {{3, 7, false, -3, 3}}, 1, gelu, false, 0},
    {"gelu with erf", {{3, 7, false, -3, 3}}, 1, gelu_exact, false, 0},
    {"add", {{3, 7, X}, {3, 7, X}}, 2, add, false, 0},
    {"add of one tensor", {{3, 7, X}}, 1, add_same, false, 0},
    {"scale", {{3, 7, X}}, 1, scale, false, 0},
    {"dropout", {{3, 7, X}}, 1, dropout, false, 0},
    {"embedding", {{4, 5, P}, {4, 5, X}}, 2, embedding, false, 0},
    {"rope", {{3, 8, X}}, 1, rope, false, 0},
    {"attention", {{7, 16, X}, {7, 8, X}, {7, 8, X}}, 3, attention, false, 0},
    {"attention with a window", {{7, 16, X}, {7, 8, X}, {7, 8, X}}, 3, attention_window, false, 0},
    {"attention with k as v", {{7, 16, X}, {7, 8, X}}, 2, attention_shared, false, 0},
    {"attention used twice", {{7, 16, X}, {7, 8, X}, {7, 8, X}}, 3, attention_reused, false, 0},
    {"split", {{7, 32, X}}, 1, split, false, 0},
    {"split with an unused part", {{7, 32, X}}, 1, split_unused, false, 0},
    {"linear cross-entropy", {{6, 7, false, -2, 2}}, 1, cross_entropy, true, 0},
    {"block", BLOCK_INPUTS, block_kept, false, 0},
    {"block recomputed", BLOCK_INPUTS, block_recomputed, false, 0},
    {"two blocks recomputed", BLOCK_INPUTS, blocks_recomputed, false, 0},
};

static void test_gradients(void **state)
{
    tp_ctx ctx;
    (void)state;
    tp_ctx_init(&ctx);
    assert_ok(&ctx, tp_device_open(&ctx, "cpu", 2, &ctx.device));
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) gradcheck(&ctx, &cases[i]);
    tp_device_close(ctx.device);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_gradients)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
