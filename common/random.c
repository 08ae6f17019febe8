#include "common/random.h"

#include <stdio.h>
#include <sys/random.h>

#include "common/status.h"

uint64_t moe_random_identity(void) {
    uint64_t value = 0;
    while (value == 0) MOE_ASSERT(getrandom(&value, sizeof value, 0) == sizeof value);
    return value;
}

void moe_uuid_make(char uuid[MOE_UUID_BYTES]) {
    uint64_t a = moe_random_identity(), b = moe_random_identity();
    snprintf(uuid, MOE_UUID_BYTES, "%08x-%04x-4%03x-%04x-%012llx", (unsigned)(a >> 32), (unsigned)(a >> 16) & 0xffff,
             (unsigned)a & 0xfff, ((unsigned)(b >> 48) & 0x3fff) | 0x8000, (unsigned long long)b & 0xffffffffffffULL);
}
