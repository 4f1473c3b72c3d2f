"""The runner: what travels to the builder and runs jobs there. Python 3.9 and its standard library, nothing of ours."""
