/* safetensors: what is accepted lies inside the file, tile by tile, and every byte of it can be read. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/safetensors.h"

static void check_entries(const tp_safetensors *file, const uint8_t *data, size_t n)
{
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    uint64_t end = 0, sum = 0;
    for (size_t i = 0; i < tp_safetensors_count(file); i++) {
        const tp_entry *e = tp_safetensors_at(file, i);
        if (tp_safetensors_find(file, e->name) != e || strlen(e->name) > TP_SAFETENSORS_NAME_MAX) abort();
        if (e->rank < 0 || e->rank > TP_MAX_RANK || (i > 0 && e->offset != end)) abort();
        end = e->offset + e->bytes;
        if (end > n || e->offset < 8) abort();
        const uint8_t *bytes = tp_safetensors_data(file, e);
        if (bytes != data + e->offset) abort();
        for (uint64_t k = 0; k < e->bytes; k++) sum += bytes[k];
        uint64_t elements = tp_dtype_bytes(e->dtype) > 0 ? e->bytes / tp_dtype_bytes(e->dtype) : 0;
        float f;
        int64_t integer;
        if (elements > 0 && tp_dtype_is_float(e->dtype) && tp_safetensors_read_f32(&ctx, file, e, elements - 1, 1, &f) != TP_OK)
            abort();
        tp_status status = tp_safetensors_read_i64(&ctx, file, e, elements, 1, &integer);
        if (status != TP_SHAPE && status != TP_FORMAT) abort();
        tp_ctx_clear(&ctx);
    }
    if (tp_safetensors_count(file) > 0 && end != n) abort();
    for (size_t i = 0; i < tp_safetensors_metadata_count(file); i++) {
        const char *key, *value;
        tp_safetensors_metadata_at(file, i, &key, &value);
        sum += strlen(key) + strlen(value);
        if (tp_safetensors_metadata(file, key) == NULL) abort();
    }
    __asm__ volatile("" : : "r"(sum)); /* the reads above must not be optimised away */
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    tp_ctx ctx;
    tp_safetensors *file;
    tp_ctx_init(&ctx);
    tp_status status = tp_safetensors_parse(&ctx, "f", data, n, &file);
    if (status == TP_OK)
        check_entries(file, data, n);
    else if (status != TP_FORMAT || ctx.message[0] == '\0')
        abort();
    tp_safetensors_close(file);
    /* The fuzzer's bytes as a header of the right length, with as much data behind as the first tensors may ask for. */
    if (n > 4000) return 0;
    static uint8_t image[8 + 4000 + 64];
    uint64_t length = n;
    memcpy(image, &length, 8);
    if (n > 0) memcpy(image + 8, data, n);
    memset(image + 8 + n, 0, 64);
    for (size_t extra = 0; extra <= 64; extra += 8) {
        tp_ctx_clear(&ctx);
        if (tp_safetensors_parse(&ctx, "f", image, 8 + n + extra, &file) == TP_OK) check_entries(file, image, 8 + n + extra);
        tp_safetensors_close(file);
    }
    return 0;
}
