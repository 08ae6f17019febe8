#include "cpu/isa.h"

#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "cpu/single.h"

#if defined(__x86_64__)
static bool has_f16c(void) {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

static bool has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
static bool has_avx512(void) { return has_avx2() && __builtin_cpu_supports("avx512f"); }
#endif

static bool always(void) { return true; }

/* widest first */
static const moe_cpu_isa table[] = {
#if defined(__x86_64__)
    {"avx512", &moe_cpu_kernels_avx512, &moe_cpu_single_avx512, has_avx512},
    {"avx2", &moe_cpu_kernels_avx2, &moe_cpu_single_avx2, has_avx2},
#endif
    {"scalar", &moe_cpu_kernels_scalar, &moe_cpu_single_scalar, always},
};

moe_status moe_cpu_isa_find(const char *name, const moe_cpu_isa **out, moe_error *err) {
    bool any = strcmp(name, "auto") == 0;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        if (!any && strcmp(name, table[i].name) != 0) continue;
        *out = &table[i];
        if (table[i].available()) return MOE_OK;
        if (!any) return moe_fail(err, MOE_FAILED_PRECONDITION, "this machine has no %s; give MOESAIC_CPU_ISA=auto", name);
    }
    return moe_fail(err, MOE_INVALID_ARGUMENT,
                    "unknown instruction set \"%s\" for the cpu backend; known: auto, avx512, avx2, scalar", name);
}
