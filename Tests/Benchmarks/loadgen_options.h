// What the load generator is asked to do; set once by parse_options.
#ifndef LOADGEN_OPTIONS_H
#define LOADGEN_OPTIONS_H

#include "nbd_client.h"

enum {
    MAX_DEPTH = 4096,
    MAX_CONNECTIONS = 1024,
};

struct loadgen_options {
    struct nbd_target target;
    unsigned connections, depth;
    uint32_t block;
    bool write, sequential;
    uint64_t span, operations, seed;  // span and operations: 0 for no limit
    double seconds;                   // 0 for no limit
    const char *verify_path;
    char **server;  // --exec: the command to start and time
};

extern struct loadgen_options options;

// Ends the program with status 2 and a message when the command line is wrong.
void parse_options(int count, char **arguments);

#endif
