"""xenstore: the connection, its nodes and paths, and those of one vbd."""
