"""Load generators for our backend and its peers, which are measured in turn on the same file."""
