/* Making and removing folders. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/file.h"
#include "base/io.h"
#include "base/mem.h"

static tp_status make_one(tp_ctx *ctx, const char *path)
{
    if (tp_path_is_folder(path)) return TP_OK;
    if (mkdir(path, 0777) == 0) return tp_io_sync_parent(ctx, path);
    int error = errno; /* EEXIST: somebody else made it in between, or it is a file */
    if (error == EEXIST && tp_path_is_folder(path)) return TP_OK;
    return tp_fail(ctx, TP_IO_WRITE, "%s: cannot make a folder: %s", path, strerror(error));
}

tp_status tp_folder_make(tp_ctx *ctx, const char *path)
{
    char *part = tp_strdup(ctx, path);
    if (part == NULL) return TP_NOMEM;
    size_t n = strlen(part);
    while (n > 1 && part[n - 1] == '/') part[--n] = '\0';
    tp_status status = TP_OK;
    for (size_t i = 1; i < n && status == TP_OK; i++) {
        if (part[i] != '/' || part[i - 1] == '/') continue;
        part[i] = '\0';
        status = make_one(ctx, part);
        part[i] = '/';
    }
    if (status == TP_OK) status = make_one(ctx, part);
    tp_free(part);
    return status;
}

/* ---- removal: a walk down and up without recursion, relative to open folders, so that nobody can lead it astray ---- */

#define DEPTH_MAX 64 /* folders open at once; what tapeft writes is two deep */

typedef struct level {
    DIR *folder;
    char name[256]; /* in the folder above; Linux names have at most 255 bytes */
} level;

/* Opens the folder `name` in the folder behind parent_fd as level number depth; false with errno. */
static bool descend(level *levels, int depth, int parent_fd, const char *name)
{
    if (depth == DEPTH_MAX || strlen(name) >= sizeof levels->name) {
        errno = ENAMETOOLONG;
        return false;
    }
    int fd = openat(parent_fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0) return false;
    levels[depth].folder = fdopendir(fd);
    if (levels[depth].folder == NULL) {
        close(fd);
        return false;
    }
    memcpy(levels[depth].name, name, strlen(name) + 1);
    return true;
}

/* Behind the last entry of the innermost folder: removes it from the one above. */
static bool ascend(level *levels, int depth)
{
    closedir(levels[depth].folder);
    return unlinkat(dirfd(levels[depth - 1].folder), levels[depth].name, AT_REMOVEDIR) == 0;
}

/* Empties levels[0]; false with errno. */
static bool empty(level *levels)
{
    int depth = 0;
    bool good = true;
    while (good) {
        int fd = dirfd(levels[depth].folder);
        errno = 0;
        struct dirent *entry = readdir(levels[depth].folder);
        if (entry == NULL) {
            good = errno == 0;
            if (!good || depth == 0) break;
            good = ascend(levels, depth--);
        } else if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0 && unlinkat(fd, entry->d_name, 0) != 0) {
            if (errno == ENOENT) continue;
            good = errno == EISDIR && descend(levels, depth + 1, fd, entry->d_name);
            depth += good;
        }
    }
    int error = errno;
    for (; depth > 0; depth--) closedir(levels[depth].folder);
    errno = error;
    return good;
}

tp_status tp_folder_remove(tp_ctx *ctx, const char *path)
{
    if (unlink(path) == 0 || errno == ENOENT) return TP_OK; /* a file or a link; or nothing */
    level *levels = tp_alloc(ctx, DEPTH_MAX, sizeof *levels);
    if (levels == NULL) return TP_NOMEM;
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    levels[0].folder = fd >= 0 ? fdopendir(fd) : NULL;
    bool good = levels[0].folder != NULL && empty(levels) && rmdir(path) == 0;
    tp_status status = good ? TP_OK : tp_fail(ctx, TP_IO_WRITE, "%s: cannot remove: %s", path, strerror(errno));
    if (levels[0].folder != NULL)
        closedir(levels[0].folder);
    else if (fd >= 0)
        close(fd);
    tp_free(levels);
    return status;
}
