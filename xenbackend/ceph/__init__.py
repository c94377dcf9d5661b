"""A client of a Ceph cluster: what librados and librbd offer, as Python calls."""
