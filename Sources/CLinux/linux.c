// System calls that need a C macro, a variadic argument or a header that Swift does not import (see CLinux.h).
#include "CLinux.h"

#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <linux/netlink.h>
#include <linux/openat2.h>
#include <linux/vm_sockets.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <scsi/sg.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#ifndef BLKGETDISKSEQ
#define BLKGETDISKSEQ _IOR(0x12, 128, __u64)
#endif

static int checked(long result) { return result < 0 ? -errno : (int)result; }

int dg_block_size64(int fd, uint64_t *bytes) { return checked(ioctl(fd, BLKGETSIZE64, bytes)); }

int dg_block_logical_size(int fd, unsigned *bytes) {
    int value = 0;
    int result = checked(ioctl(fd, BLKSSZGET, &value));
    *bytes = value > 0 ? (unsigned)value : 0;
    return result;
}

int dg_block_physical_size(int fd, unsigned *bytes) { return checked(ioctl(fd, BLKPBSZGET, bytes)); }
int dg_block_io_opt(int fd, unsigned *bytes) { return checked(ioctl(fd, BLKIOOPT, bytes)); }

int dg_block_read_only_get(int fd, bool *read_only) {
    int value = 0;
    int result = checked(ioctl(fd, BLKROGET, &value));
    *read_only = value != 0;
    return result;
}

// Nodes that this process has made read-only. Atomic, because a signal handler walks them, and cannot take the lock.
#define GUARDED_MAX 64
static atomic_int guarded[GUARDED_MAX];  // descriptor + 1; 0 is free
static pthread_mutex_t guard_lock = PTHREAD_MUTEX_INITIALIZER;

static void release_guarded(void) {
    for (int i = 0; i < GUARDED_MAX; i++) {
        int writable = 0, descriptor = guarded[i] - 1;
        if (descriptor >= 0) ioctl(descriptor, BLKROSET, &writable);
    }
}

static void release_and_end(int signal_number) {
    int interrupted = errno;
    release_guarded();
    signal(signal_number, SIG_DFL);
    raise(signal_number);
    errno = interrupted;  // the signal ends the process only after the return
}

int dg_block_guard(int fd) {
    static bool prepared = false;
    int read_only = 1, result = -EMFILE;
    pthread_mutex_lock(&guard_lock);
    if (!prepared) {
        prepared = true;
        atexit(release_guarded);
        // A server has these blocked and ends by itself; every other command is ended by them.
        signal(SIGINT, release_and_end);
        signal(SIGTERM, release_and_end);
        signal(SIGHUP, release_and_end);
    }
    for (int i = 0; i < GUARDED_MAX; i++) {
        if (guarded[i]) continue;
        guarded[i] = fd + 1;
        result = checked(ioctl(fd, BLKROSET, &read_only));
        if (result < 0) guarded[i] = 0;
        break;
    }
    pthread_mutex_unlock(&guard_lock);
    return result;
}

void dg_block_unguard(int fd) {
    int writable = 0;
    pthread_mutex_lock(&guard_lock);
    for (int i = 0; i < GUARDED_MAX; i++) {
        if (guarded[i] != fd + 1) continue;
        ioctl(fd, BLKROSET, &writable);
        guarded[i] = 0;
    }
    pthread_mutex_unlock(&guard_lock);
}

int dg_block_make_writable(int fd) {
    int writable = 0;
    return checked(ioctl(fd, BLKROSET, &writable));
}

int dg_block_drop_cache(int fd) { return checked(ioctl(fd, BLKFLSBUF, 0)); }

int dg_block_discard(int fd, uint64_t offset, uint64_t length) {
    uint64_t range[2] = {offset, length};
    return checked(ioctl(fd, BLKDISCARD, range));
}

int dg_block_zero_out(int fd, uint64_t offset, uint64_t length) {
    uint64_t range[2] = {offset, length};
    return checked(ioctl(fd, BLKZEROOUT, range));
}

int dg_clone_range(int source, uint64_t from, uint64_t length, int target, uint64_t to) {
    struct file_clone_range range = {.src_fd = source, .src_offset = from, .src_length = length, .dest_offset = to};
    return checked(ioctl(target, FICLONERANGE, &range));
}

int dg_block_disk_sequence(int fd, uint64_t *sequence) { return checked(ioctl(fd, BLKGETDISKSEQ, sequence)); }

int dg_scsi_read(
    int fd, const uint8_t *block, uint8_t block_length, void *buffer, uint32_t length, uint32_t timeout_ms,
    dg_scsi_answer *answer) {
    unsigned char copy[16] = {0};
    if (block_length > sizeof copy) return -EINVAL;
    memcpy(copy, block, block_length);
    memset(answer, 0, sizeof *answer);
    struct sg_io_hdr request = {
        .interface_id = 'S',
        .dxfer_direction = length ? SG_DXFER_FROM_DEV : SG_DXFER_NONE,
        .cmd_len = block_length,
        .mx_sb_len = sizeof answer->sense,
        .dxfer_len = length,
        .dxferp = buffer,
        .cmdp = copy,
        .sbp = answer->sense,
        .timeout = timeout_ms,
    };
    if (ioctl(fd, SG_IO, &request) < 0) return -errno;
    answer->status = request.status;
    answer->sense_length = request.sb_len_wr;
    answer->residual = request.resid;
    // What the adapter says counts where the unit has said nothing. The driver's 8 only says that there is sense data.
    if (request.status == 0 && (request.host_status != 0 || (request.driver_status & 7) != 0)) return -EIO;
    return 0;
}

int dg_open_beneath(int directory, const char *path, int flags) {
    struct open_how how = {0};
    how.flags = (uint64_t)flags | O_CLOEXEC;
    how.resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS;
    return checked(syscall(SYS_openat2, directory, path, &how, sizeof how));
}

// Debian 12's headers know STATX_DIOALIGN only in part, so the answer is taken from its documented place.
int dg_direct_alignment(int fd, uint32_t *memory, uint32_t *offset) {
    unsigned char answer[256] = {0};
    *memory = *offset = 0;
    long result = syscall(SYS_statx, fd, "", AT_EMPTY_PATH, 0x2000U, answer);
    if (result < 0) return -errno;
    uint32_t mask;
    memcpy(&mask, answer, sizeof mask);
    if (!(mask & 0x2000U)) return 0;
    memcpy(memory, answer + 0x98, sizeof *memory);
    memcpy(offset, answer + 0x9C, sizeof *offset);
    return 0;
}

bool dg_is_in_memory(int fd) {
    struct statfs status;
    return fstatfs(fd, &status) == 0 && (status.f_type == TMPFS_MAGIC || status.f_type == RAMFS_MAGIC);
}

bool dg_writes_directly(int fd) {
    struct statfs status;
    return fstatfs(fd, &status) == 0 && (status.f_type == EXT4_SUPER_MAGIC || status.f_type == XFS_SUPER_MAGIC);
}

int dg_set_flags(int fd, int flags) { return checked(fcntl(fd, F_SETFL, flags)); }
int dg_get_flags(int fd) { return checked(fcntl(fd, F_GETFL)); }
int dg_set_close_on_exec(int fd) { return checked(fcntl(fd, F_SETFD, FD_CLOEXEC)); }
int dg_memfd(const char *name) { return checked(memfd_create(name, MFD_CLOEXEC)); }
int dg_open(const char *path, int flags, unsigned mode) { return checked(open(path, flags | O_CLOEXEC, mode)); }

unsigned dg_device_major(uint64_t device) { return major(device); }
unsigned dg_device_minor(uint64_t device) { return minor(device); }

int dg_bind(int fd, const void *address, unsigned length) { return checked(bind(fd, address, length)); }
int dg_connect(int fd, const void *address, unsigned length) { return checked(connect(fd, address, length)); }
int dg_local_address(int fd, void *address, unsigned *length) { return checked(getsockname(fd, address, length)); }
int dg_peer_address(int fd, void *address, unsigned *length) { return checked(getpeername(fd, address, length)); }

bool dg_peer_has_closed(int fd) {
    struct tcp_info info;
    socklen_t length = sizeof info;
    if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length) == 0) {
        return info.tcpi_state == TCP_CLOSE || info.tcpi_state == TCP_TIME_WAIT;
    }
    // Other families: nothing is lost when the socket is closed with unread data, so there is nothing to wait for.
    return true;
}

int dg_accept(int fd) { return checked(accept4(fd, NULL, NULL, SOCK_CLOEXEC)); }

int dg_vsock_listen(uint32_t port, int backlog) {
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return -errno;
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port};
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, backlog) < 0) {
        int error = errno;
        close(fd);
        return -error;
    }
    return fd;
}

int dg_vsock_connect(int fd, uint32_t cid, uint32_t port) {
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = cid, .svm_port = port};
    return checked(connect(fd, (struct sockaddr *)&address, sizeof address));
}

int dg_pidfd(int pid) { return checked((int)syscall(SYS_pidfd_open, pid, 0)); }

int dg_vsock_peer(int fd, uint32_t *cid, uint32_t *port) {
    struct sockaddr_vm address = {0};
    socklen_t length = sizeof address;
    if (getpeername(fd, (struct sockaddr *)&address, &length) < 0) return -errno;
    *cid = address.svm_cid;
    *port = address.svm_port;
    return 0;
}

int dg_unix_peer(int fd, int32_t *pid, uint32_t *uid, uint32_t *gid) {
    struct ucred peer = {0};
    socklen_t length = sizeof peer;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) < 0) return -errno;
    *pid = peer.pid;
    *uid = peer.uid;
    *gid = peer.gid;
    return 0;
}

int dg_signalfd(const int *signals, int count) {
    sigset_t set;
    sigemptyset(&set);
    for (int i = 0; i < count; i++) sigaddset(&set, signals[i]);
    return checked(signalfd(-1, &set, SFD_CLOEXEC));
}

int dg_signal_read(int fd) {
    struct signalfd_siginfo info;
    ssize_t got = read(fd, &info, sizeof info);
    if (got < 0) return -errno;
    return got == sizeof info ? (int)info.ssi_signo : -EIO;
}

int dg_eventfd(void) { return checked(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)); }

// Only segments that are never written, and so hold nothing but what the file has, may be dropped.
static int forget_segments(struct dl_phdr_info *info, size_t size, void *unused) {
    (void)size;
    (void)unused;
    long page = sysconf(_SC_PAGESIZE);
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *segment = &info->dlpi_phdr[i];
        if (segment->p_type != PT_LOAD || segment->p_flags & PF_W) continue;
        uintptr_t start = (info->dlpi_addr + segment->p_vaddr + page - 1) & ~(uintptr_t)(page - 1);
        uintptr_t end = (info->dlpi_addr + segment->p_vaddr + segment->p_filesz) & ~(uintptr_t)(page - 1);
        if (end > start) madvise((void *)start, end - start, MADV_DONTNEED);
    }
    return 0;
}

void dg_forget_startup_pages(void) { dl_iterate_phdr(forget_segments, NULL); }

long dg_thread_blocks_read(void) {
    struct rusage usage;
    return getrusage(RUSAGE_THREAD, &usage) < 0 ? 0 : usage.ru_inblock;
}

int dg_uevent_open(void) {
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT);
    if (fd < 0) return -errno;
    struct sockaddr_nl address = {.nl_family = AF_NETLINK, .nl_groups = 1};
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0) {
        int error = errno;
        close(fd);
        return -error;
    }
    return fd;
}

long dg_uevent_read(int fd, void *buffer, unsigned long size) {
    for (;;) {
        struct sockaddr_nl sender = {0};
        socklen_t length = sizeof sender;
        ssize_t count = recvfrom(fd, buffer, size, 0, (struct sockaddr *)&sender, &length);
        if (count < 0) return -errno;
        // Any process with the right to it may send to the group; the kernel is 0.
        if (sender.nl_pid == 0) return count;
    }
}
