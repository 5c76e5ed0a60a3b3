/* Frequencies against the published formulas, evaluated in f64 here. Our f32 results carry the rounding of one power and a
 * few products: 5e-7 relative, ten times more for dynamic, whose base is a f32 power raised to a power. */
#include "tests/support.h"

#include <math.h>

#include "models/config.h"

#define MAX_HALF 64

static const double pi = 3.14159265358979323846;

static tp_model_config llama(int64_t head_dim, double theta)
{
    return (tp_model_config){.head_dim = head_dim, .max_positions = 64, .rope = {.theta = theta}};
}

static double base_frequency(const tp_model_config *c, double theta, int i)
{
    return pow(theta, -2.0 * i / (double)c->head_dim);
}

static void compare(const tp_model_config *c, int64_t length, const double *wanted, double wanted_factor, double tolerance)
{
    float f[MAX_HALF], factor;
    tp_rope_frequencies(c, length, f, &factor);
    for (int i = 0; i < c->head_dim / 2; i++)
        if (!(fabs((double)f[i] - wanted[i]) <= tolerance * wanted[i]))
            fail_msg("frequency %d: %.9g, expected %.9g", i, (double)f[i], wanted[i]);
    if (!(fabs((double)factor - wanted_factor) <= 1e-6)) fail_msg("factor %.9g, expected %.9g", (double)factor, wanted_factor);
}

static void plain_and_linear(void **state)
{
    double wanted[MAX_HALF];
    (void)state;
    tp_model_config c = llama(64, 10000);
    for (int i = 0; i < 32; i++) wanted[i] = base_frequency(&c, 10000, i);
    compare(&c, 10, wanted, 1, 5e-7);
    c.rope.type = TP_ROPE_LINEAR;
    c.rope.factor = 2.5;
    for (int i = 0; i < 32; i++) wanted[i] /= 2.5;
    compare(&c, 10, wanted, 1, 5e-7);
}

static void dynamic_grows_beyond_the_trained_length(void **state)
{
    double wanted[MAX_HALF];
    (void)state;
    tp_model_config c = llama(16, 10000);
    c.rope.type = TP_ROPE_DYNAMIC;
    c.rope.factor = 2;
    for (int i = 0; i < 8; i++) wanted[i] = base_frequency(&c, 10000, i);
    compare(&c, 1, wanted, 1, 5e-7);
    compare(&c, 64, wanted, 1, 5e-7);
    double theta = 10000 * pow(2.0 * 160 / 64 - 1, 16.0 / 14);
    for (int i = 0; i < 8; i++) wanted[i] = base_frequency(&c, theta, i);
    compare(&c, 160, wanted, 1, 5e-6);
}

static void llama3_has_three_bands(void **state)
{
    double wanted[MAX_HALF];
    int kept = 0, stretched = 0, mixed = 0;
    (void)state;
    tp_model_config c = llama(128, 500000); /* as Llama 3.1 */
    c.rope.type = TP_ROPE_LLAMA3;
    c.rope.factor = 8;
    c.rope.low_freq_factor = 1;
    c.rope.high_freq_factor = 4;
    c.rope.original_max_positions = 8192;
    for (int i = 0; i < 64; i++) {
        double f = base_frequency(&c, 500000, i), wave = 2 * pi / f, t = (8192 / wave - 1) / 3;
        if (wave < 8192.0 / 4) {
            wanted[i] = f;
            kept++;
        } else if (wave > 8192) {
            wanted[i] = f / 8;
            stretched++;
        } else {
            wanted[i] = (1 - t) * f / 8 + t * f;
            mixed++;
        }
    }
    assert_true(kept > 10 && stretched > 10 && mixed > 3);
    compare(&c, 10, wanted, 1, 2e-6); /* the mixing weight is a difference of numbers near 1 */
}

static void yarn_ramps(void **state)
{
    double wanted[MAX_HALF];
    (void)state;
    for (int truncate = 0; truncate < 2; truncate++) {
        tp_model_config c = llama(64, 10000);
        c.rope = (tp_rope_config){.type = TP_ROPE_YARN,
                                  .theta = 10000,
                                  .factor = 4,
                                  .original_max_positions = 2048,
                                  .beta_fast = 32,
                                  .beta_slow = 1,
                                  .truncate = truncate};
        double low = 64 * log(2048 / (32 * 2 * pi)) / (2 * log(10000)), high = 64 * log(2048 / (2 * pi)) / (2 * log(10000));
        if (truncate) low = floor(low), high = ceil(high);
        for (int i = 0; i < 32; i++) {
            double ramp = fmin(fmax((i - low) / (high - low), 0), 1), f = base_frequency(&c, 10000, i);
            wanted[i] = f / 4 * ramp + f * (1 - ramp);
        }
        compare(&c, 10, wanted, 0.1 * log(4) + 1, 2e-6);
        c.rope.mscale = 1;
        c.rope.mscale_all_dim = 0.5;
        compare(&c, 10, wanted, (0.1 * log(4) + 1) / (0.05 * log(4) + 1), 2e-6);
        c.rope.attention_factor = 0.75;
        compare(&c, 10, wanted, 0.75, 2e-6);
    }
}

static void factors_divide(void **state)
{
    float factors[16];
    double wanted[MAX_HALF], stretched[MAX_HALF];
    (void)state;
    tp_model_config c = llama(16, 10000);
    for (int i = 0; i < 8; i++) {
        factors[i] = 1 + 0.125f * (float)i;
        factors[8 + i] = 2 + 0.5f * (float)i;
        wanted[i] = base_frequency(&c, 10000, i) / (double)factors[i];
        stretched[i] = base_frequency(&c, 10000, i) / (double)factors[8 + i];
    }
    c.rope.factors = factors;
    c.rope.type = TP_ROPE_FACTORS;
    compare(&c, 1000, wanted, 1, 5e-7);
    c.rope.type = TP_ROPE_LONGROPE;
    c.rope.factor = 4;
    c.rope.original_max_positions = 12;
    compare(&c, 12, wanted, sqrt(1 + log(4) / log(12)), 5e-7);
    compare(&c, 13, stretched, sqrt(1 + log(4) / log(12)), 5e-7);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(plain_and_linear),       cmocka_unit_test(dynamic_grows_beyond_the_trained_length),
        cmocka_unit_test(llama3_has_three_bands), cmocka_unit_test(yarn_ramps),
        cmocka_unit_test(factors_divide),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
