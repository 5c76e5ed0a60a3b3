/* The hash map: order, replacement, many keys, keys with any bytes, memory that runs out. */
#include "tests/support.h"

#include "base/map.h"
#include "tests/failing_memory.h"

/* CPython's hash of bytes is SipHash-1-3, under an all-zero key with PYTHONHASHSEED=0:
 *   b = bytes((i * 7 + 1) & 255 for i in range(64)); hash(b[:n]) */
static void siphash_is_the_one_of_cpython(void **state)
{
    (void)state;
    static const struct {
        size_t n;
        int64_t hash;
    } expected[] = {{1, INT64_C(4952851536318644461)},  {2, INT64_C(-5604601855093661232)},  {7, INT64_C(-5471853004728186924)},
                    {8, INT64_C(-3301821044017527000)}, {9, INT64_C(5675706999282627899)},   {15, INT64_C(6228321179899629906)},
                    {16, INT64_C(9109651249763150532)}, {17, INT64_C(-2227849295718392701)}, {31, INT64_C(2046720472479807910)},
                    {63, INT64_C(6644153837113340159)}};
    unsigned char bytes[64];
    for (int i = 0; i < 64; i++) bytes[i] = (unsigned char)(i * 7 + 1);
    for (size_t i = 0; i < sizeof expected / sizeof expected[0]; i++)
        assert_int_equal((int64_t)tp_siphash13(0, 0, bytes, expected[i].n), expected[i].hash);
    assert_int_not_equal(tp_siphash13(1, 0, bytes, 8), tp_siphash13(0, 0, bytes, 8));
    assert_int_not_equal(tp_siphash13(0, 1, bytes, 8), tp_siphash13(0, 0, bytes, 8));
    assert_int_equal(tp_hash("abc", 3), tp_hash("abc", 3));
}

static tp_span key_number(int i, char out[16])
{
    snprintf(out, 16, "key%d", i);
    return tp_span_of(out);
}

static void many_keys_stay_in_order(void **state)
{
    (void)state;
    enum { N = 50000 };
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    tp_map *map = tp_map_new(&ctx, false);
    char text[16];
    int64_t value;
    bool replaced;
    assert_non_null(map);
    assert_false(tp_map_get(map, tp_span_of("absent"), &value));
    for (int i = 0; i < N; i++) {
        assert_ok(&ctx, tp_map_put(&ctx, map, key_number(i, text), i * 3, &replaced));
        assert_false(replaced);
    }
    for (int i = 0; i < N; i += 7) {
        assert_ok(&ctx, tp_map_put(&ctx, map, key_number(i, text), -i, &replaced));
        assert_true(replaced);
    }
    assert_int_equal(tp_map_count(map), N);
    for (int i = 0; i < N; i++) {
        tp_span key;
        assert_true(tp_map_get(map, key_number(i, text), &value));
        assert_int_equal(value, i % 7 == 0 ? -i : i * 3);
        tp_map_at(map, (size_t)i, &key, &value);
        assert_true(tp_span_is(key, text));
        assert_int_equal(value, i % 7 == 0 ? -i : i * 3);
    }
    value = 77;
    assert_false(tp_map_get(map, tp_span_of("key50000"), &value));
    assert_int_equal(value, 77);
    tp_map_free(map);
    tp_map_free(NULL);
}

static void keys_are_any_bytes(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    static char huge[200000];
    memset(huge, 'h', sizeof huge);
    const tp_span keys[] = {{"", 0},     {"\0", 1}, {"\0\0", 2},         {"a\0b", 3},
                            {"a\0c", 3}, {"a", 1},  {huge, sizeof huge}, {huge, sizeof huge - 1}};
    enum { N = sizeof keys / sizeof keys[0] };
    for (int borrowed = 0; borrowed < 2; borrowed++) {
        tp_map *map = tp_map_new(&ctx, borrowed != 0);
        for (int i = 0; i < N; i++) assert_ok(&ctx, tp_map_put(&ctx, map, keys[i], i, NULL));
        assert_int_equal(tp_map_count(map), N);
        for (int i = 0; i < N; i++) {
            int64_t value = -1;
            tp_span key;
            assert_true(tp_map_get(map, keys[i], &value));
            assert_int_equal(value, i);
            tp_map_at(map, (size_t)i, &key, &value);
            if (keys[i].len > 0) assert_int_equal(key.data == keys[i].data, borrowed);
        }
        tp_map_free(map);
    }
}

static tp_status fill(tp_ctx *ctx)
{
    tp_map *map = tp_map_new(ctx, false);
    tp_status status = map != NULL ? tp_map_reserve(ctx, map, 20) : TP_NOMEM;
    char text[16];
    for (int i = 0; i < 200 && status == TP_OK; i++) {
        status = tp_map_put(ctx, map, key_number(i, text), i, NULL);
        if (tp_map_count(map) != (size_t)i + (status == TP_OK))
            status = TP_INTERNAL; /* a failed put leaves the map as it was */
    }
    tp_map_free(map);
    return status;
}

static void memory_may_run_out(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    assert_survives_failing_memory(&ctx, fill(&ctx));
    tp_map *map = tp_map_new(&ctx, false);
    assert_status(&ctx, TP_NOMEM, tp_map_reserve(&ctx, map, SIZE_MAX));
    tp_map_free(map);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(siphash_is_the_one_of_cpython),
        cmocka_unit_test(many_keys_stay_in_order),
        cmocka_unit_test(keys_are_any_bytes),
        cmocka_unit_test(memory_may_run_out),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
