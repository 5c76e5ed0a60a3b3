/* Device buffers that a batch is copied into, allocated once for the largest batch of a run. */
#ifndef TP_AUTOGRAD_UPLOAD_H
#define TP_AUTOGRAD_UPLOAD_H

#include "autograd/batch.h"
#include "backend/backend.h"

typedef struct tp_batch_buffers {
    int64_t rows, labels; /* capacity */
    int32_t *memory;      /* device: ids, positions [rows], label_rows, labels [labels] */
    tp_device *device;
} tp_batch_buffers;

TP_API tp_status tp_batch_buffers_open(tp_ctx *ctx, int64_t rows, int64_t labels, tp_batch_buffers *buffers) TP_MUST_CHECK;
TP_API void tp_batch_buffers_close(tp_batch_buffers *buffers);
/* What tp_batch_upload returns, without copying. */
TP_API tp_batch tp_batch_uploaded(const tp_batch_buffers *buffers, const tp_batch *host);
/* Copies the arrays of `host` (host pointers throughout) and returns in *batch the same with device pointers; segments stay
 * where they are. SHAPE if it is larger than the buffers. */
TP_API tp_status tp_batch_upload(tp_ctx *ctx, tp_batch_buffers *buffers, const tp_batch *host, tp_batch *batch) TP_MUST_CHECK;

#endif
