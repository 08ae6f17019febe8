#include "common/digest.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
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
#define LANE_BYTES 512

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

/* The CRC of what `crc` covers and n zero bits behind it: times x^n. `power` is x^(n - 33) modulo the polynomial, bits reversed; the
 * product of two reversed 32-bit values is one bit short of 64, and the instruction multiplies by x^32. */
__attribute__((target("sse4.2,pclmul"))) static uint64_t crc32c_shift(uint64_t crc, uint32_t power) {
    __m128i product = _mm_clmulepi64_si128(_mm_cvtsi64_si128((long long)crc), _mm_cvtsi32_si128((int)power), 0);
    return __builtin_ia32_crc32di(0, (uint64_t)_mm_cvtsi128_si64(product));
}

/* Three lanes side by side, since an instruction takes three cycles and one can begin in each; then their CRCs become one. */
__attribute__((target("sse4.2,pclmul"))) static uint32_t crc32c_lanes(uint32_t crc, const uint8_t *p, size_t size) {
    for (; size >= 3 * LANE_BYTES; size -= 3 * LANE_BYTES, p += 3 * LANE_BYTES) {
        uint64_t a = crc, b = 0, c = 0;
        for (size_t i = 0; i < LANE_BYTES; i += 8) {
            uint64_t word[3];
            for (size_t lane = 0; lane < 3; lane++) memcpy(&word[lane], p + lane * LANE_BYTES + i, sizeof word[lane]);
            a = __builtin_ia32_crc32di(a, word[0]);
            b = __builtin_ia32_crc32di(b, word[1]);
            c = __builtin_ia32_crc32di(c, word[2]);
        }
        crc = (uint32_t)(crc32c_shift(a, 0x170076fa) ^ crc32c_shift(b, 0xdd7e3b0c) ^ c); /* 2 and 1 lanes of 512 bytes */
    }
    return crc32c_sse42(crc, p, size);
}
#endif

uint32_t moe_crc32c(uint32_t crc, const void *data, size_t size) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul")) return ~crc32c_lanes(~crc, data, size);
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
