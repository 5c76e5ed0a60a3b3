/* The thread pool: every item runs once, its writes are seen, no two items share a thread number at once; many short jobs
 * in a row, jobs after the workers went to sleep, and more threads than cores. */
#include "tests/support.h"

#include <stdatomic.h>
#include <time.h>

#include "backend/cpu/threads.h"

#define MOST_THREADS 9
#define MOST_ITEMS   3000

typedef struct job {
    int64_t n;
    unsigned char ran[MOST_ITEMS]; /* by one thread each, so plain memory must do */
    atomic_int inside[MOST_THREADS];
    atomic_int wrong, most_thread;
    int threads;
} job;

static void body(void *arg, int64_t i, int thread)
{
    job *j = arg;
    if (thread < 0 || thread >= j->threads || i < 0 || i >= j->n) {
        atomic_fetch_add(&j->wrong, 1);
        return;
    }
    if (atomic_fetch_add(&j->inside[thread], 1) != 0) atomic_fetch_add(&j->wrong, 1);
    j->ran[i]++;
    atomic_fetch_sub(&j->inside[thread], 1);
}

static void run(tp_threads *pool, job *j, int64_t n)
{
    j->n = n;
    memset(j->ran, 0, sizeof j->ran);
    tp_threads_for(pool, n, body, j);
    assert_int_equal(atomic_load(&j->wrong), 0);
    for (int64_t i = 0; i < MOST_ITEMS; i++) assert_int_equal(j->ran[i], i < n ? 1 : 0);
}

static void pause_ns(long ns)
{
    struct timespec t = {0, ns};
    nanosleep(&t, NULL);
}

static void test_every_item_once(void **unused)
{
    (void)unused;
    static const int64_t counts[] = {0, 1, 2, 3, 7, 64, 1000, MOST_ITEMS};
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    for (int threads = 1; threads <= MOST_THREADS; threads++) {
        tp_threads *pool = tp_threads_new(&ctx, threads);
        assert_non_null(pool);
        static job j;
        memset(&j, 0, sizeof j);
        j.threads = tp_threads_count(pool);
        assert_in_range(j.threads, 1, threads);
        for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) run(pool, &j, counts[i]);
        tp_threads_free(pool);
    }
}

static void test_many_jobs(void **unused)
{
    (void)unused;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    tp_threads *pool = tp_threads_new(&ctx, 3);
    assert_non_null(pool);
    static job j;
    memset(&j, 0, sizeof j);
    j.threads = tp_threads_count(pool);
    for (int i = 0; i < 3000; i++) run(pool, &j, i % 17);
    for (int i = 0; i < 200; i++) { /* around the time at which threads go to sleep, and long after */
        pause_ns(i % 2 == 0 ? 50000 : 500000);
        run(pool, &j, 40);
    }
    tp_threads_free(pool);
}

/* A slow item that another thread holds must be waited for, asleep too. */
static void slow_body(void *arg, int64_t i, int thread)
{
    (void)thread;
    if (i < 2) pause_ns(3000000);
    ((int *)arg)[i] = (int)i + 1;
}

static void test_waits_for_slow_items(void **unused)
{
    (void)unused;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    tp_threads *pool = tp_threads_new(&ctx, 2);
    assert_non_null(pool);
    for (int r = 0; r < 20; r++) {
        int out[4] = {0};
        tp_threads_for(pool, 4, slow_body, out);
        for (int i = 0; i < 4; i++) assert_int_equal(out[i], i + 1);
    }
    tp_threads_free(pool);
}

static void order_body(void *arg, int64_t i, int thread)
{
    (void)thread;
    _Atomic int64_t *next = arg;
    if (atomic_fetch_add(next, 1) != i) atomic_store(next, INT64_MIN / 2);
}

static void test_order(void **unused)
{
    (void)unused;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    tp_threads *pool = tp_threads_new(&ctx, 1);
    assert_non_null(pool);
    _Atomic int64_t next = 0;
    tp_threads_for(pool, 500, order_body, &next);
    assert_int_equal(atomic_load(&next), 500);
    tp_threads_free(pool);
    tp_threads_free(NULL);
}

static void test_all_cores(void **unused)
{
    (void)unused;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    tp_threads *pool = tp_threads_new(&ctx, 0);
    assert_non_null(pool);
    assert_in_range(tp_threads_count(pool), 1, tp_threads_allowed());
    tp_threads_free(pool);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_item_once), cmocka_unit_test(test_many_jobs), cmocka_unit_test(test_waits_for_slow_items),
        cmocka_unit_test(test_order),           cmocka_unit_test(test_all_cores),
    };
    return cmocka_run_group_tests_name("backend/threads", tests, NULL, NULL);
}
