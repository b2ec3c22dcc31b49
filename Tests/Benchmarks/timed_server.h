// A server that the load generator starts itself, to time its start.
#ifndef TIMED_SERVER_H
#define TIMED_SERVER_H

#include <stdint.h>

void start_server(char **command);

// When the server's exec began, on CLOCK_MONOTONIC, in nanoseconds.
uint64_t server_exec_time(void);

void stop_server(void);

#endif
