"""Disks that another program serves, over a socket that an opener has connected."""
