"""The process that watches xenstore and keeps a worker per vbd."""
