#include "common/digest.h"

#include <openssl/evp.h>
#include <string.h>

#include "common/status.h"

static uint32_t crc32c_bitwise(uint32_t crc, const uint8_t *p, size_t size) {
    for (; size; size--, p++) {
        crc ^= *p;
        for (int bit = 0; bit < 8; bit++) crc = (crc >> 1) ^ (0x82f63b78u & (0u - (crc & 1)));
    }
    return crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) static uint32_t crc32c_sse42(uint32_t crc, const uint8_t *p, size_t size) {
    uint64_t wide = crc;
    for (; size >= 8; size -= 8, p += 8) {
        uint64_t word;
        memcpy(&word, p, sizeof word);
        wide = __builtin_ia32_crc32di(wide, word);
    }
    crc = (uint32_t)wide;
    for (; size; size--, p++) crc = __builtin_ia32_crc32qi(crc, *p);
    return crc;
}
#endif

uint32_t moe_crc32c(uint32_t crc, const void *data, size_t size) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("sse4.2")) return ~crc32c_sse42(~crc, data, size);
#endif
    return ~crc32c_bitwise(~crc, data, size);
}

moe_sha256 *moe_sha256_new(void) {
    EVP_MD_CTX *ctx = EVP_MD_CTX_new();
    if (ctx && EVP_DigestInit_ex(ctx, EVP_sha256(), NULL) != 1) {
        EVP_MD_CTX_free(ctx);
        ctx = NULL;
    }
    return (moe_sha256 *)ctx;
}

void moe_sha256_update(moe_sha256 *sha, const void *data, size_t size) {
    MOE_ASSERT(EVP_DigestUpdate((EVP_MD_CTX *)sha, data, size) == 1);
}

void moe_sha256_finish(moe_sha256 **sha, uint8_t digest[MOE_SHA256_BYTES]) {
    MOE_ASSERT(EVP_DigestFinal_ex((EVP_MD_CTX *)*sha, digest, NULL) == 1);
    EVP_MD_CTX_free((EVP_MD_CTX *)*sha);
    *sha = NULL;
}

uint64_t moe_sha256_short(const uint8_t digest[MOE_SHA256_BYTES]) {
    uint64_t value = 0;
    for (int i = 0; i < 8; i++) value = value << 8 | digest[i];
    return value;
}
