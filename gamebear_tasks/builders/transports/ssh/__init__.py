"""The SSH transport, on paramiko."""
