"""The whole control plane in one process: supervisor, workers, xenstore, guests, administrators, at random.

Everything but the processes is real: the service's objects, each worker's `worker.main.Worker` on real chains, rings
and journals, the rig's xenstore, hypervisor and blkfront. There is one clock, which nobody waits for, and a scheduler
that chooses what happens next: whose loop passes, which datagram is read, who is killed, when time goes by. The same
seed chooses the same.

    python -m tests.model --orders 100000        what `make test-orders` runs
    python -m tests.model --seed 1 --run 17      one run again, as the report of a failure says

    machine     what a process has: a loop, descriptors, the hypervisor's door; and how it dies
    xenstore    a `Store` that calls the rig's xenstored instead of a socket
    fleet       workers of this process in the place of worker processes
    service     the supervisor, which dies and comes again
    guests      domains, toolstacks, blkfronts with data that is compared
    operators   administrators, who give orders and compare what they are told with what is true
    images      what every image must hold
    seams       where the model gets between the product and its machine, and where that may be killed
    world       all of it, and the scheduler
    checks      what must hold when everything rests
    wrong       changes to the product that must be found
"""
