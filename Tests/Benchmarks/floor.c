// The physical floor for serving a file over a unix socket: no protocol, no
// negotiation, one process that sends a header of an NBD reply's size and then
// the file's pages with sendfile, 256 KiB at a time, to a process that receives
// them into one buffer that stays in the CPU cache. What a server costs above
// this is the server's own doing. Prints one line of JSON.
//
// Usage: floor FILE [PASSES]      (PASSES: how often to send the file, default 1)
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    UNIT = 256 * 1024,
    HEADER = 20 + 8,  // a structured reply's header and its chunk's offset
    SEND_BUFFER = 2 * 1024 * 1024,
};

static void fail(const char *what) {
    fprintf(stderr, "floor: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double clock_seconds(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void receive_until_end(int socket) {
    static uint8_t buffer[UNIT + HEADER];
    ssize_t n;
    while ((n = recv(socket, buffer, sizeof buffer, 0)) > 0) {}
    if (n < 0) fail("recv");
}

static void send_unit(int socket, int file, off_t offset, size_t length) {
    static const uint8_t header[HEADER];
    if (send(socket, header, sizeof header, MSG_MORE | MSG_NOSIGNAL) != HEADER) fail("send");
    while (length > 0) {
        const ssize_t n = sendfile(socket, file, &offset, length);
        if (n < 0) fail("sendfile");
        if (n == 0) {
            fprintf(stderr, "floor: the file became shorter\n");
            exit(1);
        }
        length -= (size_t)n;
    }
}

static void send_file(int socket, int file, off_t size) {
    for (off_t offset = 0; offset < size; offset += UNIT)
        send_unit(socket, file, offset, size - offset < UNIT ? (size_t)(size - offset) : UNIT);
}

// The effective size: without privilege the system's limit applies.
static int enlarge_send_buffer(int socket) {
    const int wanted = SEND_BUFFER;
    if (setsockopt(socket, SOL_SOCKET, SO_SNDBUFFORCE, &wanted, sizeof wanted) != 0)
        setsockopt(socket, SOL_SOCKET, SO_SNDBUF, &wanted, sizeof wanted);
    int actual = 0;
    socklen_t length = sizeof actual;
    getsockopt(socket, SOL_SOCKET, SO_SNDBUF, &actual, &length);
    return actual / 2;  // the kernel doubles it for its own bookkeeping
}

int main(int count, char **arguments) {
    const int passes = count > 2 ? atoi(arguments[2]) : 1;
    if (count < 2 || count > 3 || passes < 1) {
        fprintf(stderr, "Usage: floor FILE [PASSES]\n");
        return 2;
    }
    const int file = open(arguments[1], O_RDONLY | O_CLOEXEC);
    struct stat status;
    if (file < 0 || fstat(file, &status) < 0) fail(arguments[1]);
    int sockets[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) < 0) fail("socketpair");
    const int send_buffer = enlarge_send_buffer(sockets[0]);

    const pid_t receiver = fork();
    if (receiver < 0) fail("fork");
    if (receiver == 0) {
        close(sockets[0]);
        receive_until_end(sockets[1]);
        _exit(0);
    }
    close(sockets[1]);

    const double started = clock_seconds(CLOCK_MONOTONIC), cpu_before = clock_seconds(CLOCK_PROCESS_CPUTIME_ID);
    for (int i = 0; i < passes; i++) send_file(sockets[0], file, status.st_size);
    close(sockets[0]);
    const double cpu_seconds = clock_seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu_before;

    struct rusage usage;
    int result;
    if (wait4(receiver, &result, 0, &usage) < 0 || result != 0) fail("the receiver");
    const double seconds = clock_seconds(CLOCK_MONOTONIC) - started;
    const double receiver_cpu = (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
                                (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6;
    const double gibibytes = (double)status.st_size * passes / (1 << 30);
    printf("{\"bytes\": %lld, \"seconds\": %.6f, \"gib_per_second\": %.3f, \"sender_cpu_seconds\": %.6f, "
           "\"sender_cpu_per_gib\": %.4f, \"receiver_cpu_seconds\": %.6f, \"send_buffer\": %d}\n",
           (long long)status.st_size * passes, seconds, gibibytes / seconds, cpu_seconds, cpu_seconds / gibibytes,
           receiver_cpu, send_buffer);
    return 0;
}
