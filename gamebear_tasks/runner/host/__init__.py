"""Capabilities of this machine, and the programs that run on it."""
