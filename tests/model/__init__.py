"""The whole control plane in one process: supervisor, workers, xenstore, guests, administrators, at random.

Everything but the processes is real: the service's objects, each worker's `worker.main.Worker` on real chains, rings
and journals, the rig's xenstore, hypervisor and blkfront. There is one clock, which never makes anybody wait, and a
scheduler that chooses what happens next: whose loop passes, which datagram is read, who is killed, when time passes.
The same seed makes the same choices.

    python -m tests.model --orders 100000        what `make test-orders` runs
    python -m tests.model --seed 1 --run 17      repeats one run, as the report of a failure says

    machine     what a process has: a loop, descriptors, access to the hypervisor; and how it dies
    xenstore    a `Store` that calls the rig's xenstored instead of a socket
    fleet       workers of this process in the place of worker processes
    service     the supervisor, which dies and is restarted
    guests      domains, toolstacks, blkfronts with data that is compared
    operators   administrators, who give orders and compare the answers with what is true
    images      what every image must hold
    seams       where the model replaces or observes parts of the product, and where a process may be killed
    world       all of these, and the scheduler
    checks      what must hold when everything rests
    wrong       changes to the product that must be found
"""
