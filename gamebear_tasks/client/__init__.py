"""Build of one task: submit the job, follow it, install the outputs."""
