"""The event loop of each of our processes, its threads, and steps that wait for one another."""
