// What sessions have in common: certificates, trusted authorities, pre-shared keys.
#include "context.h"

#include <stdlib.h>
#include <string.h>

static const unsigned char session_id_context[] = "diskgate";

// A missing revocation list is tolerated for issuers only: whoever gives one list gives that of the peers' issuer.
static int verified(int ok, X509_STORE_CTX *store) {
    if (!ok && openssl.X509_STORE_CTX_get_error(store) == X509_V_ERR_UNABLE_TO_GET_CRL &&
        openssl.X509_STORE_CTX_get_error_depth(store) > 0) {
        openssl.X509_STORE_CTX_set_error(store, X509_V_OK);
        return 1;
    }
    return ok;
}

static const dg_psk *find_psk(dg_tls_context *context, const void *identity, size_t count) {
    for (dg_psk *psk = context->psks; psk; psk = psk->next)
        if (psk->identity_count == count && memcmp(psk->identity, identity, count) == 0) return psk;
    return NULL;
}

// A session as TLS 1.3 wants external keys; their hash is SHA-256 (RFC 8446, 4.2.11), which AES-128-GCM goes with.
static SSL_SESSION *session_of(SSL *ssl, const dg_psk *psk) {
    static const unsigned char aes_128_gcm_sha256[] = {0x13, 0x01};
    const SSL_CIPHER *cipher = openssl.SSL_CIPHER_find(ssl, aes_128_gcm_sha256);
    SSL_SESSION *session = openssl.SSL_SESSION_new();
    if (!session || !cipher || !openssl.SSL_SESSION_set1_master_key(session, psk->key, psk->key_count) ||
        !openssl.SSL_SESSION_set_cipher(session, cipher) ||
        !openssl.SSL_SESSION_set_protocol_version(session, TLS1_3_VERSION)) {
        openssl.SSL_SESSION_free(session);
        return NULL;
    }
    return session;
}

static void note_identity(dg_tls *tls, const void *identity, size_t count, bool is_known) {
    tls->psk_was_unknown = !is_known;
    tls->psk_identity_count = count < sizeof tls->psk_identity ? count : sizeof tls->psk_identity;
    memcpy(tls->psk_identity, identity, tls->psk_identity_count);
}

static int find_psk_session(SSL *ssl, const unsigned char *identity, size_t count, SSL_SESSION **session) {
    dg_tls *tls = openssl.SSL_get_ex_data(ssl, 0);
    const dg_psk *psk = find_psk(tls->context, identity, count);
    note_identity(tls, identity, count, psk != NULL);
    *session = NULL;
    if (!psk) return 1;
    *session = session_of(ssl, psk);
    return *session != NULL;
}

static unsigned find_psk_tls12(SSL *ssl, const char *identity, unsigned char *key, unsigned room) {
    dg_tls *tls = openssl.SSL_get_ex_data(ssl, 0);
    const dg_psk *psk = find_psk(tls->context, identity, strlen(identity));
    note_identity(tls, identity, strlen(identity), psk != NULL);
    if (!psk || psk->key_count > room) return 0;
    memcpy(key, psk->key, psk->key_count);
    return (unsigned)psk->key_count;
}

static int use_psk_session(
    SSL *ssl, const EVP_MD *hash, const unsigned char **identity, size_t *count, SSL_SESSION **session) {
    dg_tls *tls = openssl.SSL_get_ex_data(ssl, 0);
    const dg_psk *psk = tls->context->psks;
    *session = NULL;
    // Asked with another hash after a retry: then there is nothing to offer.
    if (!psk || (hash && !openssl.EVP_MD_is_a(hash, "SHA256"))) return 1;
    *session = session_of(ssl, psk);
    *identity = psk->identity;
    *count = psk->identity_count;
    return *session != NULL;
}

static unsigned use_psk_tls12(
    SSL *ssl, const char *hint, char *identity, unsigned identity_room, unsigned char *key, unsigned room) {
    (void)hint;
    dg_tls *tls = openssl.SSL_get_ex_data(ssl, 0);
    const dg_psk *psk = tls->context->psks;
    if (!psk || psk->key_count > room || psk->identity_count >= identity_room) return 0;
    memcpy(identity, psk->identity, psk->identity_count);
    identity[psk->identity_count] = 0;
    memcpy(key, psk->key, psk->key_count);
    return (unsigned)psk->key_count;
}

// Clients that ask for a name get the certificate that has it; everybody else the first.
static int choose_by_name(SSL *ssl, int *alert, void *argument) {
    (void)alert;
    dg_tls_context *context = argument;
    const char *name = openssl.SSL_get_servername(ssl, TLSEXT_NAMETYPE_host_name);
    if (!name) return SSL_TLSEXT_ERR_NOACK;
    X509 *own = openssl.SSL_CTX_get0_certificate(context->ssl);
    if (own && openssl.X509_check_host(own, name, 0, 0, NULL) == 1) return SSL_TLSEXT_ERR_OK;
    for (size_t i = 0; i < context->alternative_count; i++) {
        X509 *certificate = openssl.SSL_CTX_get0_certificate(context->alternatives[i]->ssl);
        if (certificate && openssl.X509_check_host(certificate, name, 0, 0, NULL) == 1) {
            openssl.SSL_set_SSL_CTX(ssl, context->alternatives[i]->ssl);
            return SSL_TLSEXT_ERR_OK;
        }
    }
    return SSL_TLSEXT_ERR_OK;
}

// Keeps the secret of what this side sends, for the sealer: "SERVER_TRAFFIC_SECRET_0 RANDOM SECRET" in hexadecimal, the
// format of key logs. It goes nowhere else.
static void keep_secret(const SSL *ssl, const char *line) {
    dg_tls *tls = openssl.SSL_get_ex_data(ssl, 0);
    const char *label = tls->context->is_server ? "SERVER_TRAFFIC_SECRET_0 " : "CLIENT_TRAFFIC_SECRET_0 ";
    const char *digits = strrchr(line, ' ');
    if (strncmp(line, label, strlen(label)) != 0 || !digits) return;
    size_t count = strlen(++digits) / 2;
    if (count > sizeof tls->secret) return;
    for (size_t i = 0; i < count; i++) {
        unsigned value = 0;
        for (int j = 0; j < 2; j++) {
            char digit = digits[2 * i + j] | 0x20;
            value = value << 4 | (unsigned)(digit > '9' ? digit - 'a' + 10 : digit - '0');
        }
        tls->secret[i] = (uint8_t)value;
    }
    tls->secret_count = count;
}

dg_tls_context *dg_tls_context_create(bool is_server) {
    openssl.ERR_clear_error();
    dg_tls_context *context = calloc(1, sizeof *context);
    SSL_CTX *ssl = openssl.SSL_CTX_new(openssl.TLS_method());
    if (!context || !ssl) {
        free(context);
        openssl.SSL_CTX_free(ssl);
        return NULL;
    }
    context->ssl = ssl;
    context->is_server = is_server;
    atomic_init(&context->references, 1);
    openssl.SSL_CTX_ctrl(ssl, SSL_CTRL_SET_MIN_PROTO_VERSION, TLS1_2_VERSION, NULL);
    openssl.SSL_CTX_set_options(
        ssl, SSL_OP_NO_TICKET | SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION |
                 (is_server ? SSL_OP_CIPHER_SERVER_PREFERENCE : 0));
    // Whoever gives an authority that is not its own issuer means it.
    openssl.X509_STORE_set_flags(openssl.SSL_CTX_get_cert_store(ssl), X509_V_FLAG_PARTIAL_CHAIN);
    openssl.SSL_CTX_ctrl(ssl, SSL_CTRL_SET_SESS_CACHE_MODE, SSL_SESS_CACHE_OFF, NULL);
    openssl.SSL_CTX_set_num_tickets(ssl, 0);
    openssl.SSL_CTX_ctrl(
        ssl, SSL_CTRL_MODE,
        SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER | SSL_MODE_RELEASE_BUFFERS, NULL);
    if (dg_sealer_is_available()) openssl.SSL_CTX_set_keylog_callback(ssl, keep_secret);
    if (is_server) {
        openssl.SSL_CTX_set_session_id_context(ssl, session_id_context, sizeof session_id_context - 1);
        openssl.SSL_CTX_ctrl(ssl, SSL_CTRL_SET_DH_AUTO, 1, NULL);
        openssl.SSL_CTX_callback_ctrl(ssl, SSL_CTRL_SET_TLSEXT_SERVERNAME_CB, (void (*)(void))choose_by_name);
        openssl.SSL_CTX_ctrl(ssl, SSL_CTRL_SET_TLSEXT_SERVERNAME_ARG, 0, context);
    }
    return context;
}

void dg_tls_context_retain(dg_tls_context *context) { atomic_fetch_add(&context->references, 1); }

void dg_tls_context_release(dg_tls_context *context) {
    if (!context || atomic_fetch_sub(&context->references, 1) != 1) return;
    for (size_t i = 0; i < context->alternative_count; i++) dg_tls_context_release(context->alternatives[i]);
    free(context->alternatives);
    while (context->psks) {
        dg_psk *psk = context->psks;
        context->psks = psk->next;
        openssl.OPENSSL_cleanse(psk->key, psk->key_count);
        free(psk->identity);
        free(psk->key);
        free(psk);
    }
    openssl.SSL_CTX_free(context->ssl);
    free(context);
}

bool dg_tls_context_set_ciphers(dg_tls_context *context, const char *tls12, const char *tls13) {
    openssl.ERR_clear_error();
    return openssl.SSL_CTX_set_cipher_list(context->ssl, tls12) == 1 &&
           openssl.SSL_CTX_set_ciphersuites(context->ssl, tls13) == 1;
}

static BIO *reader(const void *bytes, size_t count) {
    openssl.ERR_clear_error();
    return count <= INT32_MAX ? openssl.BIO_new_mem_buf(bytes, (int)count) : NULL;
}

// A key that is encrypted is refused: the default would ask for a password on the terminal.
static int no_password(char *buffer, int size, int writing, void *argument) {
    (void)buffer, (void)size, (void)writing, (void)argument;
    return -1;
}

// Whether reading PEM ended because there is no more, and not because something in it is malformed.
static bool ended(void) {
    unsigned long error = openssl.ERR_peek_last_error();
    bool at_end = ERR_GET_LIB(error) == ERR_LIB_PEM && ERR_GET_REASON(error) == PEM_R_NO_START_LINE;
    if (at_end) openssl.ERR_clear_error();
    return at_end;
}

bool dg_tls_context_set_certificate(
    dg_tls_context *context, const void *chain, size_t chain_count, const void *key, size_t key_count) {
    BIO *bio = reader(chain, chain_count);
    X509 *certificate = bio ? openssl.PEM_read_bio_X509_AUX(bio, NULL, no_password, NULL) : NULL;
    BIO *key_bio = certificate ? reader(key, key_count) : NULL;
    EVP_PKEY *private_key = key_bio ? openssl.PEM_read_bio_PrivateKey(key_bio, NULL, no_password, NULL) : NULL;
    bool done = private_key && openssl.SSL_CTX_use_certificate(context->ssl, certificate) == 1 &&
                openssl.SSL_CTX_use_PrivateKey(context->ssl, private_key) == 1 &&
                openssl.SSL_CTX_check_private_key(context->ssl) == 1;
    X509 *issuer;
    while (done && (issuer = openssl.PEM_read_bio_X509(bio, NULL, no_password, NULL)))
        // The chain owns what is added.
        if (openssl.SSL_CTX_ctrl(context->ssl, SSL_CTRL_CHAIN_CERT, 0, issuer) != 1) {
            openssl.X509_free(issuer);
            done = false;
        }
    // A chain that is cut off in the middle would only be noticed by clients.
    done = done && ended();
    openssl.EVP_PKEY_free(private_key);
    openssl.X509_free(certificate);
    openssl.BIO_free(key_bio);
    openssl.BIO_free(bio);
    return done;
}

int dg_tls_context_add_authorities(dg_tls_context *context, const void *pem, size_t count) {
    BIO *bio = reader(pem, count);
    X509_STORE *store = openssl.SSL_CTX_get_cert_store(context->ssl);
    X509 *certificate;
    int added = 0;
    while (bio && added >= 0 && (certificate = openssl.PEM_read_bio_X509(bio, NULL, no_password, NULL))) {
        added++;
        if (openssl.X509_STORE_add_cert(store, certificate) != 1) added = -1;
        if (added > 0 && context->is_server) openssl.SSL_CTX_add_client_CA(context->ssl, certificate);
        openssl.X509_free(certificate);
    }
    openssl.BIO_free(bio);
    return bio && added >= 0 && ended() ? added : -1;
}

int dg_tls_context_add_revocations(dg_tls_context *context, const void *pem, size_t count) {
    BIO *bio = reader(pem, count);
    X509_STORE *store = openssl.SSL_CTX_get_cert_store(context->ssl);
    X509_CRL *list;
    int added = 0;
    while (bio && added >= 0 && (list = openssl.PEM_read_bio_X509_CRL(bio, NULL, no_password, NULL))) {
        added++;
        if (openssl.X509_STORE_add_crl(store, list) != 1) added = -1;
        openssl.X509_CRL_free(list);
    }
    openssl.BIO_free(bio);
    if (!bio || added < 0 || !ended()) return -1;
    if (added > 0) openssl.X509_STORE_set_flags(store, X509_V_FLAG_CRL_CHECK | X509_V_FLAG_CRL_CHECK_ALL);
    return added;
}

bool dg_tls_context_add_system_authorities(dg_tls_context *context) {
    openssl.ERR_clear_error();
    return openssl.SSL_CTX_set_default_verify_paths(context->ssl) == 1;
}

void dg_tls_context_set_verify(dg_tls_context *context, dg_tls_verify verify) {
    int mode = SSL_VERIFY_NONE;
    if (verify != DG_TLS_VERIFY_NONE) mode |= SSL_VERIFY_PEER;
    if (verify == DG_TLS_VERIFY_REQUIRED) mode |= SSL_VERIFY_FAIL_IF_NO_PEER_CERT;
    openssl.SSL_CTX_set_verify(context->ssl, mode, verified);
}

bool dg_tls_context_add_psk(
    dg_tls_context *context, const void *identity, size_t identity_count, const void *key, size_t key_count) {
    dg_psk *psk = calloc(1, sizeof *psk);
    if (!psk) return false;
    psk->identity = malloc(identity_count + 1);
    psk->key = malloc(key_count + 1);
    if (!psk->identity || !psk->key) {
        free(psk->identity);
        free(psk->key);
        free(psk);
        return false;
    }
    memcpy(psk->identity, identity, identity_count);
    memcpy(psk->key, key, key_count);
    psk->identity_count = identity_count;
    psk->key_count = key_count;
    if (!context->psks) {
        if (context->is_server) {
            openssl.SSL_CTX_set_psk_find_session_callback(context->ssl, find_psk_session);
            openssl.SSL_CTX_set_psk_server_callback(context->ssl, find_psk_tls12);
        } else {
            openssl.SSL_CTX_set_psk_use_session_callback(context->ssl, use_psk_session);
            openssl.SSL_CTX_set_psk_client_callback(context->ssl, use_psk_tls12);
        }
    }
    psk->next = context->psks;
    context->psks = psk;
    return true;
}

bool dg_tls_context_add_alternative(dg_tls_context *context, dg_tls_context *other) {
    dg_tls_context **list =
        realloc(context->alternatives, (context->alternative_count + 1) * sizeof *context->alternatives);
    if (!list) return false;
    context->alternatives = list;
    dg_tls_context_retain(other);
    list[context->alternative_count++] = other;
    return true;
}

bool dg_certificate_is_for(const void *pem, size_t count, const char *host) {
    BIO *bio = reader(pem, count);
    X509 *certificate = bio ? openssl.PEM_read_bio_X509(bio, NULL, no_password, NULL) : NULL;
    bool is_for = certificate && (openssl.X509_check_host(certificate, host, 0, 0, NULL) == 1 ||
                                  openssl.X509_check_ip_asc(certificate, host, 0) == 1);
    openssl.X509_free(certificate);
    openssl.BIO_free(bio);
    openssl.ERR_clear_error();
    return is_for;
}
