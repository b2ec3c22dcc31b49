// Finds OpenSSL at run time, and asks processor and kernel what they can do for TLS.
#include "library.h"

#include <dlfcn.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/socket.h>
#include <unistd.h>

#include "COpenSSL.h"

#ifndef TCP_ULP
#define TCP_ULP 31
#endif

struct dg_openssl openssl;

static char load_error[256];

static void load(void) {
    void *ssl = dlopen("libssl.so.3", RTLD_NOW);
    void *crypto = ssl ? dlopen("libcrypto.so.3", RTLD_NOW) : NULL;
    if (!ssl || !crypto) {
        snprintf(load_error, sizeof load_error, "%s (install libssl3)", dlerror());
        return;
    }
#define FIND(library, function)                                                                                        \
    openssl.function = (__typeof__(openssl.function))dlsym(library, #function);                                        \
    if (!openssl.function) snprintf(load_error, sizeof load_error, "libssl.so.3 has no " #function);
#define FIND_SSL(function) FIND(ssl, function)
#define FIND_CRYPTO(function) FIND(crypto, function)
    LIBSSL_FUNCTIONS(FIND_SSL)
    LIBCRYPTO_FUNCTIONS(FIND_CRYPTO)
}

const char *dg_tls_load(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, load);
    return load_error[0] ? load_error : NULL;
}

const char *dg_tls_library_version(void) { return openssl.OpenSSL_version(OPENSSL_VERSION); }

bool dg_tls_take_error(char *text, size_t size) {
    unsigned long error = openssl.ERR_get_error();
    if (error == 0) return false;
    const char *reason = openssl.ERR_reason_error_string(error);
    if (reason) {
        snprintf(text, size, "%s", reason);
    } else if (ERR_SYSTEM_ERROR(error)) {
        snprintf(text, size, "%s", strerror(ERR_GET_REASON(error)));
    } else {
        openssl.ERR_error_string_n(error, text, size);
    }
    return true;
}

bool dg_cpu_has_aes(void) {
#if defined(__x86_64__) || defined(__i386__)
    return __builtin_cpu_supports("aes") && __builtin_cpu_supports("pclmul");
#elif defined(__aarch64__)
    // HWCAP_AES and HWCAP_PMULL.
    return (getauxval(AT_HWCAP) & (1 << 3 | 1 << 4)) == (1 << 3 | 1 << 4);
#else
    return false;
#endif
}

bool dg_kernel_has_tls(void) {
    int number = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (number < 0) return false;
    // A kernel that has it refuses because the socket is not connected.
    bool known = setsockopt(number, IPPROTO_TCP, TCP_ULP, "tls", 3) == 0 || errno != ENOENT;
    if (known && errno == ENOPROTOOPT) known = false;
    close(number);
    return known;
}
