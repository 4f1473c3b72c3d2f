"""A builder behind a Dask scheduler."""
