"""Atomic files and errors."""
