"""`doctor`: check the builders and this machine, and apply fixes."""
