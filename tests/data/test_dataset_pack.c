/* Packing and order: nothing is lost or doubled, limits hold, and every batch is a function of seed, epoch and number. */
#include "tests/support.h"

#include "base/mem.h"
#include "base/rng.h"
#include "data/pack.h"

#define MAX_ROWS 3000

static void random_lengths(uint64_t seed, uint32_t *lengths, size_t n, uint32_t max)
{
    for (size_t i = 0; i < n; i++) lengths[i] = 1 + tp_rng_u32((tp_rng_key){seed, 0, 0}, i) % max;
}

static void check_packs(const tp_packs *packs, const uint32_t *lengths, size_t n, int64_t max_length)
{
    uint8_t seen[MAX_ROWS] = {0};
    assert_int_equal(packs->starts[0], 0);
    assert_int_equal(packs->starts[packs->n], n);
    for (size_t p = 0; p < packs->n; p++) {
        int64_t tokens = 0;
        assert_true(packs->starts[p] < packs->starts[p + 1]);
        for (uint32_t i = packs->starts[p]; i < packs->starts[p + 1]; i++) {
            assert_in_range(packs->items[i], 0, n - 1);
            assert_int_equal(seen[packs->items[i]]++, 0);
            tokens += lengths[packs->items[i]];
        }
        assert_true(tokens <= max_length);
    }
}

static void test_packs(void **state)
{
    static const size_t sizes[] = {1, 2, 63, 64, 65, 1000, MAX_ROWS};
    static uint32_t lengths[MAX_ROWS];
    tp_ctx ctx;
    tp_packs packs, again;
    (void)state;
    tp_ctx_init(&ctx);
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
        for (int shuffle = 0; shuffle < 2; shuffle++) {
            uint64_t total = 0;
            random_lengths(s, lengths, sizes[s], 400);
            for (size_t i = 0; i < sizes[s]; i++) total += lengths[i];
            assert_ok(&ctx, tp_pack(&ctx, lengths, sizes[s], 512, shuffle != 0, 3, &packs));
            check_packs(&packs, lengths, sizes[s], 512);
            assert_true(packs.n * 512 >= total);
            if (sizes[s] >= 1000) assert_true((double)total / (512.0 * (double)packs.n) > 0.9); /* uniform lengths pack well */
            assert_ok(&ctx, tp_pack(&ctx, lengths, sizes[s], 512, shuffle != 0, 3, &again));
            assert_int_equal(packs.n, again.n);
            assert_memory_equal(packs.items, again.items, sizes[s] * sizeof *packs.items);
            tp_packs_free(&packs);
            tp_packs_free(&again);
        }
}

/* All batches of an epoch in the order they come; returns how many items there were. */
static size_t draw_epoch(tp_ctx *ctx, const tp_order *o, uint64_t epoch, uint32_t *out)
{
    uint32_t batch[64];
    size_t total = 0, n;
    for (uint64_t i = 0; i < tp_order_batches(o); i++) {
        assert_ok(ctx, tp_order_batch(ctx, o, epoch, i, batch, &n));
        assert_int_equal(n, i + 1 < tp_order_batches(o) || o->n % o->batch_size == 0 ? o->batch_size : o->n % o->batch_size);
        memcpy(out + total, batch, n * sizeof *out);
        total += n;
    }
    return total;
}

static void check_once_each(const uint32_t *items, size_t n)
{
    uint8_t seen[MAX_ROWS] = {0};
    for (size_t i = 0; i < n; i++) {
        assert_in_range(items[i], 0, n - 1);
        assert_int_equal(seen[items[i]]++, 0);
    }
}

static void test_order(void **state)
{
    static const uint64_t sizes[] = {1, 2, 7, 64, 65, 449, 1000, MAX_ROWS};
    static uint32_t lengths[MAX_ROWS], items[MAX_ROWS], others[MAX_ROWS];
    tp_ctx ctx;
    (void)state;
    tp_ctx_init(&ctx);
    random_lengths(1, lengths, MAX_ROWS, 500);
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
        for (uint64_t b = 1; b <= 8; b += b < 3 ? 1 : 5)
            for (int mode = 0; mode < 4; mode++) {
                tp_order o = {.seed = 5,
                              .shuffle = (mode & 1) != 0,
                              .group = (mode & 2) != 0,
                              .n = sizes[s],
                              .batch_size = b,
                              .lengths = lengths};
                assert_int_equal(draw_epoch(&ctx, &o, 0, items), o.n);
                check_once_each(items, o.n);
                if (mode == 0)
                    for (uint32_t i = 0; i < o.n; i++) assert_int_equal(items[i], i);
                draw_epoch(&ctx, &o, 1, others);
                check_once_each(others, o.n);
                bool same = memcmp(items, others, o.n * sizeof *items) == 0;
                if (o.n >= 64) assert_int_equal(same, !o.shuffle);
                o.seed = 6;
                draw_epoch(&ctx, &o, 0, others);
                if (o.n >= 64) assert_int_equal(memcmp(items, others, o.n * sizeof *items) == 0, !o.shuffle);
            }
}

/* Spread of lengths inside batches: with grouping far below what chance gives. */
static void test_groups(void **state)
{
    static uint32_t lengths[MAX_ROWS], items[MAX_ROWS];
    tp_ctx ctx;
    uint64_t spread[2] = {0, 0};
    (void)state;
    tp_ctx_init(&ctx);
    random_lengths(2, lengths, MAX_ROWS, 500);
    for (int group = 0; group < 2; group++) {
        tp_order o = {.seed = 5, .shuffle = true, .group = group != 0, .n = MAX_ROWS, .batch_size = 8, .lengths = lengths};
        draw_epoch(&ctx, &o, 3, items);
        for (size_t i = 0; i < MAX_ROWS; i += 8) {
            uint32_t least = UINT32_MAX, most = 0;
            for (size_t k = i; k < i + 8; k++) {
                if (lengths[items[k]] < least) least = lengths[items[k]];
                if (lengths[items[k]] > most) most = lengths[items[k]];
            }
            spread[group] += most - least;
        }
    }
    assert_true(spread[1] * 10 < spread[0]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_packs), cmocka_unit_test(test_order),
                                       cmocka_unit_test(test_groups)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
