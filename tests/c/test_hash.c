// test_hash.c - SipHash against the values of its paper (2-4, appendix A) and of CPython's own (1-3, key 0).
#include "hash.h"

#include <stdio.h>
#include <string.h>

static int n_wrong;

static void check(const char * what, uint64_t found, uint64_t need) {
    if (found == need) return;
    printf("hash: %s: found %016llx, need %016llx\n", what, (unsigned long long) found,
           (unsigned long long) need);
    n_wrong++;
}

int main(void) {
    uint8_t bytes[64];
    for (int i = 0; i < 64; i++) bytes[i] = (uint8_t) i;
    const hash_key zero = { 0, 0 }, counting = { 0x0706050403020100u, 0x0F0E0D0C0B0A0908u };
    check("2-4", siphash(counting, bytes, 15, 2, 4), 0xA129CA6149BE45E5u);
    check("1-3 of a", hash_bytes(zero, "a", 1), 0x407448D2B89B1813u);
    check("1-3 of a word", hash_bytes(zero, "12345678", 8), 0x3489982430560A87u);
    check("1-3 of 15 bytes", hash_bytes(zero, bytes, 15), 0xF30EB725BB91C9EAu);
    for (size_t n = 0; n < 63; n++) {
        const uint64_t at_once = hash_bytes(counting, bytes, n);
        check("again", hash_bytes(counting, bytes, n), at_once);
        n_wrong += hash_bytes(counting, bytes, n + 1) == at_once || hash_bytes(zero, bytes, n) == at_once;
    }
    const hash_key a = hash_key_new(), b = hash_key_new();
    n_wrong += a.k0 == b.k0 || a.k1 == b.k1 || !memcmp(&a, &zero, sizeof a);
    printf("hash: %d failed\n", n_wrong);
    return n_wrong != 0;
}
