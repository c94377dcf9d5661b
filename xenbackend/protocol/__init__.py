"""What processes of ours say to each other: service and worker, operator and service."""
