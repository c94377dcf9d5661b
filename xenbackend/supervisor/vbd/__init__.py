"""One vbd: what is wanted of it, where its worker stands, what is asked of it, what outlives the worker."""
