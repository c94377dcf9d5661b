/* Prints what the C headers say about gntdev and evtchn, as tests/data/xen_devices.json holds it.
 * gcc -o xen_devices xen_devices.c && ./xen_devices > ../data/xen_devices.json
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/ioctl.h>
typedef uint32_t grant_ref_t;
typedef uint16_t domid_t;
#include <xen/gntdev.h>
#include <xen/evtchn.h>

#define SIZE(type) printf("  \"sizeof %s\": %zu,\n", #type, sizeof(struct type))
#define PLACE(type, field) printf("  \"%s.%s\": %zu,\n", #type, #field, offsetof(struct type, field))
#define NUMBER(name) printf("  \"%s\": %u,\n", #name, (unsigned)name)

int main(void)
{
	printf("{\n");
	NUMBER(IOCTL_GNTDEV_MAP_GRANT_REF);
	NUMBER(IOCTL_GNTDEV_UNMAP_GRANT_REF);
	NUMBER(IOCTL_GNTDEV_GRANT_COPY);
	NUMBER(IOCTL_EVTCHN_BIND_INTERDOMAIN);
	NUMBER(IOCTL_EVTCHN_UNBIND);
	NUMBER(IOCTL_EVTCHN_NOTIFY);
	NUMBER(IOCTL_EVTCHN_RESET);
	NUMBER(IOCTL_EVTCHN_RESTRICT_DOMID);
	PLACE(ioctl_gntdev_map_grant_ref, count);
	PLACE(ioctl_gntdev_map_grant_ref, index);
	PLACE(ioctl_gntdev_map_grant_ref, refs);
	PLACE(ioctl_gntdev_grant_ref, domid);
	PLACE(ioctl_gntdev_grant_ref, ref);
	SIZE(ioctl_gntdev_grant_ref);
	PLACE(ioctl_gntdev_unmap_grant_ref, index);
	PLACE(ioctl_gntdev_unmap_grant_ref, count);
	PLACE(ioctl_gntdev_grant_copy, count);
	PLACE(ioctl_gntdev_grant_copy, segments);
	SIZE(gntdev_grant_copy_segment);
	PLACE(gntdev_grant_copy_segment, source.virt);
	PLACE(gntdev_grant_copy_segment, source.foreign.ref);
	PLACE(gntdev_grant_copy_segment, source.foreign.offset);
	PLACE(gntdev_grant_copy_segment, source.foreign.domid);
	PLACE(gntdev_grant_copy_segment, dest.virt);
	PLACE(gntdev_grant_copy_segment, dest.foreign.ref);
	PLACE(gntdev_grant_copy_segment, dest.foreign.offset);
	PLACE(gntdev_grant_copy_segment, dest.foreign.domid);
	PLACE(gntdev_grant_copy_segment, len);
	PLACE(gntdev_grant_copy_segment, flags);
	PLACE(gntdev_grant_copy_segment, status);
	PLACE(ioctl_evtchn_bind_interdomain, remote_domain);
	PLACE(ioctl_evtchn_bind_interdomain, remote_port);
	printf("  \"sizeof ioctl_evtchn_bind_interdomain\": %zu\n}\n", sizeof(struct ioctl_evtchn_bind_interdomain));
	return 0;
}
