/* gzip files, unpacked before they are read: rows are looked up by place, and a compressed stream has none. */
#ifndef TP_DATA_UNPACK_H
#define TP_DATA_UNPACK_H

#include "base/file.h"
#include "base/status.h"

/* A file may unpack to so many times its size: enough for any text that people write, not for a bomb. */
#define TP_UNPACK_RATIO 200

/* Unpacks the whole file into a nameless file in $TMPDIR (else /tmp), which is gone once *fd is closed. Several gzip members in
 * a row are one text. FORMAT: no gzip file, damaged, cut short, or past the ratio; IO_WRITE: no room for it; NOMEM. */
tp_status tp_unpack_gzip(tp_ctx *ctx, tp_file *packed, int *fd, uint64_t *size) TP_MUST_CHECK;

#endif
