"""What our processes say to each other: service and worker, opener and both, operator and service."""
