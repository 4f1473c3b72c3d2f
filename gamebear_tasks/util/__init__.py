"""Text, messages and processes."""
