// io_uring through liburing, behind an opaque type (see CLinux.h).
#include "CLinux.h"

#include <errno.h>
#include <liburing.h>
#include <poll.h>
#include <stdlib.h>

struct dg_ring {
    struct io_uring ring;
};

dg_ring *dg_ring_create(unsigned entries, int *error) {
    dg_ring *self = calloc(1, sizeof *self);
    if (!self) {
        *error = ENOMEM;
        return NULL;
    }
    // DEFER_TASKRUN keeps completions from interrupting the owner; older kernels do not know it.
    struct io_uring_params params = {0};
    params.flags = IORING_SETUP_SINGLE_ISSUER | (1U << 13);
    int result = io_uring_queue_init_params(entries, &self->ring, &params);
    if (result < 0) {
        result = io_uring_queue_init(entries, &self->ring, 0);
    }
    if (result < 0) {
        free(self);
        *error = -result;
        return NULL;
    }
    return self;
}

void dg_ring_destroy(dg_ring *ring) {
    io_uring_queue_exit(&ring->ring);
    free(ring);
}

bool dg_ring_read(dg_ring *ring, int fd, void *buffer, unsigned length, uint64_t offset, uint64_t user_data) {
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->ring);
    if (!sqe) return false;
    io_uring_prep_read(sqe, fd, buffer, length, offset);
    io_uring_sqe_set_data64(sqe, user_data);
    return true;
}

bool dg_ring_poll_in(dg_ring *ring, int fd, uint64_t user_data) {
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->ring);
    if (!sqe) return false;
    io_uring_prep_poll_add(sqe, fd, POLLIN);
    io_uring_sqe_set_data64(sqe, user_data);
    return true;
}

int dg_ring_submit_and_wait(dg_ring *ring, unsigned wait) {
    return wait ? io_uring_submit_and_wait(&ring->ring, wait) : io_uring_submit_and_get_events(&ring->ring);
}

unsigned dg_ring_reap(dg_ring *ring, dg_completion *completions, unsigned capacity) {
    struct io_uring_cqe *entries[64];
    unsigned count = io_uring_peek_batch_cqe(&ring->ring, entries, capacity < 64 ? capacity : 64);
    for (unsigned i = 0; i < count; i++) {
        completions[i].user_data = io_uring_cqe_get_data64(entries[i]);
        completions[i].result = entries[i]->res;
    }
    io_uring_cq_advance(&ring->ring, count);
    return count;
}
