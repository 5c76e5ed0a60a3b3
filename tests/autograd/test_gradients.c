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

/* A stacked weight [7, 5] with room for 3 columns and rows, in the tape's precision; its margin is for the op to fill. */
static tp_matrix stacked(tp_dtype precision)
{
    enum { ROOM = 3, STRIDE = 5 + ROOM };
    static float wide[(7 + ROOM) * STRIDE];
    static uint16_t narrow[(7 + ROOM) * STRIDE];
    weight = frozen(7, 5);
    for (int r = 0; r < 7; r++)
        for (int c = 0; c < 5; c++) {
            wide[r * STRIDE + c] = weight_values[r * 5 + c];
            narrow[r * STRIDE + c] = tp_f32_to_bf16(weight_values[r * 5 + c]);
        }
    tp_matrix w = tp_matrix_dense(precision, precision == TP_BF16 ? (void *)narrow : (void *)wide, 7, 5);
    w.stride = STRIDE;
    return w;
}

/* Parts of 4 and 3 rows. x [3, 5], residual [3, 7], A0 [2, 5], B0 [4, 2], A1 [1, 5], B1 [3, 1] */
static tp_tensor *joint_of(tp_tape *tape, tp_tensor *x, tp_tensor **in, float dropout)
{
    weight = stacked(tp_tape_precision(tape));
    const tp_lowrank terms[] = {{.a = in[2], .b = in[3], .scaling = 0.75f, .dropout = dropout, .site = 2},
                                {.a = in[4], .b = in[5], .scaling = 2, .dropout = dropout / 2, .site = 3}};
    tp_joint_spec spec = {.weight = &weight, .room = 3, .residual = in[1], .n_parts = 2};
    spec.parts[0] = (struct tp_joint_part){4, &terms[0]};
    spec.parts[1] = (struct tp_joint_part){3, &terms[1]};
    return tp_joint_linear(tape, x, &spec);
}
/* What the check reads has no gaps. */
static tp_tensor *without_room(tp_tape *tape, tp_tensor *y)
{
    tp_tape_set_room(tape, 0);
    return tp_scale(tape, y, 1);
}
static tp_tensor *joint(tp_tape *tape, tp_tensor **in)
{
    tp_tape_set_room(tape, 3);
    return without_room(tape, joint_of(tape, tp_scale(tape, in[0], 1), in, 0));
}
static tp_tensor *joint_dropout(tp_tape *tape, tp_tensor **in)
{
    tp_tape_set_room(tape, 3);
    return without_room(tape, joint_of(tape, tp_scale(tape, in[0], 1), in, 0.4f));
}
/* One factor alone, for the part of the last 3 rows, and x used twice. x [3, 5], A [2, 5], B [3, 2] */
static tp_tensor *joint_partly(tp_tape *tape, tp_tensor **in)
{
    weight = stacked(tp_tape_precision(tape));
    const tp_lowrank term = {.a = in[1], .b = in[2], .scaling = 0.5f};
    tp_joint_spec spec = {.weight = &weight, .room = 3, .n_parts = 2};
    tp_tape_set_room(tape, 2);
    tp_tensor *x = tp_scale(tape, in[0], 1);
    spec.parts[0].rows = 4;
    spec.parts[1] = (struct tp_joint_part){3, &term};
    tp_tensor *once = tp_joint_linear(tape, x, &spec);
    return without_room(tape, tp_add(tape, once, tp_joint_linear(tape, x, &spec)));
}
/* The norm's result is forgotten and made again. Inputs as of joint, and the norm's weight [1, 5]. */
static tp_tensor *forgotten(tp_tape *tape, tp_tensor **in, float dropout)
{
    tp_tape_set_room(tape, 3);
    tp_tensor *h = tp_rmsnorm(tape, in[0], in[6], 1e-5f);
    tp_tensor *y = joint_of(tape, h, in, dropout);
    tp_tape_forget(tape, h);
    return without_room(tape, y);
}
static tp_tensor *joint_forgotten(tp_tape *tape, tp_tensor **in)
{
    return forgotten(tape, in, 0);
}
static tp_tensor *joint_forgotten_dropout(tp_tape *tape, tp_tensor **in)
{
    return forgotten(tape, in, 0.4f);
}

/* A gated block as models have it, in which the device makes SwiGLU's result again and factors on both sides are met there:
 * x + (silu(gate) * up) W^T with gate and up the parts of one joint linear. x [3, 5], A0 [2, 5], B0 [5, 2], A1 [1, 5], B1 [5,
 * 1], A2 [2, 5], B2 [5, 2] */
static tp_tensor *gated_with(tp_tape *tape, tp_tensor **in, bool forget)
{
    enum { STRIDE = 8 };
    static float wide[2][(10 + 3) * STRIDE];
    static uint16_t narrow[2][(10 + 3) * STRIDE];
    bool bf16 = tp_tape_precision(tape) == TP_BF16;
    static tp_matrix w[2];
    (void)frozen(7, 5);
    for (int i = 0; i < 2; i++) {
        int rows = i == 0 ? 10 : 5;
        for (int k = 0; k < rows * 5; k++) {
            float value = weight_values[k % 35] * (k < 35 ? 1 : -0.5f);
            wide[i][k / 5 * STRIDE + k % 5] = value;
            narrow[i][k / 5 * STRIDE + k % 5] = tp_f32_to_bf16(value);
        }
        w[i] = tp_matrix_dense(bf16 ? TP_BF16 : TP_F32, bf16 ? (void *)narrow[i] : (void *)wide[i], rows, 5);
        w[i].stride = STRIDE;
    }
    tp_device *device = tp_tape_ctx(tape)->device;
    const tp_lowrank terms[] = {{.a = in[1], .b = in[2], .scaling = 0.75f},
                                {.a = in[3], .b = in[4], .scaling = 2},
                                {.a = in[5], .b = in[6], .scaling = 0.5f}};
    const int64_t sizes[] = {5, 5};
    tp_tensor *parts[2];
    tp_tape_set_room(tape, 3);
    device->makes_swiglu_again = true;
    tp_tensor *x = tp_scale(tape, in[0], 1);
    tp_joint_spec before = {.weight = &w[0], .room = 3, .n_parts = 2, .parts = {{5, &terms[0]}, {5, &terms[1]}}};
    tp_joint_spec behind = {.weight = &w[1], .room = 3, .residual = x, .n_parts = 1, .parts = {{5, &terms[2]}}};
    tp_split(tape, tp_joint_linear(tape, x, &before), sizes, 2, parts);
    tp_tensor *product = tp_swiglu(tape, parts[0], parts[1]);
    tp_tensor *y = tp_joint_linear(tape, product, &behind);
    tp_tape_forget(tape, product);
    if (forget) tp_tape_forget(tape, parts[0]);
    if (tp_tape_status(tape) == TP_OK)
        assert_int_equal(parts[1]->forgotten, forget && parts[1]->maker != NULL && tp_tape_recording(tape));
    device->makes_swiglu_again = false;
    return without_room(tape, y);
}
static tp_tensor *gated(tp_tape *tape, tp_tensor **in)
{
    return gated_with(tape, in, false);
}
static tp_tensor *gated_forgotten(tp_tape *tape, tp_tensor **in)
{
    return gated_with(tape, in, true);
}

static tp_tensor *matmul(tp_tape *tape, tp_tensor **in)
{
    return tp_matmul_nt(tape, in[0], in[1], 1.5f);
}
static tp_tensor *rmsnorm(tp_tape *tape, tp_tensor **in)
{
    return tp_rmsnorm(tape, in[0], in[1], 1e-5f);
}
/* Rows with a gap, and a part of their columns. */
static tp_tensor *rmsnorm_of_view(tp_tape *tape, tp_tensor **in)
{
    tp_tensor *views[2];
    const int64_t sizes[] = {6, 2};
    tp_tape_set_room(tape, 3);
    tp_split(tape, tp_scale(tape, in[0], 1), sizes, 2, views);
    return without_room(tape, tp_rmsnorm(tape, views[0], in[1], 1e-5f));
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
    tp_split(tape, tp_scale(tape, in[0], 1), (int64_t[]){16, 8, 8}, 3, qkv);
    return attention_with(tape, qkv[0], qkv[1], qkv[2], 0);
}
static tp_tensor *split_unused(tp_tape *tape, tp_tensor **in)
{
    tp_tensor *qkv[3];
    tp_split(tape, tp_scale(tape, in[0], 1), (int64_t[]){16, 8, 8}, 3, qkv);
    return attention_with(tape, qkv[0], qkv[1], qkv[1], 0);
}

/* Queries and keys, first behind each other, then with the values in between. */
static tp_tensor *rope_both(tp_tape *tape, tp_tensor **in)
{
    static float cosines[7 * 2], sines[7 * 2];
    tp_tensor *qkv[3], *sum = NULL;
    for (int i = 0; i < 14; i++) {
        cosines[i] = cosf(0.7f * (float)i);
        sines[i] = sinf(0.7f * (float)i);
    }
    tp_rope_angles angles = {cosines, sines, 2};
    for (int key = 1; key <= 2; key++) {
        tp_split(tape, tp_scale(tape, in[0], 1), (int64_t[]){16, 8, 8}, 3, qkv);
        if (!tp_rope_both(tape, &qkv[0], &qkv[key], &angles, 4)) return NULL;
        tp_tensor *y = attention_with(tape, qkv[0], qkv[key], qkv[3 - key], 0);
        sum = sum != NULL ? tp_add(tape, sum, tp_scale(tape, y, 0.5f)) : y;
    }
    return sum;
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
#define JOINT_INPUTS                                                                                                           \
    {                                                                                                                          \
        {3, 5, X}, {3, 7, X}, {2, 5, P}, {4, 2, P}, {1, 5, P},                                                                 \
        {                                                                                                                      \
            3, 1, P                                                                                                            \
        }
#define BLOCK_INPUTS {{3, 5, X}, {1, 5, P}, {2, 5, P}, {5, 2, P}}, 4
static const gradcheck_case cases[] = {{"linear", LINEAR_INPUTS, linear, false, 0},
                                       {"linear with dropout", LINEAR_INPUTS, linear_dropout, false, 0},
                                       {"linear used twice", LINEAR_INPUTS, linear_twice, false, 0},
                                       {"linear with adapters on ranges of rows",
                                        {{5, 5, X}, {1, 5, P}, {7, 1, P}, {3, 5, P}, {7, 3, P}},
                                        5,
                                        linear_ranges,
                                        false,
                                        0},
                                       {"joint linear", JOINT_INPUTS},
                                       6,
                                       joint,
                                       false,
                                       0},
                            {"joint linear, adapted in part", {{3, 5, X}, {2, 5, P}, {3, 2, P}}, 3, joint_partly, false, 0},
                            {"gated block",
                             {{3, 5, X}, {2, 5, P}, {5, 2, P}, {1, 5, P}, {5, 1, P}, {2, 5, P}, {5, 2, P}},
                             7,
                             gated,
                             false,
                             0},
                            {"gated block whose gate and up are forgotten",
                             {{3, 5, X}, {2, 5, P}, {5, 2, P}, {1, 5, P}, {5, 1, P}, {2, 5, P}, {5, 2, P}},
                             7,
                             gated_forgotten,
                             false,
                             0},
                            {"joint linear of a forgotten norm", JOINT_INPUTS, {1, 5, P}}, 7, joint_forgotten, false, 0
}
, {"matmul", {{3, 5, X}, {4, 5, P}}, 2, matmul, false, 0}, {"rmsnorm", {{3, 7, X}, {1, 7, P}}, 2, rmsnorm, false, 0},
    {"rmsnorm per head", {{3, 6, X}, {1, 3, P}}, 2, rmsnorm, false, 0},
    {"rmsnorm per head, of a view", {{3, 8, X}, {1, 3, P}}, 2, rmsnorm_of_view, false, 0},
    {"rmsnorm and its input", {{3, 7, X}, {1, 7, P}}, 2, rmsnorm_reused, false, 0},
    {"layernorm", {{3, 7, X}, {1, 7, P}, {1, 7, P}}, 3, layernorm, false, 0},
    {"layernorm without bias", {{2, 9, X}, {1, 9, P}}, 2, layernorm_no_bias, false, 0},
    {"swiglu", {{3, 7, false, -3, 3}, {3, 7, X}}, 2, swiglu, false, 0},
    {"swiglu of one tensor", {{3, 7, false, -3, 3}}, 1, swiglu_same, false, 0},
    {"gelu", {{3, 7, false, -3, 3}}, 1, gelu, false, 0}, {"gelu with erf", {{3, 7, false, -3, 3}}, 1, gelu_exact, false, 0},
    {"add", {{3, 7, X}, {3, 7, X}}, 2, add, false, 0}, {"add of one tensor", {{3, 7, X}}, 1, add_same, false, 0},
    {"joint linear with dropout",
     {{3, 5, X}, {3, 7, X}, {2, 5, P}, {4, 2, P}, {1, 5, P}, {3, 1, P}},
     6,
     joint_dropout,
     false,
     0},
    {"joint linear with dropout of a forgotten norm",
     {{3, 5, X}, {3, 7, X}, {2, 5, P}, {4, 2, P}, {1, 5, P}, {3, 1, P}, {1, 5, P}},
     7,
     joint_forgotten_dropout,
     false,
     0},
    {"scale", {{3, 7, X}}, 1, scale, false, 0}, {"dropout", {{3, 7, X}}, 1, dropout, false, 0},
    {"embedding", {{4, 5, P}, {4, 5, X}}, 2, embedding, false, 0}, {"rope", {{3, 8, X}}, 1, rope, false, 0},
    {"attention", {{7, 16, X}, {7, 8, X}, {7, 8, X}}, 3, attention, false, 0},
    {"attention with a window", {{7, 16, X}, {7, 8, X}, {7, 8, X}}, 3, attention_window, false, 0},
    {"attention with k as v", {{7, 16, X}, {7, 8, X}}, 2, attention_shared, false, 0},
    {"attention used twice", {{7, 16, X}, {7, 8, X}, {7, 8, X}}, 3, attention_reused, false, 0},
    {"rope of queries and keys", {{7, 32, X}}, 1, rope_both, false, 0}, {"split", {{7, 32, X}}, 1, split, false, 0},
    {"split with an unused part", {{7, 32, X}}, 1, split_unused, false, 0},
    {"linear cross-entropy", {{6, 7, false, -2, 2}}, 1, cross_entropy, true, 0}, {"block", BLOCK_INPUTS, block_kept, false, 0},
    {"block recomputed", BLOCK_INPUTS, block_recomputed, false, 0},
    {"two blocks recomputed", BLOCK_INPUTS, blocks_recomputed, false, 0},
}
;

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
