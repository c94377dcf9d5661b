/*
 * The inner part of the load generator: xenbackend/bench/blkif.py's `reap`, `renew` and `run`, in C.
 *
 * A client in Python takes as long for a request as a good backend does, so the client would be what is measured. What
 * is done once for each workload stays in Python (bench/blkif_native.py), which owns all memory that is named here.
 */
#define _GNU_SOURCE
#include "blkif.h"

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <string.h>
#include <unistd.h>

/* bench/blkif_native.py has the same numbers. */
enum status {
    DONE = 0,
    INTERRUPTED = 1, /* by a signal, which Python has to see; call again */
    STALLED = 2,
    TOO_MANY = 3,     /* more responses than requests: `found` of them */
    FAILED = 4,       /* a response with an error, another operation or an unknown id */
    WRONG_DATA = 5,   /* a read of `wanted` brought the stamp `found` */
    CANNOT_NOTIFY = 6,
};

enum { NOT_TIMED = -1 };

/* Field by field as bench/blkif_native.py has it. */
struct loop {
    struct shared_ring *ring;
    uint64_t *memory;          /* the guest's, in words */
    union slot *images;        /* an encoded request for each slot number */
    const uint64_t *places;    /* the sectors to visit, again and again */
    const uint64_t *stamps_at; /* for each slot number: the word of `memory` that its data begin with */
    uint64_t *latencies;       /* ns */
    uint64_t place_count;
    uint64_t next_place;
    uint64_t latency_room;
    uint64_t latency_count;
    uint64_t requests; /* answered so far */
    uint64_t waited_ns;
    uint64_t poll_ns; /* how long to look for responses before sleeping */
    uint64_t now;     /* when the last batch of answers was seen */
    uint64_t issued_at;
    uint64_t wanted; /* of the sentence about what went wrong */
    uint64_t found;
    int64_t timed; /* the slot number whose latency is being measured, or NOT_TIMED */
    uint32_t depth;
    uint32_t produced;
    uint32_t consumed;
    uint32_t stall_ms;
    uint32_t operation;
    int32_t incoming; /* eventfds */
    int32_t outgoing;
    int32_t writes;
    int32_t verifies;
};

static enum status push(struct loop *loop, uint32_t before)
{
    const uint64_t one = 1;

    STORE(loop->ring->req_prod, loop->produced);
    FULL_FENCE();
    if (loop->produced - LOAD(loop->ring->req_event) < loop->produced - before) {
        if (write(loop->outgoing, &one, sizeof one) != sizeof one && errno != EAGAIN)
            return CANNOT_NOTIFY;
    }
    return DONE;
}

/* Check the data of `count` finished slots, point them at their next places, publish them, notify when asked to. */
int loop_renew(struct loop *loop, const uint32_t *numbers, uint32_t count)
{
    const uint32_t before = loop->produced;

    for (uint32_t each = 0; each < count; each++) {
        const uint32_t number = numbers[each];
        struct direct_request *image = &loop->images[number].direct; /* the sector lies there in indirect ones too */
        uint64_t *stamp = &loop->memory[loop->stamps_at[number]];
        const uint64_t place = loop->places[loop->next_place];

        if (loop->writes) {
            *stamp = place;
        } else if (loop->verifies && LOAD(*stamp) != image->sector_number) {
            loop->wanted = image->sector_number;
            loop->found = *stamp;
            return WRONG_DATA;
        }
        if (++loop->next_place == loop->place_count)
            loop->next_place = 0;
        image->sector_number = place;
        memcpy(&loop->ring->slots[loop->produced % RING_SIZE], &loop->images[number], sizeof(union slot));
        loop->produced++;
    }
    return push(loop, before);
}

static uint32_t waiting(const struct loop *loop)
{
    return LOAD(loop->ring->rsp_prod) - loop->consumed;
}

static enum status sleep_for_answers(struct loop *loop)
{
    struct pollfd event = {.fd = loop->incoming, .events = POLLIN};
    uint64_t notifications;

    for (;;) {
        STORE(loop->ring->rsp_event, loop->consumed + 1);
        FULL_FENCE();
        if (waiting(loop))
            return DONE;
        const int ready = poll(&event, 1, (int)loop->stall_ms);
        if (ready < 0)
            return INTERRUPTED;
        if (ready == 0)
            return STALLED;
        if (read(loop->incoming, &notifications, sizeof notifications) < 0 && errno != EAGAIN)
            return STALLED;
    }
}

static enum status wait_for_answers(struct loop *loop)
{
    const uint64_t begin = now_ns();
    enum status status = DONE;

    while (!waiting(loop)) {
        if (now_ns() - begin >= loop->poll_ns) {
            status = sleep_for_answers(loop);
            break;
        }
    }
    loop->waited_ns += now_ns() - begin;
    return status;
}

/* Take all responses, and wait first if there are none. `numbers` has room for RING_SIZE. */
int loop_reap(struct loop *loop, uint32_t *numbers, uint32_t *count)
{
    *count = 0;
    if (!waiting(loop)) {
        const enum status status = wait_for_answers(loop);

        if (status != DONE)
            return status;
    }
    const uint32_t found = waiting(loop);
    if (found > loop->depth) {
        loop->found = found;
        return TOO_MANY;
    }
    for (uint32_t each = 0; each < found; each++) {
        struct response answer;

        memcpy(&answer, &loop->ring->slots[(loop->consumed + each) % RING_SIZE].response, sizeof answer);
        if (answer.status != BLKIF_RSP_OKAY || answer.operation != loop->operation || answer.id >= loop->depth)
            return FAILED;
        numbers[each] = (uint32_t)answer.id;
    }
    loop->consumed += found;
    *count = found;
    return DONE;
}

static bool contains(const uint32_t *numbers, uint32_t count, int64_t wanted)
{
    for (uint32_t each = 0; each < count; each++) {
        if (numbers[each] == wanted)
            return true;
    }
    return false;
}

/* Keep the loop going until `deadline`, or until `latencies` is full: at a call's end Python sees signals. */
int loop_run(struct loop *loop, uint64_t deadline)
{
    uint32_t numbers[RING_SIZE];
    uint32_t count;
    int status;

    loop->latency_count = 0;
    do {
        status = loop_reap(loop, numbers, &count);
        if (status != DONE)
            return status;
        loop->now = now_ns();
        loop->requests += count;
        if (contains(numbers, count, loop->timed)) {
            loop->latencies[loop->latency_count++] = loop->now - loop->issued_at;
            loop->timed = NOT_TIMED;
        }
        status = loop_renew(loop, numbers, count);
        if (status != DONE)
            return status;
        if (loop->timed == NOT_TIMED) {
            loop->timed = numbers[loop->produced % count];
            loop->issued_at = loop->now;
        }
    } while (loop->now < deadline && loop->latency_count < loop->latency_room);
    return DONE;
}
