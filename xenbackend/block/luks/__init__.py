"""Disks encrypted in the LUKS format: getting a volume's key, and encrypting its sectors."""
