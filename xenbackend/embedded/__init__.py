"""A whole machine in one: the simulated Xen, a xenstore, the real service, and guests, for demonstrations and tests."""
