/* Files: whole reads, guarded mappings, writes that appear all at once.
 *
 * All paths below accept regular files only: FIFOs, devices and sockets are refused, as is a symbolic
 * link that loops. Short transfers and EINTR are handled. Every message names the path. */
#ifndef TP_BASE_FILE_H
#define TP_BASE_FILE_H

#include <stdio.h>

#include "base/status.h"
#include "base/text.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- reading ---- */
/* The whole file with a NUL behind it; IO_READ if it is missing or unreadable, FORMAT if longer than max_bytes.
 * *bytes is released with tp_free. */
TP_API tp_status tp_file_read(tp_ctx *ctx, const char *path, size_t max_bytes, char **bytes, size_t *n) TP_MUST_CHECK;
TP_API bool tp_path_exists(const char *path);
TP_API bool tp_path_is_folder(const char *path);
/* dir + "/" + name; NULL and NOMEM on failure; tp_free. */
TP_API char *tp_path_join(tp_ctx *ctx, const char *folder, const char *name) TP_MUST_CHECK;
/* Opens `name` beneath `folder` for reading; IO_READ if it is absent, FORMAT if the name has a separator, is "..", or if
 * a symbolic link leads out of the folder. A link whose target stays beneath the folder, and the blob links of
 * Hugging Face's cache (../../blobs/<hex>), are accepted. */
TP_API tp_status tp_path_beneath(tp_ctx *ctx, const char *folder, const char *name, char **path) TP_MUST_CHECK;

/* A file opened for reading at any offset: mapped where possible. */
typedef struct tp_file tp_file;
TP_API tp_status tp_file_open(tp_ctx *ctx, const char *path, tp_file **file) TP_MUST_CHECK;
TP_API void tp_file_close(tp_file *file);
TP_API const char *tp_file_path(const tp_file *file);
TP_API uint64_t tp_file_size(const tp_file *file);
/* The whole file mapped read-only (page-aligned, kept until close), or NULL if mapping failed or TAPEFT_NO_MMAP=1.
 * A page that vanishes because another process cut the file reads as zeros and sets the lost flag instead of raising
 * SIGBUS, once tp_map_guard_install() ran. */
TP_API const void *tp_file_map(tp_file *file);
TP_API tp_status tp_file_pread(tp_ctx *ctx, tp_file *file, uint64_t offset, void *bytes, size_t n) TP_MUST_CHECK;
/* IO_READ if a mapped page vanished, or size or modification time differ from what they were at open. Call once a step. */
TP_API tp_status tp_file_check(tp_ctx *ctx, const tp_file *file) TP_MUST_CHECK;
/* Installs the SIGBUS handler (process-wide, once; the command line calls it). */
TP_API tp_status tp_map_guard_install(tp_ctx *ctx) TP_MUST_CHECK;

/* ---- writing ---- */
/* One file that appears under its name only when complete: writes to "<path>.tmp-<pid>-<random>", fsync, close, rename,
 * fsync of the folder. discard (or finish after a failed write) removes the temporary file and leaves an existing file
 * as it was. */
typedef struct tp_writer tp_writer;
TP_API tp_status tp_writer_open(tp_ctx *ctx, const char *path, tp_writer **writer) TP_MUST_CHECK;
TP_API tp_status tp_writer_write(tp_ctx *ctx, tp_writer *writer, const void *bytes, size_t n) TP_MUST_CHECK;
TP_API tp_status tp_writer_finish(tp_ctx *ctx, tp_writer *writer) TP_MUST_CHECK; /* closes and frees in every case */
TP_API void tp_writer_discard(tp_writer *writer);                                /* accepts NULL */
/* Whole contents in one call. */
TP_API tp_status tp_file_write(tp_ctx *ctx, const char *path, const void *bytes, size_t n) TP_MUST_CHECK;

#define TP_MANIFEST_BYTES ((size_t)16 << 20) /* longest manifest.json that is read */

/* A folder that appears under its name only when complete (reliability: checkpoints, adapters, exports).
 *   begin    makes "<path>.tmp-<pid>-<random>/" beside the final name; *staging is its path (owned by the object)
 *   add      writes one file into it: O_EXCL, fsync, close checked; remembers length and SHA-256
 *   commit   writes manifest.json if `manifest` is given (a JSON object text into which "files": {name: {bytes, sha256}}
 *            is merged), fsyncs, re-reads and compares every file, renames, fsyncs the parent. If `replace` an existing
 *            folder is exchanged (renameat2 RENAME_EXCHANGE, else moved aside) and then removed.
 *            Frees the object in every case; after a failure staging is gone and an existing folder is as it was.
 *   discard  removes the staging folder and frees the object; accepts NULL.
 * Names are single components. Every file in staging has to be added or adopted before the commit. */
typedef struct tp_publish tp_publish;
TP_API tp_status tp_publish_begin(tp_ctx *ctx, const char *path, tp_publish **publish) TP_MUST_CHECK;
TP_API const char *tp_publish_staging(const tp_publish *publish);
TP_API tp_status tp_publish_add(tp_ctx *ctx, tp_publish *publish, const char *name, const void *bytes, size_t n) TP_MUST_CHECK;
/* For files written through other means into staging (tp_writer): takes them into the manifest. */
TP_API tp_status tp_publish_adopt(tp_ctx *ctx, tp_publish *publish, const char *name) TP_MUST_CHECK;
TP_API tp_status tp_publish_commit(tp_ctx *ctx, tp_publish *publish, const char *manifest, bool replace) TP_MUST_CHECK;
TP_API void tp_publish_discard(tp_publish *publish);
/* Checks folder/manifest.json against the files: CHECKPOINT with the first difference. *manifest (may be NULL) gets its text.
 */
TP_API tp_status tp_publish_verify(tp_ctx *ctx, const char *folder, char **manifest) TP_MUST_CHECK;
/* Removes "<prefix>*.tmp-<pid>-<random>" leftovers in `folder` whose process is gone. */
TP_API tp_status tp_publish_sweep(tp_ctx *ctx, const char *folder, const char *prefix) TP_MUST_CHECK;
/* Removes a folder and what is in it; symbolic links are removed, not followed. */
TP_API tp_status tp_folder_remove(tp_ctx *ctx, const char *path) TP_MUST_CHECK;
TP_API tp_status tp_folder_make(tp_ctx *ctx, const char *path) TP_MUST_CHECK; /* with its parents; an existing folder is fine */

/* 32-byte SHA-256, and 64 hexadecimal digits with a NUL. */
TP_API void tp_sha256(const void *bytes, size_t n, uint8_t digest[32]);
TP_API void tp_sha256_hex(const void *bytes, size_t n, char hex[65]);
TP_API tp_status tp_sha256_file(tp_ctx *ctx, const char *path, char hex[65]) TP_MUST_CHECK;
TP_API tp_status tp_file_sha256(tp_ctx *ctx, tp_file *file, char hex[65]) TP_MUST_CHECK; /* of an open file */

#ifdef __cplusplus
}
#endif
#endif
