"""Serve one client's session."""
