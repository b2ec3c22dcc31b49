// An NBD load generator that costs little itself, so that the server is what
// is measured. Every connection has a thread: it sends all the requests that
// its queue depth allows in one call, receives whatever has come into one
// buffer that stays in the CPU cache, and throws the payload away (or compares
// it, --verify). Prints one line of JSON. `loadgen --help` lists the options.
#define _GNU_SOURCE
#include "latency.h"
#include "loadgen_options.h"
#include "timed_server.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum {
    // Receive buffer: as large as a block between these limits. The upper one
    // fits the L2 cache of any current server CPU. The lower one is below a
    // deep queue of small replies on purpose: the next requests then leave
    // while the server is still answering, instead of both taking turns.
    MINIMUM_BUFFER = 64 * 1024,
    MAXIMUM_BUFFER = 256 * 1024,
    SLOT_BITS = 12,             // of the cookie; the rest is a sequence number
    ERROR_TEXT_LIMIT = 4096,    // the protocol's limit on strings
    CHUNK_HEADER_LIMIT = 20 + 4 + 2 + ERROR_TEXT_LIMIT + 8,
    VECTORS = 256,              // two per write request, in one sendmsg
};

// --- A connection

struct slot {
    uint64_t cookie, offset, started;
    uint32_t received;  // payload bytes so far
    bool busy;
};

struct connection {
    pthread_t thread;
    struct nbd_stream stream;
    struct nbd_export export;
    struct slot *slots;
    uint16_t *free_slots;
    unsigned free_count;

    // Requests not yet sent, contiguous; `sent` counts bytes of the first
    // ones (with their payload, when writing) that have gone already.
    struct nbd_request *queue;
    unsigned queued;
    size_t sent;

    uint8_t *buffer;
    size_t capacity;
    size_t begin, end;  // what has been received and not looked at yet

    // The chunk whose payload is passing through, if any is left.
    uint32_t payload_left;
    uint64_t payload_offset;
    struct slot *payload_slot;
    bool payload_is_last;

    uint64_t sequence, random;
    uint64_t first_block, blocks, next_block;  // this connection's part of the disk, in blocks
    uint64_t issued, limit, completed, deadline, finished_at;
    uint64_t histogram[BUCKETS];
};

static uint8_t *write_payload;      // the same bytes for every write
static const uint8_t *reference;    // --verify: the mapped file
static uint64_t reference_size;
static pthread_barrier_t start_line;

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static void *allocate(size_t count, size_t size) {
    void *p = calloc(count, size);
    if (p == NULL) die("out of memory");
    return p;
}

static const char *verb(void) { return options.write ? "write" : "read"; }

static uint64_t next_random(struct connection *c) {  // xorshift64*
    c->random ^= c->random >> 12;
    c->random ^= c->random << 25;
    c->random ^= c->random >> 27;
    return c->random * 0x2545f4914f6cdd1dull;
}

static uint64_t next_offset(struct connection *c) {
    uint64_t block;
    if (options.sequential) {
        block = c->next_block;
        if (++c->next_block == c->blocks) c->next_block = 0;
    } else {
        block = (uint64_t)(((unsigned __int128)next_random(c) * c->blocks) >> 64);
    }
    return (c->first_block + block) * options.block;
}

// --- Sending

static size_t queue_item_bytes(void) {
    return sizeof(struct nbd_request) + (options.write ? options.block : 0);
}

static void queue_requests(struct connection *c, uint64_t time) {
    while (c->free_count > 0 && c->issued < c->limit && time < c->deadline) {
        const unsigned index = c->free_slots[--c->free_count];
        struct slot *slot = &c->slots[index];
        slot->cookie = c->sequence++ << SLOT_BITS | index;
        slot->offset = next_offset(c);
        slot->started = time;
        slot->received = 0;
        slot->busy = true;
        c->queue[c->queued++] = (struct nbd_request){
            .magic = htobe32(NBD_REQUEST_MAGIC),
            .type = htobe16(options.write ? NBD_CMD_WRITE : NBD_CMD_READ),
            .cookie = slot->cookie,  // opaque to the server: kept in host order
            .offset = htobe64(slot->offset),
            .length = htobe32(options.block),
        };
        c->issued++;
    }
}

static ssize_t send_writes(struct connection *c) {
    struct iovec vectors[VECTORS];
    unsigned count = 0;
    size_t skip = c->sent;  // less than one item, see flush_queue
    for (unsigned i = 0; i < c->queued && count + 2 <= VECTORS; i++) {
        if (skip < sizeof c->queue[i]) {
            vectors[count++] = (struct iovec){(uint8_t *)&c->queue[i] + skip, sizeof c->queue[i] - skip};
            skip = 0;
        } else {
            skip -= sizeof c->queue[i];
        }
        vectors[count++] = (struct iovec){write_payload + skip, options.block - skip};
        skip = 0;
    }
    const struct msghdr message = {.msg_iov = vectors, .msg_iovlen = count};
    return sendmsg(c->stream.socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static ssize_t send_reads(struct connection *c) {
    return stream_send(&c->stream, (uint8_t *)c->queue + c->sent, c->queued * sizeof *c->queue - c->sent);
}

// Sends what the socket takes without waiting: a server that is itself
// waiting to send replies must find this side receiving.
static void flush_queue(struct connection *c) {
    while (c->queued > 0) {
        const ssize_t n = options.write ? send_writes(c) : send_reads(c);
        if (n < 0 && errno == EAGAIN) return;
        if (n < 0) die("sending failed: %s", strerror(errno));
        c->sent += (size_t)n;
        const unsigned done = (unsigned)(c->sent / queue_item_bytes());
        c->sent %= queue_item_bytes();
        c->queued -= done;
        if (c->queued > 0) memmove(c->queue, c->queue + done, c->queued * sizeof *c->queue);
    }
}

// --- Receiving

static struct slot *slot_of(struct connection *c, uint64_t cookie) {
    const unsigned index = cookie & ((1u << SLOT_BITS) - 1);
    if (index >= options.depth || !c->slots[index].busy || c->slots[index].cookie != cookie)
        die("a reply to a request that is not in flight (cookie %#llx)", (unsigned long long)cookie);
    return &c->slots[index];
}

static void fail(const struct slot *slot, uint32_t error, const char *text, unsigned text_length) {
    die("%s of %u bytes at offset %llu failed: error %u (%s) %.*s", verb(), options.block,
        (unsigned long long)slot->offset, error, strerror((int)error), (int)text_length, text);
}

static void complete(struct connection *c, struct slot *slot, uint64_t time) {
    if (!options.write && slot->received != options.block)
        die("read at offset %llu: %u of %u bytes arrived", (unsigned long long)slot->offset, slot->received,
            options.block);
    slot->busy = false;
    c->free_slots[c->free_count++] = (uint16_t)(slot - c->slots);
    c->completed++;
    c->histogram[bucket_of(time - slot->started)]++;
}

static void check_range(struct slot *slot, uint64_t offset, uint64_t length) {
    if (offset < slot->offset || length > options.block || offset - slot->offset > options.block - length)
        die("read at offset %llu: a chunk lies outside the request", (unsigned long long)slot->offset);
    if (slot->received + length > options.block)
        die("read at offset %llu: more bytes than asked for", (unsigned long long)slot->offset);
    slot->received += (uint32_t)length;
}

static void expect_payload(struct connection *c, struct slot *slot, uint64_t offset, uint32_t length, bool last) {
    check_range(slot, offset, length);
    c->payload_slot = slot;
    c->payload_offset = offset;
    c->payload_left = length;
    c->payload_is_last = last;
}

static void check_payload(uint64_t offset, const uint8_t *bytes, size_t length) {
    if (offset + length <= reference_size && memcmp(reference + offset, bytes, length) == 0) return;
    size_t i = 0;
    while (offset + i < reference_size && reference[offset + i] == bytes[i]) i++;
    die("wrong data at offset %llu", (unsigned long long)(offset + i));
}

static void check_hole(uint64_t offset, uint32_t length) {
    for (uint64_t i = offset; i < offset + length; i++)
        if (i >= reference_size || reference[i] != 0)
            die("a hole where there is data, at offset %llu", (unsigned long long)i);
}

// Bytes of the reply header that must be in the buffer to act on it.
static size_t header_bytes(const uint8_t *p, size_t available) {
    if (available < 4) return 4;
    const uint32_t magic = get32(p);
    if (magic == NBD_SIMPLE_REPLY_MAGIC) return 16;
    if (magic != NBD_STRUCTURED_REPLY_MAGIC) die("not a reply: magic %#x", magic);
    if (available < 20) return 20;
    const uint32_t length = get32(p + 16);
    switch (get16(p + 6)) {
    case NBD_REPLY_TYPE_OFFSET_DATA: return 20 + 8;
    case NBD_REPLY_TYPE_OFFSET_HOLE: return 20 + 12;
    default:
        if (length > CHUNK_HEADER_LIMIT - 20) die("a chunk of type %u with %u bytes", get16(p + 6), length);
        return 20 + length;
    }
}

static void take_simple(struct connection *c, const uint8_t *p, uint64_t time) {
    uint64_t cookie;
    memcpy(&cookie, p + 8, 8);
    struct slot *slot = slot_of(c, cookie);
    if (get32(p + 4) != 0) fail(slot, get32(p + 4), "", 0);
    if (options.write) complete(c, slot, time);
    else if (c->export.structured) die("a simple reply to a read, though structured replies were agreed");
    else expect_payload(c, slot, slot->offset, options.block, true);
}

static void take_chunk(struct connection *c, const uint8_t *p, uint64_t time) {
    if (!c->export.structured) die("a structured reply that was not agreed");
    const bool last = get16(p + 4) & NBD_REPLY_FLAG_DONE;
    const uint16_t type = get16(p + 6);
    const uint32_t length = get32(p + 16);
    uint64_t cookie;
    memcpy(&cookie, p + 8, 8);
    struct slot *slot = slot_of(c, cookie);
    if (type & NBD_REPLY_TYPE_IS_ERROR) {
        const unsigned text = length >= 6 ? get16(p + 24) : 0;
        fail(slot, length >= 4 ? get32(p + 20) : 0, (const char *)p + 26, text <= length - 6 ? text : 0);
    } else if (type == NBD_REPLY_TYPE_OFFSET_DATA && !options.write && length > 8) {
        expect_payload(c, slot, get64(p + 20), length - 8, last);
    } else if (type == NBD_REPLY_TYPE_OFFSET_HOLE && !options.write && length == 12) {
        check_range(slot, get64(p + 20), get32(p + 28));
        if (reference != NULL) check_hole(get64(p + 20), get32(p + 28));
        if (last) complete(c, slot, time);
    } else if (type == NBD_REPLY_TYPE_NONE && length == 0 && last) {
        complete(c, slot, time);
    } else {
        die("an unexpected chunk: type %u, %u bytes", type, length);
    }
}

static void pass_payload(struct connection *c, uint64_t time) {
    const size_t available = c->end - c->begin;
    const uint32_t n = available < c->payload_left ? (uint32_t)available : c->payload_left;
    if (reference != NULL) check_payload(c->payload_offset, c->buffer + c->begin, n);
    c->begin += n;
    c->payload_offset += n;
    c->payload_left -= n;
    if (c->payload_left == 0 && c->payload_is_last) complete(c, c->payload_slot, time);
}

static void take_replies(struct connection *c, uint64_t time) {
    while (c->begin < c->end) {
        if (c->payload_left > 0) {
            pass_payload(c, time);
            continue;
        }
        const uint8_t *p = c->buffer + c->begin;
        const size_t available = c->end - c->begin;
        const size_t need = header_bytes(p, available);
        if (need > available) return;
        c->begin += need;
        if (get32(p) == NBD_SIMPLE_REPLY_MAGIC) take_simple(c, p, time);
        else take_chunk(c, p, time);
    }
}

static void receive(struct connection *c) {
    // What is left is the beginning of a reply header at most.
    memmove(c->buffer, c->buffer + c->begin, c->end - c->begin);
    c->end -= c->begin;
    c->begin = 0;
    if (c->queued > 0 && !stream_has_bytes(&c->stream)) {
        struct pollfd ready = {.fd = c->stream.socket, .events = POLLIN | POLLOUT};
        if (poll(&ready, 1, -1) < 0) die("poll: %s", strerror(errno));
    }
    const ssize_t n = stream_receive(&c->stream, c->buffer + c->end, c->capacity - c->end, c->queued == 0);
    if (n < 0 && errno == EAGAIN) return;
    if (n < 0) die("receiving failed: %s", strerror(errno));
    if (n == 0) die("the server closed the connection with %u requests in flight", options.depth - c->free_count);
    c->end += (size_t)n;
}

// --- Running

static void *run_connection(void *argument) {
    struct connection *c = argument;
    pthread_barrier_wait(&start_line);
    uint64_t time = now();
    c->deadline = options.seconds > 0 ? time + (uint64_t)(options.seconds * 1e9) : UINT64_MAX;
    for (;;) {
        queue_requests(c, time);
        if (c->free_count == options.depth) break;  // nothing in flight, nothing left to start
        flush_queue(c);
        receive(c);
        time = now();  // one clock call per turn serves every reply and every new request
        take_replies(c, time);
    }
    c->finished_at = time;
    const struct nbd_request bye = {.magic = htobe32(NBD_REQUEST_MAGIC), .type = htobe16(NBD_CMD_DISC)};
    stream_send(&c->stream, &bye, sizeof bye);
    return NULL;
}

static void check_fit(const struct nbd_export *export) {
    if (options.write && (export->flags & NBD_FLAG_READ_ONLY)) die("the export is read-only");
    if (export->minimum_block > 0 && options.block % export->minimum_block != 0)
        die("--block must be a multiple of the export's %u bytes", export->minimum_block);
    if (options.block > export->maximum_payload)
        die("--block is above the export's limit of %u bytes", export->maximum_payload);
    if (options.span == 0) options.span = export->size;
    if (options.span > export->size) die("--span is beyond the export's %llu bytes", (unsigned long long)export->size);
    if (options.span / options.block < options.connections) die("--span must hold a block for every connection");
}

// Splits `total` so that equal totals are always split alike: with as many
// operations as blocks, a sequential run touches every block exactly once.
static uint64_t share(uint64_t total, unsigned index) {
    return total / options.connections + (index < total % options.connections);
}

static void prepare(struct connection *c, unsigned index, uint64_t first_block) {
    c->stream = nbd_open(&options.target, &c->export);
    check_fit(&c->export);
    const uint64_t blocks = options.span / options.block;
    c->first_block = options.sequential ? first_block : 0;
    c->blocks = options.sequential ? share(blocks, index) : blocks;
    c->limit = options.operations > 0 ? share(options.operations, index) : UINT64_MAX;
    c->random = (options.seed * 0x9e3779b97f4a7c15ull) ^ ((uint64_t)(index + 1) << 32);
    if (c->random == 0) c->random = 1;  // the one state that xorshift never leaves
    c->slots = allocate(options.depth, sizeof *c->slots);
    c->free_slots = allocate(options.depth, sizeof *c->free_slots);
    c->queue = allocate(options.depth, sizeof *c->queue);
    c->capacity = options.block < MINIMUM_BUFFER ? MINIMUM_BUFFER
                  : options.block > MAXIMUM_BUFFER ? MAXIMUM_BUFFER : options.block;
    c->buffer = malloc(c->capacity);
    if (c->buffer == NULL) die("out of memory");
    for (unsigned i = 0; i < options.depth; i++) c->free_slots[c->free_count++] = (uint16_t)i;
}

static struct connection *prepare_all(void) {
    struct connection *connections = allocate(options.connections, sizeof *connections);
    uint64_t first_block = 0;
    for (unsigned i = 0; i < options.connections; i++) {
        prepare(&connections[i], i, first_block);
        first_block += share(options.span / options.block, i);
    }
    return connections;
}

static void make_payload(void) {
    write_payload = allocate(1, options.block);
    struct connection generator = {.random = options.seed | 1};
    for (uint32_t i = 0; i < options.block; i++) write_payload[i] = (uint8_t)(next_random(&generator) >> 56);
}

static void map_reference(void) {
    const int file = open(options.verify_path, O_RDONLY | O_CLOEXEC);
    struct stat status;
    if (file < 0 || fstat(file, &status) < 0) die("%s: %s", options.verify_path, strerror(errno));
    reference_size = (uint64_t)status.st_size;
    reference = mmap(NULL, reference_size, PROT_READ, MAP_SHARED, file, 0);
    if (reference == MAP_FAILED) die("%s: %s", options.verify_path, strerror(errno));
    close(file);
}

// --- Report

static int in_order(const void *a, const void *b) {
    const uint64_t one = *(const uint64_t *)a, other = *(const uint64_t *)b;
    return (one > other) - (one < other);
}

// How far the slowest connection is behind the one in the middle.
static double slowest_to_median(const struct connection *connections) {
    uint64_t completed[MAX_CONNECTIONS];
    for (unsigned i = 0; i < options.connections; i++) completed[i] = connections[i].completed;
    qsort(completed, options.connections, sizeof *completed, in_order);
    const uint64_t median = completed[options.connections / 2];
    return median > 0 ? (double)completed[0] / (double)median : 0;
}

static void report(const struct connection *connections, uint64_t started, double cpu_seconds) {
    static uint64_t histogram[BUCKETS];
    uint64_t operations = 0, finished = started;
    for (unsigned i = 0; i < options.connections; i++) {
        const struct connection *c = &connections[i];
        operations += c->completed;
        if (c->finished_at > finished) finished = c->finished_at;
        for (unsigned b = 0; b < BUCKETS; b++) histogram[b] += c->histogram[b];
    }
    const double seconds = (double)(finished - started) * 1e-9;
    printf("{\"operations\": %llu, \"bytes\": %llu, \"seconds\": %.6f, \"cpu_seconds\": %.6f, "
           "\"latency_p50_us\": %.2f, \"latency_p99_us\": %.2f, \"slowest_to_median\": %.3f, \"structured\": %s",
           (unsigned long long)operations, (unsigned long long)operations * options.block, seconds, cpu_seconds,
           quantile_us(histogram, operations, 0.50), quantile_us(histogram, operations, 0.99),
           slowest_to_median(connections), connections[0].export.structured ? "true" : "false");
    if (options.server != NULL) printf(", \"start_seconds\": %.6f", (double)(finished - server_exec_time()) * 1e-9);
    printf("}\n");
}

static double cpu_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

int main(int count, char **arguments) {
    parse_options(count, arguments);
    if (options.write) make_payload();
    if (options.verify_path != NULL) map_reference();
    if (options.server != NULL) start_server(options.server);
    struct connection *connections = prepare_all();
    pthread_barrier_init(&start_line, NULL, options.connections + 1);
    for (unsigned i = 0; i < options.connections; i++)
        if (pthread_create(&connections[i].thread, NULL, run_connection, &connections[i]) != 0)
            die("cannot start %u threads", options.connections);

    const double cpu_before = cpu_now();
    const uint64_t started = now();
    pthread_barrier_wait(&start_line);
    for (unsigned i = 0; i < options.connections; i++) pthread_join(connections[i].thread, NULL);
    const double cpu_seconds = cpu_now() - cpu_before;

    if (options.server != NULL) stop_server();
    report(connections, started, cpu_seconds);
    return 0;
}
