/* GGUF files, version 2 and 3, little-endian: metadata, tensor directory, raw blocks.
 * Format: github.com/ggml-org/ggml docs/gguf.md. Values are decoded by quant/. */
#ifndef TP_BASE_GGUF_H
#define TP_BASE_GGUF_H

#include "base/file.h"
#include "base/status.h"
#include "base/text.h"

/* A file with more is refused: bounds on what a small file can make us allocate. */
#define TP_GGUF_MAX_VALUES  65536u
#define TP_GGUF_MAX_TENSORS (1u << 18)
#define TP_GGUF_NAME_MAX    512
#define TP_GGUF_STRING_MAX  ((uint64_t)64 << 20)
#define TP_GGUF_HEAD_MAX    ((uint64_t)512 << 20) /* everything before the data */
#define TP_GGUF_RANK_MAX    4
#define TP_GGUF_ALIGN_MIN   8 /* general.alignment */
#define TP_GGUF_ALIGN_MAX   65536

/* ggml's numbers, as stored. */
typedef enum tp_ggml_type {
    TP_GGML_F32 = 0,
    TP_GGML_F16 = 1,
    TP_GGML_Q4_0 = 2,
    TP_GGML_Q4_1 = 3,
    TP_GGML_Q5_0 = 6,
    TP_GGML_Q5_1 = 7,
    TP_GGML_Q8_0 = 8,
    TP_GGML_Q8_1 = 9,
    TP_GGML_Q2_K = 10,
    TP_GGML_Q3_K = 11,
    TP_GGML_Q4_K = 12,
    TP_GGML_Q5_K = 13,
    TP_GGML_Q6_K = 14,
    TP_GGML_Q8_K = 15,
    TP_GGML_IQ4_NL = 20,
    TP_GGML_IQ4_XS = 23,
    TP_GGML_I8 = 24,
    TP_GGML_I16 = 25,
    TP_GGML_I32 = 26,
    TP_GGML_I64 = 27,
    TP_GGML_F64 = 28,
    TP_GGML_BF16 = 30,
    TP_GGML_TQ1_0 = 34,
    TP_GGML_TQ2_0 = 35,
    TP_GGML_MXFP4 = 39
} tp_ggml_type;

/* "Q4_1"; NULL for types this reader does not know (every type with a block layout in ggml is known by size). */
TP_API const char *tp_ggml_type_name(uint32_t type);
/* Values and bytes of a block; false for unknown types. */
TP_API bool tp_ggml_type_block(uint32_t type, int64_t *values, int64_t *bytes);

typedef enum tp_gguf_type {
    TP_GGUF_U8,
    TP_GGUF_I8,
    TP_GGUF_U16,
    TP_GGUF_I16,
    TP_GGUF_U32,
    TP_GGUF_I32,
    TP_GGUF_F32,
    TP_GGUF_BOOL,
    TP_GGUF_STRING,
    TP_GGUF_ARRAY,
    TP_GGUF_U64,
    TP_GGUF_I64,
    TP_GGUF_F64
} tp_gguf_type;

typedef struct tp_gguf_tensor {
    const char *name;
    uint32_t type; /* tp_ggml_type */
    int rank;
    int64_t shape[4]; /* torch order: the file's ne reversed */
    uint64_t offset;  /* of the first byte, from the start of the file */
    uint64_t bytes;
} tp_gguf_tensor;

typedef struct tp_gguf_value { /* a metadata entry; borrowed from the file */
    const char *key;
    tp_gguf_type type; /* TP_GGUF_ARRAY: element type and count below */
    tp_gguf_type element;
    uint64_t count;   /* elements of an array, 1 otherwise */
    const void *data; /* raw little-endian bytes, not aligned; strings: u64 length + bytes each */
    uint64_t bytes;
} tp_gguf_value;

typedef struct tp_gguf tp_gguf;
TP_API tp_status tp_gguf_open(tp_ctx *ctx, const char *path, tp_gguf **file) TP_MUST_CHECK;
TP_API tp_status tp_gguf_parse(tp_ctx *ctx, const char *name, const void *bytes, size_t n, tp_gguf **file) TP_MUST_CHECK;
TP_API void tp_gguf_close(tp_gguf *file);
TP_API const char *tp_gguf_path(const tp_gguf *file);
TP_API tp_file *tp_gguf_file(const tp_gguf *file);
TP_API uint32_t tp_gguf_version(const tp_gguf *file);
TP_API size_t tp_gguf_value_count(const tp_gguf *file);
TP_API const tp_gguf_value *tp_gguf_value_at(const tp_gguf *file, size_t i);
TP_API const tp_gguf_value *tp_gguf_find(const tp_gguf *file, const char *key);
TP_API size_t tp_gguf_tensor_count(const tp_gguf *file);
TP_API const tp_gguf_tensor *tp_gguf_tensor_at(const tp_gguf *file, size_t i);
TP_API const tp_gguf_tensor *tp_gguf_tensor_find(const tp_gguf *file, const char *name);
TP_API const void *tp_gguf_data(const tp_gguf *file, const tp_gguf_tensor *tensor); /* mapped, or NULL */
TP_API tp_status tp_gguf_read(tp_ctx *ctx, const tp_gguf *file, const tp_gguf_tensor *tensor, void *bytes) TP_MUST_CHECK;

/* Typed access. Absent keys leave *out alone unless `required`; another type is FORMAT naming key, type found and expected.
 * Any integer type is accepted for i64 (u64 above INT64_MAX is refused), F32 and F64 for f64. */
TP_API tp_status tp_gguf_need_i64(tp_ctx *ctx, const tp_gguf *file, const char *key, bool required, int64_t min, int64_t max,
                                  int64_t *out) TP_MUST_CHECK;
TP_API tp_status tp_gguf_need_f64(tp_ctx *ctx, const tp_gguf *file, const char *key, bool required, double *out) TP_MUST_CHECK;
TP_API tp_status tp_gguf_need_bool(tp_ctx *ctx, const tp_gguf *file, const char *key, bool required, bool *out) TP_MUST_CHECK;
TP_API tp_status tp_gguf_need_string(tp_ctx *ctx, const tp_gguf *file, const char *key, bool required,
                                     tp_span *out) TP_MUST_CHECK;
/* Element i of an array of strings (empty if there is none); arrays of strings are indexed once, so this is O(1). */
TP_API tp_span tp_gguf_string_at(const tp_gguf *file, const tp_gguf_value *array, uint64_t i);
/* Element i of an array (or the value itself) of integers or bools / floats; the element type must fit (checked by the
 * caller through `element`). */
TP_API int64_t tp_gguf_i64_at(const tp_gguf_value *value, uint64_t i);
TP_API double tp_gguf_f64_at(const tp_gguf_value *value, uint64_t i);

#endif
