"""Atomic files and error types."""
