// One connection's TLS over bytes in memory, or writing to a socket itself where the kernel may encrypt.
#include "context.h"

#include <arpa/inet.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

// ---- the BIO between OpenSSL and a session's memory ----

static int read_input(BIO *bio, char *bytes, int count) {
    dg_tls *tls = openssl.BIO_get_data(bio);
    openssl.BIO_clear_flags(bio, BIO_FLAGS_RWS | BIO_FLAGS_SHOULD_RETRY);
    size_t have = tls->input_end - tls->input_start;
    if (have == 0) {
        openssl.BIO_set_flags(bio, BIO_FLAGS_READ | BIO_FLAGS_SHOULD_RETRY);
        return -1;
    }
    size_t now = have < (size_t)count ? have : (size_t)count;
    memcpy(bytes, tls->input + tls->input_start, now);
    tls->input_start += now;
    return (int)now;
}

static int write_output(BIO *bio, const char *bytes, int count) {
    dg_tls *tls = openssl.BIO_get_data(bio);
    openssl.BIO_clear_flags(bio, BIO_FLAGS_RWS | BIO_FLAGS_SHOULD_RETRY);
    // The sealer has the key now. Nothing that OpenSSL encrypts with it may leave: it would repeat a nonce.
    if (tls->sealer) {
        tls->wants_to_write = true;
        return count;
    }
    size_t room = OUTPUT_SIZE - tls->output_end;
    if (room == 0) {
        openssl.BIO_set_flags(bio, BIO_FLAGS_WRITE | BIO_FLAGS_SHOULD_RETRY);
        return -1;
    }
    size_t now = room < (size_t)count ? room : (size_t)count;
    memcpy(tls->output + tls->output_end, bytes, now);
    tls->output_end += now;
    return (int)now;
}

static long control(BIO *bio, int command, long number, void *pointer) {
    (void)bio, (void)number, (void)pointer;
    return command == BIO_CTRL_FLUSH;
}

static int create(BIO *bio) {
    openssl.BIO_set_init(bio, 1);
    return 1;
}

static BIO_METHOD *method;

static void make_method(void) {
    BIO_METHOD *made = openssl.BIO_meth_new(BIO_TYPE_SOURCE_SINK | 100, "diskgate");
    if (!made) return;
    openssl.BIO_meth_set_read(made, read_input);
    openssl.BIO_meth_set_write(made, write_output);
    openssl.BIO_meth_set_ctrl(made, control);
    openssl.BIO_meth_set_create(made, create);
    method = made;
}

// ---- sessions ----

static bool set_host(dg_tls *tls, const char *host, bool checks_host) {
    unsigned char address[16];
    bool is_address = inet_pton(AF_INET, host, address) == 1 || inet_pton(AF_INET6, host, address) == 1;
    if (!is_address && openssl.SSL_ctrl(
                           tls->ssl, SSL_CTRL_SET_TLSEXT_HOSTNAME, TLSEXT_NAMETYPE_host_name, (void *)host) != 1)
        return false;
    if (!checks_host) return true;
    X509_VERIFY_PARAM *parameters = openssl.SSL_get0_param(tls->ssl);
    if (is_address) return openssl.X509_VERIFY_PARAM_set1_ip_asc(parameters, host) == 1;
    openssl.X509_VERIFY_PARAM_set_hostflags(parameters, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
    return openssl.X509_VERIFY_PARAM_set1_host(parameters, host, 0) == 1;
}

dg_tls *dg_tls_create(dg_tls_context *context, const char *host, bool checks_host) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, make_method);
    openssl.ERR_clear_error();
    dg_tls *tls = calloc(1, sizeof *tls);
    if (!tls) return NULL;
    tls->context = context;
    dg_tls_context_retain(context);
    tls->input = malloc(INPUT_SIZE);
    tls->output = malloc(OUTPUT_SIZE);
    tls->ssl = openssl.SSL_new(context->ssl);
    tls->memory = method ? openssl.BIO_new(method) : NULL;
    if (!tls->input || !tls->output || !tls->ssl || !tls->memory) {
        openssl.BIO_free(tls->memory);
        tls->memory = NULL;
        dg_tls_free(tls);
        return NULL;
    }
    openssl.BIO_set_data(tls->memory, tls);
    openssl.SSL_set_bio(tls->ssl, tls->memory, tls->memory);
    openssl.SSL_set_ex_data(tls->ssl, 0, tls);
    if (host && !set_host(tls, host, checks_host)) {
        dg_tls_free(tls);
        return NULL;
    }
    if (context->is_server) {
        openssl.SSL_set_accept_state(tls->ssl);
    } else {
        openssl.SSL_set_connect_state(tls->ssl);
    }
    return tls;
}

void dg_tls_free(dg_tls *tls) {
    // The BIO goes with the last of its two uses, which is the session's.
    openssl.SSL_free(tls->ssl);
    dg_sealer_free(tls->sealer);
    openssl.OPENSSL_cleanse(tls->secret, sizeof tls->secret);
    dg_tls_context_release(tls->context);
    free(tls->input);
    if (tls->output) openssl.OPENSSL_cleanse(tls->output, tls->output_end);
    free(tls->output);
    free(tls);
}

bool dg_tls_offer_kernel(dg_tls *tls, int socket) {
    BIO *bio = openssl.BIO_new_socket(socket, BIO_NOCLOSE);
    if (!bio) return false;
    openssl.SSL_set_options(tls->ssl, SSL_OP_ENABLE_KTLS);
    openssl.SSL_set0_wbio(tls->ssl, bio);
    return true;
}

bool dg_tls_kernel_sends(dg_tls *tls) {
    if (openssl.BIO_ctrl(openssl.SSL_get_wbio(tls->ssl), BIO_CTRL_GET_KTLS_SEND, 0, NULL) > 0) {
        openssl.OPENSSL_cleanse(tls->secret, sizeof tls->secret);
        tls->secret_count = 0;
        return true;
    }
    openssl.BIO_up_ref(tls->memory);
    openssl.SSL_set0_wbio(tls->ssl, tls->memory);
    return false;
}

bool dg_tls_seal_fast(dg_tls *tls) {
    const SSL_CIPHER *cipher = openssl.SSL_get_current_cipher(tls->ssl);
    int nid = openssl.SSL_CIPHER_get_cipher_nid(cipher);
    size_t key_count = nid == NID_aes_128_gcm ? 16 : nid == NID_aes_256_gcm ? 32 : 0;
    // A client that asked for short records gets them from OpenSSL.
    bool fits = openssl.SSL_version(tls->ssl) == TLS1_3_VERSION && key_count > 0 && tls->secret_count > 0 &&
                openssl.SSL_SESSION_get_max_fragment_length(openssl.SSL_get_session(tls->ssl)) == 0;
    if (fits) tls->sealer = dg_sealer_create(tls->secret, tls->secret_count, key_count);
    openssl.OPENSSL_cleanse(tls->secret, sizeof tls->secret);
    tls->secret_count = 0;
    return tls->sealer != NULL;
}

// A record of the sealer's, if there is room for it.
static bool seal(dg_tls *tls, uint8_t type, const void *content, size_t count) {
    if (tls->is_dead || OUTPUT_SIZE - tls->output_end < count + SEALER_OVERHEAD) return false;
    dg_sealer_seal(tls->sealer, type, content, count, tls->output + tls->output_end);
    tls->output_end += count + SEALER_OVERHEAD;
    return true;
}

// KeyUpdate (RFC 8446, 4.6.3) without asking the peer for one.
static bool renew_key(dg_tls *tls) {
    static const uint8_t key_update[] = {24, 0, 0, 1, 0};
    if (!seal(tls, 22, key_update, sizeof key_update)) return false;
    tls->is_dead = !dg_sealer_renew(tls->sealer);
    return !tls->is_dead;
}

static dg_tls_result seal_all(dg_tls *tls, const uint8_t *bytes, size_t count, size_t *done) {
    *done = 0;
    while (*done < count) {
        if (dg_sealer_is_worn(tls->sealer) && !renew_key(tls)) break;
        size_t now = count - *done < SEALER_CONTENT_MAX ? count - *done : SEALER_CONTENT_MAX;
        if (!seal(tls, 23, bytes + *done, now)) break;
        *done += now;
    }
    if (tls->is_dead) return DG_TLS_FAILED;
    return *done > 0 || count == 0 ? DG_TLS_DONE : DG_TLS_WANTS_OUTPUT_SENT;
}

const uint8_t *dg_tls_output(dg_tls *tls, size_t *count) {
    *count = tls->output_end - tls->output_start;
    return tls->output + tls->output_start;
}

void dg_tls_output_sent(dg_tls *tls, size_t count) {
    tls->output_start += count;
    if (tls->output_start >= tls->output_end) tls->output_start = tls->output_end = 0;
}

uint8_t *dg_tls_input(dg_tls *tls, size_t *room) {
    if (tls->input_start == tls->input_end) {
        tls->input_start = tls->input_end = 0;
    } else if (tls->input_end == INPUT_SIZE && tls->input_start > 0) {
        memmove(tls->input, tls->input + tls->input_start, tls->input_end - tls->input_start);
        tls->input_end -= tls->input_start;
        tls->input_start = 0;
    }
    *room = INPUT_SIZE - tls->input_end;
    return tls->input + tls->input_end;
}

void dg_tls_input_received(dg_tls *tls, size_t count) { tls->input_end += count; }

static dg_tls_result result_of(dg_tls *tls, int returned) {
    switch (openssl.SSL_get_error(tls->ssl, returned)) {
    case SSL_ERROR_WANT_READ: return DG_TLS_WANTS_INPUT;
    case SSL_ERROR_WANT_WRITE: return DG_TLS_WANTS_OUTPUT_SENT;
    case SSL_ERROR_ZERO_RETURN: return DG_TLS_CLOSED;
    default: return DG_TLS_FAILED;
    }
}

dg_tls_result dg_tls_handshake(dg_tls *tls) {
    openssl.ERR_clear_error();
    int returned = openssl.SSL_do_handshake(tls->ssl);
    return returned == 1 ? DG_TLS_DONE : result_of(tls, returned);
}

dg_tls_result dg_tls_read(dg_tls *tls, void *bytes, size_t count, size_t *done) {
    openssl.ERR_clear_error();
    *done = 0;
    int returned = openssl.SSL_read_ex(tls->ssl, bytes, count, done);
    if (tls->wants_to_write) {
        tls->wants_to_write = false;
        // It is either an alert about what it has read, or the peer has asked for a new key.
        bool goes_on = returned == 1 || openssl.SSL_get_error(tls->ssl, returned) == SSL_ERROR_WANT_READ;
        static const uint8_t alert[] = {2, 80};
        if (goes_on && !renew_key(tls)) return DG_TLS_FAILED;
        if (!goes_on) seal(tls, 21, alert, sizeof alert);
    }
    return returned == 1 ? DG_TLS_DONE : result_of(tls, returned);
}

dg_tls_result dg_tls_write(dg_tls *tls, const void *bytes, size_t count, size_t *done) {
    if (tls->sealer) return seal_all(tls, bytes, count, done);
    openssl.ERR_clear_error();
    *done = 0;
    // OpenSSL does not renew keys by itself (RFC 8446, 5.5: at most 2^24.5 records with one).
    if (tls->records >= 1 << 24 && openssl.SSL_version(tls->ssl) == TLS1_3_VERSION) {
        openssl.SSL_key_update(tls->ssl, SSL_KEY_UPDATE_NOT_REQUESTED);
        tls->records = 0;
    }
    int returned = openssl.SSL_write_ex(tls->ssl, bytes, count, done);
    tls->records += *done / 16384 + 1;
    return returned == 1 ? DG_TLS_DONE : result_of(tls, returned);
}

void dg_tls_close(dg_tls *tls) {
    static const uint8_t close_notify[] = {1, 0};
    if (tls->sealer) {
        seal(tls, 21, close_notify, sizeof close_notify);
        return;
    }
    openssl.SSL_shutdown(tls->ssl);
    openssl.ERR_clear_error();
}

// ---- what the handshake agreed on ----

const char *dg_tls_version(dg_tls *tls) { return openssl.SSL_get_version(tls->ssl); }

const char *dg_tls_cipher(dg_tls *tls) {
    return openssl.SSL_CIPHER_get_name(openssl.SSL_get_current_cipher(tls->ssl));
}

bool dg_tls_used_psk(dg_tls *tls) {
    // There is no resumption here, so a TLS 1.3 session that was "reused" is one with an external key.
    if (openssl.SSL_version(tls->ssl) >= TLS1_3_VERSION) return openssl.SSL_session_reused(tls->ssl) == 1;
    return openssl.SSL_CIPHER_get_auth_nid(openssl.SSL_get_current_cipher(tls->ssl)) == NID_auth_psk;
}

size_t dg_tls_psk_identity(dg_tls *tls, void *bytes, size_t size) {
    size_t count = tls->psk_identity_count < size ? tls->psk_identity_count : size;
    memcpy(bytes, tls->psk_identity, count);
    return count;
}

bool dg_tls_psk_was_unknown(dg_tls *tls) { return tls->psk_was_unknown; }

const char *dg_tls_server_name(dg_tls *tls) {
    return openssl.SSL_get_servername(tls->ssl, TLSEXT_NAMETYPE_host_name);
}

const char *dg_tls_verify_error(dg_tls *tls, int *code) {
    long result = openssl.SSL_get_verify_result(tls->ssl);
    *code = (int)result;
    return result == X509_V_OK ? NULL : openssl.X509_verify_cert_error_string(result);
}
