"""Everything that xenbackend asks of the host's kernel."""
