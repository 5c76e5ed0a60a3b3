/* Detection is in two steps: what the CPU and the system allow (flags), then what is worth using (the table). */
#include "backend/cpu/cpu_model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

const char *tp_cpu_isa_name(tp_cpu_isa isa)
{
    return isa == TP_CPU_AVX512 ? "avx512" : isa == TP_CPU_AVX2 ? "avx2" : "generic";
}

#if defined(__x86_64__)
/* Models on which vdpbf16ps runs at full rate, twice the multiplications of a 512-bit (or two 256-bit) f32 FMA. Intel's
 * Cooper Lake, Sapphire Rapids and their successors have the instruction at half rate: no gain over f32, so they are not
 * here. A model that nobody measured is not here either. */
static const struct {
    const char *vendor;
    int family, first_model, last_model;
} fast_bf16_dot[] = {
    {"AuthenticAMD", 0x19, 0x10, 0x1f}, /* Zen 4: Genoa */
    {"AuthenticAMD", 0x19, 0x60, 0x7f}, /* Zen 4: Raphael, Phoenix */
    {"AuthenticAMD", 0x19, 0xa0, 0xaf}, /* Zen 4c: Bergamo, Siena */
    {"AuthenticAMD", 0x1a, 0x00, 0xff}, /* Zen 5 */
};

static bool is_fast_bf16_dot(const char *vendor, int family, int model)
{
    for (size_t i = 0; i < sizeof fast_bf16_dot / sizeof *fast_bf16_dot; i++) {
        if (strcmp(vendor, fast_bf16_dot[i].vendor) == 0 && family == fast_bf16_dot[i].family &&
            model >= fast_bf16_dot[i].first_model && model <= fast_bf16_dot[i].last_model)
            return true;
    }
    return false;
}

static void read_name(char name[64])
{
    unsigned regs[12] = {0}, max = __get_cpuid_max(0x80000000u, NULL);
    if (max < 0x80000004u) return;
    for (unsigned i = 0; i < 3; i++) {
        unsigned *r = regs + 4 * i;
        __get_cpuid(0x80000002u + i, &r[0], &r[1], &r[2], &r[3]);
    }
    const char *brand = (const char *)regs;
    size_t n = 0;
    for (size_t i = 0; i < sizeof regs && brand[i] != '\0'; i++) {
        bool fits = brand[i] > ' ' && brand[i] < 127 && brand[i] != '"' && brand[i] != '\\';
        if (fits)
            name[n++] = brand[i];
        else if (n > 0 && name[n - 1] != ' ')
            name[n++] = ' ';
    }
    while (n > 0 && name[n - 1] == ' ') n--;
    if (n > 0) name[n] = '\0';
}

static void detect_x86(tp_cpu_model *cpu)
{
    unsigned a = 0, b = 0, c = 0, d = 0;
    char vendor[13] = {0};
    if (__get_cpuid(0, &a, &b, &c, &d)) {
        memcpy(vendor, &b, 4);
        memcpy(vendor + 4, &d, 4);
        memcpy(vendor + 8, &c, 4);
    }
    if (__get_cpuid(1, &a, &b, &c, &d)) {
        cpu->family = (int)(a >> 8 & 15);
        cpu->model = (int)(a >> 4 & 15);
        if (cpu->family == 6 || cpu->family == 15) cpu->model |= (int)(a >> 12 & 0xf0);
        if (cpu->family == 15) cpu->family += (int)(a >> 20 & 0xff);
    }
    read_name(cpu->name);
    /* These ask the operating system too: it must save the wide registers. */
    bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !f16c) return;
    cpu->isa = TP_CPU_AVX2;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512dq"))
        return;
    cpu->isa = TP_CPU_AVX512;
    cpu->has_bf16_dot = __builtin_cpu_supports("avx512bf16");
    cpu->bf16_dot = cpu->has_bf16_dot && is_fast_bf16_dot(vendor, cpu->family, cpu->model);
}
#endif

static tp_status obey_environment(tp_ctx *ctx, tp_cpu_model *cpu)
{
    const char *want = getenv("TAPEFT_CPU");
    if (want == NULL || want[0] == '\0') return TP_OK;
    bool bf16 = strcmp(want, "bf16") == 0;
    tp_cpu_isa isa;
    if (strcmp(want, "generic") == 0)
        isa = TP_CPU_GENERIC;
    else if (strcmp(want, "avx2") == 0)
        isa = TP_CPU_AVX2;
    else if (strcmp(want, "avx512") == 0 || bf16)
        isa = TP_CPU_AVX512;
    else
        return tp_fail(ctx, TP_INVALID, "TAPEFT_CPU: expected generic, avx2, avx512 or bf16, got \"%.40s\"", want);
    if (isa > cpu->isa || (bf16 && !cpu->has_bf16_dot))
        return tp_fail(ctx, TP_INVALID, "TAPEFT_CPU: this CPU (%s) has no %s", cpu->name, bf16 ? "vdpbf16ps" : want);
    cpu->isa = isa;
    cpu->bf16_dot = bf16;
    return TP_OK;
}

tp_status tp_cpu_model_detect(tp_ctx *ctx, tp_cpu_model *model)
{
    *model = (tp_cpu_model){.name = "unknown", .isa = TP_CPU_GENERIC};
#if defined(__x86_64__)
    detect_x86(model);
#endif
    return obey_environment(ctx, model);
}
