"""The common part of image formats that keep a disk's clusters anywhere in a file, and tables that place them."""
