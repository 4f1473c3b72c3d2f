"""SSH transport, based on paramiko."""
