"""Task logs, task records and the run journal."""
