// hash.c - see hash.h.
#if defined(_WIN32)
#define _CRT_RAND_S
#elif defined(__linux__)
#define _GNU_SOURCE
#endif
#include "hash.h"

#include "thread.h"

#include <stdlib.h>
#if !defined(_WIN32)
#include <sys/random.h>
#endif

static bool random_bytes(void * out, size_t size) {
#if defined(_WIN32)
    for (size_t i = 0; i < size / sizeof(unsigned); i++) {
        if (rand_s((unsigned *) out + i)) return false;
    }
    return true;
#elif defined(__linux__)
    return getrandom(out, size, GRND_NONBLOCK) == (ssize_t) size;
#else
    return getentropy(out, size) == 0;
#endif
}

hash_key hash_key_new(void) {
    hash_key key;
    if (random_bytes(&key, sizeof key)) return key;
    // What a writer of files does not know either: when, and where in memory.
    const hash_key fixed = { (uint64_t) thread_now_us(), (uint64_t) (uintptr_t) &key };
    return (hash_key) { siphash(fixed, "0", 1, 2, 4), siphash(fixed, "1", 1, 2, 4) };
}

static inline uint64_t rotate(uint64_t x, int n) { return x << n | x >> (64 - n); }

static inline void rounds(uint64_t v[4], int n) {
    for (int i = 0; i < n; i++) {
        v[0] += v[1], v[2] += v[3];
        v[1] = rotate(v[1], 13) ^ v[0], v[3] = rotate(v[3], 16) ^ v[2];
        v[0] = rotate(v[0], 32);
        v[2] += v[1], v[0] += v[3];
        v[1] = rotate(v[1], 17) ^ v[2], v[3] = rotate(v[3], 21) ^ v[0];
        v[2] = rotate(v[2], 32);
    }
}

static inline uint64_t little_endian(const uint8_t * p, size_t n) {
    uint64_t x = 0;
    for (size_t i = 0; i < n; i++) x |= (uint64_t) p[i] << 8 * i;
    return x;
}

static inline uint64_t sip(hash_key key, const uint8_t * p, size_t size, int c, int d) {
    uint64_t v[4] = { key.k0 ^ 0x736F6D6570736575u, key.k1 ^ 0x646F72616E646F6Du,
                      key.k0 ^ 0x6C7967656E657261u, key.k1 ^ 0x7465646279746573u };
    for (size_t i = 0; i <= size / 8; i++) { // the last word has what is left, and the size
        const bool last = i == size / 8;
        const uint64_t m =
            last ? little_endian(p + 8 * i, size % 8) | (uint64_t) size << 56 : little_endian(p + 8 * i, 8);
        v[3] ^= m;
        rounds(v, c);
        v[0] ^= m;
    }
    v[2] ^= 0xFF;
    rounds(v, d);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}

uint64_t siphash(hash_key key, const void * data, size_t size, int c, int d) {
    return sip(key, data, size, c, d);
}

uint64_t hash_bytes(hash_key key, const void * data, size_t size) { return sip(key, data, size, 1, 3); }
