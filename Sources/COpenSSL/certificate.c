// What a peer's certificates say.
#include "context.h"

#include <string.h>
#include <time.h>

static int peer_count(STACK_OF(X509) *chain) { return chain ? openssl.OPENSSL_sk_num((const OPENSSL_STACK *)chain) : 0; }

// A certificate of the peer, its own being the first; to be freed.
static X509 *peer_certificate(dg_tls *tls, int index) {
    if (index == 0) return openssl.SSL_get1_peer_certificate(tls->ssl);
    STACK_OF(X509) *chain = openssl.SSL_get_peer_cert_chain(tls->ssl);
    // A client sees the server's own certificate in its chain, a server does not see the client's.
    int place = tls->context->is_server ? index - 1 : index;
    if (place < 0 || place >= peer_count(chain)) return NULL;
    X509 *certificate = openssl.OPENSSL_sk_value((const OPENSSL_STACK *)chain, place);
    openssl.X509_up_ref(certificate);
    return certificate;
}

int dg_tls_peer_certificates(dg_tls *tls) {
    X509 *own = openssl.SSL_get1_peer_certificate(tls->ssl);
    if (!own) return 0;
    openssl.X509_free(own);
    return peer_count(openssl.SSL_get_peer_cert_chain(tls->ssl)) + (tls->context->is_server ? 1 : 0);
}

static ssize_t copy(void *bytes, size_t size, const void *from, ssize_t count) {
    if (count < 0 || !from || (size_t)count > size) return -1;
    memcpy(bytes, from, (size_t)count);
    return count;
}

static ssize_t take(void *bytes, size_t size, BIO *bio) {
    char *text = NULL;
    long count = openssl.BIO_ctrl(bio, BIO_CTRL_INFO, 0, &text);
    ssize_t result = copy(bytes, size, text, count);
    openssl.BIO_free(bio);
    return result;
}

static ssize_t name(const X509_NAME *name, void *bytes, size_t size) {
    BIO *bio = openssl.BIO_new(openssl.BIO_s_mem());
    if (!bio) return -1;
    // Half a name is none: rules compare it.
    if (openssl.X509_NAME_print_ex(bio, name, 0, XN_FLAG_RFC2253 & ~ASN1_STRFLGS_ESC_MSB) < 0) {
        openssl.BIO_free(bio);
        return -1;
    }
    return take(bytes, size, bio);
}

static ssize_t point_in_time(const ASN1_TIME *when, void *bytes, size_t size) {
    struct tm parts;
    char text[32];
    if (!openssl.ASN1_TIME_to_tm(when, &parts)) return -1;
    return copy(bytes, size, text, (ssize_t)strftime(text, sizeof text, "%Y-%m-%d %H:%M:%SZ", &parts));
}

static ssize_t common_name(X509 *certificate, void *bytes, size_t size) {
    X509_NAME *subject = openssl.X509_get_subject_name(certificate);
    int place = openssl.X509_NAME_get_index_by_NID(subject, NID_commonName, -1);
    // Of several common names none is the name.
    if (place < 0 || openssl.X509_NAME_get_index_by_NID(subject, NID_commonName, place) >= 0) return -1;
    unsigned char *text = NULL;
    int count = openssl.ASN1_STRING_to_UTF8(
        &text, openssl.X509_NAME_ENTRY_get_data(openssl.X509_NAME_get_entry(subject, place)));
    ssize_t result = copy(bytes, size, text, count);
    openssl.CRYPTO_free(text, __FILE__, __LINE__);
    return result;
}

static ssize_t serial(X509 *certificate, void *bytes, size_t size) {
    BIGNUM *number = openssl.ASN1_INTEGER_to_BN(openssl.X509_get0_serialNumber(certificate), NULL);
    char *text = number ? openssl.BN_bn2hex(number) : NULL;
    ssize_t result = text ? copy(bytes, size, text, (ssize_t)strlen(text)) : -1;
    openssl.CRYPTO_free(text, __FILE__, __LINE__);
    openssl.BN_free(number);
    return result;
}

static ssize_t digest(X509 *certificate, const EVP_MD *method, void *bytes, size_t size) {
    unsigned char value[EVP_MAX_MD_SIZE];
    unsigned count = 0;
    if (!openssl.X509_digest(certificate, method, value, &count)) return -1;
    return copy(bytes, size, value, count);
}

static ssize_t pem(X509 *certificate, void *bytes, size_t size) {
    BIO *bio = openssl.BIO_new(openssl.BIO_s_mem());
    if (!bio) return -1;
    openssl.PEM_write_bio_X509(bio, certificate);
    return take(bytes, size, bio);
}

ssize_t dg_tls_peer_field(dg_tls *tls, int index, dg_cert_field field, void *bytes, size_t size) {
    X509 *certificate = peer_certificate(tls, index);
    if (!certificate) return -1;
    ssize_t result = -1;
    switch (field) {
    case DG_CERT_SUBJECT: result = name(openssl.X509_get_subject_name(certificate), bytes, size); break;
    case DG_CERT_ISSUER: result = name(openssl.X509_get_issuer_name(certificate), bytes, size); break;
    case DG_CERT_SERIAL: result = serial(certificate, bytes, size); break;
    case DG_CERT_NOT_BEFORE: result = point_in_time(openssl.X509_get0_notBefore(certificate), bytes, size); break;
    case DG_CERT_NOT_AFTER: result = point_in_time(openssl.X509_get0_notAfter(certificate), bytes, size); break;
    case DG_CERT_SHA1: result = digest(certificate, openssl.EVP_sha1(), bytes, size); break;
    case DG_CERT_SHA256: result = digest(certificate, openssl.EVP_sha256(), bytes, size); break;
    case DG_CERT_PEM: result = pem(certificate, bytes, size); break;
    case DG_CERT_COMMON_NAME: result = common_name(certificate, bytes, size); break;
    }
    openssl.X509_free(certificate);
    return result;
}

ssize_t dg_tls_peer_name(dg_tls *tls, int index, dg_name_kind *kind, void *bytes, size_t size) {
    X509 *certificate = peer_certificate(tls, 0);
    if (!certificate) return -1;
    GENERAL_NAMES *names = openssl.X509_get_ext_d2i(certificate, NID_subject_alt_name, NULL, NULL);
    ssize_t result = -1;
    if (names && index >= 0 && index < openssl.OPENSSL_sk_num((const OPENSSL_STACK *)names)) {
        const GENERAL_NAME *entry = openssl.OPENSSL_sk_value((const OPENSSL_STACK *)names, index);
        const ASN1_STRING *text = NULL;
        switch (entry->type) {
        case GEN_DNS: *kind = DG_NAME_DNS, text = entry->d.dNSName; break;
        case GEN_IPADD: *kind = DG_NAME_IP, text = entry->d.iPAddress; break;
        case GEN_EMAIL: *kind = DG_NAME_EMAIL, text = entry->d.rfc822Name; break;
        case GEN_URI: *kind = DG_NAME_URI, text = entry->d.uniformResourceIdentifier; break;
        default: break;
        }
        result = 0;
        if (text) result = copy(bytes, size, openssl.ASN1_STRING_get0_data(text), openssl.ASN1_STRING_length(text));
        // One that is too long is as good as one of an unknown kind.
        if (result < 0) result = 0;
    }
    if (names) openssl.GENERAL_NAMES_free(names);
    openssl.X509_free(certificate);
    return result;
}
