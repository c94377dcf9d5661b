"""Who may open what: the rules by which files are opened for a disk, and what opens them."""
