/* Values that wait for the reverse sweep in host memory, in the order in which forward leaves them; the sweep takes them from
 * the end. Copies run beside the kernels: a value may go once its copy is waited for, and the next one comes back while the
 * present one is used. For tape.c alone, which owns the device's side. */
#ifndef TP_AUTOGRAD_PARK_H
#define TP_AUTOGRAD_PARK_H

#include "autograd/tensor.h"

typedef enum tp_park_state {
    TP_PARK_LEAVING, /* being copied out; still on the device */
    TP_PARK_AWAY,
    TP_PARK_COMING, /* has memory again, being filled */
    TP_PARK_HERE
} tp_park_state;

typedef struct tp_parked {
    tp_tensor *x;
    void *host; /* kept from step to step */
    size_t bytes, capacity;
    int ticket;
    tp_park_state state;
} tp_parked;

typedef struct tp_park {
    tp_parked *list;
    size_t n, capacity; /* n: of this step */
    tp_device *device;
} tp_park;

void tp_park_free(tp_park *park);
/* Begins to copy x out, `bytes` from its first value on. */
tp_status tp_park_leave(tp_ctx *ctx, tp_park *park, tp_tensor *x, size_t bytes) TP_MUST_CHECK;
/* What is called from now on comes after the copy in flight. */
tp_status tp_park_wait(tp_ctx *ctx, tp_parked *parked) TP_MUST_CHECK;
/* Begins to copy back to parked->x->data. */
tp_status tp_park_return(tp_ctx *ctx, tp_parked *parked) TP_MUST_CHECK;

#endif
