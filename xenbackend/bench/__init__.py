"""Load generators for our backend and for its peers, measured in turn on the same file."""
