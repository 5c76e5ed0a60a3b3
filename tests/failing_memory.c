/* The library's own base/mem.c, with the C library's allocator behind a switch. */
#include "tests/failing_memory.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

static long countdown;
static bool all_after, failed_once;

void fail_allocation(long n, bool and_all_after)
{
    countdown = n;
    all_after = and_all_after;
    failed_once = false;
}

bool allocation_failed(void)
{
    return failed_once;
}

static bool fails_now(void)
{
    if (countdown > 0 && --countdown == 0)
        failed_once = true;
    else if (!failed_once || !all_after)
        return false;
    return true;
}

static void *switched_malloc(size_t n)
{
    return fails_now() ? NULL : malloc(n);
}
static void *switched_calloc(size_t count, size_t n)
{
    return fails_now() ? NULL : calloc(count, n);
}
static void *switched_realloc(void *p, size_t n)
{
    return fails_now() ? NULL : realloc(p, n);
}
static int switched_memalign(void **p, size_t alignment, size_t n)
{
    return fails_now() ? 12 : posix_memalign(p, alignment, n);
}

#define malloc         switched_malloc
#define calloc         switched_calloc
#define realloc        switched_realloc
#define posix_memalign switched_memalign
#include "base/mem.c"
