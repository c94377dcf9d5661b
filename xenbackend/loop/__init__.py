"""The loop that every process of ours runs, its threads, and steps that wait for one another."""
