"""Run one job: supervisor, worker process, workspace."""
