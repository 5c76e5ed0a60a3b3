/* What the files that write share: full transfers, temporary names, syncing. Not for other folders. */
#ifndef TP_BASE_IO_H
#define TP_BASE_IO_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/stat.h>
#include <sys/types.h>

#include "base/status.h"

/* Opens a regular file for reading without waiting for anybody: FORMAT for anything else, IO_READ for errno. */
tp_status tp_io_open(tp_ctx *ctx, const char *path, int *fd, struct stat *info) TP_MUST_CHECK;
/* One full read at an offset; fewer than n bytes only at the end of the file. -1 with errno on failure. */
ssize_t tp_io_pread(int fd, void *bytes, size_t n, off_t offset);

/* "<path>.tmp-<pid>-<8 random hexadecimal digits>"; tp_free. */
tp_status tp_io_temporary_name(tp_ctx *ctx, const char *path, char **name) TP_MUST_CHECK;
/* Whether name ends like that; *pid is the process that made it. */
bool tp_io_is_temporary(const char *name, pid_t *pid);
/* A new file at exactly this path, reserved to n bytes on disk where the file system can (n = 0: nothing reserved). */
tp_status tp_io_create(tp_ctx *ctx, const char *path, size_t n, int *fd) TP_MUST_CHECK;
tp_status tp_io_write(tp_ctx *ctx, int fd, const char *path, const void *bytes, size_t n) TP_MUST_CHECK;
/* fsync and close, which happens in every case. */
tp_status tp_io_sync_close(tp_ctx *ctx, int fd, const char *path) TP_MUST_CHECK;
tp_status tp_io_sync_folder(tp_ctx *ctx, const char *path) TP_MUST_CHECK;
/* The folder that holds path. */
tp_status tp_io_sync_parent(tp_ctx *ctx, const char *path) TP_MUST_CHECK;

#endif
