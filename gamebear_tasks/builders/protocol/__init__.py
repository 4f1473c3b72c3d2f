"""Client side of the runner protocol."""
