"""Task logs, task records and the journal of runs."""
