"""The commands: each turns arguments into calls."""
