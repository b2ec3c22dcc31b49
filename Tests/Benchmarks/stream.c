// Plain sockets and OpenSSL behind one face; see stream.h.
#define _GNU_SOURCE
#include "stream.h"

#include "nbd_client.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

enum { KEY_LIMIT = 64, LINE_LIMIT = 1024 };

static SSL_CTX *context;  // one for all connections, which are opened by one thread
static char identity[LINE_LIMIT];
static unsigned char key[KEY_LIMIT];
static unsigned key_length;

static const char *tls_error(void) {
    const unsigned long code = ERR_get_error();
    return code != 0 ? ERR_reason_error_string(code) : errno != 0 ? strerror(errno) : "the server hung up";
}

// Lines of a file as psktool writes it: IDENTITY:HEXADECIMAL
static void read_key(const char *path, const char *wanted) {
    char line[LINE_LIMIT];
    const size_t length = strlen(wanted);
    FILE *file = fopen(path, "r");
    if (file == NULL) die("%s: %s", path, strerror(errno));
    while (key_length == 0 && fgets(line, sizeof line, file) != NULL) {
        if (strncmp(line, wanted, length) != 0 || line[length] != ':') continue;
        const char *digits = line + length + 1;
        while (key_length < KEY_LIMIT && sscanf(digits + 2 * key_length, "%2hhx", &key[key_length]) == 1) key_length++;
    }
    fclose(file);
    if (key_length == 0) die("%s: no key for %s", path, wanted);
    snprintf(identity, sizeof identity, "%s", wanted);
}

static unsigned give_key(SSL *tls, const char *hint, char *name, unsigned name_size, unsigned char *psk,
                         unsigned size) {
    (void)tls, (void)hint;
    if (strlen(identity) >= name_size || key_length > size) return 0;
    strcpy(name, identity);
    memcpy(psk, key, key_length);
    return key_length;
}

static void load(const char *directory, const char *name, int (*use)(SSL_CTX *, const char *)) {
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    if (use(context, path) != 1) die("%s: %s", path, tls_error());
}

static int use_key(SSL_CTX *c, const char *path) { return SSL_CTX_use_PrivateKey_file(c, path, SSL_FILETYPE_PEM); }

static void prepare_context(const struct tls_options *options) {
    signal(SIGPIPE, SIG_IGN);  // OpenSSL sends without MSG_NOSIGNAL
    context = SSL_CTX_new(TLS_client_method());
    if (context == NULL) die("OpenSSL: %s", tls_error());
    SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    SSL_CTX_set_read_ahead(context, 1);  // a record's header and body in one call
    if (options->psk_file != NULL) {
        read_key(options->psk_file, options->identity);
        SSL_CTX_set_psk_client_callback(context, give_key);
    } else {
        load(options->certificates, "client-cert.pem", SSL_CTX_use_certificate_chain_file);
        load(options->certificates, "client-key.pem", use_key);
    }
}

void start_tls(struct nbd_stream *stream, const struct tls_options *options) {
    if (context == NULL) prepare_context(options);
    stream->tls = SSL_new(context);
    if (stream->tls == NULL || SSL_set_fd(stream->tls, stream->socket) != 1) die("OpenSSL: %s", tls_error());
    errno = 0;
    if (SSL_connect(stream->tls) != 1) die("the TLS handshake failed: %s", tls_error());
    const int flags = fcntl(stream->socket, F_GETFL);
    if (flags < 0 || fcntl(stream->socket, F_SETFL, flags | O_NONBLOCK) < 0) die("fcntl: %s", strerror(errno));
}

bool stream_has_bytes(const struct nbd_stream *stream) {
    return stream->tls != NULL && !stream->starved && SSL_has_pending(stream->tls);
}

static ssize_t tls_result(struct nbd_stream *stream, int result) {
    if (result > 0) return result;
    switch (SSL_get_error(stream->tls, result)) {
    case SSL_ERROR_WANT_READ:
    case SSL_ERROR_WANT_WRITE: errno = EAGAIN; return -1;
    case SSL_ERROR_ZERO_RETURN: return 0;
    default: die("TLS: %s", tls_error());
    }
}

static int limited(size_t length) { return length > INT_MAX ? INT_MAX : (int)length; }

ssize_t stream_send(struct nbd_stream *stream, const void *bytes, size_t length) {
    if (stream->tls == NULL) return send(stream->socket, bytes, length, MSG_DONTWAIT | MSG_NOSIGNAL);
    ERR_clear_error();
    errno = 0;
    return tls_result(stream, SSL_write(stream->tls, bytes, limited(length)));
}

static void wait_for_bytes(struct nbd_stream *stream) {
    struct pollfd ready = {.fd = stream->socket, .events = POLLIN};
    if (poll(&ready, 1, -1) < 0) die("poll: %s", strerror(errno));
}

// OpenSSL gives one record at a time, of at most 16 KiB; several fit here.
static ssize_t receive_records(struct nbd_stream *stream, uint8_t *bytes, size_t length) {
    size_t done = 0;
    int result = 1;
    while (done < length && result > 0) {
        ERR_clear_error();
        errno = 0;
        result = SSL_read(stream->tls, bytes + done, limited(length - done));
        if (result > 0) done += (size_t)result;
    }
    stream->starved = result <= 0;
    return done > 0 ? (ssize_t)done : tls_result(stream, result);
}

ssize_t stream_receive(struct nbd_stream *stream, void *bytes, size_t length, bool wait) {
    if (stream->tls == NULL) return recv(stream->socket, bytes, length, wait ? 0 : MSG_DONTWAIT);
    if (wait && !stream_has_bytes(stream)) wait_for_bytes(stream);
    return receive_records(stream, bytes, length);
}

void send_all(struct nbd_stream *stream, const void *bytes, size_t length) {
    // A handshake message is far smaller than any socket buffer: never partial.
    if (stream_send(stream, bytes, length) != (ssize_t)length) die("handshake: sending failed: %s", strerror(errno));
}

void receive_all(struct nbd_stream *stream, void *bytes, size_t length) {
    for (uint8_t *next = bytes; length > 0;) {
        const ssize_t n = stream_receive(stream, next, length, true);
        if (n < 0 && errno == EAGAIN) continue;
        if (n < 0) die("handshake: receiving failed: %s", strerror(errno));
        if (n == 0) die("handshake: the server closed the connection");
        next += n;
        length -= (size_t)n;
    }
}
