"""The installation on a Xen host: the files, their places, and their removal."""
