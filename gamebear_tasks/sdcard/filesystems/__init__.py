"""Partitions and file systems of an image, and the tree of its files."""
