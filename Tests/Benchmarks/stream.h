// A connection's bytes, plain or through TLS: what the load generator and its
// handshake send to and receive from.
#ifndef STREAM_H
#define STREAM_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

struct nbd_stream {
    int socket;
    struct ssl_st *tls;  // NULL: plain
    bool starved;        // TLS has used up what the socket gave
};

// How to speak TLS; all NULL: not at all. Certificates are shown where the
// server asks; the server's own is not checked, for it is not what is measured.
struct tls_options {
    const char *certificates;        // a directory as nbdkit and libnbd know them
    const char *psk_file, *identity;
};

static inline bool wants_tls(const struct tls_options *options) {
    return options->certificates != NULL || options->psk_file != NULL;
}

// Begins TLS on a connected socket; ends the program when that fails.
void start_tls(struct nbd_stream *stream, const struct tls_options *options);

// Whether bytes are here already, so that the socket must not be waited for.
bool stream_has_bytes(const struct nbd_stream *stream);

// As send and recv. Sending never waits: what cannot go on now fails with EAGAIN.
ssize_t stream_send(struct nbd_stream *stream, const void *bytes, size_t length);
ssize_t stream_receive(struct nbd_stream *stream, void *bytes, size_t length, bool wait);

// For the handshake: all or the end of the program.
void send_all(struct nbd_stream *stream, const void *bytes, size_t length);
void receive_all(struct nbd_stream *stream, void *bytes, size_t length);

#endif
