"""`gamebear init`: the files of a new project, for the build system that its source has."""
