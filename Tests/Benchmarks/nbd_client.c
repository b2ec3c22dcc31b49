// Connecting and the fixed newstyle handshake; see nbd_client.h.
#define _GNU_SOURCE
#include "nbd_client.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum {
    FLAG_FIXED_NEWSTYLE = 1,
    FLAG_NO_ZEROES = 2,
    OPT_EXPORT_NAME = 1,
    OPT_STARTTLS = 5,
    OPT_GO = 7,
    OPT_STRUCTURED_REPLY = 8,
    REP_ACK = 1,
    REP_INFO = 3,
    INFO_EXPORT = 0,
    INFO_BLOCK_SIZE = 3,
    REPLY_PAYLOAD_LIMIT = 64 * 1024,  // no answer to the options used here is near this
    EXPORT_NAME_LIMIT = 4096,         // the protocol's own limit on strings
};
#define OPTION_MAGIC 0x49484156454f5054ull  // "IHAVEOPT"
#define OPTION_REPLY_MAGIC 0x3e889045565a9ull
#define REP_IS_ERROR 0x80000000u
#define REP_ERR_UNSUP 0x80000001u

struct option_reply {
    uint32_t type, length;
    uint8_t payload[REPLY_PAYLOAD_LIMIT];
};

void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("loadgen: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    _exit(1);  // not exit(): the other threads are still using what it would tear down
}

static int connect_unix(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        die("the socket path is too long (limit %zu): %s", sizeof address.sun_path - 1, path);
    strcpy(address.sun_path, path);
    int s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (s < 0) die("socket: %s", strerror(errno));
    if (connect(s, (struct sockaddr *)&address, sizeof address) == 0) return s;
    int error = errno;
    close(s);
    errno = error;
    return -1;
}

static int connect_tcp(const char *host, const char *port) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *list;
    int status = getaddrinfo(host, port, &hints, &list);
    if (status != 0) die("%s:%s: %s", host, port, gai_strerror(status));
    int s = -1, error = ECONNREFUSED;
    for (struct addrinfo *a = list; a != NULL && s < 0; a = a->ai_next) {
        s = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (s >= 0 && connect(s, a->ai_addr, a->ai_addrlen) == 0) break;
        error = errno;
        if (s >= 0) close(s);
        s = -1;
    }
    freeaddrinfo(list);
    if (s >= 0) setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    errno = error;
    return s;
}

static double monotonic(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int connect_to(const struct nbd_target *target) {
    const double deadline = monotonic() + target->connect_seconds;
    for (;;) {
        int s = target->unix_path ? connect_unix(target->unix_path) : connect_tcp(target->host, target->port);
        if (s >= 0) return s;
        if (monotonic() >= deadline) break;
        nanosleep(&(struct timespec){.tv_nsec = 50 * 1000}, NULL);
    }
    if (target->unix_path) die("cannot connect to unix:%s: %s", target->unix_path, strerror(errno));
    die("cannot connect to %s:%s: %s", target->host, target->port, strerror(errno));
}

static void send_option(struct nbd_stream *stream, uint32_t option, const void *data, uint32_t length) {
    uint8_t message[16 + EXPORT_NAME_LIMIT + 16];
    const uint64_t magic = htobe64(OPTION_MAGIC);
    const uint32_t fields[2] = {htobe32(option), htobe32(length)};
    memcpy(message, &magic, 8);
    memcpy(message + 8, fields, 8);
    if (length > 0) memcpy(message + 16, data, length);
    send_all(stream, message, 16 + length);
}

static void receive_option_reply(struct nbd_stream *stream, uint32_t option, struct option_reply *reply) {
    uint8_t header[20];
    receive_all(stream, header, sizeof header);
    if (get64(header) != OPTION_REPLY_MAGIC || get32(header + 8) != option)
        die("handshake: the server answered option %u with something else", option);
    reply->type = get32(header + 12);
    reply->length = get32(header + 16);
    if (reply->length > REPLY_PAYLOAD_LIMIT) die("handshake: a reply of %u bytes to option %u", reply->length, option);
    receive_all(stream, reply->payload, reply->length);
}

static void take_info(const struct option_reply *reply, struct nbd_export *export) {
    if (reply->length < 2) die("handshake: an information reply of %u bytes", reply->length);
    const uint8_t *p = reply->payload;
    const uint16_t kind = get16(p);
    if (kind == INFO_EXPORT && reply->length == 12) {
        export->size = get64(p + 2);
        export->flags = get16(p + 10);
    } else if (kind == INFO_BLOCK_SIZE && reply->length == 14) {
        export->minimum_block = get32(p + 2);
        export->maximum_payload = get32(p + 10);
    }
}

// True when the export is open, false when the server does not know the option.
static bool go(struct nbd_stream *stream, const char *name, struct nbd_export *export, struct option_reply *reply) {
    const uint32_t length = (uint32_t)strlen(name), wire_length = htobe32(length);
    const uint16_t requests[2] = {htobe16(1), htobe16(INFO_BLOCK_SIZE)};
    uint8_t message[4 + EXPORT_NAME_LIMIT + sizeof requests];
    memcpy(message, &wire_length, 4);
    memcpy(message + 4, name, length);
    memcpy(message + 4 + length, requests, sizeof requests);
    send_option(stream, OPT_GO, message, 4 + length + (uint32_t)sizeof requests);
    for (;;) {
        receive_option_reply(stream, OPT_GO, reply);
        if (reply->type == REP_ACK) return true;
        if (reply->type == REP_ERR_UNSUP) return false;
        if (reply->type & REP_IS_ERROR)
            die("the server refuses the export \"%s\": error %#x %.*s", name, reply->type,
                (int)reply->length, (char *)reply->payload);
        if (reply->type == REP_INFO) take_info(reply, export);
    }
}

static void export_name(struct nbd_stream *stream, const char *name, bool zeroes, struct nbd_export *export) {
    uint8_t answer[10 + 124];  // 124 bytes of padding, unless both sides agreed to leave it out
    send_option(stream, OPT_EXPORT_NAME, name, (uint32_t)strlen(name));
    receive_all(stream, answer, zeroes ? sizeof answer : 10);
    export->size = get64(answer);
    export->flags = get16(answer + 8);
}

static void ask_for_tls(struct nbd_stream *stream, const struct tls_options *options, struct option_reply *reply) {
    send_option(stream, OPT_STARTTLS, NULL, 0);
    receive_option_reply(stream, OPT_STARTTLS, reply);
    if (reply->type != REP_ACK)
        die("the server refuses TLS: error %#x %.*s", reply->type, (int)reply->length, (char *)reply->payload);
    start_tls(stream, options);
}

struct nbd_stream nbd_open(const struct nbd_target *target, struct nbd_export *export) {
    const char *name = target->export_name;
    if (strlen(name) > EXPORT_NAME_LIMIT) die("the export name is longer than %d bytes", EXPORT_NAME_LIMIT);
    *export = (struct nbd_export){.minimum_block = 1, .maximum_payload = 32 << 20};

    struct nbd_stream stream = {.socket = connect_to(target)}, *s = &stream;
    uint8_t greeting[18];
    receive_all(s, greeting, sizeof greeting);
    if (memcmp(greeting, "NBDMAGIC", 8) != 0 || get64(greeting + 8) != OPTION_MAGIC)
        die("the server does not speak newstyle NBD");
    const uint16_t offered = get16(greeting + 16);
    if (!(offered & FLAG_FIXED_NEWSTYLE)) die("the server does not offer the fixed newstyle handshake");
    const uint32_t flags = htobe32(offered & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES));
    send_all(s, &flags, sizeof flags);

    struct option_reply *reply = malloc(sizeof *reply);
    if (reply == NULL) die("out of memory");
    if (wants_tls(&target->tls)) ask_for_tls(s, &target->tls, reply);
    if (target->ask_structured) {
        send_option(s, OPT_STRUCTURED_REPLY, NULL, 0);
        receive_option_reply(s, OPT_STRUCTURED_REPLY, reply);
        export->structured = reply->type == REP_ACK;
    }
    if (!go(s, name, export, reply)) export_name(s, name, !(offered & FLAG_NO_ZEROES), export);
    free(reply);
    return stream;
}
