"""What we ask of the host kernel."""
