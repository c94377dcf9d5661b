"""Who may open files, devices and sockets for a worker, which opens none itself; and the process that does."""
