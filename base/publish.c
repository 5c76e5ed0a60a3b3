/* A folder that appears under its name only when complete.
 *
 *   files into staging, each synced -> manifest.json -> sync staging -> read everything back and compare -> rename -> sync the
 *   folder above -> remove what was replaced
 *
 * A kill at any point leaves either the old folder or the new one under the final name, and perhaps a staging folder
 * for tp_publish_sweep. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/file.h"
#include "base/io.h"
#include "base/json.h"
#include "base/mem.h"

#define MANIFEST "manifest.json"

typedef struct item {
    char *name;
    uint64_t bytes;
    char sha256[65];
} item;

struct tp_publish {
    char *path, *staging;
    int lock; /* the staging folder, open and locked while we live */
    item *items;
    size_t count, capacity;
};

/* ---- begin ---- */

static void publish_free(tp_publish *p)
{
    if (p == NULL) return;
    for (size_t i = 0; i < p->count; i++) tp_free(p->items[i].name);
    if (p->lock >= 0) close(p->lock);
    tp_free(p->items);
    tp_free(p->path);
    tp_free(p->staging);
    tp_free(p);
}

static tp_status make_staging(tp_ctx *ctx, tp_publish *p)
{
    TP_TRY(tp_io_temporary_name(ctx, p->path, &p->staging));
    if (mkdir(p->staging, 0777) != 0)
        return tp_fail(ctx, TP_IO_WRITE, "%s: cannot make a folder: %s", p->staging, strerror(errno));
    p->lock = open(p->staging, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (p->lock >= 0) (void)flock(p->lock, LOCK_EX | LOCK_NB); /* for is_dead(), which has another sign, too */
    return TP_OK;
}

tp_status tp_publish_begin(tp_ctx *ctx, const char *path, tp_publish **out)
{
    *out = NULL;
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/') n--;
    tp_publish *p = tp_alloc(ctx, 1, sizeof *p);
    if (p == NULL) return TP_NOMEM;
    p->lock = -1;
    p->path = tp_strndup(ctx, path, n);
    tp_status status = p->path != NULL ? make_staging(ctx, p) : TP_NOMEM;
    if (status != TP_OK)
        publish_free(p);
    else
        *out = p;
    return status;
}

const char *tp_publish_staging(const tp_publish *p)
{
    return p->staging;
}

/* ---- add ---- */

static bool is_component(const char *name)
{
    return name[0] != '\0' && strcmp(name, ".") != 0 && strcmp(name, "..") != 0 && strchr(name, '/') == NULL;
}

static tp_status add_item(tp_ctx *ctx, tp_publish *p, const char *name, item **out)
{
    if (!is_component(name) || strcmp(name, MANIFEST) == 0)
        return tp_fail(ctx, TP_INTERNAL, "%s: \"%s\" is not a name for a file in it", p->path, name);
    for (size_t i = 0; i < p->count; i++)
        if (strcmp(p->items[i].name, name) == 0) return tp_fail(ctx, TP_INTERNAL, "%s: %s added twice", p->path, name);
    TP_TRY(tp_grow(ctx, &p->items, &p->capacity, p->count + 1, sizeof *p->items));
    item *it = &p->items[p->count];
    *it = (item){.name = tp_strdup(ctx, name)};
    if (it->name == NULL) return TP_NOMEM;
    p->count++;
    *out = it;
    return TP_OK;
}

static tp_status write_new(tp_ctx *ctx, const char *path, const void *bytes, size_t n)
{
    int fd;
    TP_TRY(tp_io_create(ctx, path, n, &fd));
    tp_status status = tp_io_write(ctx, fd, path, bytes, n);
    if (status != TP_OK) {
        close(fd);
        return status;
    }
    return tp_io_sync_close(ctx, fd, path);
}

tp_status tp_publish_add(tp_ctx *ctx, tp_publish *p, const char *name, const void *bytes, size_t n)
{
    item *it;
    TP_TRY(add_item(ctx, p, name, &it));
    it->bytes = n;
    tp_sha256_hex(bytes, n, it->sha256);
    char *path = tp_path_join(ctx, p->staging, name);
    if (path == NULL) return TP_NOMEM;
    tp_status status = write_new(ctx, path, bytes, n);
    tp_free(path);
    return status;
}

static tp_status adopt_file(tp_ctx *ctx, const char *path, item *it)
{
    struct stat info;
    int fd;
    TP_TRY(tp_io_open(ctx, path, &fd, &info));
    it->bytes = (uint64_t)info.st_size;
    TP_TRY(tp_io_sync_close(ctx, fd, path));
    return tp_sha256_file(ctx, path, it->sha256);
}

tp_status tp_publish_adopt(tp_ctx *ctx, tp_publish *p, const char *name)
{
    item *it;
    TP_TRY(add_item(ctx, p, name, &it));
    char *path = tp_path_join(ctx, p->staging, name);
    if (path == NULL) return TP_NOMEM;
    tp_status status = adopt_file(ctx, path, it);
    tp_free(path);
    return status;
}

/* ---- manifest ---- */

static void write_files(tp_buf *out, const tp_publish *p)
{
    tp_buf_text(out, "\"files\": {");
    for (size_t i = 0; i < p->count; i++) {
        tp_buf_text(out, i > 0 ? ",\n    " : "\n    ");
        tp_json_write_string(out, p->items[i].name, strlen(p->items[i].name));
        tp_buf_printf(out, ": {\"bytes\": %llu, \"sha256\": \"%s\"}", (unsigned long long)p->items[i].bytes,
                      p->items[i].sha256);
    }
    tp_buf_text(out, "\n  }");
}

/* The caller's object with "files" as its last member. */
static tp_status merge_manifest(tp_ctx *ctx, const tp_publish *p, const char *manifest, tp_buf *out)
{
    tp_json_doc *doc;
    TP_TRY(tp_json_parse(ctx, manifest, strlen(manifest), &(tp_json_options){.name = MANIFEST}, &doc));
    const tp_json *root = tp_json_root(doc);
    tp_status status = TP_OK;
    if (tp_json_type_of(root) != TP_JSON_OBJECT || tp_json_get(root, "files") != NULL)
        status = tp_fail(ctx, TP_INTERNAL, "%s: the manifest is not an object without \"files\"", p->path);
    tp_buf_text(out, "{\n  ");
    for (size_t i = 0; i < tp_json_count(root); i++) {
        tp_span key = tp_json_key_at(root, i);
        tp_json_write_string(out, key.data, key.len);
        tp_buf_text(out, ": ");
        tp_json_write(out, tp_json_at(root, i), 0);
        tp_buf_text(out, ",\n  ");
    }
    write_files(out, p);
    tp_buf_text(out, "\n}\n");
    tp_json_free(doc);
    return status != TP_OK ? status : tp_buf_status(ctx, out, MANIFEST);
}

static tp_status write_manifest(tp_ctx *ctx, const tp_publish *p, const char *manifest)
{
    tp_buf text;
    tp_buf_init(&text, TP_MANIFEST_BYTES);
    char *path = tp_path_join(ctx, p->staging, MANIFEST);
    tp_status status = path == NULL ? TP_NOMEM : merge_manifest(ctx, p, manifest, &text);
    if (status == TP_OK) status = write_new(ctx, path, text.data, text.len);
    tp_free(path);
    tp_buf_free(&text);
    return status;
}

/* ---- comparing files with what is known of them ---- */

static tp_status compare_file(tp_ctx *ctx, const char *path, uint64_t bytes, tp_span sha256)
{
    struct stat info;
    char hex[65];
    if (stat(path, &info) != 0) return tp_fail(ctx, TP_CHECKPOINT, "%s: %s", path, strerror(errno));
    if (!S_ISREG(info.st_mode)) return tp_fail(ctx, TP_CHECKPOINT, "%s: not a regular file", path);
    if ((uint64_t)info.st_size != bytes)
        return tp_fail(ctx, TP_CHECKPOINT, "%s: %lld bytes, the manifest says %llu", path, (long long)info.st_size,
                       (unsigned long long)bytes);
    TP_TRY(tp_sha256_file(ctx, path, hex));
    if (!tp_span_is(sha256, hex))
        return tp_fail(ctx, TP_CHECKPOINT, "%s: the content has another SHA-256 than the manifest says", path);
    return TP_OK;
}

static tp_status compare_in(tp_ctx *ctx, const char *folder, const char *name, uint64_t bytes, tp_span sha256)
{
    char *path = tp_path_join(ctx, folder, name);
    if (path == NULL) return TP_NOMEM;
    tp_status status = compare_file(ctx, path, bytes, sha256);
    tp_free(path);
    return status;
}

static bool is_known(const tp_publish *p, const char *name)
{
    if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0 || strcmp(name, MANIFEST) == 0) return true;
    for (size_t i = 0; i < p->count; i++)
        if (strcmp(p->items[i].name, name) == 0) return true;
    return false;
}

/* Every file in staging is listed, and every listed file reads back as it was written. */
static tp_status check_staging(tp_ctx *ctx, const tp_publish *p)
{
    DIR *folder = opendir(p->staging);
    if (folder == NULL) return tp_fail(ctx, TP_IO_WRITE, "%s: %s", p->staging, strerror(errno));
    tp_status status = TP_OK;
    for (struct dirent *entry; status == TP_OK && (entry = readdir(folder)) != NULL;)
        if (!is_known(p, entry->d_name)) status = tp_fail(ctx, TP_INTERNAL, "%s: %s was never added", p->path, entry->d_name);
    closedir(folder);
    for (size_t i = 0; i < p->count && status == TP_OK; i++)
        status = compare_in(ctx, p->staging, p->items[i].name, p->items[i].bytes, tp_span_of(p->items[i].sha256));
    return status;
}

/* ---- commit ---- */

/* For file systems without RENAME_EXCHANGE: the old folder steps aside, and back if the new one cannot come. Aside it has a
 * name that no sweep takes for a leftover, since a kill between the two renames leaves it as the only good copy. */
static tp_status replace_in_two_steps(tp_ctx *ctx, tp_publish *p)
{
    char *aside;
    TP_TRY(tp_io_temporary_name(ctx, p->path, &aside));
    memcpy(aside + strlen(p->path), ".old-", 5); /* in place of ".tmp-" */
    tp_status status = TP_OK;
    if (rename(p->path, aside) != 0) {
        status = tp_fail(ctx, TP_IO_WRITE, "%s: cannot move aside: %s", p->path, strerror(errno));
    } else if (rename(p->staging, p->path) != 0) {
        status = tp_fail(ctx, TP_IO_WRITE, "%s: cannot rename: %s", p->path, strerror(errno));
        (void)rename(aside, p->path);
    } else { /* what is to be removed now */
        tp_free(p->staging);
        p->staging = aside;
        return TP_OK;
    }
    tp_free(aside);
    return status;
}

/* Afterwards p->staging is the replaced folder, if *replaced. */
static tp_status move_into_place(tp_ctx *ctx, tp_publish *p, bool replace, bool *replaced)
{
    struct stat info;
    *replaced = false;
    if (renameat2(AT_FDCWD, p->staging, AT_FDCWD, p->path, RENAME_NOREPLACE) == 0) return TP_OK;
    bool plain = errno == EINVAL || errno == ENOSYS; /* the file system knows only rename() */
    if (plain && lstat(p->path, &info) != 0 && errno == ENOENT && rename(p->staging, p->path) == 0) return TP_OK;
    if (!plain && errno != EEXIST) return tp_fail(ctx, TP_IO_WRITE, "%s: cannot rename: %s", p->path, strerror(errno));
    if (!replace) return tp_fail(ctx, TP_INVALID, "%s: already exists", p->path);
    if (lstat(p->path, &info) != 0) return tp_fail(ctx, TP_IO_WRITE, "%s: %s", p->path, strerror(errno));
    if (!S_ISDIR(info.st_mode)) return tp_fail(ctx, TP_INVALID, "%s: exists and is not a folder", p->path);
    *replaced = true;
    if (renameat2(AT_FDCWD, p->staging, AT_FDCWD, p->path, RENAME_EXCHANGE) == 0) return TP_OK;
    if (errno == EINVAL || errno == ENOSYS) return replace_in_two_steps(ctx, p);
    return tp_fail(ctx, TP_IO_WRITE, "%s: cannot exchange with the new folder: %s", p->path, strerror(errno));
}

/* What cannot be removed now is found by a later sweep; the caller's result does not hang on it. */
static void remove_quietly(const char *path)
{
    tp_status ignored = tp_folder_remove(NULL, path);
    (void)ignored;
}

tp_status tp_publish_commit(tp_ctx *ctx, tp_publish *p, const char *manifest, bool replace)
{
    bool replaced = false;
    tp_status status = manifest != NULL ? write_manifest(ctx, p, manifest) : TP_OK;
    if (status == TP_OK) status = tp_io_sync_folder(ctx, p->staging);
    if (status == TP_OK) status = check_staging(ctx, p);
    if (status == TP_OK) status = move_into_place(ctx, p, replace, &replaced);
    if (status != TP_OK) {
        tp_publish_discard(p);
        return status;
    }
    status = tp_io_sync_parent(ctx, p->path);
    if (status == TP_OK && replaced) remove_quietly(p->staging);
    publish_free(p);
    return status;
}

void tp_publish_discard(tp_publish *p)
{
    if (p == NULL) return;
    remove_quietly(p->staging);
    publish_free(p);
}

/* ---- verify ---- */

static tp_status verify_files(tp_ctx *ctx, const char *folder, const tp_json_doc *doc)
{
    const tp_json *files = tp_json_get(tp_json_root(doc), "files");
    if (tp_json_type_of(files) != TP_JSON_OBJECT)
        return tp_fail(ctx, TP_CHECKPOINT, "%s/" MANIFEST ": no list of files", folder);
    for (size_t i = 0; i < tp_json_count(files); i++) {
        char name[256];
        int64_t bytes = 0;
        tp_span key = tp_json_key_at(files, i), sha256 = {"", 0};
        const tp_json *file = tp_json_at(files, i);
        TP_TRY(tp_json_need_i64(ctx, doc, file, "bytes", true, 0, INT64_MAX, &bytes));
        TP_TRY(tp_json_need_string(ctx, doc, file, "sha256", true, &sha256));
        bool fits = key.len < sizeof name && (key.len == 0 || memchr(key.data, '\0', key.len) == NULL);
        snprintf(name, sizeof name, "%.*s", fits ? (int)key.len : 0, key.data);
        if (!is_component(name)) return tp_fail(ctx, TP_CHECKPOINT, "%s/" MANIFEST ": file %zu has no usable name", folder, i);
        TP_TRY(compare_in(ctx, folder, name, (uint64_t)bytes, sha256));
    }
    return TP_OK;
}

static tp_status verify(tp_ctx *ctx, const char *folder, const char *path, char **manifest)
{
    tp_json_doc *doc = NULL;
    char *text = NULL;
    size_t n;
    tp_status status = tp_file_read(ctx, path, TP_MANIFEST_BYTES, &text, &n);
    if (status == TP_OK) status = tp_json_parse(ctx, text, n, &(tp_json_options){.name = path}, &doc);
    if (status == TP_OK) status = verify_files(ctx, folder, doc);
    tp_json_free(doc);
    if (status == TP_OK && manifest != NULL)
        *manifest = text;
    else
        tp_free(text);
    return status;
}

tp_status tp_publish_verify(tp_ctx *ctx, const char *folder, char **manifest)
{
    if (manifest != NULL) *manifest = NULL;
    char *path = tp_path_join(ctx, folder, MANIFEST);
    if (path == NULL) return TP_NOMEM;
    bool clean = ctx == NULL || ctx->status == TP_OK;
    tp_status status = verify(ctx, folder, path, manifest);
    tp_free(path);
    if (status == TP_OK || status == TP_NOMEM) return status;
    if (ctx != NULL && clean) ctx->status = TP_CHECKPOINT; /* whatever is wrong with a file here, the checkpoint is unusable */
    return TP_CHECKPOINT;
}

/* ---- sweep ---- */

/* A leftover is dead if its process is gone and nobody holds its lock; or if its process has our own number (it was somebody
 * before us, in a container for instance) and its lock can be had, which we would hold if it were ours. */
static bool is_dead(const char *path, pid_t pid)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0) return false;
    bool unlocked = flock(fd, LOCK_EX | LOCK_NB) == 0, held = !unlocked && errno == EWOULDBLOCK;
    close(fd);
    if (pid == getpid()) return unlocked;
    return !held && kill(pid, 0) != 0 && errno == ESRCH;
}

tp_status tp_publish_sweep(tp_ctx *ctx, const char *folder, const char *prefix)
{
    DIR *dir = opendir(folder);
    if (dir == NULL) return errno == ENOENT ? TP_OK : tp_fail(ctx, TP_IO_READ, "%s: %s", folder, strerror(errno));
    tp_status status = TP_OK;
    for (struct dirent *entry; status == TP_OK && (entry = readdir(dir)) != NULL;) {
        pid_t pid;
        if (!tp_starts_with(entry->d_name, prefix) || !tp_io_is_temporary(entry->d_name, &pid)) continue;
        char *path = tp_path_join(ctx, folder, entry->d_name);
        if (path == NULL)
            status = TP_NOMEM;
        else if (is_dead(path, pid))
            status = tp_folder_remove(ctx, path);
        tp_free(path);
    }
    closedir(dir);
    return status;
}
