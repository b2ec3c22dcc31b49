// iSCSI sessions through libiscsi, which is found at run time, so that neither its headers nor the library itself are
// needed where nobody uses it. A session belongs to one thread; nothing here waits. Its functions are declared in
// iscsi.c.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Finds the library. NULL, or why it cannot be used.
const char *dg_iscsi_load(void);

typedef struct dg_iscsi dg_iscsi;

typedef struct {
    const char *initiator;        // iSCSI name of this machine
    const char *target;           // iSCSI name of the target
    const char *user;             // for CHAP, NULL for none
    const char *password;
    const char *target_user;      // what the target is asked to prove in turn, NULL for nothing
    const char *target_password;
    uint32_t session_id;  // of several of one initiator; a later session with the same takes an earlier one's place
    bool header_digest;  // offered; a target may decline either
    bool data_digest;
} dg_iscsi_options;

// The status of a step of a session that the target sends elsewhere (see dg_iscsi_redirection).
enum { DG_ISCSI_REDIRECT = 0x101 };

// A step of a session (connected, logged in, logged out) is done: status is 0, or what libiscsi says went wrong.
typedef void dg_iscsi_step(void *owner, int status);

// What became of a command. Status 0 to 0xFF is SCSI's (SAM-5); others are libiscsi's: the session is lost.
typedef struct {
    int status;
    size_t transferred;  // bytes that came, perhaps more than there is room for
    uint8_t sense_key, additional_code, additional_qualifier;
} dg_iscsi_result;

typedef void dg_iscsi_done(void *request, const dg_iscsi_result *result);

// A session that is not connected yet. NULL, with a text in *error, where it cannot be as the options ask.
dg_iscsi *dg_iscsi_create(const dg_iscsi_options *options, const char **error);
// Ends the session at once. Callbacks of commands that are on their way may be called, or never.
void dg_iscsi_destroy(dg_iscsi *session);

// Begin a step; 0, or -1 with dg_iscsi_error. `portal` is ADDRESS:PORT, an IPv6 address in brackets.
int dg_iscsi_connect(dg_iscsi *session, const char *portal, dg_iscsi_step *step, void *owner);
int dg_iscsi_login(dg_iscsi *session, dg_iscsi_step *step, void *owner);
int dg_iscsi_logout(dg_iscsi *session, dg_iscsi_step *step, void *owner);
// Begins a command on a logical unit that asks for `size` bytes, or for none with 0. They are put into `data` right
// before `done` is called with the status 0; nothing touches it when the session was destroyed. 0 or -1.
int dg_iscsi_submit(
    dg_iscsi *session, int unit, const uint8_t *block, size_t block_size, void *data, size_t size,
    dg_iscsi_done *done, void *request);

// The socket, and the events of poll(2) to wait for on it.
int dg_iscsi_descriptor(dg_iscsi *session);
int dg_iscsi_events(dg_iscsi *session);
// Does what can be done without waiting; -1 when the session is lost, also where the target sends more than twice what
// it was asked for, with 64 KiB for each command and 1 MiB for the session on top. What came is counted after
// libiscsi has read all that was there: so much is held at most, and what comes without a pause.
int dg_iscsi_service(dg_iscsi *session, int events);
// Why something went wrong last.
const char *dg_iscsi_error(dg_iscsi *session);
// Where the target sends a login that ended with DG_ISCSI_REDIRECT: ADDRESS:PORT, perhaps with ,TAG behind it.
const char *dg_iscsi_redirection(dg_iscsi *session);
