"""A disk that is an image of a Ceph cluster: its name, who may write to it, its requests."""
