/* Included first by every test program: cmocka, golden data, and a context that fails loudly. */
#ifndef TP_TESTS_SUPPORT_H
#define TP_TESTS_SUPPORT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/status.h"

/* $TAPEFT_TEST names the test functions to run, for one at a time; * and ? stand for many characters and for one. */
__attribute__((constructor)) static void choose_tests(void)
{
    const char *pattern = getenv("TAPEFT_TEST");
    if (pattern != NULL && pattern[0] != '\0') cmocka_set_test_filter(pattern);
}

/* Path of reference data: $TAPEFT_GOLDEN/relative, or tests/golden/relative (the subset in this repository). */
static inline const char *golden_path(char *out, size_t size, const char *relative)
{
    const char *root = getenv("TAPEFT_GOLDEN");
    snprintf(out, size, "%s/%s", root != NULL && root[0] != '\0' ? root : "tests/golden", relative);
    return out;
}

/* Fails the test with the context's message unless the call returned TP_OK. */
#define assert_ok(ctx, call)                                                                                                   \
    do {                                                                                                                       \
        tp_status status_ = (call);                                                                                            \
        if (status_ != TP_OK) fail_msg("%s: %s: %s", #call, tp_status_name(status_), (ctx)->message);                          \
    } while (0)

/* Fails unless the call failed with exactly this status; clears the context. */
#define assert_status(ctx, expected, call)                                                                                     \
    do {                                                                                                                       \
        tp_status status_ = (call);                                                                                            \
        if (status_ != (expected))                                                                                             \
            fail_msg("%s: got %s (%s), expected %s", #call, tp_status_name(status_), (ctx)->message,                           \
                     tp_status_name(expected));                                                                                \
        if (status_ != TP_OK && (ctx)->message[0] == '\0') fail_msg("%s: failed without a message", #call);                    \
        tp_ctx_clear(ctx);                                                                                                     \
    } while (0)

#endif
