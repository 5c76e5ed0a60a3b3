/* SHA-256 through nettle. */
#include <errno.h>
#include <fcntl.h>
#include <nettle/sha2.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/file.h"
#include "base/io.h"

#define PIECE_BYTES 65536

void tp_sha256(const void *bytes, size_t n, uint8_t digest[32])
{
    struct sha256_ctx sha;
    sha256_init(&sha);
    sha256_update(&sha, n, bytes);
    sha256_digest(&sha, 32, digest);
}

static void to_hex(const uint8_t digest[32], char hex[65])
{
    for (int i = 0; i < 32; i++) {
        hex[2 * i] = "0123456789abcdef"[digest[i] >> 4];
        hex[2 * i + 1] = "0123456789abcdef"[digest[i] & 15];
    }
    hex[64] = '\0';
}

void tp_sha256_hex(const void *bytes, size_t n, char hex[65])
{
    uint8_t digest[32];
    tp_sha256(bytes, n, digest);
    to_hex(digest, hex);
}

tp_status tp_file_sha256(tp_ctx *ctx, tp_file *file, char hex[65])
{
    struct sha256_ctx sha;
    uint8_t piece[PIECE_BYTES], digest[32];
    uint64_t size = tp_file_size(file);
    sha256_init(&sha);
    for (uint64_t at = 0; at < size; at += PIECE_BYTES) {
        size_t n = size - at < PIECE_BYTES ? (size_t)(size - at) : PIECE_BYTES;
        TP_TRY(tp_file_pread(ctx, file, at, piece, n));
        sha256_update(&sha, n, piece);
    }
    sha256_digest(&sha, 32, digest);
    to_hex(digest, hex);
    return TP_OK;
}

tp_status tp_sha256_file(tp_ctx *ctx, const char *path, char hex[65])
{
    struct sha256_ctx sha;
    struct stat info;
    uint8_t piece[PIECE_BYTES], digest[32];
    int fd;
    off_t offset = 0;
    ssize_t got;
    TP_TRY(tp_io_open(ctx, path, &fd, &info));
    sha256_init(&sha);
    while ((got = tp_io_pread(fd, piece, sizeof piece, offset)) > 0) {
        sha256_update(&sha, (size_t)got, piece);
        offset += got;
    }
    tp_status status = got < 0 ? tp_fail(ctx, TP_IO_READ, "%s: %s", path, strerror(errno)) : TP_OK;
    close(fd);
    sha256_digest(&sha, 32, digest);
    to_hex(digest, hex);
    return status;
}
