"""Builders: where jobs run."""
