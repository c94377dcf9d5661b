"""What is done to images of a format by commands: a module each, which the format's row names."""
