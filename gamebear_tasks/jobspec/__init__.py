"""The job as data, and its digest."""
