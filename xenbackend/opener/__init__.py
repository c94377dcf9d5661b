"""The opener: the process that opens files, devices and sockets for a worker, and the rules by which it does."""
