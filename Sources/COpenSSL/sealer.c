// TLS 1.3 record protection (RFC 8446, 5.2) by the AES-GCM of Intel's ipsec-mb library, which is loaded if it is there.
#include "sealer.h"

#include <dlfcn.h>
#include <openssl/kdf.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "library.h"

// Expanded keys and contexts are the library's business; both get more room than any version of it needs, aligned for
// its vectors.
typedef struct {
    _Alignas(64) uint8_t bytes[4096];
} expanded_key;
typedef struct {
    _Alignas(64) uint8_t bytes[512];
} gcm_context;

// The functions for one size of key (intel-ipsec-mb.h, "direct API").
struct gcm {
    void (*pre)(const void *key, void *expanded);
    void (*init)(const void *expanded, void *context, const uint8_t *iv, const uint8_t *aad, uint64_t aad_count);
    void (*update)(const void *expanded, void *context, uint8_t *out, const uint8_t *in, uint64_t count);
    void (*finalize)(const void *expanded, void *context, uint8_t *tag, uint64_t tag_count);
};

static struct gcm gcm128, gcm256;
static bool is_available;

struct dg_sealer {
    expanded_key key;
    gcm_context context;
    const struct gcm *gcm;
    size_t key_count, secret_count;
    uint64_t sequence;
    uint8_t secret[SECRET_MAX];
    uint8_t iv[12];
};

// ---- finding the library ----

static bool find(void *library, struct gcm *gcm, const char *size) {
    char name[64];
    struct {
        const char *before, *after;
        void **place;
    } functions[] = {
        {"aes_gcm_pre_", "_vaes_avx512", (void **)&gcm->pre},
        {"aes_gcm_init_", "_vaes_avx512", (void **)&gcm->init},
        {"aes_gcm_enc_", "_update_vaes_avx512", (void **)&gcm->update},
        {"aes_gcm_enc_", "_finalize_vaes_avx512", (void **)&gcm->finalize},
    };
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        snprintf(name, sizeof name, "%s%s%s", functions[i].before, size, functions[i].after);
        *functions[i].place = dlsym(library, name);
        if (!*functions[i].place) return false;
    }
    return true;
}

static bool processor_can(void) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("vaes") && __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
    return false;
#endif
}

// Test cases 2 and 14 of the specification of GCM: a block of zeros under a key and an IV of zeros.
static bool knows_the_answer(const struct gcm *gcm, const uint8_t answer[32]) {
    static const uint8_t zeros[32];
    expanded_key key;
    gcm_context context;
    uint8_t out[32];
    gcm->pre(zeros, &key);
    gcm->init(&key, &context, zeros, zeros, 0);
    // In two parts, as records are sealed.
    gcm->update(&key, &context, out, zeros, 15);
    gcm->update(&key, &context, out + 15, zeros, 1);
    gcm->finalize(&key, &context, out + 16, 16);
    return memcmp(out, answer, sizeof out) == 0;
}

static void look(void) {
    static const uint8_t answer128[32] = {0x03, 0x88, 0xda, 0xce, 0x60, 0xb6, 0xa3, 0x92, 0xf3, 0x28, 0xc2,
                                          0xb9, 0x71, 0xb2, 0xfe, 0x78, 0xab, 0x6e, 0x47, 0xd4, 0x2c, 0xec,
                                          0x13, 0xbd, 0xf5, 0x3a, 0x67, 0xb2, 0x12, 0x57, 0xbd, 0xdf};
    static const uint8_t answer256[32] = {0xce, 0xa7, 0x40, 0x3d, 0x4d, 0x60, 0x6b, 0x6e, 0x07, 0x4e, 0xc5,
                                          0xd3, 0xba, 0xf3, 0x9d, 0x18, 0xd0, 0xd1, 0xc8, 0xa7, 0x99, 0x99,
                                          0x6b, 0xf0, 0x26, 0x5b, 0x98, 0xb5, 0xd4, 0x8a, 0xb9, 0x19};
    if (!processor_can()) return;
    void *library = dlopen("libIPSec_MB.so.1", RTLD_NOW);
    is_available = library && find(library, &gcm128, "128") && find(library, &gcm256, "256") &&
                   knows_the_answer(&gcm128, answer128) && knows_the_answer(&gcm256, answer256);
}

bool dg_sealer_is_available(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, look);
    return is_available;
}

// ---- keys ----

// HKDF-Expand-Label without a context (RFC 8446, 7.1).
static bool expand(
    const char *hash, const uint8_t *secret, size_t secret_count, const char *label, uint8_t *out, size_t count) {
    uint8_t info[64];
    size_t label_count = strlen(label), used = 0;
    info[used++] = (uint8_t)(count >> 8);
    info[used++] = (uint8_t)count;
    info[used++] = (uint8_t)(6 + label_count);
    memcpy(info + used, "tls13 ", 6);
    memcpy(info + used + 6, label, label_count);
    used += 6 + label_count;
    info[used++] = 0;
    int mode = EVP_KDF_HKDF_MODE_EXPAND_ONLY;
    EVP_KDF *kdf = openssl.EVP_KDF_fetch(NULL, "HKDF", NULL);
    EVP_KDF_CTX *context = openssl.EVP_KDF_CTX_new(kdf);
    OSSL_PARAM parameters[] = {
        openssl.OSSL_PARAM_construct_int("mode", &mode),
        openssl.OSSL_PARAM_construct_utf8_string("digest", (char *)hash, 0),
        openssl.OSSL_PARAM_construct_octet_string("key", (void *)secret, secret_count),
        openssl.OSSL_PARAM_construct_octet_string("info", info, used),
        openssl.OSSL_PARAM_construct_end(),
    };
    bool done = context && openssl.EVP_KDF_derive(context, out, count, parameters) == 1;
    openssl.EVP_KDF_CTX_free(context);
    openssl.EVP_KDF_free(kdf);
    return done;
}

static const char *hash_of(size_t secret_count) { return secret_count == 48 ? "SHA384" : "SHA256"; }

static bool use_secret(dg_sealer *sealer) {
    uint8_t key[32], iv[12];
    const char *hash = hash_of(sealer->secret_count);
    bool done = expand(hash, sealer->secret, sealer->secret_count, "key", key, sealer->key_count) &&
                expand(hash, sealer->secret, sealer->secret_count, "iv", iv, sizeof iv);
    // The count of records begins anew with a new key only: an old one would see its nonces again.
    if (done) {
        sealer->gcm->pre(key, &sealer->key);
        memcpy(sealer->iv, iv, sizeof iv);
        sealer->sequence = 0;
    }
    openssl.OPENSSL_cleanse(key, sizeof key);
    return done;
}

dg_sealer *dg_sealer_create(const uint8_t *secret, size_t secret_count, size_t key_count) {
    if (!dg_sealer_is_available() || secret_count > SECRET_MAX || (key_count != 16 && key_count != 32)) return NULL;
    dg_sealer *sealer = aligned_alloc(64, (sizeof *sealer + 63) & ~(size_t)63);
    if (!sealer) return NULL;
    memset(sealer, 0, sizeof *sealer);
    sealer->gcm = key_count == 16 ? &gcm128 : &gcm256;
    sealer->key_count = key_count;
    sealer->secret_count = secret_count;
    memcpy(sealer->secret, secret, secret_count);
    if (use_secret(sealer)) return sealer;
    dg_sealer_free(sealer);
    return NULL;
}

void dg_sealer_free(dg_sealer *sealer) {
    if (!sealer) return;
    openssl.OPENSSL_cleanse(sealer, sizeof *sealer);
    free(sealer);
}

bool dg_sealer_is_worn(const dg_sealer *sealer) { return sealer->sequence >= 1 << 24; }

bool dg_sealer_renew(dg_sealer *sealer) {
    uint8_t next[SECRET_MAX];
    bool done = expand(
        hash_of(sealer->secret_count), sealer->secret, sealer->secret_count, "traffic upd", next, sealer->secret_count);
    if (done) memcpy(sealer->secret, next, sealer->secret_count);
    openssl.OPENSSL_cleanse(next, sizeof next);
    return done && use_secret(sealer);
}

// ---- records ----

void dg_sealer_seal(dg_sealer *sealer, uint8_t type, const uint8_t *content, size_t count, uint8_t *record) {
    size_t length = count + 1 + 16;
    record[0] = 23;
    record[1] = 3;
    record[2] = 3;
    record[3] = (uint8_t)(length >> 8);
    record[4] = (uint8_t)length;
    uint8_t nonce[12];
    memcpy(nonce, sealer->iv, sizeof nonce);
    for (int i = 0; i < 8; i++) nonce[11 - i] ^= (uint8_t)(sealer->sequence >> (8 * i));
    sealer->sequence++;
    sealer->gcm->init(&sealer->key, &sealer->context, nonce, record, 5);
    sealer->gcm->update(&sealer->key, &sealer->context, record + 5, content, count);
    sealer->gcm->update(&sealer->key, &sealer->context, record + 5 + count, &type, 1);
    sealer->gcm->finalize(&sealer->key, &sealer->context, record + 6 + count, 16);
}
