/* What the files that write share. */
#include "base/io.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "base/mem.h"

#define WRITE_AT_ONCE ((size_t)1 << 30) /* Linux transfers at most 2 GiB in one call */

tp_status tp_io_temporary_name(tp_ctx *ctx, const char *path, char **name)
{
    uint32_t random = 0;
    *name = NULL;
    if (getrandom(&random, sizeof random, 0) != (ssize_t)sizeof random)
        return tp_fail(ctx, TP_IO_WRITE, "%s: no random number for a temporary name: %s", path, strerror(errno));
    size_t size = strlen(path) + 40;
    *name = tp_alloc_raw(ctx, size, 1);
    if (*name == NULL) return TP_NOMEM;
    snprintf(*name, size, "%s.tmp-%ld-%08x", path, (long)getpid(), (unsigned)random);
    return TP_OK;
}

bool tp_io_is_temporary(const char *name, pid_t *pid)
{
    size_t n = strlen(name), digits = 0;
    if (n < 9) return false;
    for (size_t i = n - 8; i < n; i++)
        if (strchr("0123456789abcdef", name[i]) == NULL) return false;
    size_t end = n - 9; /* the dash before the random number */
    if (name[end] != '-') return false;
    long number = 0, unit = 1;
    for (; digits < 9 && end > digits && isdigit((unsigned char)name[end - 1 - digits]); digits++, unit *= 10)
        number += unit * (name[end - 1 - digits] - '0');
    size_t begin = end - digits;
    if (digits == 0 || begin < 6 || memcmp(name + begin - 5, ".tmp-", 5) != 0) return false; /* something stands in front */
    *pid = (pid_t)number;
    return true;
}

tp_status tp_io_create(tp_ctx *ctx, const char *path, size_t n, int *out)
{
    int fd;
    *out = -1;
    do fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0666);
    while (fd < 0 && errno == EINTR);
    if (fd < 0) return tp_fail(ctx, TP_IO_WRITE, "%s: cannot create: %s", path, strerror(errno));
    int result;
    do result = n > 0 ? fallocate(fd, 0, 0, (off_t)n) : 0;
    while (result != 0 && errno == EINTR);
    if (result != 0 && errno != EOPNOTSUPP && errno != ENOSYS && errno != EINVAL) {
        tp_fail(ctx, TP_IO_WRITE, "%s: no room for %zu bytes: %s", path, n, strerror(errno));
        close(fd);
        unlink(path);
        return TP_IO_WRITE;
    }
    *out = fd;
    return TP_OK;
}

tp_status tp_io_write(tp_ctx *ctx, int fd, const char *path, const void *bytes, size_t n)
{
    const char *p = bytes;
    while (n > 0) {
        ssize_t done = write(fd, p, n < WRITE_AT_ONCE ? n : WRITE_AT_ONCE);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) return tp_fail(ctx, TP_IO_WRITE, "%s: %s, %zu bytes unwritten", path, strerror(errno), n);
        if (done == 0) return tp_fail(ctx, TP_IO_WRITE, "%s: the file takes no more bytes, %zu unwritten", path, n);
        p += done;
        n -= (size_t)done;
    }
    return TP_OK;
}

/* After a failed fsync the pages count as clean, and another fsync would claim success: there is no second attempt. */
tp_status tp_io_sync_close(tp_ctx *ctx, int fd, const char *path)
{
    tp_status status = TP_OK;
    if (fsync(fd) != 0) status = tp_fail(ctx, TP_IO_WRITE, "%s: fsync: %s", path, strerror(errno));
    if (close(fd) != 0 && errno != EINTR && status == TP_OK) /* EINTR: Linux has closed it, and fsync has succeeded */
        status = tp_fail(ctx, TP_IO_WRITE, "%s: close: %s", path, strerror(errno));
    return status;
}

tp_status tp_io_sync_folder(tp_ctx *ctx, const char *path)
{
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return tp_fail(ctx, TP_IO_WRITE, "%s: %s", path, strerror(errno));
    tp_status status = TP_OK;
    if (fsync(fd) != 0 && errno != EINVAL) /* EINVAL: this file system does not sync folders */
        status = tp_fail(ctx, TP_IO_WRITE, "%s: fsync: %s", path, strerror(errno));
    close(fd);
    return status;
}

tp_status tp_io_sync_parent(tp_ctx *ctx, const char *path)
{
    const char *slash = strrchr(path, '/');
    char *parent = slash == NULL ? tp_strdup(ctx, ".") : tp_strndup(ctx, path, slash == path ? 1 : (size_t)(slash - path));
    if (parent == NULL) return TP_NOMEM;
    tp_status status = tp_io_sync_folder(ctx, parent);
    tp_free(parent);
    return status;
}
