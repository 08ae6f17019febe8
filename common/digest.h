/* Checksums: CRC32C for the wire (against accidents), SHA-256 for weights (identity). */
#pragma once
#include <stddef.h>
#include <stdint.h>

/* CRC-32C (Castagnoli, RFC 3720) of data continued from `crc`; start with 0. SSE4.2 where the CPU has it. */
uint32_t moe_crc32c(uint32_t crc, const void *data, size_t size);

#define MOE_SHA256_BYTES 32
typedef struct moe_sha256 moe_sha256;
moe_sha256 *moe_sha256_new(void); /* NULL when out of memory */
void moe_sha256_update(moe_sha256 *sha, const void *data, size_t size);
/* Writes the digest and frees *sha; the pointer is set to NULL. */
void moe_sha256_finish(moe_sha256 **sha, uint8_t digest[MOE_SHA256_BYTES]);

/* The first 8 bytes of a digest, read big-endian: the short form on the wire and in JSON (16 hex digits). */
uint64_t moe_sha256_short(const uint8_t digest[MOE_SHA256_BYTES]);
