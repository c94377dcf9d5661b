"""Arguments to calls."""
