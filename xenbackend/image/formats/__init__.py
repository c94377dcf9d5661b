"""What commands do to images of each format: one module per format, which the format's row names."""
