"""xenstore: the connection, the operations on nodes, and the paths of a vbd."""
