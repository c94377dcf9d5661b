"""Finds out why a disk does not connect: examines the host, xenstore, the service and storage, and changes nothing.

Each look runs in its own process with a time limit, so that one that hangs does not hold up the others.
"""
