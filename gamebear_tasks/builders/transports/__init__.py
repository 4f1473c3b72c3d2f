"""Transports: ways to start the runner on a builder."""
