/* What happens when a mapped file is cut short by another process: touching a page behind the new end raises SIGBUS.
 * The handler looks the address up among the registered mappings, puts a page of zeros there and marks the mapping as lost;
 * the reader goes on with zeros until its next tp_file_check, which fails.
 *
 * The table below is the one mutable global of the library: a signal handler gets nothing but an address, so what it may
 * touch has to be found from there. It is lock-free, because a handler must not wait, and bounded, because it must
 * not allocate; a file that finds no place is read without mapping. */
#include "base/map_guard.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/file.h"

#define GUARD_COUNT 1024
#define FREE        ((uintptr_t)0)
#define CLAIMED     ((uintptr_t)1) /* no mapping begins there */

static struct {
    atomic_uintptr_t begin; /* written last when a mapping is added, first when it is removed */
    atomic_size_t bytes;
    atomic_bool lost;
} guards[GUARD_COUNT];

int tp_map_guard_add(const void *begin, size_t bytes)
{
    for (int i = 0; i < GUARD_COUNT; i++) {
        uintptr_t expected = FREE;
        if (!atomic_compare_exchange_strong(&guards[i].begin, &expected, CLAIMED)) continue;
        atomic_store(&guards[i].bytes, bytes);
        atomic_store(&guards[i].lost, false);
        atomic_store(&guards[i].begin, (uintptr_t)begin);
        return i;
    }
    return -1;
}

void tp_map_guard_remove(int ticket)
{
    atomic_store(&guards[ticket].begin, FREE);
}
bool tp_map_guard_lost(int ticket)
{
    return atomic_load(&guards[ticket].lost);
}

static void on_sigbus(int signal_number, siginfo_t *info, void *context)
{
    (void)context;
    int saved_errno = errno;
    uintptr_t address = (uintptr_t)info->si_addr, page = (uintptr_t)sysconf(_SC_PAGESIZE);
    bool fault = info->si_code > 0; /* from the memory system, not from kill() */
    for (int i = 0; fault && i < GUARD_COUNT; i++) {
        uintptr_t begin = atomic_load(&guards[i].begin);
        if (begin <= CLAIMED || address < begin || address - begin >= atomic_load(&guards[i].bytes)) continue;
        void *at = (char *)info->si_addr - address % page;
        if (mmap(at, page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED) break;
        atomic_store(&guards[i].lost, true);
        errno = saved_errno;
        return;
    }
    /* Not ours: the default action follows, on return for a fault (it is raised again), at once for a sent signal. */
    signal(signal_number, SIG_DFL);
    if (!fault) raise(signal_number);
    errno = saved_errno;
}

tp_status tp_map_guard_install(tp_ctx *ctx)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_sigbus;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    if (sigaction(SIGBUS, &action, NULL) != 0) return tp_fail(ctx, TP_INTERNAL, "SIGBUS handler: %s", strerror(errno));
    return TP_OK;
}
