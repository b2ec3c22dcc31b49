// The functions of libssl and libcrypto that are used here, found at run time. The names stay OpenSSL's own: each becomes
// a pointer with the type that OpenSSL's header declares.
#pragma once

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/kdf.h>
#include <openssl/params.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>

#define LIBSSL_FUNCTIONS(USE)                                                                                          \
    USE(SSL_CTX_add_client_CA) USE(SSL_CTX_check_private_key) USE(SSL_CTX_ctrl) USE(SSL_CTX_free)                      \
    USE(SSL_CTX_get0_certificate) USE(SSL_CTX_get_cert_store) USE(SSL_CTX_new) USE(SSL_CTX_set_cipher_list)            \
    USE(SSL_CTX_set_ciphersuites) USE(SSL_CTX_set_default_verify_paths) USE(SSL_CTX_set_options)                       \
    USE(SSL_CTX_set_session_id_context) USE(SSL_CTX_set_psk_client_callback) USE(SSL_CTX_set_psk_find_session_callback)                                    \
    USE(SSL_CTX_set_psk_server_callback) USE(SSL_CTX_set_psk_use_session_callback) USE(SSL_CTX_set_verify)             \
    USE(SSL_CTX_up_ref) USE(SSL_CTX_use_PrivateKey) USE(SSL_CTX_use_certificate) USE(SSL_CTX_callback_ctrl)            \
    USE(SSL_CTX_set_keylog_callback) USE(SSL_CTX_set_num_tickets) USE(SSL_CIPHER_get_cipher_nid) USE(SSL_get_session) USE(SSL_CIPHER_find) USE(SSL_CIPHER_get_auth_nid) USE(SSL_CIPHER_get_name)            \
    USE(SSL_SESSION_get_max_fragment_length) USE(SSL_SESSION_new) USE(SSL_SESSION_free) USE(SSL_SESSION_set1_master_key) USE(SSL_SESSION_set_cipher)            \
    USE(SSL_SESSION_set_protocol_version) USE(SSL_ctrl) USE(SSL_do_handshake) USE(SSL_free) USE(SSL_get0_param)        \
    USE(SSL_get1_peer_certificate) USE(SSL_get_current_cipher) USE(SSL_get_error) USE(SSL_get_ex_data) USE(SSL_key_update)                 \
    USE(SSL_get_peer_cert_chain) USE(SSL_get_psk_identity) USE(SSL_get_servername) USE(SSL_get_verify_result)          \
    USE(SSL_get_version) USE(SSL_get_wbio) USE(SSL_new) USE(SSL_read_ex) USE(SSL_session_reused)                       \
    USE(SSL_set0_wbio) USE(SSL_set_SSL_CTX) USE(SSL_set_accept_state) USE(SSL_set_bio)                                 \
    USE(SSL_set_connect_state) USE(SSL_set_ex_data) USE(SSL_set_options) USE(SSL_shutdown) USE(SSL_version)            \
    USE(SSL_write_ex) USE(TLS_method)

#define LIBCRYPTO_FUNCTIONS(USE)                                                                                       \
    USE(ASN1_INTEGER_to_BN) USE(ASN1_STRING_get0_data) USE(ASN1_STRING_length) USE(ASN1_STRING_to_UTF8)                \
    USE(ASN1_TIME_to_tm) USE(BIO_clear_flags) USE(BIO_ctrl) USE(BIO_free) USE(BIO_get_data) USE(BIO_meth_new)          \
    USE(BIO_meth_set_create) USE(BIO_meth_set_ctrl) USE(BIO_meth_set_read) USE(BIO_meth_set_write) USE(BIO_new)        \
    USE(BIO_new_mem_buf) USE(BIO_new_socket) USE(BIO_s_mem) USE(BIO_set_data) USE(BIO_set_flags) USE(BIO_set_init)     \
    USE(BIO_up_ref) USE(BN_bn2hex) USE(BN_free) USE(CRYPTO_free) USE(ERR_clear_error) USE(ERR_error_string_n)          \
    USE(ERR_get_error) USE(ERR_peek_last_error) USE(ERR_reason_error_string) USE(EVP_MD_is_a) USE(EVP_KDF_CTX_free) USE(EVP_KDF_CTX_new) USE(EVP_KDF_derive) USE(EVP_KDF_fetch) USE(EVP_KDF_free)               \
    USE(EVP_PKEY_free) USE(EVP_sha1)          \
    USE(EVP_sha256) USE(GENERAL_NAMES_free) USE(OPENSSL_cleanse) USE(OSSL_PARAM_construct_end) USE(OSSL_PARAM_construct_int) USE(OSSL_PARAM_construct_octet_string)                 \
    USE(OSSL_PARAM_construct_utf8_string) USE(OPENSSL_sk_num) USE(OPENSSL_sk_value)             \
    USE(OpenSSL_version) USE(PEM_read_bio_PrivateKey) USE(PEM_read_bio_X509) USE(PEM_read_bio_X509_AUX)                \
    USE(PEM_read_bio_X509_CRL) USE(PEM_write_bio_X509) USE(X509_CRL_free) USE(X509_NAME_ENTRY_get_data)                \
    USE(X509_NAME_get_entry) USE(X509_NAME_get_index_by_NID) USE(X509_NAME_print_ex)                                   \
    USE(X509_STORE_CTX_get_error) USE(X509_STORE_CTX_get_error_depth) USE(X509_STORE_CTX_set_error)                    \
    USE(X509_STORE_add_cert) USE(X509_STORE_add_crl) USE(X509_STORE_set_flags) USE(X509_VERIFY_PARAM_set1_host)        \
    USE(X509_VERIFY_PARAM_set1_ip_asc) USE(X509_VERIFY_PARAM_set_hostflags) USE(X509_check_host) USE(X509_up_ref)                       \
    USE(X509_check_ip_asc) USE(X509_digest) USE(X509_free) USE(X509_get0_notAfter) USE(X509_get0_notBefore)            \
    USE(X509_get0_serialNumber) USE(X509_get_ext_d2i) USE(X509_get_issuer_name) USE(X509_get_subject_name)             \
    USE(X509_verify_cert_error_string)

struct dg_openssl {
#define DECLARE(name) __typeof__(name) *name;
    LIBSSL_FUNCTIONS(DECLARE)
    LIBCRYPTO_FUNCTIONS(DECLARE)
#undef DECLARE
};

// Filled by dg_tls_load.
extern struct dg_openssl openssl;
