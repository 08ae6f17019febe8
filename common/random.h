/* Randomness: seeded streams (simulation, sampling, placement) and identities (incarnations, uuids). */
#pragma once
#include <stdint.h>

/* SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64 bits, used as a counter-based generator. */
static inline uint64_t moe_mix64(uint64_t x) {
    x += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

typedef struct moe_random {
    uint64_t state;
} moe_random;

static inline uint64_t moe_random_next(moe_random *random) {
    uint64_t value = moe_mix64(random->state);
    random->state += UINT64_C(0x9e3779b97f4a7c15);
    return value;
}

/* Uniform in [0, bound); bound > 0. The bias is below 2^-32 for the bounds used here. */
static inline uint64_t moe_random_below(moe_random *random, uint64_t bound) { return moe_random_next(random) % bound; }

/* Uniform in [0, 1) with 53 bits. */
static inline double moe_random_unit(moe_random *random) { return (double)(moe_random_next(random) >> 11) * 0x1.0p-53; }

/* 64 bits from the kernel, never 0. */
uint64_t moe_random_identity(void);

#define MOE_UUID_BYTES 37 /* 36 characters and NUL */
void moe_uuid_make(char uuid[MOE_UUID_BYTES]);
