// TLS and certificates by OpenSSL 3, loaded when the first of it is used: a server without TLS does not pay for it.
// Sessions work on memory: the caller moves ciphertext between them and its socket. Policy is the caller's; nothing here
// decides what is acceptable.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

// Loads the library; NULL, or why it cannot be loaded.
const char *dg_tls_load(void);
// The library's version, for example "OpenSSL 3.0.15 3 Sep 2024".
const char *dg_tls_library_version(void);
// Takes the oldest reason out of this thread's queue of errors; false when there is none.
bool dg_tls_take_error(char *text, size_t size);
// Whether the processor has instructions for AES.
bool dg_cpu_has_aes(void);
// Whether the kernel knows TLS sockets (kTLS).
bool dg_kernel_has_tls(void);

// ---- contexts: what sessions have in common ----

typedef struct dg_tls_context dg_tls_context;

// Without session tickets, resumption, renegotiation and compression. NULL when out of memory.
dg_tls_context *dg_tls_context_create(bool is_server);
void dg_tls_context_retain(dg_tls_context *context);
void dg_tls_context_release(dg_tls_context *context);
bool dg_tls_context_set_ciphers(dg_tls_context *context, const char *tls12, const char *tls13);
// A certificate with its chain, and its key, in PEM.
bool dg_tls_context_set_certificate(
    dg_tls_context *context, const void *chain, size_t chain_count, const void *key, size_t key_count);
// Certificates in PEM that are trusted; their number, or -1.
int dg_tls_context_add_authorities(dg_tls_context *context, const void *pem, size_t count);
// Revocation lists in PEM, which are then demanded for the peer's certificate and, where there are any, for its issuers;
// their number, or -1.
int dg_tls_context_add_revocations(dg_tls_context *context, const void *pem, size_t count);
// Trusts what the system trusts.
bool dg_tls_context_add_system_authorities(dg_tls_context *context);

typedef enum { DG_TLS_VERIFY_NONE, DG_TLS_VERIFY_OPTIONAL, DG_TLS_VERIFY_REQUIRED } dg_tls_verify;
void dg_tls_context_set_verify(dg_tls_context *context, dg_tls_verify verify);
// A pre-shared key: all that a server accepts, or the one that a client uses.
bool dg_tls_context_add_psk(
    dg_tls_context *context, const void *identity, size_t identity_count, const void *key, size_t key_count);
// Another context for clients that ask for a name its certificate has (SNI).
bool dg_tls_context_add_alternative(dg_tls_context *context, dg_tls_context *other);

// ---- sessions: one connection each, used by one thread at a time ----

typedef struct dg_tls dg_tls;

// A session. `host` (may be NULL) is what the client asks for (SNI, unless it is an address) and, if `checks_host`, what
// the server's certificate must be for.
dg_tls *dg_tls_create(dg_tls_context *context, const char *host, bool checks_host);
void dg_tls_free(dg_tls *session);
// Has the session write to a socket itself, so that the kernel can encrypt (kTLS). Before the handshake.
bool dg_tls_offer_kernel(dg_tls *session, int socket);
// After the handshake: whether the kernel encrypts, so that what is sent on the socket is sent encrypted. If not, output
// is left in memory again from now on.
bool dg_tls_kernel_sends(dg_tls *session);

// After the handshake: has records encrypted by a faster library than OpenSSL where there is one and the session fits it
// (TLS 1.3 with AES-GCM). Whether it does.
bool dg_tls_seal_fast(dg_tls *session);

// Ciphertext that has to be sent, and that it was.
const uint8_t *dg_tls_output(dg_tls *session, size_t *count);
void dg_tls_output_sent(dg_tls *session, size_t count);
// Where to receive ciphertext (room is 0 while the session has not taken what it has), and that it was received.
uint8_t *dg_tls_input(dg_tls *session, size_t *room);
void dg_tls_input_received(dg_tls *session, size_t count);

typedef enum {
    DG_TLS_DONE,
    DG_TLS_WANTS_INPUT,
    DG_TLS_WANTS_OUTPUT_SENT,
    DG_TLS_CLOSED,
    DG_TLS_FAILED,
} dg_tls_result;

dg_tls_result dg_tls_handshake(dg_tls *session);
dg_tls_result dg_tls_read(dg_tls *session, void *bytes, size_t count, size_t *done);
dg_tls_result dg_tls_write(dg_tls *session, const void *bytes, size_t count, size_t *done);
// Tells the peer that nothing follows.
void dg_tls_close(dg_tls *session);

// After the handshake.
const char *dg_tls_version(dg_tls *session);
const char *dg_tls_cipher(dg_tls *session);
// Whether a pre-shared key was used, and by whom; the identity's bytes, 0 if it is not known.
bool dg_tls_used_psk(dg_tls *session);
size_t dg_tls_psk_identity(dg_tls *session, void *bytes, size_t size);
// A client's identity that no key was found for.
bool dg_tls_psk_was_unknown(dg_tls *session);
// The name that the client asked for, or NULL.
const char *dg_tls_server_name(dg_tls *session);
// Why the peer's certificate was refused; NULL if it was not.
const char *dg_tls_verify_error(dg_tls *session, int *code);

// ---- certificates of the peer ----

typedef enum {
    DG_CERT_SUBJECT,    // RFC 2253
    DG_CERT_ISSUER,     // RFC 2253
    DG_CERT_SERIAL,     // hexadecimal
    DG_CERT_NOT_BEFORE, // YYYY-MM-DD HH:MM:SSZ
    DG_CERT_NOT_AFTER,
    DG_CERT_SHA1,       // 20 bytes
    DG_CERT_SHA256,     // 32 bytes
    DG_CERT_PEM,
    DG_CERT_COMMON_NAME,
} dg_cert_field;

typedef enum { DG_NAME_DNS = 1, DG_NAME_IP, DG_NAME_EMAIL, DG_NAME_URI } dg_name_kind;

// The number of certificates that the peer sent, its own first.
int dg_tls_peer_certificates(dg_tls *session);
// A field; its length, or -1 where there is none or it is longer than `size`. No zero byte is added.
ssize_t dg_tls_peer_field(dg_tls *session, int index, dg_cert_field field, void *bytes, size_t size);
// The nth alternative name of the peer's own certificate; its length, -1 when there are no more, 0 for one of a kind that
// is not known here. An IP address has 4 or 16 bytes.
ssize_t dg_tls_peer_name(dg_tls *session, int index, dg_name_kind *kind, void *bytes, size_t size);
// Whether a certificate in PEM is valid for a host name or address.
bool dg_certificate_is_for(const void *pem, size_t count, const char *host);
