/* safetensors files: name -> dtype, shape, bytes. Mapped on read, written to a temporary name and renamed.
 * Format: github.com/huggingface/safetensors; checks in the order of shared practice (header length, UTF-8, JSON, offsets
 * without holes or overlaps, sizes, file length). */
#ifndef TP_BASE_SAFETENSORS_H
#define TP_BASE_SAFETENSORS_H

#include "base/dtype.h"
#include "base/file.h"
#include "base/status.h"

#define TP_MAX_RANK               8
#define TP_SAFETENSORS_HEADER_MAX 100000000u
#define TP_SAFETENSORS_NAME_MAX   512

typedef struct tp_entry {
    const char *name; /* NUL-terminated; names with NUL are refused */
    tp_dtype dtype;
    int rank;
    int64_t shape[TP_MAX_RANK];
    uint64_t offset; /* of the first byte, from the start of the file */
    uint64_t bytes;
} tp_entry;

typedef struct tp_safetensors tp_safetensors;

TP_API tp_status tp_safetensors_open(tp_ctx *ctx, const char *path, tp_safetensors **file) TP_MUST_CHECK;
/* The same checks on bytes in memory (fuzzing, tests); name stands in messages. */
TP_API tp_status tp_safetensors_parse(tp_ctx *ctx, const char *name, const void *bytes, size_t n,
                                      tp_safetensors **file) TP_MUST_CHECK;
TP_API void tp_safetensors_close(tp_safetensors *file);
TP_API const char *tp_safetensors_path(const tp_safetensors *file);
TP_API tp_file *tp_safetensors_file(const tp_safetensors *file); /* for mapping and tp_file_check; NULL for parsed bytes */
TP_API size_t tp_safetensors_count(const tp_safetensors *file);
TP_API const tp_entry *tp_safetensors_at(const tp_safetensors *file, size_t i); /* in file order */
TP_API const tp_entry *tp_safetensors_find(const tp_safetensors *file, const char *name);
TP_API const char *tp_safetensors_metadata(const tp_safetensors *file, const char *key); /* or NULL */
TP_API size_t tp_safetensors_metadata_count(const tp_safetensors *file);
TP_API void tp_safetensors_metadata_at(const tp_safetensors *file, size_t i, const char **key, const char **value);
/* Bytes of a tensor inside the mapping (any alignment), or NULL where the file is not mapped. */
TP_API const void *tp_safetensors_data(const tp_safetensors *file, const tp_entry *entry);
TP_API tp_status tp_safetensors_read(tp_ctx *ctx, const tp_safetensors *file, const tp_entry *entry, void *bytes) TP_MUST_CHECK;
/* n values from element `first` on, converted to F32 (float dtypes only). */
TP_API tp_status tp_safetensors_read_f32(tp_ctx *ctx, const tp_safetensors *file, const tp_entry *entry, uint64_t first,
                                         size_t n, float *out) TP_MUST_CHECK;
/* Same for integers and BOOL, widened to int64. */
TP_API tp_status tp_safetensors_read_i64(tp_ctx *ctx, const tp_safetensors *file, const tp_entry *entry, uint64_t first,
                                         size_t n, int64_t *out) TP_MUST_CHECK;

/* ---- writing ---- */
/* Tensors are declared first (that fixes the header), then their bytes are written in the file's order: dtype descending,
 * name ascending. Metadata {"format":"pt"} is always written; more pairs may be added before the first write. */
typedef struct tp_safetensors_writer tp_safetensors_writer;
TP_API tp_status tp_safetensors_create(tp_ctx *ctx, const char *path, tp_safetensors_writer **writer) TP_MUST_CHECK;
TP_API tp_status tp_safetensors_add_metadata(tp_ctx *ctx, tp_safetensors_writer *writer, const char *key,
                                             const char *value) TP_MUST_CHECK;
TP_API tp_status tp_safetensors_declare(tp_ctx *ctx, tp_safetensors_writer *writer, const char *name, tp_dtype dtype, int rank,
                                        const int64_t *shape) TP_MUST_CHECK;
/* After all declarations: the tensor whose bytes come next, in file order; NULL when done. */
TP_API const tp_entry *tp_safetensors_next(tp_safetensors_writer *writer);
/* Bytes of the current tensor, in any number of pieces; INTERNAL if more than its size. */
TP_API tp_status tp_safetensors_write(tp_ctx *ctx, tp_safetensors_writer *writer, const void *bytes, size_t n) TP_MUST_CHECK;
TP_API tp_status tp_safetensors_finish(tp_ctx *ctx, tp_safetensors_writer *writer) TP_MUST_CHECK; /* frees in every case */
TP_API void tp_safetensors_discard(tp_safetensors_writer *writer);

/* A whole file from arrays in memory, the common case (adapters, logits, checkpoints). */
typedef struct tp_named_array {
    const char *name;
    tp_dtype dtype;
    int rank;
    int64_t shape[TP_MAX_RANK];
    const void *data;
} tp_named_array;
/* metadata: pairs key, value, ..., NULL; may be NULL. */
TP_API tp_status tp_safetensors_save(tp_ctx *ctx, const char *path, const tp_named_array *arrays, size_t n,
                                     const char *const *metadata) TP_MUST_CHECK;

#endif
