"""Disks that are encrypted as LUKS has it: the key of a volume, and the encryption of its sectors."""
