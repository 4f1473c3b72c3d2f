"""Wire format and pseudo-terminals, shared by client and runner."""
