/* base/mem.c with a switch: lets a test make any allocation of the library fail. Include it in one test program's source;
 * the program is then linked with this copy in place of the library's. */
#ifndef TP_TESTS_FAILING_MEMORY_H
#define TP_TESTS_FAILING_MEMORY_H

#include <stdbool.h>

/* The n-th allocation from now on fails, counted from 1; once, or with all that follow. 0: none. */
void fail_allocation(long n, bool and_all_after);
/* Whether one was made to fail since then. */
bool allocation_failed(void);

/* Runs `call` (a tp_status) with its first allocation failing, then its second, ... until it gets through untouched, both once
 * and from then on. Each failure has to be NOMEM. Leaks are the address sanitizer's to find. */
#define assert_survives_failing_memory(ctx, call)                                                                              \
    do {                                                                                                                       \
        for (int all_ = 0; all_ < 2; all_++) {                                                                                 \
            for (long n_ = 1;; n_++) {                                                                                         \
                fail_allocation(n_, all_ != 0);                                                                                \
                tp_status got_ = (call);                                                                                       \
                bool failed_ = allocation_failed();                                                                            \
                fail_allocation(0, false);                                                                                     \
                if (got_ != (failed_ ? TP_NOMEM : TP_OK))                                                                      \
                    fail_msg("allocation %ld: %s: %s", n_, tp_status_name(got_), (ctx)->message);                              \
                tp_ctx_clear(ctx);                                                                                             \
                if (!failed_) break;                                                                                           \
            }                                                                                                                  \
        }                                                                                                                      \
    } while (0)

#endif
