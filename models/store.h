/* Inside models/: what stands behind the matrices of a model: open files, and device memory for what is not used in place. */
#ifndef TP_MODELS_STORE_H
#define TP_MODELS_STORE_H

#include "base/gguf.h"
#include "base/map.h"
#include "base/safetensors.h"
#include "models/model.h"

struct tp_listed {
    const tp_safetensors *shard;
    const tp_entry *entry;
    bool used; /* by the network */
};

struct tp_owned {
    void *memory;
    size_t bytes;
};

typedef struct tp_model_store {
    tp_device *device;
    struct tp_owned *owned; /* device memory, released with the store */
    size_t n_owned, owned_capacity;
    tp_safetensors **shards; /* of a Hugging Face folder, or none */
    size_t n_shards;
    struct tp_listed *listed; /* every tensor of the shards */
    size_t n_listed;
    tp_map *names; /* tensor name -> index in listed */
    tp_gguf *gguf; /* or NULL */
    bool in_place; /* some matrix is used where it lies in a mapped file */
} tp_model_store;

tp_model_store *tp_store_new(tp_ctx *ctx) TP_MUST_CHECK;
void tp_store_free(tp_model_store *store); /* accepts NULL */
/* Device memory that lives as long as the store. */
void *tp_store_alloc(tp_ctx *ctx, tp_model_store *store, size_t bytes) TP_MUST_CHECK;

/* A tensor as it lies in a file. name NULL: the file does not have it. */
typedef struct tp_stored {
    const char *name;
    tp_file *file;
    uint64_t offset, bytes;
    const char *type;    /* "BF16", "Q4_K": for messages */
    tp_format_id format; /* TP_FORMAT_COUNT: no format of ours */
    int rank;
    int64_t shape[TP_MAX_RANK];
    bool transposed; /* lies as [in, out] */
} tp_stored;

/* One tensor on its way: scanned where it lies in the mapped file, or written to device memory in format `to`. */
typedef struct tp_transfer {
    const tp_stored *from;
    const void *in_place; /* in the mapping; NULL: write */
    void *memory;
    tp_format_id to;    /* from's, or BF16 for F32 and F16 */
    int64_t row_values; /* values of a row that lies apart from the next in memory; else 0 */
    int64_t stride;     /* values from one such row to the next */
    bool check;         /* NUMERIC at the first NaN or infinity */
} tp_transfer;
#define TP_TRANSFER_ROW_BYTES ((int64_t)1 << 20) /* of a row that lies apart from the next, in the file, at most */
/* Carries all of them out, on several threads where the device's memory is the host's. The error is the one of the first
 * tensor in the list that has any. */
tp_status tp_store_transfer(tp_ctx *ctx, const tp_transfer *list, size_t n) TP_MUST_CHECK;
/* All values of a small tensor in f32. `check` as above. */
tp_status tp_stored_read_f32(tp_ctx *ctx, const tp_stored *from, bool check, float *out) TP_MUST_CHECK;

#endif
