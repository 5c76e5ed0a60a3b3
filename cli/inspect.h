/* What is in a file or folder, as JSON, and where its tensors lie: for `inspect` and `inspect --diff`. */
#ifndef TP_CLI_INSPECT_H
#define TP_CLI_INSPECT_H

#include "base/dtype.h"
#include "base/text.h"

typedef struct tp_tensor_place {
    char *path;      /* of the file */
    uint64_t offset; /* of the first byte in it */
    uint64_t bytes;
    tp_dtype dtype; /* TP_DTYPE_COUNT: no type that the library converts */
} tp_tensor_place;

typedef struct tp_inspection {
    tp_buf json;             /* {"tensors": [...], ...} */
    tp_tensor_place *places; /* of the tensors, in their order */
    size_t n, capacity;
} tp_inspection;

/* path: a safetensors or GGUF file, or the folder of an adapter, a checkpoint or a model. */
tp_status tp_cli_inspect(tp_ctx *ctx, const char *path, tp_inspection *found) TP_MUST_CHECK;
void tp_cli_inspection_free(tp_inspection *found);
/* cli/diff.c: in what `path` differs from `other`, on stdout. each: a line for every tensor. */
tp_status tp_cli_diff(tp_ctx *ctx, const char *path, const char *other, bool json, bool each) TP_MUST_CHECK;

#endif
