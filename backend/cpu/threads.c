/* The pool. One 64-bit word holds the job: its number in the upper half, the items left in the lower half. A thread claims
 * an item by counting that word down with compare-and-swap, which fails if another job has begun meanwhile. So a thread
 * that slept through a whole job can neither claim from the next one with old arguments nor claim twice, and the caller
 * never waits for threads that took nothing: it waits for items. */
#include "backend/cpu/threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <time.h>

#include "base/mem.h"

#define SPIN_NS       50000
#define ITEMS_PER_JOB 0xffffffffu
#define MOVE_NS       2000000 /* between two moves of the caller, at least */

typedef struct worker {
    struct tp_threads *pool;
    pthread_t id;
    int index;
    uint64_t idle_turn; /* what it last did while idle, and how far it came; -1: to the end */
    int64_t idle_step;
} worker;

struct tp_threads {
    /* the job; body, arg and n stay as they are while items are left */
    _Atomic uint64_t claim; /* job number << 32 | items left */
    void (*_Atomic body)(void *arg, int64_t i, int thread);
    void *_Atomic arg;
    _Atomic int64_t first, n; /* items first .. first + n - 1 of the caller's loop */
    _Atomic int64_t done;

    bool (*_Atomic idle_body)(void *arg, int thread, int64_t step);
    void *_Atomic idle_arg;
    _Atomic uint64_t idle_turn; /* counts what idle_body and idle_arg were */

    atomic_int asleep; /* workers in pthread_cond_wait */
    atomic_bool caller_asleep;
    atomic_bool stop;
    pthread_mutex_t mutex;
    pthread_cond_t job_here, job_done;

    cpu_set_t bound;   /* CPUs of the workers; empty: they are not bound */
    int home;          /* the CPU that is left to the caller */
    int64_t next_move; /* time, in ns, before which the caller is not moved again */

    int count;        /* threads including the caller */
    worker workers[]; /* count - 1 */
};

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

int tp_threads_allowed(void)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
    int n = CPU_COUNT(&set);
    return n > 0 ? n : 1;
}

/* Takes items of the current job until none is left. */
static void work(tp_threads *pool, int thread)
{
    uint64_t claim = atomic_load(&pool->claim);
    while ((uint32_t)claim != 0) {
        void (*body)(void *, int64_t, int) = pool->body;
        void *arg = pool->arg;
        int64_t item = pool->first + pool->n - (int64_t)(uint32_t)claim;
        if (!atomic_compare_exchange_weak(&pool->claim, &claim, claim - 1)) continue;
        int64_t n = pool->n; /* cannot change now: this item is not done */
        body(arg, item, thread);
        if (atomic_fetch_add(&pool->done, 1) + 1 == n && atomic_load(&pool->caller_asleep)) {
            pthread_mutex_lock(&pool->mutex);
            pthread_cond_signal(&pool->job_done);
            pthread_mutex_unlock(&pool->mutex);
        }
        claim = atomic_load(&pool->claim);
    }
}

static bool job_waits(tp_threads *pool)
{
    return (uint32_t)atomic_load(&pool->claim) != 0 || atomic_load(&pool->stop);
}

/* One step of what is to be done while idle; false if there is nothing to do. */
static bool idle_step(worker *self)
{
    tp_threads *pool = self->pool;
    uint64_t turn = atomic_load(&pool->idle_turn);
    if (turn != self->idle_turn) {
        self->idle_turn = turn;
        self->idle_step = 0;
    }
    if (turn == 0 || self->idle_step < 0) return false;
    bool (*body)(void *, int, int64_t) = pool->idle_body;
    bool more = body(pool->idle_arg, self->index, self->idle_step);
    self->idle_step = more ? self->idle_step + 1 : -1;
    return more;
}

static void *worker_main(void *argument)
{
    worker *self = argument;
    tp_threads *pool = self->pool;
    while (!atomic_load(&pool->stop)) {
        work(pool, self->index);
        int64_t until = now_ns() + SPIN_NS;
        while (!job_waits(pool) && (idle_step(self) || now_ns() < until)) {
            for (int i = 0; i < 8 && self->idle_step < 0 && !job_waits(pool); i++) tp_threads_pause();
        }
        if (job_waits(pool)) continue;
        pthread_mutex_lock(&pool->mutex);
        atomic_fetch_add(&pool->asleep, 1); /* before the last look at claim: see tp_threads_for */
        while (!job_waits(pool)) pthread_cond_wait(&pool->job_here, &pool->mutex);
        atomic_fetch_sub(&pool->asleep, 1);
        pthread_mutex_unlock(&pool->mutex);
    }
    return NULL;
}

/* Binds each worker to a CPU of its own, leaving the first CPU to the caller. The caller itself stays free, for threads that it
 * starts would be bound with it. */
static void bind_workers(tp_threads *pool)
{
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) < pool->count) return;
    int index = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE && index < pool->count; cpu++) {
        if (!CPU_ISSET(cpu, &allowed)) continue;
        if (index == 0) pool->home = cpu;
        if (index > 0) {
            cpu_set_t one;
            CPU_ZERO(&one);
            CPU_SET(cpu, &one);
            if (pthread_setaffinity_np(pool->workers[index - 1].id, sizeof one, &one) == 0) CPU_SET(cpu, &pool->bound);
        }
        index++;
    }
}

/* A caller that the system has put on a worker's CPU would have to share it, for many jobs until the system thinks again: it is
 * sent to its own CPU, and then left free as before. */
static void go_home(tp_threads *pool)
{
    int cpu = sched_getcpu();
    if (cpu < 0 || cpu >= CPU_SETSIZE || !CPU_ISSET(cpu, &pool->bound)) return;
    int64_t now = now_ns();
    cpu_set_t allowed, one;
    if (now < pool->next_move || pthread_getaffinity_np(pthread_self(), sizeof allowed, &allowed) != 0) return;
    pool->next_move = now + MOVE_NS;
    CPU_ZERO(&one);
    CPU_SET(pool->home, &one);
    if (pthread_setaffinity_np(pthread_self(), sizeof one, &one) == 0)
        (void)pthread_setaffinity_np(pthread_self(), sizeof allowed, &allowed);
}

tp_threads *tp_threads_new(tp_ctx *ctx, int threads)
{
    if (threads <= 0) threads = tp_threads_allowed();
    if (threads > CPU_SETSIZE) threads = CPU_SETSIZE;
    tp_threads *pool = tp_alloc(ctx, 1, sizeof *pool + (size_t)(threads - 1) * sizeof *pool->workers);
    if (pool == NULL) return NULL;
    pthread_mutex_init(&pool->mutex, NULL); /* with default attributes these cannot fail on Linux */
    pthread_cond_init(&pool->job_here, NULL);
    pthread_cond_init(&pool->job_done, NULL);
    for (pool->count = 1; pool->count < threads; pool->count++) {
        worker *w = &pool->workers[pool->count - 1];
        w->pool = pool;
        w->index = pool->count;
        w->idle_step = -1;
        if (pthread_create(&w->id, NULL, worker_main, w) != 0) break;
    }
    bind_workers(pool);
    return pool;
}

void tp_threads_free(tp_threads *pool)
{
    if (pool == NULL) return;
    pthread_mutex_lock(&pool->mutex);
    atomic_store(&pool->stop, true);
    pthread_cond_broadcast(&pool->job_here);
    pthread_mutex_unlock(&pool->mutex);
    for (int i = 0; i < pool->count - 1; i++) pthread_join(pool->workers[i].id, NULL);
    pthread_cond_destroy(&pool->job_here);
    pthread_cond_destroy(&pool->job_done);
    pthread_mutex_destroy(&pool->mutex);
    tp_free(pool);
}

int tp_threads_count(const tp_threads *pool)
{
    return pool->count;
}

static void wait_until_done(tp_threads *pool, int64_t n)
{
    int64_t until = now_ns() + SPIN_NS;
    while (atomic_load(&pool->done) < n && now_ns() < until) {
        for (int i = 0; i < 8 && atomic_load(&pool->done) < n; i++) tp_threads_pause();
    }
    if (atomic_load(&pool->done) == n) return;
    pthread_mutex_lock(&pool->mutex);
    atomic_store(&pool->caller_asleep, true); /* before the last look at done, as the last worker looks after counting */
    while (atomic_load(&pool->done) < n) pthread_cond_wait(&pool->job_done, &pool->mutex);
    atomic_store(&pool->caller_asleep, false);
    pthread_mutex_unlock(&pool->mutex);
}

static void run_job(tp_threads *pool, int64_t first, int64_t n, void (*body)(void *arg, int64_t i, int thread), void *arg)
{
    go_home(pool);
    pool->body = body;
    pool->arg = arg;
    pool->first = first;
    pool->n = n;
    pool->done = 0;
    uint64_t number = (atomic_load(&pool->claim) >> 32) + 1;
    atomic_store(&pool->claim, number << 32 | (uint64_t)n);
    /* A worker counts itself asleep and then looks at claim; we write claim and then look at the count. One sees the other. */
    if (atomic_load(&pool->asleep) > 0) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->job_here);
        pthread_mutex_unlock(&pool->mutex);
    }
    work(pool, 0);
    wait_until_done(pool, n);
}

void tp_threads_while_idle(tp_threads *pool, bool (*body)(void *arg, int thread, int64_t step), void *arg)
{
    if (pool->count == 1) return;
    pool->idle_body = body;
    pool->idle_arg = arg;
    atomic_fetch_add(&pool->idle_turn, 1);
}

void tp_threads_for(tp_threads *pool, int64_t n, void (*body)(void *arg, int64_t i, int thread), void *arg)
{
    if (pool->count == 1 || n <= 1) {
        for (int64_t i = 0; i < n; i++) body(arg, i, 0);
        return;
    }
    for (int64_t first = 0; first < n; first += ITEMS_PER_JOB) {
        int64_t part = n - first < ITEMS_PER_JOB ? n - first : ITEMS_PER_JOB;
        run_job(pool, first, part, body, arg);
    }
}
