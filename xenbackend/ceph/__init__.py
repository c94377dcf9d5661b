"""A client of a Ceph cluster: the functions of librados and librbd as Python calls."""
