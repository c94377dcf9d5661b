"""Image formats: bytes to values and back. Must not open a file, nor import a driver."""
