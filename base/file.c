/* Reading: whole files, files at any offset, and where a name inside a folder may lead. */
#include "base/file.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/io.h"
#include "base/map_guard.h"
#include "base/mem.h"

#define READ_AT_ONCE ((size_t)1 << 30) /* Linux transfers at most 2 GiB in one call */

struct tp_file {
    char *path;
    int fd;
    uint64_t size;
    struct timespec modified;
    void *map;
    int guard; /* ticket of the mapping, or -1 */
};

static const char *kind_of(mode_t mode)
{
    if (S_ISDIR(mode)) return "a folder";
    if (S_ISFIFO(mode)) return "a FIFO";
    if (S_ISSOCK(mode)) return "a socket";
    return S_ISCHR(mode) || S_ISBLK(mode) ? "a device" : "something else";
}

/* Opening a FIFO or a socket for reading could wait for ever, and opening some devices has effects. So the kind is looked
 * at before, and once more afterwards, in case the name was exchanged in between. */
tp_status tp_io_open(tp_ctx *ctx, const char *path, int *out, struct stat *info)
{
    *out = -1;
    if (stat(path, info) != 0) return tp_fail(ctx, TP_IO_READ, "%s: %s", path, strerror(errno));
    if (!S_ISREG(info->st_mode))
        return tp_fail(ctx, TP_FORMAT, "%s: expected a regular file, found %s", path, kind_of(info->st_mode));
    int fd;
    do fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    while (fd < 0 && errno == EINTR);
    if (fd < 0) return tp_fail(ctx, TP_IO_READ, "%s: %s", path, strerror(errno));
    tp_status status = TP_OK;
    if (fstat(fd, info) != 0)
        status = tp_fail(ctx, TP_IO_READ, "%s: %s", path, strerror(errno));
    else if (!S_ISREG(info->st_mode))
        status = tp_fail(ctx, TP_FORMAT, "%s: expected a regular file, found %s", path, kind_of(info->st_mode));
    if (status != TP_OK)
        close(fd);
    else
        *out = fd;
    return status;
}

ssize_t tp_io_pread(int fd, void *bytes, size_t n, off_t offset)
{
    char *p = bytes;
    size_t done = 0;
    while (done < n) {
        size_t want = n - done < READ_AT_ONCE ? n - done : READ_AT_ONCE;
        ssize_t got = pread(fd, p + done, want, offset + (off_t)done);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return -1;
        if (got == 0) break;
        done += (size_t)got;
    }
    return (ssize_t)done;
}

/* ---- whole files ---- */

/* Reads to the end, which is where reading says, not where fstat said. */
static tp_status read_all(tp_ctx *ctx, const char *path, int fd, size_t size, size_t max_bytes, char **out, size_t *n)
{
    char *bytes = NULL;
    size_t capacity = 0, used = 0;
    tp_status status = tp_grow(ctx, &bytes, &capacity, size + 2, 1); /* a NUL, and a byte to notice more than size */
    while (status == TP_OK) {
        ssize_t got = tp_io_pread(fd, bytes + used, capacity - used - 1, (off_t)used);
        if (got < 0) status = tp_fail(ctx, TP_IO_READ, "%s: %s", path, strerror(errno));
        if (got <= 0) break;
        used += (size_t)got;
        if (used > max_bytes)
            status = tp_fail(ctx, TP_FORMAT, "%s: longer than %zu bytes", path, max_bytes);
        else if (used + 1 == capacity)
            status = tp_grow(ctx, &bytes, &capacity, capacity + 1, 1);
        else
            break; /* a short transfer: the end */
    }
    if (status != TP_OK) {
        tp_free(bytes);
        return status;
    }
    bytes[used] = '\0';
    *out = bytes;
    *n = used;
    return TP_OK;
}

tp_status tp_file_read(tp_ctx *ctx, const char *path, size_t max_bytes, char **bytes, size_t *n)
{
    struct stat info;
    int fd;
    *bytes = NULL;
    *n = 0;
    TP_TRY(tp_io_open(ctx, path, &fd, &info));
    tp_status status;
    if (info.st_size < 0 || (uint64_t)info.st_size > max_bytes)
        status = tp_fail(ctx, TP_FORMAT, "%s: %lld bytes, at most %zu are read", path, (long long)info.st_size, max_bytes);
    else if ((uint64_t)info.st_size > SIZE_MAX - 2)
        status = tp_fail(ctx, TP_NOMEM, "%s: %lld bytes do not fit into memory", path, (long long)info.st_size);
    else
        status = read_all(ctx, path, fd, (size_t)info.st_size, max_bytes, bytes, n);
    close(fd);
    return status;
}

/* ---- paths ---- */

bool tp_path_exists(const char *path)
{
    struct stat info;
    return stat(path, &info) == 0;
}

bool tp_path_is_folder(const char *path)
{
    struct stat info;
    return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

char *tp_path_join(tp_ctx *ctx, const char *folder, const char *name)
{
    size_t n = strlen(folder), m = strlen(name), bytes;
    bool slash = n > 0 && folder[n - 1] != '/';
    if (!tp_add_size(n + slash + 1, m, &bytes)) {
        tp_fail(ctx, TP_NOMEM, "path of %zu + %zu bytes", n, m);
        return NULL;
    }
    char *path = tp_alloc_raw(ctx, bytes, 1);
    if (path == NULL) return NULL;
    memcpy(path, folder, n);
    if (slash) path[n] = '/';
    memcpy(path + n + slash, name, m + 1);
    return path;
}

/* Whether `file` (resolved) is the blob that the link at `path` names, as Hugging Face's cache lays it out:
 * <repo>/snapshots/<revision>/<name> -> ../../blobs/<hash>, and nothing behind that. `folder` is resolved, too. */
static bool is_cache_blob(const char *path, const char *folder, const char *file)
{
    static const char blobs[] = "../../blobs/";
    char link[sizeof blobs + 64];
    ssize_t n = readlink(path, link, sizeof link);
    size_t prefix = sizeof blobs - 1;
    if (n < 0 || (n != (ssize_t)prefix + 40 && n != (ssize_t)prefix + 64) || memcmp(link, blobs, prefix) != 0) return false;
    for (ssize_t i = (ssize_t)prefix; i < n; i++)
        if (memchr("0123456789abcdef", link[i], 16) == NULL) return false;
    const char *cut = folder + strlen(folder); /* two components up */
    for (int up = 0; up < 2; up++) {
        do {
            if (cut == folder) return false;
            cut--;
        } while (*cut != '/');
    }
    size_t root = (size_t)(cut - folder);
    return strncmp(file, folder, root) == 0 && strncmp(file + root, "/blobs/", 7) == 0 &&
           strlen(file + root + 7) == (size_t)n - prefix && memcmp(file + root + 7, link + prefix, (size_t)n - prefix) == 0;
}

static tp_status check_beneath(tp_ctx *ctx, const char *folder, const char *path)
{
    char real_folder[PATH_MAX], real_file[PATH_MAX];
    if (realpath(folder, real_folder) == NULL) return tp_fail(ctx, TP_IO_READ, "%s: %s", folder, strerror(errno));
    if (realpath(path, real_file) == NULL) return tp_fail(ctx, TP_IO_READ, "%s: %s", path, strerror(errno));
    size_t n = strlen(real_folder);
    if (n > 0 && real_folder[n - 1] == '/') n--; /* the root folder itself */
    if (strncmp(real_file, real_folder, n) == 0 && real_file[n] == '/') return TP_OK;
    if (is_cache_blob(path, real_folder, real_file)) return TP_OK;
    return tp_fail(ctx, TP_FORMAT, "%s: a symbolic link leads out of the folder, to %s", path, real_file);
}

tp_status tp_path_beneath(tp_ctx *ctx, const char *folder, const char *name, char **out)
{
    *out = NULL;
    if (name[0] == '\0' || strcmp(name, ".") == 0 || strcmp(name, "..") == 0 || strchr(name, '/') != NULL)
        return tp_fail(ctx, TP_FORMAT, "%s: expected the name of a file in this folder, found \"%s\"", folder, name);
    char *path = tp_path_join(ctx, folder, name);
    if (path == NULL) return TP_NOMEM;
    struct stat info;
    tp_status status = check_beneath(ctx, folder, path);
    if (status == TP_OK && stat(path, &info) != 0) status = tp_fail(ctx, TP_IO_READ, "%s: %s", path, strerror(errno));
    if (status == TP_OK && !S_ISREG(info.st_mode))
        status = tp_fail(ctx, TP_FORMAT, "%s: expected a regular file, found %s", path, kind_of(info.st_mode));
    if (status != TP_OK) {
        tp_free(path);
        return status;
    }
    *out = path;
    return TP_OK;
}

/* ---- files at any offset ---- */

tp_status tp_file_open(tp_ctx *ctx, const char *path, tp_file **out)
{
    struct stat info;
    *out = NULL;
    tp_file *file = tp_alloc(ctx, 1, sizeof *file);
    if (file == NULL) return TP_NOMEM;
    file->fd = file->guard = -1;
    file->path = tp_strdup(ctx, path);
    tp_status status = file->path != NULL ? tp_io_open(ctx, path, &file->fd, &info) : TP_NOMEM;
    if (status != TP_OK) {
        tp_file_close(file);
        return status;
    }
    file->size = (uint64_t)info.st_size;
    file->modified = info.st_mtim;
    *out = file;
    return TP_OK;
}

void tp_file_close(tp_file *file)
{
    if (file == NULL) return;
    if (file->guard >= 0) tp_map_guard_remove(file->guard);
    if (file->map != NULL) munmap(file->map, (size_t)file->size);
    if (file->fd >= 0) close(file->fd);
    tp_free(file->path);
    tp_free(file);
}

const char *tp_file_path(const tp_file *file)
{
    return file->path;
}
uint64_t tp_file_size(const tp_file *file)
{
    return file->size;
}

const void *tp_file_map(tp_file *file)
{
    const char *no_mmap = getenv("TAPEFT_NO_MMAP");
    if (file->map != NULL) return file->map;
    if (file->size == 0 || file->size > SIZE_MAX || (no_mmap != NULL && strcmp(no_mmap, "1") == 0)) return NULL;
    void *map = mmap(NULL, (size_t)file->size, PROT_READ, MAP_PRIVATE, file->fd, 0);
    if (map == MAP_FAILED) return NULL;
    file->guard = tp_map_guard_add(map, (size_t)file->size);
    if (file->guard < 0) {
        munmap(map, (size_t)file->size);
        return NULL;
    }
    file->map = map;
    return map;
}

tp_status tp_file_pread(tp_ctx *ctx, tp_file *file, uint64_t offset, void *bytes, size_t n)
{
    if (offset > file->size || n > file->size - offset)
        return tp_fail(ctx, TP_IO_READ, "%s: %zu bytes at %llu, but the file has %llu", file->path, n,
                       (unsigned long long)offset, (unsigned long long)file->size);
    ssize_t got = tp_io_pread(file->fd, bytes, n, (off_t)offset);
    if (got < 0)
        return tp_fail(ctx, TP_IO_READ, "%s: at byte %llu: %s", file->path, (unsigned long long)offset, strerror(errno));
    if ((size_t)got < n)
        return tp_fail(ctx, TP_IO_READ, "%s: the file was cut short while in use: it ends at byte %llu, not %llu", file->path,
                       (unsigned long long)offset + (unsigned long long)got, (unsigned long long)file->size);
    return TP_OK;
}

tp_status tp_file_check(tp_ctx *ctx, const tp_file *file)
{
    struct stat info;
    if (fstat(file->fd, &info) != 0) return tp_fail(ctx, TP_IO_READ, "%s: %s", file->path, strerror(errno));
    if ((uint64_t)info.st_size != file->size)
        return tp_fail(ctx, TP_IO_READ, "%s: the file changed while in use: %lld bytes, %llu at first", file->path,
                       (long long)info.st_size, (unsigned long long)file->size);
    if (info.st_mtim.tv_sec != file->modified.tv_sec || info.st_mtim.tv_nsec != file->modified.tv_nsec)
        return tp_fail(ctx, TP_IO_READ, "%s: the file was written to while in use", file->path);
    if (file->guard >= 0 && tp_map_guard_lost(file->guard))
        return tp_fail(ctx, TP_IO_READ, "%s: a part of the file vanished while in use", file->path);
    return TP_OK;
}
