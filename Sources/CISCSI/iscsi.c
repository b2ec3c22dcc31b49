// libiscsi's functions found at run time, and sessions made of them.
#include "CISCSI.h"

#include <dlfcn.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

// What libiscsi's headers have declared in the same way since its version 1.10 (soname 4).
struct iscsi_context;
typedef void iscsi_command_cb(struct iscsi_context *, int status, void *command_data, void *private_data);

// The beginning of libiscsi's structure; what follows is not touched here.
struct scsi_task {
    int status, cdb_size, xfer_dir, expxferlen;
    unsigned char cdb[16];
    int residual_status;  // 0 none, 1 fewer bytes than asked for, 2 more
    size_t residual;
    struct {
        unsigned char error_type;
        int key, ascq;
        unsigned char flags, bit;
        uint16_t field;
    } sense;
    // What came, one piece behind the other, of tasks without buffers of their own.
    struct {
        int size;
        unsigned char *data;
    } datain;
};

enum { SESSION_NORMAL = 2, XFER_NONE = 0, XFER_READ = 1, RESIDUAL_UNDERFLOW = 1 };
enum { DIGEST_NONE_OR_CRC32C = 1, DIGEST_CRC32C = 3 };
enum { STATUS_CHECK_CONDITION = 2 };

#define FUNCTIONS(USE)                                                                                                 \
    USE(struct iscsi_context *, iscsi_create_context, (const char *))                                                  \
    USE(int, iscsi_destroy_context, (struct iscsi_context *))                                                          \
    USE(int, iscsi_set_targetname, (struct iscsi_context *, const char *))                                             \
    USE(int, iscsi_set_session_type, (struct iscsi_context *, int))                                                    \
    USE(int, iscsi_set_header_digest, (struct iscsi_context *, int))                                                   \
    USE(int, iscsi_set_initiator_username_pwd, (struct iscsi_context *, const char *, const char *))                   \
    USE(int, iscsi_set_target_username_pwd, (struct iscsi_context *, const char *, const char *))                      \
    USE(int, iscsi_set_isid_random, (struct iscsi_context *, uint32_t, uint32_t))                                      \
    USE(void, iscsi_set_noautoreconnect, (struct iscsi_context *, int))                                                \
    USE(int, iscsi_connect_async, (struct iscsi_context *, const char *, iscsi_command_cb *, void *))                  \
    USE(int, iscsi_login_async, (struct iscsi_context *, iscsi_command_cb *, void *))                                  \
    USE(int, iscsi_logout_async, (struct iscsi_context *, iscsi_command_cb *, void *))                                 \
    USE(const char *, iscsi_get_target_address, (struct iscsi_context *))                                              \
    USE(int, iscsi_get_fd, (struct iscsi_context *))                                                                   \
    USE(int, iscsi_which_events, (struct iscsi_context *))                                                             \
    USE(int, iscsi_service, (struct iscsi_context *, int))                                                             \
    USE(const char *, iscsi_get_error, (struct iscsi_context *))                                                       \
    USE(int, iscsi_scsi_command_async,                                                                                 \
        (struct iscsi_context *, int, struct scsi_task *, iscsi_command_cb *, void *, void *))                         \
    USE(struct scsi_task *, scsi_create_task, (int, unsigned char *, int, int))                                        \
    USE(void, scsi_free_scsi_task, (struct scsi_task *))

#define DECLARE(result, name, parameters) static result(*name) parameters;
FUNCTIONS(DECLARE)
// Only in versions after 1.19.
static int (*iscsi_set_data_digest)(struct iscsi_context *, int);

static char load_error[256];

static void load(void) {
    // The functions used here are the same behind all of these names.
    const char *const names[] = {"libiscsi.so.7",  "libiscsi.so.8", "libiscsi.so.9",
                                 "libiscsi.so.10", "libiscsi.so.11"};
    void *library = NULL;
    for (size_t i = 0; i < sizeof names / sizeof *names && !library; i++) library = dlopen(names[i], RTLD_NOW);
    if (!library) {
        snprintf(load_error, sizeof load_error, "libiscsi is not there (install the package libiscsi7)");
        return;
    }
#define FIND(result, name, parameters)                                                                                 \
    name = (__typeof__(name))dlsym(library, #name);                                                                    \
    if (!name) snprintf(load_error, sizeof load_error, "libiscsi has no " #name);
    FUNCTIONS(FIND)
    iscsi_set_data_digest = (__typeof__(iscsi_set_data_digest))dlsym(library, "iscsi_set_data_digest");
}

const char *dg_iscsi_load(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, load);
    return load_error[0] ? load_error : NULL;
}

// A command that is on its way.
struct command {
    struct command *next, **link;
    struct scsi_task *task;
    dg_iscsi_done *done;
    void *request;
    void *data;
    size_t size;
};

struct dg_iscsi {
    struct iscsi_context *context;
    struct command *commands;
    dg_iscsi_step *step;
    void *owner;
    // Bytes that the connection has brought, and how many more may come as long as nothing else is asked for.
    uint64_t received, allowance;
    const char *error;
};

// What may come unasked, and for a login, in bytes.
enum { UNASKED = 1 << 20 };

// What may come for a command: headers and padding around pieces of 512 bytes and more are less than the data itself.
static uint64_t claim(const struct command *command) { return 2 * (uint64_t)command->size + (64 << 10); }

dg_iscsi *dg_iscsi_create(const dg_iscsi_options *options, const char **error) {
    if (options->data_digest && !iscsi_set_data_digest) {
        *error = "this version of libiscsi knows no data digests; leave data-digest= out";
        return NULL;
    }
    *error = "libiscsi takes the initiator's name, the target's name or the passwords not";
    dg_iscsi *session = calloc(1, sizeof *session);
    if (!session) return NULL;
    struct iscsi_context *context = session->context = iscsi_create_context(options->initiator);
    bool taken = context && iscsi_set_targetname(context, options->target) == 0
                 && iscsi_set_session_type(context, SESSION_NORMAL) == 0
                 && iscsi_set_isid_random(context, options->session_id, options->session_id >> 24) == 0
                 && iscsi_set_header_digest(
                        context, options->header_digest ? DIGEST_CRC32C : DIGEST_NONE_OR_CRC32C) == 0
                 && (!options->data_digest || iscsi_set_data_digest(context, DIGEST_CRC32C) == 0)
                 && (!options->user
                     || iscsi_set_initiator_username_pwd(context, options->user, options->password) == 0)
                 && (!options->target_user
                     || iscsi_set_target_username_pwd(context, options->target_user, options->target_password) == 0);
    if (!taken) {
        dg_iscsi_destroy(session);
        return NULL;
    }
    // Whoever reads has to know of it: the disk behind a new session may be another.
    iscsi_set_noautoreconnect(context, 1);
    session->allowance = UNASKED;
    return session;
}

static void forget(struct command *command) {
    *command->link = command->next;
    if (command->next) command->next->link = command->link;
    scsi_free_scsi_task(command->task);
    free(command);
}

void dg_iscsi_destroy(dg_iscsi *session) {
    if (session->context) iscsi_destroy_context(session->context);
    while (session->commands) forget(session->commands);
    free(session);
}

static void step_done(struct iscsi_context *context, int status, void *data, void *private_data) {
    (void)context;
    (void)data;
    dg_iscsi *session = private_data;
    dg_iscsi_step *step = session->step;
    session->step = NULL;
    if (step) step(session->owner, status);
}

static void begin(dg_iscsi *session, dg_iscsi_step *step, void *owner) {
    session->step = step;
    session->owner = owner;
}

int dg_iscsi_connect(dg_iscsi *session, const char *portal, dg_iscsi_step *step, void *owner) {
    begin(session, step, owner);
    return iscsi_connect_async(session->context, portal, step_done, session);
}

int dg_iscsi_login(dg_iscsi *session, dg_iscsi_step *step, void *owner) {
    begin(session, step, owner);
    return iscsi_login_async(session->context, step_done, session);
}

int dg_iscsi_logout(dg_iscsi *session, dg_iscsi_step *step, void *owner) {
    begin(session, step, owner);
    return iscsi_logout_async(session->context, step_done, session);
}

static void command_done(struct iscsi_context *context, int status, void *data, void *private_data) {
    (void)context;
    (void)data;
    struct command *command = private_data;
    const struct scsi_task *task = command->task;
    dg_iscsi_result result = {.status = status};
    if (status == 0 && task->datain.data && task->datain.size > 0) {
        // What counts is what came. It may still say that less of it is meant.
        size_t count = result.transferred = (size_t)task->datain.size;
        if (count > command->size) count = command->size;
        if (count) memcpy(command->data, task->datain.data, count);
        if (task->residual_status == RESIDUAL_UNDERFLOW) {
            size_t meant = command->size - (task->residual < command->size ? task->residual : command->size);
            if (meant < result.transferred) result.transferred = meant;
        }
    }
    if (status == STATUS_CHECK_CONDITION) {
        result.sense_key = (uint8_t)task->sense.key;
        result.additional_code = (uint8_t)(task->sense.ascq >> 8);
        result.additional_qualifier = (uint8_t)task->sense.ascq;
    }
    dg_iscsi_done *done = command->done;
    void *request = command->request;
    forget(command);
    done(request, &result);
}

int dg_iscsi_submit(
    dg_iscsi *session, int unit, const uint8_t *block, size_t block_size, void *data, size_t size,
    dg_iscsi_done *done, void *request) {
    unsigned char copy[16] = {0};
    if (block_size > sizeof copy || size > INT32_MAX) return -1;
    memcpy(copy, block, block_size);
    struct command *command = calloc(1, sizeof *command);
    if (!command) return -1;
    command->task = scsi_create_task((int)block_size, copy, size ? XFER_READ : XFER_NONE, (int)size);
    if (!command->task) {
        free(command);
        return -1;
    }
    command->done = done;
    command->request = request;
    command->data = data;
    command->size = size;
    command->next = session->commands;
    command->link = &session->commands;
    if (command->next) command->next->link = &command->next;
    session->commands = command;
    // Without a buffer of its own: into one, libiscsi does not count what comes.
    if (iscsi_scsi_command_async(session->context, unit, command->task, command_done, NULL, command) == 0) {
        session->allowance += claim(command);
        return 0;
    }
    forget(command);
    return -1;
}

int dg_iscsi_descriptor(dg_iscsi *session) { return iscsi_get_fd(session->context); }
int dg_iscsi_events(dg_iscsi *session) { return iscsi_which_events(session->context); }
// libiscsi puts the pieces of an answer together until the target says that it was the last one, however much was asked
// for. So what the connection brings is counted; what one command did not use is no other's.
static bool is_within_allowance(dg_iscsi *session) {
    struct tcp_info info = {0};
    socklen_t size = sizeof info;
    if (getsockopt(iscsi_get_fd(session->context), IPPROTO_TCP, TCP_INFO, &info, &size) < 0) return true;
    uint64_t came = info.tcpi_bytes_received - session->received;
    session->received = info.tcpi_bytes_received;
    if (came > session->allowance) {
        session->error = "the target sends more than it was asked for";
        return false;
    }
    uint64_t claims = UNASKED;
    for (struct command *command = session->commands; command; command = command->next) claims += claim(command);
    session->allowance -= came;
    // With nothing on its way, nothing is put together: whatever came is gone again.
    if (session->allowance > claims || !session->commands) session->allowance = claims;
    return true;
}

int dg_iscsi_service(dg_iscsi *session, int events) {
    if (iscsi_service(session->context, events) != 0) return -1;
    return is_within_allowance(session) ? 0 : -1;
}

const char *dg_iscsi_error(dg_iscsi *session) {
    return session->error ? session->error : iscsi_get_error(session->context);
}
const char *dg_iscsi_redirection(dg_iscsi *session) { return iscsi_get_target_address(session->context); }
