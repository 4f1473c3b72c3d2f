"""Client side of the protocol that the runner speaks."""
