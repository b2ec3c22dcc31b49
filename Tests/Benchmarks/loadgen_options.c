// The load generator's command line; see loadgen_options.h.
#include "loadgen_options.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>

struct loadgen_options options = {
    .target = {.export_name = "", .ask_structured = true, .tls.identity = "backup"},
    .connections = 1, .depth = 1, .block = 4096, .seed = 1,
};

static const char help[] =
    "Usage: loadgen (--unix PATH | --tcp HOST:PORT) [OPTION]...\n"
    "       loadgen (--unix PATH | --tcp HOST:PORT) [OPTION]... --exec -- SERVER [ARGUMENT]...\n"
    "Loads an NBD server with requests and prints one line of JSON.\n"
    "\n"
    "  --export NAME        export to open (default: the one with the empty name)\n"
    "  --tls-certificates DIRECTORY  speak TLS, with the client's certificate in it\n"
    "  --tls-psk FILE                speak TLS, with a key from this file\n"
    "  --tls-identity NAME           the key's name (default: backup)\n"
    "  --simple             do not ask for structured replies\n"
    "  --connections N      connections, one thread each (default 1)\n"
    "  --depth N            requests in flight per connection (default 1)\n"
    "  --block BYTES        size of a request (default 4096)\n"
    "  --write              write instead of read\n"
    "  --sequential         in order, each connection in its part (default: random)\n"
    "  --span BYTES         use only the first BYTES of the export (default: all)\n"
    "  --seconds T          run for T seconds (default 2, unless --ops is given)\n"
    "  --ops N              run for N operations in all\n"
    "  --seed N             start value of the random offsets (default 1)\n"
    "  --verify FILE        compare all that is read with FILE\n"
    "  --connect-timeout T  keep trying to connect for T seconds (default 0)\n"
    "  --exec               start SERVER, do one read, report the time from its exec to\n"
    "                       the reply as start_seconds, and stop it\n"
    "\n"
    "Exit status: 0 when every operation succeeded, 1 otherwise, 2 for a wrong command line.\n";

static void __attribute__((noreturn)) usage_error(const char *message) {
    fprintf(stderr, "loadgen: %s (see loadgen --help)\n", message);
    exit(2);
}

static uint64_t number(const char *text, uint64_t minimum, uint64_t maximum) {
    char *end;
    errno = 0;
    const unsigned long long value = strtoull(text, &end, 10);
    if (errno != 0 || end == text || *end != 0 || *text == '-' || value < minimum || value > maximum) {
        fprintf(stderr, "loadgen: %s: expected a number from %llu to %llu\n", text, (unsigned long long)minimum,
                (unsigned long long)maximum);
        exit(2);
    }
    return value;
}

static double duration(const char *text) {
    char *end;
    const double value = strtod(text, &end);
    if (end == text || *end != 0 || !(value > 0 && value < 86400)) usage_error("a time must be a number of seconds");
    return value;
}

static void set_tcp(char *address) {
    char *colon = strrchr(address, ':');
    if (colon == NULL) usage_error("--tcp takes HOST:PORT");
    *colon = 0;
    options.target.host = address;
    options.target.port = colon + 1;
}

enum {
    UNIX, TCP, EXPORT, TLS_CERTIFICATES, TLS_PSK, TLS_IDENTITY, SIMPLE, CONNECTIONS, DEPTH, BLOCK, WRITE, SEQUENTIAL,
    SPAN, SECONDS, OPS, SEED, VERIFY, CONNECT_TIMEOUT, EXEC, HELP,
};

static const struct option known_options[] = {
    {"unix", 1, 0, UNIX}, {"tcp", 1, 0, TCP}, {"export", 1, 0, EXPORT},
    {"tls-certificates", 1, 0, TLS_CERTIFICATES}, {"tls-psk", 1, 0, TLS_PSK}, {"tls-identity", 1, 0, TLS_IDENTITY},
    {"simple", 0, 0, SIMPLE},
    {"connections", 1, 0, CONNECTIONS}, {"depth", 1, 0, DEPTH}, {"block", 1, 0, BLOCK}, {"write", 0, 0, WRITE},
    {"sequential", 0, 0, SEQUENTIAL}, {"span", 1, 0, SPAN}, {"seconds", 1, 0, SECONDS}, {"ops", 1, 0, OPS},
    {"seed", 1, 0, SEED}, {"verify", 1, 0, VERIFY}, {"connect-timeout", 1, 0, CONNECT_TIMEOUT},
    {"exec", 0, 0, EXEC}, {"help", 0, 0, HELP}, {0},
};

static void set_option(int option, char *value) {
    switch (option) {
    case UNIX: options.target.unix_path = value; break;
    case TCP: set_tcp(value); break;
    case EXPORT: options.target.export_name = value; break;
    case TLS_CERTIFICATES: options.target.tls.certificates = value; break;
    case TLS_PSK: options.target.tls.psk_file = value; break;
    case TLS_IDENTITY: options.target.tls.identity = value; break;
    case SIMPLE: options.target.ask_structured = false; break;
    case CONNECTIONS: options.connections = (unsigned)number(value, 1, MAX_CONNECTIONS); break;
    case DEPTH: options.depth = (unsigned)number(value, 1, MAX_DEPTH); break;
    case BLOCK: options.block = (uint32_t)number(value, 1, 32 << 20); break;
    case WRITE: options.write = true; break;
    case SEQUENTIAL: options.sequential = true; break;
    case SPAN: options.span = number(value, 1, INT64_MAX); break;
    case SECONDS: options.seconds = duration(value); break;
    case OPS: options.operations = number(value, 1, INT64_MAX); break;
    case SEED: options.seed = number(value, 0, UINT64_MAX); break;
    case VERIFY: options.verify_path = value; break;
    case CONNECT_TIMEOUT: options.target.connect_seconds = duration(value); break;
    case HELP: fputs(help, stdout); exit(0);
    case EXEC: break;
    default: usage_error("wrong option");
    }
}

void parse_options(int count, char **arguments) {
    bool exec = false;
    // "+": options end at the first other word, where --exec's command begins.
    for (int option; (option = getopt_long(count, arguments, "+", known_options, NULL)) != -1;) {
        set_option(option, optarg);
        exec |= option == EXEC;
    }
    if ((options.target.unix_path == NULL) == (options.target.host == NULL)) usage_error("give --unix or --tcp");
    if (options.verify_path != NULL && options.write) usage_error("--verify is for reading");
    if (wants_tls(&options.target.tls) && options.write) usage_error("writing through TLS is not supported");
    if (exec != (optind < count)) usage_error("--exec and a server's command line go together");
    if (exec) {
        options.server = arguments + optind;
        options.operations = options.connections = options.depth = 1;
        if (options.target.connect_seconds == 0) options.target.connect_seconds = 10;
    }
    if (options.operations == 0 && options.seconds == 0) options.seconds = 2;
}
