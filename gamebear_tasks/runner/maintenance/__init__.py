"""Garbage collection, retained containers, cleanup after lost jobs."""
