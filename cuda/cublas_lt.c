#include "cuda/cublas_lt.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
#define LIBRARY "libcublasLt.so." TEXT(CUBLAS_VER_MAJOR)

static moe_cublas_lt functions;
static char failure[256]; /* "" once all functions are there */
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void load(void) {
    void *library = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
    if (!library) library = dlopen(MOE_CUDA_LIBRARY_DIR "/" LIBRARY, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        snprintf(failure, sizeof failure, "%s", dlerror());
        return;
    }
#define GET(name)                                                \
    void *found_##name = dlsym(library, #name);                  \
    memcpy(&functions.name, &found_##name, sizeof found_##name); \
    if (!found_##name) snprintf(failure, sizeof failure, "%s has no " #name, LIBRARY);
    MOE_CUBLAS_LT_FUNCTIONS(GET)
#undef GET
}

moe_status moe_cublas_lt_load(const moe_cublas_lt **out, moe_error *err) {
    pthread_once(&once, load);
    *out = failure[0] ? NULL : &functions;
    return *out ? MOE_OK : moe_fail(err, MOE_UNAVAILABLE, "cuBLASLt cannot be loaded: %s", failure);
}
