#include "models/parallel.h"

#include <pthread.h>
#include <stdatomic.h>

struct loop {
    void (*body)(void *state, int64_t i, int worker);
    void *state;
    int64_t n;
    _Atomic int64_t next;
};

struct worker {
    struct loop *loop;
    int number;
};

static void *work(void *argument)
{
    const struct worker *w = argument;
    struct loop *loop = w->loop;
    for (;;) {
        int64_t i = atomic_fetch_add_explicit(&loop->next, 1, memory_order_relaxed);
        if (i >= loop->n) return NULL;
        loop->body(loop->state, i, w->number);
    }
}

void tp_parallel_for(int threads, int64_t n, void (*body)(void *, int64_t, int), void *state)
{
    struct loop loop = {.body = body, .state = state, .n = n};
    struct worker workers[TP_PARALLEL_MAX];
    pthread_t handles[TP_PARALLEL_MAX];
    int started = 1;
    if (threads > TP_PARALLEL_MAX) threads = TP_PARALLEL_MAX;
    for (int t = 0; t < TP_PARALLEL_MAX; t++) workers[t] = (struct worker){&loop, t};
    while (started < threads && started < n && pthread_create(&handles[started], NULL, work, &workers[started]) == 0) started++;
    work(&workers[0]);
    for (int t = 1; t < started; t++) pthread_join(handles[t], NULL);
}
