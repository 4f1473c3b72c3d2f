"""The buildscript environment: everything that a buildscript can use."""
