"""Utilities: text, messages, files and processes."""
