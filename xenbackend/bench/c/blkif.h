/*
 * The ring of a 64-bit frontend on the rig: what the ring server and the load generator in C have in common.
 *
 * Sources: Xen's public headers io/blkif.h and io/ring.h; xenbackend/blkif/abi.py has the same facts for Python.
 */
#ifndef XENBACKEND_BENCH_BLKIF_H
#define XENBACKEND_BENCH_BLKIF_H

#include <stdint.h>
#include <time.h>

enum {
    PAGE = 4096,
    SECTOR = 512,
    LAST_SECTOR_OF_PAGE = 7,
    RING_SIZE = 32, /* slots in a ring of one page */
    MAX_DIRECT_SEGMENTS = 11,
    MAX_INDIRECT_SEGMENTS = 256,
};

enum { BLKIF_OP_READ = 0, BLKIF_OP_WRITE = 1, BLKIF_OP_INDIRECT = 6 };

enum { BLKIF_RSP_OKAY = 0, BLKIF_RSP_ERROR = -1, BLKIF_RSP_EOPNOTSUPP = -2 };

struct segment {
    uint32_t gref;
    uint8_t first_sect;
    uint8_t last_sect;
    uint16_t padding;
};

struct direct_request {
    uint8_t operation;
    uint8_t nr_segments;
    uint16_t handle;
    uint64_t id;
    uint64_t sector_number;
    struct segment segments[MAX_DIRECT_SEGMENTS];
};

struct indirect_request {
    uint8_t operation;
    uint8_t indirect_op;
    uint16_t nr_segments;
    uint64_t id;
    uint64_t sector_number;
    uint16_t handle;
    uint16_t padding;
    uint32_t grefs[8];
};

struct response {
    uint64_t id;
    uint8_t operation;
    uint8_t padding;
    int16_t status;
    uint32_t more_padding;
};

union slot {
    struct direct_request direct;
    struct indirect_request indirect;
    struct response response;
};

struct shared_ring {
    uint32_t req_prod;
    uint32_t req_event;
    uint32_t rsp_prod;
    uint32_t rsp_event;
    uint8_t padding[48];
    union slot slots[RING_SIZE];
};

_Static_assert(sizeof(union slot) == 112, "a slot of the x86_64 layout has 112 bytes");
_Static_assert(sizeof(struct response) == 16, "a response of the x86_64 layout has 16 bytes");
_Static_assert(sizeof(struct shared_ring) <= PAGE, "the ring fits into its page");

/* The other side may write the indices at any moment: each is loaded and stored by one access. */
#define LOAD(index) __atomic_load_n(&(index), __ATOMIC_ACQUIRE)
#define STORE(index, value) __atomic_store_n(&(index), (value), __ATOMIC_RELEASE)
#define FULL_FENCE() __atomic_thread_fence(__ATOMIC_SEQ_CST)

static inline uint64_t now_ns(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

#endif
