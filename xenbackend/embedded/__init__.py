"""A whole Xen host for demonstrations and tests: a simulated Xen, a xenstore, the real service, and guests."""
