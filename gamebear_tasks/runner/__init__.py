"""The runner: the program that is uploaded to the builder and runs jobs there. Standard library only, Python 3.9."""
