/* The CPU as a device: memory is the host's, copies are memcpy, kernels run when called. */
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "backend/cpu/ahead.h"
#include "backend/cpu/cpu.h"
#include "backend/cpu/cpu_model.h"
#include "backend/cpu/openblas.h"
#include "base/mem.h"

#define PAGE      ((size_t)4096)
#define ALIGNMENT ((size_t)256)
/* From this size on the system is asked for huge pages: a step's arrays would not fit the TLB. */
#define HUGE_BYTES ((size_t)4 << 20)

static uint64_t machine_memory(void)
{
    long pages = sysconf(_SC_PHYS_PAGES), bytes = sysconf(_SC_PAGESIZE);
    return pages > 0 && bytes > 0 ? (uint64_t)pages * (uint64_t)bytes : 0;
}

static void cpu_close(tp_device *device)
{
    if (device == NULL) return;
    tp_cpu *cpu = (tp_cpu *)(void *)device;
    tp_threads_free(cpu->pool);
    tp_cpu_ahead_free(cpu->ahead);
    tp_openblas_close(cpu->openblas);
    tp_free(cpu->memory);
    tp_free(cpu);
}

static unsigned char *align(void *memory, size_t alignment)
{
    uintptr_t address = (uintptr_t)memory;
    return (unsigned char *)memory + ((address + alignment - 1) / alignment * alignment - address);
}

static tp_status open_parts(tp_ctx *ctx, tp_cpu *cpu, int threads)
{
    cpu->pool = tp_threads_new(ctx, threads);
    if (cpu->pool == NULL) return TP_NOMEM;
    cpu->ahead = tp_cpu_ahead_new(ctx);
    if (cpu->ahead == NULL) return TP_NOMEM;
    cpu->device.threads = tp_threads_count(cpu->pool);
    cpu->device.workspace_bytes = TP_CPU_WORKSPACE_BYTES + (uint64_t)cpu->device.threads * TP_CPU_SCRATCH_BYTES;
    size_t bytes = TP_CPU_WORKSPACE_BYTES + (size_t)cpu->device.threads * TP_CPU_SCRATCH_BYTES;
    cpu->memory = tp_alloc_raw(ctx, bytes + PAGE, 1);
    if (cpu->memory == NULL) return TP_NOMEM;
    cpu->workspace = align(cpu->memory, PAGE);
    cpu->scratch = cpu->workspace + TP_CPU_WORKSPACE_BYTES;
    (void)madvise(cpu->workspace, bytes, MADV_HUGEPAGE); /* a hint */
    /* Where we have vector code OpenBLAS is not needed, and its threads would cost memory. Elsewhere our threads call it. */
    if (cpu->isa == TP_CPU_GENERIC) cpu->openblas = tp_openblas_open(false);
    if (cpu->openblas != NULL) cpu->openblas->set_num_threads(1);
    return TP_OK;
}

static tp_status cpu_open(tp_ctx *ctx, int index, int threads, tp_device **device)
{
    *device = NULL;
    if (index != 0) return tp_fail(ctx, TP_DEVICE, "cpu:%d: there is one cpu device, cpu", index);
    tp_cpu_model model;
    TP_TRY(tp_cpu_model_detect(ctx, &model));
    tp_cpu *cpu = tp_alloc(ctx, 1, sizeof *cpu);
    if (cpu == NULL) return TP_NOMEM;
    cpu->device.backend = &tp_cpu_backend;
    cpu->device.auto_precision = model.bf16_dot ? TP_BF16 : TP_F32;
    cpu->device.memory_bytes = machine_memory();
    cpu->isa = model.isa;
    cpu->bf16_dot = model.bf16_dot;
    tp_status status = open_parts(ctx, cpu, threads);
    if (status != TP_OK) {
        cpu_close(&cpu->device);
        return status;
    }
    *device = &cpu->device;
    return TP_OK;
}

/* The pointer that tp_free needs stands right in front of the aligned block. */
static void *cpu_alloc(tp_ctx *ctx, tp_device *device, size_t bytes)
{
    (void)device;
    size_t total;
    size_t alignment = bytes >= HUGE_BYTES ? PAGE : ALIGNMENT;
    if (!tp_add_size(bytes, alignment + sizeof(void *), &total)) {
        tp_fail(ctx, TP_NOMEM, "out of memory: %zu bytes", bytes);
        return NULL;
    }
    void *memory = tp_alloc(ctx, total, 1);
    if (memory == NULL) return NULL;
    unsigned char *block = align((unsigned char *)memory + sizeof(void *), alignment);
    memcpy(block - sizeof(void *), &memory, sizeof(void *));
    if (bytes >= HUGE_BYTES) (void)madvise(block, bytes / PAGE * PAGE, MADV_HUGEPAGE); /* a hint */
    return block;
}

static void cpu_free(tp_device *device, void *block, size_t bytes)
{
    (void)device;
    (void)bytes;
    if (block == NULL) return;
    void *memory;
    memcpy(&memory, (unsigned char *)block - sizeof(void *), sizeof(void *));
    tp_free(memory);
}

static tp_status cpu_copy(tp_ctx *ctx, void *to, const void *from, size_t bytes)
{
    (void)ctx;
    if (bytes > 0) memcpy(to, from, bytes);
    return TP_OK;
}

static tp_status cpu_zero(tp_ctx *ctx, void *memory, size_t bytes)
{
    (void)ctx;
    if (bytes > 0) memset(memory, 0, bytes);
    return TP_OK;
}

static tp_status cpu_sync(tp_ctx *ctx)
{
    (void)ctx;
    return TP_OK;
}

static tp_status cpu_copy_beside(tp_ctx *ctx, void *to, const void *from, size_t bytes, int *ticket)
{
    *ticket = 0;
    return cpu_copy(ctx, to, from, bytes);
}

static tp_status cpu_wait_beside(tp_ctx *ctx, int ticket)
{
    (void)ctx, (void)ticket;
    return TP_OK;
}

static void cpu_describe(tp_device *device, tp_buf *json)
{
    tp_cpu *cpu = (tp_cpu *)(void *)device;
    tp_cpu_model model;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    if (tp_cpu_model_detect(&ctx, &model) != TP_OK) return; /* it did when the device was opened */
    tp_openblas *blas = cpu->openblas != NULL ? cpu->openblas : tp_openblas_open(cpu->isa == TP_CPU_AVX512);
    tp_buf_printf(json, "\"model\": \"%s\", \"family\": %d, \"model_number\": %d, \"kernels\": \"%s\"", model.name,
                  model.family, model.model, tp_cpu_isa_name(cpu->isa));
    tp_buf_printf(json, ", \"bf16_dot\": \"%s\"", cpu->bf16_dot ? "used" : model.has_bf16_dot ? "slow, not used" : "absent");
    tp_buf_printf(json, ", \"threads\": %d, \"memory_bytes\": %llu", device->threads, (unsigned long long)device->memory_bytes);
    if (blas != NULL)
        tp_buf_printf(json, ", \"openblas_core\": \"%s\"", tp_openblas_core(blas));
    else
        tp_buf_text(json, ", \"openblas_core\": null");
    if (blas != cpu->openblas) tp_openblas_close(blas);
}

const tp_backend tp_cpu_backend = {
    .name = "cpu",
    .computes = true,
    .host_memory = true,
    .open = cpu_open,
    .close = cpu_close,
    .alloc = cpu_alloc,
    .free = cpu_free,
    .copy_in = cpu_copy,
    .copy_out = cpu_copy,
    .zero = cpu_zero,
    .sync = cpu_sync,
    .host_alloc = cpu_alloc,
    .host_free = cpu_free,
    .copy_beside = cpu_copy_beside,
    .wait_beside = cpu_wait_beside,
    .describe = cpu_describe,
    .kernels =
        {
#define TP_KERNEL(name, args) tp_cpu_##name,
#include "backend/kernels.def"
#undef TP_KERNEL
        },
};
