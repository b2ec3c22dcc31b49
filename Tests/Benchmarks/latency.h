// A latency histogram with 32 steps per power of two: 3 % resolution at a cost
// of a few instructions per operation, whatever the latencies are.
#ifndef LATENCY_H
#define LATENCY_H

#include <stdint.h>

enum { STEP_BITS = 5, STEPS = 1 << STEP_BITS, BUCKETS = (64 - STEP_BITS + 1) * STEPS };

static inline unsigned bucket_of(uint64_t nanoseconds) {
    if (nanoseconds < STEPS) return (unsigned)nanoseconds;
    const unsigned shift = 63 - (unsigned)__builtin_clzll(nanoseconds) - STEP_BITS;
    return (shift + 1) * STEPS + (unsigned)((nanoseconds >> shift) & (STEPS - 1));
}

static inline double bucket_middle(unsigned bucket) {
    if (bucket < STEPS) return bucket;
    const unsigned shift = bucket / STEPS - 1;
    return ((double)(STEPS + bucket % STEPS) + 0.5) * (double)(1ull << shift);
}

static inline double quantile_us(const uint64_t *histogram, uint64_t count, double fraction) {
    const uint64_t rank = (uint64_t)((double)count * fraction);
    uint64_t seen = 0;
    for (unsigned i = 0; i < BUCKETS; i++) {
        seen += histogram[i];
        if (seen > rank) return bucket_middle(i) / 1000;
    }
    return 0;
}

#endif
