// What the parts of this target share.
#pragma once

#include <stdatomic.h>

#include "COpenSSL.h"
#include "library.h"
#include "sealer.h"

typedef struct dg_psk {
    struct dg_psk *next;
    unsigned char *identity;
    size_t identity_count;
    unsigned char *key;
    size_t key_count;
} dg_psk;

struct dg_tls_context {
    SSL_CTX *ssl;
    atomic_int references;
    bool is_server;
    dg_psk *psks;
    dg_tls_context **alternatives;
    size_t alternative_count;
};

// Room for what is received at once: a few records, or a thousand requests.
#define INPUT_SIZE 65536
// Room for what is sent at once. Twice as much, or half as much, was slower: it has to fit the L2 cache beside the data.
#define OUTPUT_SIZE (132 * 1024)

struct dg_tls {
    SSL *ssl;
    dg_tls_context *context;
    uint8_t *input;
    size_t input_start, input_end;
    uint8_t *output;
    size_t output_start, output_end;
    BIO *memory;  // ours while the session writes to a socket itself
    uint8_t psk_identity[256];
    size_t psk_identity_count;
    bool psk_was_unknown;
    uint8_t secret[SECRET_MAX];  // that of what this side sends, until the sealer has it
    size_t secret_count;
    dg_sealer *sealer;           // encrypts what is sent in OpenSSL's place
    bool wants_to_write;         // OpenSSL would have sent something, which is dropped
    bool is_dead;                // no key to send with is left
    uint64_t records;            // sent by OpenSSL with the present key, about
};
