"""Disks that are images of a Ceph cluster: their names, the right to write to them, their requests."""
