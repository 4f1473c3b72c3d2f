"""Builder that consists of the workers of a Dask scheduler."""
