"""What may be done to image files while no guest has them: make, look at, check, grow, copy and commit."""
