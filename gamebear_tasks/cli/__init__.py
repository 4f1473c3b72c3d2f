"""Commands beside doit's own, one file a verb."""
