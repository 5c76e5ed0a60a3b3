/* Philox against the published vectors; what is drawn from it; permutations. */
#include "tests/support.h"

#include <math.h>

#include "base/rng.h"

/* kat_vectors of Random123: philox4x32, 10 rounds. */
static void philox_matches_the_published_vectors(void **state)
{
    (void)state;
    static const struct {
        uint32_t counter[4], key[2], out[4];
    } vectors[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < sizeof vectors / sizeof vectors[0]; i++) {
        uint32_t out[4];
        tp_philox4x32(vectors[i].counter, vectors[i].key, out);
        assert_memory_equal(out, vectors[i].out, sizeof out);
    }
    /* The same third vector through a key of ours: the counter is block and step, the key is seed and stream. */
    tp_rng_key key = {.seed = 0xa4093822, .stream = 0x299f31d0, .step = 0x0370734413198a2e};
    uint32_t out[4];
    tp_rng_block(key, 0x85a308d3243f6a88, out);
    assert_memory_equal(out, vectors[2].out, sizeof out);
    key.seed = UINT64_C(1) << 32 | (0xa4093822u ^ 0x9E3779B9u); /* the upper half is folded into the lower */
    tp_rng_block(key, 0x85a308d3243f6a88, out);
    assert_memory_equal(out, vectors[2].out, sizeof out);
}

static void numbers_do_not_depend_on_how_they_are_asked_for(void **state)
{
    (void)state;
    const tp_rng_key key = {.seed = 42, .stream = TP_STREAM_INIT + 3, .step = 9};
    enum { N = 41 };
    float whole[N], part[N];
    uint32_t four[4];
    for (uint64_t i = 0; i < N; i++) {
        tp_rng_block(key, i / 4, four);
        assert_int_equal(tp_rng_u32(key, i), four[i % 4]);
        float u = tp_rng_uniform(key, i);
        assert_true(u >= 0 && u < 1 && u == (float)(four[i % 4] >> 8) / 16777216);
    }
    for (int kind = 0; kind < 2; kind++) {
        if (kind == 0)
            tp_rng_fill_uniform(key, 0, N, -2, 3, whole);
        else
            tp_rng_fill_normal(key, 0, N, 0.5f, 2, whole);
        for (int first = 0; first < N; first++) {
            if (kind == 0)
                tp_rng_fill_uniform(key, (uint64_t)first, N - first, -2, 3, part);
            else
                tp_rng_fill_normal(key, (uint64_t)first, N - first, 0.5f, 2, part);
            assert_memory_equal(part, whole + first, (size_t)(N - first) * sizeof part[0]);
        }
    }
}

/* With n = 10^6 the mean of a distribution with standard deviation s errs by s / 1000: five of these allow one failure in
 * 1.7 million seeds, and the seed is fixed. Variances of normal numbers err by sqrt(2/n), of uniform ones by less. */
static void distributions_have_their_moments(void **state)
{
    (void)state;
    enum { N = 1000000 };
    const tp_rng_key key = {.seed = 1, .stream = TP_STREAM_INIT, .step = 0};
    float *x = malloc(N * sizeof *x);
    assert_non_null(x);
    for (int kind = 0; kind < 2; kind++) {
        double mean = kind == 0 ? 0.5 : 0.25, variance = kind == 0 ? 25.0 / 12 : 4, sum = 0, squares = 0, cubes = 0,
               neighbours = 0;
        if (kind == 0)
            tp_rng_fill_uniform(key, 0, N, -2, 3, x);
        else
            tp_rng_fill_normal(key, 0, N, 0.25f, 2, x);
        for (int i = 0; i < N; i++) sum += x[i];
        for (int i = 0; i < N; i++) {
            double d = (x[i] - mean) / sqrt(variance);
            squares += d * d;
            cubes += d * d * d;
            if (i > 0) neighbours += d * (x[i - 1] - mean) / sqrt(variance);
        }
        assert_true(fabs(sum / N - mean) < 5e-3 * sqrt(variance));
        assert_true(fabs(squares / N - 1) < 5 * sqrt(2.0 / N));
        assert_true(fabs(cubes / N) < 5 * sqrt(15.0 / N));
        assert_true(fabs(neighbours / N) < 5e-3);
        for (int i = 0; i < N && kind == 0; i++) assert_true(x[i] >= -2 && x[i] <= 3);
    }
    int beyond = 0; /* the tails of the normal: P(|z| > 3) = 0.0027, so 2700 +- 5 * 52 */
    for (int i = 0; i < N; i++) beyond += fabs(x[i] - 0.25) > 6;
    assert_true(beyond > 2440 && beyond < 2960);
    free(x);
}

static void permutations_are_one_to_one(void **state)
{
    (void)state;
    static unsigned char seen[70000];
    for (uint64_t n = 1; n < 70000; n = n < 300 ? n + 1 : n * 3 / 2 + 1) {
        for (uint64_t seed = 0; seed < 3; seed++) {
            const tp_rng_key key = {.seed = seed, .stream = TP_STREAM_SHUFFLE, .step = seed * 5};
            memset(seen, 0, n);
            for (uint64_t i = 0; i < n; i++) {
                uint64_t to = tp_rng_permute(key, n, i);
                assert_true(to < n);
                assert_false(seen[to]);
                seen[to] = 1;
            }
        }
    }
    const tp_rng_key key = {.seed = 4, .stream = TP_STREAM_SHUFFLE, .step = 1};
    const uint64_t huge = UINT64_MAX - 12; /* the widest network */
    assert_true(tp_rng_permute(key, huge, 5) < huge);
    assert_int_not_equal(tp_rng_permute(key, huge, 5), tp_rng_permute(key, huge, 6));
}

/* Over 2400 keys each of the 24 orders of four elements is expected 100 times; the chi-square of 23 degrees of freedom
 * exceeds 64 with probability 1e-5. */
static void permutations_of_four_are_equally_likely(void **state)
{
    (void)state;
    int counts[256] = {0}, orders = 0;
    for (uint64_t step = 0; step < 2400; step++) {
        const tp_rng_key key = {.seed = 42, .stream = TP_STREAM_SHUFFLE, .step = step};
        unsigned order = 0;
        for (uint64_t i = 0; i < 4; i++) order = order << 2 | (unsigned)tp_rng_permute(key, 4, i);
        counts[order]++;
    }
    double chi = 0;
    for (int i = 0; i < 256; i++) {
        orders += counts[i] > 0;
        if (counts[i] > 0) chi += (counts[i] - 100.0) * (counts[i] - 100.0) / 100;
    }
    assert_int_equal(orders, 24);
    assert_true(chi < 64);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(philox_matches_the_published_vectors),
        cmocka_unit_test(numbers_do_not_depend_on_how_they_are_asked_for),
        cmocka_unit_test(distributions_have_their_moments),
        cmocka_unit_test(permutations_are_one_to_one),
        cmocka_unit_test(permutations_of_four_are_equally_likely),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
