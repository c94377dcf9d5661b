"""The process: its loop, settings, control socket, workers as processes, and what outlives it."""
