"""What QCOW images of both versions have in common: two levels of tables, and changes of them step by step."""
