"""Upstream source trees: pins, the lock file, fetching."""
