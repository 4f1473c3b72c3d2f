"""The runner: what travels to the builder and runs jobs there. Standard library only, Python 3.9."""
