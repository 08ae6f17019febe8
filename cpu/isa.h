/* The instruction paths of the `cpu` backend; one is added by a row in isa.c. */
#pragma once
#include "cpu/kernels.h"

typedef struct moe_cpu_isa {
    const char *name;
    const moe_cpu_kernels *kernels;
    const moe_ops *single;
    bool (*available)(void); /* on this machine */
} moe_cpu_isa;

/* The path of that name, or for "auto" the widest that this machine has. INVALID_ARGUMENT: no such path.
 * FAILED_PRECONDITION: this machine lacks it. */
moe_status moe_cpu_isa_find(const char *name, const moe_cpu_isa **out, moe_error *err);
