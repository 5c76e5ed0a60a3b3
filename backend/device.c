/* Devices by name. */
#include <string.h>

#include "backend/backend.h"
#include "base/log.h"

/* "cuda:3" -> 3, "cuda" -> 0; -1 if the number is malformed. */
static int index_of(const char *name, size_t prefix)
{
    int64_t index;
    if (name[prefix] == '\0') return 0;
    return name[prefix] == ':' && tp_parse_i64(name + prefix + 1, &index) && index >= 0 && index < 1024 ? (int)index : -1;
}

/* The GPU if there is one, else the CPU with a note that says why. */
static tp_status open_auto(tp_ctx *ctx, int threads, tp_device **device)
{
    if (ctx->status == TP_OK) { /* an error of the caller's must not be cleared */
        if (tp_cuda_backend.open(ctx, 0, threads, device) == TP_OK) return TP_OK;
        tp_note(ctx, "device: auto: running on the cpu (%s)", ctx->message);
        tp_ctx_clear(ctx);
    }
    return tp_cpu_backend.open(ctx, 0, threads, device);
}

tp_status tp_device_open(tp_ctx *ctx, const char *name, int threads, tp_device **device)
{
    static const char *const names[] = {"auto", "cpu", "cuda", "dry", NULL};
    *device = NULL;
    if (threads < 0) return tp_fail(ctx, TP_INVALID, "device: threads: expected 0 (all cores) or more, got %d", threads);
    if (strcmp(name, "auto") == 0) return open_auto(ctx, threads, device);
    if (strcmp(name, "cpu") == 0) return tp_cpu_backend.open(ctx, 0, threads, device);
    if (strcmp(name, "dry") == 0) return tp_dry_backend.open(ctx, 0, threads, device);
    if (tp_starts_with(name, "cuda") && (name[4] == '\0' || name[4] == ':')) {
        int index = index_of(name, 4);
        if (index >= 0) return tp_cuda_backend.open(ctx, index, threads, device);
    }
    const char *near = tp_nearest_name(name, names);
    return tp_fail(ctx, TP_INVALID, "device: expected auto, cpu, cuda, cuda:N or dry, got \"%.40s\"%s%s%s", name,
                   near != NULL ? "; did you mean " : "", near != NULL ? near : "", near != NULL ? "?" : "");
}

void tp_device_close(tp_device *device)
{
    if (device != NULL) device->backend->close(device);
}

tp_status tp_device_precision(tp_ctx *ctx, const char *word, tp_dtype *precision)
{
    tp_device *device = ctx->device;
    device->tf32 = strcmp(word, "tf32") == 0;
    *precision = TP_F32;
    if (strcmp(word, "auto") == 0)
        *precision = device->auto_precision;
    else if (strcmp(word, "bf16") == 0)
        *precision = TP_BF16;
    else if (strcmp(word, "fp16") == 0)
        *precision = TP_F16;
    else if (!device->tf32 && strcmp(word, "fp32") != 0)
        return tp_fail(ctx, TP_INVALID, "expected auto, fp32, tf32, bf16 or fp16, got \"%.40s\"", word);
    if (*precision == TP_F16 && !device->f16)
        return tp_fail(ctx, TP_UNSUPPORTED, "fp16 needs a CUDA GPU; this is device %s, which computes in bf16 and fp32",
                       device->backend->name);
    return TP_OK;
}
