#include "tests/failing_malloc.h"

#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__has_feature)
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__ 1 /* clang's name for it */
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define SANITIZED   1
#define UNDER(name) __interceptor_##name
#else
#define SANITIZED   0
#define UNDER(name) __libc_##name
#endif

void *UNDER(malloc)(size_t n);
void *UNDER(calloc)(size_t count, size_t n);
void *UNDER(realloc)(void *p, size_t n);
void *UNDER(memalign)(size_t alignment, size_t n);
void UNDER(free)(void *p);

/* What replaces the C library's; declared here because stdlib.h marks some of them in ways that a definition cannot repeat. */
void *malloc(size_t n);
void *calloc(size_t count, size_t n);
void *realloc(void *p, size_t n);
void *memalign(size_t alignment, size_t n);
void *aligned_alloc(size_t alignment, size_t n);
int posix_memalign(void **p, size_t alignment, size_t n);
void free(void *p);

static atomic_long counted, target, live;
static atomic_bool armed, all_after, failed_once;

void fail_malloc(long n, bool and_all_after)
{
    atomic_store(&armed, false);
    atomic_store(&counted, 0);
    atomic_store(&target, n);
    atomic_store(&all_after, and_all_after);
    atomic_store(&failed_once, false);
    atomic_store(&armed, true);
}

long malloc_count(void)
{
    return atomic_load(&counted);
}
bool malloc_failed(void)
{
    return atomic_load(&failed_once);
}
long malloc_live(void)
{
    return SANITIZED ? 0 : atomic_load(&live);
}

static bool fails_now(void)
{
    if (!atomic_load(&armed)) return false;
    long n = atomic_fetch_add(&counted, 1) + 1, at = atomic_load(&target);
    if (at == 0 || n < at || (n > at && !atomic_load(&all_after))) return false;
    atomic_store(&failed_once, true);
    errno = ENOMEM;
    return true;
}

static void *given(void *p)
{
    if (p != NULL) atomic_fetch_add(&live, 1);
    return p;
}

void *malloc(size_t n)
{
    return fails_now() ? NULL : given(UNDER(malloc)(n));
}
void *calloc(size_t count, size_t n)
{
    return fails_now() ? NULL : given(UNDER(calloc)(count, n));
}
void *memalign(size_t alignment, size_t n)
{
    return fails_now() ? NULL : given(UNDER(memalign)(alignment, n));
}
void *aligned_alloc(size_t alignment, size_t n)
{
    return memalign(alignment, n);
}

void *realloc(void *p, size_t n)
{
    if (fails_now()) return NULL;
    if (p == NULL) return given(UNDER(realloc)(p, n));
    if (n == 0) atomic_fetch_sub(&live, 1); /* frees */
    return UNDER(realloc)(p, n);
}

int posix_memalign(void **p, size_t alignment, size_t n)
{
    void *memory = memalign(alignment, n);
    if (memory == NULL) return ENOMEM;
    *p = memory;
    return 0;
}

void free(void *p)
{
    if (p != NULL) atomic_fetch_sub(&live, 1);
    UNDER(free)(p);
}
