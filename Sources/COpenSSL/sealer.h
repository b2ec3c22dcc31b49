// Encrypts TLS 1.3 records with Intel's library where processor and system have it: three times as fast as OpenSSL 3.0,
// which does not use the vector instructions for AES (OpenSSL 3.1 and later do).
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// The longest secret: HMAC-SHA-384's.
#define SECRET_MAX 48

typedef struct dg_sealer dg_sealer;

// Whether records can be sealed here. The first call looks for the library and tries it on a known answer.
bool dg_sealer_is_available(void);
// A sealer for AES-GCM with a key of 16 or 32 bytes, from a traffic secret (RFC 8446, 7.1); NULL when that fails.
dg_sealer *dg_sealer_create(const uint8_t *secret, size_t secret_count, size_t key_count);
void dg_sealer_free(dg_sealer *sealer);
// The bytes that a record has besides its content.
#define SEALER_OVERHEAD 22
#define SEALER_CONTENT_MAX 16384
// Writes a record with content of a type, `count` + SEALER_OVERHEAD bytes.
void dg_sealer_seal(dg_sealer *sealer, uint8_t type, const uint8_t *content, size_t count, uint8_t *record);
// Whether the key has been used for as many records as it may (RFC 8446, 5.5).
bool dg_sealer_is_worn(const dg_sealer *sealer);
// Goes on with the next secret, after a record that says so was sealed; false when that fails.
bool dg_sealer_renew(dg_sealer *sealer);
