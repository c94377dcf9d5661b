"""The common part of both versions of QCOW images: two levels of tables, and their changes, step by step."""
