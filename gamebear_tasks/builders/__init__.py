"""Builders: places where jobs run."""
