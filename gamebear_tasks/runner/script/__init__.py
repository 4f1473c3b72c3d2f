"""The names that a buildscript sees."""
