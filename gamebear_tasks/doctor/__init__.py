"""What `doit doctor` knows: whether a builder is ready to build, what it lacks, and how that is mended."""
