/* Inflating a gzip file into a nameless temporary file. */
#include "data/unpack.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define ZLIB_CONST
#include <zlib.h>

#include "base/mem.h"

#define BLOCK_BYTES ((size_t)64 << 10)
#define GZIP_ONLY   (16 + 15) /* zlib's code for a gzip header and the largest window */

struct unpacking {
    tp_ctx *ctx;
    tp_file *packed;
    int fd;
    uint64_t at, size, written, limit; /* bytes read of size; bytes written of at most limit */
    unsigned char *in, *out;           /* [BLOCK_BYTES] each */
    z_stream z;
};

static void *zlib_alloc(void *user, unsigned count, unsigned size)
{
    (void)user;
    return tp_alloc(NULL, count, size);
}

static void zlib_free(void *user, void *memory)
{
    (void)user;
    tp_free(memory);
}

static tp_status open_nameless(tp_ctx *ctx, int *fd)
{
    char path[1024];
    const char *folder = getenv("TMPDIR");
    int n = snprintf(path, sizeof path, "%s/tapeft-rows-XXXXXX", folder != NULL && folder[0] != '\0' ? folder : "/tmp");
    if (n < 0 || (size_t)n >= sizeof path) return tp_fail(ctx, TP_IO_WRITE, "TMPDIR: the path is too long");
    *fd = mkstemp(path);
    if (*fd < 0) return tp_fail(ctx, TP_IO_WRITE, "%s: %s", path, strerror(errno));
    unlink(path);
    return TP_OK;
}

static tp_status write_out(struct unpacking *u, size_t n)
{
    const unsigned char *from = u->out;
    const char *path = tp_file_path(u->packed);
    if (n > u->limit - u->written)
        return tp_fail(u->ctx, TP_FORMAT, "%s: unpacks to more than %d times its %llu bytes", path, TP_UNPACK_RATIO,
                       (unsigned long long)u->size);
    u->written += n;
    while (n > 0) {
        ssize_t wrote = write(u->fd, from, n);
        if (wrote < 0 && errno == EINTR) continue;
        if (wrote <= 0) return tp_fail(u->ctx, TP_IO_WRITE, "%s: unpacking it: %s", path, strerror(errno));
        from += wrote;
        n -= (size_t)wrote;
    }
    return TP_OK;
}

static tp_status read_in(struct unpacking *u)
{
    uint64_t left = u->size - u->at;
    size_t n = left < BLOCK_BYTES ? (size_t)left : BLOCK_BYTES;
    if (n == 0) return tp_fail(u->ctx, TP_FORMAT, "%s: the gzip stream is cut short", tp_file_path(u->packed));
    TP_TRY(tp_file_pread(u->ctx, u->packed, u->at, u->in, n));
    u->at += n;
    u->z.next_in = u->in;
    u->z.avail_in = (unsigned)n;
    return TP_OK;
}

static tp_status inflate_all(struct unpacking *u)
{
    int code = Z_OK;
    while (code != Z_STREAM_END || u->z.avail_in > 0 || u->at < u->size) {
        if (u->z.avail_in == 0) TP_TRY(read_in(u));
        if (code == Z_STREAM_END && inflateReset(&u->z) != Z_OK)
            return tp_fail(u->ctx, TP_INTERNAL, "zlib does not start over");
        u->z.next_out = u->out;
        u->z.avail_out = (unsigned)BLOCK_BYTES;
        code = inflate(&u->z, Z_NO_FLUSH);
        if (code == Z_MEM_ERROR) return tp_fail(u->ctx, TP_NOMEM, "%s: unpacking it: out of memory", tp_file_path(u->packed));
        if (code != Z_OK && code != Z_STREAM_END && code != Z_BUF_ERROR)
            return tp_fail(u->ctx, TP_FORMAT, "%s: no gzip data near byte %llu: %s", tp_file_path(u->packed),
                           (unsigned long long)(u->at - u->z.avail_in), u->z.msg != NULL ? u->z.msg : "damaged");
        TP_TRY(write_out(u, BLOCK_BYTES - u->z.avail_out));
    }
    return TP_OK;
}

static tp_status unpack(struct unpacking *u)
{
    u->in = tp_alloc_raw(u->ctx, 2, BLOCK_BYTES);
    if (u->in == NULL) return TP_NOMEM;
    u->out = u->in + BLOCK_BYTES;
    u->z.zalloc = zlib_alloc;
    u->z.zfree = zlib_free;
    int code = inflateInit2(&u->z, GZIP_ONLY);
    if (code == Z_MEM_ERROR) return tp_fail(u->ctx, TP_NOMEM, "%s: unpacking it: out of memory", tp_file_path(u->packed));
    if (code != Z_OK) return tp_fail(u->ctx, TP_INTERNAL, "zlib does not start: code %d", code);
    tp_status status = inflate_all(u);
    inflateEnd(&u->z);
    return status;
}

tp_status tp_unpack_gzip(tp_ctx *ctx, tp_file *packed, int *fd, uint64_t *size)
{
    struct unpacking u = {.ctx = ctx, .packed = packed, .fd = -1, .size = tp_file_size(packed)};
    *fd = -1;
    if (__builtin_mul_overflow(u.size, (uint64_t)TP_UNPACK_RATIO, &u.limit)) u.limit = UINT64_MAX;
    TP_TRY(open_nameless(ctx, &u.fd));
    tp_status status = unpack(&u);
    tp_free(u.in);
    if (status != TP_OK) {
        close(u.fd);
        return status;
    }
    *fd = u.fd;
    *size = u.written;
    return TP_OK;
}
