"""Why a disk does not connect: looks at the host, xenstore, the service and storage, and changes nothing.

Each look is a process of its own with a limit, so that nothing that hangs keeps the others from being told.
"""
