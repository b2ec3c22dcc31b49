// What Swift's Glibc module cannot reach: io_uring, ioctls, openat2, statx alignment, vsock and
// variadic calls. Each function does one system call (or one liburing step) and returns its result;
// a failure is a negative errno unless said otherwise.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

// ---- io_uring (opaque: liburing.h redefines structures that the Glibc module has) ----

typedef struct dg_ring dg_ring;

typedef struct {
    uint64_t user_data;
    int32_t result;
} dg_completion;

// A ring for one thread with room for `entries` submissions, or NULL with *error set to an errno.
dg_ring *dg_ring_create(unsigned entries, int *error);
void dg_ring_destroy(dg_ring *ring);
// Queue one operation; false when the submission queue is full (submit, then try again).
bool dg_ring_read(dg_ring *ring, int fd, void *buffer, unsigned length, uint64_t offset, uint64_t user_data);
bool dg_ring_poll_in(dg_ring *ring, int fd, uint64_t user_data);
// Submits what is queued and waits for at least `wait` completions.
int dg_ring_submit_and_wait(dg_ring *ring, unsigned wait);
// Copies up to `capacity` completions and marks them seen.
unsigned dg_ring_reap(dg_ring *ring, dg_completion *completions, unsigned capacity);

// ---- block nodes ----

int dg_block_size64(int fd, uint64_t *bytes);
int dg_block_logical_size(int fd, unsigned *bytes);
int dg_block_physical_size(int fd, unsigned *bytes);
int dg_block_io_opt(int fd, unsigned *bytes);
int dg_block_read_only_get(int fd, bool *read_only);
// Makes a node read-only in the kernel until dg_block_unguard, or until this process exits or is ended by SIGINT,
// SIGTERM or SIGHUP. -EMFILE when too many nodes are guarded.
int dg_block_guard(int fd);
void dg_block_unguard(int fd);
// Makes a node writable that a process which was killed has left guarded.
int dg_block_make_writable(int fd);
// Writes back and drops what the page cache has of a node (BLKFLSBUF).
int dg_block_drop_cache(int fd);
int dg_block_discard(int fd, uint64_t offset, uint64_t length);
int dg_block_zero_out(int fd, uint64_t offset, uint64_t length);
int dg_block_disk_sequence(int fd, uint64_t *sequence);
// Lets a range of a file share its blocks with another file (FICLONERANGE); a negative errno where that cannot be.
int dg_clone_range(int source, uint64_t from, uint64_t length, int target, uint64_t to);

// ---- SCSI commands through block nodes (SG_IO) ----

typedef struct {
    uint8_t status;        // SCSI's (SAM-5)
    uint8_t sense_length;  // bytes of `sense` that the unit gave
    uint8_t sense[64];
    int32_t residual;  // bytes of the buffer that were not filled
} dg_scsi_answer;

// Carries out a command that asks for data, or for nothing. -EIO when no answer came from the unit.
int dg_scsi_read(
    int fd, const uint8_t *block, uint8_t block_length, void *buffer, uint32_t length, uint32_t timeout_ms,
    dg_scsi_answer *answer);

// ---- files ----

// openat2 with RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS below `directory`; a descriptor or a negative errno.
int dg_open_beneath(int directory, const char *path, int flags);
// Memory and offset alignment that O_DIRECT needs on this file; 0 and 0 where O_DIRECT is not supported.
int dg_direct_alignment(int fd, uint32_t *memory, uint32_t *offset);
// Whether a file lies in memory (tmpfs, ramfs).
bool dg_is_in_memory(int fd);
// Whether direct writes to a file are neither staged, nor compressed, nor sent to a server (ext2 to ext4, XFS).
bool dg_writes_directly(int fd);
int dg_set_flags(int fd, int flags);
int dg_get_flags(int fd);
int dg_set_close_on_exec(int fd);
int dg_memfd(const char *name);
// open(2) with a mode, which Swift sees as variadic.
int dg_open(const char *path, int flags, unsigned mode);
unsigned dg_device_major(uint64_t device);
unsigned dg_device_minor(uint64_t device);

// ---- the kernel's events of devices ----

// A socket that hears the kernel's events (NETLINK_KOBJECT_UEVENT, group 1), or -errno.
int dg_uevent_open(void);
// One message from the kernel; what others send to the group is passed over. Bytes, or -errno.
long dg_uevent_read(int fd, void *buffer, unsigned long size);

// ---- sockets ----

// bind, connect, getsockname and getpeername with plain pointers (glibc's transparent unions do not import).
int dg_bind(int fd, const void *address, unsigned length);
int dg_connect(int fd, const void *address, unsigned length);
int dg_local_address(int fd, void *address, unsigned *length);
int dg_peer_address(int fd, void *address, unsigned *length);
// Whether the other end has closed a stream socket that this end has shut down for writing.
bool dg_peer_has_closed(int fd);
// accept4 with SOCK_CLOEXEC.
int dg_accept(int fd);

int dg_vsock_listen(uint32_t port, int backlog);
// A connected socket; the kernel gives up after 2 s.
int dg_vsock_connect(int fd, uint32_t cid, uint32_t port);
int dg_vsock_peer(int fd, uint32_t *cid, uint32_t *port);
// Credentials of the process at the other end of a Unix socket.
int dg_unix_peer(int fd, int32_t *pid, uint32_t *uid, uint32_t *gid);

// ---- processes and signals ----

// A descriptor that becomes readable when one of the signals arrives; the signals must be blocked.
int dg_signalfd(const int *signals, int count);
int dg_signal_read(int fd);
int dg_eventfd(void);
// A descriptor that becomes readable when a process ends.
int dg_pidfd(int pid);
// Unmaps code and constants of the program and its libraries from this process; what is still used comes back from the
// page cache.
// A server that starts with a large command-line parser and then runs a small loop gets most of its memory back.
void dg_forget_startup_pages(void);
// Blocks read by this thread from storage so far (512-byte units): tells cached reads from real ones.
long dg_thread_blocks_read(void);
