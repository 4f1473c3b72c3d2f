"""One task's build: submit, follow, install the outputs."""
