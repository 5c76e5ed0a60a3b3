/* What the system allows this process to use. */
#ifndef TP_BASE_ALLOWANCE_H
#define TP_BASE_ALLOWANCE_H

#include <stdint.h>

#include "base/status.h"

#define TP_NO_LIMIT UINT64_MAX

typedef struct tp_allowance {
    uint64_t container_bytes; /* memory of the control group it runs in, or of one around it: beyond, the kernel kills it */
    uint64_t address_bytes;   /* ulimit -v */
    uint64_t file_bytes;      /* ulimit -f: longest file it may write */
    uint64_t open_files;      /* ulimit -n */
} tp_allowance;

/* TP_NO_LIMIT where there is none, or none can be read. root: "", or where the proc and sys to be read lie. */
TP_API void tp_allowance_read(const char *root, tp_allowance *allowance);

#endif
