/* The allocator of the whole process behind a switch: a program that includes this is linked with malloc, calloc, realloc,
 * posix_memalign and their kin in front of the C library's (or the address sanitizer's), so that an allocation of ours, of
 * libyaml, PCRE2, zlib or the C library itself can be made to fail. */
#ifndef TP_TESTS_FAILING_MALLOC_H
#define TP_TESTS_FAILING_MALLOC_H

#include <stdbool.h>

/* The n-th allocation from now on fails, counted from 1; once, or with all that follow. 0: none. */
void fail_malloc(long n, bool and_all_after);
/* How many there were since then, and whether one was made to fail. */
long malloc_count(void);
bool malloc_failed(void);
/* Allocations that have not been freed. Always 0 with the address sanitizer, which finds leaks by itself. */
long malloc_live(void);

#endif
