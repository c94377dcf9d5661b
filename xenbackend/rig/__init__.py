"""A simulated Xen, for demonstrations, measurements and tests on a machine without Xen."""
