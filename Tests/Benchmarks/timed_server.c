// Starting, timing and stopping a server; see timed_server.h.
#define _GNU_SOURCE
#include "timed_server.h"

#include "nbd_client.h"

#include <errno.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static pid_t server;
static struct timespec *exec_time;  // shared with the child, which writes it just before exec

void start_server(char **command) {
    exec_time = mmap(NULL, sizeof *exec_time, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (exec_time == MAP_FAILED) die("mmap: %s", strerror(errno));
    server = fork();
    if (server < 0) die("fork: %s", strerror(errno));
    if (server > 0) return;
    prctl(PR_SET_PDEATHSIG, SIGTERM);  // whatever ends this program ends the server
    dup2(STDERR_FILENO, STDOUT_FILENO);  // standard output is for the JSON line alone
    clock_gettime(CLOCK_MONOTONIC, exec_time);
    execvp(command[0], command);
    die("%s: %s", command[0], strerror(errno));
}

uint64_t server_exec_time(void) {
    return (uint64_t)exec_time->tv_sec * 1000000000ull + (uint64_t)exec_time->tv_nsec;
}

void stop_server(void) {
    kill(server, SIGTERM);
    waitpid(server, NULL, 0);
}
