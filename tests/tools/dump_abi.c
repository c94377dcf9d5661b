/* Holds what the C headers say about blkif's wire format, for tests/tools/dump_abi.py to read out of the object file.
 * Nothing here runs, so that the i386 layout can be had without a 32-bit C library.
 */
#define __XEN_TOOLS__ 1
#include <stddef.h>
#include <stdint.h>
#include <xen/xen.h>
#include <xen/io/blkif.h>
#include <xen/io/protocols.h>
#include <xen/io/xenbus.h>

struct number {
	char name[60];
	int32_t value;
};

struct sample {
	char name[60];
	uint32_t size;
	union {
		struct blkif_request request;
		struct blkif_request_discard discard;
		struct blkif_request_indirect indirect;
		struct blkif_response response;
		struct blkif_request_segment segment;
		char room[128];
	} bytes;
};

#define NUMBER(expression) { #expression, expression }
#define SIZE(type) { "sizeof " #type, sizeof(struct type) }
#define PLACE(type, field) { #type "." #field, offsetof(struct type, field) }
#define ENTRIES(order) { "ring entries, order " #order, __CONST_RING_SIZE(blkif, 4096u << order) }

const char protocol[] __attribute__((section(".abi_protocol"), used)) = XEN_IO_PROTO_ABI_NATIVE;

const struct number numbers[] __attribute__((section(".abi_numbers"), used)) = {
	NUMBER(BLKIF_OP_READ),
	NUMBER(BLKIF_OP_WRITE),
	NUMBER(BLKIF_OP_WRITE_BARRIER),
	NUMBER(BLKIF_OP_FLUSH_DISKCACHE),
	NUMBER(BLKIF_OP_DISCARD),
	NUMBER(BLKIF_OP_INDIRECT),
	NUMBER(BLKIF_RSP_OKAY),
	NUMBER(BLKIF_RSP_ERROR),
	NUMBER(BLKIF_RSP_EOPNOTSUPP),
	NUMBER(BLKIF_DISCARD_SECURE),
	NUMBER(BLKIF_MAX_SEGMENTS_PER_REQUEST),
	NUMBER(BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST),
	NUMBER(VDISK_CDROM),
	NUMBER(VDISK_REMOVABLE),
	NUMBER(VDISK_READONLY),
	SIZE(blkif_request),
	SIZE(blkif_request_segment),
	SIZE(blkif_request_discard),
	SIZE(blkif_request_indirect),
	SIZE(blkif_response),
	{ "sizeof union blkif_sring_entry", sizeof(union blkif_sring_entry) },
	PLACE(blkif_request, operation),
	PLACE(blkif_request, nr_segments),
	PLACE(blkif_request, handle),
	PLACE(blkif_request, id),
	PLACE(blkif_request, sector_number),
	PLACE(blkif_request, seg),
	PLACE(blkif_request_segment, gref),
	PLACE(blkif_request_segment, first_sect),
	PLACE(blkif_request_segment, last_sect),
	PLACE(blkif_request_discard, operation),
	PLACE(blkif_request_discard, flag),
	PLACE(blkif_request_discard, handle),
	PLACE(blkif_request_discard, id),
	PLACE(blkif_request_discard, sector_number),
	PLACE(blkif_request_discard, nr_sectors),
	PLACE(blkif_request_indirect, operation),
	PLACE(blkif_request_indirect, indirect_op),
	PLACE(blkif_request_indirect, nr_segments),
	PLACE(blkif_request_indirect, id),
	PLACE(blkif_request_indirect, sector_number),
	PLACE(blkif_request_indirect, handle),
	PLACE(blkif_request_indirect, indirect_grefs),
	PLACE(blkif_response, id),
	PLACE(blkif_response, operation),
	PLACE(blkif_response, status),
	PLACE(blkif_sring, req_prod),
	PLACE(blkif_sring, req_event),
	PLACE(blkif_sring, rsp_prod),
	PLACE(blkif_sring, rsp_event),
	PLACE(blkif_sring, ring),
	ENTRIES(0),
	ENTRIES(1),
	ENTRIES(2),
	ENTRIES(3),
	ENTRIES(4),
	NUMBER(XenbusStateUnknown),
	NUMBER(XenbusStateInitialising),
	NUMBER(XenbusStateInitWait),
	NUMBER(XenbusStateInitialised),
	NUMBER(XenbusStateConnected),
	NUMBER(XenbusStateClosing),
	NUMBER(XenbusStateClosed),
	NUMBER(XenbusStateReconfiguring),
	NUMBER(XenbusStateReconfigured),
};

#define HANDLE 0xCA01
#define ID 0x1122334455667788ull
#define SECTOR 0x99AABBCCDDEEFF00ull

const struct sample samples[] __attribute__((section(".abi_samples"), used)) = {
	{ "request", sizeof(struct blkif_request), { .request = {
		BLKIF_OP_WRITE, 11, HANDLE, ID, SECTOR, {
			{ 0xF0000001, 0, 7 }, { 0xF0000002, 1, 6 }, { 0xF0000003, 2, 5 }, { 0xF0000004, 3, 4 },
			{ 0xF0000005, 4, 4 }, { 0xF0000006, 5, 5 }, { 0xF0000007, 6, 6 }, { 0xF0000008, 7, 7 },
			{ 0xF0000009, 0, 0 }, { 0xF000000A, 0, 1 }, { 0xF000000B, 0, 2 },
		} } } },
	{ "discard", sizeof(struct blkif_request_discard), { .discard = {
		BLKIF_OP_DISCARD, BLKIF_DISCARD_SECURE, HANDLE, ID, SECTOR, 0x123456789ABCDEF0ull } } },
	{ "indirect", sizeof(struct blkif_request_indirect), { .indirect = {
		BLKIF_OP_INDIRECT, BLKIF_OP_WRITE, 0x0123, ID, SECTOR, HANDLE, { 1, 2, 3, 4, 5, 6, 7, 0xFFFFFFFF } } } },
	{ "response", sizeof(struct blkif_response), { .response = { ID, BLKIF_OP_WRITE, BLKIF_RSP_EOPNOTSUPP } } },
	{ "segment", sizeof(struct blkif_request_segment), { .segment = { 0xF0000001, 1, 6 } } },
};
