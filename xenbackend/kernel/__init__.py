"""Everything that we ask of the host kernel."""
