// The client side of the NBD handshake, for the load generator: address in,
// a stream in the transmission phase and the export's properties out.
// Magic numbers and field names are those of the NBD protocol document.
#ifndef NBD_CLIENT_H
#define NBD_CLIENT_H

#include "stream.h"

#include <endian.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum {
    NBD_CMD_READ = 0,
    NBD_CMD_WRITE = 1,
    NBD_CMD_DISC = 2,

    NBD_REPLY_FLAG_DONE = 1,
    NBD_REPLY_TYPE_NONE = 0,
    NBD_REPLY_TYPE_OFFSET_DATA = 1,
    NBD_REPLY_TYPE_OFFSET_HOLE = 2,
    NBD_REPLY_TYPE_ERROR = 0x8001,
    NBD_REPLY_TYPE_ERROR_OFFSET = 0x8002,
    NBD_REPLY_TYPE_IS_ERROR = 0x8000,

    NBD_FLAG_READ_ONLY = 2,
};

#define NBD_REQUEST_MAGIC 0x25609513u
#define NBD_SIMPLE_REPLY_MAGIC 0x67446698u
#define NBD_STRUCTURED_REPLY_MAGIC 0x668e33efu

struct nbd_request {
    uint32_t magic;
    uint16_t flags, type;
    uint64_t cookie, offset;
    uint32_t length;
} __attribute__((packed));

struct nbd_target {
    const char *unix_path;    // either this
    const char *host, *port;  // or these
    const char *export_name;
    bool ask_structured;
    struct tls_options tls;
    double connect_seconds;   // keep trying to connect for so long; 0: once
};

struct nbd_export {
    uint64_t size;
    uint16_t flags;
    bool structured;
    uint32_t minimum_block, maximum_payload;
};

// Connects and negotiates; ends the program with a message when it cannot.
struct nbd_stream nbd_open(const struct nbd_target *target, struct nbd_export *export);

// Prints a message and ends the whole program, from any thread.
void die(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

static inline uint16_t get16(const uint8_t *p) { uint16_t v; memcpy(&v, p, sizeof v); return be16toh(v); }
static inline uint32_t get32(const uint8_t *p) { uint32_t v; memcpy(&v, p, sizeof v); return be32toh(v); }
static inline uint64_t get64(const uint8_t *p) { uint64_t v; memcpy(&v, p, sizeof v); return be64toh(v); }

#endif
