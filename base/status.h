/* Status codes, the run context and its error message.
 *
 * Every function that can fail returns tp_status and writes one message into the
 * tp_ctx it was given. The first failure of a context wins; outer layers may only put
 * context in front of it. Nothing in the library prints, exits or aborts on input. */
#ifndef TP_BASE_STATUS_H
#define TP_BASE_STATUS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum tp_status {
    TP_OK = 0,
    TP_INVALID,     /* usage or recipe                                exit 2  */
    TP_FORMAT,      /* an input file is malformed                     exit 3  */
    TP_SHAPE,       /* sizes of tensors disagree                      exit 3  */
    TP_UNSUPPORTED, /* well-formed, but not something we can run      exit 3  */
    TP_IO_READ,     /* reading failed                                 exit 3  */
    TP_IO_WRITE,    /* writing failed, disk full                      exit 4  */
    TP_NOMEM,       /* out of memory                                  exit 4  */
    TP_DEVICE,      /* GPU, driver, lock held                         exit 4  */
    TP_NUMERIC,     /* stopped by a numeric guard                     exit 5  */
    TP_CHECKPOINT,  /* checkpoint unusable                            exit 6  */
    TP_INTERNAL,    /* a bug of ours                                  exit 70 */
    TP_PREEMPTED,   /* told to stop; the run can be resumed           exit 75 */
    TP_STATUS_COUNT
} tp_status;

#define TP_MESSAGE_BYTES 4096

#if defined(__GNUC__)
#define TP_MUST_CHECK        __attribute__((warn_unused_result))
#define TP_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#else
#define TP_MUST_CHECK
#define TP_PRINTF(fmt, args)
#endif

/* With -fvisibility=hidden only functions marked so are exported from the shared library. */
#if defined(__GNUC__)
#define TP_API __attribute__((visibility("default")))
#else
#define TP_API
#endif

struct tp_log;
struct tp_device;

/* One per run or server thread; passed first to everything that can fail.
 * Not shared between threads. Zero-initialise with tp_ctx_init. */
typedef struct tp_ctx {
    tp_status status;               /* first failure, or TP_OK */
    char message[TP_MESSAGE_BYTES]; /* one line of UTF-8 without control characters */
    struct tp_log *log;             /* where notes go; NULL: they are dropped; borrowed */
    struct tp_device *device;       /* borrowed; NULL until one is opened */
    uint64_t seed;                  /* of the counter-based generator */
} tp_ctx;

TP_API void tp_ctx_init(tp_ctx *ctx);

/* Forgets an error that has been dealt with. */
TP_API void tp_ctx_clear(tp_ctx *ctx);

/* Records a failure unless one is recorded already, and returns `status` either way, so that
 * `return tp_fail(ctx, TP_FORMAT, "...")` is the idiom. Control characters and malformed
 * UTF-8 that the arguments bring along are escaped (\n, \x1b, \xff). */
TP_API tp_status tp_fail(tp_ctx *ctx, tp_status status, const char *format, ...) TP_PRINTF(3, 4);

/* Puts "context: " in front of the recorded message. Returns the recorded status, so that
 * `return tp_fail_in(ctx, "layers.%d", i)` passes a failure outwards. */
TP_API tp_status tp_fail_in(tp_ctx *ctx, const char *format, ...) TP_PRINTF(2, 3);

/* "invalid", "format", ...: lower-case name of a status, for logs and tests. */
TP_API const char *tp_status_name(tp_status status);

/* Exit class of the command line (2, 3, 4, 5, 6, 70, 75; 0 for TP_OK). */
TP_API int tp_status_exit_code(tp_status status);

/* Leaves the current function with the status of `expression` if that failed. */
#define TP_TRY(expression)                                                                                                     \
    do {                                                                                                                       \
        tp_status tp_try_ = (expression);                                                                                      \
        if (tp_try_ != TP_OK) return tp_try_;                                                                                  \
    } while (0)

#ifdef __cplusplus
}
#endif
#endif
