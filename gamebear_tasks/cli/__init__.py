"""The commands that `gamebear` adds to doit's, one file per command."""
