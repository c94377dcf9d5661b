"""Disks that are served by another program, over a socket that an opener has connected."""
