"""Commands beside doit's own: what a person asks of builders and of what was built. They run no task."""
