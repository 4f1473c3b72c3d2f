"""`doctor`: check builders and this machine, and fix what can be fixed."""
