"""Capabilities of this machine, and the programs that are run on it."""
