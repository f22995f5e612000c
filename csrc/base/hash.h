// hash.h - a keyed hash for tables of what others have written: SipHash (Aumasson and Bernstein, "SipHash: a
// fast short-input PRF", 2012). Who does not know the key cannot choose texts that fall into one place.
#pragma once

#include <stddef.h>
#include <stdint.h>

typedef struct hash_key {
    uint64_t k0, k1;
} hash_key;

hash_key hash_key_new(void); // random: one for each table
// SipHash-1-3: one round for each 8 bytes, three at the end.
uint64_t hash_bytes(hash_key key, const void * data, size_t size);
// SipHash-c-d.
uint64_t siphash(hash_key key, const void * data, size_t size, int c, int d);
