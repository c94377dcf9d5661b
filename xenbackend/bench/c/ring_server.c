/*
 * A backend in C for one ring of the rig: the limit that `xenbackend bench --compare` shows beside our workers.
 *
 * It makes every check that protects a backend's host: the ring's overflow, operations, segments and their number, the
 * range on the disk, each grant, short I/O. A slot is copied once, and only the copy is looked at. It maps granted
 * pages one by one and keeps them, or copies for a frontend without persistent grants, as a worker does. It looks for
 * the next request as long as a worker, gives up after as many looks in vain, then sleeps on the event channel. It
 * lacks what makes a worker safe to kill and easy to extend: journal, chain, counters.
 *
 * It serves the bench's own guest and ends with it. It was never tried against a hostile guest.
 *
 * Arguments, all of them numbers except FILE; descriptors are inherited:
 *
 *     ring_server MEMORY PAGES GRANTS RING_GREF INCOMING OUTGOING ALIVE PERSISTENT DIRECT POLL_US FILE
 *
 * MEMORY: the guest's memory of so many PAGES. GRANTS: its grant table, xenbackend/rig/table.py. INCOMING, OUTGOING:
 * eventfds, the two ways of the event channel. ALIVE: hangs up when the guest ends.
 */
#define _GNU_SOURCE
#include "blkif.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* As a worker has them: xenbackend/journal.py, worker/polling.py. */
enum {
    BATCH = 16,   /* requests that are taken and answered together */
    PATIENCE = 8, /* looks in vain, one after the other, before it gives up for a while */
    PAUSE = 256,  /* sleeps without a look after that */
};

/* public/grant_table.h, grant table v1; xenbackend/rig/table.py */
enum {
    GRANTS = 16384,
    GTF_TYPE_MASK = 3,
    GTF_PERMIT_ACCESS = 1,
    GTF_READONLY = 4,
    BACKEND_DOMID = 0,
};

enum { MAX_LENGTH = MAX_INDIRECT_SEGMENTS * PAGE };

struct guest {
    int memory_fd;
    uint8_t *memory; /* all of it, for grant copies */
    uint64_t pages;
    uint64_t *grants; /* the guest may write an entry at any moment: each is loaded once */
    int16_t *faults;  /* one for each grant ref; not 0: it cannot be used */
    bool is_persistent;
    uint8_t *area; /* addresses for mapped pages, in the order in which they were seen */
    uint32_t area_used;
    uint8_t *mapped[GRANTS];
    bool is_writable[GRANTS];
};

struct request {
    struct iocb control; /* first: a completion names the request by it */
    uint64_t id;
    uint8_t operation;
    uint64_t offset; /* bytes on the disk */
    size_t length;   /* bytes */
    struct iovec pieces[MAX_INDIRECT_SEGMENTS]; /* of the guest's memory */
    unsigned piece_count;
    struct iovec transfer; /* where the disk's data go instead, for a frontend that is copied for */
    uint8_t *copy;         /* MAX_LENGTH bytes */
};

struct server {
    struct guest guest;
    struct shared_ring *ring;
    uint32_t consumed;
    uint32_t published;
    uint32_t answered; /* responses that are published, or will be by the next `publish` */
    int incoming;
    int outgoing;
    int alive;
    int file;
    uint64_t sectors;
    uint64_t poll_ns;
    unsigned in_vain;
    unsigned pause;
    struct request requests[RING_SIZE];
    struct request *free_requests[RING_SIZE];
    unsigned free_count;
    bool is_direct;
    aio_context_t aio;
    unsigned in_flight; /* requests that the kernel has */
    struct iocb *queued[RING_SIZE + 2];
    unsigned queued_count;
    struct iocb door; /* waits for the event channel */
    struct iocb hangup;
    bool is_door_armed;
    bool is_hangup_armed;
};

static void die(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

/* The guest's pages */

/* Return the frame that a grant ref lets us use, or -1 if it does not. */
static int64_t granted_frame(const struct guest *guest, uint32_t gref, bool writable)
{
    if (gref >= GRANTS || __atomic_load_n(&guest->faults[gref], __ATOMIC_RELAXED))
        return -1;
    const uint64_t entry = LOAD(guest->grants[gref]);
    const uint64_t frame = entry >> 32;
    if ((entry & GTF_TYPE_MASK) != GTF_PERMIT_ACCESS || (entry >> 16 & 0xFFFF) != BACKEND_DOMID)
        return -1;
    if ((writable && (entry & GTF_READONLY)) || frame >= guest->pages)
        return -1;
    return (int64_t)frame;
}

/* Return a granted page, mapped for good when it is first used, or NULL. */
static uint8_t *map_page(struct guest *guest, uint32_t gref, bool writable)
{
    if (gref < GRANTS && guest->mapped[gref] && (guest->is_writable[gref] || !writable))
        return guest->mapped[gref];
    const int64_t frame = granted_frame(guest, gref, writable);
    if (frame < 0)
        return NULL;
    const bool may_write = granted_frame(guest, gref, true) == frame;
    uint8_t *place = guest->area + (size_t)guest->area_used * PAGE;
    const int protection = PROT_READ | (may_write ? PROT_WRITE : 0);
    const int flags = MAP_SHARED | MAP_FIXED | MAP_POPULATE;
    /* A page is mapped twice at most: to be read, and once more when it may be written. */
    if (guest->area_used == 2 * GRANTS ||
        mmap(place, PAGE, protection, flags, guest->memory_fd, frame * PAGE) == MAP_FAILED)
        return NULL;
    guest->area_used++;
    guest->mapped[gref] = place;
    guest->is_writable[gref] = may_write;
    return place;
}

/* Return the bytes of a granted page, or NULL if we may not use them. */
static uint8_t *page_of(struct guest *guest, uint32_t gref, bool writable)
{
    if (guest->is_persistent)
        return map_page(guest, gref, writable);
    const int64_t frame = granted_frame(guest, gref, writable);
    return frame < 0 ? NULL : guest->memory + frame * PAGE;
}

/* Requests */

static bool add_segment(struct server *server, struct request *request, const struct segment *segment)
{
    if (segment->first_sect > segment->last_sect || segment->last_sect > LAST_SECTOR_OF_PAGE)
        return false;
    uint8_t *place = page_of(&server->guest, segment->gref, request->operation == BLKIF_OP_READ);
    if (!place)
        return false;
    place += segment->first_sect * SECTOR;
    const size_t length = (size_t)(segment->last_sect - segment->first_sect + 1) * SECTOR;
    request->length += length;
    if (request->piece_count) {
        struct iovec *last = &request->pieces[request->piece_count - 1];

        if ((uint8_t *)last->iov_base + last->iov_len == place) {
            last->iov_len += length;
            return true;
        }
    }
    request->pieces[request->piece_count++] = (struct iovec){.iov_base = place, .iov_len = length};
    return true;
}

/* Decode the private copy of a slot. Return BLKIF_RSP_OKAY, or what the request has to be answered with. */
static int decode(struct server *server, const union slot *slot, struct request *request)
{
    struct segment indirect[MAX_INDIRECT_SEGMENTS];
    const struct segment *segments = slot->direct.segments;
    unsigned count = slot->direct.nr_segments;
    unsigned most = MAX_DIRECT_SEGMENTS;

    request->id = slot->direct.id; /* lies at the same place in an indirect request, as the sector does */
    request->operation = slot->direct.operation;
    if (slot->direct.operation == BLKIF_OP_INDIRECT) {
        request->operation = slot->indirect.indirect_op;
        count = slot->indirect.nr_segments;
        most = MAX_INDIRECT_SEGMENTS;
    }
    if (request->operation != BLKIF_OP_READ && request->operation != BLKIF_OP_WRITE)
        return BLKIF_RSP_EOPNOTSUPP;
    if (count < 1 || count > most)
        return BLKIF_RSP_ERROR;
    if (slot->direct.operation == BLKIF_OP_INDIRECT) {
        const uint8_t *listed = page_of(&server->guest, slot->indirect.grefs[0], false);

        if (!listed)
            return BLKIF_RSP_ERROR;
        memcpy(indirect, listed, count * sizeof *indirect); /* once: the guest may alter them after the check */
        segments = indirect;
    }
    request->length = 0;
    request->piece_count = 0;
    for (unsigned each = 0; each < count; each++) {
        if (!add_segment(server, request, &segments[each]))
            return BLKIF_RSP_ERROR;
    }
    const uint64_t length = request->length / SECTOR;
    if (length > server->sectors || slot->direct.sector_number > server->sectors - length)
        return BLKIF_RSP_ERROR;
    request->offset = slot->direct.sector_number * SECTOR;
    return BLKIF_RSP_OKAY;
}

/* Copy between a request's pieces and its own memory. */
static void copy_pieces(struct request *request, bool to_guest)
{
    uint8_t *near = request->copy;

    for (unsigned each = 0; each < request->piece_count; each++) {
        const struct iovec *piece = &request->pieces[each];

        if (to_guest)
            memcpy(piece->iov_base, near, piece->iov_len);
        else
            memcpy(near, piece->iov_base, piece->iov_len);
        near += piece->iov_len;
    }
}

/* Return the buffers for the disk's I/O, and how many they are; what a guest writes is copied to ours first. */
static struct iovec *buffers_of(const struct server *server, struct request *request, unsigned *count)
{
    if (server->guest.is_persistent) {
        *count = request->piece_count;
        return request->pieces;
    }
    if (request->operation == BLKIF_OP_WRITE)
        copy_pieces(request, false);
    request->transfer = (struct iovec){.iov_base = request->copy, .iov_len = request->length};
    *count = 1;
    return &request->transfer;
}

/* Drop the first `done` bytes of some buffers. */
static void advance(struct iovec **buffers, unsigned *count, size_t done)
{
    while (*count && done >= (*buffers)->iov_len) {
        done -= (*buffers)->iov_len;
        (*buffers)++;
        (*count)--;
    }
    if (done) {
        (*buffers)->iov_base = (uint8_t *)(*buffers)->iov_base + done;
        (*buffers)->iov_len -= done;
    }
}

/* Read or write what is left after `done` bytes, however often the kernel stops half-way. */
static int transfer(const struct server *server, struct request *request, struct iovec *buffers, unsigned count,
                    size_t done)
{
    advance(&buffers, &count, done);
    while (count) {
        const off_t offset = (off_t)(request->offset + done);
        const ssize_t moved = request->operation == BLKIF_OP_WRITE
                                  ? pwritev(server->file, buffers, (int)count, offset)
                                  : preadv(server->file, buffers, (int)count, offset);

        if (moved < 0 && errno == EINTR)
            continue;
        if (moved <= 0) /* 0: the file ends before its disk does */
            return BLKIF_RSP_ERROR;
        done += (size_t)moved;
        advance(&buffers, &count, (size_t)moved);
    }
    return BLKIF_RSP_OKAY;
}

/* Answers */

static void answer(struct server *server, struct request *request, int status)
{
    const struct response response = {.id = request->id, .operation = request->operation, .status = (int16_t)status};

    if (status == BLKIF_RSP_OKAY && !server->guest.is_persistent && request->operation == BLKIF_OP_READ)
        copy_pieces(request, true);
    memcpy(&server->ring->slots[server->answered % RING_SIZE].response, &response, sizeof response);
    server->answered++;
    server->free_requests[server->free_count++] = request;
}

static void publish(struct server *server)
{
    const uint64_t one = 1;
    const uint32_t before = server->published;

    if (server->answered == before)
        return;
    server->published = server->answered;
    STORE(server->ring->rsp_prod, server->published);
    FULL_FENCE();
    if (server->published - LOAD(server->ring->rsp_event) < server->published - before) {
        if (write(server->outgoing, &one, sizeof one) != sizeof one && errno != EAGAIN)
            die("notify");
    }
}

/* O_DIRECT: Linux AIO, as a worker has it. One wait covers completions and the event channel. */

static void queue_control(struct server *server, struct iocb *control)
{
    server->queued[server->queued_count++] = control;
}

static void arm(struct server *server, struct iocb *control, int fd, bool *is_armed)
{
    if (*is_armed)
        return;
    *control = (struct iocb){.aio_data = (uintptr_t)control,
                             .aio_lio_opcode = IOCB_CMD_POLL,
                             .aio_fildes = (uint32_t)fd,
                             .aio_buf = POLLIN};
    *is_armed = true;
    queue_control(server, control);
}

/* Have the next wait end on an event or at the guest's end, too. Both are submitted together with queued requests. */
static void queue_watches(struct server *server)
{
    arm(server, &server->door, server->incoming, &server->is_door_armed);
    arm(server, &server->hangup, server->alive, &server->is_hangup_armed);
}

static void queue_request(struct server *server, struct request *request)
{
    unsigned count;
    struct iovec *buffers = buffers_of(server, request, &count);

    request->control = (struct iocb){
        .aio_data = (uintptr_t)&request->control,
        .aio_lio_opcode = request->operation == BLKIF_OP_WRITE ? IOCB_CMD_PWRITEV : IOCB_CMD_PREADV,
        .aio_fildes = (uint32_t)server->file,
        .aio_buf = (uintptr_t)buffers,
        .aio_nbytes = count,
        .aio_offset = (int64_t)request->offset};
    server->in_flight++;
    queue_control(server, &request->control);
}

static void finish(struct server *server, struct request *request, int64_t moved)
{
    int status = BLKIF_RSP_ERROR;

    server->in_flight--;
    if (moved == (int64_t)request->length) {
        status = BLKIF_RSP_OKAY;
    } else if (moved > 0) {
        struct iovec *buffers = server->guest.is_persistent ? request->pieces : &request->transfer;
        const unsigned count = server->guest.is_persistent ? request->piece_count : 1;

        status = transfer(server, request, buffers, count, (size_t)moved);
    }
    answer(server, request, status);
}

static void submit(struct server *server)
{
    unsigned done = 0;

    while (done < server->queued_count) {
        struct iocb **rest = server->queued + done;
        const long taken = syscall(SYS_io_submit, server->aio, (long)(server->queued_count - done), rest);

        if (taken > 0) {
            done += (unsigned)taken;
        } else if (errno != EAGAIN && errno != EINTR) {
            if (*rest == &server->door || *rest == &server->hangup)
                die("io_submit");
            finish(server, (struct request *)*rest, -errno); /* such as EINVAL, for less than the disk's sector */
            done++;
        }
    }
    server->queued_count = 0;
}

static void clear_event(const struct server *server)
{
    uint64_t notifications;

    if (read(server->incoming, &notifications, sizeof notifications) < 0 && errno != EAGAIN)
        die("event channel");
}

/* Wait for a completion, an event or the guest's end, and handle all that have come. */
static void wait_for_completions(struct server *server)
{
    struct io_event events[RING_SIZE + 2];

    queue_watches(server);
    submit(server);
    const long count = syscall(SYS_io_getevents, server->aio, 1L, (long)(RING_SIZE + 2), events, NULL);
    if (count < 0 && errno != EINTR)
        die("io_getevents");
    for (long each = 0; each < count; each++) {
        struct iocb *control = (struct iocb *)(uintptr_t)events[each].data;

        if (control == &server->hangup) {
            exit(0);
        } else if (control == &server->door) {
            server->is_door_armed = false;
            clear_event(server);
        } else {
            finish(server, (struct request *)control, events[each].res);
        }
    }
    publish(server);
}

/* The ring */

static uint32_t available(const struct server *server)
{
    const uint32_t count = LOAD(server->ring->req_prod) - server->consumed;

    if (count > RING_SIZE - (server->consumed - server->published)) {
        fprintf(stderr, "the frontend announced %u requests, for which the ring has no room\n", count);
        exit(1);
    }
    return count;
}

static void serve(struct server *server, const union slot *slot)
{
    struct request *request = server->free_requests[--server->free_count];
    const int status = decode(server, slot, request);

    if (status != BLKIF_RSP_OKAY) {
        answer(server, request, status);
    } else if (server->is_direct) {
        queue_request(server, request);
    } else {
        unsigned count;
        struct iovec *buffers = buffers_of(server, request, &count);

        answer(server, request, transfer(server, request, buffers, count, 0));
    }
}

static void take_batch(struct server *server, uint32_t count)
{
    union slot copies[BATCH];

    if (count > BATCH)
        count = BATCH;
    for (uint32_t each = 0; each < count; each++)
        memcpy(&copies[each], &server->ring->slots[(server->consumed + each) % RING_SIZE], sizeof *copies);
    server->consumed += count;
    STORE(server->ring->req_event, server->consumed); /* no event: we look ourselves, and ask again before sleeping */
    for (uint32_t each = 0; each < count; each++)
        serve(server, &copies[each]);
    if (server->in_flight)
        queue_watches(server);
    submit(server);
    publish(server);
}

static bool finds_work(struct server *server)
{
    if (!server->poll_ns)
        return false;
    if (server->pause) {
        server->pause--;
        return false;
    }
    const uint64_t begin = now_ns();
    while (now_ns() - begin < server->poll_ns) {
        if (LOAD(server->ring->req_prod) != server->consumed) {
            server->in_vain = 0;
            return true;
        }
    }
    if (++server->in_vain == PATIENCE) {
        server->in_vain = 0;
        server->pause = PAUSE;
    }
    return false;
}

static void wait_for_event(const struct server *server)
{
    struct pollfd events[2] = {{.fd = server->incoming, .events = POLLIN}, {.fd = server->alive, .events = POLLIN}};

    if (poll(events, 2, -1) < 0) {
        if (errno == EINTR)
            return;
        die("poll");
    }
    if (events[1].revents)
        exit(0);
    if (events[0].revents)
        clear_event(server);
}

static void serve_forever(struct server *server)
{
    for (;;) {
        uint32_t count = available(server);

        if (!count && !server->in_flight && finds_work(server))
            count = available(server);
        if (!count) {
            STORE(server->ring->req_event, server->consumed + 1);
            FULL_FENCE();
            count = available(server);
        }
        if (count)
            take_batch(server, count);
        else if (server->is_direct)
            wait_for_completions(server);
        else
            wait_for_event(server);
    }
}

/* The start */

static void *map(size_t length, int protection, int flags, int fd, const char *what)
{
    void *place = mmap(NULL, length, protection, flags, fd, 0);

    if (place == MAP_FAILED)
        die(what);
    return place;
}

static void open_guest(struct guest *guest, int memory_fd, uint64_t pages, int grants_fd, bool is_persistent)
{
    const int both = PROT_READ | PROT_WRITE;
    const size_t area = (size_t)2 * GRANTS * PAGE;
    const size_t table = GRANTS * (sizeof *guest->grants + sizeof *guest->faults);

    guest->memory_fd = memory_fd;
    guest->pages = pages;
    guest->is_persistent = is_persistent;
    guest->memory = map(pages * PAGE, both, MAP_SHARED, memory_fd, "the guest's memory");
    guest->grants = map(table, PROT_READ, MAP_SHARED, grants_fd, "the grant table");
    guest->faults = (int16_t *)(guest->grants + GRANTS);
    guest->area = map(area, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, "addresses");
}

static void open_file(struct server *server, const char *path)
{
    struct stat facts;

    server->file = open(path, O_RDWR | O_CLOEXEC | (server->is_direct ? O_DIRECT : 0));
    if (server->file < 0 || fstat(server->file, &facts) < 0)
        die(path);
    server->sectors = (uint64_t)facts.st_size / SECTOR;
    if (server->is_direct && syscall(SYS_io_setup, RING_SIZE + 2, &server->aio) < 0)
        die("io_setup");
}

static void prepare_requests(struct server *server)
{
    for (unsigned each = 0; each < RING_SIZE; each++) {
        struct request *request = &server->requests[each];

        if (!server->guest.is_persistent)
            request->copy = map(MAX_LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, "buffers");
        server->free_requests[server->free_count++] = request;
    }
}

static uint64_t number(const char *text)
{
    char *end;

    errno = 0;
    const uint64_t value = strtoull(text, &end, 10);
    if (errno || end == text || *end) {
        fprintf(stderr, "%s is not a number\n", text);
        exit(2);
    }
    return value;
}

int main(int count, char **arguments)
{
    static struct server server; /* too large for a stack */

    if (count != 12) {
        fprintf(stderr, "ring_server is started by `xenbackend bench`; its source says by which arguments\n");
        return 2;
    }
    open_guest(&server.guest, (int)number(arguments[1]), number(arguments[2]), (int)number(arguments[3]),
               number(arguments[8]) != 0);
    server.incoming = (int)number(arguments[5]);
    server.outgoing = (int)number(arguments[6]);
    server.alive = (int)number(arguments[7]);
    server.is_direct = number(arguments[9]) != 0;
    server.poll_ns = number(arguments[10]) * 1000;
    open_file(&server, arguments[11]);
    prepare_requests(&server);
    server.ring = (struct shared_ring *)map_page(&server.guest, (uint32_t)number(arguments[4]), true);
    if (!server.ring) {
        fprintf(stderr, "the ring's page is not granted\n");
        return 1;
    }
    server.consumed = server.published = server.answered = LOAD(server.ring->rsp_prod);
    printf("serving\n");
    fflush(stdout);
    serve_forever(&server);
}
