"""What is put into a Xen host: the files, where they go, and how they are taken away again."""
