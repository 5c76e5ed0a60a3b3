/* One file that appears under its name only when complete. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/file.h"
#include "base/io.h"
#include "base/mem.h"

#define BUFFER_BYTES 65536

struct tp_writer {
    char *path, *temporary;
    int fd;
    bool failed;
    size_t used;
    char buffer[BUFFER_BYTES];
};

static void writer_free(tp_writer *writer)
{
    if (writer == NULL) return;
    tp_free(writer->path);
    tp_free(writer->temporary);
    tp_free(writer);
}

tp_status tp_writer_open(tp_ctx *ctx, const char *path, tp_writer **out)
{
    struct stat info;
    *out = NULL;
    if (lstat(path, &info) == 0 && !S_ISREG(info.st_mode) && !S_ISLNK(info.st_mode))
        return tp_fail(ctx, TP_IO_WRITE, "%s: exists and is not a regular file", path);
    tp_writer *writer = tp_alloc(ctx, 1, sizeof *writer);
    if (writer == NULL) return TP_NOMEM;
    writer->path = tp_strdup(ctx, path);
    tp_status status = writer->path != NULL ? tp_io_temporary_name(ctx, path, &writer->temporary) : TP_NOMEM;
    if (status == TP_OK) status = tp_io_create(ctx, writer->temporary, 0, &writer->fd);
    if (status != TP_OK) {
        writer_free(writer);
        return status;
    }
    (void)flock(writer->fd,
                LOCK_EX | LOCK_NB); /* tells tp_publish_sweep that somebody is at work; cannot wait or matter else */
    *out = writer;
    return TP_OK;
}

static tp_status flush(tp_ctx *ctx, tp_writer *writer)
{
    size_t n = writer->used;
    writer->used = 0;
    tp_status status = tp_io_write(ctx, writer->fd, writer->temporary, writer->buffer, n);
    writer->failed = writer->failed || status != TP_OK;
    return status;
}

tp_status tp_writer_write(tp_ctx *ctx, tp_writer *writer, const void *bytes, size_t n)
{
    if (writer->failed) return tp_fail(ctx, TP_IO_WRITE, "%s: an earlier write failed", writer->path);
    if (n > BUFFER_BYTES - writer->used) TP_TRY(flush(ctx, writer));
    if (n > BUFFER_BYTES) {
        tp_status status = tp_io_write(ctx, writer->fd, writer->temporary, bytes, n);
        writer->failed = status != TP_OK;
        return status;
    }
    if (n > 0) memcpy(writer->buffer + writer->used, bytes, n);
    writer->used += n;
    return TP_OK;
}

tp_status tp_writer_finish(tp_ctx *ctx, tp_writer *writer)
{
    tp_status status =
        writer->failed ? tp_fail(ctx, TP_IO_WRITE, "%s: an earlier write failed", writer->path) : flush(ctx, writer);
    if (status != TP_OK) {
        tp_writer_discard(writer);
        return status;
    }
    status = tp_io_sync_close(ctx, writer->fd, writer->temporary);
    if (status == TP_OK && rename(writer->temporary, writer->path) != 0)
        status = tp_fail(ctx, TP_IO_WRITE, "%s: cannot rename: %s", writer->path, strerror(errno));
    if (status == TP_OK)
        status = tp_io_sync_parent(ctx, writer->path);
    else
        unlink(writer->temporary);
    writer_free(writer);
    return status;
}

void tp_writer_discard(tp_writer *writer)
{
    if (writer == NULL) return;
    close(writer->fd);
    unlink(writer->temporary);
    writer_free(writer);
}

tp_status tp_file_write(tp_ctx *ctx, const char *path, const void *bytes, size_t n)
{
    tp_writer *writer;
    TP_TRY(tp_writer_open(ctx, path, &writer));
    tp_status status = tp_writer_write(ctx, writer, bytes, n);
    if (status == TP_OK) return tp_writer_finish(ctx, writer);
    tp_writer_discard(writer);
    return status;
}
