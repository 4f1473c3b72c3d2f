"""Task dicts, actions and the reporter for doit."""
